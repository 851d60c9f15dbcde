"""Looks at the files of the configuration and its models, of which a disk may keep one from ever ending."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from router.config_problems import ConfigError, Problem
from router.readings import apart

_T = TypeVar("_T")

_STAT_SEC = 1.0


class DiskHangs(ConfigError):
    """What the files say cannot be found out just now."""

    def __init__(self, message: str) -> None:
        super().__init__([Problem("", message)])


class Looks:
    """Each on a thread of its own, and no second one before the first has ended."""

    def __init__(self, silent_sec: float = 10, longest_sec: float = 60) -> None:
        """After `silent_sec` a disk must at least say that it is there; in `longest_sec` it must have told all."""
        self._silent_sec = silent_sec
        self._longest_sec = longest_sec
        self._running: asyncio.Task[object] | None = None

    async def take(self, look: Callable[[], _T], places: Iterable[Path]) -> _T:
        """What it returns or raises; or raises DiskHangs. `places` are where it looks."""
        places = sorted(set(places))
        if self._running is not None:
            await self._end_of(self._running, places)
        task = asyncio.create_task(apart(look))
        task.add_done_callback(_hear)
        self._running = task
        await self._end_of(task, places)
        return task.result()

    async def _end_of(self, task: asyncio.Task[object] | asyncio.Task[_T], places: list[Path]) -> None:
        await asyncio.wait({task}, timeout=self._silent_sec)
        if not task.done():
            await _check_all_there(places)
            await asyncio.wait({task}, timeout=self._longest_sec - self._silent_sec)
        if not task.done():
            where = ", ".join(map(str, places[:3])) + (" or elsewhere" if len(places) > 3 else "")
            raise DiskHangs(f"a file in {where} could not be read within {self._longest_sec:g} s")


def _hear(task: asyncio.Task[_T]) -> None:
    """What nobody waits for any more may fail unsaid: asyncio would log it as a mistake of ours."""
    if not task.cancelled():
        task.exception()


async def _check_all_there(places: list[Path]) -> None:
    """Raises DiskHangs if the system cannot even tell whether they exist."""
    asked: list[Path] = []

    def ask() -> None:
        for place in places:
            asked.append(place)
            place.exists()

    task = asyncio.create_task(apart(ask))
    await asyncio.wait({task}, timeout=_STAT_SEC)
    if not task.done() and asked:
        raise DiskHangs(f"{asked[-1]} does not answer: is its disk there?")
