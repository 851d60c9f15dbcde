"""Errors as clients expect them: OpenAI's envelope, Anthropic's and Ollama's on their routes, each with what to do
about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

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

_LONGEST_PAUSE_SEC = 60
"""Of `Retry-After`. Told to come back after more than two minutes, OpenAI's library does not come back at all, and
Anthropic's sleeps for as long as it is told.
"""
_MAY_PASS = (408, 409, 429)
"""Of the 4xx those that another try may not get."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""Of the 4xx those that are more than an invalid request."""


@dataclass(slots=True)
class ApiError(Exception):
    """An answer that is an error. `code` is stable, `message` is for people."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_sec: float | None = None
    is_final: bool = False
    """Another try would get it again. Of nearly all 4xx that is known without saying so."""

    def __post_init__(self) -> None:
        self.message = printable(self.message)  # it may quote names of files

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error") if self.status < 500 else "server_error"

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.retry_after_sec is not None and not self.is_final:  # Codex would wait, and then come again
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
        """The same inside a stream that has begun: one event, then the end that the route's clients expect.

        An event that the engine was in the middle of ends before it, or would swallow it; lines are whole anyway.
        """
        event = error_event(self.body(path), path)
        return event if dialect_of(path) is Dialect.OLLAMA else b"\n\n" + event


@dataclass(slots=True)
class ContextExceeded(ApiError):
    """A prompt that is longer than its engine's context, said so that clients shorten it and come again.

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
        """In the words of an engine that is not llama-server, and may not have counted to the prompt's end."""
        error = cls(400, "context_length_exceeded", message)
        error.prompt_tokens, error.context_tokens = max(prompt_tokens, context_tokens + 1), context_tokens
        return error

    def openai(self) -> dict[str, object]:
        """With llama-server's own figures, which its web page reads."""
        figures = {"n_prompt_tokens": self.prompt_tokens, "n_ctx": self.context_tokens}
        return {"error": {**_fields(self), **figures}}

    def anthropic(self) -> dict[str, object]:
        message = f"prompt is too long: {self.prompt_tokens} tokens > {self.context_tokens} maximum"
        return {"type": "error", "error": {"type": self.type, "message": message}}

    def ollama(self) -> dict[str, object]:
        return {"error": f"{self.message} The context is set in the router's configuration, not by num_ctx."}


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
    """The scheduler's refusal as an answer."""
    param = "model" if refusal is Refusal.MODEL_NOT_FOUND else None
    return ApiError(_STATUS[refusal], refusal.value, reason, param, retry_after_sec, is_final)
