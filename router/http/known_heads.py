"""Heads of HTTP messages that need no reading, as the message before had the same.

Whoever sends a second message on a connection nearly always sends the head of the first again, and only the
digits of its Content-Length differ. A parser that has taken the first would say the same of the second; so it is
not asked again. Messages whose heads come in pieces or are very long, and those with no length, are the parser's.
"""

from __future__ import annotations

from typing import Generic, TypeVar

_Head = TypeVar("_Head")
Headers = list[tuple[bytes, bytes]]
"""Names in lower case."""

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
