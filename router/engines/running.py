"""An engine that runs: its process, the connections to it, its part of the memory, and how it was doing lately."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from router.engines.process import EngineProcess
from router.engines.upstream import EnginePool
from router.memory.ledger import Account


class EngineContext(msgspec.Struct):
    n_ctx: int | None = None
    """Of one slot."""


class EngineProps(msgspec.Struct):
    """What an engine says of itself at `/props`."""

    default_generation_settings: EngineContext = msgspec.field(default_factory=EngineContext)
    modalities: dict[str, bool] = {}


@dataclass(slots=True, eq=False)
class RunningEngine:
    """An engine's process with the connections to it."""

    id: int
    alias: str
    process: EngineProcess
    pool: EnginePool
    account: Account
    started_sec: float
    ready_sec: float | None = None
    props: EngineProps | None = None
    """Once it is ready and has answered that."""
    probed_sec: float | None = None
    probe_latency_sec: float | None = None
    answered_sec: float = 0.0
    """When it last answered a probe (monotonic)."""
    failed_probes: int = 0
    """In a row."""

    @property
    def alive_sec(self) -> float:
        """When it last gave a sign of life: a byte of any answer, or an answer to a probe."""
        return max(self.ready_sec or 0.0, self.answered_sec, self.pool.heard_sec)

    def loading_sec(self, *, since: float) -> float:
        """How long it was loading from then on."""
        if self.ready_sec is None or self.ready_sec <= since:
            return 0.0
        return self.ready_sec - max(since, self.started_sec)
