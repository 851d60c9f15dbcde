"""Memory that was taken for a while goes back to the system."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import subprocess
import sys

import psutil
import pytest

from router.system import heap

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")

_HEAPS = """
import ctypes, threading
from router.system.heap import share_one_heap

share_one_heap()
both = threading.Barrier(2)
work = lambda: both.wait() and bytes(100_000)
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
"""
"""Prints of which heaps memory is taken."""


def test_threads_take_memory_from_one_heap() -> None:
    told = subprocess.run([sys.executable, "-c", _HEAPS], capture_output=True, text=True, check=True).stdout
    assert told.count("<heap nr=") == 1


def test_what_lies_between_what_stays_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_LOOK_SEC", 0.1)
    monkeypatch.setattr(heap, "_SHARE", 1.0)
    process = psutil.Process()

    async def use_much() -> tuple[int, int, int]:
        work = asyncio.create_task(heap.give_memory_back())
        await asyncio.sleep(0)
        before = process.memory_info().rss
        taken = [b"x" * (100_000 + n) for n in range(1000)]
        stays = taken[::50]
        del taken
        freed = process.memory_info().rss
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(work, 1)
        assert len(stays) == 20
        return before, freed, process.memory_info().rss

    before, freed, after = asyncio.run(use_much())
    assert freed - before > 80 << 20, "the allocator keeps it"
    assert after - before < 20 << 20
