"""The constants of the policy, each with its default and what it means.

They are told once, here: the keys of the configuration, the metrics and the table in `docs/scheduling.md` follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple, get_type_hints

from router.scheduling.queue import Priority


@dataclass(frozen=True, slots=True)
class ByPriority:
    """One figure per priority class."""

    high: float
    normal: float
    low: float

    def __getitem__(self, priority: Priority) -> float:
        return (self.high, self.normal, self.low)[priority - 1]


class Metric(NamedTuple):
    name: str
    help: str


class Constant(NamedTuple):
    """A constant that may be configured under its own name."""

    words: str
    """What it means, for who configures it."""
    metric: Metric | None = None
    """By which it is told."""


@dataclass(frozen=True, slots=True)
class Policy:
    """`residency_factor`, `max_wait_sec` and `wait_factor` are the trade between throughput and waiting: at most
    1/(1 + residency_factor) of the time goes to swapping."""

    patience_sec: Annotated[
        ByPriority,
        Constant(
            "Requests are served by arrival + patience, earliest first. So high goes before normal before low, "
            "but a low request overtakes a high one that came patience.low - patience.high later. A smaller "
            "difference is fairer to low; a larger one is kinder to high.",
            Metric("router_scheduler_patience_seconds", "By how much it may be overtaken"),
        ),
    ] = ByPriority(0, 15, 120)
    max_wait_sec: Annotated[
        ByPriority,
        Constant(
            "A busy model is drained to make room once the waiting request has waited for the smaller of this "
            "and wait_factor x the cost of the swap. Smaller: shorter waits, more time lost to loading.",
            Metric("router_scheduler_max_wait_seconds", "Wait after which a busy model drains"),
        ),
    ] = ByPriority(0, 30, 300)
    wait_factor: Annotated[
        ByPriority,
        Constant(
            "See max_wait_sec: makes cheap swaps rotate quickly and dear ones rarely. 0 waits for nothing but "
            "residency_factor.",
            Metric("router_scheduler_wait_factor", "The same in multiples of a swap's cost"),
        ),
    ] = ByPriority(0, 4, 20)
    residency_factor: Annotated[
        float,
        Constant(
            "A busy model is drained only after it was there for this many times the load times of both models "
            "together, so that at most 1 / (1 + factor) of the time is lost to swapping. Larger: more "
            "throughput, longer waits.",
            Metric("router_scheduler_residency_factor", "Quantum of a busy model, in multiples of a swap's cost"),
        ),
    ] = 4
    max_linger_sec: Annotated[
        float,
        Constant(
            "A model that fell idle a moment ago is spared for a short while, because agents and batch jobs send "
            "their next request right after the last answer. The time follows the think times seen and is never "
            "longer than this; 0 turns it off. Larger: fewer swaps, longer waits for others.",
        ),
    ] = 30
    max_concurrent_models: Annotated[
        int,
        Constant(
            "Engines resident at once, whatever memory allows.",
        ),
    ] = 3
    max_queue_size_per_model: Annotated[
        int,
        Constant(
            "Requests that may wait for one model; beyond, those of the lowest priority that came last are "
            "refused with 429.",
            Metric("router_queue_limit", "Requests that may wait for one model"),
        ),
    ] = 500
    max_queue_size_total: Annotated[
        int,
        Constant(
            "Requests that may wait for all models together; beyond, the same.",
        ),
    ] = 10_000
    queue_timeout_sec: Annotated[
        float,
        Constant(
            "Longest wait in the queue.",
            Metric("router_queue_timeout_seconds", "Longest wait in the queue"),
        ),
    ] = 300
    idle_timeout_sec: Annotated[
        float | None,
        Constant(
            "Idle time before a model is unloaded; 0: never.",
        ),
    ] = 300
    keep_warm_models: Annotated[
        int,
        Constant(
            "The last used models, which idle unload spares.",
        ),
    ] = 2
    max_drain_sec: Annotated[
        float | None,
        Constant(
            "Longest time that a model which has to make room may take for its requests in flight; they are then "
            "cut off. null: they are never cut off.",
        ),
    ] = None
    model_load_max_retries: Annotated[
        int,
        Constant(
            "Further tries after a failed load, then the model failed.",
        ),
    ] = 2
    model_max_crashes: Annotated[
        int,
        Constant(
            "A model whose engine dies this often within model_crash_window_sec failed, even if it serves "
            "requests in between.",
        ),
    ] = 5
    model_crash_window_sec: Annotated[
        float,
        Constant(
            "See model_max_crashes.",
        ),
    ] = 300
    model_load_cooldown_sec: Annotated[
        float,
        Constant(
            "A failed model is tried again after this long, or after a reset.",
        ),
    ] = 300
    max_request_retries: Annotated[
        int,
        Constant(
            "How often a request goes back to its queue when its engine dies before the first byte.",
        ),
    ] = 1
    ports: int = 65_536
    """How many there are for engines, from `base_port` on."""
    backoff_sec: float = 1
    max_backoff_sec: float = 60
    free_port_races: int = 3
    """Ports lost to other programs, in a row, before a pause of `backoff_sec` comes after each."""
    most_port_races: int = 20
    """More are no bad luck, and count like other loads that fail."""
    abandoned_load_grace_sec: float = 5
    inspection_valid_sec: float = 10
    others_patience_sec: float = 10
    """How long a model waits for memory that others than our engines hold, before it is refused."""

    @property
    def places(self) -> int:
        """How many engines there may be at once, whatever memory allows."""
        return min(self.max_concurrent_models, self.ports)

    @property
    def places_in_words(self) -> str:
        if self.ports < self.max_concurrent_models:
            return f"base_port leaves {self.ports} port{'s' if self.ports > 1 else ''} for engines"
        return f"max_concurrent_models is {self.max_concurrent_models}"


CONSTANTS: Mapping[str, Constant] = {
    name: constant
    for name, hint in get_type_hints(Policy, include_extras=True).items()
    for constant in getattr(hint, "__metadata__", ())
}
"""By name, those that may be configured."""
DEFAULTS = Policy()
