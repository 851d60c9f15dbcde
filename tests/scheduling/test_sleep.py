"""Engines that sleep instead of exiting: who sleeps, who is woken up, and what goes first when memory is short."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from gpus import GPU0, GPU1
from test_scheduler import Machine

from router.scheduling.messages import (
    Effect,
    Eject,
    EngineAsleep,
    EngineExited,
    EngineReady,
    KeepAlive,
    MemoryChanged,
    ModelSpec,
    Placement,
    PutToSleep,
    StartEngine,
    Transition,
    WakeUp,
)
from router.scheduling.policy import Policy
from router.scheduling.residency import ENGINES
from router.scheduling.wait_reason import why
from router.system.devices import HOST

LOAD_SEC, WAKE_SEC, SLEEP_SEC = 40.0, 2.0, 1.0
ASLEEP = {GPU0: 1, HOST: 6}
PLACES = dict.fromkeys("abc", ({GPU0: 6, HOST: 1},))
BUDGETS = {GPU0: 10, HOST: 14}


class Bedroom(Machine):
    """All its engines can sleep. `holds`: what they hold then; None: none falls asleep until the story says so."""

    def __init__(
        self,
        *models: str | ModelSpec,
        holds: Placement | None = ASLEEP,
        budgets: Mapping[Any, int] = BUDGETS,
        policy: Policy = Policy(max_linger_sec=0),  # noqa: B008 (immutable)
        places: Mapping[str, tuple[dict[Any, int], ...]] = PLACES,
    ) -> None:
        self.holds = holds
        super().__init__(*models, places=places, budgets=budgets, policy=policy, load_sec=None, service_sec=0.5)

    def carry_out(self, effect: Effect) -> None:
        match effect:
            case StartEngine(engine_id):
                self.after(LOAD_SEC, lambda: EngineReady(self.now, engine_id, ASLEEP))
            case PutToSleep(engine_id) if self.holds is not None:
                holds = self.holds
                self.after(SLEEP_SEC, lambda: EngineAsleep(self.now, engine_id, holds))
            case WakeUp(engine_id):
                self.after(WAKE_SEC, lambda: EngineReady(self.now, engine_id))
            case _:
                super().carry_out(effect)

    def answer(self, alias: str, within_sec: float = LOAD_SEC + 5) -> float:
        """Ask, and return how long the request has waited."""
        request_id, asked_sec = self.ask(alias), self.now
        self.wait(within_sec)
        return self.granted_sec[request_id] - asked_sec

    def held(self, device: Any) -> int:
        return sum(engine.placement.get(device, 0) for engine in self.scheduler.engines.values())


def asleep() -> Bedroom:
    """`a` sleeps, `b` is ready."""
    machine = Bedroom("a", "b", "c")
    machine.answer("a")
    machine.answer("b")
    assert machine.states("ab") == "asleep ready"
    return machine


def test_one_that_makes_room_sleeps_and_its_next_request_wakes_it() -> None:
    machine = asleep()
    assert (machine.held(GPU0), machine.held(HOST), machine.held(ENGINES)) == (7, 7, 1)
    assert machine.answer("a") == SLEEP_SEC + WAKE_SEC
    assert machine.states("ab") == "ready asleep"
    assert machine.loads() == 2


def test_a_wait_for_one_that_sleeps_is_told_by_what_waking_took() -> None:
    machine = asleep()
    unknown = machine.ask("a")
    assert machine.scheduler.forecast(machine.now).wait_sec(unknown, machine.now) is None
    machine.wait(60)
    machine.answer("b")
    again = machine.ask("a")
    told = machine.scheduler.forecast(machine.now).wait_sec(again, machine.now)
    assert told == pytest.approx(SLEEP_SEC + WAKE_SEC, abs=0.5)
    assert why(machine.scheduler.models["b"], machine.now).startswith("b is falling asleep")
    machine.wait(1.5)
    assert why(machine.scheduler.models["a"], machine.now) == "a is waking up (0.5 of ~2.0 s)"


@pytest.mark.parametrize(
    "budgets", [{GPU0: 10, HOST: 6}, {GPU0: 6, HOST: 20}], ids=["no RAM", "no room for its rest"]
)
def test_one_whose_sleep_there_is_no_memory_for_is_stopped(budgets: dict[Any, int]) -> None:
    machine = Bedroom("a", "b", budgets=budgets)
    machine.answer("a")
    machine.answer("b")
    assert machine.states() == "off ready"
    assert not any(isinstance(effect, PutToSleep) for effect in machine.effects)


def test_one_that_holds_more_than_it_should_goes_at_once() -> None:
    machine = Bedroom("a", "b", holds={GPU0: 5, HOST: 6})
    machine.answer("a")
    assert machine.answer("b") == SLEEP_SEC + LOAD_SEC
    assert machine.states() == "off ready"
    assert machine.stops("a") == ["evicted", "evicted"]


def test_those_that_sleep_go_first_when_ram_is_needed() -> None:
    machine = asleep()
    machine.places = {**PLACES, "c": ({HOST: 10},)}
    machine.answer("c")
    assert machine.states() == "off ready ready"


def test_those_that_sleep_make_room_for_other_programs() -> None:
    machine = asleep()
    machine.tell(MemoryChanged(machine.now, {GPU0: 10, HOST: 6}))
    machine.wait(0)
    assert machine.states("ab") == "off ready"


def test_one_that_sleeps_is_unloaded_once_it_is_idle_for_too_long() -> None:
    machine = Bedroom("a", "b", policy=Policy(max_linger_sec=0, idle_timeout_sec=100, keep_warm_models=2))
    machine.answer("a")
    idle_sec = machine.now
    machine.answer("b")
    assert machine.scheduler.unload_at_sec("a") == pytest.approx(idle_sec + 100, abs=10)
    machine.wait(100)
    assert machine.states() == "off ready", "and it is not among those that are kept warm"
    assert machine.stops("a") == ["evicted", "idle"]


def test_an_eject_and_a_keep_alive_of_nothing_end_one_that_sleeps_or_is_about_to() -> None:
    for event in (Eject, lambda at, alias: KeepAlive(at, alias, 0.0)):
        machine = asleep()
        machine.tell(event(machine.now, "a"))
        machine.wait(0.1)
        assert machine.states("ab") == "off ready"
    machine = Bedroom("a", "b", holds=None)
    machine.answer("a")
    machine.ask("b")
    machine.tell(Eject(machine.now, "a"))
    machine.wait(LOAD_SEC)
    assert machine.states() == "off ready"
    assert Transition("a", "off", "manual: ejected by hand", engine_id=1) in machine.effects


def test_one_that_sleeps_is_loaded_anew_where_there_is_room_rather_than_waiting_for_its_own() -> None:
    machine = Bedroom("a", "b", budgets={**BUDGETS, GPU1: 6}, places={"b": ({GPU0: 10},), **PLACES})
    machine.places = {"a": ({GPU0: 6, HOST: 1}, {GPU1: 6, HOST: 1}), "b": ({GPU0: 9, HOST: 1},)}
    machine.answer("a")
    machine.answer("b")
    assert machine.states() == "asleep ready"
    machine.service_sec = None
    busy = machine.ask("b")
    assert busy in machine.granted
    assert machine.answer("a") == LOAD_SEC
    assert machine.states() == "ready ready"


def test_one_that_dies_while_it_wakes_loses_nothing() -> None:
    machine = asleep()
    waits = machine.ask("a")
    machine.wait(SLEEP_SEC)
    assert machine.states("a") == "loading"
    machine.tell(EngineExited(machine.now, machine.engine("a"), "it did not answer /wake_up"))
    machine.wait(LOAD_SEC + 5)
    assert waits in machine.granted
    assert "'a' did not wake up: it did not answer /wake_up" in str(machine.scheduler.models["a"].last_error)


def test_sleepers_take_no_place_and_only_ports_that_others_leave() -> None:
    plenty = {GPU0: math.inf, HOST: math.inf}
    for ports, states in ((65535, "asleep asleep ready"), (2, "off asleep ready")):
        policy = Policy(max_linger_sec=0, max_concurrent_models=1, ports=ports)
        machine = Bedroom("a", "b", "c", policy=policy, budgets=plenty)
        for alias in "abc":
            machine.answer(alias)
        assert machine.states() in (states, "asleep off ready")
        assert machine.held(ENGINES) == 1
