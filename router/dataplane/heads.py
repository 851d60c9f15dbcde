"""Heads of requests: what is read out of them, and what engines get to see of it."""

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
"""Not `Accept`: no engine goes by it, but one that it does not understand is a 400, and the end of its connection.
Not `X-Conversation-Id`: an engine that sees it computes on for a client that has left, and keeps what comes for
`GET /v1/stream`. Here who leaves frees the slot, as others wait for it."""
LONGEST_TARGET = 32_000
MOST_HEADERS = 100
"""What engines take (cpp-httplib, as llama.cpp compiles it; of a first line, it is 32 KiB). They answer more by an
error or by nothing, and close the connection, which looks as if they had broken while a body is being sent."""
_LONGEST_LINE = 8192
_MOST_FORWARDED = 90
"""Beside them, an engine gets the router's own."""


class Admission(msgspec.Struct):
    """Why the requests with one head are let in."""

    config: Config
    """As long as it is this one."""
    client: Client | None
    lines: bytes
    """Headers for all answers to them."""


class BadTarget(Exception):
    """What is asked for is no path."""


class RequestHead:
    """What a client asks for, before its body."""

    __slots__ = (
        "admission",
        "fields",
        "forwarded",
        "headers",
        "http_version",
        "keep_alive",
        "method",
        "model",
        "path",
        "query",
        "raw_path",
        "target",
    )

    def __init__(self, parser: httptools.HttpRequestParser, url: bytes, headers: Headers) -> None:
        """Raises BadTarget."""
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
        """If its path names one."""
        self.fields: Mapping[bytes, bytes] = dict(headers)
        self.target = self.path.encode() + (b"?" + self.query if self.query else b"")
        """What an engine is asked for, if the path is one of an engine's: there is nothing to quote in those."""
        self.forwarded = forwarded(headers, self.path)
        """The headers that an engine gets to see, each with its end."""

    @property
    def declared(self) -> int:
        """Bytes of the body, as far as that was said beforehand."""
        return int(self.fields.get(b"content-length", b"0"))


def forwarded(headers: Headers, path: str) -> bytes:
    """Headers of a request for an engine that is asked at this path.

    JSON is called that, whatever its client calls it: `curl -d` says that it is a form, which vLLM refuses.
    """
    content_type = dict(headers).get(b"content-type", b"")
    lines = [b"%b: %b\r\n" % header for header in headers if header[0] in _FORWARDED]
    route = ROUTES.get(path)
    if route is not None and route.body == "json" and not is_form(content_type):
        content_type = b"application/json"
    if content_type:
        lines.append(b"content-type: %b\r\n" % as_engines_read_it(content_type))
    return b"".join(lines)


def check_size(target: bytes, lines: bytes) -> None:
    """Raises ApiError 414 or 431 for what an engine would not take: what it is asked for, or a header."""
    if len(target) > LONGEST_TARGET:
        raise target_too_long()
    headers = lines.split(b"\r\n")
    if len(headers) > _MOST_FORWARDED:
        raise head_too_large(f"A request has more than {_MOST_FORWARDED} headers that are for the engine.")
    if len(lines) > _LONGEST_LINE and max(map(len, headers)) > _LONGEST_LINE - 2:
        raise head_too_large(f"A header that is for the engine is longer than {_LONGEST_LINE} bytes.")


def target_too_long() -> ApiError:
    message = f"What is asked for, with its query, is longer than {LONGEST_TARGET} bytes."
    return ApiError(414, "target_too_long", message)


def head_too_large(message: str) -> ApiError:
    return ApiError(431, "head_too_large", message)
