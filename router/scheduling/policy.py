"""Constants of the scheduling policy, each with its default and description.

They are defined only here; configuration keys, metrics and the table in `docs/scheduling.md` follow them.
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
    """Constant that can be configured under its own name."""

    words: str
    """Description, shown in the schema and the documentation."""
    metric: Metric | None = None
    """Metric that exports the constant."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Constants of the policy. `residency_factor`, `max_wait_sec` and `wait_factor` set the trade-off between
    throughput and waiting: while models are kept busy, at most about 1/(1 + residency_factor) of the time goes to
    swapping."""

    patience_sec: Annotated[
        ByPriority,
        Constant(
            "How long others may go first: requests are served in the order of arrival time + patience. High "
            "priority thus goes before normal and low, but a low request goes before any high one that arrives "
            "more than patience_sec.low - patience_sec.high after it. A smaller difference favors low priority, a "
            "larger one high priority.",
            Metric("router_scheduler_patience_seconds", "Time by which a request may be overtaken"),
        ),
    ] = ByPriority(0, 15, 120)
    max_wait_sec: Annotated[
        ByPriority,
        Constant(
            "A busy model is drained to make room once the waiting request has waited for the smaller of this "
            "and wait_factor x the cost of the swap, which is the load time of both models together. Smaller "
            "values give shorter waits and spend more time on loading.",
            Metric("router_scheduler_max_wait_seconds", "Wait after which a busy model is drained"),
        ),
    ] = ByPriority(0, 30, 300)
    wait_factor: Annotated[
        ByPriority,
        Constant(
            "Bound on waiting in multiples of the cost of the swap, see max_wait_sec; cheap swaps then happen "
            "sooner than expensive ones. At 0, only residency_factor delays a swap.",
            Metric(
                "router_scheduler_wait_factor",
                "Wait after which a busy model is drained, in multiples of the swap's cost",
            ),
        ),
    ] = ByPriority(0, 4, 20)
    residency_factor: Annotated[
        float,
        Constant(
            "A busy model is drained only after it has been resident for this many times the cost of the swap (at "
            "most once that cost if all its requests have low priority and high priority waits). While models are "
            "kept busy, swapping thus takes at most about 1 / (1 + factor) of the time. Larger values give more "
            "throughput and longer waits.",
            Metric("router_scheduler_residency_factor", "Quantum of a busy model in multiples of the swap's cost"),
        ),
    ] = 4
    max_linger_sec: Annotated[
        float,
        Constant(
            "Maximum time for which a model that has just become idle is spared from eviction, because agents "
            "and batch jobs often send their next request right after a response. The actual time follows the "
            "observed pauses between requests. 0 disables it. Larger values give fewer swaps and longer waits "
            "for other models.",
        ),
    ] = 30
    max_concurrent_models: Annotated[
        int,
        Constant(
            "Maximum number of resident engines, even if memory would allow more.",
        ),
    ] = 3
    max_queue_size_per_model: Annotated[
        int,
        Constant(
            "Maximum number of requests waiting for one model. Beyond it, the most recent requests of the "
            "lowest priority are refused with 429.",
            Metric("router_queue_limit", "Maximum number of requests waiting for one model"),
        ),
    ] = 500
    max_queue_size_total: Annotated[
        int,
        Constant(
            "Maximum number of requests waiting for all models together. Beyond it, the most recent requests of "
            "the lowest priority are refused with 429.",
        ),
    ] = 10_000
    queue_timeout_sec: Annotated[
        float,
        Constant(
            "Maximum time in the queue, whatever the request waits for; then 504.",
            Metric("router_queue_timeout_seconds", "Maximum time in the queue"),
        ),
    ] = 300
    idle_timeout_sec: Annotated[
        float,
        Constant(
            "Idle time before a model is unloaded, unless its entry has an idle timeout of its own. 0: never.",
        ),
    ] = 300
    keep_warm_models: Annotated[
        int,
        Constant(
            "Number of most recently used models that system.idle_timeout_sec does not unload. They still make "
            "room for others.",
        ),
    ] = 2
    max_drain_sec: Annotated[
        float | None,
        Constant(
            "Maximum time to finish requests in flight for a model that is being unloaded to make room; they "
            "are then aborted. null: they are never aborted.",
        ),
    ] = None
    model_load_max_retries: Annotated[
        int,
        Constant(
            "Number of retries after a failed load. Then the model is marked as failed.",
        ),
    ] = 2
    model_max_crashes: Annotated[
        int,
        Constant(
            "Number of engine crashes within model_crash_window_sec after which the model is marked as failed, "
            "even if it serves requests in between.",
        ),
    ] = 5
    model_crash_window_sec: Annotated[
        float,
        Constant(
            "Time window for model_max_crashes.",
        ),
    ] = 300
    model_load_cooldown_sec: Annotated[
        float,
        Constant(
            "Time after which a failed model may be loaded again. A reset allows it at once.",
        ),
    ] = 300
    max_request_retries: Annotated[
        int,
        Constant(
            "How many times a request returns to its queue if its engine dies before the first byte of the "
            "response.",
        ),
    ] = 1
    ports: int = 65_536
    """Number of ports available for engines, from `base_port` on."""
    backoff_sec: float = 1
    max_backoff_sec: float = 60
    free_port_races: int = 3
    """Consecutive ports lost to other programs before each further one causes a pause of `backoff_sec`."""
    most_port_races: int = 20
    """Further lost ports count as failed loads."""
    abandoned_load_grace_sec: float = 5
    inspection_valid_sec: float = 10
    others_patience_sec: float = 10
    """How long a model waits for memory held by other programs before its requests are refused."""

    @property
    def places(self) -> int:
        """Maximum number of resident engines, even if memory would allow more."""
        return min(self.max_concurrent_models, self.ports)

    @property
    def most_asleep(self) -> int:
        """Maximum number of sleeping engines: they take no place, but keep their ports."""
        return max(0, self.ports - self.max_concurrent_models)

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
"""Configurable constants by name."""
DEFAULTS = Policy()
