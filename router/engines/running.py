"""Running engine: its handle, its connections, its account of memory, and the results of probes."""

from __future__ import annotations

from dataclasses import dataclass

from router.engines.base import EngineHandle, Facts
from router.engines.log_ring import LogRing
from router.engines.upstream import EnginePool
from router.memory.ledger import Account
from router.scheduling.residency import engine_name


@dataclass(slots=True, eq=False)
class RunningEngine:
    """Running engine with its connections."""

    id: int
    alias: str
    handle: EngineHandle
    pool: EnginePool
    account: Account
    log: LogRing
    """Its own log."""
    started_sec: float
    """When it began to load, or to wake up."""
    ready_sec: float | None = None
    """None while it loads, sleeps or wakes up."""
    facts: Facts | None = None
    """Properties that it reported, once it is ready."""
    probed_sec: float | None = None
    probe_latency_sec: float | None = None
    answered_sec: float = 0.0
    """When it last answered a probe (monotonic)."""
    failed_probes: int = 0
    """Consecutive probes without an answer."""
    is_ending: bool = False
    """It has told by a response that it has failed or is ending (see `Endpoint.tells_end`)."""

    @property
    def pid(self) -> int | None:
        """Its first process; None if none is on this machine."""
        return next(iter(self.handle.pids), None)

    @property
    def known_by(self) -> str:
        """Process or port, for display."""
        return f"port {self.handle.endpoint.port}" if self.pid is None else f"pid {self.pid}"

    @property
    def name(self) -> str:
        """Name used by the scheduler: `a#3`."""
        return engine_name(self.alias, self.id)

    @property
    def alive_sec(self) -> float:
        """Time of its last sign of life: a byte of any response, or an answer to a probe."""
        return max(self.ready_sec or 0.0, self.answered_sec, self.pool.heard_sec)

    def loading_sec(self, *, since: float) -> float:
        """Return the time that it spent loading after `since`."""
        if self.ready_sec is None or self.ready_sec <= since:
            return 0.0
        return self.ready_sec - max(since, self.started_sec)
