"""The router's own memory goes back to the system when what it was taken for is gone.

glibc keeps what a program has freed, unless it lies at the very end of a heap. After large bodies, and answers
that had to be read, that may be more than the router otherwise takes.
"""

from __future__ import annotations

import asyncio
import ctypes

import psutil

_LOOK_SEC = 10.0
_MOST_LOOK_SEC = 320.0
_MUCH = 16 << 20
_LITTLE = 4 << 20
"""Bytes. Looking for what can be given back keeps others who need memory waiting for some milliseconds: it is done
when the process has grown by much, and less and less often while it gives little."""


async def give_memory_back() -> None:
    """For ever; returns where the system's allocator does it by itself, or is not known."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return
    process = psutil.Process()
    least, pause_sec = _resident(process), _LOOK_SEC
    while True:
        await asyncio.sleep(pause_sec)
        before = after = _resident(process)
        if before > least + _MUCH:
            await asyncio.to_thread(trim, 0)
            after = _resident(process)
        is_in_use = before > least + _MUCH and before - after < _LITTLE
        pause_sec = min(2 * pause_sec, _MOST_LOOK_SEC) if is_in_use else _LOOK_SEC
        least = min(least, after)


def _resident(process: psutil.Process) -> int:
    return int(process.memory_info().rss)
