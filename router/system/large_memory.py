"""Memory for large bodies, returned to the system as soon as they are processed, in small steps.

Freeing a large block holds Python's lock until all its pages are free, 10 ms for 100 MiB; and malloc may keep
freed memory. So the memory is mapped directly.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

_STEP = 1 << 20
_APART = 64 << 10
"""Parts of at least this many bytes are referenced; shorter ones are copied."""
_BLOCK = 1 << 20


class LargeMemory:
    """An append-only buffer of up to `most` bytes; pages that are not written take no memory."""

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
        """Return a view of the content from `begin` on."""
        return memoryview(self._mapped)[begin : self._size]

    def give_back(self) -> None:
        """Return the memory to the system in steps, so that other threads can run. Views then read as zeros."""
        for begin in range(0, self._size, _STEP):
            self._mapped.madvise(mmap.MADV_DONTNEED, begin, min(_STEP, self._size - begin))


class Pieces:
    """A sequence of byte strings that need not be contiguous in memory."""

    __slots__ = ("_begin", "_block", "copied", "parts")

    def __init__(self, *parts: memoryview) -> None:
        self.parts: list[memoryview] = list(parts)
        self.copied = 0
        """Number of bytes that were copied."""
        self._block: LargeMemory | None = None
        self._begin = 0
        """Start of the bytes in the block that are not in `parts` yet."""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def add(self, part: memoryview) -> None:
        """Append bytes; short parts are copied into a block."""
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
        """Complete `parts` with the bytes that are still in the block."""
        if self._block is not None and len(self._block) > self._begin:
            self.parts.append(self._block.view(self._begin))
            self._begin = len(self._block)

    def in_parts(self, longest: int) -> Iterator[memoryview]:
        for part in self.parts:
            for begin in range(0, len(part), longest):
                yield part[begin : begin + longest]

    def give_back(self) -> None:
        """Release the parts one by one, so that other threads can run."""
        self._block = None
        while self.parts:
            self.parts.pop()
