"""Errors as clients expect them: OpenAI's envelope, Anthropic's and Ollama's on their routes, each with what to do
about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from router.messages import Refusal

_STATUS = {
    Refusal.QUEUE_FULL: 429,
    Refusal.QUEUE_TIMEOUT: 504,
    Refusal.MODEL_NOT_FOUND: 404,
    Refusal.MODEL_FAILED: 503,
    Refusal.INSUFFICIENT_MEMORY: 507,
    Refusal.SHUTTING_DOWN: 503,
}

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


@dataclass(slots=True)
class ApiError(Exception):
    """An answer that is an error. `code` is stable, `message` is for people."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_sec: float | None = None

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error")

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.retry_after_sec is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_sec))))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers

    def openai(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, object]:
        kind = {413: "request_too_large", 507: "overloaded_error", 503: "overloaded_error"}.get(
            self.status, self.type if self.status < 500 else "api_error"
        )
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def ollama(self) -> dict[str, object]:
        return {"error": self.message}

    def body(self, path: str) -> bytes:
        if is_anthropic(path):
            return msgspec.json.encode(self.anthropic())
        return msgspec.json.encode(self.ollama() if is_ollama(path) else self.openai())

    def event(self, path: str) -> bytes:
        """The same inside a stream that has begun: one event, then the end that the route's clients expect.

        An event that the engine was in the middle of ends before it, or would swallow it; lines are whole anyway.
        """
        event = error_event(self.body(path), path)
        return event if is_ollama(path) else b"\n\n" + event


def error_event(body: bytes, path: str) -> bytes:
    if is_anthropic(path):
        return b"event: error\ndata: %b\n\n" % body
    if is_ollama(path):
        return body + b"\n"
    return b"data: %b\n\ndata: [DONE]\n\n" % body


def is_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


def is_ollama(path: str) -> bool:
    return path.startswith("/api/") or path == "/chat"


def refused(refusal: Refusal, reason: str, retry_after_sec: float | None) -> ApiError:
    """The scheduler's refusal as an answer."""
    param = "model" if refusal is Refusal.MODEL_NOT_FOUND else None
    return ApiError(_STATUS[refusal], refusal.value, reason, param, retry_after_sec)
