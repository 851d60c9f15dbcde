"""The router's own memory goes back to the system when what it was taken for is gone.

glibc keeps what a program has freed, unless it lies at the very end of a heap. After large bodies, and answers
that had to be read, that may be more than the router otherwise takes.
"""

from __future__ import annotations

import asyncio
import ctypes
import time

_LOOK_SEC = 10.0
_SHARE = 0.001
"""Of the time, which it may take at most: who needs memory meanwhile waits."""
_M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Have all threads take memory from one heap; to be called before there are any.

    They hardly ever run at once, and glibc would keep the end of each one's own, whatever it is asked.
    """
    if (set_option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        set_option(_M_ARENA_MAX, 1)


async def give_memory_back() -> None:
    """For ever; returns where the system's allocator does it by itself, or is not known."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def took_sec() -> float:
        before = time.thread_time()
        trim(0)
        return time.thread_time() - before

    while True:
        pause_sec = await asyncio.to_thread(took_sec) / _SHARE
        await asyncio.sleep(max(pause_sec, _LOOK_SEC))
