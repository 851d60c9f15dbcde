"""Returns freed memory of the router to the operating system.

glibc keeps freed memory unless it lies at the very end of a heap. After large bodies and parsed responses that may
exceed the router's other memory.
"""

from __future__ import annotations

import asyncio
import ctypes
import time

_LOOK_SEC = 10.0
_SHARE = 0.001
"""Maximum share of time spent on trimming, during which allocations wait."""
_M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Make all threads allocate from one heap; must be called before threads are started.

    Threads rarely run at the same time, and glibc would keep freed memory in each thread's heap even when trimmed.
    """
    if (set_option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        set_option(_M_ARENA_MAX, 1)


async def give_memory_back() -> None:
    """Trim the heap periodically, forever; return at once if the allocator does not support it."""
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
