"""Request statistics since the start, and for the last one and five minutes.

Counts are exact; percentiles are within 2 %, from histograms whose steps grow by 4 % (as in DDSketch, Masson, Rim
and Lee, VLDB 2019), so that memory is bounded by the number of models, not of requests. Longer windows are left to
Prometheus.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Any

from router.observe.events import Events, Outcome, RequestDone, RequestsDone
from router.system.turns import in_turns

SLICE_SEC = 10.0
WINDOWS_SEC = {"1m": 60, "5m": 300}
_SLICES = int(max(WINDOWS_SEC.values()) / SLICE_SEC) + 1
_GROWTH = 1.04
_SCALE = 1 / math.log(_GROWTH)
_SHORTEST_SEC = 1e-4
_SETTLED_AT_ONCE = 256
_PERCENTILES = (50, 95, 99)


class Durations:
    """A distribution of durations, in steps of 4 %.

    Durations are collected and added in batches, or before a read: a batch takes a third of the time per value.
    """

    __slots__ = ("_new", "_steps")

    def __init__(self) -> None:
        self._steps: Counter[int] = Counter()
        self._new: list[float] = []

    def add(self, times: list[float]) -> None:
        self._new += times
        if len(self._new) >= _SETTLED_AT_ONCE:
            self.settle()

    def settle(self) -> None:
        shortest = _SHORTEST_SEC
        self._steps.update([int(log(sec / shortest) * _SCALE) if sec > shortest else 0 for sec in self._new])
        self._new.clear()

    def take(self, other: Durations) -> None:
        other.settle()
        steps, known = self._steps, self._steps.get
        for step, count in other._steps.items():  # `Counter.update` takes three times as long
            steps[step] = known(step, 0) + count

    def quantiles(self, shares: Sequence[float]) -> list[float | None]:
        """Return ascending quantiles in seconds; None if there are no values, 0 below the shortest step."""
        self.settle()
        number = sum(self._steps.values())
        ranks = [max(1, math.ceil(share * number)) for share in shares] if number else []
        found: list[float | None] = []
        below = 0
        for step in sorted(self._steps):
            below += self._steps[step]
            while ranks and below >= ranks[0]:
                ranks.pop(0)
                found.append(round(_SHORTEST_SEC * _GROWTH ** (step + 0.5), 4) if step else 0.0)
        return found or [None] * len(shares)


@dataclass(slots=True)
class Tally:
    """Statistics of a group of requests. Cancelled requests count as neither served nor failed."""

    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    total_sec: float = 0.0
    queue_sec: float = 0.0
    shortest_sec: float = math.inf
    longest_sec: float = 0.0
    total: Durations = field(default_factory=Durations)
    queue: Durations = field(default_factory=Durations)
    ttft: Durations = field(default_factory=Durations)

    @property
    def served(self) -> int:
        return self.outcomes[Outcome.SERVED]

    @property
    def failed(self) -> int:
        return self.requests - self.served - self.outcomes[Outcome.CANCELLED]

    @property
    def error_rate(self) -> float:
        return self.failed / (self.served + self.failed) if self.served + self.failed else 0.0

    def note(self, outcome: str, requests: Sequence[RequestDone]) -> None:
        usages = [done.usage for done in requests]
        times = [done.total_sec for done in requests]
        waits = [done.queue_sec for done in requests]
        self.requests += len(requests)
        self.outcomes[outcome] += len(requests)
        self.prompt_tokens += sum([usage.prompt_tokens for usage in usages])
        self.cached_tokens += sum([usage.cached_tokens for usage in usages])
        self.output_tokens += sum([usage.output_tokens for usage in usages])
        self.total_sec += sum(times)
        self.queue_sec += sum(waits)
        self.shortest_sec = min(self.shortest_sec, *times)
        self.longest_sec = max(self.longest_sec, *times)
        self.total.add(times)
        self.queue.add(waits)
        self.ttft.add([done.ttft_sec for done in requests if done.ttft_sec is not None])

    def count(self, other: Tally) -> None:
        """Add the counts of another tally, without its distributions."""
        self.requests += other.requests
        self.outcomes.update(other.outcomes)
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        self.total_sec += other.total_sec
        self.queue_sec += other.queue_sec
        self.shortest_sec = min(self.shortest_sec, other.shortest_sec)
        self.longest_sec = max(self.longest_sec, other.longest_sec)

    def take(self, other: Tally) -> None:
        self.count(other)
        self.total.take(other.total)
        self.queue.take(other.queue)
        self.ttft.take(other.ttft)


class _Groups:
    """Statistics of all requests, and by model and by priority."""

    def __init__(self) -> None:
        self.everything = Tally()
        self.by_model: defaultdict[str, Tally] = defaultdict(Tally)
        self.by_priority: defaultdict[str, Tally] = defaultdict(Tally)

    def take(self, alias: str, priority: str, tally: Tally) -> None:
        for into in (self.everything, self.by_model[alias], self.by_priority[priority]):
            into.take(tally)

    async def add(self, slices: Iterable[Mapping[tuple[str, str], Tally]]) -> None:
        async for (alias, priority), tally in in_turns([pair for tallies in slices for pair in tallies.items()]):
            self.take(alias, priority, tally)

    async def copied(self) -> _Groups:
        copy = _Groups()
        copy.everything.take(self.everything)
        for of, into in ((self.by_model, copy.by_model), (self.by_priority, copy.by_priority)):
            async for name, tally in in_turns(of.items()):
                into[name].take(tally)
        return copy


Slice = defaultdict[tuple[str, str], Tally]


class Telemetry:
    """Collects statistics of the requests that `events` reports. `clock` is monotonic."""

    def __init__(self, events: Events, clock: Callable[[], float]) -> None:
        events.listen(RequestsDone, self._note)
        self._settle = events.settle
        self._clock = clock
        self._turned_away: Counter[str] = Counter()
        self._past: defaultdict[tuple[str, str], Tally] = defaultdict(Tally)
        """Totals of everything before the current slice, without distributions."""
        self._slices: deque[tuple[float, Slice]] = deque()
        self._slice: Slice = defaultdict(Tally)
        """The current slice, which is the last one, once there are any."""
        self._slice_ends_sec = -math.inf
        self.when_slice_ends: Callable[[float, Slice], None] = lambda lasted_sec, tallies: None
        """Is called with the duration of a slice that is over, and its tallies."""
        self._added_up: dict[float, tuple[list[float], _Groups]] = {}
        """By window, the sum of its slices before the current one, and when these began."""

    def _note(self, happening: RequestsDone) -> None:
        now = self._clock()
        if now >= self._slice_ends_sec:
            self._begin_slice(now)
        for (alias, _route, priority, outcome, _client), requests in happening.by_labels.items():
            if priority:
                self._slice[alias, priority].note(outcome, requests)
            elif outcome != Outcome.SERVED:  # Ollama's unload asks for no slot
                self._turned_away[outcome] += len(requests)

    @property
    def slice_left_sec(self) -> float:
        """Time until the current slice is over; negative if it is, and 0 if there is none."""
        return self._slice_ends_sec - self._clock() if self._slices else 0.0

    def turn(self) -> None:
        """Begin the next slice if the current one is over, also without requests."""
        self._settle()
        now = self._clock()
        if now >= self._slice_ends_sec:
            self._begin_slice(now)

    def _begin_slice(self, now: float) -> None:
        if self._slices:
            self.when_slice_ends(now - self._slices[-1][0], self._slice)
        for key, tally in self._slice.items():
            past = Tally()  # a summary in progress may be reading the old one
            past.count(self._past[key])
            past.count(tally)
            self._past[key] = past
        if len(self._slices) == _SLICES:
            self._slices.popleft()
        self._slice = defaultdict(Tally)
        self._slices.append((now, self._slice))
        self._slice_ends_sec = now + SLICE_SEC

    async def summary(self, *, by_model: bool = True) -> dict[str, Any]:
        """Return statistics of requests that asked for a slot, since the start and by window."""
        self._settle()
        everything = Tally()
        models: defaultdict[str, Tally] = defaultdict(Tally)
        async for (alias, _priority), tally in in_turns([*self._past.items(), *self._slice.items()]):
            everything.count(tally)
            models[alias].count(tally)
        requests = everything.requests
        listed = {
            alias: {
                "total_requests": model.requests,
                "total_errors": model.failed,
                "error_rate": model.error_rate,
                "total_tokens": model.prompt_tokens + model.output_tokens,
            }
            for alias, model in models.items()
        }
        return {
            "total_requests": requests,
            "successful": everything.served,
            "failed": everything.failed,
            "cancelled": everything.outcomes[Outcome.CANCELLED],
            "success_rate": 1.0 - everything.error_rate,
            "response_time": {
                "avg": round(everything.total_sec / requests, 4) if requests else 0.0,
                "min": round(everything.shortest_sec, 4) if requests else 0.0,
                "max": round(everything.longest_sec, 4),
            },
            "turned_away": dict(self._turned_away),
            **({"by_model": listed} if by_model else {}),
            "windows": {
                name: await self.window(seconds, by_model=by_model) for name, seconds in WINDOWS_SEC.items()
            },
        }

    async def window(self, seconds: float, *, by_model: bool = True) -> dict[str, Any]:
        """Return statistics of the last `seconds` (up to 10 s more): total, by model and by priority."""
        self._settle()
        since = self._clock() - seconds - SLICE_SEC
        slices = {began: tallies for began, tallies in self._slices if began > since}
        current: Mapping[tuple[str, str], Tally] = slices.popitem()[1] if slices else {}
        began, groups = self._added_up.get(seconds, ([], _Groups()))
        if began != list(slices):
            began, groups = list(slices), _Groups()
            await groups.add(slices.values())
            self._added_up[seconds] = began, groups
        groups = await groups.copied()
        await groups.add([current])
        listed = groups.by_model.items() if by_model else ()
        models = {alias: _report(tally) async for alias, tally in in_turns(listed)}
        return {
            **_report(groups.everything),
            **({"by_model": models} if by_model else {}),
            "by_priority": {name: _report(tally) async for name, tally in in_turns(groups.by_priority.items())},
        }


def _report(tally: Tally) -> dict[str, Any]:
    return {
        "requests": tally.requests,
        "outcomes": dict(tally.outcomes),
        "prompt_tokens": tally.prompt_tokens,
        "cached_tokens": tally.cached_tokens,
        "output_tokens": tally.output_tokens,
        "total_sec": _percentiles(tally.total),
        "queue_sec": _percentiles(tally.queue),
        "ttft_sec": _percentiles(tally.ttft),
    }


def _percentiles(times: Durations) -> dict[str, float | None]:
    quantiles = times.quantiles([percent / 100 for percent in _PERCENTILES])
    return {f"p{percent}": value for percent, value in zip(_PERCENTILES, quantiles, strict=True)}
