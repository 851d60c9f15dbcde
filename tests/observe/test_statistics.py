"""How requests fared: counts are exact for ever, windows forget, percentiles are near enough."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from router.observe.events import Events, RequestDone, RequestsDone
from router.observe.statistics import Telemetry
from router.observe.usage import Usage


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def done(alias: str = "a", outcome: str = "served", total_sec: float = 1.0, **more: Any) -> RequestDone:
    fields = {"priority": "normal", "status": 200, "queue_sec": 0.0, "load_sec": 0.0, **more}
    return RequestDone("id", alias, "/v1/chat/completions", outcome=outcome, total_sec=total_sec, **fields)


def test_counts_are_exact_however_long_ago_and_windows_forget() -> None:
    clock = Clock()
    events = Events()
    telemetry = Telemetry(events, clock)
    for minute in range(60):
        clock.now = 1000.0 + 60 * minute
        events.publish(RequestsDone([done("a", total_sec=1.0 + minute, usage=Usage(3, 1, 2))]))
        events.publish(RequestsDone([done("b", "engine_lost", status=502, total_sec=0.5)]))
        events.publish(RequestsDone([done("a", "cancelled", total_sec=0.25, priority="low")]))
    events.publish(RequestsDone([done("", "model_not_found", priority="")]))
    summary = asyncio.run(telemetry.summary())
    assert [summary[name] for name in ("total_requests", "successful", "failed", "cancelled")] == [180, 60, 60, 60]
    assert summary["success_rate"] == 0.5
    assert summary["response_time"] == {"avg": round((1830 + 30 + 15) / 180, 4), "min": 0.25, "max": 60.0}
    assert summary["turned_away"] == {"model_not_found": 1}
    assert summary["by_model"] == {
        "a": {"total_requests": 120, "total_errors": 0, "error_rate": 0.0, "total_tokens": 300},
        "b": {"total_requests": 60, "total_errors": 60, "error_rate": 1.0, "total_tokens": 0},
    }
    last = summary["windows"]["1m"]
    assert last["outcomes"] == {"served": 2, "engine_lost": 2, "cancelled": 2}  # up to a slice more than a minute
    assert summary["windows"]["5m"]["by_priority"]["low"]["requests"] == 6
    clock.now += 3600
    summary = asyncio.run(telemetry.summary())
    assert summary["windows"]["5m"]["requests"] == 0
    assert summary["total_requests"] == 180


def test_a_window_is_right_however_often_it_is_asked_for() -> None:
    """Slices that are over are added up once."""
    clock, events = Clock(), Events()
    telemetry = Telemetry(events, clock)

    async def story() -> list[tuple[int, float]]:
        asked = []
        for sec in range(0, 200, 5):
            clock.now = 1000.0 + sec
            events.publish(RequestsDone([done(total_sec=1.0 + sec)]))
            window = await telemetry.window(60)
            assert await telemetry.window(60) == window
            asked.append((window["by_model"]["a"]["requests"], window["total_sec"]["p50"]))
        return asked

    asked = asyncio.run(story())
    assert [requests for requests, _ in asked[:16]] == [*range(1, 15), 13, 14]  # six slices of 10 s, and a new one
    assert [requests for requests, _ in asked[-2:]] == [13, 14]
    assert asked[-1][1] == pytest.approx(1 + 195 - 35, rel=0.02)


def test_percentiles_are_within_two_percent() -> None:
    events = Events()
    telemetry = Telemetry(events, Clock())
    chance = random.Random(1)
    times = sorted(chance.lognormvariate(0, 2) for _ in range(5000))
    for sec in chance.sample(times, len(times)):
        events.publish(RequestsDone([done(total_sec=sec, queue_sec=0.00001)]))
    window = asyncio.run(telemetry.window(60))
    for percent in (50, 95, 99):
        exact = times[len(times) * percent // 100 - 1]
        assert window["total_sec"][f"p{percent}"] == pytest.approx(exact, rel=0.02)
    assert window["queue_sec"]["p99"] == 0.0
    assert window["ttft_sec"]["p50"] is None


def test_a_summary_of_many_models_lets_others_have_their_turns() -> None:
    """What is done meanwhile counts once, also when it is no more of the last minutes then."""
    clock, events = Clock(), Events()
    telemetry = Telemetry(events, clock)
    for _ in range(40):
        events.publish(RequestsDone([done(f"model-{number}") for number in range(100)]))
        clock.now += 10

    async def others() -> tuple[dict[str, Any], int]:
        asked = asyncio.create_task(telemetry.summary())
        turns = 0
        while not asked.done():
            await asyncio.sleep(0)
            turns += 1
            if turns == 2:
                events.publish(RequestsDone([done("model-99")]))
        return asked.result(), turns

    summary, turns = asyncio.run(others())
    assert turns > 10
    assert summary["total_requests"] == 4000
    assert {model["total_requests"] for model in summary["by_model"].values()} == {40}
    assert asyncio.run(telemetry.summary())["total_requests"] == 4001
