"""Who goes for a model that waits: `decide`, asked about machines that are described in a line.

A machine has one GPU of 10 (MiB), or two, and takes three engines. Everything takes 8 s to load, unless a row says
otherwise, so a swap costs 16 s; it is 1000 s past some beginning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from gpus import GPU0, GPU1

from router.scheduling.eviction import Fits, MakeRoom, NeverFits, Room, Wait, cheapest_victims, decide, outlook
from router.scheduling.messages import EngineState, Inspected, ModelSpec, Placement
from router.scheduling.policy import Policy
from router.scheduling.queue import Priority, Request
from router.scheduling.residency import ENGINES, Engine, Hold, Model, take
from router.system.devices import HOST, Device

NOW = 1000.0
POLICY = Policy(max_linger_sec=30, residency_factor=4, max_concurrent_models=3)
BOUND_SEC = POLICY.max_wait_sec[Priority.NORMAL]
QUANTUM_SEC = POLICY.residency_factor * 16
HIGH, NORMAL, LOW = Priority


@dataclass(frozen=True)
class Resident:
    """A model with an engine."""

    alias: str
    takes: Placement
    state: EngineState = EngineState.READY
    idle_sec: float | None = 500
    """None: it has a request in flight."""
    ready_for_sec: float = 900
    priority: Priority = NORMAL
    waiting: int = 0
    pinned: bool = False
    load_sec: float = 8
    wanted_every_sec: float = 3600

    def model(self, number: int) -> Model:
        spec = ModelSpec(self.alias, pinned=self.pinned)
        model = Model(spec, self.load_sec, mean_gap_sec=self.wanted_every_sec, last_used_sec=NOW)
        engine = Engine(number, spec, {**self.takes, ENGINES: 1}, 0.0, self.state, NOW - self.ready_for_sec)
        if self.idle_sec is not None:
            engine.idle_since_sec = model.last_used_sec = NOW - self.idle_sec
        else:
            engine.in_flight = {f"in flight {self.alias}": self.priority}
        for each in range(self.waiting):
            model.queue.push(waiting(f"{self.alias} {each}", self.alias, NORMAL, 1, each))
        model.engines.append(engine)
        return model


def waiting(name: str, alias: str, priority: Priority, since_sec: float, seq: int = 0) -> Request:
    arrival = NOW - since_sec
    return Request(name, alias, priority, arrival, arrival + POLICY.patience_sec[priority], seq)


@dataclass(frozen=True)
class Machine:
    residents: tuple[Resident, ...] = ()
    budgets: Placement | None = None
    capacity: Placement | None = None
    promised: tuple[str, ...] = ()
    """Models whose engines make room for `ahead` already."""
    policy: Policy = POLICY


@dataclass(frozen=True)
class Candidate:
    places: tuple[Placement, ...] = ({GPU0: 6},)
    waits_sec: float = 1
    priority: Priority = NORMAL


def ask(machine: Machine, candidate: Candidate) -> Fits | MakeRoom | Wait | NeverFits:
    inspected, room = before(machine, candidate)
    return decide(room.models["new"], inspected, room)


def before(machine: Machine, candidate: Candidate) -> tuple[Inspected, Room]:
    models = {each.alias: each.model(number) for number, each in enumerate(machine.residents, 1)}
    engines = [engine for model in models.values() for engine in model.engines]
    budgets = {**(machine.budgets or {GPU0: 10}), ENGINES: machine.policy.places}
    free = dict(budgets)
    for engine in engines:
        take(free, engine.placement)
    model = models["new"] = Model(ModelSpec("new"), 8)
    model.queue.push(waiting("first", "new", candidate.priority, candidate.waits_sec))
    taken = {engine: "ahead" for engine in engines if engine.alias in machine.promised}
    capacity = {**budgets, **(machine.capacity or {})}
    inspected = Inspected(NOW, "new", tuple({**place, ENGINES: 1} for place in candidate.places), need="so much")
    return inspected, Room(NOW, machine.policy, models, engines, budgets, capacity, free, taken)


def said(verdict: Fits | MakeRoom | Wait | NeverFits) -> str:
    """The verdict in a line: `fits`, `a goes`, `waits for a (quantum)`, `never`."""
    match verdict:
        case Fits(placement):
            return f"fits on {' and '.join(str(device) for device in sorted(placement) if device != ENGINES)}"
        case MakeRoom(_, victims):
            return f"{' and '.join(sorted(victim.alias for victim in victims))} goes"
        case Wait(departures=()):
            return f"waits: {verdict.reason.partition(':')[0]}"
        case Wait(departures=departures):
            return f"waits for {' and '.join(f'{each.alias} ({each.hold.value})' for each in departures)}"
        case NeverFits(others_hold_it=True):
            return "never, unless others give it back"
    return "never"


def on(mib: int, device: Device = GPU0) -> Placement:
    return {device: mib}


IDLE = Resident("a", on(6))
BUSY = replace(IDLE, idle_sec=None)
TWO = {GPU0: 10, GPU1: 10}

STORIES = [
    # the first rule: it fits
    ("an empty machine", Machine(), Candidate(), "fits on gpu0"),
    ("a small one is there", Machine((Resident("a", on(4)),)), Candidate(), "fits on gpu0"),
    ("the other GPU is free", Machine((IDLE,), TWO), Candidate((on(6), on(6, GPU1))), "fits on gpu1"),
    (
        "the best place is taken",
        Machine((IDLE,), {**TWO, HOST: 10}),
        Candidate((on(6), on(6, HOST))),
        "fits on host",
    ),
    # the second: idle engines make room
    ("one has been idle for long", Machine((IDLE,)), Candidate(), "a goes"),
    (
        "of two that are idle, that which is wanted less often",
        Machine((Resident("often", on(5), wanted_every_sec=60, idle_sec=50), Resident("seldom", on(5)))),
        Candidate((on(4),)),
        "seldom goes",
    ),
    (
        "of two that are idle, that which loads faster",
        Machine((Resident("slow", on(5), load_sec=80), Resident("fast", on(5)))),
        Candidate((on(4),)),
        "fast goes",
    ),
    (
        "one that is large enough, not two",
        Machine((Resident("large", on(6)), Resident("b", on(2)), Resident("c", on(2)))),
        Candidate(),
        "large goes",
    ),
    (
        "two small ones, if one does not do",
        Machine((Resident("a", on(3)), Resident("b", on(3)), Resident("dear", on(4), load_sec=80))),
        Candidate(),
        "a and b goes",
    ),
    (
        "who is on the other GPU stays",
        Machine((Resident("cheap", on(9, GPU1), load_sec=1), Resident("a", on(9))), TWO),
        Candidate(),
        "a goes",
    ),
    (
        "of two places, that which costs least",
        Machine((Resident("dear", on(9), load_sec=80), Resident("cheap", on(9, GPU1))), TWO),
        Candidate((on(6), on(6, GPU1))),
        "cheap goes",
    ),
    (
        "there is memory, but no place for a fourth engine",
        Machine(tuple(Resident(alias, on(1), load_sec=load) for alias, load in (("a", 80), ("b", 8), ("c", 80)))),
        Candidate((on(1),)),
        "b goes",
    ),
    (
        "one that is idle, not one at work",
        Machine((BUSY, Resident("b", on(4)))),
        Candidate((on(4),)),
        "b goes",
    ),
    (
        "one that is idle, though one at work would be back sooner",
        Machine((Resident("at work", on(6), idle_sec=None, load_sec=1), Resident("idle", on(4), load_sec=80))),
        Candidate((on(4),), waits_sec=BOUND_SEC),
        "idle goes",
    ),
    ("one that is pinned stays", Machine((replace(IDLE, pinned=True),)), Candidate((on(4),)), "fits on gpu0"),
    (
        "not who is pinned, though it is idle and the other at work",
        Machine((Resident("pinned", on(4), pinned=True), replace(BUSY, takes=on(4)))),
        Candidate((on(4),), waits_sec=BOUND_SEC),
        "a goes",
    ),
    ("it fell idle just now", Machine((replace(IDLE, idle_sec=0.1),)), Candidate(), "waits for a (linger)"),
    ("somebody waits for it again", Machine((replace(IDLE, waiting=1),)), Candidate(), "waits for a (bound)"),
    # the third: engines at work drain
    ("it is at work, and the wait is short", Machine((BUSY,)), Candidate(), "waits for a (bound)"),
    ("it is at work, and the bound is over", Machine((BUSY,)), Candidate(waits_sec=BOUND_SEC), "a goes"),
    (
        "it came a moment ago, and has its turn",
        Machine((replace(BUSY, ready_for_sec=QUANTUM_SEC - 1),)),
        Candidate(waits_sec=BOUND_SEC),
        "waits for a (quantum)",
    ),
    (
        "its turn is over",
        Machine((replace(BUSY, ready_for_sec=QUANTUM_SEC),)),
        Candidate(waits_sec=BOUND_SEC),
        "a goes",
    ),
    ("a high one waits for no bound", Machine((BUSY,)), Candidate(priority=HIGH), "a goes"),
    ("a low one waits ten times as long", Machine((BUSY,)), Candidate((on(6),), 200, LOW), "waits for a (bound)"),
    (
        "a high one waits for the whole turn of a normal one",
        Machine((replace(BUSY, ready_for_sec=20),)),
        Candidate(priority=HIGH),
        "waits for a (quantum)",
    ),
    (
        "a high one waits for the price of a swap only, where all others are low",
        Machine((replace(BUSY, ready_for_sec=20, priority=LOW),)),
        Candidate(priority=HIGH),
        "a goes",
    ),
    (
        "one that loads goes never",
        Machine((replace(BUSY, state=EngineState.LOADING, ready_for_sec=0),)),
        Candidate(waits_sec=10 * BOUND_SEC),
        "waits for a (loading)",
    ),
    (
        "one that is on its way out is waited for, not asked",
        Machine((replace(IDLE, state=EngineState.STOPPING, pinned=True),)),
        Candidate(),
        "a goes",
    ),
    (
        "who makes room for another makes none for this one",
        Machine((IDLE,), promised=("a",)),
        Candidate(waits_sec=10 * BOUND_SEC),
        "waits: no room until ahead has been served",
    ),
    # and what cannot be
    ("it is larger than the machine", Machine(), Candidate((on(11),)), "never"),
    ("it does not fit beside who is pinned", Machine((replace(IDLE, pinned=True),)), Candidate(), "never"),
    (
        "all places are pinned",
        Machine((replace(IDLE, takes=on(1), pinned=True),), policy=replace(POLICY, max_concurrent_models=1)),
        Candidate((on(1),)),
        "never",
    ),
    (
        "others hold what it needs",
        Machine(budgets={GPU0: 4}, capacity={GPU0: 10}),
        Candidate(),
        "never, unless others give it back",
    ),
]


@pytest.mark.parametrize(
    ("machine", "candidate", "verdict"), [pytest.param(*row, id=name) for name, *row in STORIES]
)
def test_who_goes(machine: Machine, candidate: Candidate, verdict: str) -> None:
    assert said(ask(machine, candidate)) == verdict


def test_what_it_waits_for_is_kept_for_it_once_its_bound_is_over() -> None:
    turn = replace(BUSY, ready_for_sec=1)
    early, overdue = (ask(Machine((turn,)), Candidate(waits_sec=wait)) for wait in (1, BOUND_SEC))
    assert isinstance(early, Wait)
    assert isinstance(overdue, Wait)
    assert not early.hold, "others may send it away first"
    assert [engine.alias for engine in overdue.hold] == ["a"]


def test_what_is_free_besides_is_kept_for_who_waits() -> None:
    """6 of 10 are a's, and it needs 7: of the 4 that are free, the one that a does not give back."""
    verdict = ask(Machine((BUSY,)), Candidate((on(7),)))
    assert isinstance(verdict, Wait)
    assert verdict.reserve == {GPU0: 1}


def test_a_verdict_that_time_alone_may_change_says_when() -> None:
    verdict = ask(Machine((replace(BUSY, ready_for_sec=1),)), Candidate(waits_sec=BOUND_SEC))
    assert isinstance(verdict, Wait)
    assert verdict.again_at == (NOW - 1 + QUANTUM_SEC,)
    loading = ask(Machine((replace(BUSY, state=EngineState.LOADING),)), Candidate())
    assert isinstance(loading, Wait)
    assert loading.again_at == (), "the end of a load is an event"
    assert [departure.at for departure in loading.departures] == [math.inf]
    assert [departure.hold for departure in loading.departures] == [Hold.LOADING]


@pytest.mark.parametrize(
    ("machine", "candidate", "words"),
    [
        (Machine((BUSY,)), Candidate(), "no room until a can be unloaded: needs so much, 4 MiB on gpu0 free"),
        (
            Machine((Resident("p", on(4), pinned=True), replace(BUSY, takes=on(5)))),
            Candidate(),
            "no room until a can be unloaded: needs so much, 1 MiB on gpu0 free; p (pinned) cannot be unloaded",
        ),
        (
            Machine((replace(BUSY, takes=on(1)),), policy=replace(POLICY, max_concurrent_models=1)),
            Candidate((on(1),)),
            "no room until a can be unloaded: max_concurrent_models is 1",
        ),
        (Machine(), Candidate((on(11),)), "'new' needs so much; the budget is 10 MiB on gpu0"),
        (
            Machine(budgets={GPU0: 4}, capacity={GPU0: 10}),
            Candidate(),
            "'new' needs so much; the budget is 4 MiB on gpu0, 4 MiB on gpu0 of it free; "
            "other programs hold 6 MiB on gpu0",
        ),
    ],
)
def test_the_reason_names_the_limit(machine: Machine, candidate: Candidate, words: str) -> None:
    verdict = ask(machine, candidate)
    assert isinstance(verdict, Wait | NeverFits)
    assert verdict.reason == words


@pytest.mark.parametrize(
    ("machine", "candidate", "told"),
    [
        (Machine(), Candidate(), (GPU0, "", "")),
        (Machine((Resident("a", on(4)),)), Candidate(), (GPU0, "a", "")),
        (Machine((BUSY, Resident("b", on(1, HOST)))), Candidate(), (GPU0, "", "a")),
        (Machine((Resident("young", on(6), ready_for_sec=1),)), Candidate(), (GPU0, "", "young")),
        (Machine((BUSY,), TWO), Candidate((on(6), on(6, GPU1))), (GPU1, "", "")),
        (
            Machine((BUSY, replace(IDLE, alias="b", takes=on(6, GPU1))), TWO),
            Candidate((on(6), on(6, GPU1))),
            (GPU1, "", "b"),
        ),
        (Machine((replace(IDLE, pinned=True),)), Candidate(), (None, "", "")),
        (Machine(), Candidate((on(11),)), (None, "", "")),
    ],
)
def test_what_would_go_is_told_without_regard_to_how_long_it_may_stay(
    machine: Machine, candidate: Candidate, told: tuple[Device | None, str, str]
) -> None:
    found = outlook(*before(machine, candidate))
    devices = [None] if found.placement is None else [device for device in found.placement if device != ENGINES]
    assert (*devices, " ".join(found.beside), " ".join(found.victims)) == told
    assert bool(found.reason) is (found.placement is None)


@pytest.mark.parametrize(
    ("short", "costs", "victims"),
    [
        ({}, {"a": (5, 1.0)}, set()),
        ({GPU0: 5}, {"a": (4, 1.0)}, None),
        ({GPU0: 5}, {"a": (5, 3.0), "b": (9, 2.0)}, {"b"}),
        ({GPU0: 5}, {"a": (3, 1.0), "b": (3, 1.0), "c": (5, 1.5)}, {"c"}),
        ({GPU0: 5}, {"a": (3, 1.0), "b": (3, 1.0), "c": (5, 2.5)}, {"a", "b"}),
        ({GPU0: 5}, {"a": (1, 0.1), "b": (3, 1.0), "c": (3, 1.0)}, {"b", "c"}),
    ],
)
def test_the_cheapest_that_suffice(
    short: Placement, costs: dict[str, tuple[int, float]], victims: set[str] | None
) -> None:
    engines = {
        Engine(number, ModelSpec(alias), {GPU0: mib}, 0.0): cost
        for number, (alias, (mib, cost)) in enumerate(costs.items())
    }
    found = cheapest_victims(short, engines)
    assert (None if found is None else {engine.alias for engine in found}) == victims
