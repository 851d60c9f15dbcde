"""What all engines have in common that the router starts and watches, whatever they run in.

How an engine becomes ready and how it is probed is the matter of its kind; how it runs and exits is that of
`process.py` and `container.py`.
"""

from __future__ import annotations

import asyncio
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from router.engines.base import PROBE_LIMIT_SEC, Ending, Endpoint, EngineFailed, Facts, LoadProgress, Sleeper
from router.engines.complaints import complaints
from router.engines.log_ring import LogRing
from router.engines.out_of_memory import ran_out
from router.kv.keeper import Keeper
from router.observe.reasons import Reason
from router.scheduling.messages import Retry
from router.system.devices import Device

_SILENCE_CHECK_SEC = 1.0
_LINES_OF_AN_END = 200
"""Number of last log lines that can tell of memory that ran out."""


class Limits(NamedTuple):
    """Time limits of an engine."""

    load_stall_sec: float
    """Longest time that a load may make no progress."""
    load_limit_sec: float | None
    """Longest time that a load may take."""
    stop_grace_sec: float


class SupervisedEngine(ABC):
    """Engine with a log, whose load is watched. `exited` is done once it has exited."""

    command: tuple[str, ...]
    """See `EngineHandle`."""

    def __init__(self, endpoint: Endpoint, limits: Limits, log: LogRing) -> None:
        self.endpoint = endpoint
        self.log = log
        self.started = time.monotonic()
        self.load_progress: LoadProgress | None = None
        self.when_load_moves: Callable[[], None] = lambda: None
        self.keeper: Keeper | None = None
        self.was_killed = False
        self.out_of_memory = False
        self.ending = Ending()
        self.sleeper: Sleeper | None = None
        self.cannot_sleep: str | None = None
        self._limits = limits
        self._log_begin = log.total
        self._killed_because = ""
        self._last_sign = self.started

    @property
    @abstractmethod
    def exited(self) -> asyncio.Task[Reason]:
        """See `EngineHandle`."""

    @property
    @abstractmethod
    def pids(self) -> tuple[int, ...]:
        """See `EngineHandle`."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """See `EngineHandle`."""

    @property
    @abstractmethod
    def exit_code(self) -> int | None:
        """See `EngineHandle`."""

    def last_words(self, lines: int = 10) -> list[str]:
        return self.log.since(self._log_begin)[-lines:]

    async def ready(self) -> None:
        serves = asyncio.create_task(self._until_it_serves())
        watched = asyncio.create_task(self._watch_progress())
        try:
            await asyncio.wait({serves, watched, self.exited}, return_when=asyncio.FIRST_COMPLETED)
            if self.exited.done():
                raise EngineFailed(*self.exited.result())
            (serves if serves.done() else watched).result()
        finally:
            for task in (serves, watched):
                task.cancel()
            await asyncio.gather(serves, watched, return_exceptions=True)
        self.load_progress = None

    @abstractmethod
    async def _until_it_serves(self) -> None:
        """Wait until it accepts requests; cancelled if it exits, hangs or takes too long."""

    @abstractmethod
    async def healthy(self, limit_sec: float = PROBE_LIMIT_SEC) -> bool:
        """See `EngineHandle`."""

    @abstractmethod
    async def facts(self) -> Facts | None:
        """See `EngineHandle`."""

    async def stop(self) -> None:
        since = time.monotonic()
        if self.alive:
            await self._ask_to_go(self._limits.stop_grace_sec)
        self.kill(f"killed as it was still running {time.monotonic() - since:.1f} s after the request to exit")
        await self.exited

    @abstractmethod
    async def _ask_to_go(self, grace_sec: float) -> None:
        """Ask it to exit; return once it has, and after `grace_sec` in any case."""

    @abstractmethod
    def kill(self, reason: str = "") -> None:
        """See `EngineHandle`."""

    @staticmethod
    @abstractmethod
    def retry_after(code: int, log: Sequence[str]) -> Retry:
        """Return when to start the next engine, by exit code and log of one that ended before it was ready."""

    def _wanted_mib(self, log: Sequence[str]) -> Mapping[Device, int] | None:
        """Return the memory that it asked for last, if it ended for want of memory (see `Ending`)."""
        wanted_mib = ran_out(log[-_LINES_OF_AN_END:])
        return {} if self.out_of_memory and wanted_mib is None else wanted_mib

    def _describe_exit(self, code: int) -> Reason:
        reason = "killed by the kernel: out of memory" if self.out_of_memory else self._exit_in_words(code)
        said = self._complaints()
        return Reason(f"{reason}: {said}" if said and code not in (0, -signal.SIGTERM) else reason, reason)

    @abstractmethod
    def _exit_in_words(self, code: int) -> str:
        """Return what an exit code means that is not about memory; negative codes are signals."""

    def _complaints(self) -> str:
        return complaints(self.log.since(self._log_begin))

    def _signs(self) -> str:
        """Return what was seen of the engine before it was given up."""
        said = self._complaints()
        return f"last log lines: {said}" if said else "it logged nothing"

    def _shows_progress(self, logged: int) -> bool:
        """Return whether the output after the first `logged` lines, which is never empty, is a sign of loading."""
        return True

    @abstractmethod
    def _resident_bytes(self) -> int:
        """Return the RAM that it holds, 0 if unknown: weights that are being read or mapped show here, also where
        the engine is silent."""

    async def _watch_progress(self) -> None:
        """Raise EngineFailed once the load makes no progress or takes too long."""
        stall_sec, limit_sec, _ = self._limits
        resident = 0
        while True:
            await asyncio.sleep(min(_SILENCE_CHECK_SEC, stall_sec / 4))
            now = time.monotonic()
            grown = self._resident_bytes()
            if abs(grown - resident) > 1 << 20:
                resident = grown
                self._last_sign = now
            if now - self._last_sign > stall_sec:
                told = f"loading made no progress for {stall_sec:g} s"
                raise EngineFailed(f"{told}; {self._signs()}", told)
            if limit_sec is not None and now - self.started > limit_sec:
                told = f"not ready after {limit_sec:g} s"
                raise EngineFailed(f"{told}; {self._signs()}", told)
