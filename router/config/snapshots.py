"""Looks at the files of the configuration and its models, of which a disk may keep one from ever ending."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from router.config.problems import ConfigError, Problem
from router.system.readings import apart

_T = TypeVar("_T")


class DiskHangs(ConfigError):
    """What the files say cannot be found out just now."""

    def __init__(self, message: str) -> None:
        super().__init__([Problem("", message)])


class Looks:
    """Each on a thread of its own, and no second one before the first has ended."""

    def __init__(self, silent_sec: float = 10, longest_sec: float = 60, place_sec: float = 5) -> None:
        """After `silent_sec` each place must say within `place_sec` that it is there, even if its disk has to spin
        up first; in `longest_sec` all must have been told.
        """
        self._silent_sec = silent_sec
        self._longest_sec = longest_sec
        self._place_sec = place_sec
        self._running: asyncio.Task[object] | None = None
        self._asking: _Asking | None = None

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
        until_sec = time.monotonic() + self._longest_sec
        await asyncio.wait({task}, timeout=self._silent_sec)
        if not task.done():
            await self._check_all_there(places, task, until_sec)
            await asyncio.wait({task}, timeout=max(0.0, until_sec - time.monotonic()))
        if not task.done():
            where = ", ".join(map(str, places[:3])) + (" or elsewhere" if len(places) > 3 else "")
            raise DiskHangs(f"a file in {where} could not be read within {self._longest_sec:g} s")

    async def _check_all_there(
        self, places: list[Path], look: asyncio.Task[object] | asyncio.Task[_T], until_sec: float
    ) -> None:
        """Until the look has ended. Raises DiskHangs if the system cannot even tell whether one exists."""
        if self._asking is None or self._asking.task.done():
            self._asking = _Asking(places)
        asking = self._asking
        while not (asking.task.done() or look.done()) and time.monotonic() < until_sec:
            before = asking.at
            await asyncio.wait({asking.task, look}, timeout=self._place_sec, return_when=asyncio.FIRST_COMPLETED)
            if not (asking.task.done() or look.done()) and asking.at is not None and asking.at is before:
                raise DiskHangs(f"{asking.at} does not respond; is its disk connected?")


class _Asking:
    """Whether each place is there; `at` is the one whose turn it is."""

    def __init__(self, places: list[Path]) -> None:
        self.at: Path | None = None
        self._places = places
        self.task = asyncio.create_task(apart(self._ask))

    def _ask(self) -> None:
        for place in self._places:
            self.at = place
            with contextlib.suppress(OSError):
                place.exists()


class FolderHangs(Exception):
    """A look into it did not end in time, or one that began earlier has not ended yet."""


class FolderLooks:
    """Looks into folders, each on a thread of its own; into one, no second before the first has ended."""

    def __init__(self, limit_sec: float) -> None:
        """How long each may take, with the wait for its turn."""
        self.limit_sec = limit_sec
        self._pending: dict[Path, asyncio.Task[object]] = {}

    async def take(self, look: Callable[[], _T], folder: Path) -> _T:
        """What it returns or raises. Raises FolderHangs."""
        until_sec = time.monotonic() + self.limit_sec
        while (pending := self._pending.get(folder)) is not None:
            await self._end_of(pending, until_sec)
        task = asyncio.create_task(apart(look))
        self._pending[folder] = task
        task.add_done_callback(_hear)
        task.add_done_callback(lambda _: self._pending.pop(folder))
        await self._end_of(task, until_sec)
        return task.result()

    async def _end_of(self, task: asyncio.Task[object] | asyncio.Task[_T], until_sec: float) -> None:
        await asyncio.wait({task}, timeout=max(0.0, until_sec - time.monotonic()))
        if not task.done():
            raise FolderHangs


def _hear(task: asyncio.Task[_T]) -> None:
    """What nobody waits for any more may fail unsaid: asyncio would log it as a mistake of ours."""
    if not task.cancelled():
        task.exception()
