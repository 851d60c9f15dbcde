"""The scheduler's promises, held against worlds that do everything at the worst moment.

`World` plays all that is outside the scheduler: clients, files, processes, memory, the clock. It believes
only what effects tell it, keeps its own books from them, and checks every promise after every event.
Hypothesis drives it rule by rule (small failures), a seeded generator drives it in bulk (rare ones).

`SCHEDULER_EVENTS=3000000 python -m pytest tests/scheduling/test_scheduler_properties.py` looks longer, and with
`SCHEDULER_SEED=7` elsewhere.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from conftest import examples
from gpus import GPU0, GPU1
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from router.scheduling.messages import (
    Configured,
    Displace,
    Effect,
    Eject,
    EngineAlive,
    EngineAsleep,
    EngineExited,
    EngineLost,
    EngineMeasured,
    EngineReady,
    EngineState,
    Event,
    Finished,
    Grant,
    Inspect,
    Inspected,
    KeepAlive,
    Load,
    MemoryChanged,
    ModelSpec,
    Placement,
    Probe,
    PutToSleep,
    Refusal,
    Reject,
    Requeue,
    Reset,
    ShutDown,
    StartEngine,
    StopCause,
    StopEngine,
    Submit,
    Tick,
    Transition,
    WakeUp,
)
from router.scheduling.policy import ByPriority, Policy
from router.scheduling.queue import Priority
from router.scheduling.residency import larger
from router.scheduling.scheduler import Scheduler
from router.system.devices import HOST

EVENTS = int(os.environ.get("SCHEDULER_EVENTS", examples(20_000)))
SEED = int(os.environ.get("SCHEDULER_SEED", "1"))

MAY_FOLLOW = {
    "off": {"loading", "failed", "off"},
    "loading": {"ready", "stopping", "off", "failed"},
    "ready": {"draining", "stopping", "off", "failed"},
    "draining": {"ready", "stopping", "off", "failed"},
    "stopping": {"off", "failed", "asleep"},
    "asleep": {"asleep", "loading", "stopping", "off", "failed"},
    "failed": {"off", "failed"},
}


@dataclass
class Process:
    """What the world knows of an engine it was told to start."""

    alias: str
    slots: int
    pinned: bool
    placement: Placement
    state: str = "loading"
    most_slotless: int = 1
    in_flight: set[str] = field(default_factory=set)
    """With a slot, or without."""
    suspect: bool = False
    stop_asked: bool = False
    hangs: bool = False
    """It is told to stop and does not, until the world has had enough."""
    asleep: Placement | None = None
    """What it holds asleep, if it can sleep."""
    awake: Placement | None = None
    """What it held, from when it was told to sleep until it is awake again."""
    has_place: bool = True


class World:
    def __init__(self, rng: random.Random, *, keep_events: bool = False) -> None:
        self.rng = rng
        self.scheduler = Scheduler()
        self.now = rng.uniform(0, 1000)
        self.devices = rng.choice(((HOST,), (GPU0, HOST), (GPU0, GPU1, HOST)))
        self.capacity = {name: rng.choice((6, 10, 16)) for name in self.devices}
        self.others = dict.fromkeys(self.devices, 0)
        """What other programs hold."""
        self.policy = self.random_policy()
        self.aliases = [f"m{number}" for number in range(rng.randint(2, 7))]
        self.files = {alias: self.random_placements() for alias in self.aliases}
        self.specs = {alias: self.random_spec(alias) for alias in self.aliases}
        self.processes: dict[int, Process] = {}
        self.waiting: dict[str, str] = {}
        self.granted: dict[str, int] = {}
        self.lost: dict[str, str] = {}
        """Granted requests whose engine is gone; the proxy has yet to notice."""
        self.outcomes: dict[str, str] = {}
        self.looking: set[str] = set()
        self.states: dict[str, str] = {}
        self.probes: set[int] = set()
        self.gone: set[int] = set()
        """Engines whose process is gone, but whose memory is not back yet."""
        self.submitted = 0
        self.slotless: set[str] = set()
        """Requests that need no slot."""
        self.priorities: dict[str, Priority] = {}
        """In the order of their arrivals."""
        self.in_the_way = ""
        """A request whose body takes room that another needs."""
        self.full: dict[str, str] = {}
        """Those who wait as somebody came, if he found the line full: his own, or all."""
        self.events = 0
        self.seen: Counter[str] = Counter()
        self.history: list[tuple[Event, list[Effect]]] | None = [] if keep_events else None
        self.down = False
        self.feed(Configured(self.now, dict(self.specs), self.policy))
        self.tell_of_memory()

    # --- what the world is made of ----------------------------------------------------------------------

    def random_policy(self) -> Policy:
        rng = self.rng
        return Policy(
            max_wait_sec=rng.choice((ByPriority(0, 30, 300), ByPriority(0, 2, 5), ByPriority(0, 0, 0))),
            residency_factor=rng.choice((0, 1, 4)),
            max_linger_sec=rng.choice((0, 30)),
            max_concurrent_models=rng.choice((1, 2, 3, 8)),
            max_queue_size_per_model=rng.choice((0, 3, 20)),
            max_queue_size_total=rng.choice((5, 10_000)),
            queue_timeout_sec=rng.choice((10, 300)),
            idle_timeout_sec=rng.choice((math.inf, 5, 60)),
            keep_warm_models=rng.choice((0, 1, 2)),
            max_drain_sec=rng.choice((None, None, 10)),
            model_load_max_retries=rng.choice((0, 2)),
            model_max_crashes=rng.choice((1, 3)),
            model_load_cooldown_sec=rng.choice((5, 300)),
        )

    def random_placements(self) -> tuple[Placement, ...]:
        def one() -> Placement:
            names = self.rng.sample(self.devices, self.rng.randint(1, len(self.devices)))
            return {name: self.rng.choice((0, 1, 3, 5, 6, 9)) for name in names}

        return tuple(one() for _ in range(self.rng.choice((1, 1, 1, 2))))

    def random_spec(self, alias: str) -> ModelSpec:
        return ModelSpec(
            alias,
            slots=self.rng.choice((1, 1, 2, 4)),
            most_slotless=self.rng.choice((1, 2, 200)),
            pinned=self.rng.random() < 0.1,
            kept=self.rng.random() < 0.2,
            idle_timeout_sec=self.rng.choice((None, None, 3, math.inf)),
            expected_load_sec=self.rng.choice((0.1, 2, 10)),
            revision=self.rng.random(),
        )

    # --- telling the scheduler --------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        """Let the clock run, with a `Tick` whenever one is due, and an early one that must do nothing."""
        until = self.now + seconds
        while self.scheduler.wake_at <= until:
            self.now = max(self.now, self.scheduler.wake_at)
            self.feed(Tick(self.now))
        if self.rng.random() < 0.3:
            self.now = self.rng.uniform(self.now, until)
            effects = self.feed(Tick(self.now))
            assert not effects, f"wake_at came too late for {effects}"
            if self.scheduler.wake_at <= until:
                self.pass_time(until - self.now)
        self.now = max(self.now, until)

    def feed(self, event: Event) -> list[Effect]:
        effects = self.scheduler.step(event)
        self.events += 1
        if self.history is not None:
            self.history.append((event, effects))
        for effect in effects:
            self.carry_out(effect)
        self.check()
        for _ in range(20):
            if self.scheduler.wake_at > self.now:
                break
            self.events += 1
            more = self.scheduler.step(Tick(self.now))
            if self.history is not None:
                self.history.append((Tick(self.now), more))
            for effect in more:
                self.carry_out(effect)
            self.check()
        else:
            raise AssertionError("the scheduler wants to be woken again and again at the same time")
        return effects

    def submit(self, alias: str, priority: Priority) -> None:
        self.submitted += 1
        request_id = f"r{self.submitted}"
        self.priorities[request_id] = priority
        here = {other: its for other, its in self.waiting.items() if its == alias}
        is_full = len(here) >= self.policy.max_queue_size_per_model
        self.full = here if is_full else dict(self.waiting)
        self.waiting[request_id] = alias
        slotless = self.rng.random() < 0.2
        if slotless:
            self.slotless.add(request_id)
        self.feed(Submit(self.now, request_id, alias, priority, slotless))

    def cancel(self, request_id: str) -> None:
        del self.waiting[request_id]
        self.outcomes[request_id] = "cancelled"
        self.feed(Finished(self.now, request_id, served=False))

    def finish(self, request_id: str, served: bool) -> None:
        engine_id = self.granted.pop(request_id)
        if engine_id in self.processes:
            self.processes[engine_id].in_flight.remove(request_id)
        self.outcomes[request_id] = "served" if served else "failed"
        self.feed(Finished(self.now, request_id, served))

    def break_request(self, request_id: str) -> None:
        """No byte of the answer has come, and the connection is gone."""
        engine_id = self.granted.pop(request_id)
        process = self.processes.get(engine_id)
        alias = self.lost.pop(request_id) if process is None else process.alias
        if process is not None:
            process.in_flight.remove(request_id)
            if process.state in ("ready", "draining"):
                process.suspect = True
        self.waiting[request_id] = alias
        self.feed(Requeue(self.now, request_id, "connection reset"))

    @property
    def budgets(self) -> dict[str, int]:
        return {name: max(0, mib - self.others[name]) for name, mib in self.capacity.items()}

    def tell_of_memory(self) -> None:
        self.feed(MemoryChanged(self.now, self.budgets, dict(self.capacity)))

    def exit(self, engine_id: int, reason: str, out_of_memory: bool = False) -> None:
        process = self.processes.pop(engine_id)
        for request_id in process.in_flight:
            self.lost[request_id] = process.alias
        self.probes.discard(engine_id)
        self.gone.discard(engine_id)
        self.feed(EngineExited(self.now, engine_id, reason, out_of_memory))

    def ready(self, engine_id: int) -> None:
        process = self.processes[engine_id]
        if process.awake is not None:
            process.placement, process.awake = process.awake, None
        elif self.rng.random() < 0.5:
            process.asleep = {name: self.rng.choice((0, 1, 3)) for name in self.devices}
        self.feed(EngineReady(self.now, engine_id, process.asleep))

    def fall_asleep(self, engine_id: int, more: int = 0) -> None:
        process = self.processes[engine_id]
        assert process.asleep is not None
        process.asleep = process.placement = {name: mib + more for name, mib in process.asleep.items()}
        process.has_place = False
        self.feed(EngineAsleep(self.now, engine_id, process.asleep))

    def answer_probe(self, engine_id: int) -> None:
        self.probes.discard(engine_id)
        self.processes[engine_id].suspect = False
        self.feed(EngineAlive(self.now, engine_id))

    def look(self, alias: str, problem: str | None = None) -> None:
        self.looking.discard(alias)
        places = () if problem else self.files[alias]
        self.feed(Inspected(self.now, alias, places, problem, "its size"))

    # --- believing the scheduler ------------------------------------------------------------------------

    def carry_out(self, effect: Effect) -> None:
        self.seen[type(effect).__name__] += 1
        match effect:
            case Grant(request_id, engine_id):
                process = self.processes[engine_id]
                assert self.waiting.pop(request_id) == process.alias
                assert process.state == "ready", f"granted on an engine that is {process.state}"
                assert not process.suspect, "granted on an engine that may be dead"
                process.in_flight.add(request_id)
                assert len(process.in_flight - self.slotless) <= process.slots
                assert len(process.in_flight & self.slotless) <= process.most_slotless
                assert request_id not in self.outcomes
                self.granted[request_id] = engine_id
            case Reject(request_id, refusal, reason):
                if refusal is Refusal.DISPLACED:
                    self.check_displaced(request_id)
                elif refusal is Refusal.QUEUE_FULL:
                    mine = self.priorities[request_id]
                    assert all(self.priorities[other] <= mine for other in self.full), "somebody could give way"
                del self.waiting[request_id]
                assert request_id not in self.outcomes
                assert reason
                self.outcomes[request_id] = refusal.value
                self.seen[refusal.value] += 1
            case Inspect(alias):
                assert alias not in self.looking, "asked to look while looking"
                self.looking.add(alias)
            case StartEngine(engine_id, alias, placement):
                self.start(engine_id, alias, placement)
            case StopEngine(engine_id, cause):
                process = self.processes[engine_id]
                assert not process.stop_asked, "stopped twice"
                process.stop_asked = True
                self.seen[cause.value] += 1
                if cause in (StopCause.IDLE, StopCause.EVICTED) or self.policy.max_drain_sec is None:
                    assert not process.in_flight, "stopped with requests in flight"
                if cause in (StopCause.IDLE, StopCause.EVICTED, StopCause.DRAINED):
                    assert not process.pinned, f"a pinned engine went: {cause}"
                if cause is StopCause.IDLE:
                    assert process.alias not in self.waiting.values()
            case PutToSleep(engine_id):
                process = self.processes[engine_id]
                assert process.asleep is not None, "told to sleep, and cannot"
                assert process.state in ("ready", "draining")
                assert not process.in_flight
                assert not process.stop_asked
                process.awake = process.placement
                self.grow(process, larger(process.placement, process.asleep))
            case WakeUp(engine_id):
                process = self.processes[engine_id]
                assert not self.down
                assert process.state == "asleep"
                assert not process.stop_asked
                assert process.awake is not None
                process.has_place = True
                self.grow(process, larger(process.awake, process.placement))
            case Probe(engine_id):
                assert self.processes[engine_id].suspect
                self.probes.add(engine_id)
            case Transition(alias, state, reason, engine_id):
                assert state in MAY_FOLLOW[self.states.get(alias, "off")], (self.states.get(alias), state)
                assert reason
                self.states[alias] = state
                if state == "off":
                    assert engine_id not in self.processes, "off, and there"
                elif engine_id is not None:
                    assert self.processes[engine_id].alias == alias
                    self.processes[engine_id].state = state

    def check_displaced(self, request_id: str) -> None:
        """Nobody has to go for his like, nor while one stays who is lower, or as low and came later."""
        order = list(self.priorities)
        if request_id == self.in_the_way:
            return
        newcomer, gone = order[-1], self.priorities[request_id]
        assert self.priorities[newcomer] < gone, "displaced by its like"
        assert request_id in self.full
        last = max(self.full, key=lambda other: (self.priorities[other], order.index(other)))
        assert request_id == last, "somebody else should have gone"

    def start(self, engine_id: int, alias: str, placement: Placement) -> None:
        assert not self.down, "started while shutting down"
        assert all(process.alias != alias for process in self.processes.values()), "two engines of one model"
        assert placement in [dict(place) for place in self.files[alias]], "started where nobody proposed"
        spec = self.specs[alias]
        self.processes[engine_id] = Process(alias, spec.slots, spec.pinned, {}, most_slotless=spec.most_slotless)
        self.grow(self.processes[engine_id], placement)

    def grow(self, process: Process, placement: Placement) -> None:
        """It takes so much from now on."""
        before, process.placement = process.placement, placement
        for name, mib in placement.items():
            used = sum(process.placement.get(name, 0) for process in self.processes.values())
            is_more = mib > before.get(name, 0)
            assert not is_more or used <= self.budgets[name], f"more in use on {name} than there is"
        places = sum(process.has_place for process in self.processes.values())
        assert places <= self.policy.max_concurrent_models or before

    def check(self) -> None:
        scheduler = self.scheduler
        for alias in self.states.keys() - scheduler.models.keys():
            del self.states[alias]  # removed from the configuration, and nothing of it is left
            self.looking.discard(alias)
        waiting = Counter(self.waiting.values())
        for alias, model in scheduler.models.items():
            assert len(model.queue) == waiting.pop(alias, 0), "a request is in no line, or in two"
            assert model.engines == [engine for engine in scheduler.engines.values() if engine.alias == alias]
            for engine in model.engines:
                assert {*engine.in_flight, *engine.slotless} == self.processes[engine.id].in_flight
                assert engine.slotless <= self.slotless
                assert self.slotless.isdisjoint(engine.in_flight), "what needs no slot has one"
                if engine.state in (EngineState.READY, EngineState.DRAINING):
                    assert (engine.idle_since_sec is None) == engine.is_busy
                assert engine.state.value == self.processes[engine.id].state
                for slotless in (False, True):
                    if engine.admits(slotless=slotless):
                        here = any(request.slotless is slotless for request in model.queue)
                        assert not here, "a ready engine idles while somebody waits whom it could serve"
            assert scheduler.state(alias) == self.states.get(alias, "off")
            assert (alias in scheduler._waiting) == model.wants_engine
        assert not waiting, "somebody waits for a model that is gone"
        assert scheduler.engines.keys() == self.processes.keys()
        assert len(scheduler._requests) == len(self.waiting) + len(self.granted)
        for engine_id, swap in scheduler._fleet.swaps.items():
            assert swap.alias in scheduler._waiting
            assert engine_id not in scheduler.engines, "room is made for an engine that is there"
            going = {victim.state for victim in swap.victims if victim.id in self.processes}
            assert going <= {EngineState.DRAINING, EngineState.STOPPING, EngineState.ASLEEP}
            assert going != {EngineState.ASLEEP}, "nothing is about to give room, and what sleeps keeps it"

    # --- the end ----------------------------------------------------------------------------------------

    def come_to_rest(self) -> None:
        """Nobody comes any more, and everything works: then everybody gets an answer."""
        self.now = max(self.now, self.scheduler._now)
        for process in self.processes.values():
            process.hangs = False
        self.others = dict.fromkeys(self.devices, 0)
        self.tell_of_memory()
        for _ in range(10_000):
            self.answer_everything()
            if not self.waiting and not self.granted:
                break
            self.pass_time(min(60.0, max(0.0, self.scheduler.wake_at - self.now) + 0.01))
        assert not self.waiting
        assert not self.granted
        assert len(self.outcomes) == self.submitted
        if not self.down:
            self.shut_down()
        for _ in range(100):
            self.answer_everything()
        scheduler = self.scheduler
        assert not self.processes
        assert not scheduler.engines
        assert not scheduler._requests
        assert not scheduler._waiting
        assert not scheduler._fleet.swaps
        assert scheduler.free() == scheduler.budgets
        assert scheduler.budgets.items() >= self.budgets.items()

    def answer_everything(self) -> None:
        for alias in sorted(self.looking):
            self.look(alias)
        self.some_memory_is_back()
        for engine_id in sorted(self.probes):
            self.answer_probe(engine_id)
        for request_id in list(self.granted):
            if request_id in self.lost:
                self.break_request(request_id)
            else:
                self.finish(request_id, served=True)
        for engine_id, process in sorted(self.processes.items()):
            if process.stop_asked:
                self.exit(engine_id, "as asked")
            elif self.is_dozing(process):
                self.fall_asleep(engine_id)
            elif process.state == "loading":
                self.ready(engine_id)

    # --- one thing that happens -------------------------------------------------------------------------

    def something_happens(self) -> None:
        rng = self.rng
        if rng.random() < 0.5:
            self.pass_time(rng.choice((0.0, 0.01, 0.3, 2.0, 20.0)) * rng.random())
        rng.choices(self.ACTIONS, self.WEIGHTS)[0](self)

    def some_submit(self) -> None:
        alias = self.rng.choice(self.aliases)
        if alias not in self.specs and self.rng.random() < 0.9:
            return
        self.submit(alias, self.rng.choice(tuple(Priority)))

    def some_finish(self) -> None:
        here = [request_id for request_id in self.granted if request_id not in self.lost]
        if here:
            self.finish(self.rng.choice(here), served=self.rng.random() < 0.9)

    def some_cancel(self) -> None:
        if self.waiting:
            self.cancel(self.rng.choice(list(self.waiting)))

    def some_displace(self) -> None:
        here = [*self.waiting, *self.granted]
        if here:
            self.in_the_way = self.rng.choice(here)
            self.feed(Displace(self.now, self.in_the_way, "its body takes too much"))
            assert self.in_the_way not in self.waiting

    def some_break(self) -> None:
        if self.granted:
            self.break_request(self.rng.choice(list(self.granted)))

    def lost_noticed(self) -> None:
        for request_id in list(self.lost):
            if self.rng.random() < 0.7:
                self.break_request(request_id)
            else:
                del self.lost[request_id]
                self.finish(request_id, served=False)

    def some_look(self) -> None:
        if self.looking:
            problem = "not a GGUF file" if self.rng.random() < 0.1 else None
            self.look(self.rng.choice(sorted(self.looking)), problem)

    def some_load_ends(self) -> None:
        loading = [number for number, process in self.processes.items() if process.state == "loading"]
        if loading:
            engine_id = self.rng.choice(loading)
            if self.rng.random() < 0.8:
                self.ready(engine_id)
            else:
                self.exit(engine_id, "it failed", out_of_memory=self.rng.random() < 0.5)

    def is_dozing(self, process: Process) -> bool:
        return process.state == "stopping" and process.awake is not None and not process.stop_asked

    def some_fall_asleep(self) -> None:
        dozing = [number for number, process in self.processes.items() if self.is_dozing(process)]
        if dozing:
            engine_id = self.rng.choice(dozing)
            if self.rng.random() < 0.8:
                self.fall_asleep(engine_id, more=self.rng.choice((0, 0, 0, 2)))
            else:
                self.exit(engine_id, "it freed nothing, and was stopped")

    def some_stop_ends(self) -> None:
        for engine_id, process in list(self.processes.items()):
            if process.stop_asked and not process.hangs:
                process.hangs = self.rng.random() < 0.05
                if not process.hangs:
                    self.exit(engine_id, "as asked")
                return

    def some_crash(self) -> None:
        if self.processes:
            engine_id = self.rng.choice(list(self.processes))
            self.processes[engine_id].suspect = True
            self.gone.add(engine_id)
            self.probes.discard(engine_id)
            self.feed(EngineLost(self.now, engine_id))

    def some_memory_is_back(self) -> None:
        for engine_id in sorted(self.gone):
            self.exit(engine_id, "signal 11")

    def some_probe_answer(self) -> None:
        if self.probes:
            engine_id = self.rng.choice(sorted(self.probes))
            if self.rng.random() < 0.5:
                self.answer_probe(engine_id)
            else:
                self.exit(engine_id, "it was dead")

    def shut_down(self) -> None:
        self.down = True
        self.feed(ShutDown(self.now))

    def some_order(self) -> None:
        alias = self.rng.choice(self.aliases)
        order = self.rng.choice((Load, Eject, Reset, KeepAlive, None))
        if order is None:
            self.feed(Load(self.now, alias, evict=False))
        elif order is KeepAlive:
            self.feed(KeepAlive(self.now, alias, self.rng.choice((0.0, 5.0, math.inf))))
        else:
            self.feed(order(self.now, alias))

    def memory_changes(self) -> None:
        """Another program takes memory or gives it back; now and then the configuration gives more or less."""
        name = self.rng.choice(self.devices)
        if self.rng.random() < 0.2:
            self.capacity[name] = self.rng.choice((4, 6, 10, 16))
        self.others[name] = self.rng.choice((0, 0, 0, 2, 5, 12))
        self.tell_of_memory()

    def some_measurement(self) -> None:
        """Engines take more or less than was thought."""
        if self.processes:
            engine_id, process = self.rng.choice(sorted(self.processes.items()))
            measured = {name: max(0, mib + self.rng.choice((-1, 0, 1))) for name, mib in process.placement.items()}
            if process.state != "stopping" and process.awake is None:
                process.placement = measured
            self.feed(EngineMeasured(self.now, engine_id, measured))

    def configuration_changes(self) -> None:
        alias = self.rng.choice(self.aliases)
        match self.rng.randrange(4):
            case 0:
                self.specs.pop(alias, None)
            case 1:
                self.specs[alias] = self.random_spec(alias)
                self.files[alias] = self.random_placements()
            case 2 if alias in self.specs:
                self.specs[alias] = replace(self.specs[alias], idle_timeout_sec=1.0)
            case 3:
                self.policy = self.random_policy()
        self.feed(Configured(self.now, dict(self.specs), self.policy))

    ACTIONS = (
        some_submit,
        some_finish,
        some_look,
        some_load_ends,
        some_stop_ends,
        some_fall_asleep,
        some_cancel,
        some_displace,
        some_break,
        lost_noticed,
        some_probe_answer,
        some_order,
        some_crash,
        some_memory_is_back,
        some_measurement,
        memory_changes,
        configuration_changes,
    )
    WEIGHTS = (300, 250, 120, 90, 90, 90, 20, 5, 10, 60, 20, 12, 4, 30, 12, 6, 3)


EFFECTS = (Grant, Inspect, Probe, PutToSleep, Reject, StartEngine, StopEngine, Transition, WakeUp)


def replayed(history: list[tuple[Event, list[Effect]]]) -> bool:
    scheduler = Scheduler()
    return all(scheduler.step(event) == effects for event, effects in history)


@pytest.mark.timeout(120 + EVENTS / 500)
def test_promises_hold_in_worlds_that_do_everything_at_the_worst_moment() -> None:
    rng = random.Random(SEED)
    events, seen = 0, Counter[str]()
    while events < EVENTS:
        seed = rng.getrandbits(32)
        world = World(random.Random(seed), keep_events=seed % 8 == 0)
        try:
            for _ in range(rng.choice((50, 300, 1500))):
                world.something_happens()
            if rng.random() < 0.2:
                world.shut_down()
                for _ in range(50):
                    world.something_happens()
            world.come_to_rest()
        except Exception as error:
            raise AssertionError(f"world {seed} after {world.events} events: {error!r}") from error
        if world.history is not None:
            assert replayed(world.history), f"world {seed}: same events, other effects"
        events += world.events
        seen += world.seen

    never_happened = {
        *(effect.__name__ for effect in EFFECTS),
        *(refusal.value for refusal in Refusal if refusal is not Refusal.INTERNAL_ERROR),  # others' business
        *(cause.value for cause in StopCause),
    } - set(seen)
    assert not never_happened


LOAD_SEC, WAKE_SEC, STOP_SEC, SERVICE_SEC, CLIENTS = 2.0, 0.3, 0.2, 1.5, 6
IMPATIENT = Policy(
    patience_sec=ByPriority(0, 2, 4),
    max_wait_sec=ByPriority(0, 4, 8),
    residency_factor=1,
    max_concurrent_models=8,
    queue_timeout_sec=math.inf,
)
TURN_SEC = 8 + 1 * 2 * LOAD_SEC + SERVICE_SEC + 2 * STOP_SEC + LOAD_SEC
"""Of a candidate: its bound, the quantum of those in its place, their last request, their stop, also if they have
gone to sleep and that was not enough, its load."""
LONGEST_WAIT_SEC = 4 + CLIENTS * (TURN_SEC + SERVICE_SEC)
"""Until nobody who comes is ahead any more, then a turn for each who still is, and its own."""


def longest_wait(rng: random.Random, seconds: float, *, sleep: bool) -> float:
    """The longest wait of clients without think time, each of whom may want any model at any priority.

    `sleep`: engines can sleep, and hold then what they are not expected to.
    """
    devices = (GPU0, HOST)[: rng.randint(1, 2)]
    files = [{name: rng.choice((2, 3, 5, 9)) for name in devices} for _ in range(rng.randint(2, 6))]
    scheduler = Scheduler()
    specs = {f"m{number}": ModelSpec(f"m{number}", expected_load_sec=LOAD_SEC) for number in range(len(files))}
    scheduler.step(Configured(0.0, specs, IMPATIENT))
    scheduler.step(MemoryChanged(0.0, dict.fromkeys(devices, 10)))
    now, longest, count = 0.0, 0.0, itertools.count()
    arrived: dict[str, float] = {}
    later: list[tuple[float, int, Event | None]] = []
    """None: a client asks."""

    def at(when: float, event: Event | None) -> None:
        heapq.heappush(later, (when, next(count), event))

    for _ in range(CLIENTS):
        at(rng.random(), None)
    while now < seconds:
        if not later or scheduler.wake_at <= later[0][0]:
            now = max(now, scheduler.wake_at)
            event: Event | None = Tick(now)
        else:
            now, _, event = heapq.heappop(later)
        if event is None:
            event = Submit(now, f"r{next(count)}", rng.choice(tuple(specs)), rng.choice(tuple(Priority)))
            arrived[event.request_id] = now
        for effect in scheduler.step(event):
            match effect:
                case Grant(request_id):
                    longest = max(longest, now - arrived.pop(request_id))
                    done = now + SERVICE_SEC * rng.random()
                    at(done, Finished(done, request_id))
                    at(done, None)
                case Inspect(alias):
                    at(now, Inspected(now, alias, (files[int(alias[1:])],)))
                case StartEngine(engine_id, _, placement):
                    asleep = {device: rng.choice((0, 1)) for device in placement} if sleep else None
                    at(now + LOAD_SEC, EngineReady(now + LOAD_SEC, engine_id, asleep))
                case PutToSleep(engine_id):
                    holds = {device: rng.choice((0, 1, 2)) for device in devices}
                    at(now + STOP_SEC, EngineAsleep(now + STOP_SEC, engine_id, holds))
                case WakeUp(engine_id):
                    at(now + WAKE_SEC, EngineReady(now + WAKE_SEC, engine_id))
                case StopEngine(engine_id):
                    at(now + STOP_SEC, EngineExited(now + STOP_SEC, engine_id, "stopped"))
    return max([longest, *(now - when for when in arrived.values())])


@pytest.mark.parametrize("sleep", [False, True], ids=["stop", "sleep"])
@pytest.mark.parametrize("seed", range(SEED, SEED + 12))
def test_every_wait_is_bounded_whatever_the_others_do(seed: int, sleep: bool) -> None:
    assert longest_wait(random.Random(seed), seconds=400, sleep=sleep) <= LONGEST_WAIT_SEC


class SchedulerMachine(RuleBasedStateMachine):
    """The same worlds, steered by hypothesis, so that what it finds is short."""

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.world = World(random.Random(seed))

    @rule(seconds=st.sampled_from((0.0, 0.01, 0.5, 3.0, 31.0, 301.0)))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(number=st.integers(0, 6), priority=st.sampled_from(Priority))
    def request(self, number: int, priority: Priority) -> None:
        aliases = self.world.aliases
        self.world.submit(aliases[number % len(aliases)], priority)

    @rule(action=st.sampled_from(World.ACTIONS))
    def other(self, action: Callable[[World], None]) -> None:
        action(self.world)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.come_to_rest()


SchedulerMachine.TestCase.settings = settings(
    max_examples=examples(40), stateful_step_count=60, deadline=None, derandomize=True, database=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
