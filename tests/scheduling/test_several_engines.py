"""A model may have several engines, though the policy starts one: what is true of them is kept for each.

A second one is started here behind the policy's back, as a later policy might do.
"""

from __future__ import annotations

from gpus import GPU0
from test_scheduler import Machine

from router.scheduling.messages import (
    Eject,
    EngineExited,
    EngineReady,
    Finished,
    KeepAlive,
    ModelSpec,
    StopCause,
    StopEngine,
    Transition,
)
from router.scheduling.residency import ENGINES


def with_two(*, ready: bool = True) -> Machine:
    """Model `a` with two engines of a slot each."""
    machine = Machine("a", "b", load_sec=None, places={"a": ({GPU0: 3},), "b": ({GPU0: 6},)})
    fleet, model = machine.scheduler._fleet, machine.scheduler.models["a"]
    for _ in range(2):
        fleet.start(fleet.next_id(), model, {GPU0: 3, ENGINES: 1}, machine.now)
    for engine in model.engines if ready else ():
        machine.tell(EngineReady(machine.now, engine.id))
    return machine


def names(machine: Machine) -> list[str]:
    return [engine.name for engine in machine.scheduler.models["a"].engines]


def test_each_has_a_name_of_its_own() -> None:
    assert names(with_two()) == ["a#1", "a#2"]


def test_requests_go_to_the_one_with_the_least_to_do_and_then_wait_for_either() -> None:
    machine = with_two()
    first, second, third = (machine.ask("a") for _ in range(3))
    assert {machine.granted[first], machine.granted[second]} == {1, 2}
    assert third not in machine.granted
    machine.finish(second)
    assert machine.granted[third] == machine.granted[second]


def test_the_model_is_ready_as_soon_as_one_of_them_is() -> None:
    machine = with_two(ready=False)
    waits = machine.ask("a")
    machine.tell(EngineReady(machine.now, 2))
    assert machine.states("a") == "ready"
    assert machine.granted[waits] == 2


def test_the_end_of_one_is_not_the_end_of_the_model() -> None:
    machine = with_two()
    first, second = machine.ask("a"), machine.ask("a")
    machine.tell(EngineExited(machine.now, machine.granted[first], "signal 11"))
    assert machine.states("a") == "ready"
    assert names(machine) == [f"a#{machine.granted[second]}"]
    machine.tell(Finished(machine.now, second))
    assert machine.granted[machine.ask("a")] == machine.granted[second]


def test_room_is_made_by_as_many_of_them_as_it_takes() -> None:
    machine = with_two()
    machine.wait(60)
    machine.ask("b")
    left = [effect.engine_id for effect in machine.effects if isinstance(effect, StopEngine)]
    assert len(left) == 1, "4 are free, and one gives back 3"
    assert machine.states("a") == "ready"
    assert machine.scheduler.models["b"].engines[0].id > 2


def test_who_waits_for_them_is_told_of_each_and_names_their_model_once() -> None:
    machine = with_two()
    busy = [machine.ask("a"), machine.ask("a")]
    machine.places["b"] = ({GPU0: 9},)
    machine.ask("b")
    waits = machine.scheduler.models["b"].why_waiting
    assert {departure.engine_id for departure in waits.departures} == {1, 2}
    assert str(waits).startswith("no room until a can be unloaded: ")
    assert set(busy) <= set(machine.granted)


def test_what_is_said_of_a_model_is_done_to_all_its_engines() -> None:
    machine = with_two()
    machine.tell(KeepAlive(machine.now, "a", 7.0))
    assert machine.scheduler.unload_at_sec("a") == machine.now + 7
    machine.tell(Eject(machine.now, "a"))
    stops = [effect for effect in machine.effects if isinstance(effect, StopEngine)]
    assert stops == [StopEngine(1, StopCause.MANUAL), StopEngine(2, StopCause.MANUAL)]
    assert machine.states("a") == "off"
    gone = [
        effect.engine_id for effect in machine.effects if isinstance(effect, Transition) and effect.state == "off"
    ]
    assert gone == [1, 2]


def test_a_model_that_is_removed_is_forgotten_with_the_last_of_them() -> None:
    machine = with_two()
    machine.stop_sec = None
    machine.configure("b")
    machine.tell(EngineExited(machine.now, 1, "stopped"))
    assert "a" in machine.scheduler.models
    machine.tell(EngineExited(machine.now, 2, "stopped"))
    assert "a" not in machine.scheduler.models


def test_a_change_that_needs_no_new_engine_reaches_all() -> None:
    machine = with_two()
    machine.configure(ModelSpec("a", pinned=True), "b")
    assert [engine.spec.pinned for engine in machine.scheduler.models["a"].engines] == [True, True]
