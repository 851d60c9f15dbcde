"""Reads files into the page cache before they are needed, without displacing what running engines have mapped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from router.hardware.ram import fields, memory

_MIB = 1 << 20
_STEP = 128 << 10
"""Most that the kernel reads when it is told what will be needed, on most disks (`read_ahead_kb`): it skips the
rest of a longer part without a word."""
_SPARE_MIB = 512
"""Free memory that is left for whatever else happens meanwhile."""
_FIELDS = {"MemFree", "Cached", "Mapped", "Shmem", "Dirty"}


def room(root: Path = Path("/")) -> int:
    """Return how many bytes can be read without displacing mapped or locked pages: free ones, and cached ones that
    nobody maps. 0 where the kernel does not tell."""
    told = fields(root / "proc/meminfo")
    if not told.keys() >= _FIELDS:
        return 0
    unmapped = max(0, told["Cached"] - told["Mapped"] - told["Shmem"] - told["Dirty"])
    _, available_mib = memory(root)
    return max(0, min(told["MemFree"] + unmapped, available_mib * _MIB) - _SPARE_MIB * _MIB)


def read_ahead(files: Iterable[Path], most: int) -> int:
    """Have the kernel read files, the first ones first, up to `most` bytes. Blocking. Returns the number of bytes.

    Files that cannot be read are left to the engine, which says what is wrong with them.
    """
    asked = 0
    for path in files:
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDONLY)
            try:
                size = min(os.fstat(file).st_size, most - asked)
                for begin in range(0, size, _STEP):
                    length = min(_STEP, size - begin)
                    os.posix_fadvise(file, begin, length, os.POSIX_FADV_WILLNEED)
                    asked += length
            finally:
                os.close(file)
    return asked
