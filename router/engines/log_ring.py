"""Ring buffer for the last lines of an engine's output."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_LONGEST_LINE = 16 * 1024


class LogRing:
    """Last lines of an engine's output, kept as bytes because most are never read.

    `copy` receives all output in whole lines, so that several engines can share one destination.
    """

    def __init__(self, lines: int, copy: Callable[[bytes], None] | None = None) -> None:
        self._copy = copy
        self._lines: deque[bytes] = deque(maxlen=lines)
        self._rest = b""
        self.total = 0
        """Number of lines ever written, by which a reader knows what it has missed."""

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
        """Complete an unfinished last line; nothing follows."""
        if self._rest:
            self.feed(b"\n")

    def since(self, total: int) -> list[str]:
        """Return the lines after the first `total` ones, as far as they are still kept."""
        return self.tail(self.total - total)

    def tail(self, count: int) -> list[str]:
        """Return the last `count` lines, oldest first."""
        lines = list(self._lines)[-count:] if count > 0 else []
        return [line[:_LONGEST_LINE].decode("utf-8", "replace").rstrip() for line in lines]
