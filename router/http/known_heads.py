"""Heads of HTTP messages that need no parsing, as the previous message on the connection had the same.

The second message on a connection nearly always repeats the head of the first, except for the digits of its
Content-Length. A parser would accept the second like the first, so it is skipped. Messages whose heads arrive in
pieces or are very long, and messages without a length, are parsed.
"""

from __future__ import annotations

from typing import Generic, TypeVar

_Head = TypeVar("_Head")
Headers = list[tuple[bytes, bytes]]
"""Names in lower case."""

_MOST_DIGITS = 12
_LONGEST_KNOWN = 8192
"""Maximum size in bytes of a head kept between two messages: there may be many connections of hostile clients."""


class Known(Generic[_Head]):
    """A parsed head of a persistent connection: the next message with the same head needs no parser.

    The place of the length's digits is unambiguous: a parser accepts no second Content-Length, and no header's
    value can look like this name, which follows a line end.
    """

    __slots__ = ("_after", "_before", "_begin", "head")

    def __init__(self, before: bytes, after: bytes, head: _Head) -> None:
        """`before` and `after` are the bytes around the digits of the length, up to the body."""
        self._before = before
        self._begin = len(before)
        self._after = after
        self.head = head
        """The result of parsing it."""

    @classmethod
    def of(cls, message: bytes, head: _Head) -> Known[_Head] | None:
        """Return the head of a message that was parsed as `head`.

        None if it has no length or is very long, or if `message` does not reach the body, or goes beyond it.
        """
        end = message.find(b"\r\n\r\n", 0, _LONGEST_KNOWN) + 4
        for name in (b"\nContent-Length: ", b"\ncontent-length: "):
            begin = message.find(name, 0, max(end, 0)) + len(name)
            if begin >= len(name):
                stop = message.find(b"\r", begin)
                known = cls(message[:begin], message[stop:end], head)
                return known if known.body_of(message) is not None else None
        return None

    def body_of(self, message: bytes) -> tuple[bytes, int] | None:
        """Return the part of the body that has arrived, and the number of missing bytes.

        None for a message with another head, and for more than one message.
        """
        if not message.startswith(self._before):
            return None
        stop = message.find(b"\r", self._begin)
        digits = message[self._begin : stop]
        if not message.startswith(self._after, stop) or not digits.isdigit() or len(digits) > _MOST_DIGITS:
            return None
        body = message[stop + len(self._after) :]
        missing = int(digits) - len(body)
        return None if missing < 0 else (body, missing)
