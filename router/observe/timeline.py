"""The last fifteen minutes: states of models, their requests in flight and waiting, tokens, waits and memory.

States are known exactly, with what they were before the window began. Everything else is in steps of about ten
seconds, which are the slices of `statistics.py`, and fed by the same batches of requests. Memory is bounded by the
number of models that did something within the window.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from router.observe.events import Events, ModelChanged, RequestDone, RequestsDone
from router.observe.statistics import SLICE_SEC, Durations, Slice, Telemetry
from router.scheduling.messages import ModelState
from router.scheduling.scheduler import Scheduler
from router.system.turns import in_turns

WINDOW_SEC = 15 * 60
_KEPT_SEC = WINDOW_SEC + 60
_MOST_SPANS = 300
"""Most states that are kept of a model, such as one that crashes again and again."""
_MOST_COUNTS = 400
_MOST_POINTS = math.ceil(_KEPT_SEC / SLICE_SEC)
_LONGEST_REASON = 300
_AT_ONCE_SEC = 0.05
"""Changes of a model that are nearer to each other belong to the same decision."""
_BRIEFEST_SEC = 0.01
_ROUNDED_SEC = 0.001


class Span(NamedTuple):
    """A state of a model, until the next one."""

    at: float
    """Seconds since the epoch, as all times here."""
    state: ModelState
    reason: str
    told: str
    """The reason in the words that every client may see."""


class Count(NamedTuple):
    """Number of requests from a time on, until the next one."""

    at: float
    number: float
    noted_at: float
    """When it became known, at the end of its step."""


class Memory(NamedTuple):
    """Memory of a device in MiB."""

    used_mib: int
    total_mib: int


@dataclass(slots=True)
class Point:
    """One step of all requests together."""

    at: float
    seconds: float
    output_tokens: float
    wait_p95_sec: float | None
    memory: Mapping[str, Memory]
    noted_at: float


@dataclass(slots=True)
class Lane:
    """What one model did."""

    spans: deque[Span] = field(default_factory=lambda: deque(maxlen=_MOST_SPANS))
    in_flight: deque[Count] = field(default_factory=lambda: deque(maxlen=_MOST_COUNTS))
    queued: deque[Count] = field(default_factory=lambda: deque(maxlen=_MOST_COUNTS))

    @property
    def is_quiet(self) -> bool:
        """Whether it has done nothing since its last change, and does nothing."""
        state = self.spans[-1].state if self.spans else ModelState.OFF
        counts = (self.in_flight, self.queued)
        return state is ModelState.OFF and not any(each and each[-1].number for each in counts)

    @property
    def last_at(self) -> float:
        return max((each[-1].at for each in (self.spans, self.in_flight, self.queued) if each), default=0.0)

    def forget(self, before: float) -> None:
        """Forget what ended before that."""
        kept: deque[Any]
        for kept in (self.spans, self.in_flight, self.queued):
            while len(kept) > 1 and kept[1].at <= before:
                kept.popleft()


@dataclass(slots=True)
class _Busy:
    """Time that requests spent in flight and waiting, by those that ended in a step."""

    in_flight_sec: float = 0.0
    queued_sec: float = 0.0


class Timeline:
    """Collects the timeline from events, and at the end of each slice of the statistics.

    `memory` returns what the devices were last read to hold. Tokens of a stream are counted over the time in which
    they came, once it has ended: earlier steps are then corrected.
    """

    def __init__(
        self,
        events: Events,
        scheduler: Scheduler,
        telemetry: Telemetry,
        memory: Callable[[], Mapping[str, Memory]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        events.listen(ModelChanged, self._changed)
        events.listen(RequestsDone, self._done)
        telemetry.when_slice_ends = self._step_over
        self.telemetry = telemetry
        self.lanes: dict[str, Lane] = {}
        self.points: deque[Point] = deque(maxlen=_MOST_POINTS)
        self.began_at = clock()
        self._scheduler = scheduler
        self._memory = memory
        self._clock = clock
        self._earlier: defaultdict[str, _Busy] = defaultdict(_Busy)
        """Part of it that lies before the current step: the counts of earlier ones tell of that."""
        self._counted: set[str] = set()
        """Models whose last counts are not 0."""
        self._tokens_of_earlier = 0.0
        """Tokens of the current step that came in earlier ones."""

    async def keep(self) -> None:
        """Run until cancelled: have a step end in time, also without requests."""
        while True:
            await asyncio.sleep(max(_BRIEFEST_SEC, self.telemetry.slice_left_sec))
            self.telemetry.turn()

    # --- what happens -----------------------------------------------------------------------------------

    def _changed(self, change: ModelChanged) -> None:
        alias = change.alias
        known = self._scheduler.models.get(alias)
        state = self._scheduler.state(alias) if known is not None else change.state
        lane = self.lanes.setdefault(alias, Lane())
        last, at = lane.spans[-1] if lane.spans else None, change.at
        if last is not None and state is last.state:
            if state is not change.state:  # of an engine beside the one that serves
                return
            if at - last.at < _AT_ONCE_SEC:
                lane.spans.pop()
                at = last.at
        lane.spans.append(Span(at, state, change.reason[:_LONGEST_REASON], change.told[:_LONGEST_REASON]))
        if known is not None:
            load = sum(engine.load for engine in known.engines)
            self._count(alias, lane, change.at, load, len(known.queue), change.at)

    def _done(self, happening: RequestsDone) -> None:
        for (alias, _route, priority, _outcome, _client), requests in happening.by_labels.items():
            if not priority:  # it asked for no slot
                continue
            for long in [done for done in requests if done.total_sec > SLICE_SEC]:
                earlier = self._earlier[alias]
                earlier.in_flight_sec += max(0.0, long.total_sec - long.queue_sec - SLICE_SEC)
                earlier.queued_sec += max(0.0, long.queue_sec - SLICE_SEC)
                if long.usage.output_tokens:
                    self._spread(long)

    def _spread(self, done: RequestDone) -> None:
        """Count the tokens of a long answer in the steps in which they came."""
        before_sec = done.ttft_sec if done.streamed and done.ttft_sec is not None else done.queue_sec
        began = done.at - done.total_sec + before_sec
        per_sec = done.usage.output_tokens / max(done.at - began, _BRIEFEST_SEC)
        now = self._clock()
        for point in reversed(self.points):
            ended = point.at + point.seconds
            if ended <= began:
                break
            tokens = per_sec * max(0.0, min(ended, done.at) - max(point.at, began))
            point.output_tokens += tokens
            point.noted_at = now
            self._tokens_of_earlier += tokens

    def _step_over(self, lasted_sec: float, tallies: Slice) -> None:
        now = self._clock()
        began = now - lasted_sec
        waits = Durations()
        tokens = -self._tokens_of_earlier
        busy: defaultdict[str, _Busy] = defaultdict(_Busy)
        for (alias, _priority), tally in tallies.items():
            waits.take(tally.queue)
            tokens += tally.output_tokens
            of_model = busy[alias]
            of_model.in_flight_sec += tally.total_sec - tally.queue_sec
            of_model.queued_sec += tally.queue_sec
        for alias, earlier in self._earlier.items():
            busy[alias].in_flight_sec -= earlier.in_flight_sec
            busy[alias].queued_sec -= earlier.queued_sec
        self._earlier.clear()
        self._tokens_of_earlier = 0.0
        (p95,) = waits.quantiles((0.95,))
        self.points.append(Point(began, lasted_sec, max(0.0, tokens), p95, self._memory(), now))
        self._count_all(busy, began, lasted_sec, now)
        before = now - _KEPT_SEC
        for alias, lane in list(self.lanes.items()):
            lane.forget(before)
            if lane.is_quiet and lane.last_at < before:
                del self.lanes[alias]

    def _count_all(self, busy: Mapping[str, _Busy], began: float, lasted_sec: float, now: float) -> None:
        in_flight: defaultdict[str, float] = defaultdict(float)
        for engine in self._scheduler.engines.values():
            in_flight[engine.alias] += engine.load
        queued = {alias: len(model.queue) for alias, model in self._scheduler.models.items() if model.queue}
        for alias in {*in_flight, *queued, *busy, *self._counted}:
            was = busy.get(alias) or _Busy()
            model = self._scheduler.models.get(alias)
            serves = in_flight.get(alias, 0)
            if model is None or model.is_here:  # else they ended before its state changed, which has been counted
                serves = max(serves, round(was.in_flight_sec / lasted_sec, 2))
            waits = max(queued.get(alias, 0), round(was.queued_sec / lasted_sec, 2))
            if serves or waits or alias in self._counted:
                self._count(alias, self.lanes.setdefault(alias, Lane()), began, serves, waits, now)

    def _count(self, alias: str, lane: Lane, at: float, serves: float, waits: float, noted_at: float) -> None:
        for counts, number in ((lane.in_flight, serves), (lane.queued, waits)):
            last = counts[-1] if counts else Count(-math.inf, 0, 0)
            if number != last.number:
                if at <= last.at:  # counted at a change of its state within this step
                    at = last.at
                    number = max(number, last.number)
                    counts.pop()
                counts.append(Count(at, number, noted_at))
        is_counted = any(counts and counts[-1].number for counts in (lane.in_flight, lane.queued))
        (self._counted.add if is_counted else self._counted.discard)(alias)

    # --- what is told -----------------------------------------------------------------------------------

    async def told(self, seconds: float, since: float | None, *, full: bool) -> dict[str, Any]:
        """Return the last `seconds`; of these, only what became known after `since`, unless that is too long ago.

        `full`: with reasons as operators may see them.
        """
        now = self._clock()
        start = now - seconds
        whole = since is None or not max(start, self.began_at) <= since <= now
        after = -math.inf if whole or since is None else since - _ROUNDED_SEC
        models: dict[str, Any] = {}
        async for alias, lane in in_turns(list(self.lanes.items())):
            told = _told_of(lane, start, after, full=full)
            if any(told.values()):
                models[alias] = told
        points = [each for each in self.points if each.at + each.seconds > start and each.noted_at > after]
        return {
            "from": round(max(start, self.began_at), 3),
            "to": round(now, 3),
            "whole": whole,
            "models": models,
            "series": _series(points),
        }


def _told_of(lane: Lane, start: float, after: float, *, full: bool) -> dict[str, Any]:
    spans = list(lane.spans)
    ends: list[float | None] = [*(span.at for span in spans[1:]), None]
    return {
        "spans": [
            {
                "state": span.state,
                "from": round(span.at, 3),
                "to": None if end is None else round(end, 3),
                "reason": span.reason if full else span.told,
            }
            for span, end in zip(spans, ends, strict=False)
            if (end is None or end > start)
            and (span.at > after or (end is not None and end > after))
            and (span.at > start or span.state is not ModelState.OFF)
        ],
        "in_flight": _counts(lane.in_flight, start, after),
        "queued": _counts(lane.queued, start, after),
    }


def _counts(counts: Iterable[Count], start: float, after: float) -> list[tuple[float, float]]:
    """Return times and numbers from the start of the window on, with the number that it began with unless that
    is 0."""
    told: list[tuple[float, float]] = []
    for count in counts:
        if count.at <= start:
            told.clear()
        if count.noted_at > after and (count.number or count.at > start):
            told.append((round(count.at, 1), count.number))
    return told


def _series(points: list[Point]) -> dict[str, Any]:
    names = dict.fromkeys(name for point in points for name in point.memory)
    return {
        "step_sec": SLICE_SEC,
        "at": [round(point.at, 1) for point in points],
        "tokens_per_sec": [round(point.output_tokens / point.seconds, 2) for point in points],
        "wait_p95_sec": [point.wait_p95_sec for point in points],
        "devices": {
            name: {
                "used_mib": [point.memory[name].used_mib if name in point.memory else None for point in points],
                "total_mib": max(point.memory[name].total_mib for point in points if name in point.memory),
            }
            for name in names
        },
    }
