"""The health monitor: finds engines that live but do not answer, and ends them.

An exit needs no monitor; the engine's process is watched for that. This looks at every ready engine now and then,
and sooner at one that has requests in flight and is silent: so much sooner that it is gone when it has been silent
for `stall_timeout_sec`. Three probes without an answer, and it is killed: then it is a crash like any other, and
what waited for it is served by the next engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from router.dispatcher import Dispatcher, RunningEngine
from router.engine import PROBE_LIMIT_SEC
from router.residency import EngineState

_log = logging.getLogger("router")

_PROBES = 3
_LOOK_SEC = 1.0
_SHORTEST_LIMIT_SEC = 0.5


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast an engine that hangs is found out: so that three probes fit into what it may be silent."""

    limit_sec: float
    """For the answer to a probe."""
    look_sec: float
    """Between two looks."""

    @classmethod
    def within(cls, stall_timeout_sec: float) -> Pace:
        limit_sec = min(PROBE_LIMIT_SEC, max(_SHORTEST_LIMIT_SEC, stall_timeout_sec / (2 * _PROBES)))
        return cls(limit_sec, min(_LOOK_SEC, limit_sec))

    @property
    def verdict_sec(self) -> float:
        """From the first look to the end of the engine."""
        return _PROBES * (self.limit_sec + self.look_sec)


class HealthMonitor:
    """Probes the engines of a dispatcher for as long as `run` runs."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._probing: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._pace.look_sec)
                for running in list(self._dispatcher.running.values()):
                    if running.id not in self._probing and self._is_due(running):
                        self._start_probe(running)
        finally:
            for task in self._probing.values():
                task.cancel()

    @property
    def _pace(self) -> Pace:
        return Pace.within(self._dispatcher.config.system.stall_timeout_sec)

    def _is_due(self, running: RunningEngine) -> bool:
        engine = self._dispatcher.scheduler.engines.get(running.id)
        if running.ready_sec is None or engine is None or engine.state is EngineState.STOPPING:
            return False
        now = time.monotonic()
        system = self._dispatcher.config.system
        probed_sec = running.probed_sec or running.ready_sec
        if running.failed_probes or now - probed_sec >= system.health_check_interval_sec:
            return True
        silent_sec = now - max(probed_sec, running.pool.last_sign_sec)
        pace = self._pace
        patience_sec = max(pace.look_sec, system.stall_timeout_sec - pace.verdict_sec)
        return engine.is_busy and silent_sec >= patience_sec

    def _start_probe(self, running: RunningEngine) -> None:
        task = asyncio.create_task(self._probe(running), name=f"probe of {running.alias}")
        self._probing[running.id] = task
        task.add_done_callback(lambda _: self._probing.pop(running.id, None))

    async def _probe(self, running: RunningEngine) -> None:
        began = time.monotonic()
        limit_sec = self._pace.limit_sec
        healthy = await running.process.healthy(limit_sec)
        running.probed_sec = time.monotonic()
        running.probe_latency_sec = running.probed_sec - began
        if healthy:
            running.failed_probes = 0
            return
        running.failed_probes += 1
        if not running.process.alive:
            return
        _log.warning(
            "model %s: no answer to probe %d of %d within %g s",
            running.alias,
            running.failed_probes,
            _PROBES,
            limit_sec,
        )
        if running.failed_probes >= _PROBES:
            _log.error("model %s: its engine (pid %d) hangs and is killed", running.alias, running.process.pid)
            running.process.kill(f"it hung: {_PROBES} probes without an answer")
