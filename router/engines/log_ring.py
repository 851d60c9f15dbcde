"""The last lines of an engine's output, whatever it writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_LONGEST_LINE = 16 * 1024


class LogRing:
    """The last lines of an engine's output, whatever it writes. Taken raw: most are never looked at.

    `copy` gets all of it, too, in whole lines: those of several engines may come to the same place.
    """

    def __init__(self, lines: int, copy: Callable[[bytes], None] | None = None) -> None:
        self._copy = copy
        self._lines: deque[bytes] = deque(maxlen=lines)
        self._rest = b""
        self.total = 0
        """Lines ever written; tells a reader what it has missed."""

    def feed(self, chunk: bytes) -> None:
        *lines, rest = (self._rest + chunk).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines.append(rest)
            rest = b""
        self._rest = rest
        self._lines.extend(lines)
        self.total += len(lines)
        if self._copy is not None and lines:
            self._copy(b"\n".join([*lines, b""]))

    def end(self) -> None:
        """Nothing more comes: what was begun is a line, too."""
        if self._rest:
            self.feed(b"\n")

    def since(self, total: int) -> list[str]:
        """What was written after `total` lines, as far as it is still here."""
        return self.tail(self.total - total)

    def tail(self, count: int) -> list[str]:
        """The last lines, oldest first."""
        lines = list(self._lines)[-count:] if count > 0 else []
        return [line[:_LONGEST_LINE].decode("utf-8", "replace").rstrip() for line in lines]
