"""Health monitor: finds engines that run but do not respond, and kills them.

Exits are detected elsewhere, by watching the process. The monitor probes every ready engine at intervals, and an
engine with requests in flight and no output earlier: early enough to know whether it responds once it has been
silent for `stall_timeout_sec` or `request_timeout_sec`. Silence alone is no fault: an engine sends nothing while
it computes a long prompt, or a response that is not streamed.

An engine is killed after three consecutive probes without an answer; a busy one only after `stall_timeout_sec`
without any sign of life, as it may be too busy to accept another connection. This counts as a crash, and the next
engine serves the waiting requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from router.config.schema import System
from router.engines.base import PROBE_LIMIT_SEC
from router.engines.running import RunningEngine
from router.scheduling.messages import EngineState
from router.scheduling.scheduler import Scheduler

_log = logging.getLogger("router")

_PROBES = 3
_LOOK_SEC = 1.0
_SHORTEST_LIMIT_SEC = 0.5


@dataclass(frozen=True, slots=True)
class Pace:
    """Timing of probes, chosen so that three of them fit into the time for which an engine may be silent."""

    limit_sec: float
    """Timeout of a probe."""
    look_sec: float
    """Interval between two checks."""

    @classmethod
    def within(cls, silence_sec: float) -> Pace:
        limit_sec = min(PROBE_LIMIT_SEC, max(_SHORTEST_LIMIT_SEC, silence_sec / (2 * _PROBES)))
        return cls(limit_sec, min(_LOOK_SEC, limit_sec))

    @property
    def verdict_sec(self) -> float:
        """Time from the first check to the kill."""
        return _PROBES * (self.limit_sec + self.look_sec)


class HealthMonitor:
    """Probes engines while `run` runs. Of the scheduler it only reads which engines are busy."""

    def __init__(
        self, running: Callable[[], Iterable[RunningEngine]], scheduler: Scheduler, system: Callable[[], System]
    ) -> None:
        self._running = running
        self._scheduler = scheduler
        self._system = system
        self._probing: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._pace.look_sec)
                for running in list(self._running()):
                    if running.id not in self._probing and self._is_due(running):
                        self._start_probe(running)
        finally:
            for task in self._probing.values():
                task.cancel()

    @property
    def _silence_sec(self) -> float:
        """Time without output after which it must be known whether a busy engine responds."""
        system = self._system()
        return min(system.stall_timeout_sec, system.request_timeout_sec)

    @property
    def _pace(self) -> Pace:
        return Pace.within(self._silence_sec)

    def _is_due(self, running: RunningEngine) -> bool:
        engine = self._scheduler.engines.get(running.id)
        if running.ready_sec is None or engine is None or engine.state is EngineState.STOPPING:
            return False  # one that sleeps would answer no probe
        now = time.monotonic()
        probed_sec = running.probed_sec or running.ready_sec
        interval_sec = self._system().health_check_interval_sec
        if running.failed_probes or now - probed_sec >= interval_sec:
            return True
        silent_sec = now - max(probed_sec, running.pool.silent_since_sec)
        pace = self._pace
        patience_sec = max(pace.look_sec, self._silence_sec - pace.verdict_sec)
        return engine.is_busy and silent_sec >= patience_sec

    def _start_probe(self, running: RunningEngine) -> None:
        task = asyncio.create_task(self._probe(running), name=f"probe of {running.alias}")
        self._probing[running.id] = task
        task.add_done_callback(lambda ended: self._ended(running, ended))

    def _ended(self, running: RunningEngine, probe: asyncio.Task[None]) -> None:
        self._probing.pop(running.id, None)
        if not probe.cancelled() and (error := probe.exception()) is not None:
            _log.error("background task %s failed: %s", probe.get_name(), error, exc_info=error)

    async def _probe(self, running: RunningEngine) -> None:
        began = time.monotonic()
        limit_sec = self._pace.limit_sec
        answers = await running.handle.healthy(limit_sec)
        now = running.probed_sec = time.monotonic()
        running.probe_latency_sec = now - began
        if running.ready_sec is None:  # it has fallen asleep meanwhile
            return
        if answers:
            running.answered_sec = now
        if running.alive_sec >= began:  # by an answer to the probe, or output for a request
            running.failed_probes = 0
            return
        running.failed_probes += 1
        if not running.handle.alive:
            return
        if running.failed_probes <= _PROBES:
            figures = running.failed_probes, _PROBES, limit_sec
            _log.warning("model %s: health probe %d of %d not answered within %g s", running.alias, *figures)
        if running.failed_probes >= _PROBES and self._may_go(running, now):
            _log.error("model %s: its engine (%s) does not respond and is killed", running.alias, running.known_by)
            running.handle.kill(f"it hung: {running.failed_probes} probes without an answer")

    def _may_go(self, running: RunningEngine, now: float) -> bool:
        """Return whether no response that may still arrive would be lost."""
        engine = self._scheduler.engines.get(running.id)
        stall_timeout_sec = self._system().stall_timeout_sec
        return engine is None or not engine.is_busy or now - running.alive_sec >= stall_timeout_sec
