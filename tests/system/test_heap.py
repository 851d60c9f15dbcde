"""Memory that was taken for a while goes back to the system."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes

import psutil
import pytest

from router.system import heap


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_what_lies_between_what_stays_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_LOOK_SEC", 0.1)
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
