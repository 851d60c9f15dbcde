"""Known heads: a head accepted without the parser is read as the parser would read it."""

from __future__ import annotations

from typing import NamedTuple

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.http.known_heads import Known

LINES = st.sampled_from(
    (
        "Host: a\r\n",
        "X-Content-Length: 7\r\n",
        "Via: \nContent-Length: 3\r\n",
        "Via: a\r\n Content-Length: 3\r\n",
        "Content-Length: {}\r\n",
        "content-length: {}\r\n",
        "Content-length:{}\r\n",
        "Content-Length: {}\n",
        "Content-Length: {} \r\n",
        "Content-Length: 0{}\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Connection: close\r\n",
        "Expect: 100-continue\r\n",
    )
)
HEADS = st.lists(LINES, max_size=5).map(lambda lines: f"POST /a HTTP/1.1\r\n{''.join(lines)}\r\n")
BODIES = st.sampled_from(("", "{}", "0\r\n\r\n", "\r\n\r\n", "Content-Length: 9\r\n\r\n", "x" * 9, "x" * 10))


class Message(NamedTuple):
    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    is_whole: bool
    may_stay: bool


class Parser:
    """What the parser says, of any number of messages one after the other."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)

    def read(self, data: bytes) -> Message | None:
        """The message, if `data` was the beginning of one, with all of its head, or one and all of it."""
        self._begun = 0
        self._has_head = self._is_whole = self._may_stay = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            return None
        if self._begun != 1 or not self._has_head:
            return None
        method, headers = self._parser.get_method(), tuple(self._headers)
        return Message(method, self._target, headers, self._body, self._is_whole, self._may_stay)

    def on_message_begin(self) -> None:
        self._begun += 1
        self._target = self._body = b""
        self._headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() != b"content-length":
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._has_head = True
        self._may_stay = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._is_whole = True


def message(head: str, body: str, length: int | None = None) -> bytes:
    return (head.replace("{}", str(len(body) if length is None else length)) + body).encode()


PLAIN = "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n"


@example(PLAIN, PLAIN, "{}", "x" * 10, 0, False)
@example(PLAIN, PLAIN, "{}", "x" * 9, 1, True)
@given(HEADS, HEADS, BODIES, BODIES, st.integers(-2, 2), st.booleans())
def test_no_message_is_known_that_the_parser_would_read_otherwise(
    head: str, other: str, body: str, next_body: str, off_by: int, alone: bool
) -> None:
    """`alone`: of the first message, the head had come without its body."""
    first = message(head, body)
    for second in (message(head, next_body, len(next_body) + off_by), message(other, next_body)):
        parser = Parser()
        read = parser.read(first)
        if read is None or not read.is_whole or not read.may_stay:
            return  # nothing comes after it that would be looked at here
        known = Known.of(first.removesuffix(body.encode()) if alone else first, read)
        found = None if known is None else known.body_of(second)
        if known is not None and found is not None:
            assert parser.read(second) == known.head._replace(body=found[0], is_whole=found[1] == 0)


@pytest.mark.parametrize("name", ["Content-Length", "content-length"])
@pytest.mark.parametrize("first", ["", "{}"])
def test_the_next_message_is_known_whatever_its_length(name: str, first: str) -> None:
    head = PLAIN.replace("Content-Length", name)
    known = Known.of(message(head, first, 2), "the head")
    assert known is not None
    assert known.head == "the head"
    for body in ("", "{}", "x" * 100_000):
        assert known.body_of(message(head, body)) == (body.encode(), 0)
        assert known.body_of(message(head, body, 123_456)) == (body.encode(), 123_456 - len(body))


@pytest.mark.parametrize(
    "second",
    [
        message(PLAIN, "{}").replace(b"Host: a", b"Host: b"),
        message(PLAIN, "")[:-1],
        message(PLAIN, "{}") + b"P",
        message(PLAIN, "{}") + message(PLAIN, "{}"),
        message(PLAIN, "{}").replace(b": 2", b": +2"),
        message(PLAIN, "{}").replace(b": 2", b": 2 "),
        message(PLAIN, "{}").replace(b": 2", b": 0x2"),
        message(PLAIN, "{}").replace(b": 2", b": 2\r\nX: y"),
        message(PLAIN, "", 10**15),
        b"",
    ],
)
def test_all_others_are_the_parsers(second: bytes) -> None:
    known = Known.of(message(PLAIN, "{}"), None)
    assert known is not None
    assert known.body_of(second) is None


@pytest.mark.parametrize(("size", "is_kept"), [(4_000, True), (60_000, False)])
def test_a_client_cannot_have_much_kept_for_it_between_two_requests(size: int, is_kept: bool) -> None:
    head = PLAIN.replace("Host: a", f"Cookie: {'a' * size}")
    assert (Known.of(message(head, "{}"), None) is not None) == is_kept
