"""The intent of a request of the data plane: its model, its priority, and whether it wants a stream.

Names are resolved to models here: all that follows, queues and metrics included, knows models only. Of a body,
only a few top-level keys are decoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from router.catalog.lookup import check_name, known_as, named_by_nobody
from router.config.resolved import AliasConfig, Config
from router.dataplane.forms import is_form, text_fields
from router.dataplane.shortening import MOST_VALUES, Count, Shortened, Text, TooManyValues
from router.formats.unreadable import UNREADABLE
from router.http.auth import Client
from router.http.errors import ApiError
from router.http.routes import ROUTES, served_routes
from router.scheduling.queue import BY_NAME, NAMES, Priority

_PRIORITIES = {
    **{name.encode(): priority for priority, name in NAMES.items()},
    **{str(priority.value).encode(): priority for priority in Priority},
}


class Shape(NamedTuple):
    """The number of answers that a request asks for, where its route can give several."""

    per_prompt: int = 1
    prompts: int = 1

    @property
    def several(self) -> bool:
        return self.per_prompt * self.prompts > 1


ONE = Shape()


class Wish(NamedTuple):
    """The intent of a request."""

    alias: str
    """The model's own name."""
    streams: bool
    priority: Priority
    asked_as: AliasConfig | None = None
    """The alias that the client named, if it changes the request."""
    answers: Shape = ONE
    routes: frozenset[str] | None = None
    """Routes that the engine serves; None: those of llama-server."""
    known_as: str | None = None
    """The engine's name of the model, if the body has to be changed to it."""
    parameters: Mapping[str, str] | None = None
    """See `ModelConfig.parameters`."""
    names_slot: bool = False
    """Whether the body says something about the engine's slots or the number of answers."""

    @property
    def is_for_llama_server(self) -> bool:
        """Whether the engine understands all of llama-server's parameters."""
        return self.parameters is None

    def path_of(self, path: str) -> str:
        """The path among those of the same route at which its engine has it, if it has it at all."""
        if self.routes is None or path in self.routes:
            return path
        return next((other for other in ROUTES[path].paths if other in self.routes), path)

    def is_served(self, path: str) -> bool:
        """Whether the engine has that route."""
        return path in served_routes(self.routes)


_NO_PROMPT = msgspec.Raw(b"")
_LIST_OF_PROMPTS = re.compile(rb'\[\s*["\[{]')
"""The beginning of a list of prompts. Other lists are one prompt of tokens, perhaps many: they are not decoded."""


class _Envelope(msgspec.Struct):
    model: Any = None
    stream: Any = None
    n: Any = None
    n_cmpl: Any = None
    """llama-server's name of `n`."""
    id_slot: Any = None
    cache_prompt: Any = None
    previous_response_id: Any = None
    prompt: msgspec.Raw = _NO_PROMPT


_decode = msgspec.json.Decoder(_Envelope).decode
_decode_prompts = msgspec.json.Decoder(list[msgspec.Raw]).decode


def read_wish(
    body: Text,
    headers: Mapping[bytes, bytes],
    config: Config,
    client: Client | None = None,
    model: str = "",
) -> Wish:
    """Return the intent of a request. `model` is the one that its path names, if any.

    Raises ApiError for a body that cannot be parsed, and for an unknown model.
    """
    content_type = headers.get(b"content-type", b"")
    if is_form(content_type):
        fields = text_fields(body, content_type, ("model", "stream"))
        streams = fields.get("stream", "").lower() in ("true", "1")
        wish = wish_of(model or fields.get("model"), streams, headers, config, client)
        return wish._replace(asked_as=None)  # forms are not rewritten, but for the model's name
    envelope = _read_envelope(body)
    names_slot = not (
        envelope.n is None
        and envelope.n_cmpl is None
        and envelope.id_slot is None
        and envelope.cache_prompt is None
        and envelope.previous_response_id is None
    )
    wish = wish_of(
        model or envelope.model, envelope.stream is True, headers, config, client, names_slot=names_slot
    )
    answers = _shape_of(envelope)
    return wish if answers is ONE else wish._replace(answers=answers)


def shape_of(body: Text) -> Shape:
    """Return the number of answers that a body asks for. Raises ApiError unless it is a JSON object."""
    return _shape_of(_read_envelope(body))


def _shape_of(envelope: _Envelope) -> Shape:
    """Values that an engine would refuse count as one."""
    prompt, wanted = envelope.prompt, envelope.n if envelope.n_cmpl is None else envelope.n_cmpl
    if wanted is None and prompt is _NO_PROMPT:
        return ONE
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        wanted = 1
    prompts = 1
    if _LIST_OF_PROMPTS.match(prompt):
        parts = _decode_prompts(prompt)
        if all(_first(part) in (b'"', b"[", b"{") for part in parts):  # else it is one, of tokens
            prompts = max(1, len(parts))
    return Shape(wanted, prompts) if wanted * prompts > 1 else ONE


def _first(raw: msgspec.Raw) -> bytes:
    return bytes(memoryview(raw)[:1])


def wish_of(
    model: object,
    streams: bool,
    headers: Mapping[bytes, bytes],
    config: Config,
    client: Client | None = None,
    *,
    names_slot: bool = False,
) -> Wish:
    """Resolve a model's name and a priority. Raises ApiError for unknown ones."""
    if not model and (model is None or model == ""):
        model = named_by_nobody(config)
    if not isinstance(model, str):
        raise ApiError(400, "invalid_model", f"`model` must be a string, not {type(model).__name__}.", "model")
    check_name(model)
    asked_as = config.aliases.get(model)
    known = config.models.get(model) if asked_as is None else None
    if known is None:
        if asked_as is None:
            model = known_as(model, config)
            asked_as = config.aliases.get(model)
        known = config.model_of(model)
    wanted = headers.get(b"x-request-priority")
    if wanted is not None:
        priority = _priority(wanted)
    else:
        own = client.priority if client is not None else None
        priority = BY_NAME[(asked_as and asked_as.priority) or own or known.priority]
    if client is not None:
        priority = max(priority, client.highest)
    asked_as = asked_as if asked_as is not None and asked_as.rewrites else None
    if known.routes is None:
        return Wish(known.alias, streams, priority, asked_as, ONE, None, None, None, names_slot)
    others = (known.routes, known.known_as, known.parameters)
    return Wish(known.alias, streams, priority, asked_as, ONE, *others, names_slot)


def priority_of(headers: Mapping[bytes, bytes], client: Client | None) -> Priority:
    """Return the priority of a request whose model is not known yet, by its head and its key."""
    wanted = _PRIORITIES.get(headers.get(b"x-request-priority", b"").strip().lower())
    if client is None:
        return wanted or Priority.NORMAL
    return max(wanted or BY_NAME[client.priority or "normal"], client.highest)


def _priority(wanted: bytes) -> Priority:
    priority = _PRIORITIES.get(wanted.strip().lower())
    if priority is None:
        raise ApiError(
            400,
            "invalid_priority",
            "X-Request-Priority must be high, normal or low (1, 2 or 3).",
            "X-Request-Priority",
        )
    return priority


def lists_prompts(short: Shortened) -> bool:
    """Whether a request has a list of prompts, and not one prompt of tokens. Raises ApiError."""
    return short.first_of_list(bytes(_read_envelope(short.text).prompt)) in (b'"', b"[", b"{")


def shortened(body: Text, depth: int, check: Callable[[Count], object]) -> Shortened:
    """Return the short form of a JSON document down to a depth. Raises ApiError, also what `check` raises."""
    try:
        return Shortened(body, depth, check)
    except TooManyValues:
        message = (
            f"The body has too many values to be taken apart: besides long texts, at most {MOST_VALUES} in 8 MiB."
        )
        raise ApiError(413, "body_too_large", message) from None
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _unreadable(error) from None


def _read_envelope(body: Text) -> _Envelope:
    try:
        return _decode(body)
    except UNREADABLE as error:
        if not body:
            raise ApiError(400, "invalid_json", "The body is empty.") from None
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> ApiError:
    is_deep = isinstance(error, RecursionError)
    what = "is nested too deeply" if is_deep else f"is not a JSON object: {error}"
    return ApiError(400, "invalid_json", f"The body {what}.")
