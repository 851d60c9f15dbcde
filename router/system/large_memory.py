"""Memory for large bodies, which is given back as soon as they are over, and a little at a time.

What is freed as a whole keeps Python's lock until all of its pages are free, 10 ms for 100 MiB; and what malloc
gets back, it may keep for later. So it is asked of the system directly.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

_STEP = 1 << 20
_APART = 64 << 10
"""A part that is longer is used from where it lies; what is shorter is copied."""
_BLOCK = 1 << 20


class LargeMemory:
    """Bytes that come one after the other, up to as many as were said; pages that nothing is in take nothing."""

    __slots__ = ("_mapped", "_size")

    def __init__(self, most: int) -> None:
        self._mapped = mmap.mmap(-1, most, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def room(self) -> int:
        return len(self._mapped) - self._size

    def add(self, part: bytes | bytearray | memoryview) -> None:
        self._mapped[self._size : self._size + len(part)] = part
        self._size += len(part)

    def view(self, begin: int = 0) -> memoryview:
        """What has come from there on."""
        return memoryview(self._mapped)[begin : self._size]

    def give_back(self) -> None:
        """Views of it are empty from then on. Other threads get their turns meanwhile."""
        for begin in range(0, self._size, _STEP):
            self._mapped.madvise(mmap.MADV_DONTNEED, begin, min(_STEP, self._size - begin))


class Pieces:
    """Bytes that follow one another, and need not lie together."""

    __slots__ = ("_begin", "_block", "copied", "parts")

    def __init__(self, *parts: memoryview) -> None:
        self.parts: list[memoryview] = list(parts)
        self.copied = 0
        """How many of them are not where they came from."""
        self._block: LargeMemory | None = None
        self._begin = 0
        """Of what is in the block, and not among the parts yet."""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def add(self, part: memoryview) -> None:
        if len(part) >= _APART:
            self.end()
            self.parts.append(part)
            return
        if self._block is None or self._block.room < len(part):
            self.end()
            self._block, self._begin = LargeMemory(_BLOCK), 0
        self._block.add(part)
        self.copied += len(part)

    def end(self) -> None:
        """All that was added is among the parts."""
        if self._block is not None and len(self._block) > self._begin:
            self.parts.append(self._block.view(self._begin))
            self._begin = len(self._block)

    def in_parts(self, longest: int) -> Iterator[memoryview]:
        for part in self.parts:
            for begin in range(0, len(part), longest):
                yield part[begin : begin + longest]

    def give_back(self) -> None:
        """What was copied; one block after the other, so that other threads get their turns."""
        self._block = None
        while self.parts:
            self.parts.pop()
