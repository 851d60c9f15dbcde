"""Memory for large bodies, which is given back as soon as they are over, and a little at a time.

What is freed as a whole keeps Python's lock until all of its pages are free, 10 ms for 100 MiB; and what malloc
gets back, it may keep for later. So it is asked of the system directly.
"""

from __future__ import annotations

import mmap

_STEP = 1 << 20


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
