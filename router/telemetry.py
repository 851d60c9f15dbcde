"""How requests fared: since the start, and in the last one and five minutes.

Counts are exact; percentiles are within 2 %, from histograms whose steps grow by 4 % (as in DDSketch, Masson, Rim
and Lee, VLDB 2019), so that memory is bounded by the number of models, not of requests. Longer windows are
Prometheus's business.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import log
from typing import Any

from router.events import RequestDone

_SLICE_SEC = 10.0
WINDOWS_SEC = {"1m": 60, "5m": 300}
_SLICES = int(max(WINDOWS_SEC.values()) / _SLICE_SEC) + 1
_GROWTH = 1.04
_SCALE = 1 / math.log(_GROWTH)
_SHORTEST_SEC = 1e-4


class Durations:
    """A distribution of times, in steps of 4 %."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: defaultdict[int, int] = defaultdict(int)

    def add(self, seconds: float) -> None:
        self._steps[int(log(seconds / _SHORTEST_SEC) * _SCALE) if seconds > _SHORTEST_SEC else 0] += 1

    def take(self, other: Durations) -> None:
        for step, count in other._steps.items():
            self._steps[step] += count

    def quantile(self, share: float) -> float | None:
        """None when there is nothing; 0 for what is too short to matter."""
        rank = max(1, math.ceil(share * sum(self._steps.values())))
        for step in sorted(self._steps):
            rank -= self._steps[step]
            if rank <= 0:
                return round(_SHORTEST_SEC * _GROWTH ** (step + 0.5), 4) if step else 0.0
        return None


@dataclass(slots=True)
class Tally:
    """Requests that have something in common."""

    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    total: Durations = field(default_factory=Durations)
    queue: Durations = field(default_factory=Durations)
    ttft: Durations = field(default_factory=Durations)

    def note(self, done: RequestDone) -> None:
        self.requests += 1
        self.outcomes[done.outcome] += 1
        self.prompt_tokens += done.usage.prompt_tokens
        self.cached_tokens += done.usage.cached_tokens
        self.output_tokens += done.usage.output_tokens
        self.total.add(done.total_sec)
        self.queue.add(done.queue_sec)
        if done.ttft_sec is not None:
            self.ttft.add(done.ttft_sec)

    def take(self, other: Tally) -> None:
        self.requests += other.requests
        self.outcomes.update(other.outcomes)
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        self.total.take(other.total)
        self.queue.take(other.queue)
        self.ttft.take(other.ttft)


@dataclass(slots=True)
class _SinceStart:
    requests: int = 0
    served: int = 0
    tokens: int = 0
    total_sec: float = 0.0
    shortest_sec: float = math.inf
    longest_sec: float = 0.0

    def note(self, done: RequestDone) -> None:
        self.requests += 1
        self.served += done.outcome == "served"
        self.tokens += done.usage.prompt_tokens + done.usage.output_tokens
        self.total_sec += done.total_sec
        if done.total_sec < self.shortest_sec:
            self.shortest_sec = done.total_sec
        if done.total_sec > self.longest_sec:
            self.longest_sec = done.total_sec


_Slice = dict[tuple[str, str], Tally]


class Telemetry:
    """`note` every request that is over. `clock` is monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._models: defaultdict[str, _SinceStart] = defaultdict(_SinceStart)
        self._turned_away: Counter[str] = Counter()
        self._slices: deque[tuple[float, _Slice]] = deque(maxlen=_SLICES)
        self._slice: _Slice = {}
        self._slice_ends_sec = -math.inf

    def note(self, done: RequestDone) -> None:
        if not done.priority:
            self._turned_away[done.outcome] += 1
            return
        self._models[done.alias].note(done)
        now = self._clock()
        if now >= self._slice_ends_sec:
            self._slice = {}
            self._slices.append((now, self._slice))
            self._slice_ends_sec = now + _SLICE_SEC
        key = (done.alias, done.priority)
        tally = self._slice.get(key)
        if tally is None:
            tally = self._slice[key] = Tally()
        tally.note(done)

    def summary(self) -> dict[str, Any]:
        """Of requests that asked for a slot: since the start, with the windows, by model and by priority."""
        models = self._models.values()
        requests = sum(model.requests for model in models)
        served = sum(model.served for model in models)
        total_sec = sum(model.total_sec for model in models)
        return {
            "total_requests": requests,
            "successful": served,
            "failed": requests - served,
            "success_rate": served / requests if requests else 1.0,
            "response_time": {
                "avg": round(total_sec / requests, 4) if requests else 0.0,
                "min": round(min((model.shortest_sec for model in models), default=0.0), 4),
                "max": round(max((model.longest_sec for model in models), default=0.0), 4),
            },
            "turned_away": dict(self._turned_away),
            "by_model": {
                alias: {
                    "total_requests": model.requests,
                    "total_errors": model.requests - model.served,
                    "error_rate": (model.requests - model.served) / model.requests,
                    "total_tokens": model.tokens,
                }
                for alias, model in self._models.items()
            },
            "windows": {name: self.window(seconds) for name, seconds in WINDOWS_SEC.items()},
        }

    def window(self, seconds: float) -> dict[str, Any]:
        """The last `seconds`, up to a slice of 10 s more: all, by model, by priority."""
        since = self._clock() - seconds - _SLICE_SEC
        everything = Tally()
        by_model: defaultdict[str, Tally] = defaultdict(Tally)
        by_priority: defaultdict[str, Tally] = defaultdict(Tally)
        for began, tallies in self._slices:
            if began > since:
                for (alias, priority), tally in tallies.items():
                    for into in (everything, by_model[alias], by_priority[priority]):
                        into.take(tally)
        return {
            **_report(everything),
            "by_model": _reports(by_model.items()),
            "by_priority": _reports(by_priority.items()),
        }


def _reports(tallies: Iterable[tuple[str, Tally]]) -> dict[str, Any]:
    return {name: _report(tally) for name, tally in tallies}


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
    return {f"p{percent}": times.quantile(percent / 100) for percent in (50, 95, 99)}
