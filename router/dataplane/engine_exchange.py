"""`/upstream/MODEL/…`, as in llama-swap: every path of that model's engine.

Routes of the data plane behave as without the prefix, which only names their model. Other paths are forwarded
without a slot, and load the model as a chat does. They need full access unless they only read, as they may change
settings of the engine for all clients.
"""

from __future__ import annotations

import copy
from urllib.parse import quote

from router.config.names import LONGEST, meant, same_name
from router.config.resolved import DEFAULT_ENGINE, Config
from router.dataplane.exchange import Exchange
from router.dataplane.heads import RequestHead, check_head_size, forwarded
from router.dataplane.routing import Wish, wish_of
from router.dataplane.shortening import Text
from router.engines.documents import Documents, for_clients
from router.engines.registry import KINDS, kind_of
from router.engines.upstream import Head
from router.http.errors import ApiError
from router.system.large_memory import Pieces

_PREFIX = "/upstream/"
_METHODS = frozenset({b"GET", b"POST", b"PUT", b"DELETE"})
_CLOSED = "The engine's {} is closed: load and unload models through the router (/v1/models/load and …/eject)."
_KEPT = (
    "The router saves and restores what the slots of {alias!r} hold (kv_store). To do that yourself, name a "
    "folder of your own by --slot-save-path in its flags."
)
_MOST_PARTS = 8
"""Maximum number of path segments in which a model's name is looked for."""


def is_for_engine(head: RequestHead) -> bool:
    return head.path.startswith(_PREFIX) and head.method in _METHODS


def of_engine(head: RequestHead, config: Config) -> RequestHead:
    """Return the head without the prefix, and with the model that it names."""
    name, path = _parted(head.path.removeprefix(_PREFIX), config)
    inner = copy.copy(head)
    inner.admission = None
    inner.model = name
    inner.path = path
    inner.forwarded = forwarded(head.headers, path)
    inner.target = quote(path, safe="/:@!$&'()*+,;=~").encode() + (b"?" + head.query if head.query else b"")
    return inner


def _parted(path: str, config: Config) -> tuple[str, str]:
    """Split a path after the longest beginning that names a model. Without one, all of it is the name."""
    parts = path.split("/")
    ends = range(min(len(parts), _MOST_PARTS), 0, -1)
    beginnings = [(name, end) for end in ends if len(name := "/".join(parts[:end])) <= LONGEST]
    for name, end in beginnings:
        if same_name(name, config) is not None:
            return name, "/" + "/".join(parts[end:])
    for name, end in beginnings[-4:]:
        if meant(name, config) is not None:
            return name, "/" + "/".join(parts[end:])
    return path, "/"


class EngineExchange(Exchange):
    """An exchange at a path of an engine that is no route of the data plane."""

    __slots__ = ()

    _takes_encoded = True

    def _check_head(self) -> None:
        super()._check_head()
        check_head_size(*self._asked_of_engine())
        documents = self._documents()
        if self._head.path in documents.closed:
            raise ApiError(403, "not_allowed", _CLOSED.format(self._head.path))
        looks = self._head.method == b"GET" and self._head.path in documents.readable
        self._shared.keyring.check(self._head.headers, manages=not looks)

    def _read(self, body: Text) -> tuple[Wish, Text]:
        wish = wish_of(self._head.model, False, self._head.fields, self._dispatcher.config, self._client)
        return wish._replace(asked_as=None, known_as=None, parameters=None), body

    def _read_large(self, body: memoryview) -> tuple[Wish, Pieces]:
        return self._read(body)[0], Pieces(body)

    def _manner(self, alias: str) -> None:
        """Return None: the client uses the engine's own API."""

    def _is_slotless(self) -> bool:
        return True

    def _ask(self) -> None:
        """Refuse what would save to the router's folder, or change what it knows of the slots."""
        ticket = self._ticket
        assert ticket is not None
        assert ticket.engine is not None
        if ticket.engine.handle.keeper is not None and self._head.path.startswith("/slots/"):
            self._fail(ApiError(409, "slots_are_kept", _KEPT.format(alias=ticket.alias)))
        else:
            super()._ask()

    def _not_served(self, wish: Wish) -> ApiError | None:
        """Return None: the engine answers for its paths itself."""
        return None

    def _asked_of_engine(self) -> tuple[bytes, bytes]:
        """Forward the accepted encodings, too: llama-server has its web page in gzip only."""
        target, lines = super()._asked_of_engine()
        encodings = self._head.fields.get(b"accept-encoding")
        return target, lines if encodings is None else b"%baccept-encoding: %b\r\n" % (lines, encodings)

    def _documents(self) -> Documents:
        config = self._dispatcher.config
        name = meant(self._head.model, config)
        kind = KINDS[DEFAULT_ENGINE] if name is None else kind_of(config.model_of(name))
        return kind.documents

    def _is_for_less(self, head: Head) -> bool:
        """Whether the client may see only a part of the engine's document."""
        return self._client is not None and head.status < 400 and self._head.path in self._documents().private

    def _is_read_whole(self, head: Head) -> bool:
        return self._is_for_less(head) or super()._is_read_whole(head)

    def _answer_whole(self, head: Head, body: bytes) -> None:
        if self._is_for_less(head):
            try:
                body = for_clients(body)
            except ApiError as error:
                self._fail(error)
                return
        super()._answer_whole(head, body)

    def _route(self) -> str:
        return _PREFIX.rstrip("/")
