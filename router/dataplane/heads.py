"""Heads of HTTP messages: what is read out of them, and which of them need no reading at all.

Whoever sends a second message on a connection nearly always sends the head of the first again, and only the
digits of its Content-Length differ. A parser that has taken the first would say the same of the second; so it is
not asked again. Messages whose heads come in pieces or are very long, and those with no length, are the parser's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar
from urllib.parse import unquote

import httptools
import msgspec

from router.config.schema import Config
from router.dataplane.forms import as_engines_read_it
from router.http.auth import Client
from router.http.errors import ApiError

_Head = TypeVar("_Head")
Headers = list[tuple[bytes, bytes]]
"""Names in lower case."""

_FORWARDED = frozenset(
    {
        b"anthropic-beta",
        b"anthropic-version",
        b"content-type",
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
_MOST_DIGITS = 12
_LONGEST_KNOWN = 8192
"""Bytes of a head that are kept between two messages. Connections may be many, and their clients hostile."""


class Known(Generic[_Head]):
    """A head that a parser has read, on a connection that stays: the next message with it needs no parser.

    Where the digits of the length are is beyond doubt: a parser takes no second Content-Length, and no header's
    value can look like this name, which comes right after the end of a line.
    """

    __slots__ = ("_after", "_before", "_begin", "head")

    def __init__(self, before: bytes, after: bytes, head: _Head) -> None:
        """`before` the digits of the length, and `after` them, up to the body."""
        self._before = before
        self._begin = len(before)
        self._after = after
        self.head = head
        """As it was read."""

    @classmethod
    def of(cls, message: bytes, head: _Head) -> Known[_Head] | None:
        """None if the message has no length or a very long head, or if these are not its bytes up to anywhere in
        its body."""
        end = message.find(b"\r\n\r\n", 0, _LONGEST_KNOWN) + 4
        for name in (b"\nContent-Length: ", b"\ncontent-length: "):
            begin = message.find(name, 0, max(end, 0)) + len(name)
            if begin >= len(name):
                stop = message.find(b"\r", begin)
                known = cls(message[:begin], message[stop:end], head)
                return known if known.body_of(message) is not None else None
        return None

    def body_of(self, message: bytes) -> tuple[bytes, int] | None:
        """As much of it as is here, and how many bytes are still to come. None for a message with another head,
        and for more than one message."""
        if not message.startswith(self._before):
            return None
        stop = message.find(b"\r", self._begin)
        digits = message[self._begin : stop]
        if not message.startswith(self._after, stop) or not digits.isdigit() or len(digits) > _MOST_DIGITS:
            return None
        body = message[stop + len(self._after) :]
        missing = int(digits) - len(body)
        return None if missing < 0 else (body, missing)


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
        self.forwarded = b"".join(
            b"%b: %b\r\n" % (name, as_engines_read_it(value) if name == b"content-type" else value)
            for name, value in headers
            if name in _FORWARDED
        )
        """The headers that an engine gets to see, each with its end."""

    @property
    def declared(self) -> int:
        """Bytes of the body, as far as that was said beforehand."""
        return int(self.fields.get(b"content-length", b"0"))


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
