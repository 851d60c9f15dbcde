"""Background tasks that run as long as the router and are restarted when they fail."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger("router")

_PAUSE_SEC = (1.0, 60.0)
"""Pause after the first failure, and longest pause; each failure soon after the last one doubles it."""
_WELL_SEC = 60.0
"""Time without failures after which a task counts as well again."""


@dataclass(slots=True)
class Upkeep:
    """Background task with its failures."""

    name: str
    failures: int = 0
    failed_sec: float = 0.0
    """Time of the last failure (monotonic)."""
    resting: bool = False
    """True between a failure and the restart."""

    @property
    def is_well(self) -> bool:
        return not self.failures or not (self.resting or time.monotonic() - self.failed_sec < _WELL_SEC)


class Background:
    """All background tasks. The caller of `keep` cancels the task at the end."""

    def __init__(self, pause_sec: tuple[float, float] = _PAUSE_SEC) -> None:
        self._pause_sec = pause_sec
        self._kept: dict[str, Upkeep] = {}

    def __iter__(self) -> Iterator[Upkeep]:
        return iter(self._kept.values())

    def keep(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Run a task until it returns or is cancelled; restart it after a pause if it raises."""
        upkeep = self._kept[name] = Upkeep(name)
        return asyncio.get_running_loop().create_task(self._run(upkeep, work), name=name)

    async def _run(self, upkeep: Upkeep, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        shortest_sec, longest_sec = self._pause_sec
        pause_sec = shortest_sec
        while True:
            began = time.monotonic()
            try:
                await work()
            except Exception:  # of any kind: the work must continue
                now = time.monotonic()
                pause_sec = shortest_sec if now - began > _WELL_SEC else pause_sec
                upkeep.failures += 1
                upkeep.failed_sec, upkeep.resting = now, True
                _log.exception("%s broke, and is begun again in %g s", upkeep.name, pause_sec)
            else:
                return
            await asyncio.sleep(pause_sec)
            upkeep.resting = False
            pause_sec = min(longest_sec, 2 * pause_sec)
