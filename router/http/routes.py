"""The routes of the data plane, one row each: the API, the kind of request, the format of bodies.

Errors, dispatch, rewriting, the description at `/openapi.json` and `docs/api.md` all depend on these rows, and no
other code compares paths. A further POST route of the data plane is a row here, and if it is translated, a
subclass of `Exchange`. All other routes are management endpoints (see `pages`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, NamedTuple

Ask = Literal[
    "chat", "completion", "response", "embedding", "ranking", "transcription", "speech", "image", "count", "text"
]
"""The kind of request. `count`: the number of tokens of a request; `text`: the output of tokenizer or template."""


class Dialect(Enum):
    """The API of a route, which determines the format of its errors and streams."""

    OPENAI = auto()
    LLAMA_SERVER = auto()
    """llama-server's own API: OpenAI's error format, and streams that end with the response."""
    ANTHROPIC = auto()
    OLLAMA = auto()
    """Ollama's API, which no engine has: its requests are translated for one, and the answers back."""


class Stream(Enum):
    """The format of an answer if the request has `stream`."""

    NONE = auto()
    """A document all the same: the route has no streams."""
    OPEN = auto()
    """Events without a mark at their end."""
    CLOSED = auto()
    """Events with a mark at their end: without it, an answer is incomplete even if HTTP's framing is not."""


class Conversation(NamedTuple):
    """The fields of a request that hold its messages and its system prompt."""

    messages: str
    prompt: str | None = None
    """The field of the system prompt; None: it is the first message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One or more paths for POST requests whose body names the model."""

    paths: tuple[str, ...]
    dialect: Dialect
    asks: Ask
    body: Literal["json", "form"] = "json"
    stream: Stream = Stream.NONE
    needs_slot: bool = True
    """Whether a request occupies a slot of its engine."""
    conversation: Conversation | None = None
    """None: requests have no system prompt."""
    shows_prompt: bool = False
    """Whether the answer quotes the system prompt."""
    of_llama_server: bool = True
    """Whether llama-server has this route."""


_MESSAGES = Conversation("messages")
_ANTHROPICS = Conversation("messages", "system")
_INPUT = Conversation("input", "instructions")

TABLE = (
    Route(
        paths=("/v1/chat/completions", "/chat/completions"),
        dialect=Dialect.OPENAI,
        asks="chat",
        stream=Stream.CLOSED,
        conversation=_MESSAGES,
    ),
    Route(
        paths=("/v1/chat/completions/input_tokens", "/chat/completions/input_tokens"),
        dialect=Dialect.OPENAI,
        asks="count",
        needs_slot=False,
        conversation=_MESSAGES,
    ),
    Route(paths=("/v1/completions",), dialect=Dialect.OPENAI, asks="completion", stream=Stream.CLOSED),
    Route(
        paths=("/v1/responses", "/responses"),
        dialect=Dialect.OPENAI,
        asks="response",
        stream=Stream.CLOSED,
        conversation=_INPUT,
    ),
    Route(
        paths=("/v1/responses/input_tokens", "/responses/input_tokens"),
        dialect=Dialect.OPENAI,
        asks="count",
        needs_slot=False,
        conversation=_INPUT,
    ),
    Route(
        paths=("/v1/messages",),
        dialect=Dialect.ANTHROPIC,
        asks="chat",
        stream=Stream.CLOSED,
        conversation=_ANTHROPICS,
    ),
    Route(
        paths=("/v1/messages/count_tokens",),
        dialect=Dialect.ANTHROPIC,
        asks="count",
        needs_slot=False,
        conversation=_ANTHROPICS,
    ),
    Route(paths=("/v1/embeddings",), dialect=Dialect.OPENAI, asks="embedding"),
    Route(
        paths=("/v1/rerank", "/v1/reranking", "/rerank", "/reranking"),
        dialect=Dialect.LLAMA_SERVER,
        asks="ranking",
    ),
    Route(
        paths=("/v1/audio/transcriptions", "/audio/transcriptions"),
        dialect=Dialect.OPENAI,
        asks="transcription",
        body="form",
        stream=Stream.OPEN,
    ),
    Route(
        paths=("/v1/audio/translations",),
        dialect=Dialect.OPENAI,
        asks="transcription",
        body="form",
        of_llama_server=False,
    ),
    Route(
        paths=("/v1/audio/speech",),
        dialect=Dialect.OPENAI,
        asks="speech",
        stream=Stream.OPEN,
        of_llama_server=False,
    ),
    Route(paths=("/v1/images/generations",), dialect=Dialect.OPENAI, asks="image", of_llama_server=False),
    Route(
        paths=("/v1/images/edits", "/v1/images/variations"),
        dialect=Dialect.OPENAI,
        asks="image",
        body="form",
        of_llama_server=False,
    ),
    Route(
        paths=("/completion", "/completions"),
        dialect=Dialect.LLAMA_SERVER,
        asks="completion",
        stream=Stream.OPEN,
    ),
    Route(paths=("/infill",), dialect=Dialect.LLAMA_SERVER, asks="completion", stream=Stream.OPEN),
    Route(paths=("/embedding", "/embeddings"), dialect=Dialect.LLAMA_SERVER, asks="embedding"),
    Route(paths=("/tokenize", "/detokenize"), dialect=Dialect.LLAMA_SERVER, asks="text", needs_slot=False),
    Route(
        paths=("/apply-template",),
        dialect=Dialect.LLAMA_SERVER,
        asks="text",
        needs_slot=False,
        conversation=_MESSAGES,
        shows_prompt=True,
    ),
    Route(paths=("/api/chat", "/chat"), dialect=Dialect.OLLAMA, asks="chat", stream=Stream.CLOSED),
    Route(paths=("/api/generate",), dialect=Dialect.OLLAMA, asks="completion", stream=Stream.CLOSED),
    Route(paths=("/api/embed", "/api/embeddings"), dialect=Dialect.OLLAMA, asks="embedding"),
)

ROUTES: Mapping[str, Route] = {path: route for route in TABLE for path in route.paths}
"""The route of each path."""
CHATS = "/v1/chat/completions"
"""Path of the engine's chats, to which requests of other APIs are translated if the engine lacks their route."""
SERVED = tuple(path for path, route in ROUTES.items() if route.dialect is not Dialect.OLLAMA)
"""Paths that engines may have: all but those of Ollama's API."""
KEPT = frozenset(
    path for path in SERVED if ROUTES[path].needs_slot and ROUTES[path].asks in ("chat", "completion", "response")
)
"""Paths of requests whose slots of an engine can be kept: what they compute is found again by their beginning."""
_OF_LLAMA_SERVER = frozenset(path for path, route in ROUTES.items() if route.of_llama_server)

OLLAMAS_PAGES = "/api/"
"""Prefix of all paths of Ollama's API."""
_ANTHROPICS_PAGES = "/v1/messages"


def served_routes(routes: frozenset[str] | None) -> frozenset[str]:
    """Return the paths that an engine serves: the configured ones, or (None) all of llama-server's."""
    return _OF_LLAMA_SERVER if routes is None else routes


def is_endless(path: str) -> bool:
    """Whether the management endpoint at a path is an endless stream."""
    return path.endswith(("/stream", "/sse", "/events")) or path.startswith("/logs/stream/")


def dialect_of(path: str) -> Dialect:
    """Return the API whose error format applies at any path, including management endpoints and unknown paths."""
    route = ROUTES.get(path)
    if route is not None:
        return route.dialect
    if path.startswith(OLLAMAS_PAGES):
        return Dialect.OLLAMA
    return Dialect.ANTHROPIC if path.startswith(_ANTHROPICS_PAGES) else Dialect.OPENAI
