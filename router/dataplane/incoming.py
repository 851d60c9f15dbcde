"""Requests of the data plane on their way in: the head is checked, the body received and parsed.

Small bodies are parsed on the event loop, large ones on a thread and in their short form (see `shortening`). The
result is a `Wish` and the body for the engine, or a refusal. Exchanges of translated APIs override methods of the
last section.
"""

from __future__ import annotations

import asyncio
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from random import getrandbits
from typing import Any, Protocol

from router.config.names import some_of
from router.config.resolved import ModelConfig
from router.dataplane.answer import Answer
from router.dataplane.burden import burden
from router.dataplane.capture import Captures, recording_of
from router.dataplane.fitting import Lacking, fitted
from router.dataplane.forms import with_text
from router.dataplane.heads import Admission, RequestHead, check_head_size
from router.dataplane.limits import Bodies
from router.dataplane.media import DEPTH as DEPTH_OF_MEDIA
from router.dataplane.media import LONGEST_NAME, check_media, may_name_media
from router.dataplane.rewriting import depth_of, rewritten
from router.dataplane.routing import Wish, priority_of, read_wish, shortened
from router.dataplane.shortening import Shortened, Text, most_values
from router.engines.llamacpp.capability import answers
from router.engines.manner import Manner, Question
from router.engines.registry import kind_of
from router.engines.upstream import Body
from router.formats.unreadable import UNREADABLE
from router.http.auth import Client, Keyring
from router.http.errors import ApiError, Unable
from router.http.origins import Browsers
from router.http.routes import ROUTES, Route, Stream, served_routes
from router.runtime.dispatcher import Dispatcher
from router.scheduling.queue import Priority
from router.system.large_memory import LargeMemory, Pieces

_READ_AT_ONCE = 1 << 20
"""Bodies up to this size are parsed on the event loop in a few milliseconds, unless they have too many values."""
_LITTLE = 64 << 10
"""Bodies up to this size cannot have too many values for the event loop."""
_MOST_VALUES = 1 << 14
"""Maximum number of values that are parsed on the event loop."""
_PLACE = re.compile(r" \(byte \d+\)")
"""The place of an error in the short form of a large body, which says nothing about the body itself."""

_WOULD_SHOW_PROMPT = (
    "The answer would hold the alias's system prompt, which this API key may not see; ask for {!r} instead."
)


class Shared(Protocol):
    """State shared by all requests."""

    dispatcher: Dispatcher
    keyring: Keyring
    browsers: Browsers
    bodies: Bodies
    readers: ThreadPoolExecutor
    live: dict[Any, float]
    captures: Captures


class IncomingRequest(ABC):
    """A request from its first byte until its intent is known."""

    __slots__ = (
        "_answer",
        "_body",
        "_burden",
        "_client",
        "_dispatcher",
        "_head",
        "_held",
        "_id_line",
        "_is_over",
        "_large",
        "_lines",
        "_path",
        "_question",
        "_read_for",
        "_received",
        "_request_id",
        "_shared",
        "_to_come",
    )

    def __init__(self, shared: Shared, answer: Answer, head: RequestHead) -> None:
        self._shared = shared
        self._dispatcher = shared.dispatcher
        self._answer = answer
        self._head = head
        self._path = head.path
        """Path of the engine to which the body is sent; empty: it is not asked."""
        self._client: Client | None = None
        self._request_id = ""
        self._id_line = b""
        self._lines = b""
        """Further headers of every response."""
        self._received: bytes | bytearray = b""
        """Body received so far."""
        self._large: LargeMemory | None = None
        """Large body, until the request has ended."""
        self._to_come = 0
        self._held = 0
        """Bytes counted towards the limit on all request bodies."""
        self._burden = 0
        """Part of `_held` expected for the engine, if the body has many values."""
        self._body: Body = b""
        self._read_for: Manner | None = None
        """The manner of the kind of engine for which the body was translated."""
        self._question: Question | None = None
        """The engine's request, if its kind of engine has an API of its own."""
        self._is_over = False

    # --- what comes after it ------------------------------------------------------------------------------

    @abstractmethod
    def _submit(self, wish: Wish) -> None:
        """Queue the request, which has been read completely."""

    @abstractmethod
    def _refuse(self, error: ApiError) -> None:
        """Refuse a request that was never queued."""

    @abstractmethod
    def attempt(self, step: Callable[..., None], *arguments: object) -> None:
        """Take a step on behalf of the event loop, which could not tell the client of an exception."""

    # --- its head -----------------------------------------------------------------------------------------

    def begin(self, to_come: int) -> None:
        self._to_come = to_come
        self._shared.live[self] = time.monotonic()
        self._be_called(self._identify())
        try:
            self._admit(to_come)
        except ApiError as error:
            self._refuse(error)
        else:
            if self._head.fields.get(b"expect", b"").lower() == b"100-continue":
                self._answer.invite_body()

    def _identify(self) -> str:
        given = self._head.fields.get(b"x-request-id", b"")
        if 0 < len(given) <= 128 and all(0x21 <= byte <= 0x7E for byte in given):
            request_id = given.decode("ascii")
            if not self._dispatcher.is_taken(request_id):
                return request_id
        return _new_id()

    def _be_called(self, request_id: str) -> None:
        self._request_id = request_id
        self._id_line = f"x-request-id: {request_id}\r\n".encode()

    def _admit(self, to_come: int) -> None:
        """Check the request before its body is read. Raises ApiError."""
        config = self._dispatcher.config
        admission = self._head.admission
        if admission is None or admission.config is not config:
            self._check_head()
            admission = self._head.admission = Admission(config, self._client, self._lines, self._answer.peer)
        self._client, self._lines = admission.client, admission.lines
        if to_come:  # a body that is too large is not read at all
            if to_come > config.api.max_body_mb << 20:
                raise self._too_large()
            self._shared.bodies.check(to_come, config.api.max_bodies_mb << 20, self._priority_of_head)

    def _check_head(self) -> None:
        """Check origin, key and headers, which all requests with this head share. Raises ApiError."""
        fields = self._head.fields
        if (origin := fields.get(b"origin")) is not None:
            self._lines = self._shared.browsers.origin_lines(origin, self._head.path)
        self._shared.browsers.check(self._head.headers, self._head.http_version, self._head.path, has_effect=True)
        self._client = self._shared.keyring.check(self._head.headers, manages=False)
        if fields.get(b"content-encoding", b"identity") != b"identity":
            raise ApiError(415, "unsupported_encoding", "Send the body without Content-Encoding.")
        check_head_size(self._head.target, self._head.forwarded)

    def _too_large(self) -> ApiError:
        limit = self._dispatcher.config.api.max_body_mb
        return ApiError(413, "body_too_large", f"The body is larger than {limit} MiB (api.max_body_mb).")

    def _priority_of_head(self) -> Priority:
        return priority_of(self._head.fields, self._client)

    @property
    def _client_name(self) -> str:
        return "" if self._client is None else self._client.name

    def _identify_again(self) -> None:
        """Take another id if a request that came while the body was read has this one."""
        if b"x-request-id" in self._head.fields and self._dispatcher.is_taken(self._request_id):
            self._be_called(_new_id())

    # --- its body -------------------------------------------------------------------------------------------

    def add_body(self, part: bytes) -> None:
        if self._is_over:
            return
        api = self._dispatcher.config.api
        size = len(part)
        try:
            if self._held + size > api.max_body_mb << 20:
                raise self._too_large()
            self._hold(size)
        except ApiError as error:
            self._refuse(error)
            return
        if self._large is not None:
            self._large.add(part)
        elif self._held > _READ_AT_ONCE:
            self._large = LargeMemory(self._to_come + self._held if self._to_come else api.max_body_mb << 20)
            self._large.add(self._received)
            self._large.add(part)
            self._received = b""
        elif size == self._held:
            self._received = part
        else:
            if isinstance(self._received, bytes):
                self._received = bytearray(self._received)  # not a list: crumbs would take many times their size
            self._received += part

    def _hold(self, size: int) -> None:
        """Count bytes towards the limit on all request bodies. Raises ApiError 503."""
        self._shared.bodies.hold(size, self._dispatcher.config.api.max_bodies_mb << 20, self._priority_of_head)
        self._held += size

    def end_body(self) -> None:
        if self._is_over:
            return
        if self._large is not None:
            view = self._large.view()
            self._body = Pieces(view)
            if self._shared.captures.enabled:
                self._note_question(view)
            self._read_apart(view)
            return
        body = self._body = bytes(self._received)
        self._received = b""
        if self._shared.captures.enabled:
            self._note_question(body)
        if len(body) > _LITTLE and (self._head.is_form or most_values(body) > _MOST_VALUES):
            self._read_apart(memoryview(body))
            return
        try:
            wish, text = self._read_fitted(body)
            self._body = self._in_its_manner(wish, text, len(body))
            if wish.known_as is not None and self._head.is_form:
                self._body = self._renamed(body, wish.known_as)
        except ApiError as error:
            self._refuse(self._advised(error))
        except UNREADABLE as error:
            self._refuse(_unreadable(error))
        else:
            self._submit(wish)

    def _note_question(self, body: bytes | memoryview) -> None:
        if (recording := recording_of(self._answer)) is not None:
            recording.note_question(body)

    def _read_apart(self, body: memoryview) -> None:
        """Parse a large body on a thread. There is one such thread, as several would slow down the event loop."""
        loop = asyncio.get_running_loop()
        reading = self._shared.readers.submit(self._read_large, body)
        reading.add_done_callback(lambda reading: loop.call_soon_threadsafe(self.attempt, self._was_read, reading))

    def _read_large(self, body: memoryview) -> tuple[Wish, Pieces]:
        """Parse a large body in steps, between which other threads can run. Raises ApiError."""
        if self._head.is_form:
            wish, _ = self._read(body)  # which does not rewrite forms
            return wish, Pieces(body) if wish.known_as is None else self._renamed(body, wish.known_as)
        depth = self._depth()
        of_engine = partial(burden, route=ROUTES[self._head.path])
        while True:
            short = shortened(body, depth, of_engine)  # which refuses too many values before the rest is read
            self._burden = of_engine(short.count)
            try:
                wish, text = self._read_fitted(short.text)
                needed = self._depth_of(wish, short)
                if needed <= depth:
                    text = self._in_its_manner(wish, text, len(body))
                    self._restore(short)
                    return wish, short.restored(text)
            except ApiError as error:
                raise replace(error, message=_PLACE.sub("", error.message)) from None
            depth = needed

    def _was_read(self, reading: Future[tuple[Wish, Pieces]]) -> None:
        failure = reading.exception()  # raised here, it and this frame would keep each other and the body alive
        if self._is_over:  # the client has disconnected
            if failure is None:
                self._shared.readers.submit(reading.result()[1].give_back)
        elif isinstance(failure, ApiError):
            self._refuse(self._advised(failure))
        elif isinstance(failure, UNREADABLE):
            self._refuse(_unreadable(failure))
        else:
            wish, self._body = reading.result()
            try:
                self._hold_burden()
                self._hold(self._body.copied)
            except ApiError as error:
                self._refuse(error)
            else:
                self._submit(wish)

    def _hold_burden(self) -> None:
        """Count the memory that the engine needs for the body's values. Raises ApiError 503, and 413 if that alone
        exceeds the limit.
        """
        limit = self._dispatcher.config.api.max_bodies_mb << 20
        if self._burden > limit:
            message = (
                f"The body has so many values that an engine needs {self._burden >> 20} MiB for them, and all "
                f"bodies together may take {limit >> 20} MiB (api.max_bodies_mb)."
            )
            raise ApiError(413, "body_too_large", message)
        self._hold(self._burden)

    # --- what it asks for -----------------------------------------------------------------------------------

    def _read(self, body: Text) -> tuple[Wish, Text]:
        """Parse the body. Returns the request's intent and the body for the engine. Raises ApiError."""
        head = self._head
        route = ROUTES[head.path]
        wish = read_wish(body, head.fields, self._dispatcher.config, self._client, head.model)
        self._path = wish.path_of(head.path)
        if wish.streams and route.stream is Stream.NONE:  # the engine answers with a document all the same
            wish = wish._replace(streams=False)
        if not self._may_name_addresses() and may_name_media(body) and not self._head.is_form:
            check_media(body)
        if wish.asked_as is not None:
            if self._client is not None and route.shows_prompt and wish.asked_as.speaks:
                raise ApiError(403, "insufficient_permissions", _WOULD_SHOW_PROMPT.format(wish.alias))
            body = rewritten(body, route.conversation, wish.asked_as)
        return wish, body

    def _read_fitted(self, body: Text) -> tuple[Wish, Text]:
        """Parse the body, and fit it to an engine other than llama-server. Raises ApiError."""
        wish, body = self._read(body)
        if (wish.known_as is None and wish.parameters is None) or not body or self._head.is_form:
            return wish, body
        try:
            return wish, fitted(body, wish, self._route_of_engine())
        except Lacking as error:
            name = error.parameter
            others = self._others(lambda model: model.parameters is None or name in model.parameters)
            message = f"{wish.alias!r} does not take `{name}`. {others}."
            raise ApiError(400, "not_supported", message, name) from None

    def _advised(self, error: ApiError) -> ApiError:
        """Return an error with the models that can do what it says that this one cannot."""
        if isinstance(error, Unable):
            error.message += f" {self._others(error.is_able)}."
        return error

    def _others(self, able: Callable[[ModelConfig], bool]) -> str:
        """Return advice which models to use instead: those that are `able`, and made for such requests."""
        asks = ROUTES[self._head.path].asks
        models = self._dispatcher.config.models.items()
        others = [alias for alias, model in models if able(model) and answers(model, asks)]
        return f"Ask {some_of(others)} instead" if others else "No model here does"

    def _manner(self, alias: str) -> Manner | None:
        """Return how requests are translated for a model's engines; None: not beyond parameters and names."""
        model = self._dispatcher.config.models.get(alias)
        manner = None if model is None else kind_of(model).manner
        return None if manner is None or self._head.is_form else manner

    def _in_its_manner(self, wish: Wish, body: Text, size: int) -> Text:
        """Return the body in the engine's own API. `size`: bytes of the client's body. Raises ApiError."""
        manner = self._read_for = self._manner(wish.alias)
        if manner is None:
            return body
        model = self._dispatcher.config.models[wish.alias]
        self._question = manner.question(model, self._path, body, size)
        return body if self._question is None else self._question.body

    def _translate_anew(self, model: ModelConfig) -> Body:
        """Return the body translated for another kind of engine, to which the model fell back while it waited.

        Blocking. Raises ApiError.
        """
        path, body = self._path, self._body
        if path not in served_routes(model.routes):
            message = f"{model.alias!r} runs on another kind of engine by now. Send the request again."
            raise ApiError(503, "unavailable", message, "model", retry_after_sec=1)
        text = b"".join(body.parts) if isinstance(body, Pieces) else body
        manner = self._read_for = self._manner(model.alias)
        self._question = None if manner is None else manner.question(model, path, text, len(text))
        return body if self._question is None else self._question.body

    def _renamed(self, form: Text, name: str) -> Pieces:
        """Return a form with the engine's name of the model."""
        return with_text(form, self._head.fields[b"content-type"], "model", name)

    def _may_name_addresses(self) -> bool:
        """Whether the engine may fetch URLs for the client."""
        return self._client is None or self._dispatcher.config.api.remote_media

    def _route_of_engine(self) -> Route | None:
        """Return the engine's route. None: a path that is no route of the data plane, or no request at all."""
        return ROUTES.get(self._path)

    def _depth(self) -> int:
        """Return the depth to which a large body is parsed at first."""
        return 1

    def _depth_of(self, wish: Wish, short: Shortened) -> int:
        """Return the depth to which a body has to be parsed, as far as this short form of it shows."""
        depth = 1
        if (manner := self._manner(wish.alias)) is not None:
            depth = manner.depth(self._dispatcher.config.models[wish.alias], self._path, short.text)
        if wish.asked_as is not None:
            route = self._route_of_engine()
            depth = max(depth, depth_of(None if route is None else route.conversation, wish.asked_as))
        if not self._may_name_addresses() and any(map(may_name_media, short.in_steps(LONGEST_NAME))):
            return max(depth, DEPTH_OF_MEDIA)
        return depth

    def _restore(self, short: Shortened) -> None:  # noqa: B027
        """Restore other values that were read from the short form of a large body."""


def _unreadable(error: Exception) -> ApiError:
    return ApiError(400, "invalid_json", f"The body cannot be read: {error}.")


def _new_id() -> str:
    return f"{getrandbits(96):024x}"
