"""Heads of requests: what the router reads from them, and what it forwards to engines."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote

import httptools
import msgspec

from router.config.resolved import Config
from router.dataplane.forms import as_engines_read_it, is_form
from router.http.auth import Client
from router.http.errors import ApiError
from router.http.known_heads import Headers
from router.http.routes import ROUTES

_FORWARDED = frozenset(
    {
        b"anthropic-beta",
        b"anthropic-version",
        b"traceparent",
        b"tracestate",
        b"user-agent",
    }
)
"""Headers forwarded to engines.

`Accept` is not: no engine heeds it, but llama-server answers 400 to one that it does not understand, and closes
the connection. `X-Conversation-Id` is not: llama-server would go on computing after the client has disconnected,
and keep the result for `GET /v1/stream`. The router frees the slot of such a client, as others wait for it."""
LONGEST_TARGET = 32_000
MOST_HEADERS = 100
"""Limits of engines (cpp-httplib as llama.cpp compiles it; 32 KiB for a request line). Beyond these, engines
answer with an error or not at all, and close the connection, which looks like a crash while a body is sent."""
_LONGEST_LINE = 8192
_MOST_FORWARDED = 90
"""Maximum number of forwarded headers: the router adds its own."""


class Admission(msgspec.Struct):
    """The outcome of checking a head, valid for further requests with the same head."""

    config: Config
    """The configuration for which the outcome is valid."""
    client: Client | None
    lines: bytes
    """Headers of all answers to these requests."""
    peer: str
    """Address of the client."""


class BadTarget(Exception):
    """Raised for a request target that is not a path."""


class RequestHead:
    """The head of a request: method, path, query and headers."""

    __slots__ = (
        "admission",
        "fields",
        "forwarded",
        "headers",
        "http_version",
        "is_form",
        "keep_alive",
        "method",
        "model",
        "path",
        "query",
        "raw_path",
        "target",
    )

    def __init__(self, parser: httptools.HttpRequestParser, url: bytes, headers: Headers) -> None:
        """Read a head from `parser`, which has parsed it. Raises BadTarget."""
        self.method = parser.get_method()
        self.http_version = parser.get_http_version()
        self.keep_alive = self.http_version != "1.0" and parser.should_keep_alive()
        try:
            parsed = httptools.parse_url(url)
        except httptools.HttpParserInvalidURLError as error:
            raise BadTarget from error
        if parsed.path is None or not parsed.path.isascii():
            raise BadTarget
        self.raw_path, self.query = parsed.path, parsed.query or b""
        self.path = unquote(self.raw_path.decode("ascii"))
        self.headers = headers
        self.admission: Admission | None = None
        self.model = ""
        """The model that the path names, if any."""
        self.fields: Mapping[bytes, bytes] = dict(headers)
        self.is_form = is_form(self.fields.get(b"content-type", b""))
        """Whether the body is a multipart form."""
        self.target = self.path.encode() + (b"?" + self.query if self.query else b"")
        """The target of the engine's request, if the path is a route of engines: those need no quoting."""
        self.forwarded = forwarded(headers, self.path)
        """Header lines for the engine, each with its line end."""

    @property
    def declared(self) -> int:
        """Size of the body in bytes as announced; 0 without a Content-Length."""
        return int(self.fields.get(b"content-length", b"0"))


def forwarded(headers: Headers, path: str) -> bytes:
    """Return the header lines of the engine's request at this path.

    JSON gets its proper Content-Type, whatever the client sent: `curl -d` declares a form, which vLLM refuses.
    """
    content_type = dict(headers).get(b"content-type", b"")
    lines = [b"%b: %b\r\n" % header for header in headers if header[0] in _FORWARDED]
    route = ROUTES.get(path)
    if route is not None and route.body == "json" and not is_form(content_type):
        content_type = b"application/json"
    if content_type:
        lines.append(b"content-type: %b\r\n" % as_engines_read_it(content_type))
    return b"".join(lines)


def check_head_size(target: bytes, lines: bytes) -> None:
    """Check target and headers against the limits of engines. Raises ApiError 414 or 431."""
    if len(target) > LONGEST_TARGET:
        raise target_too_long()
    headers = lines.split(b"\r\n")
    if len(headers) > _MOST_FORWARDED:
        raise head_too_large(f"The request has more than {_MOST_FORWARDED} headers for the engine.")
    if len(lines) > _LONGEST_LINE and max(map(len, headers)) > _LONGEST_LINE - 2:
        raise head_too_large(f"A header for the engine is longer than {_LONGEST_LINE} bytes.")


def target_too_long() -> ApiError:
    message = f"The request target, including its query, is longer than {LONGEST_TARGET} bytes."
    return ApiError(414, "target_too_long", message)


def head_too_large(message: str) -> ApiError:
    return ApiError(431, "head_too_large", message)
