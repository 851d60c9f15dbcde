"""State of the scheduler: models with their queues, engines with their placements.

The entities, their statistics, and arithmetic on placements. The scheduler decides when anything changes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from router.scheduling.messages import EngineState, Inspected, ModelSpec, Placement, StopCause
from router.scheduling.policy import Policy
from router.scheduling.queue import Priority, PriorityQueue, Request
from router.system.devices import Device
from router.system.words import Word

_FLOW_MEMORY_SEC = 240
_FLOW_KNOWN_SEC = 10
"""Minimum duration for rates: a burst in less time is not taken for a lasting rate."""

_FEWEST_ALIKE = 3
_MOST_BY_CHANCE = 4.0
"""Difference between the means before and after, in standard errors, that is still taken for chance."""

ENGINES = Device(kind="engine")
"""Resource limited by `max_concurrent_models` and the ports: every placement takes one."""


_NEARNESS = {
    state: place
    for place, state in enumerate(
        (
            EngineState.READY,
            EngineState.LOADING,
            EngineState.ASLEEP,
            EngineState.DRAINING,
            EngineState.STOPPING,
        )
    )
}
"""Order of engine states by how soon the engine serves."""


class Returns:
    """Time until a model is used again after it became idle: its last sixteen gaps in seconds."""

    __slots__ = ("_answers", "_gaps")

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=16)
        self._answers: dict[tuple[float, float], float] = {}

    def add(self, gap_sec: float) -> None:
        self._gaps.append(gap_sec)
        self._answers.clear()

    def share_beyond(self, seconds: float) -> float:
        """Return the share of gaps that are longer; 1 while none is known."""
        return sum(gap > seconds for gap in self._gaps) / len(self._gaps) if self._gaps else 1.0

    def linger_sec(self, worth_sec: float, cap_sec: float) -> float:
        """Return how long it pays to keep an idle engine while another model waits for its memory.

        As in anticipatory disk scheduling (Iyer and Druschel, SOSP 2001): waiting L seconds costs
        `mean(min(gap, L))` of idleness, and with the probability of a request within L it serves one for which
        the engine would have to be reloaded. `worth_sec` is the value of such a request: the time in which a
        swap would serve one waiting request. The result is the L with the largest gain over the observed gaps;
        0 if none gains.
        """
        question = (worth_sec, cap_sec)
        if question not in self._answers:
            self._answers[question] = self._best_linger_sec(worth_sec, cap_sec)
        return self._answers[question]

    def _best_linger_sec(self, worth_sec: float, cap_sec: float) -> float:
        if not self._gaps:
            return min(cap_sec, 0.5, 0.1 * worth_sec)
        gaps = sorted(self._gaps)
        best_gain, best = 0.0, 0.0
        within, waited = 0, 0.0
        for gap in gaps:
            length = min(1.5 * gap + 0.01, cap_sec)  # plus a half, as gaps vary
            while within < len(gaps) and gaps[within] <= length:
                waited += gaps[within]
                within += 1
            idle = (waited + (len(gaps) - within) * length) / len(gaps)
            gain = within / len(gaps) * worth_sec - idle
            if gain > best_gain:
                best_gain, best = gain, length
        return best


def since_it_changed(values: Sequence[float]) -> Sequence[float]:
    """Return the latest values, from the point where they differ from earlier ones by more than chance; else
    all."""
    count, total = len(values), sum(values)
    mean = total / max(1, count)
    around = sum((value - mean) ** 2 for value in values)
    earlier, best, since = 0.0, _MOST_BY_CHANCE, 0
    for place in range(1, count - _FEWEST_ALIKE + 1):
        earlier += values[place - 1]
        later_mean, earlier_mean = (total - earlier) / (count - place), earlier / place
        between = (later_mean - earlier_mean) ** 2 * place * (count - place) / count
        within = (around - between) / (count - 2) if count > 2 else 0.0
        if between > best**2 * max(within, 1e-9):
            best, since = math.sqrt(between / max(within, 1e-9)), place
    return values[since:]


def engine_name(alias: str, engine_id: int) -> str:
    """Return the name of an engine among all since the start: `a#3`."""
    return f"{alias}#{engine_id}"


@dataclass(slots=True, eq=False)
class Engine:
    """One engine from the decision to start it until its memory is released."""

    id: int
    spec: ModelSpec
    placement: Placement
    started_sec: float
    state: EngineState = EngineState.LOADING
    ready_sec: float = 0.0
    idle_since_sec: float | None = None
    """None while any request is in flight."""
    keep_alive_sec: float | None = None
    """Idle timeout set by a client; replaces the configured one unless the model is pinned."""
    nobody_waits_since_sec: float | None = None
    in_flight: dict[str, Priority] = field(default_factory=dict)
    """Requests with a slot, with their priorities."""
    slotless: set[str] = field(default_factory=set)
    """Requests without a slot, which keep the engine as well."""
    draining_since_sec: float = 0.0
    stopping_since_sec: float = 0.0
    cause: StopCause | None = None
    leaves_for: str = ""
    """Reason in words."""
    suspect: bool = False
    """True after a request failed on it, until it is known whether it responds."""
    died_while: EngineState | None = None
    """State in which its process exited without a request to."""
    served: int = 0
    asleep: Placement | None = None
    """Memory that it holds, or is expected to hold, asleep; None: it cannot sleep."""
    awake: Placement | None = None
    """Memory that it holds awake, from the decision to put it to sleep until it is ready again; else None."""

    @property
    def alias(self) -> str:
        return self.spec.alias

    @property
    def name(self) -> str:
        return engine_name(self.spec.alias, self.id)

    @property
    def departure(self) -> str:
        """Reason for its stop: `evicted: makes room for 'b'`; empty if it is not being stopped."""
        if self.cause is None:
            return ""
        return f"{self.cause}: {self.leaves_for}" if self.leaves_for else self.cause.value

    @property
    def falls_asleep(self) -> bool:
        return self.awake is not None and self.state is EngineState.STOPPING

    @property
    def wakes_up(self) -> bool:
        return self.awake is not None and self.state is EngineState.LOADING

    @property
    def leaves(self) -> Placement:
        """Memory that it releases when it exits, or when it is asleep if it is about to sleep."""
        return rest(self.placement, self.asleep or {}) if self.falls_asleep else self.placement

    @property
    def more_awake(self) -> Placement:
        """What one that is asleep needs in addition to be awake."""
        return {device: amount for device, amount in rest(self.awake or {}, self.placement).items() if amount}

    @property
    def is_busy(self) -> bool:
        return bool(self.in_flight or self.slotless)

    @property
    def load(self) -> int:
        """Number of requests in flight."""
        return len(self.in_flight) + len(self.slotless)

    def idle_timeout_sec(self, policy: Policy) -> float:
        if self.spec.pinned:
            return math.inf
        if self.keep_alive_sec is not None:
            return self.keep_alive_sec
        timeout = self.spec.idle_timeout_sec
        return policy.idle_timeout_sec if timeout is None else timeout

    def admits(self, *, slotless: bool = False) -> bool:
        if self.state is not EngineState.READY or self.suspect:
            return False
        spec = self.spec
        return len(self.slotless) < spec.most_slotless if slotless else len(self.in_flight) < spec.slots


class Holder(Protocol):
    """Holder of resources."""

    @property
    def placement(self) -> Placement: ...


class Hold(Word):
    """Reason why an engine is not unloaded yet for a candidate."""

    LOADING = "loading"
    BOUND = "bound"
    """The waiting requests have not reached their bound on waiting."""
    QUANTUM = "quantum"
    """It has not been resident for its quantum."""
    LINGER = "linger"
    """It has just become idle."""


@dataclass(frozen=True, slots=True)
class Departure:
    """Earliest time at which an engine may be unloaded, and the reason."""

    engine_id: int
    alias: str
    at: float
    """Infinite: unknown."""
    hold: Hold


@dataclass(frozen=True, slots=True)
class Why:
    """Reason why a model with waiting requests has no engine, in words, with times that change."""

    words: str = ""
    departures: tuple[Departure, ...] = ()
    """Departures that must all happen first."""

    def __str__(self) -> str:
        return self.words


class Flow:
    """Rate of requests for a model during the periods counted here, over the last minutes."""

    __slots__ = ("_clear_sec", "_clear_since", "_counts", "_falls", "_seconds", "_since")

    def __init__(self) -> None:
        self._counts = dict.fromkeys(Priority, 0.0)
        self._falls = 0.0
        self._seconds = 0.0
        self._since: float | None = None
        self._clear_sec = 0.0
        """Part of that time after the queue had been served."""
        self._clear_since: float | None = None

    def go_on(self, now: float) -> None:
        if self._since is None:
            self._since = now

    def pause(self, now: float) -> None:
        if self._since is not None:
            self._fold(now)
            self._since = self._clear_since = None

    def clear(self, now: float) -> None:
        """Note that the queue is empty."""
        if self._clear_since is None:
            self._clear_since = now

    def fall_idle(self, now: float) -> None:
        self._falls += 1
        self.pause(now)

    def come(self, priority: Priority, now: float) -> None:
        self._counts[priority] += 1
        if self._since is not None and now - self._since > _FLOW_MEMORY_SEC / 4:
            self._fold(now)

    def gap_sec(self, priority: Priority, now: float) -> float:
        """Return the mean time between requests of a priority; infinite if there were none."""
        count = self._counts[priority]
        return self._lasted_sec(now) / count if count else math.inf

    def goes_on_sec(self, guess_sec: float, now: float) -> float:
        """Return the mean time from an empty queue until idleness; the guess counts as one observation."""
        running_sec = now - self._clear_since if self._clear_since is not None else 0.0
        return (self._clear_sec + running_sec + guess_sec) / (self._falls + 1)

    def _lasted_sec(self, now: float) -> float:
        running_sec = now - self._since if self._since is not None else 0.0
        return max(_FLOW_KNOWN_SEC, self._seconds + running_sec)

    def _fold(self, now: float) -> None:
        assert self._since is not None
        self._seconds += now - self._since
        self._since = now
        if self._clear_since is not None:
            self._clear_sec += now - self._clear_since
            self._clear_since = now
        if self._seconds > _FLOW_MEMORY_SEC:  # old rates say little about the present
            share = _FLOW_MEMORY_SEC / 2 / self._seconds
            self._seconds *= share
            self._falls *= share
            self._clear_sec *= share
            for priority in self._counts:
                self._counts[priority] *= share


@dataclass(slots=True, eq=False)
class Model:
    """State of one model: its queue, its engines, and their statistics."""

    spec: ModelSpec
    load_sec: float
    queue: PriorityQueue = field(default_factory=PriorityQueue)
    engines: list[Engine] = field(default_factory=list)
    """Engines in the order of their starts. The policy starts one at a time, see `wants_engine`."""
    retired: bool = False
    """True once it is removed from the configuration; it is deleted once its engines have exited."""
    wanted_since_sec: float | None = None
    """Time at which an operator or preload requested a load."""
    comes_back: bool = False
    """True if its engine has died and is to be replaced once there is room, even without waiting requests."""
    may_evict: bool = False
    """True if that load may evict another model."""
    inspecting_since_sec: float | None = None
    inspected: Inspected | None = None
    too_big: bool = False
    """True if it could never have fitted when it was last wanted."""
    cramped_since_sec: float | None = None
    """Time since which only memory of other programs is missing."""
    ran_out: bool = False
    """True if its last load ran out of memory."""
    attempts: int = 0
    """Consecutive failed loads and crashes."""
    ports_lost: int = 0
    """Consecutive ports lost to other programs."""
    crashes_sec: deque[float] = field(default_factory=deque)
    """Times of crashes within the policy's window."""
    retry_at_sec: float = 0.0
    failed_until_sec: float = 0.0
    failed_for_good: bool = False
    """True if its engine rejects its flags, and would again after the cooldown."""
    last_error: str | None = None
    why_waiting: Why = Why()
    pinned_until_sec: float | None = None
    """Time until which an operator has pinned it; None: it is pinned only if that is configured."""
    unpinned: ModelSpec | None = None
    """What is configured, while `spec` is pinned by an operator; else None."""
    busy: Flow = field(default_factory=Flow)
    """Requests that arrive while an engine of it is busy."""
    away: Flow = field(default_factory=Flow)
    """Requests that arrive while it has no ready engine."""
    places: tuple[Placement, ...] = ()
    """Possible placements of the last inspection."""
    returns: Returns = field(default_factory=Returns)
    last_used_sec: float = -math.inf
    mean_gap_sec: float = 3600.0
    load_is_known: bool = False
    """True if `load_sec` was measured, for this engine or an earlier one."""
    wake_sec: float | None = None
    """Time to wake up its engine; None until measured."""
    recent_sec: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """Service times of the last computed requests."""
    _lately_sec: Sequence[float] | None = None

    @property
    def lately_sec(self) -> Sequence[float]:
        """Service times of the last requests since their level changed."""
        if self._lately_sec is None:
            self._lately_sec = since_it_changed(list(self.recent_sec))
        return self._lately_sec

    def service_sec(self, elapsed_sec: Sequence[float]) -> float | None:
        """Return the expected service time of a new request, given how long others have been in flight; None:
        unknown.

        Several requests that take longer than any before indicate a change; a single one does not.
        """
        lately_sec = self.lately_sec
        if not lately_sec:
            return None
        mean_sec = sum(lately_sec) / len(lately_sec)
        longest_sec = max(self.recent_sec)
        longer = sorted(1.5 * elapsed - mean_sec for elapsed in elapsed_sec if elapsed > longest_sec)
        return mean_sec + sum(longer[:-1]) / (len(elapsed_sec) + 1)

    @property
    def urgent(self) -> bool:
        """Whether a request of high priority waits."""
        return self.queue.count(Priority.HIGH) > 0

    @property
    def is_wanted(self) -> bool:
        """Whether requests or an operator wait for an engine of it."""
        return self.wanted_since_sec is not None or len(self.queue) > 0

    @property
    def wants_engine(self) -> bool:
        """Whether an engine of it is to be started, or woken up."""
        return self.is_wanted and all(engine.state is EngineState.ASLEEP for engine in self.engines)

    @property
    def sleeper(self) -> Engine | None:
        """Engine that is asleep and can be woken up; None if there is none."""
        return next((engine for engine in self.engines if engine.state is EngineState.ASLEEP), None)

    @property
    def comes_sec(self) -> float:
        """Expected time to have a ready engine of it again, if the one it has makes room or sleeps already."""
        sleeps = any(engine.asleep is not None for engine in self.engines)
        return self.wake_sec if sleeps and self.wake_sec is not None else self.load_sec

    @property
    def coming_is_known(self) -> bool:
        """Whether `comes_sec` was measured."""
        is_asleep = any(engine.awake is not None for engine in self.engines)
        return self.wake_sec is not None if is_asleep else self.load_is_known

    @property
    def front(self) -> Engine | None:
        """Engine that determines the state of the model: the one that serves, or will first."""
        return min(self.engines, key=lambda engine: _NEARNESS[engine.state], default=None)

    @property
    def is_here(self) -> bool:
        """Whether it has a ready engine."""
        return any(engine.state is EngineState.READY for engine in self.engines)

    def admitting(self, *, slotless: bool) -> Engine | None:
        """Return the least loaded engine that admits a new request; None if there is none."""
        chosen = None
        for engine in self.engines:
            if engine.admits(slotless=slotless) and (chosen is None or engine.load < chosen.load):
                chosen = engine
        return chosen

    def arrival(self, now: float) -> None:
        """Note an arrival, which ends a gap if no request was in flight or waiting."""
        idle_since_sec = self._idle_since_sec()
        if idle_since_sec is None or self.queue or math.isinf(idle_since_sec):
            self.mean_gap_sec *= 0.8
        else:
            self.returns.add(now - idle_since_sec)
            self.mean_gap_sec += 0.2 * (now - idle_since_sec - self.mean_gap_sec)

    def _idle_since_sec(self) -> float | None:
        """Return since when it is unused; None while it is in use or loading."""
        latest = None
        for engine in self.engines:
            if engine.idle_since_sec is None:
                return None
            latest = engine.idle_since_sec if latest is None else max(latest, engine.idle_since_sec)
        return self.last_used_sec if latest is None else latest

    def joined(self, request: Request, now: float) -> None:
        """Count a request that was admitted or queued."""
        if request.slotless:
            return
        is_here = False
        for engine in self.engines:
            if engine.state is EngineState.READY:
                is_here = True
                if engine.is_busy:
                    self.busy.come(request.priority, now)
                    return
        if not is_here:
            self.away.come(request.priority, now)

    def turn(self, now: float, *, is_here: bool) -> None:
        """Note that it has a ready engine from now on, or none."""
        if is_here:
            self.away.pause(now)
            if any(engine.is_busy for engine in self.engines):  # a drain was cancelled
                self.busy.go_on(now)
        else:
            self.away.go_on(now)
            self.busy.pause(now)

    def loaded(self, took_sec: float) -> None:
        self.load_sec += (0.3 if self.load_is_known else 1.0) * (took_sec - self.load_sec)
        self.load_is_known = True

    def woke(self, took_sec: float) -> None:
        self.wake_sec = took_sec if self.wake_sec is None else self.wake_sec + 0.3 * (took_sec - self.wake_sec)

    def computed(self, took_sec: float) -> None:
        """Record the service time of a request whose tokens were computed."""
        self.recent_sec.append(took_sec)
        self._lately_sec = None

    def remaining_sec(self, elapsed_sec: Iterable[float]) -> list[float]:
        """Return the expected remaining times of requests in flight, by those earlier requests that took longer.

        Several requests are spread over the distribution: the first slot becomes free sooner than the mean.
        """
        longest_first = sorted(elapsed_sec, reverse=True)
        remaining: list[float] = []
        for place, elapsed in enumerate(longest_first):
            longer = sorted(took_sec - elapsed for took_sec in self.lately_sec if took_sec > elapsed)
            if not longer:
                remaining.append(elapsed / 2)
            elif len(longest_first) == 1:
                remaining.append(sum(longer) / len(longer))
            else:
                remaining.append(longer[int((place + 0.5) / len(longest_first) * len(longer))])
        return remaining

    def crashed(self, now: float, window_sec: float) -> int:
        """Record a crash and return the number within the window."""
        self.crashes_sec.append(now)
        while now - self.crashes_sec[0] > window_sec:
            self.crashes_sec.popleft()
        return len(self.crashes_sec)

    @property
    def tries(self) -> int:
        """Number of recent engines that failed."""
        return max(self.attempts, len(self.crashes_sec))

    def forget_tries(self) -> None:
        self.attempts = self.ports_lost = 0
        self.crashes_sec.clear()

    def forget_failures(self) -> None:
        self.forget_tries()
        self.ran_out = False
        self.failed_until_sec = self.retry_at_sec = 0.0
        self.last_error = self.inspected = None

    def put_in_force(self, spec: ModelSpec) -> None:
        """Use this configuration, with the operator's pin if there is one."""
        is_pinned = self.pinned_until_sec is not None and not spec.pinned
        self.unpinned = spec if is_pinned else None
        self.spec = replace(spec, pinned=True, kept=True) if is_pinned else spec

    def forget_wish(self) -> None:
        """Cancel a requested load."""
        self.wanted_since_sec = None
        self.may_evict = False


@dataclass(slots=True, eq=False)
class Swap:
    """Memory being freed for an engine. It is recorded before the victims are drained, so that no other model
    takes it."""

    alias: str
    """Model of the engine to be started, or woken up."""
    placement: Placement
    """Memory of that engine; of one that is asleep, what it needs in addition."""
    victims: frozenset[Engine]
    wakes: Engine | None = None
    """Engine to be woken up; None: a new one is started."""


def total(placements: Iterable[Placement]) -> dict[Device, int]:
    """Return the sum of placements by resource."""
    amounts: dict[Device, int] = {}
    for placement in placements:
        for device, amount in placement.items():
            amounts[device] = amounts.get(device, 0) + amount
    return amounts


def shortage(need: Placement, free: Placement) -> dict[Device, int]:
    """Return the missing amount of each resource; empty if `need` fits."""
    return {
        device: amount - free.get(device, 0) for device, amount in need.items() if amount > free.get(device, 0)
    }


def rest(placement: Placement, kept: Placement) -> dict[Device, int]:
    """Return what remains of a placement without what is kept; never less than nothing."""
    return {device: max(0, amount - kept.get(device, 0)) for device, amount in placement.items()}


def larger(one: Placement, other: Placement) -> dict[Device, int]:
    """Return the larger amount of each resource."""
    return {device: max(one.get(device, 0), other.get(device, 0)) for device in {**one, **other}}


def take(free: dict[Device, int], placement: Placement) -> None:
    for device, amount in placement.items():
        free[device] = free.get(device, 0) - amount


def claim(need: Placement, victims: Iterable[Holder]) -> dict[Device, int]:
    """Return what a swap takes beyond the resources of its victims."""
    return shortage(need, total(victim.placement for victim in victims))


def memory_of(placement: Placement) -> dict[Device, int]:
    """Return the memory of a placement, without the one of `ENGINES` that each engine takes."""
    return {device: amount for device, amount in placement.items() if device != ENGINES}


def amounts(placement: Placement) -> str:
    """Return a placement in words: `5000 MiB on gpu0 and 300 MiB on host`."""
    memory = [f"{amount} MiB on {device}" for device, amount in sorted(memory_of(placement).items())]
    return " and ".join(memory) or "nothing"
