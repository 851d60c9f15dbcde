"""What the scheduler does, told as stories. `Machine` is the world around it: clocks, files, processes."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import pytest
from gpus import GPU0, GPU1

from router.scheduling.eviction import Room, Verdict, decide
from router.scheduling.messages import (
    Configured,
    Displace,
    Effect,
    Eject,
    EngineAlive,
    EngineExited,
    EngineLost,
    EngineMeasured,
    EngineReady,
    Event,
    Finished,
    Grant,
    Inspect,
    Inspected,
    KeepAlive,
    Load,
    MemoryChanged,
    ModelSpec,
    Pin,
    Probe,
    ReadAhead,
    Refusal,
    Reject,
    Requeue,
    Reset,
    Retry,
    ShutDown,
    StartEngine,
    StopCause,
    StopEngine,
    Submit,
    Tick,
    Transition,
)
from router.scheduling.policy import ByPriority, Policy
from router.scheduling.queue import Priority, Request
from router.scheduling.residency import ENGINES, Model, since_it_changed
from router.scheduling.scheduler import Scheduler
from router.scheduling.wait_estimate import Forecast
from router.system.devices import HOST

HIGH, NORMAL, LOW = Priority
GPU = {GPU0: 10}
BIG = ({GPU0: 6},)
"""Two of them do not fit on the GPU together."""
SMALL = ({GPU0: 5},)
"""Two of them do, three do not."""


class Machine:
    """Engines load in `load_sec` and stop in `stop_sec` (None: when the story says so); files are sound
    unless named in `broken`; requests take `service_sec` (None: until the story ends them)."""

    def __init__(
        self,
        *models: str | ModelSpec,
        places: Mapping[str, tuple[dict[str, int], ...]] | None = None,
        budgets: Mapping[str, int] | None = GPU,
        policy: Policy = Policy(),  # noqa: B008 (immutable)
        load_sec: float | None = 8.0,
        stop_sec: float | None = 0.0,
        service_sec: float | None = None,
    ) -> None:
        specs = [ModelSpec(each) if isinstance(each, str) else each for each in models]
        self.specs = {spec.alias: spec for spec in specs}
        self.places = places or {}
        self.policy = policy
        self.load_sec, self.stop_sec, self.service_sec = load_sec, stop_sec, service_sec
        self.broken: dict[str, str] = {}
        self.blind: set[str] = set()
        """Models whose files take for ever to look at."""
        self.scheduler = Scheduler()
        self.now = 0.0
        self.later: list[tuple[float, int, Callable[[], Event]]] = []
        self.seq = itertools.count(1)
        self.effects: list[Effect] = []
        self.granted: dict[str, int] = {}
        self.granted_sec: dict[str, float] = {}
        self.rejected: dict[str, Reject] = {}
        self.tell(Configured(0.0, self.specs, policy))
        if budgets is not None:
            self.tell(MemoryChanged(0.0, budgets))

    def tell(self, event: Event) -> list[Effect]:
        effects = self.scheduler.step(event)
        self.effects += effects
        for effect in effects:
            self.carry_out(effect)
        return effects

    def carry_out(self, effect: Effect) -> None:
        match effect:
            case Grant(request_id, engine_id):
                self.granted[request_id] = engine_id
                self.granted_sec[request_id] = self.now
                if self.service_sec is not None:
                    self.after(self.service_sec, lambda: Finished(self.now, request_id))
            case Reject(request_id):
                self.rejected[request_id] = effect
            case Inspect(alias) if alias not in self.blind:
                self.after(0.0, lambda: self.look(alias))
            case StartEngine(engine_id) if self.load_sec is not None:
                self.after(self.load_sec, lambda: EngineReady(self.now, engine_id))
            case StopEngine(engine_id) if self.stop_sec is not None:
                self.after(self.stop_sec, lambda: EngineExited(self.now, engine_id, "stopped"))

    def look(self, alias: str) -> Inspected:
        if alias in self.broken:
            return Inspected(self.now, alias, (), self.broken[alias])
        return Inspected(self.now, alias, self.places.get(alias, BIG), None, "6 MiB (its file)")

    def after(self, seconds: float, event: Callable[[], Event]) -> None:
        heapq.heappush(self.later, (self.now + seconds, next(self.seq), event))
        if seconds == 0:
            self.wait(0)

    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while (at := min(self.scheduler.wake_at, self.later[0][0] if self.later else math.inf)) <= until:
            self.now = max(self.now, at)
            if self.later and self.later[0][0] <= at:
                self.tell(heapq.heappop(self.later)[2]())
            else:
                self.tell(Tick(self.now))
        self.now = until

    def ask(self, alias: str, priority: Priority = NORMAL, *, slotless: bool = False) -> str:
        request_id = f"{alias}{next(self.seq)}"
        self.tell(Submit(self.now, request_id, alias, priority, slotless))
        return request_id

    def finish(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.tell(Finished(self.now, request_id))

    def served(self, alias: str, priority: Priority = NORMAL) -> str:
        """Ask and wait until the model has loaded."""
        request_id = self.ask(alias, priority)
        self.wait(self.load_sec or 0.0)
        assert request_id in self.granted
        return request_id

    def engine(self, alias: str) -> int:
        engines = self.scheduler.models[alias].engines
        assert engines, f"{alias} has no engine"
        return engines[0].id

    def states(self, aliases: Iterable[str] | None = None) -> str:
        return " ".join(self.scheduler.state(alias) for alias in aliases or self.specs)

    def loads(self) -> int:
        return sum(isinstance(effect, StartEngine) for effect in self.effects)

    def stops(self, alias: str) -> list[str]:
        """Why engines of the model were stopped so far."""
        return [
            effect.reason.partition(":")[0]
            for effect in self.effects
            if isinstance(effect, Transition) and (effect.alias, effect.state) == (alias, "stopping")
        ]

    def configure(self, *models: str | ModelSpec, policy: Policy | None = None) -> None:
        specs = [ModelSpec(each) if isinstance(each, str) else each for each in models]
        self.specs = {spec.alias: spec for spec in specs}
        self.policy = policy or self.policy
        self.tell(Configured(self.now, self.specs, self.policy))


# --- the ordinary day -----------------------------------------------------------------------------------


def test_a_request_loads_its_model_and_the_next_finds_it_ready() -> None:
    machine = Machine("a")
    first = machine.ask("a")
    assert machine.states() == "loading"
    machine.wait(8.0)
    assert machine.granted_sec[first] == 8.0
    machine.finish(first)
    second = machine.ask("a")
    assert second in machine.granted
    assert machine.loads() == 1


def test_never_more_in_flight_than_slots() -> None:
    machine = Machine(ModelSpec("a", slots=2))
    first, second, third = (machine.ask("a") for _ in range(3))
    machine.wait(8.0)
    assert list(machine.granted) == [first, second]
    machine.finish(first)
    assert third in machine.granted


def test_what_needs_no_slot_waits_for_none() -> None:
    machine = Machine("a")
    first = machine.served("a")
    second = machine.ask("a")
    quick = [machine.ask("a", slotless=True) for _ in range(3)]
    assert machine.granted.keys() == {first, *quick}
    machine.finish(*quick)
    assert second not in machine.granted, "the slot is still taken"
    machine.finish(first)
    assert second in machine.granted


def test_what_needs_no_slot_loads_its_model_and_takes_none_once_it_is_there() -> None:
    machine = Machine("a")
    quick, chat = machine.ask("a", slotless=True), machine.ask("a")
    assert machine.states() == "loading"
    machine.wait(8)
    assert machine.granted.keys() == {quick, chat}


def test_what_needs_no_slot_cannot_flood_an_engine() -> None:
    machine = Machine(ModelSpec("a", most_slotless=2))
    machine.finish(machine.served("a"))
    quick = [machine.ask("a", slotless=True) for _ in range(4)]
    assert [each in machine.granted for each in quick] == [True, True, False, False]
    assert machine.ask("a") in machine.granted, "the slot is free"
    machine.finish(quick[0])
    assert quick[2] in machine.granted
    assert quick[3] not in machine.granted


def test_what_needs_no_slot_keeps_its_engine_and_finds_none_that_leaves() -> None:
    machine = Machine("a", "b")
    machine.finish(machine.served("a"))
    quick = machine.ask("a", slotless=True)
    machine.ask("b")
    machine.wait(100)
    assert machine.states() == "draining off"
    late = machine.ask("a", slotless=True)
    assert late not in machine.granted
    machine.finish(quick)
    assert machine.states() == "off loading"


def test_high_requests_overtake_in_the_line() -> None:
    machine = Machine("a")
    low, normal, high = machine.ask("a", LOW), machine.ask("a", NORMAL), machine.ask("a", HIGH)
    machine.wait(8.0)
    machine.finish(high)
    machine.finish(normal)
    assert list(machine.granted) == [high, normal, low]


def test_models_that_fit_together_stay_together() -> None:
    machine = Machine("a", "b", places={"a": SMALL, "b": SMALL})
    machine.ask("a")
    machine.ask("b")
    machine.wait(8.0)
    assert machine.states() == "ready ready"


def test_an_idle_model_makes_room_at_once() -> None:
    machine = Machine("a", "b")
    machine.finish(machine.served("a"))
    machine.wait(60)
    machine.ask("b")
    assert machine.states() == "off loading"
    assert machine.stops("a") == ["evicted"]
    assert Transition("a", "off", "evicted: makes room for 'b'", engine_id=1) in machine.effects


def test_the_least_valuable_idle_model_goes() -> None:
    machine = Machine("a", "b", "c", places=dict.fromkeys("abc", SMALL))
    machine.finish(machine.served("b"))
    machine.wait(30)
    machine.finish(machine.served("a"))
    machine.wait(30)
    machine.ask("c")
    assert machine.states() == "ready off loading"


def test_no_more_engines_go_than_must() -> None:
    places = {"a": ({GPU0: 2},), "b": ({GPU0: 5},), "c": ({GPU0: 3},), "d": ({GPU0: 5},)}
    machine = Machine(*"abcd", places=places, policy=Policy(max_concurrent_models=4))
    for alias in "abc":
        machine.finish(machine.served(alias))
        machine.wait(30)
    machine.ask("d")
    assert machine.states() == "ready off ready loading"  # a has been idle longest, but would not do


def test_engines_on_another_device_are_left_alone() -> None:
    places = {"a": ({GPU0: 6},), "b": ({GPU1: 6},), "c": ({GPU1: 6},)}
    machine = Machine(*"abc", places=places, budgets={GPU0: 10, GPU1: 10})
    for alias in "ab":
        machine.finish(machine.served(alias))
        machine.wait(30)
    machine.ask("c")
    assert machine.states() == "ready off loading"


def test_devices_load_in_parallel() -> None:
    places = {"a": ({GPU0: 6},), "b": ({GPU1: 6},)}
    machine = Machine("a", "b", places=places, budgets={GPU0: 10, GPU1: 10})
    machine.ask("a")
    machine.ask("b")
    assert machine.states() == "loading loading"


def test_the_second_best_place_will_do_when_it_is_free() -> None:
    places = {"a": ({GPU0: 6},), "b": ({GPU0: 6}, {HOST: 6})}
    machine = Machine("a", "b", places=places, budgets={GPU0: 10, HOST: 8})
    machine.served("a")
    machine.ask("b")
    assert machine.states() == "ready loading"
    assert machine.scheduler.free() == {GPU0: 4, HOST: 2, ENGINES: 1}


def test_max_concurrent_models_is_a_limit_like_memory() -> None:
    tiny = ({GPU0: 1},)
    machine = Machine(*"ab", places={"a": tiny, "b": tiny}, policy=Policy(max_concurrent_models=1))
    machine.finish(machine.served("a"))
    machine.wait(30)
    machine.ask("b")
    assert machine.states() == "off loading"


def test_ports_are_a_limit_like_memory() -> None:
    tiny = ({GPU0: 1},)
    machine = Machine(*"ab", places={"a": tiny, "b": tiny}, policy=Policy(ports=1))
    machine.finish(machine.served("a"))
    machine.wait(30)
    machine.ask("b")
    assert machine.states() == "off loading"


def test_of_very_many_models_that_wait_few_are_looked_at_in_a_step_and_all_before_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[str] = []

    def watched(candidate: Model, inspected: Inspected, room: Room) -> Verdict:
        looks.append(candidate.spec.alias)
        return decide(candidate, inspected, room)

    monkeypatch.setattr("router.scheduling.scheduler.decide", watched)
    crowd = [f"crowd-{number}" for number in range(100)]
    places = {"elsewhere": ({GPU1: 6},)}
    machine = Machine("a", *crowd, "elsewhere", places=places, budgets={GPU0: 10, GPU1: 10})
    machine.served("a")
    waiting = [machine.ask(alias) for alias in crowd]
    machine.ask("elsewhere")
    machine.wait(3)
    assert machine.states(["a", "crowd-0", "elsewhere"]) == "ready off loading"
    looks.clear()
    machine.tell(Tick(machine.now))
    assert "crowd-0" in looks
    assert len(looks) <= 32
    looks.clear()
    for request_id in waiting[1:50]:
        machine.tell(Finished(machine.now, request_id, served=False))
    assert looks == []
    machine.wait(0.25)
    assert "crowd-0" in looks


# --- fairness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap_sec", [0.0, 0.5, 1.0])
def test_trace_costs_three_loads(gap_sec: float) -> None:
    machine = Machine(*"ABC", service_sec=1.0)
    for alias in "ABAACABC":
        machine.ask(alias)
        machine.wait(gap_sec)
    machine.wait(60)
    assert machine.loads() == 3
    assert len(machine.granted) == 8


def keep_busy(machine: Machine, alias: str, clients: int, seconds: float, priority: Priority = NORMAL) -> None:
    """Clients without think time, each with a new request as soon as the last is answered."""
    until = machine.now + seconds
    mine = [machine.ask(alias, priority) for _ in range(clients)]
    while machine.now < until:
        machine.wait(0.5)
        for number, request_id in enumerate(mine):
            if machine.now - machine.granted_sec.get(request_id, math.inf) >= 1.0:
                machine.finish(request_id)
                mine[number] = machine.ask(alias, priority)


def test_cold_model_gets_its_turn_under_endless_load() -> None:
    machine = Machine(ModelSpec("a", slots=2), "b", service_sec=None)
    machine.finish(machine.served("a"))
    cold = machine.ask("b")
    keep_busy(machine, "a", clients=6, seconds=120)
    # 30 s bound, or four swaps of 8 + 5 s after a loaded; then a's last request, and b's load
    assert machine.granted_sec[cold] <= 8 + 4 * (8 + 5) + 1.5 + 8
    assert not machine.rejected


def test_a_cheap_swap_is_due_sooner_than_a_dear_one() -> None:
    waits = []
    for load_sec in (0.2, 8.0):
        machine = Machine(*(ModelSpec(alias, expected_load_sec=load_sec) for alias in "ab"), load_sec=load_sec)
        busy = machine.served("a")
        machine.ask("b")
        asked = machine.now
        while machine.states() == "ready off":
            machine.wait(0.05)
        waits.append(machine.now - asked)
        machine.finish(busy)
        assert machine.states() == "off loading"
    assert waits == pytest.approx([4 * 0.4, 4 * 16], abs=0.1)


@pytest.mark.parametrize(("running", "drains_after_sec"), [(LOW, 1 * 13), (NORMAL, 4 * 13), (HIGH, 4 * 13)])
def test_high_request_does_not_wait_for_the_full_quantum_of_low_ones(
    running: Priority, drains_after_sec: float
) -> None:
    machine = Machine("a", "b")
    machine.served("a", running)
    machine.ask("b", HIGH)
    machine.wait(drains_after_sec - 0.01)
    assert machine.states() == "ready off"
    machine.wait(0.02)
    assert machine.states() == "draining off"


def test_files_are_read_ahead_while_another_engine_finishes() -> None:
    machine = Machine("a", "b")
    machine.finish(machine.served("a"))
    machine.wait(60)
    machine.finish(machine.served("b"))  # an idle engine makes room at once: there is no time to read anything
    machine.wait(60)
    assert not [effect for effect in machine.effects if isinstance(effect, ReadAhead)]
    machine.served("a")
    machine.wait(100)
    machine.ask("b", HIGH)
    assert machine.states() == "draining off"
    assert machine.effects[-1] == ReadAhead("b")


def test_draining_engine_admits_nobody_and_its_own_model_queues_again() -> None:
    machine = Machine(ModelSpec("a", slots=2), "b")
    busy = machine.served("a")
    machine.ask("b")
    machine.wait(60)
    assert machine.states() == "draining off"
    late = machine.ask("a")
    assert late not in machine.granted
    machine.finish(busy)
    assert machine.states() == "off loading"
    machine.wait(300 - 60)
    assert machine.rejected.keys() <= {late}


def test_room_made_for_one_model_is_not_snatched_by_the_victims_own_queue() -> None:
    machine = Machine("a", "b", stop_sec=2.0)
    busy = machine.served("a")
    for _ in range(3):
        machine.ask("a", HIGH)  # earlier in every order than b's request
    waiting = machine.ask("b")
    machine.wait(60)
    assert machine.states() == "draining off"
    machine.finish(busy)
    machine.wait(1.0)
    assert machine.states() == "stopping off"
    machine.wait(1.0)
    assert machine.states() == "off loading"
    machine.wait(8.0)
    assert waiting in machine.granted


def test_room_made_for_one_model_is_not_taken_by_a_third() -> None:
    places = {"a": ({GPU0: 6},), "b": ({GPU0: 10},), "c": ({GPU0: 4},)}
    machine = Machine(*"abc", places=places)
    machine.served("a")
    machine.ask("b")
    machine.wait(60)
    machine.ask("c", HIGH)  # would fit beside a, but that is where b will be
    assert machine.states() == "draining off off"


def test_engine_serves_on_when_the_one_it_drains_for_goes_away() -> None:
    machine = Machine(ModelSpec("a", slots=2), "b")
    machine.served("a")
    impatient = machine.ask("b")
    machine.wait(60)
    late = machine.ask("a")
    assert machine.states() == "draining off"
    machine.tell(Finished(machine.now, impatient, served=False))
    assert machine.states() == "ready off"
    assert late in machine.granted


def test_time_counts_again_once_an_engine_that_was_to_leave_stays() -> None:
    """Or those who come would seem to come ten times as often as they do."""
    machine = Machine(ModelSpec("a", slots=2), "b")
    machine.served("a")
    impatient = machine.ask("b")
    machine.wait(60)
    machine.finish(impatient)
    assert machine.states() == "ready off"
    for _ in range(10):
        machine.wait(100)
        machine.finish(machine.ask("a"))
    assert machine.scheduler.models["a"].busy.gap_sec(NORMAL, machine.now) == pytest.approx(100, rel=0.2)


def test_engine_serves_on_when_room_turns_up_elsewhere() -> None:
    machine = Machine("a", "b")
    machine.served("a")
    machine.ask("b")
    machine.wait(60)
    machine.tell(MemoryChanged(machine.now, {GPU0: 20}))
    assert machine.states() == "ready loading"


def test_small_models_do_not_keep_a_big_one_out_by_taking_turns() -> None:
    places = {**dict.fromkeys("abcd", SMALL), "big": ({GPU0: 10},)}
    machine = Machine(*"abcd", "big", places=places, load_sec=2.0, service_sec=9.0)
    machine.ask("a")
    machine.wait(5)
    machine.ask("b")
    big = machine.ask("big")
    asked = machine.now
    for alias in itertools.islice(itertools.cycle("cdab"), 60):
        machine.ask(alias)  # the halves fall idle by turns, never both at once
        machine.wait(5.5)
    # its bound, a quantum of 4 x (2 + 5) s, 9 s to drain, 2 s to load
    assert machine.granted_sec[big] - asked <= 30 + 28 + 9 + 2


def test_max_drain_ends_what_does_not_end_by_itself() -> None:
    machine = Machine("a", "b", policy=Policy(max_drain_sec=20))
    endless = machine.served("a")
    machine.ask("b")
    machine.wait(4 * 13 + 1)
    assert machine.states() == "draining off"
    machine.wait(20)
    assert machine.states() == "off loading"
    machine.tell(Requeue(machine.now, endless, "its engine was stopped"))
    assert endless not in machine.rejected


# --- anticipation ---------------------------------------------------------------------------------------


def test_clients_without_think_time_do_not_make_models_thrash() -> None:
    machine = Machine(*"abc", load_sec=10.0)
    mine = {alias: machine.ask(alias) for alias in "abc"}
    served = 0
    while machine.now < 600:
        machine.wait(0.5)
        for alias, request_id in mine.items():
            if machine.now - machine.granted_sec.get(request_id, math.inf) >= 1.0:
                machine.finish(request_id)
                served += 1
                mine[alias] = machine.ask(alias)
    assert machine.loads() <= 9
    assert served >= 450


def test_an_engine_lingers_for_the_pause_its_client_usually_makes() -> None:
    machine = Machine("a", "b")
    for _ in range(5):
        machine.finish(machine.served("a"))
        machine.wait(2.0)
    request_id = machine.served("a")
    machine.ask("b")
    machine.finish(request_id)
    machine.wait(1.9)
    again = machine.ask("a")
    assert again in machine.granted
    machine.finish(again)
    machine.wait(4.0)  # twice the usual: nobody comes
    assert machine.states() == "off loading"


def test_an_engine_does_not_linger_for_a_client_that_comes_once_an_hour() -> None:
    machine = Machine("a", "b", policy=Policy(idle_timeout_sec=math.inf))
    for _ in range(3):
        machine.finish(machine.served("a"))
        machine.wait(3600)
    request_id = machine.served("a")
    machine.ask("b")
    machine.finish(request_id)
    assert machine.states() == "off loading"


def test_the_more_wait_the_less_an_engine_lingers() -> None:
    machine = Machine("a", "b")
    for _ in range(5):
        machine.finish(machine.served("a"))
        machine.wait(2.0)
    request_id = machine.served("a")
    for _ in range(6):
        machine.ask("b")
    machine.finish(request_id)
    assert machine.states() == "off loading"


# --- look before you evict ------------------------------------------------------------------------------


def test_broken_model_costs_nobody_a_place() -> None:
    machine = Machine("good", "bad")
    machine.finish(machine.served("good"))
    machine.broken["bad"] = "bad.gguf: not a GGUF file"
    for _ in range(60):
        bad = machine.ask("bad")
        assert machine.rejected[bad].refusal is Refusal.MODEL_FAILED
        assert "not a GGUF file" in machine.rejected[bad].reason
        machine.finish(machine.ask("good"))
        machine.wait(1.0)
    assert machine.loads() == 1


def test_a_file_that_vanished_while_its_model_waited_costs_nobody_a_place() -> None:
    machine = Machine("a", "b")
    machine.served("a")
    waiting = machine.ask("b")
    machine.broken["b"] = "b.gguf: no such file"
    machine.wait(60)
    assert machine.states() == "ready failed"
    assert "no such file" in machine.rejected[waiting].reason


def test_slow_disk_of_one_model_does_not_hold_up_the_others() -> None:
    machine = Machine("slow", "b")
    machine.blind.add("slow")
    machine.ask("slow", HIGH)
    machine.ask("b")
    assert machine.states() == "off off"  # a second of courtesy
    machine.wait(1.0)
    assert machine.states() == "off loading"


def test_a_model_that_can_never_fit_is_refused_at_once_with_the_figures() -> None:
    machine = Machine("small", "huge", places={"huge": ({GPU0: 11},)})
    machine.served("small")
    huge = machine.ask("huge")
    refusal = machine.rejected[huge]
    assert refusal.refusal is Refusal.INSUFFICIENT_MEMORY
    assert "10 MiB on gpu0" in refusal.reason
    assert refusal.is_final
    assert machine.states() == "ready off"


def test_pinned_model_makes_room_for_nobody() -> None:
    machine = Machine(ModelSpec("a", pinned=True), "b")
    machine.finish(machine.served("a"))
    machine.wait(3600)
    refused = machine.ask("b")
    assert machine.rejected[refused].refusal is Refusal.INSUFFICIENT_MEMORY
    assert "a (pinned)" in machine.rejected[refused].reason
    assert machine.states() == "ready off"


def test_an_operator_pins_a_model_for_a_while() -> None:
    machine = Machine(ModelSpec("a", idle_timeout_sec=60), "b")
    machine.finish(machine.served("a"))
    machine.tell(Pin(machine.now, "a", machine.now + 3600))
    machine.wait(1800)
    assert machine.rejected[machine.ask("b")].refusal is Refusal.INSUFFICIENT_MEMORY
    machine.configure(ModelSpec("a", idle_timeout_sec=30), "b")
    machine.wait(1799)
    assert machine.states() == "ready off"
    machine.wait(2)  # it has been idle for long
    assert machine.states() == "off off"
    model = machine.scheduler.models["a"]
    assert (model.spec, model.unpinned, model.pinned_until_sec) == (machine.specs["a"], None, None)


@pytest.mark.parametrize("end", [Pin(0, "a", None), Eject(0, "a")])
def test_an_operators_pin_is_taken_back(end: Pin | Eject) -> None:
    machine = Machine("a", "b")
    machine.tell(Pin(machine.now, "a", machine.now + 3600))  # before it is loaded
    machine.finish(machine.served("a"))
    assert machine.rejected[machine.ask("b")].refusal is Refusal.INSUFFICIENT_MEMORY
    machine.tell(replace(end, at=machine.now))
    machine.wait(60)
    machine.served("b")
    assert machine.states() == "off ready"
    assert machine.scheduler.models["a"].pinned_until_sec is None


def test_a_model_that_an_operator_pinned_comes_back_after_a_crash() -> None:
    machine = Machine("a")
    machine.finish(machine.served("a"))
    machine.tell(Pin(machine.now, "a", machine.now + 3600))
    crash(machine, "a")
    machine.wait(60)
    assert machine.states() == "ready"


def test_what_a_client_says_counts_instead_of_the_timeout_until_the_engine_goes() -> None:
    machine = Machine(ModelSpec("a", idle_timeout_sec=60), ModelSpec("b", pinned=True))
    request = machine.served("a")
    machine.tell(KeepAlive(machine.now, "a", math.inf))
    machine.finish(request)
    machine.wait(3600)
    assert machine.states() == "ready off"
    machine.tell(KeepAlive(machine.now, "a", 0.0))
    machine.wait(0.1)
    assert machine.states() == "off off"
    machine.finish(machine.served("a"))
    machine.wait(59)
    assert machine.states() == "ready off"
    machine.wait(2)
    assert machine.states() == "off off"


def test_where_pinned_models_take_every_place_the_refusal_does_not_speak_of_memory() -> None:
    machine = Machine(ModelSpec("a", pinned=True), "b", policy=Policy(max_concurrent_models=1))
    machine.served("a")
    assert machine.rejected[machine.ask("b")].reason == (
        "'b' cannot be loaded beside a (pinned): max_concurrent_models is 1; change that limit or pin fewer models"
    )


def test_pinned_model_stays_whatever_a_client_says() -> None:
    machine = Machine(ModelSpec("a", pinned=True))
    request = machine.served("a")
    machine.tell(KeepAlive(machine.now, "a", 0.0))
    machine.finish(request)
    machine.wait(3600)
    assert machine.states() == "ready"


def test_pinned_model_that_was_ejected_is_in_nobodys_way() -> None:
    machine = Machine(ModelSpec("a", pinned=True), "b", stop_sec=3.0)
    machine.finish(machine.served("a"))
    machine.tell(Eject(machine.now, "a"))
    machine.ask("b")
    machine.wait(3.0)
    assert machine.states() == "off loading"


def test_memory_that_is_about_to_come_back_spares_a_second_victim() -> None:
    machine = Machine(*"abc", places=dict.fromkeys("abc", SMALL), stop_sec=3.0)
    for alias in "ab":
        machine.finish(machine.served(alias))
        machine.wait(30)
    machine.tell(Eject(machine.now, "a"))
    machine.ask("c")
    machine.wait(3.0)
    assert machine.states() == "off ready loading"


def test_requests_wait_until_memory_is_known() -> None:
    machine = Machine("a", budgets=None)
    machine.ask("a")
    assert machine.states() == "off"
    machine.tell(MemoryChanged(machine.now, GPU))
    assert machine.states() == "loading"


def test_memory_that_another_program_holds_is_waited_for_a_moment() -> None:
    machine = Machine("a")
    machine.tell(MemoryChanged(machine.now, {GPU0: 3}, {GPU0: 10}))
    patient = machine.ask("a")
    machine.wait(5)
    assert patient not in machine.rejected
    machine.tell(MemoryChanged(machine.now, GPU, {GPU0: 10}))
    assert machine.states() == "loading"


def test_memory_that_another_program_keeps_is_not_waited_for_twice() -> None:
    machine = Machine("a")
    machine.tell(MemoryChanged(machine.now, {GPU0: 3}, {GPU0: 10}))
    first = machine.ask("a")
    machine.wait(11)
    refusal = machine.rejected[first]
    assert refusal.refusal is Refusal.INSUFFICIENT_MEMORY
    assert "other programs hold 7 MiB on gpu0" in refusal.reason
    assert not refusal.is_final
    assert machine.ask("a") in machine.rejected
    machine.tell(MemoryChanged(machine.now, GPU, {GPU0: 10}))
    machine.ask("a")
    assert machine.states() == "loading"


def test_an_engine_that_takes_less_than_was_thought_leaves_room_for_another() -> None:
    machine = Machine("a", "b")
    machine.served("a")
    machine.ask("b")
    assert machine.states() == "ready off"
    machine.tell(EngineMeasured(machine.now, machine.engine("a"), {GPU0: 4}))
    assert machine.states() == "ready loading"


def test_an_engine_that_takes_more_than_was_thought_is_booked_with_it() -> None:
    machine = Machine("a", "b", places={"a": SMALL, "b": SMALL})
    machine.finish(machine.served("a"))
    machine.tell(EngineMeasured(machine.now, machine.engine("a"), {GPU0: 6}))
    machine.wait(60)
    machine.ask("b")
    assert machine.states() == "off loading"


def test_load_that_ran_out_of_memory_is_tried_once_more_with_room_for_what_it_wanted() -> None:
    machine = Machine("a", "b", places={"a": SMALL, "b": ({GPU0: 5},)}, load_sec=None)
    request = machine.ask("b")
    machine.tell(EngineReady(machine.now, machine.engine("b")))
    machine.finish(request)
    machine.wait(60)
    unlucky = machine.ask("a")
    assert machine.states() == "loading ready"
    machine.places = {"a": BIG}  # what the next look will find
    machine.tell(EngineExited(machine.now, machine.engine("a"), "cudaMalloc failed", out_of_memory=True))
    assert machine.states() == "loading off"
    assert unlucky not in machine.rejected
    machine.tell(EngineExited(machine.now, machine.engine("a"), "try -c 512", out_of_memory=True))
    assert machine.states() == "failed off"
    assert "try -c 512" in machine.rejected[unlucky].reason


def test_a_swap_is_given_up_when_memory_shrinks_below_its_need() -> None:
    machine = Machine("a", "b")
    machine.served("a")
    hopeless = machine.ask("b")
    machine.wait(60)
    assert machine.states() == "draining off"
    machine.tell(MemoryChanged(machine.now, {GPU0: 5}))
    assert machine.states() == "ready off"
    assert machine.rejected[hopeless].refusal is Refusal.INSUFFICIENT_MEMORY


# --- failures -------------------------------------------------------------------------------------------


def test_losing_ports_to_others_is_no_failure_and_does_not_spin_for_ever() -> None:
    machine = Machine("a", load_sec=None, policy=Policy(model_load_max_retries=1, free_port_races=2))
    request_id = machine.ask("a")
    starts = []
    while request_id not in machine.rejected:
        starts.append(machine.now)
        machine.tell(EngineExited(machine.now, machine.engine("a"), "no port", retry=Retry.AT_ONCE))
        while not machine.rejected and machine.states() != "loading":
            machine.wait(0.25)
    pauses = [after - before for before, after in itertools.pairwise(starts)]
    assert pauses[:3] == [0, 0, pytest.approx(1.25, abs=0.5)]
    assert max(pauses) < 2
    assert len(starts) == 22  # then it can't be bad luck
    assert "no port" in machine.rejected[request_id].reason
    machine.tell(Reset(machine.now, "a"))
    lucky = machine.ask("a")
    machine.tell(EngineExited(machine.now, machine.engine("a"), "no port", retry=Retry.AT_ONCE))
    machine.wait(0)
    assert machine.states() == "loading"
    assert lucky not in machine.rejected


def test_an_engine_that_does_not_take_its_flags_is_not_tried_again() -> None:
    machine = Machine("a", load_sec=None)
    request_id = machine.ask("a")
    refusal = "error: invalid argument: --nonsense"
    machine.tell(EngineExited(machine.now, machine.engine("a"), refusal, retry=Retry.NEVER))
    assert machine.states() == "failed"
    assert refusal in machine.rejected[request_id].reason
    assert machine.rejected[request_id].is_final
    assert machine.rejected[machine.ask("a")].is_final


def test_failed_load_is_tried_again_after_a_pause_that_doubles() -> None:
    machine = Machine("a", load_sec=None)
    request_id = machine.ask("a")
    starts = []
    for _ in range(3):
        starts.append(machine.now)
        machine.tell(EngineExited(machine.now, machine.engine("a"), "out of memory"))
        while not machine.rejected and machine.states() != "loading":
            machine.wait(0.25)
    first, second = starts[1] - starts[0], starts[2] - starts[1]
    assert 1.0 <= first <= 1.5 + 0.25
    assert 2.0 <= second <= 3.0 + 0.25
    rejected = machine.rejected[request_id]
    assert rejected.refusal is Refusal.MODEL_FAILED
    assert "out of memory" in rejected.reason
    assert rejected.retry_after_sec == 300
    assert machine.states() == "failed"


def test_models_that_failed_together_do_not_return_together() -> None:
    aliases = [f"m{number}" for number in range(8)]
    machine = Machine(*aliases, places=dict.fromkeys(aliases, ({GPU0: 1},)), load_sec=None)
    machine.policy = Policy(max_concurrent_models=8)
    machine.configure(*aliases)
    for alias in aliases:
        machine.ask(alias)
    for alias in aliases:
        machine.tell(EngineExited(machine.now, machine.engine(alias), "the driver was reset"))
    pauses = {machine.scheduler.models[alias].retry_at_sec for alias in aliases}
    assert len(pauses) == 8
    assert all(1.0 <= pause <= 1.5 for pause in pauses)


def test_engine_that_serves_and_dies_again_and_again_fails_in_the_end() -> None:
    machine = Machine("a", load_sec=2.0, policy=Policy(model_load_max_retries=0, model_max_crashes=4))
    for crashes in range(1, 4):
        request_id = machine.ask("a")
        machine.wait(20)
        machine.finish(request_id)
        waiting = machine.ask("a")  # it kills the engine, and each that follows
        machine.tell(EngineExited(machine.now, machine.engine("a"), "signal 11"))
        machine.tell(Requeue(machine.now, waiting, "connection reset"))
        assert machine.states() != "failed", crashes
        pause = machine.scheduler.models["a"].retry_at_sec - machine.now
        assert pause == 0.0 if crashes == 1 else 2.0 ** (crashes - 2) <= pause <= 1.5 * 2.0 ** (crashes - 2)
        machine.wait(20)
        machine.finish(waiting)
    waiting = machine.ask("a")
    machine.tell(EngineExited(machine.now, machine.engine("a"), "signal 11"))
    machine.tell(Requeue(machine.now, waiting, "connection reset"))
    assert machine.states() == "failed"
    rejected = machine.rejected[waiting]
    assert "crashed 4 times in 100 s, most recently: signal 11" in rejected.reason
    assert rejected.retry_after_sec == 300


def test_crashes_far_apart_are_accidents() -> None:
    machine = Machine(
        "a", policy=Policy(model_max_crashes=2, model_crash_window_sec=60, idle_timeout_sec=math.inf)
    )
    for _ in range(5):
        machine.finish(machine.served("a"))
        machine.tell(EngineExited(machine.now, machine.engine("a"), "signal 11"))
        assert machine.states() == "off"
        machine.wait(61)


def test_reset_forgets_crashes_too() -> None:
    machine = Machine("a", policy=Policy(model_max_crashes=2))
    for _ in range(5):
        machine.finish(machine.served("a"))
        machine.tell(EngineExited(machine.now, machine.engine("a"), "signal 11"))
        machine.tell(Reset(machine.now, "a"))
    assert machine.states() == "off"


def test_a_crashed_engine_comes_back_for_those_who_wait_and_for_nobody_else() -> None:
    machine = Machine("a", "b", budgets={GPU0: 12})
    machine.finish(machine.served("a"), machine.served("b"))
    waiting = machine.ask("b")
    for alias in "ab":
        machine.tell(EngineExited(machine.now, machine.engine(alias), "signal 9"))
    machine.tell(Requeue(machine.now, waiting, "connection reset"))
    machine.wait(60)
    assert machine.states("ab") == "off ready"


def failed_machine() -> Machine:
    machine = Machine("a", load_sec=None, policy=Policy(model_load_max_retries=0))
    machine.ask("a")
    machine.tell(EngineExited(0.0, machine.engine("a"), "out of memory"))
    assert machine.states() == "failed"
    return machine


def test_failed_model_refuses_until_its_cooldown_is_over() -> None:
    machine = failed_machine()
    machine.wait(100)
    assert machine.rejected[machine.ask("a")].retry_after_sec == 200
    machine.wait(200)
    assert machine.states() == "off"
    machine.ask("a")
    assert machine.states() == "loading"


def test_reset_ends_the_cooldown() -> None:
    machine = failed_machine()
    machine.tell(Reset(machine.now, "a"))
    machine.ask("a")
    assert machine.states() == "loading"


def test_a_changed_entry_ends_the_cooldown() -> None:
    machine = failed_machine()
    machine.configure(ModelSpec("a", revision="fewer layers"))
    assert machine.states() == "off"


def test_crash_sends_the_request_back_to_the_head_of_its_line_once() -> None:
    machine = Machine("a")
    first = machine.served("a")
    second = machine.ask("a")
    machine.tell(EngineExited(machine.now, machine.engine("a"), "signal 9"))
    machine.tell(Requeue(machine.now, first, "connection reset"))
    assert machine.states() == "off"  # it has never served: a second's pause
    machine.wait(1.5 + 8.0)
    assert first in machine.granted
    assert second not in machine.granted
    machine.tell(EngineExited(machine.now, machine.engine("a"), "signal 9"))
    machine.tell(Requeue(machine.now, first, "connection reset"))
    assert machine.rejected[first].refusal is Refusal.MODEL_FAILED
    assert "2 times" in machine.rejected[first].reason
    assert second not in machine.rejected


def test_memory_of_a_dead_engine_is_counted_on_while_it_comes_back() -> None:
    machine = Machine(*"abc", places=dict.fromkeys("abc", SMALL), load_sec=2.0)
    for alias in "ba":
        machine.finish(machine.served(alias))
        machine.wait(30)
    dead = machine.engine("a")
    machine.tell(EngineLost(machine.now, dead))
    machine.ask("c")
    machine.wait(1.0)
    machine.tell(EngineExited(machine.now, dead, "signal 9"))
    assert machine.states() == "off ready loading"


def test_a_crash_counts_as_one_when_somebody_wants_its_memory() -> None:
    machine = Machine("a", "b", policy=Policy(model_max_crashes=1))
    machine.finish(machine.served("a"))
    machine.wait(30)
    dead = machine.engine("a")
    machine.tell(EngineLost(machine.now, dead))
    machine.ask("b")
    machine.tell(EngineExited(machine.now, dead, "signal 9"))
    assert machine.states() == "failed loading"


def test_engine_that_has_served_is_back_at_once_after_a_crash() -> None:
    machine = Machine("a")
    machine.finish(machine.served("a"))
    busy = machine.ask("a")
    machine.tell(EngineExited(machine.now, machine.engine("a"), "signal 9"))
    machine.tell(Requeue(machine.now, busy, "connection reset"))
    assert machine.states() == "loading"


def test_suspect_engine_admits_nobody_until_it_has_answered() -> None:
    machine = Machine(ModelSpec("a", slots=2))
    broken = machine.served("a")
    effects = machine.tell(Requeue(machine.now, broken, "connection reset"))
    assert Probe(machine.engine("a")) in effects
    other = machine.ask("a")
    assert other not in machine.granted
    machine.tell(EngineAlive(machine.now, machine.engine("a")))
    assert machine.granted_sec[other] == machine.now


def test_one_probe_for_all_requests_that_broke_together() -> None:
    machine = Machine(ModelSpec("a", slots=2))
    first, second = machine.ask("a"), machine.ask("a")
    machine.wait(8.0)
    machine.tell(Requeue(machine.now, first, "connection reset"))
    machine.tell(Requeue(machine.now, second, "connection reset"))
    assert sum(isinstance(effect, Probe) for effect in machine.effects) == 1
    assert [each.id for each in machine.scheduler.models["a"].queue] == [first, second]


def test_slow_stop_of_one_model_does_not_delay_another() -> None:
    machine = Machine(*"abc", places=dict.fromkeys("abc", SMALL), stop_sec=None)
    machine.finish(machine.served("a"))
    machine.wait(30)
    machine.finish(machine.served("b"))
    machine.wait(1)
    machine.ask("c")
    assert machine.states() == "stopping ready off"
    assert machine.ask("b") in machine.granted


# --- nobody waits any more ------------------------------------------------------------------------------


def test_load_that_nobody_waits_for_is_abandoned_after_a_grace_time() -> None:
    machine = Machine("a", load_sec=60)
    impatient = machine.ask("a")
    machine.wait(1)
    machine.tell(Finished(machine.now, impatient, served=False))
    machine.wait(4.9)
    assert machine.states() == "loading"
    machine.wait(0.2)
    assert machine.stops("a") == ["abandoned"]


def test_load_goes_on_when_somebody_else_comes_in_time() -> None:
    machine = Machine("a", load_sec=60)
    impatient = machine.ask("a")
    machine.tell(Finished(machine.now, impatient, served=False))
    machine.wait(4)
    patient = machine.ask("a")
    machine.wait(56)
    assert patient in machine.granted


def test_load_by_hand_is_not_abandoned() -> None:
    machine = Machine("a", load_sec=60)
    machine.tell(Load(machine.now, "a"))
    impatient = machine.ask("a")
    machine.tell(Finished(machine.now, impatient, served=False))
    machine.wait(60)
    assert machine.states() == "ready"


def test_full_queue_refuses_with_the_time_to_come_back() -> None:
    machine = Machine("a", policy=Policy(max_queue_size_per_model=2))
    first = machine.served("a")
    machine.wait(1)
    machine.finish(first)  # now it is known what a request takes
    machine.ask("a")  # in flight; bounds count who waits, also while the model is ready
    machine.ask("a")
    machine.ask("a")
    refused = machine.rejected[machine.ask("a")]
    assert refused.refusal is Refusal.QUEUE_FULL
    assert refused.retry_after_sec == pytest.approx(3.0)  # three rounds of a second


def test_who_comes_to_a_full_queue_takes_the_place_of_the_lowest_and_newest() -> None:
    machine = Machine("a", load_sec=None, policy=Policy(max_queue_size_per_model=4))
    older, newer = machine.ask("a", LOW), machine.ask("a", LOW)
    normal, _ = machine.ask("a", NORMAL), machine.ask("a", NORMAL)
    urgent = machine.ask("a", HIGH)
    assert machine.rejected[newer].refusal is Refusal.DISPLACED
    assert machine.rejected[newer].reason == (
        "4 requests are already waiting for 'a' (max_queue_size_per_model), "
        "and a request of higher priority has arrived"
    )
    assert machine.rejected.keys() == {newer}
    assert machine.rejected[machine.ask("a", LOW)].refusal is Refusal.QUEUE_FULL  # for his like nobody goes
    machine.ask("a", NORMAL)
    assert older in machine.rejected
    refused = machine.ask("a", NORMAL)
    assert machine.rejected[refused].refusal is Refusal.QUEUE_FULL
    for _ in range(3):
        machine.ask("a", HIGH)
    assert normal in machine.rejected
    assert urgent not in machine.rejected
    assert machine.rejected[machine.ask("a", HIGH)].refusal is Refusal.QUEUE_FULL


def test_where_all_lines_together_are_full_the_lowest_of_any_gives_way() -> None:
    machine = Machine("a", "b", "c", load_sec=None, policy=Policy(max_queue_size_total=3))
    machine.ask("a", NORMAL)
    of_b, of_c = machine.ask("b", LOW), machine.ask("c", LOW)
    machine.ask("a", NORMAL)
    assert machine.rejected.keys() == {of_c}
    assert "c" not in machine.scheduler._waiting  # nobody is left to load it for
    machine.ask("a", NORMAL)
    assert machine.rejected.keys() == {of_c, of_b}
    refused = machine.ask("a", NORMAL)
    assert machine.rejected[refused].refusal is Refusal.QUEUE_FULL
    machine.ask("b", HIGH)
    assert len(machine.rejected) == 4


def test_who_has_a_slot_is_displaced_by_nobody() -> None:
    machine = Machine("a")
    served, waits = machine.served("a"), machine.ask("a", LOW)
    for request_id in (served, waits, "unknown"):
        machine.tell(Displace(machine.now, request_id, "no room"))
    assert machine.rejected.keys() == {waits}
    assert machine.rejected[waits].reason == "no room"


def test_who_is_turned_away_is_told_nothing_that_nobody_knows() -> None:
    machine = Machine("a", policy=Policy(max_queue_size_per_model=1))
    machine.ask("a")
    assert machine.rejected[machine.ask("a")].retry_after_sec is None, "it was never loaded"
    machine.wait(8)
    machine.ask("a")
    assert machine.rejected[machine.ask("a")].retry_after_sec is None, "nothing was ever computed"


def test_what_takes_longer_than_ever_before_lengthens_the_expected_wait() -> None:
    machine = Machine("a", policy=Policy(max_queue_size_per_model=1))
    first = machine.served("a")
    machine.wait(1)
    machine.finish(first)
    machine.ask("a")
    machine.ask("a")
    machine.wait(40)  # who has taken so long may take half as long again
    assert machine.rejected[machine.ask("a")].retry_after_sec == pytest.approx(20 + 1)


def test_queue_timeout_says_what_the_request_waited_for() -> None:
    machine = Machine("a", "b", policy=Policy(queue_timeout_sec=20))
    machine.served("a")
    waiting = machine.ask("b")
    machine.wait(19.9)
    assert waiting not in machine.rejected
    machine.wait(0.2)
    refused = machine.rejected[waiting]
    assert refused.refusal is Refusal.QUEUE_TIMEOUT
    assert "waited 20 s (queue_timeout_sec) for 'b': no room until a can be unloaded" in refused.reason
    assert not machine.scheduler._waiting


def test_all_models_together_have_a_bound_too() -> None:
    machine = Machine("a", "b", load_sec=None, policy=Policy(max_queue_size_total=3))
    first, *_ = [machine.ask(alias) for alias in "aab"]
    refused = machine.rejected[machine.ask("b")]
    assert refused.refusal is Refusal.QUEUE_FULL
    assert refused.reason == "3 requests are already waiting, 1 of them for 'b' (max_queue_size_total)"
    machine.finish(first)  # it goes away
    assert machine.ask("b") not in machine.rejected


def expected_sec(machine: Machine, alias: str, priority: Priority = NORMAL) -> float | None:
    """Until a request that comes now would be served."""
    deadline_sec = machine.now + machine.policy.patience_sec[priority]
    newcomer = Request("newcomer", alias, priority, machine.now, deadline_sec, 0)
    return machine.scheduler.forecast(machine.now, newcomer).wait_sec("newcomer", machine.now)


def test_expected_wait_follows_what_was_measured() -> None:
    machine = Machine("a", load_sec=10.0)
    assert expected_sec(machine, "a") is None  # nobody knows how long it loads
    request_id = machine.served("a")
    machine.wait(6)
    machine.finish(request_id)
    assert expected_sec(machine, "a") == 0  # a slot is free
    machine.ask("a")
    assert expected_sec(machine, "a") == 6
    machine.ask("a", LOW)
    assert expected_sec(machine, "a", HIGH) == expected_sec(machine, "a") == 6  # low ones are not in their way
    expected_low_sec = expected_sec(machine, "a", LOW)
    assert expected_low_sec is not None
    assert expected_low_sec >= 12, "behind the other low one, and whoever comes with a shorter patience"
    machine.tell(Eject(machine.now, "a"))
    assert expected_sec(machine, "a") == 6 + 10  # what is in flight, then the load


def test_expected_waits_know_of_the_turns_of_other_models() -> None:
    """Two models without room for both, and clients without think time on both: who waits is told the turns."""
    machine = Machine("a", "b", load_sec=5.0)
    for alias in "ab":  # now it is known what they take
        request_id = machine.served(alias)
        machine.wait(1)
        machine.finish(request_id)
        machine.wait(60)
    machine.service_sec = 1.0
    keep_busy(machine, "a", clients=2, seconds=20)
    waiting = [machine.ask("b") for _ in range(3)]
    forecast = machine.scheduler.forecast(machine.now)
    told = [forecast.wait_sec(request_id, machine.now) for request_id in waiting]
    asked_sec = machine.now
    keep_busy(machine, "a", clients=2, seconds=60)
    waited = [machine.granted_sec[request_id] - asked_sec for request_id in waiting]
    assert waited[0] > 20, "the turn of a comes first"
    assert told == pytest.approx(waited, abs=1.5)


def test_expected_waits_know_who_will_overtake() -> None:
    """A low request behind a stream of normal ones that leaves nothing over waits until its patience counts."""
    machine = Machine("a", load_sec=5.0, service_sec=1.0)
    keep_busy(machine, "a", clients=4, seconds=60)
    low = machine.ask("a", LOW)
    told = machine.scheduler.forecast(machine.now).wait_sec(low, machine.now)
    asked_sec = machine.now
    keep_busy(machine, "a", clients=4, seconds=150)
    waited_sec = machine.granted_sec[low] - asked_sec
    assert waited_sec > 100
    assert told == pytest.approx(waited_sec, rel=0.15)


def test_expected_waits_know_that_low_ones_are_left_behind_where_a_high_one_waits() -> None:
    """Once only low ones are left on an engine, a high request for another model sends it away long before its
    turn ends."""
    machine = Machine("a", "b", load_sec=5.0, service_sec=1.0)
    for alias in "ab":
        machine.served(alias)
        machine.wait(12)
        machine.ask(alias, HIGH)
        machine.wait(3)
    for _ in range(4):
        machine.ask("b")
    low = [machine.ask("b", LOW) for _ in range(3)]
    high = machine.ask("a", HIGH)
    forecast = machine.scheduler.forecast(machine.now)
    told = {request_id: forecast.wait_sec(request_id, machine.now) for request_id in (high, *low)}
    asked_sec = machine.now
    machine.wait(60)
    assert told == pytest.approx({each: machine.granted_sec[each] - asked_sec for each in told}, abs=2.5)
    assert machine.granted_sec[high] - asked_sec == 10, (
        "four normal ones, the low one that gets their slot, the load"
    )
    assert machine.granted_sec[low[1]] > machine.granted_sec[high]


def test_several_that_take_longer_than_ever_may_be_the_first_of_many() -> None:
    machine = Machine(ModelSpec("a", slots=4), service_sec=1.0)
    for _ in range(10):
        machine.ask("a")
        machine.wait(10)
    machine.service_sec = None
    for _ in range(8):  # four have their slots, four wait
        machine.ask("a")
    machine.wait(20)
    told_sec = expected_sec(machine, "a")
    assert told_sec is not None
    assert 20 < told_sec < 30, "ten until those in flight are done, then more than a second"


def test_answers_that_are_others_than_before_are_followed_at_once() -> None:
    """Three long ones after sixty short ones: the mean of all says little of what comes."""
    machine = Machine("a", service_sec=1.0)
    for service_sec in [1.0, 1.2] * 30 + [20.0, 24.0, 22.0]:
        machine.service_sec = service_sec
        machine.ask("a")
        machine.wait(30)
    assert machine.scheduler.models["a"].service_sec([]) == 22


def test_chance_is_no_change() -> None:
    chance = random.Random(5)
    changes = 0
    for _ in range(200):
        values = [chance.expovariate(1) for _ in range(64)]
        changes += len(since_it_changed(values)) < 64
    assert changes < 20
    assert since_it_changed([]) == []
    assert since_it_changed([1, 2, 3, 40]) == [1, 2, 3, 40], "one may always be another"


def test_how_long_requests_take_is_learnt_of_computed_tokens_only() -> None:
    machine = Machine(ModelSpec("a", slots=2))
    model = machine.scheduler.models["a"]
    slow = machine.served("a")
    machine.wait(20)
    machine.finish(slow)
    for _ in range(20):  # refused, or only counted
        quick = machine.ask("a")
        machine.wait(0.002)
        machine.tell(Finished(machine.now, quick, computed=False))
    assert model.service_sec([]) == 20


def test_an_engine_that_answers_but_never_computes_has_proved_nothing() -> None:
    machine = Machine("a", policy=Policy(model_load_max_retries=2, model_max_crashes=100))
    for _ in range(3):
        counted = machine.ask("a")
        machine.wait(machine.policy.max_backoff_sec)
        machine.tell(Finished(machine.now, counted, computed=False))
        machine.tell(EngineExited(machine.now, machine.engine("a"), "killed by SIGSEGV"))
    assert machine.states() == "failed"


class Crowded(Machine):
    """Random clients for all models, with answers of random length; none has a higher priority than others."""

    mean_service_sec = 1.0
    chance = random.Random(1)

    def carry_out(self, effect: Effect) -> None:
        super().carry_out(effect)
        if isinstance(effect, Grant):
            self.after(
                self.chance.expovariate(1 / self.mean_service_sec), lambda: Finished(self.now, effect.request_id)
            )

    def promises(self, seconds: float, per_sec: float) -> list[float]:
        """Of each that was turned away: the promised wait ÷ that of who stood last before it, and one round."""
        told: list[tuple[float, float, list[str]]] = []
        while self.now < seconds:
            self.wait(self.chance.expovariate(per_sec))
            alias = self.chance.choice(list(self.specs))
            line = [each.id for each in self.scheduler.models[alias].queue]
            rejected = self.rejected.get(self.ask(alias))
            if rejected is not None and line and rejected.retry_after_sec is not None:
                told.append((self.now, rejected.retry_after_sec, line))
        self.wait(2000)
        round_sec = self.mean_service_sec / next(iter(self.specs.values())).slots
        waits = [
            (max(self.granted_sec[each] for each in line) - at + round_sec, promised)
            for at, promised, line in told
        ]
        return sorted(promised / max(1.0, wait) for wait, promised in waits)


@pytest.mark.parametrize(
    ("aliases", "slots", "per_sec", "service_sec", "factor"),
    [("a", 1, 1.5, 1.0, 2), ("a", 4, 3.0, 2.0, 2), ("ab", 1, 2.0, 1.0, 3), ("abc", 2, 4.0, 1.0, 3)],
    ids=["one slot", "four slots", "two models take turns", "three models take turns"],
)
def test_who_is_turned_away_is_told_when_to_come_back(
    aliases: str, slots: int, per_sec: float, service_sec: float, factor: float
) -> None:
    """Three of four within a factor of two; of three where swaps come in between."""
    policy = Policy(max_queue_size_per_model=30, queue_timeout_sec=1e6)
    machine = Crowded(*(ModelSpec(alias, slots=slots) for alias in aliases), policy=policy)
    machine.mean_service_sec = service_sec
    kept = machine.promises(1000, per_sec)
    assert len(kept) > 100
    within = sum(1 / factor <= promise <= factor for promise in kept) / len(kept)
    assert within > 0.75
    assert 0.8 < kept[len(kept) // 2] < 1.6


def test_however_many_are_turned_away_at_once_nobody_waits_for_what_they_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[float] = []

    def costly(scheduler: Scheduler, now: float, newcomer: Request) -> Forecast:
        made.append(now)
        return Forecast(now, {newcomer.id: now + 7}, steps=4_000)

    monkeypatch.setattr(Scheduler, "forecast", costly)
    models = [f"m{number}" for number in range(100)]
    machine = Machine("busy", *models, policy=Policy(queue_timeout_sec=20))
    machine.served("busy")
    waiting = [machine.ask(model) for model in models for _ in range(3)]
    machine.wait(21)
    told = [machine.rejected[request].retry_after_sec for request in waiting]
    assert (len(made), set(told)) == (2, {7.0, None}), "as many as the budget has steps for, and no more"
    machine.ask("m1")
    machine.wait(21)
    assert len(made) == 3


# --- models that are to be there ------------------------------------------------------------------------


def crash(machine: Machine, alias: str) -> None:
    engine = machine.engine(alias)
    machine.tell(EngineLost(machine.now, engine))
    machine.tell(EngineExited(machine.now, engine, "killed by SIGSEGV"))


def test_an_engine_that_is_kept_is_replaced_without_a_request_and_with_growing_pauses() -> None:
    machine = Machine(ModelSpec("a", kept=True), "b", places=dict.fromkeys("ab", SMALL))
    for alias in "ab":
        machine.finish(machine.served(alias))
    for alias in "ab":
        crash(machine, alias)
    assert machine.states() == "loading off"  # it has served: at once, the first time
    pauses = []
    for _ in range(2):
        machine.wait(8)
        assert machine.states() == "ready off"
        crash(machine, "a")
        since = machine.now
        machine.wait(machine.scheduler.wake_at - machine.now)
        pauses.append(machine.now - since)
        assert machine.states() == "loading off"
    assert 1 <= pauses[0] < 2 <= pauses[1] < 4
    machine.wait(8)
    crash(machine, "a")
    assert machine.states() == "failed off"
    assert machine.scheduler.models["a"].tries == 4
    machine.wait(machine.policy.model_load_cooldown_sec + 8)
    assert machine.states() == "ready off"
    assert machine.scheduler.models["a"].tries == 0


def test_an_engine_that_is_kept_comes_back_when_there_is_room_and_takes_none_from_others() -> None:
    machine = Machine(ModelSpec("a", kept=True), "b", load_sec=8.0)
    machine.finish(machine.served("a"))
    machine.ask("b", HIGH)
    crash(machine, "a")
    machine.wait(60)
    assert machine.states() == "off ready"
    machine.tell(Eject(machine.now, "b"))
    machine.finish(*machine.granted)
    machine.wait(8)
    assert machine.states() == "ready off"


def test_an_engine_that_is_kept_no_more_does_not_come_back() -> None:
    machine = Machine(ModelSpec("a", kept=True), "b")
    machine.finish(machine.served("a"))
    machine.ask("b", HIGH)
    crash(machine, "a")
    machine.wait(60)
    assert machine.states() == "off ready"
    machine.tell(Configured(machine.now, {**machine.specs, "a": ModelSpec("a")}, machine.policy))
    machine.tell(Eject(machine.now, "b"))
    machine.finish(*machine.granted)
    machine.wait(60)
    assert machine.states() == "off off"


def test_an_engine_that_is_kept_does_not_come_back_from_where_it_was_sent() -> None:
    machine = Machine(ModelSpec("a", kept=True))
    machine.finish(machine.served("a"))
    crash(machine, "a")
    machine.tell(Eject(machine.now, "a"))
    machine.wait(60)
    assert machine.states() == "off"


# --- idle models ----------------------------------------------------------------------------------------


def test_idle_models_go_except_the_most_recently_used() -> None:
    tiny = ({GPU0: 1},)
    policy = Policy(idle_timeout_sec=60, keep_warm_models=2)
    machine = Machine(*"abc", places=dict.fromkeys("abc", tiny), policy=policy)
    for alias in "abc":
        machine.finish(machine.served(alias))
    machine.wait(3600)
    assert machine.states() == "off ready ready"
    assert machine.stops("a") == ["idle"]


def test_a_warm_model_goes_when_another_takes_its_place() -> None:
    tiny = ({GPU0: 1},)
    policy = Policy(idle_timeout_sec=60, keep_warm_models=1)
    machine = Machine(*"ab", places=dict.fromkeys("ab", tiny), policy=policy)
    machine.finish(machine.served("a"))
    machine.wait(3600)
    machine.served("b")
    assert machine.states() == "off ready"


def test_a_models_own_idle_timeout_counts_even_when_it_is_warm() -> None:
    machine = Machine(ModelSpec("a", idle_timeout_sec=5), policy=Policy(keep_warm_models=2))
    machine.finish(machine.served("a"))
    machine.wait(5.1)
    assert machine.states() == "off"


def test_no_request_costs_a_look_at_all_models() -> None:
    tiny = ({GPU0: 1},)
    machine = Machine(ModelSpec("a", idle_timeout_sec=600), *"bcd", places=dict.fromkeys("abcd", tiny))
    for alias in "abcd":
        machine.finish(machine.served(alias))
    machine.wait(290)  # there has been a look at who is used
    looks = 0
    for number in range(120):
        request_id = machine.ask("abcd"[number % 4])
        machine.tell(KeepAlive(machine.now, "b", 1800.0))
        looks += machine.scheduler.wake_at <= machine.now
        machine.finish(request_id)
        machine.wait(1)
    assert looks < 5


def test_a_busy_model_is_not_idle_however_long_it_takes() -> None:
    machine = Machine("a", policy=Policy(idle_timeout_sec=60, keep_warm_models=0, queue_timeout_sec=9999))
    request_id = machine.served("a")
    machine.wait(3600)
    assert machine.states() == "ready"
    machine.finish(request_id)
    machine.wait(60)
    assert machine.states() == "off"


# --- operators ------------------------------------------------------------------------------------------


def test_load_by_hand_may_cost_another_model_its_place() -> None:
    machine = Machine("a", "b")
    machine.finish(machine.served("a"))
    machine.wait(60)
    machine.tell(Load(machine.now, "b"))
    assert machine.states() == "off loading"


def test_preload_never_evicts() -> None:
    machine = Machine("a", "b")
    machine.tell(Load(machine.now, "a", evict=False))
    machine.tell(Load(machine.now, "b", evict=False))
    machine.wait(60)
    assert machine.states() == "ready off"
    assert "not preloaded" in next(
        effect.reason for effect in machine.effects if isinstance(effect, Transition) and effect.alias == "b"
    )


@pytest.mark.parametrize("end", [lambda now: Eject(now, "b"), lambda now: Configured(now, {}, Policy()), ShutDown])
def test_who_waits_for_a_load_is_told_when_it_is_given_up(end: Callable[[float], Event]) -> None:
    machine = Machine("a", "b")
    machine.served("a")
    machine.tell(Load(machine.now, "b"))
    told = [effect for effect in machine.tell(end(machine.now)) if isinstance(effect, Transition)]
    assert [effect.state for effect in told if effect.alias == "b"] == ["off"]


def test_a_load_asked_for_while_the_engine_drained_is_done_with_when_it_stays() -> None:
    machine = Machine("a", "b")
    busy = machine.served("a")
    impatient = machine.ask("b")
    machine.wait(60)
    machine.tell(Load(machine.now, "a"))
    machine.tell(Finished(machine.now, impatient, served=False))
    machine.finish(busy)
    machine.tell(Eject(machine.now, "a"))
    machine.wait(60)
    assert machine.states() == "off off"


def test_eject_lets_what_is_in_flight_finish() -> None:
    machine = Machine("a")
    busy = machine.served("a")
    machine.tell(Eject(machine.now, "a"))
    assert machine.states() == "draining"
    machine.finish(busy)
    assert machine.states() == "off"
    assert machine.stops("a") == ["manual"]


def test_eject_with_a_queue_loads_again() -> None:
    machine = Machine("a")
    busy = machine.served("a")
    waiting = machine.ask("a")
    machine.tell(Eject(machine.now, "a"))
    machine.finish(busy)
    machine.wait(8.0)
    assert waiting in machine.granted


def test_reload_leaves_unchanged_models_alone_and_drains_changed_ones() -> None:
    machine = Machine(*"ab", places=dict.fromkeys("ab", SMALL))
    machine.served("a")
    busy = machine.served("b")
    waiting = machine.ask("b")
    machine.configure("a", ModelSpec("b", revision="other flags"))
    assert machine.states() == "ready draining"
    machine.finish(busy)
    assert machine.states() == "ready loading"
    machine.wait(8.0)
    assert waiting in machine.granted
    assert not machine.rejected


def test_reload_that_adds_and_removes_models() -> None:
    machine = Machine("a")
    busy = machine.served("a")
    waiting = machine.ask("a")
    machine.configure("b")
    assert machine.rejected[waiting].refusal is Refusal.MODEL_NOT_FOUND
    assert machine.rejected[machine.ask("a")].refusal is Refusal.MODEL_NOT_FOUND
    machine.finish(busy)
    assert list(machine.scheduler.models) == ["b"]
    machine.ask("b")
    assert machine.states() == "loading"


def test_removed_model_that_comes_back_while_it_drains_is_served_again() -> None:
    machine = Machine("a")
    busy = machine.served("a")
    machine.configure()
    machine.configure("a")
    again = machine.ask("a")
    machine.finish(busy)
    machine.wait(8.0)
    assert again in machine.granted


def test_reload_of_a_model_room_is_made_for_looks_at_it_afresh() -> None:
    machine = Machine("a", "b")
    machine.served("a")
    machine.ask("b")
    machine.wait(60)
    assert machine.states() == "draining off"
    machine.places = {"b": ({GPU0: 4},)}
    machine.configure("a", ModelSpec("b", revision="smaller context"))
    assert machine.states() == "ready loading"


def test_shorter_idle_timeout_takes_effect_at_once() -> None:
    policy = Policy(keep_warm_models=0)
    machine = Machine("a", policy=policy)
    machine.finish(machine.served("a"))
    machine.wait(100)
    machine.configure("a", policy=replace(policy, idle_timeout_sec=60))
    machine.wait(0)
    assert machine.states() == "off"


def test_shutdown_answers_who_waits_and_lets_the_rest_finish() -> None:
    machine = Machine("a")
    busy = machine.served("a")
    waiting = machine.ask("a")
    machine.tell(ShutDown(machine.now))
    assert machine.rejected[waiting].refusal is Refusal.SHUTTING_DOWN
    assert machine.rejected[machine.ask("a")].refusal is Refusal.SHUTTING_DOWN
    assert machine.states() == "draining"
    machine.finish(busy)
    assert not machine.scheduler.engines
    assert machine.stops("a") == ["shutdown"]


def test_shutdown_during_a_swap_lets_nobody_in_through_the_back_door() -> None:
    machine = Machine(ModelSpec("a", slots=2), "b")
    machine.served("a")
    machine.ask("b")
    machine.wait(60)
    late = machine.ask("a")
    machine.tell(ShutDown(machine.now))
    assert machine.rejected[late].refusal is Refusal.SHUTTING_DOWN
    assert machine.stops("a") == []


def test_unknown_model_is_not_found() -> None:
    machine = Machine("a")
    assert machine.rejected[machine.ask("z")].refusal is Refusal.MODEL_NOT_FOUND


def test_bounds_of_waiting_are_policy() -> None:
    patient = Policy(max_wait_sec=ByPriority(0, 200, 300), wait_factor=ByPriority(0, 100, 100))
    machine = Machine("a", "b", policy=patient)
    machine.served("a")
    machine.ask("b")
    machine.wait(199)
    assert machine.states() == "ready off"
    machine.wait(2)
    assert machine.states() == "draining off"


def test_stops_are_told_with_their_cause() -> None:
    machine = Machine("a")
    machine.finish(machine.served("a"))
    effects = machine.tell(Eject(machine.now, "a"))
    assert StopEngine(1, StopCause.MANUAL) in effects
