"""Reads the configuration and scans model folders in threads, with time limits: a disk may hang forever."""

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
    """Raised when files cannot be read because a disk does not respond."""

    def __init__(self, message: str) -> None:
        super().__init__([Problem("", message)])


class Looks:
    """Runs functions that read files, each in a thread of its own, one at a time."""

    def __init__(self, silent_sec: float = 10, longest_sec: float = 60, place_sec: float = 5) -> None:
        """Set the time limits.

        A call that takes more than `silent_sec` causes a check that each of its folders responds within
        `place_sec`, which includes the time that a disk takes to spin up. The whole call may take `longest_sec`.
        """
        self._silent_sec = silent_sec
        self._longest_sec = longest_sec
        self._place_sec = place_sec
        self._running: asyncio.Task[object] | None = None
        self._asking: _Asking | None = None

    async def take(self, look: Callable[[], _T], places: Iterable[Path]) -> _T:
        """Return or raise what `look` does; raise DiskHangs beyond the limits. It reads the folders `places`."""
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
        """Wait for `look` while all folders respond. Raises DiskHangs if one does not."""
        if self._asking is None or self._asking.task.done():
            self._asking = _Asking(places)
        asking = self._asking
        while not (asking.task.done() or look.done()) and time.monotonic() < until_sec:
            before = asking.at
            await asyncio.wait({asking.task, look}, timeout=self._place_sec, return_when=asyncio.FIRST_COMPLETED)
            if not (asking.task.done() or look.done()) and asking.at is not None and asking.at is before:
                raise DiskHangs(f"{asking.at} does not respond; is its disk connected?")


class _Asking:
    """A check, in a thread, that each folder responds; `at` is the current one."""

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
    """Raised when reading a folder takes too long, or when an earlier read has not ended yet."""


class FolderLooks:
    """Runs functions that read folders, each in a thread of its own, one at a time for each folder."""

    def __init__(self, limit_sec: float) -> None:
        """Set the limit for each read, which includes the wait for an earlier one."""
        self.limit_sec = limit_sec
        self._pending: dict[Path, asyncio.Task[object]] = {}

    async def take(self, look: Callable[[], _T], folder: Path) -> _T:
        """Return or raise what `look` does. Raises FolderHangs."""
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
    """Retrieve the exception of a task that nothing awaits any more; asyncio would log it otherwise."""
    if not task.cancelled():
        task.exception()
