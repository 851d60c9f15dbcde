"""An engine that runs: its handle, the connections to it, its part of the memory, and how it was doing lately."""

from __future__ import annotations

from dataclasses import dataclass

from router.engines.base import EngineHandle, Facts
from router.engines.log_ring import LogRing
from router.engines.upstream import EnginePool
from router.memory.ledger import Account
from router.scheduling.residency import engine_name


@dataclass(slots=True, eq=False)
class RunningEngine:
    """An engine with the connections to it."""

    id: int
    alias: str
    handle: EngineHandle
    pool: EnginePool
    account: Account
    log: LogRing
    """What it has said itself."""
    started_sec: float
    ready_sec: float | None = None
    facts: Facts | None = None
    """Once it is ready and has told."""
    probed_sec: float | None = None
    probe_latency_sec: float | None = None
    answered_sec: float = 0.0
    """When it last answered a probe (monotonic)."""
    failed_probes: int = 0
    """In a row."""

    @property
    def pid(self) -> int | None:
        """Of the process, or of the first; None where there is none here."""
        return next(iter(self.handle.pids), None)

    @property
    def known_by(self) -> str:
        """For people."""
        return f"port {self.handle.endpoint.port}" if self.pid is None else f"pid {self.pid}"

    @property
    def name(self) -> str:
        """As the scheduler calls it: `a#3`."""
        return engine_name(self.alias, self.id)

    @property
    def alive_sec(self) -> float:
        """When it last gave a sign of life: a byte of any answer, or an answer to a probe."""
        return max(self.ready_sec or 0.0, self.answered_sec, self.pool.heard_sec)

    def loading_sec(self, *, since: float) -> float:
        """How long it was loading from then on."""
        if self.ready_sec is None or self.ready_sec <= since:
            return 0.0
        return self.ready_sec - max(since, self.started_sec)
