"""What the scheduler knows: models with their waiting lines, engines with their place in memory.

The entities, what they learn from what happens to them, and the arithmetic on placements. When any of it
happens is for the scheduler to say.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from router.scheduling.messages import EngineState, Inspected, ModelSpec, Placement, StopCause
from router.scheduling.policy import Policy
from router.scheduling.queue import Priority, PriorityQueue, Request
from router.system.devices import Device
from router.system.words import Word

_FLOW_MEMORY_SEC = 240
_FLOW_KNOWN_SEC = 10
"""What came in less time counts as having come in this: not every crowd is the first of many."""

_FEWEST_ALIKE = 3
_MOST_BY_CHANCE = 4.0
"""Standard errors between the means before and after, at the place where they differ most."""

ENGINES = Device(kind="engine")
"""The resource that `max_concurrent_models` and the ports limit: every placement takes one of it."""


_NEARNESS = {
    state: place
    for place, state in enumerate(
        (EngineState.READY, EngineState.LOADING, EngineState.DRAINING, EngineState.STOPPING)
    )
}
"""How near an engine of each state is to serving, the nearest first."""


class Returns:
    """How soon a model is wanted again after it fell idle: its last sixteen gaps, in seconds."""

    __slots__ = ("_answers", "_gaps")

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=16)
        self._answers: dict[tuple[float, float], float] = {}

    def add(self, gap_sec: float) -> None:
        self._gaps.append(gap_sec)
        self._answers.clear()

    def share_beyond(self, seconds: float) -> float:
        """How many gaps are longer; all while none is known."""
        return sum(gap > seconds for gap in self._gaps) / len(self._gaps) if self._gaps else 1.0

    def linger_sec(self, worth_sec: float, cap_sec: float) -> float:
        """How long it pays to keep an idle engine while another model waits for its memory.

        As in anticipatory disk scheduling (Iyer and Druschel, SOSP 2001): waiting L seconds costs
        `mean(min(gap, L))` of idleness, and with the chance that the next request comes within L it serves
        one for which the engine would have to come back. `worth_sec` is what such a request is worth: the
        time in which a swap would serve one of those who wait. The L that gains most over the gaps seen
        wins; 0 when none gains.
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
            length = min(1.5 * gap + 0.01, cap_sec)  # half as much again: gaps jitter
            while within < len(gaps) and gaps[within] <= length:
                waited += gaps[within]
                within += 1
            idle = (waited + (len(gaps) - within) * length) / len(gaps)
            gain = within / len(gaps) * worth_sec - idle
            if gain > best_gain:
                best_gain, best = gain, length
        return best


def since_it_changed(values: Sequence[float]) -> Sequence[float]:
    """The latest of these, from where they differ from those before by more than chance does; else all."""
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
    """For people, of one engine among all that there were since the start: `a#3`."""
    return f"{alias}#{engine_id}"


@dataclass(slots=True, eq=False)
class Engine:
    """One llama-server process from the decision to start it until its memory is back."""

    id: int
    spec: ModelSpec
    placement: Placement
    started_sec: float
    state: EngineState = EngineState.LOADING
    ready_sec: float = 0.0
    idle_since_sec: float | None = None
    """None while anything is in flight, with a slot or without."""
    keep_alive_sec: float | None = None
    """How long it stays when idle, if a client has said so: instead of what is configured, unless it is pinned."""
    nobody_waits_since_sec: float | None = None
    in_flight: dict[str, Priority] = field(default_factory=dict)
    """Each of them has a slot."""
    slotless: set[str] = field(default_factory=set)
    """What is with it besides. It keeps the engine as they do."""
    draining_since_sec: float = 0.0
    stopping_since_sec: float = 0.0
    cause: StopCause | None = None
    leaves_for: str = ""
    """The cause in more words."""
    suspect: bool = False
    """A request broke on it, and whether it still lives is not known yet."""
    died_while: EngineState | None = None
    """What it was when its process ended without being asked to."""
    served: int = 0

    @property
    def alias(self) -> str:
        return self.spec.alias

    @property
    def name(self) -> str:
        return engine_name(self.spec.alias, self.id)

    @property
    def departure(self) -> str:
        """Why it is asked to go: `evicted: makes room for 'b'`; empty while it is not."""
        if self.cause is None:
            return ""
        return f"{self.cause}: {self.leaves_for}" if self.leaves_for else self.cause.value

    @property
    def is_busy(self) -> bool:
        return bool(self.in_flight or self.slotless)

    @property
    def load(self) -> int:
        """How many requests are with it."""
        return len(self.in_flight) + len(self.slotless)

    def idle_timeout_sec(self, policy: Policy) -> float:
        if self.spec.pinned:
            return math.inf
        if self.keep_alive_sec is not None:
            return self.keep_alive_sec
        timeout = self.spec.idle_timeout_sec
        if timeout is None:
            timeout = policy.idle_timeout_sec
        return math.inf if timeout is None else timeout

    def admits(self, *, slotless: bool = False) -> bool:
        if self.state is not EngineState.READY or self.suspect:
            return False
        spec = self.spec
        return len(self.slotless) < spec.most_slotless if slotless else len(self.in_flight) < spec.slots


class Holder(Protocol):
    """What holds memory."""

    @property
    def placement(self) -> Placement: ...


class Hold(Word):
    """What keeps an engine from making room for a candidate."""

    LOADING = "loading"
    BOUND = "bound"
    """Those who wait have not waited for their bound."""
    QUANTUM = "quantum"
    """It has not been resident for its own."""
    LINGER = "linger"
    """It fell idle a moment ago."""


@dataclass(frozen=True, slots=True)
class Departure:
    """When an engine may be asked to go, and what it has until then."""

    engine_id: int
    alias: str
    at: float
    """Infinite: nobody can tell."""
    hold: Hold


@dataclass(frozen=True, slots=True)
class Why:
    """Why a model has no engine although somebody waits for it: words, and figures that move with time."""

    words: str = ""
    departures: tuple[Departure, ...] = ()
    """All of them must be gone."""

    def __str__(self) -> str:
        return self.words


class Flow:
    """How often somebody comes for a model in the time that is counted here, over its last minutes."""

    __slots__ = ("_clear_sec", "_clear_since", "_counts", "_falls", "_seconds", "_since")

    def __init__(self) -> None:
        self._counts = dict.fromkeys(Priority, 0.0)
        self._falls = 0.0
        self._seconds = 0.0
        self._since: float | None = None
        self._clear_sec = 0.0
        """Of that, what came after those were served who had waited at the beginning."""
        self._clear_since: float | None = None

    def go_on(self, now: float) -> None:
        if self._since is None:
            self._since = now

    def pause(self, now: float) -> None:
        if self._since is not None:
            self._fold(now)
            self._since = self._clear_since = None

    def clear(self, now: float) -> None:
        """Nobody waits."""
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
        """Between two of a class; infinite while none has come."""
        count = self._counts[priority]
        return self._lasted_sec(now) / count if count else math.inf

    def goes_on_sec(self, guess_sec: float, now: float) -> float:
        """How long somebody is there once nobody waits; the guess counts as one time that it was seen."""
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
        if self._seconds > _FLOW_MEMORY_SEC:  # what was an hour ago says little of now
            share = _FLOW_MEMORY_SEC / 2 / self._seconds
            self._seconds *= share
            self._falls *= share
            self._clear_sec *= share
            for priority in self._counts:
                self._counts[priority] *= share


@dataclass(slots=True, eq=False)
class Model:
    """What is known of one alias: its waiting line, its engines, and how both have behaved."""

    spec: ModelSpec
    load_sec: float
    queue: PriorityQueue = field(default_factory=PriorityQueue)
    engines: list[Engine] = field(default_factory=list)
    """In the order of their starts. The policy starts one at a time, see `wants_engine`."""
    retired: bool = False
    """Gone from the configuration; forgotten once its engines are."""
    wanted_since_sec: float | None = None
    """A load was asked for by hand or preload."""
    comes_back: bool = False
    """Its engine has died, and another one is to be there as soon as there is room, also if nobody waits."""
    may_evict: bool = False
    """That load may cost another model its place."""
    inspecting_since_sec: float | None = None
    inspected: Inspected | None = None
    too_big: bool = False
    """The last time it was wanted, it could never have fitted."""
    cramped_since_sec: float | None = None
    """It would fit, if others than our engines gave their memory back."""
    ran_out: bool = False
    """Its last load ran out of memory."""
    attempts: int = 0
    """Loads and crashes that failed in a row."""
    ports_lost: int = 0
    """In a row, to other programs."""
    crashes_sec: deque[float] = field(default_factory=deque)
    """When its engines died without being asked to, within the window that the policy looks at."""
    retry_at_sec: float = 0.0
    failed_until_sec: float = 0.0
    failed_for_good: bool = False
    """Its engine does not take its flags: the next one, after the cooldown, would not, either."""
    last_error: str | None = None
    why_waiting: Why = Why()
    busy: Flow = field(default_factory=Flow)
    """Who comes while an engine of it is at work."""
    away: Flow = field(default_factory=Flow)
    """Who comes while it has none that is ready."""
    places: tuple[Placement, ...] = ()
    """Where it might go, as it was seen last."""
    returns: Returns = field(default_factory=Returns)
    last_used_sec: float = -math.inf
    mean_gap_sec: float = 3600.0
    load_is_known: bool = False
    """What loading takes was measured, for this engine or an earlier one; else it is a guess."""
    recent_sec: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """How long the last requests took that were computed."""
    _lately_sec: Sequence[float] | None = None

    @property
    def lately_sec(self) -> Sequence[float]:
        """How long those took of the last requests that are like the latest."""
        if self._lately_sec is None:
            self._lately_sec = since_it_changed(list(self.recent_sec))
        return self._lately_sec

    def service_sec(self, elapsed_sec: Sequence[float]) -> float | None:
        """What a request takes that comes now, while others have been in flight for so long. None: nobody knows.

        Several that take longer than any ever did are the first of many; one may always be another.
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
        """Somebody waits with high priority."""
        return self.queue.count(Priority.HIGH) > 0

    @property
    def wants_engine(self) -> bool:
        return not self.engines and (self.wanted_since_sec is not None or len(self.queue) > 0)

    @property
    def front(self) -> Engine | None:
        """The engine by which the state of the model is told: that which serves, or will first."""
        return min(self.engines, key=lambda engine: _NEARNESS[engine.state], default=None)

    @property
    def is_here(self) -> bool:
        """Whether an engine of it is ready."""
        return any(engine.state is EngineState.READY for engine in self.engines)

    def admitting(self, *, slotless: bool) -> Engine | None:
        """The engine to which a request may go that comes now: of several that with the least to do."""
        chosen = None
        for engine in self.engines:
            if engine.admits(slotless=slotless) and (chosen is None or engine.load < chosen.load):
                chosen = engine
        return chosen

    def arrival(self, now: float) -> None:
        """A request comes; if nothing was in flight or waiting, it ends a gap."""
        idle_since_sec = self._idle_since_sec()
        if idle_since_sec is None or self.queue or math.isinf(idle_since_sec):
            self.mean_gap_sec *= 0.8
        else:
            self.returns.add(now - idle_since_sec)
            self.mean_gap_sec += 0.2 * (now - idle_since_sec - self.mean_gap_sec)

    def _idle_since_sec(self) -> float | None:
        """Since when nobody has used it; None while somebody does, or it loads."""
        latest = None
        for engine in self.engines:
            if engine.idle_since_sec is None:
                return None
            latest = engine.idle_since_sec if latest is None else max(latest, engine.idle_since_sec)
        return self.last_used_sec if latest is None else latest

    def joined(self, request: Request, now: float) -> None:
        """A request has a slot or a place in the line: it was not turned away."""
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
        """An engine of it is ready from now on, or none is."""
        if is_here:
            self.away.pause(now)
            if any(engine.is_busy for engine in self.engines):  # it was to leave, and stays
                self.busy.go_on(now)
        else:
            self.away.go_on(now)
            self.busy.pause(now)

    def loaded(self, took_sec: float) -> None:
        self.load_sec += (0.3 if self.load_is_known else 1.0) * (took_sec - self.load_sec)
        self.load_is_known = True

    def computed(self, took_sec: float) -> None:
        """A request whose tokens were computed is over."""
        self.recent_sec.append(took_sec)
        self._lately_sec = None

    def remaining_sec(self, elapsed_sec: Iterable[float]) -> list[float]:
        """What requests in flight take yet, by how long they have taken: as those did that took longer.

        Of several one is early, the next one later: the first slot that is free is so sooner than most.
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
        """One more; returns how many that makes within the window."""
        self.crashes_sec.append(now)
        while now - self.crashes_sec[0] > window_sec:
            self.crashes_sec.popleft()
        return len(self.crashes_sec)

    @property
    def tries(self) -> int:
        """How many engines it has had lately of which none has stayed."""
        return max(self.attempts, len(self.crashes_sec))

    def forget_tries(self) -> None:
        self.attempts = self.ports_lost = 0
        self.crashes_sec.clear()

    def forget_failures(self) -> None:
        self.forget_tries()
        self.ran_out = False
        self.failed_until_sec = self.retry_at_sec = 0.0
        self.last_error = self.inspected = None

    def forget_wish(self) -> None:
        """No load is asked for any more."""
        self.wanted_since_sec = None
        self.may_evict = False


@dataclass(slots=True, eq=False)
class Swap:
    """Room that is being made for an engine to come. It is recorded before anybody is asked to leave, so nobody
    else takes it."""

    alias: str
    """Whose engine that will be."""
    placement: Placement
    victims: frozenset[Engine]


def total(placements: Iterable[Placement]) -> dict[Device, int]:
    """Sum of placements per resource."""
    amounts: dict[Device, int] = {}
    for placement in placements:
        for device, amount in placement.items():
            amounts[device] = amounts.get(device, 0) + amount
    return amounts


def shortage(need: Placement, free: Placement) -> dict[Device, int]:
    """What is missing, per resource; empty when `need` fits."""
    return {
        device: amount - free.get(device, 0) for device, amount in need.items() if amount > free.get(device, 0)
    }


def take(free: dict[Device, int], placement: Placement) -> None:
    for device, amount in placement.items():
        free[device] = free.get(device, 0) - amount


def claim(need: Placement, victims: Iterable[Holder]) -> dict[Device, int]:
    """What a swap takes beyond what its victims give back when they go."""
    return shortage(need, total(victim.placement for victim in victims))


def memory_of(placement: Placement) -> dict[Device, int]:
    """Return the memory of a placement, without the one of `ENGINES` that each engine takes."""
    return {device: amount for device, amount in placement.items() if device != ENGINES}


def amounts(placement: Placement) -> str:
    """Return a placement in words: `5000 MiB on gpu0 and 300 MiB on host`."""
    memory = [f"{amount} MiB on {device}" for device, amount in sorted(memory_of(placement).items())]
    return " and ".join(memory) or "nothing"
