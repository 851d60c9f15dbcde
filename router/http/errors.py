"""Errors in the formats that clients expect: OpenAI's, or Anthropic's and Ollama's on their routes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from router.config.resolved import ModelConfig
from router.http.routes import Dialect, dialect_of
from router.scheduling.messages import Refusal
from router.system.printable import printable

_STATUS = {
    Refusal.QUEUE_FULL: 429,
    Refusal.DISPLACED: 429,
    Refusal.QUEUE_TIMEOUT: 504,
    Refusal.MODEL_NOT_FOUND: 404,
    Refusal.MODEL_FAILED: 503,
    Refusal.INSUFFICIENT_MEMORY: 507,
    Refusal.SHUTTING_DOWN: 503,
    Refusal.INTERNAL_ERROR: 500,
}

CANCELLED = 499
"""Status of a request that was cancelled by others than its client's connection. HTTP has none for that. Google's
APIs answer so, and clients do not repeat the request: they retry 408, 409, 429 and 5xx.
"""
_LONGEST_PAUSE_SEC = 60
"""Maximum of `Retry-After`. Beyond two minutes, OpenAI's library does not retry at all, and Anthropic's sleeps for
however long it is told.
"""
_MAY_PASS = (408, 409, 429)
"""Statuses 4xx that a retry may avoid."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""Error types of the 4xx that are not simply invalid requests."""


@dataclass(slots=True)
class ApiError(Exception):
    """Raised to answer with an error. `code` is stable, `message` is for people."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_sec: float | None = None
    is_final: bool = False
    """True if a retry would fail likewise. For nearly all 4xx, this need not be set."""

    def __post_init__(self) -> None:
        self.message = printable(self.message)  # may quote file names

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error") if self.status < 500 else "server_error"

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.retry_after_sec is not None and not self.is_final:  # Codex would wait and retry
            pause_sec = min(max(1, math.ceil(self.retry_after_sec)), _LONGEST_PAUSE_SEC)
            headers.append((b"retry-after", b"%d" % pause_sec))
        if self.is_final or (self.status < 500 and self.status not in _MAY_PASS):
            headers.append((b"x-should-retry", b"false"))  # Claude Code repeats a 401 for a minute without it
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers

    def openai(self) -> dict[str, object]:
        return {"error": _fields(self)}

    def anthropic(self) -> dict[str, object]:
        if self.status < 500:
            kind = "request_too_large" if self.status == 413 else self.type
        else:
            kind = "overloaded_error" if self.status in (503, 507) and not self.is_final else "api_error"
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def ollama(self) -> dict[str, object]:
        return {"error": self.message}

    def body(self, path: str) -> bytes:
        dialect = dialect_of(path)
        if dialect is Dialect.ANTHROPIC:
            return msgspec.json.encode(self.anthropic())
        return msgspec.json.encode(self.ollama() if dialect is Dialect.OLLAMA else self.openai())

    def event(self, path: str) -> bytes:
        """Return the error as the end of a started stream: one event, and the end that the route's clients expect.

        Blank lines before it end an incomplete event of the engine, which would absorb the error otherwise. Lines
        of Ollama's streams are always complete.
        """
        event = error_event(self.body(path), path)
        return event if dialect_of(path) is Dialect.OLLAMA else b"\n\n" + event


@dataclass(slots=True)
class ContextExceeded(ApiError):
    """Raised for a prompt longer than its engine's context, in words by which clients shorten it and retry.

    They know it by its code, or by a phrase: "maximum context length is M tokens" (litellm, aider), "exceeds the
    available context size" (opencode, pi), "prompt is too long: N tokens > M maximum" (Claude Code).
    """

    prompt_tokens: int = 0
    context_tokens: int = 0

    @classmethod
    def of(cls, prompt_tokens: int, context_tokens: int, *, flags: str = "-c") -> ContextExceeded:
        message = (
            f"This model's maximum context length is {context_tokens} tokens, and the request "
            f"({prompt_tokens} tokens) exceeds the available context size. Shorten it, or give the model a larger "
            f"context ({flags} in its flags)."
        )
        error = cls(400, "context_length_exceeded", message)
        error.prompt_tokens, error.context_tokens = prompt_tokens, context_tokens
        return error

    @classmethod
    def by_others(cls, message: str, prompt_tokens: int, context_tokens: int) -> ContextExceeded:
        """Return an error with another engine's message. Such an engine may not have counted all of the prompt."""
        error = cls(400, "context_length_exceeded", message)
        error.prompt_tokens, error.context_tokens = max(prompt_tokens, context_tokens + 1), context_tokens
        return error

    def openai(self) -> dict[str, object]:
        """Return the error with llama-server's own figures, which its web page reads."""
        figures = {"n_prompt_tokens": self.prompt_tokens, "n_ctx": self.context_tokens}
        return {"error": {**_fields(self), **figures}}

    def anthropic(self) -> dict[str, object]:
        message = f"prompt is too long: {self.prompt_tokens} tokens > {self.context_tokens} maximum"
        return {"type": "error", "error": {"type": self.type, "message": message}}

    def ollama(self) -> dict[str, object]:
        return {"error": f"{self.message} The context is set in the router's configuration, not by num_ctx."}


@dataclass(slots=True)
class Unable(ApiError):
    """Raised for what the engine of a model cannot do. The client is told which models can."""

    is_able: Callable[[ModelConfig], bool] = lambda _: False

    @classmethod
    def to(cls, message: str, param: str, is_able: Callable[[ModelConfig], bool]) -> Unable:
        return cls(400, "not_supported", message, param, is_able=is_able)


def _fields(error: ApiError) -> dict[str, object]:
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def error_event(body: bytes, path: str) -> bytes:
    dialect = dialect_of(path)
    if dialect is Dialect.ANTHROPIC:
        return b"event: error\ndata: %b\n\n" % body
    if dialect is Dialect.OLLAMA:
        return body + b"\n"
    return b"data: %b\n\ndata: [DONE]\n\n" % body


def refused(refusal: Refusal, reason: str, retry_after_sec: float | None, *, is_final: bool = False) -> ApiError:
    """Return the error for a refusal by the scheduler."""
    param = "model" if refusal is Refusal.MODEL_NOT_FOUND else None
    return ApiError(_STATUS[refusal], refusal.value, reason, param, retry_after_sec, is_final)
