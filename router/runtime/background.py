"""What must go on for as long as the router runs, beside all requests: it is begun again whenever it breaks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger("router")

_PAUSE_SEC = (1.0, 60.0)
"""After the first failure, and at most; it doubles with each that comes soon after the one before."""
_WELL_SEC = 60.0
"""Who has run for so long since its last failure is well again."""


@dataclass(slots=True)
class Upkeep:
    """One such task, and how it fared."""

    name: str
    failures: int = 0
    failed_sec: float = 0.0
    """When it last did (monotonic)."""
    resting: bool = False
    """It has broken and was not begun again yet."""

    @property
    def is_well(self) -> bool:
        return not self.failures or not (self.resting or time.monotonic() - self.failed_sec < _WELL_SEC)


class Background:
    """All of them. Whoever keeps one cancels its task in the end."""

    def __init__(self, pause_sec: tuple[float, float] = _PAUSE_SEC) -> None:
        self._pause_sec = pause_sec
        self._kept: dict[str, Upkeep] = {}

    def __iter__(self) -> Iterator[Upkeep]:
        return iter(self._kept.values())

    def keep(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Run it until it returns or is cancelled, and again after a pause when it raises."""
        upkeep = self._kept[name] = Upkeep(name)
        return asyncio.get_running_loop().create_task(self._run(upkeep, work), name=name)

    async def _run(self, upkeep: Upkeep, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        shortest_sec, longest_sec = self._pause_sec
        pause_sec = shortest_sec
        while True:
            began = time.monotonic()
            try:
                await work()
            except Exception:  # whatever it is, the work must go on
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
