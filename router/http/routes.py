"""The routes of the data plane, a row each: whose API it is, what it asks of a model, what its bodies are like.

Errors, dispatch, rewriting, the description at `/openapi.json` and `docs/api.md` all go by these rows, and
nothing else compares paths. A further POST route of the data plane is a row here, and where it is translated a
subclass of `Exchange` besides. All other routes are management endpoints (see `pages`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, NamedTuple

Ask = Literal[
    "chat", "completion", "response", "embedding", "ranking", "transcription", "speech", "image", "count", "text"
]
"""What a model is to give. `count`: how many tokens that takes; `text`: what tokenizer or template make of one."""


class Dialect(Enum):
    """Whose API a route is of, and so how its errors and its streams are told."""

    OPENAI = auto()
    LLAMA_SERVER = auto()
    """With OpenAI's envelope of errors, and streams whose end is that of the connection's answer."""
    ANTHROPIC = auto()
    OLLAMA = auto()
    """No engine speaks it: its requests are translated for one, and the answers back."""


class Stream(Enum):
    """What an answer is if the request says `stream`."""

    NONE = auto()
    """A document all the same."""
    OPEN = auto()
    """Events, the last of which is like the others."""
    CLOSED = auto()
    """Events, the last of which says so: without it an answer is not whole, however properly it ends."""


class Conversation(NamedTuple):
    """Where a request has its messages and its system prompt."""

    messages: str
    prompt: str | None = None
    """The field of the system prompt; None: the first of the messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What is called by POST to any of these paths, and names its model in the body."""

    paths: tuple[str, ...]
    dialect: Dialect
    asks: Ask
    body: Literal["json", "form"] = "json"
    stream: Stream = Stream.NONE
    needs_slot: bool = True
    """Whether a slot computes it; else its engine answers beside what its slots do."""
    conversation: Conversation | None = None
    """None: it has no place for a system prompt."""
    shows_prompt: bool = False
    """Whether the answer quotes the system prompt."""
    of_llama_server: bool = True
    """Whether llama-server has it, or only other servers."""


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
"""By path."""
CHATS = "/v1/chat/completions"
"""Where requests of other APIs are sent that an engine has no route for."""
SERVED = tuple(path for path, route in ROUTES.items() if route.dialect is not Dialect.OLLAMA)
"""Those that engines have: the others are translated."""
_OF_LLAMA_SERVER = frozenset(path for path, route in ROUTES.items() if route.of_llama_server)

OLLAMAS_PAGES = "/api/"
"""What all paths of Ollama's begin with."""
_ANTHROPICS_PAGES = "/v1/messages"


def served_routes(routes: frozenset[str] | None) -> frozenset[str]:
    """The routes of a model's engine: those that are configured, or all of llama-server's."""
    return _OF_LLAMA_SERVER if routes is None else routes


def is_endless(path: str) -> bool:
    """Whether a management endpoint there streams for as long as somebody listens."""
    return path.endswith(("/stream", "/sse", "/events")) or path.startswith("/logs/stream/")


def dialect_of(path: str) -> Dialect:
    """How errors are told there: also by management endpoints, and at paths where nothing is."""
    route = ROUTES.get(path)
    if route is not None:
        return route.dialect
    if path.startswith(OLLAMAS_PAGES):
        return Dialect.OLLAMA
    return Dialect.ANTHROPIC if path.startswith(_ANTHROPICS_PAGES) else Dialect.OPENAI
