"""Wait estimates of all waiting requests, by a simulation that extrapolates measurements.

The simulation uses means: service times, load times and arrival rates stay as measured, and models alternate by
the rules of `eviction`. One simulation answers for all waiting requests, so that thousands may ask. What it does
not reach is unknown, and so is what depends on anything never measured.

Pure functions; nothing is changed here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from router.scheduling.eviction import due_at, sufficient
from router.scheduling.messages import EngineState, Placement
from router.scheduling.policy import Policy
from router.scheduling.queue import Priority, Request
from router.scheduling.residency import Model, Swap, claim, shortage, take
from router.system.devices import Device

_MOST_STEPS = 4000
"""Limit on simulated services and departures, which take some milliseconds."""
_OVERDUE = 0.1
"""Remaining time of a request that takes longer than any before, as a share of its elapsed time."""
_SERVICE_SEC = 1.0
"""Service time of a model without measurements, used only for other models: its own requests get no estimate."""
_FARTHEST_SEC = 3600.0
_FARTHEST_AHEAD = 100
"""Maximum number of future arrivals that are simulated ahead."""
_SATURATED = 0.95
_TOLD_SEC = 0.05
_TOLD_SEC_PER_STEP = 5e-4


@dataclass(frozen=True, slots=True)
class Forecast:
    """Times at which waiting requests will get a slot, or an engine if they need no slot."""

    at: float
    """Time of the forecast."""
    granted_at: Mapping[str, float]
    """Times by request; missing: unknown."""
    steps: int
    """Cost of the simulation."""

    @property
    def told_sec(self) -> float:
        """Time for which the forecast is reused, so that forecasts take about one percent of the time."""
        return _TOLD_SEC + self.steps * _TOLD_SEC_PER_STEP

    def wait_sec(self, request_id: str, now: float) -> float | None:
        """Return the wait in seconds from `now`; None: unknown."""
        at = self.granted_at.get(request_id)
        return None if at is None else max(0.0, at - now)


def forecast(
    models: Iterable[Model],
    granted: Mapping[str, Request],
    swaps: Iterable[Swap],
    budgets: Placement,
    policy: Policy,
    stop_sec: float,
    now: float,
    newcomer: Request | None = None,
) -> Forecast:
    """Simulate until all waiting requests are served; `newcomer` is last in its class."""
    rehearsal = _Rehearsal(policy, budgets, stop_sec, now)
    for model in models:
        if model.engines or model.queue or (newcomer and newcomer.alias == model.spec.alias):
            rehearsal.add(model, granted, newcomer)
    rehearsal.remember(swaps)
    rehearsal.run()
    return Forecast(now, rehearsal.granted_at, rehearsal.steps)


@dataclass(slots=True, eq=False)
class _Line:
    """Requests of one priority for a model: those waiting now, then future arrivals."""

    patience_sec: float
    ids: list[str]
    """Ids of those waiting now."""
    arrivals: list[float]
    gap_here_sec: float
    """Mean time between arrivals while the model is ready."""
    gap_away_sec: float
    coming_at: float
    served: int = 0

    def oldest(self, at: float, *, is_here: bool) -> float:
        """Return the arrival of the next request to be served; infinite if there is none."""
        gap_sec = self.gap_here_sec if is_here else self.gap_away_sec
        while self.coming_at <= at and len(self.arrivals) - self.served < _FARTHEST_AHEAD:
            self.arrivals.append(self.coming_at)
            self.coming_at += gap_sec
        return self.arrivals[self.served] if self.served < len(self.arrivals) else math.inf

    def start_anew(self, coming_at: float) -> None:
        self.ids, self.arrivals, self.served, self.coming_at = [], [], 0, coming_at


@dataclass(slots=True, eq=False)
class _Course:
    """Simulated state of a model and of the engine that serves it, or will first."""

    model: Model
    lines: dict[Priority, _Line]
    left: int
    """Number of requests waiting now that have no slot yet."""
    slotless: list[str]
    service_sec: float
    places: Sequence[Placement]
    """Possible placements of its next engine."""
    state: EngineState | None = None
    """None: it has no engine, or one that is asleep, whose memory others can have."""
    until: float = math.inf
    """Time at which its engine is loaded, or has exited."""
    placement: Placement = field(default_factory=dict)
    """Placement of its engine, or of the one that follows its victims."""
    victims: list[_Course] = field(default_factory=list)
    ready_at: float = 0.0
    slots: list[float] = field(default_factory=list)
    """Time at which each slot is free."""
    idle_at: float = math.inf
    """Time at which all requests waiting now are served."""
    newcomers: int = 0
    """Number of arrivals by then."""
    others_until: float = -math.inf
    """Time until which a request above low priority has a slot."""
    is_guess: bool = False
    """True if its future depends on anything never measured."""

    @property
    def is_here(self) -> bool:
        return self.state is EngineState.READY

    @property
    def waits(self) -> bool:
        """Whether an estimate is needed and a placement of the model is known."""
        return bool(self.left or self.slotless) and (self.state is not None or bool(self.places))

    def oldest(self, priority: Priority, at: float) -> float:
        return self.lines[priority].oldest(at, is_here=self.is_here)

    @property
    def more_urgent_at(self) -> float:
        """Time of the next arrival in a class in which, as in more urgent ones, no request waits."""
        at = math.inf
        for line in self.lines.values():
            if line.served < len(line.arrivals):
                break
            at = min(at, line.coming_at)
        return at

    def head(self, at: float) -> tuple[float, Priority]:
        """Return virtual deadline and priority of the request to be served next."""
        is_here = self.is_here
        best = math.inf, Priority.NORMAL
        for priority, line in self.lines.items():
            deadline_sec = line.oldest(at, is_here=is_here) + line.patience_sec
            if deadline_sec < best[0]:
                best = deadline_sec, priority
        return best

    def use(self) -> float:
        """Return the utilization of its slots by arrivals."""
        per_sec = sum(1 / line.gap_here_sec for line in self.lines.values())
        return per_sec * self.service_sec / self.model.spec.slots

    def come_by(self, at: float) -> int:
        """Return the number of requests waiting at a time, including arrivals until then."""
        for priority in self.lines:
            self.oldest(priority, at)
        return sum(len(line.arrivals) - line.served for line in self.lines.values())

    def busy_sec(self, at: float) -> float:
        """Return the time from an empty queue until idleness; infinite if arrivals saturate the slots."""
        use = self.use()
        if use >= _SATURATED:
            return math.inf
        return self.model.busy.goes_on_sec(self.service_sec / (1 - use), at)

    def has_only_low(self, at: float) -> bool:
        """Return whether no request on it or waiting for it is above low priority."""
        return self.others_until <= at and all(
            math.isinf(self.oldest(priority, at)) for priority in (Priority.HIGH, Priority.NORMAL)
        )


class _Rehearsal:
    def __init__(self, policy: Policy, budgets: Placement, stop_sec: float, now: float) -> None:
        self.policy = policy
        self.budgets = budgets
        self.stop_sec = stop_sec
        self.now = now
        self.steps = 0
        self.granted_at: dict[str, float] = {}
        self.courses: dict[str, _Course] = {}

    # --- as it is now -----------------------------------------------------------------------------------

    def add(self, model: Model, granted: Mapping[str, Request], newcomer: Request | None) -> None:
        now, engine = self.now, model.front
        is_here = engine is not None and engine.state is EngineState.READY
        lines: dict[Priority, _Line] = {}
        slotless: list[str] = []
        for priority in Priority:
            waiting = list(model.queue.line(priority))
            if newcomer and newcomer.alias == model.spec.alias and newcomer.priority is priority:
                waiting.append(newcomer)
            slotless += [request.id for request in waiting if request.slotless]
            waiting = [request for request in waiting if not request.slotless]
            # The first arrival while the model is away comes after half a gap, so that arrivals are right on
            # average: a high one among them may evict another model.
            gap_here_sec, gap_away_sec = (flow.gap_sec(priority, now) for flow in (model.busy, model.away))
            lines[priority] = _Line(
                self.policy.patience_sec[priority],
                [request.id for request in waiting],
                [request.arrival_sec for request in waiting],
                gap_here_sec,
                gap_away_sec,
                now + (gap_here_sec if is_here else gap_away_sec / 2),
            )
        in_flight = engine.in_flight if engine is not None else {}
        elapsed_sec = [now - (granted[request_id].granted_sec or now) for request_id in in_flight]
        course = _Course(
            model,
            lines,
            sum(len(line.ids) for line in lines.values()),
            slotless,
            model.service_sec(elapsed_sec) or _SERVICE_SEC,
            model.places,
        )
        self.courses[model.spec.alias] = course
        if engine is None:
            return
        if engine.awake is not None:
            course.places = (engine.awake,)
        if engine.state is EngineState.ASLEEP:
            return
        course.state, course.placement, course.ready_at = engine.state, engine.placement, engine.ready_sec
        course.is_guess = not model.coming_is_known
        ends = [now + remaining_sec for remaining_sec in model.remaining_sec(elapsed_sec)]
        if any(priority is not Priority.LOW for priority in engine.in_flight.values()):
            course.others_until = max(ends)
        course.slots = sorted([*ends, *[now] * (engine.spec.slots - len(ends))])
        match engine.state:
            case EngineState.LOADING:
                loading_sec = now - engine.started_sec
                course.until = now + max(model.comes_sec - loading_sec, _OVERDUE * loading_sec)
            case EngineState.READY:
                if not course.left:
                    course.idle_at = max(course.slots) if engine.idle_since_sec is None else engine.idle_since_sec
                self.admit_slotless(course)
            case EngineState.DRAINING:
                course.until = max(now, *course.slots) + self.stop_sec
            case EngineState.STOPPING:
                course.until = now + self.stop_sec

    def remember(self, swaps: Iterable[Swap]) -> None:
        for swap in swaps:
            course = self.courses.get(swap.alias)
            if course is not None:
                course.placement = course.places[0] if course.model.sleeper is not None else swap.placement
                course.victims = [
                    victim
                    for engine in swap.victims
                    if (victim := self.courses.get(engine.alias)) is not None and victim.model.front is engine
                ]

    # --- as it goes on ----------------------------------------------------------------------------------

    def run(self) -> None:
        ends_at = self.now + min(self.policy.queue_timeout_sec, _FARTHEST_SEC)  # no request waits longer
        while self.now < ends_at and self.steps < _MOST_STEPS:
            if not any(course.waits for course in self.courses.values()):
                return
            self.steps += len(self.courses)
            next_at = self.place()
            for course in self.courses.values():
                next_at = min(next_at, course.until)
            for course in self.courses.values():
                if course.is_here and course.left:
                    next_at = min(next_at, self.serve(course, next_at))
            if math.isinf(next_at):
                return
            self.now = max(self.now, next_at)
            self.settle()

    def serve(self, course: _Course, until: float) -> float:
        """Serve requests until a time, at most; return when others may get its memory: once all requests waiting
        now are served, or only low ones are left."""
        slots = course.slots
        may_leave_at = self.may_leave_low_at(course)
        while course.left and slots[0] <= until and self.steps < _MOST_STEPS:
            self.steps += 1
            at = slots[0]
            priority = course.head(at)[1]
            line = course.lines[priority]
            is_let_go = priority is Priority.LOW and at >= may_leave_at and course.has_only_low(at)
            if priority is not Priority.LOW:
                course.others_until = max(course.others_until, at + course.service_sec)
            if line.served < len(line.ids):
                course.left -= 1
                if not course.is_guess and (course.model.recent_sec or at <= course.ready_at):
                    self.granted_at[line.ids[line.served]] = at
            line.served += 1
            heapq.heapreplace(slots, at + course.service_sec)
            if is_let_go and course.left and at > self.now:  # only once it has the freed slot
                return at
        if course.left:
            return math.inf
        course.idle_at = max(slots)
        course.newcomers = course.come_by(course.idle_at)
        return course.idle_at

    def may_leave_low_at(self, course: _Course) -> float:
        """Return the time from which waiting high requests evict it once only low ones are left."""
        urgent = (
            other
            for other in self.courses.values()
            if other.state is None and other.oldest(Priority.HIGH, self.now) < math.inf
        )
        return min((self.turn_ends_at(other, course, only_low=True) for other in urgent), default=math.inf)

    def admit_slotless(self, course: _Course) -> None:
        if not course.is_guess:
            self.granted_at |= dict.fromkeys(course.slotless, self.now)
        course.slotless = []

    def settle(self) -> None:
        """Complete loads and exits that are due."""
        for course in self.courses.values():
            if course.until > self.now:
                continue
            course.until = math.inf
            if course.state is EngineState.LOADING:
                course.state, course.ready_at = EngineState.READY, self.now
                course.slots = [self.now] * course.model.spec.slots
                course.idle_at = math.inf if course.left else self.now
                self.admit_slotless(course)
            else:
                course.state = None
        for course in self.courses.values():
            if course.victims:
                course.victims = [victim for victim in course.victims if victim.state is not None]
                if not course.victims:
                    self.start(course, course.placement)

    def start(self, course: _Course, placement: Placement) -> None:
        course.state, course.placement = EngineState.LOADING, placement
        course.until = self.now + course.model.comes_sec
        course.is_guess |= not course.model.coming_is_known

    def leave(self, course: _Course) -> None:
        """Drain a model: later requests wait. They arrive as for a busy model if its slots were saturated."""
        if course.is_here:
            goes_on = math.isinf(course.busy_sec(self.now))
            busy_until = max(self.now, *course.slots)
            if not course.left:
                if goes_on:
                    busy_until = self.now + course.service_sec
                for line in course.lines.values():
                    line.start_anew(self.now + (line.gap_here_sec if goes_on else line.gap_away_sec))
            course.state, course.until = EngineState.DRAINING, busy_until + self.stop_sec

    # --- who gets room ----------------------------------------------------------------------------------

    def place(self) -> float:
        """Start what fits and evict where it is due; return the next time at which more may be due."""
        free = dict(self.budgets)
        taken: set[_Course] = set()
        candidates: list[tuple[float, int, _Course]] = []
        residents: list[_Course] = []
        again_at = math.inf
        for number, course in enumerate(self.courses.values()):
            if course.state is not None:
                residents.append(course)
                take(free, course.placement)
            if course.victims:
                take(free, claim(course.placement, course.victims))
                taken.update(course.victims)
            elif course.state is None:
                deadline, _ = course.head(self.now)
                if course.slotless or deadline < math.inf:
                    candidates.append((deadline, number, course))
                again_at = min(again_at, course.more_urgent_at)
        for _, _, course in sorted(candidates):
            if course.model.retry_at_sec > self.now:
                again_at = min(again_at, course.model.retry_at_sec)
            else:
                again_at = min(again_at, self.place_one(course, residents, free, taken))
        return again_at

    def place_one(
        self, course: _Course, residents: list[_Course], free: dict[Device, int], taken: set[_Course]
    ) -> float:
        now = self.now
        for placement in course.places:
            if not shortage(placement, free):
                self.start(course, placement)
                residents.append(course)
                take(free, placement)
                return math.inf
        goes_at = {
            other: self.goes_at(course, other)
            for other in residents
            if other not in taken and not (other.is_here and other.model.spec.pinned)
        }
        self.steps += len(goes_at)
        soonest = sorted(goes_at, key=lambda other: goes_at[other])
        plans = [
            (max((goes_at[other] for other in leaving), default=now), index, leaving)
            for index, placement in enumerate(course.places)
            if (leaving := sufficient(shortage(placement, free), soonest)) is not None
        ]
        again_at = min((at for at in goes_at.values() if at > now), default=math.inf)
        if not plans:
            return again_at
        at, index, leaving = min(plans, key=lambda plan: plan[:2])
        placement = course.places[index]
        take(free, claim(placement, leaving))
        if at > now:
            if all(self.due_at(course, other) <= now for other in leaving):
                taken.update(leaving)
            return again_at
        course.placement, course.victims = placement, leaving
        course.is_guess |= any(victim.is_guess for victim in leaving)
        taken.update(leaving)
        for victim in leaving:
            self.leave(victim)
        return again_at

    def due_at(self, course: _Course, other: _Course) -> float:
        arrivals = [(course.oldest(priority, self.now), priority) for priority in Priority]
        if course.model.wanted_since_sec is not None:
            arrivals.append((course.model.wanted_since_sec, Priority.NORMAL))
        policy = self.policy
        bounds = [(at, policy.max_wait_sec[priority], policy.wait_factor[priority]) for at, priority in arrivals]
        swap_sec = course.model.comes_sec + other.model.comes_sec
        return due_at(bounds, swap_sec)

    def goes_at(self, course: _Course, other: _Course) -> float:
        """Return when the engine of another model may be unloaded for this one; see `eviction`."""
        if other.state is EngineState.LOADING:
            return math.inf
        if other.state is EngineState.STOPPING:
            return self.now
        if other.state is EngineState.DRAINING:
            return self.due_at(course, other)
        urgent = course.oldest(Priority.HIGH, self.now) < math.inf
        by_turn = self.turn_ends_at(course, other, only_low=urgent and other.has_only_low(self.now))
        if other.left:
            return by_turn
        waiting = sum(len(line.arrivals) - line.served for line in course.lines.values())
        worth_sec = course.model.comes_sec / max(1, waiting)
        linger_sec = other.model.returns.linger_sec(worth_sec, self.policy.max_linger_sec)
        return min(by_turn, other.idle_at + self.stays_sec(other, linger_sec))

    def turn_ends_at(self, course: _Course, other: _Course, *, only_low: bool) -> float:
        factor = self.policy.residency_factor
        if only_low:
            factor = min(1.0, factor)
        turn_sec = factor * (course.model.comes_sec + other.model.comes_sec)
        return max(self.due_at(course, other), other.ready_at + turn_sec)

    def stays_sec(self, other: _Course, linger_sec: float) -> float:
        """Return the time from serving all requests waiting now until a gap longer than the linger."""
        busy_sec = other.busy_sec(self.now)
        longer = other.model.returns.share_beyond(linger_sec)
        if math.isinf(busy_sec) or not longer:
            return math.inf
        use = other.use()
        behind_sec = other.newcomers * other.service_sec / other.model.spec.slots / (1 - use)
        busy_again_sec = (1 - longer) / longer * (busy_sec + linger_sec / 2)
        return max(behind_sec, use * busy_sec) + linger_sec + busy_again_sec
