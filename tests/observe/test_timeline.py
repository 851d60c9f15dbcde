"""The last fifteen minutes as a page that is opened late is told of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.observe.events import Events, ModelChanged, RequestDone, RequestsDone
from router.observe.statistics import Telemetry
from router.observe.timeline import WINDOW_SEC, Memory, Timeline
from router.observe.usage import Usage
from router.scheduling.messages import (
    Configured,
    Eject,
    EngineReady,
    Finished,
    Inspected,
    MemoryChanged,
    ModelSpec,
    ModelState,
    StartEngine,
    Submit,
    Transition,
)
from router.scheduling.policy import Policy
from router.scheduling.scheduler import Scheduler
from router.system.devices import HOST


class World:
    """A scheduler whose changes are published, with a clock of its own."""

    def __init__(self, *aliases: str, room_mib: int = 10) -> None:
        self.now = 1000.0
        self.events = Events()
        self.scheduler = Scheduler()
        self.telemetry = Telemetry(self.events, lambda: self.now)
        self.used_mib = 100
        self.timeline = Timeline(
            self.events,
            self.scheduler,
            self.telemetry,
            lambda: {"host": Memory(self.used_mib, 1000)},
            lambda: self.now,
        )
        self.tell(Configured(self.now, {alias: ModelSpec(alias) for alias in aliases}, Policy()))
        self.tell(MemoryChanged(self.now, {HOST: room_mib}))
        self.telemetry.turn()

    def tell(self, event: Any) -> None:
        for effect in self.scheduler.step(event):
            if isinstance(effect, Transition):
                told, full = effect.reason, f"{effect.reason} (/secret)"
                self.events.publish(
                    ModelChanged(effect.alias, effect.state, full, self.now, told, effect.engine_id)
                )
            elif isinstance(effect, StartEngine):
                self.starting = effect.engine_id

    def load(self, alias: str, request_id: str, load_sec: float) -> None:
        self.tell(Submit(self.now, request_id, alias))
        self.tell(Inspected(self.now, alias, ({HOST: 6},), need="6 MiB"))
        self.wait(load_sec)
        self.tell(EngineReady(self.now, self.starting))

    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while (left := self.telemetry.slice_left_sec) <= until - self.now:
            self.now += max(0.0, left)
            self.telemetry.turn()
        self.now = until

    def finish(
        self, alias: str, request_id: str, total_sec: float, *, queue_sec: float = 0.0, tokens: int = 0
    ) -> None:
        self.tell(Finished(self.now, request_id))
        self.events.publish(RequestsDone([done(alias, self.now, total_sec, queue_sec=queue_sec, tokens=tokens)]))

    def told(
        self, since: float | None = None, *, full: bool = True, seconds: float = WINDOW_SEC
    ) -> dict[str, Any]:
        return asyncio.run(self.timeline.told(seconds, since, full=full))

    def states(self, alias: str, **more: Any) -> list[tuple[str, float, float | None]]:
        return [
            (span["state"], span["from"] - 1000, None if span["to"] is None else span["to"] - 1000)
            for span in self.told(**more)["models"][alias]["spans"]
        ]


def done(
    alias: str,
    at: float,
    total_sec: float,
    *,
    queue_sec: float = 0.0,
    tokens: int = 0,
    ttft_sec: float | None = None,
) -> RequestDone:
    return RequestDone(
        "id",
        alias,
        "/v1/chat/completions",
        "normal",
        "served",
        200,
        queue_sec,
        0.0,
        total_sec,
        at,
        usage=Usage(1, 0, tokens),
        ttft_sec=ttft_sec,
        streamed=ttft_sec is not None,
    )


def test_states_are_known_exactly_with_their_reasons() -> None:
    world = World("a", "b", *(f"off-{n}" for n in range(100)))
    world.load("a", "1", 3.0)
    world.wait(4.0)
    told = world.told()
    assert told["models"].keys() == {"a"}
    loading, ready = told["models"]["a"]["spans"]
    assert (loading["state"], loading["from"], loading["to"]) == ("loading", 1000.0, 1003.0)
    assert (ready["state"], ready["from"], ready["to"]) == ("ready", 1003.0, None)
    assert "(/secret)" in loading["reason"]
    assert "(/secret)" not in world.told(full=False)["models"]["a"]["spans"][0]["reason"]
    assert len(world.timeline.lanes) == 1, "models that never ran cost nothing"


def test_what_was_so_before_the_window_began_is_told_too() -> None:
    world = World("a")
    world.load("a", "1", 3.0)
    world.wait(2 * WINDOW_SEC)
    told = world.told()
    assert told["from"] == world.now - WINDOW_SEC
    assert [(span["state"], span["from"]) for span in told["models"]["a"]["spans"]] == [("ready", 1003.0)]
    assert told["models"]["a"]["in_flight"] == [(1003.0, 1)]
    assert len(told["series"]["at"]) == pytest.approx(WINDOW_SEC / 10, abs=1)


def test_what_did_nothing_within_the_window_is_forgotten() -> None:
    world = World("a")
    world.events.publish(ModelChanged("a", ModelState.LOADING, "", world.now, ""))
    world.events.publish(ModelChanged("a", ModelState.OFF, "", world.now, ""))
    assert world.timeline.lanes.keys() == {"a"}
    world.wait(WINDOW_SEC + 200)
    assert world.told()["models"] == {}
    assert world.timeline.lanes == {}


def test_a_failed_model_that_is_removed_is_off_and_forgotten_like_others() -> None:
    world = World("a")
    world.tell(Submit(world.now, "1", "a"))
    world.tell(Inspected(world.now, "a", problem="no such file"))
    world.wait(5)
    world.tell(Configured(world.now, {}, Policy()))
    assert world.states("a") == [("failed", 0.0, 5.0), ("off", 5.0, None)]
    world.wait(WINDOW_SEC + 200)
    assert world.timeline.lanes == {}


def test_a_model_that_changes_without_end_does_not_fill_the_memory() -> None:
    world = World("gone")
    for n in range(3000):
        state = ModelState.LOADING if n % 2 else ModelState.FAILED
        world.events.publish(ModelChanged("removed", state, "x" * 10_000, world.now + 0.1 * n, "y"))
    spans = world.told()["models"]["removed"]["spans"]
    assert len(spans) == 300
    assert len(spans[0]["reason"]) == 300


def test_requests_in_flight_and_waiting_are_counted_at_each_step() -> None:
    world = World("a")
    world.load("a", "1", 3.0)
    for request_id in ("2", "3"):
        world.tell(Submit(world.now, request_id, "a"))
    world.wait(20)
    model = world.told()["models"]["a"]
    assert model["in_flight"] == [(1003.0, 1)]
    assert model["queued"] == [(1000.0, 1), (1003.0, 2)]
    for request_id in ("1", "2", "3"):
        world.finish("a", request_id, 0.0)
    world.wait(20)
    model = world.told()["models"]["a"]
    assert model["in_flight"][-1] == (1020.0, 0)
    assert model["queued"][-1] == (1020.0, 0)


def test_short_requests_count_by_their_average() -> None:
    """None of them is in flight when a step ends."""
    world = World("a")
    world.load("a", "1", 0.0)
    world.finish("a", "1", 0.0)
    world.wait(10)
    for _ in range(4):
        world.events.publish(RequestsDone([done("a", world.now, 2.0, queue_sec=0.5)]))
        world.wait(1)
    world.wait(16)
    model = world.told()["models"]["a"]
    assert model["in_flight"] == [(1000.0, 1), (1010.0, 0.6), (1020.0, 0)]
    assert model["queued"] == [(1000.0, 1), (1010.0, 0.2), (1020.0, 0)]


def test_a_model_that_has_gone_is_not_told_to_serve() -> None:
    """Its requests ended in the same step."""
    world = World("a")
    world.load("a", "1", 3.0)
    world.wait(2)
    world.finish("a", "1", 5.0)
    world.tell(Eject(world.now, "a"))
    world.wait(12)
    assert world.told()["models"]["a"]["in_flight"] == [(1003.0, 1), (1005.0, 0)]


def test_tokens_waits_and_memory_by_step() -> None:
    world = World("a")
    for n in range(100):
        request = done("a", world.now, 1.0, queue_sec=n / 100, tokens=3)
        world.events.publish(RequestsDone([request]))
    world.wait(15)
    world.used_mib = 300
    world.wait(10)
    series = world.told()["series"]
    assert (series["step_sec"], series["at"]) == (10.0, [1000.0, 1010.0])
    assert series["tokens_per_sec"] == [30.0, 0.0]
    assert series["wait_p95_sec"] == [pytest.approx(0.95, rel=0.05), None]
    assert series["devices"] == {"host": {"used_mib": [100, 300], "total_mib": 1000}}


def test_tokens_of_a_long_stream_count_when_they_came() -> None:
    world = World("a")
    world.wait(38)
    before = world.now
    world.events.publish(RequestsDone([done("a", world.now, 36.0, tokens=320, ttft_sec=4.0)]))
    world.wait(12)
    series = world.told()["series"]
    assert series["tokens_per_sec"] == [4.0, 10.0, 10.0, 8.0, 0.0]
    later = world.told(since=before - 1)["series"]
    assert later["at"] == series["at"], "a page that had them already is told again"


def test_a_page_that_stays_open_is_told_what_is_new() -> None:
    world = World("a", "b")
    world.load("a", "1", 3.0)
    world.wait(12)
    first = world.told()
    assert first["whole"]
    world.wait(1)
    idle = world.told(first["to"])
    assert (idle["whole"], idle["models"], idle["series"]["at"]) == (False, {}, [])
    world.finish("a", "1", 13.0)
    world.tell(Eject(world.now, "a"))
    world.wait(1)
    ready, stopping = world.told(idle["to"])["models"]["a"]["spans"]
    assert (ready["state"], ready["to"], stopping["state"]) == ("ready", stopping["from"], "stopping")
    merged: dict[float, dict[str, Any]] = {}
    for told in (first, idle, world.told(idle["to"])):
        for span in told["models"].get("a", {"spans": []})["spans"]:
            merged[span["from"]] = span
    assert list(merged.values()) == world.told()["models"]["a"]["spans"]


def test_a_page_of_an_earlier_router_is_told_all() -> None:
    world = World("a")
    world.load("a", "1", 3.0)
    world.wait(10)
    for since in (world.now - 2 * WINDOW_SEC, world.now + 10, 999.0):
        assert world.told(since)["whole"]
