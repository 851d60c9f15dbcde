"""Which models should stay loaded? Compares policies by simulation, the router's own scheduler among them.

A discrete-event simulation: clients ask, engines load, serve and stop; the policy under test decides. Ours is
the very code that runs in the router (`router.scheduling.scheduler`), fed with simulated time. The others are

  fifo        serves in order of arrival and swaps whenever the next request is for another model
  deadline    the same in order of virtual deadlines
  exhaustive  swaps when the resident model has nothing left to do (least recently used goes), as llama-swap
              and llama-server's router mode do
  optimum     knows the future: the best of all orders of service (small cases on one place in memory only)

Run `python benchmarks/policies.py` for all workloads, `--help` for the choices.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import itertools
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from router.scheduling.messages import (
    Configured,
    Effect,
    EngineExited,
    EngineReady,
    Event,
    Finished,
    Grant,
    Inspect,
    Inspected,
    MemoryChanged,
    ModelSpec,
    Reject,
    StartEngine,
    StopCause,
    StopEngine,
    Submit,
    Tick,
)
from router.scheduling.policy import ByPriority, Policy
from router.scheduling.queue import Priority
from router.scheduling.scheduler import Scheduler
from router.system.devices import Device

HIGH, NORMAL, LOW = Priority
STOP_SEC = 0.2


# --- workloads ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A request: when, for which model, how urgent, how long its answer takes."""

    at: float
    alias: str
    service_sec: float
    priority: Priority = NORMAL


@dataclass(frozen=True)
class Loop:
    """A client that asks, thinks, and asks again, until the clock stops."""

    alias: str
    service_sec: float
    think_sec: Callable[[random.Random], float] = lambda rng: 0.0
    priority: Priority = NORMAL
    begins_sec: float = 0.0
    ends_sec: float = math.inf


@dataclass(frozen=True)
class Workload:
    name: str
    about: str
    models: Mapping[str, float]
    """Seconds to load, by alias."""
    asks: tuple[Ask, ...] = ()
    loops: tuple[Loop, ...] = ()
    seconds: float = math.inf
    """Loops stop asking then; what was asked is still served."""
    memory: int = 1
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Memory a model takes; 1 unless it says otherwise."""
    slots: int = 1

    def size(self, alias: str) -> int:
        return self.sizes.get(alias, 1)


def poisson(
    rng: random.Random,
    seconds: float,
    per_sec: Mapping[str, float],
    service_sec: float = 1.5,
    mix: Mapping[Priority, float] | None = None,
) -> tuple[Ask, ...]:
    """Independent arrivals; service times spread evenly around their mean."""
    mix = mix or {NORMAL: 1.0}
    asks = []
    for alias, rate in per_sec.items():
        at = rng.expovariate(rate)
        while at < seconds:
            priority = rng.choices(list(mix), list(mix.values()))[0]
            asks.append(Ask(at, alias, service_sec * rng.uniform(0.5, 1.5), priority))
            at += rng.expovariate(rate)
    return tuple(sorted(asks, key=lambda ask: ask.at))


def bursts(rng: random.Random, seconds: float, aliases: str, every_sec: float) -> tuple[Ask, ...]:
    """Sessions: a client uses one model for a while, with about ten requests a few seconds apart."""
    asks = []
    at = 0.0
    while (at := at + rng.expovariate(1 / every_sec)) < seconds:
        alias, when = rng.choice(aliases), at
        for _ in range(rng.randint(4, 16)):
            asks.append(Ask(when, alias, rng.uniform(0.5, 2.5)))
            when += rng.expovariate(1 / 3)
    return tuple(sorted(asks, key=lambda ask: ask.at))


def evenly(rate: float, among: str) -> dict[str, float]:
    return {alias: rate / len(among) for alias in among}


def trace(gap_sec: float) -> Workload:
    asks = tuple(Ask(number * gap_sec, alias, 1.0) for number, alias in enumerate("ABAACABC"))
    when = f"{gap_sec:g} s apart" if gap_sec else "at once"
    return Workload(f"trace-{gap_sec:g}", f"A B A A C A B C, {when}; 8 s loads", dict.fromkeys("ABC", 8.0), asks)


def workloads(seed: int) -> Iterator[Workload]:
    rng = random.Random(seed)
    three = dict.fromkeys("ABC", 8.0)
    mix = {HIGH: 0.2, NORMAL: 0.6, LOW: 0.2}
    for gap_sec in (0.0, 1.0, 3.0, 15.0):
        yield trace(gap_sec)
    for rate in (0.1, 0.3, 0.45):
        asks = poisson(rng, 5400, evenly(rate, "ABC"), 1.5, mix)
        yield Workload(
            f"poisson-{rate:g}", f"three models, one place, {rate:g} requests/s, 8 s loads, 90 min", three, asks
        )
    asks = poisson(rng, 5400, {"A": 0.35, "B": 0.07, "C": 0.03}, 1.5, mix)
    yield Workload("skewed", "as poisson-0.45, but 78 % for A, 15 % for B, 7 % for C", three, asks)
    yield Workload(
        "bursty",
        "sessions of ~10 requests on one of three models, one place, 90 min",
        three,
        bursts(rng, 5400, "ABC", 60),
    )
    yield Workload(
        "loop",
        "three clients without think time on three models, one place, 10 s loads, 1 h",
        dict.fromkeys("ABC", 10.0),
        loops=tuple(Loop(alias, 1.0) for alias in "ABC"),
        seconds=3600,
    )
    yield Workload(
        "agents",
        "six agents (think 0.2–2 s) on three models, one place, 1 h",
        three,
        loops=tuple(Loop(alias, 1.5, lambda rng: rng.uniform(0.2, 2)) for alias in "AABBCC"),
        seconds=3600,
    )
    yield Workload(
        "batch",
        "low batch on A without pause, four people (normal, think ~60 s) on B, a high one on C every ~5 min",
        three,
        loops=(
            *(Loop("A", 2.0, priority=LOW) for _ in range(4)),
            *(Loop("B", 2.0, lambda rng: rng.expovariate(1 / 60)) for _ in range(4)),
            Loop("C", 2.0, lambda rng: rng.expovariate(1 / 300), HIGH, 100.0),
        ),
        seconds=5400,
        slots=2,
    )
    yield Workload(
        "starving",
        "six clients keep A busy (2 slots, no think time) for 20 min; B is asked once a minute",
        three,
        tuple(Ask(60.0 * minute + 5, "B", 1.0) for minute in range(20)),
        tuple(Loop("A", 1.0, begins_sec=0.1 * number) for number in range(6)),
        seconds=1200,
        slots=2,
    )
    six = dict.fromkeys("ABCDEF", 6.0)
    zipf = {alias: 0.9 / rank / 2.45 for rank, alias in enumerate("ABCDEF", 1)}
    yield Workload(
        "zipf",
        "six models (Zipf), places for three, 0.9 requests/s, 6 s loads, 90 min",
        six,
        poisson(rng, 5400, zipf, 1.5, mix),
        memory=3,
        slots=2,
    )
    yield Workload(
        "mixed-sizes",
        "one model of size 4, four of size 1 or 2 in memory 4; loads 3 s per size, 0.3 requests/s, 90 min",
        {"A": 12.0, "B": 6.0, "C": 6.0, "D": 3.0, "E": 3.0},
        poisson(rng, 5400, {"A": 0.05, "B": 0.07, "C": 0.06, "D": 0.06, "E": 0.06}, 2.0, mix),
        memory=4,
        sizes={"A": 4, "B": 2, "C": 2},
        slots=2,
    )


def recorded(path: Path, load_sec: float, memory: int) -> Workload:
    """Read a CSV with the columns `at_sec,model,service_sec` and, optionally, `priority`."""
    asks = []
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                priority = Priority[(row.get("priority") or "normal").upper()]
                asks.append(Ask(float(row["at_sec"]), row["model"], float(row["service_sec"]), priority))
            except (KeyError, ValueError, TypeError) as error:
                raise SystemExit(
                    f"{path}, line {number}: {error!r}; columns are at_sec, model, service_sec and priority "
                    "(high, normal or low; optional)"
                ) from error
    if not asks:
        raise SystemExit(f"{path}: no requests in it")
    models = {ask.alias: load_sec for ask in asks}
    about = f"{len(asks)} requests for {len(models)} models, {load_sec:g} s loads, {memory} in memory"
    return Workload(path.name, about, models, tuple(sorted(asks, key=lambda ask: ask.at)), memory=memory)


# --- policies -------------------------------------------------------------------------------------------


class Deciding(Protocol):
    """What the simulation asks of a policy: the interface of the scheduler."""

    @property
    def wake_at(self) -> float: ...

    def step(self, event: Event, /) -> list[Effect]: ...


def ours(workload: Workload, policy: Policy) -> Scheduler:
    scheduler = Scheduler()
    specs = {
        alias: ModelSpec(alias, workload.slots, expected_load_sec=load_sec)
        for alias, load_sec in workload.models.items()
    }
    scheduler.step(Configured(0.0, specs, policy))
    scheduler.step(MemoryChanged(0.0, {Device.gpu(0): workload.memory}))
    return scheduler


@dataclass
class Waiting:
    key: float
    seq: int
    request_id: str


@dataclass
class Resident:
    id: int
    alias: str
    ready: bool = False
    stopping: bool = False
    in_flight: set[str] = field(default_factory=set)
    used_sec: float = 0.0


class Classic:
    """Swap for the request whose turn it is, as soon as enough engines have nothing in flight."""

    wake_at = math.inf

    def __init__(
        self, workload: Workload, *, patience: ByPriority | None = None, exhaustive: bool = False
    ) -> None:
        self.workload = workload
        self.patience = patience
        self.exhaustive = exhaustive
        """Whether an engine stays as long as requests wait for it."""
        self.lines: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
        self.engines: dict[int, Resident] = {}
        self.where: dict[str, Resident] = {}
        self.seq = itertools.count()

    def step(self, event: Event, /) -> list[Effect]:
        effects: list[Effect] = []
        match event:
            case Submit(at, request_id, alias, priority):
                key = at + (self.patience[priority] if self.patience else 0.0)
                heapq.heappush(self.lines[alias], (key, next(self.seq), request_id))
            case Finished(at, request_id):
                engine = self.where.pop(request_id)
                engine.in_flight.remove(request_id)
                engine.used_sec = at
            case EngineReady(at, engine_id):
                self.engines[engine_id].ready = True
                self.engines[engine_id].used_sec = at
            case EngineExited(_, engine_id):
                del self.engines[engine_id]
        self._decide(effects)
        return effects

    def _decide(self, effects: list[Effect]) -> None:
        """Admit requests whose model has an engine; those without are served in order."""
        size = self.workload.size
        used = sum(size(engine.alias) for engine in self.engines.values())
        leaving = sum(size(engine.alias) for engine in self.engines.values() if engine.stopping)
        may_start = True
        seen: set[str] = set()
        while heads := [(line[0], alias) for alias, line in self.lines.items() if line and alias not in seen]:
            _, alias = min(heads)
            engine = next((each for each in self.engines.values() if each.alias == alias), None)
            if engine is not None and engine.ready and not engine.stopping:
                if len(engine.in_flight) < self.workload.slots:
                    _, _, request_id = heapq.heappop(self.lines[alias])
                    engine.in_flight.add(request_id)
                    self.where[request_id] = engine
                    effects.append(Grant(request_id, engine.id))
                    continue
            elif engine is None and may_start:
                missing = used + size(alias) - self.workload.memory
                if missing <= 0:
                    engine = Resident(next(self.seq), alias)
                    self.engines[engine.id] = engine
                    used += size(alias)
                    effects.append(StartEngine(engine.id, alias, {}))
                else:
                    may_start = False
                    effects += self._make_room(missing - leaving)
            seen.add(alias)

    def _make_room(self, missing: int) -> Iterator[Effect]:
        for victim in sorted(self.engines.values(), key=lambda engine: engine.used_sec):
            if missing <= 0:
                return
            if not victim.ready or victim.stopping or victim.in_flight:
                continue
            if not (self.exhaustive and self.lines[victim.alias]):
                victim.stopping = True
                missing -= self.workload.size(victim.alias)
                yield StopEngine(victim.id, StopCause.EVICTED)


PRESENT = Policy(queue_timeout_sec=math.inf, max_queue_size_per_model=10**9, idle_timeout_sec=math.inf)


def variants() -> dict[str, Callable[[Workload], Deciding]]:
    def with_policy(policy: Policy) -> Callable[[Workload], Deciding]:
        return lambda workload: ours(workload, policy)

    return {
        "fifo": lambda workload: Classic(workload),
        "deadline": lambda workload: Classic(workload, patience=PRESENT.patience_sec),
        "exhaustive": lambda workload: Classic(workload, exhaustive=True),
        "ours": with_policy(PRESENT),
        "ours, no linger": with_policy(replace(PRESENT, max_linger_sec=0)),
        "ours, factor 1": with_policy(replace(PRESENT, residency_factor=1)),
        "ours, factor 2": with_policy(replace(PRESENT, residency_factor=2)),
        "ours, factor 8": with_policy(replace(PRESENT, residency_factor=8)),
        "ours, wait 10": with_policy(replace(PRESENT, max_wait_sec=ByPriority(0, 10, 100))),
        "ours, wait 90": with_policy(replace(PRESENT, max_wait_sec=ByPriority(0, 90, 900))),
        "ours, one class": with_policy(replace(PRESENT, patience_sec=ByPriority(15, 15, 15))),
    }


# --- simulation -----------------------------------------------------------------------------------------


@dataclass
class Outcome:
    latencies: dict[Priority, list[float]] = field(default_factory=lambda: defaultdict(list))
    loads: int = 0
    rejected: int = 0
    swapping: float = 0.0
    """Memory x seconds spent loading and stopping."""
    ended_sec: float = 0.0


class Simulation:
    def __init__(self, workload: Workload, policy: Deciding, seed: int) -> None:
        self.workload = workload
        self.policy = policy
        self.rng = random.Random(seed)
        self.outcome = Outcome()
        self.now = 0.0
        self.seq = itertools.count()
        self.happenings: list[tuple[float, int, Callable[[], Event]]] = []
        self.asked: dict[str, tuple[Ask, Loop | None]] = {}
        self.engines: dict[int, str] = {}

    def run(self) -> Outcome:
        for ask in self.workload.asks:
            self.later(ask.at, lambda ask=ask: self.ask(ask, None))  # type: ignore[misc]
        for loop in self.workload.loops:
            self.ask_again(loop, loop.begins_sec)
        while self.happenings or self.policy.wake_at < math.inf:
            if self.policy.wake_at <= (self.happenings[0][0] if self.happenings else math.inf):
                self.now = max(self.now, self.policy.wake_at)
                self.feed(Tick(self.now))
            else:
                self.now, _, happening = heapq.heappop(self.happenings)
                self.feed(happening())
        self.outcome.ended_sec = self.now
        unanswered = len(self.asked)
        if unanswered:
            raise RuntimeError(f"{unanswered} requests of {self.workload.name} were never answered")
        return self.outcome

    def later(self, at: float, happening: Callable[[], Event]) -> None:
        heapq.heappush(self.happenings, (at, next(self.seq), happening))

    def ask_again(self, loop: Loop, at: float) -> None:
        if at < min(self.workload.seconds, loop.ends_sec):
            self.later(at, lambda: self.ask(Ask(at, loop.alias, loop.service_sec, loop.priority), loop))

    def ask(self, ask: Ask, loop: Loop | None) -> Event:
        request_id = f"r{next(self.seq)}"
        self.asked[request_id] = ask, loop
        return Submit(self.now, request_id, ask.alias, ask.priority)

    def feed(self, event: Event) -> None:
        for effect in self.policy.step(event):
            match effect:
                case Grant(request_id):
                    ask, _ = self.asked[request_id]
                    self.granted(request_id)
                    self.later(self.now + ask.service_sec, lambda id=request_id: self.finish(id))  # type: ignore[misc]
                case Reject(request_id):
                    self.outcome.rejected += 1
                    self.over(request_id)
                case Inspect(alias):
                    places = ({Device.gpu(0): self.workload.size(alias)},)
                    self.later(self.now, lambda alias=alias, places=places: Inspected(self.now, alias, places))  # type: ignore[misc]
                case StartEngine(engine_id, alias):
                    self.outcome.loads += 1
                    self.engines[engine_id] = alias
                    load_sec = self.load_sec(alias)
                    self.outcome.swapping += load_sec * self.workload.size(alias)
                    self.later(self.now + load_sec, lambda id=engine_id: EngineReady(self.now, id))  # type: ignore[misc]
                case StopEngine(engine_id):
                    self.outcome.swapping += STOP_SEC * self.workload.size(self.engines[engine_id])
                    self.later(self.now + STOP_SEC, lambda id=engine_id: EngineExited(self.now, id, "stopped"))  # type: ignore[misc]

    def load_sec(self, alias: str) -> float:
        return self.workload.models[alias]

    def granted(self, request_id: str) -> None:
        """Called when a request has its slot; subclasses may override it."""

    def finish(self, request_id: str) -> Event:
        ask, _ = self.asked[request_id]
        self.outcome.latencies[ask.priority].append(self.now - ask.at)
        self.over(request_id)
        return Finished(self.now, request_id)

    def over(self, request_id: str) -> None:
        _, loop = self.asked.pop(request_id)
        if loop is not None:
            self.ask_again(loop, self.now + loop.think_sec(self.rng))


def optimum(workload: Workload) -> Outcome | None:
    """The least mean latency that any order of service reaches, knowing what will come; None if not small.

    On one place and one slot. Requests for one model are served in order of arrival, which costs nothing when
    their service times are alike. A model may be loaded before it is asked for.
    """
    lines = [[ask for ask in workload.asks if ask.alias == alias] for alias in workload.models]
    if workload.loops or workload.memory > 1 or workload.slots > 1 or len(workload.asks) > 12:
        return None
    best: tuple[float, int, list[tuple[Priority, float]]] = (math.inf, 0, [])

    def serve(
        now: float, resident: int, served: tuple[int, ...], loads: int, latencies: list[tuple[Priority, float]]
    ) -> None:
        nonlocal best
        spent = sum(latency for _, latency in latencies)
        if spent >= best[0]:
            return
        if len(latencies) == len(workload.asks):
            best = (spent, loads, latencies)
            return
        for number, line in enumerate(lines):
            if served[number] == len(line):
                continue
            ask = line[served[number]]
            swap = number != resident
            cost = workload.models[ask.alias] + (STOP_SEC if resident >= 0 else 0.0) if swap else 0.0
            end = max(now + cost, ask.at) + ask.service_sec
            after = (*served[:number], served[number] + 1, *served[number + 1 :])
            serve(end, number, after, loads + swap, [*latencies, (ask.priority, end - ask.at)])

    serve(0.0, -1, (0,) * len(lines), 0, [])
    _, loads, latencies = best
    outcome = Outcome(loads=loads)
    for priority, latency in latencies:
        outcome.latencies[priority].append(latency)
    return outcome


# --- output ---------------------------------------------------------------------------------------------


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def line(name: str, outcome: Outcome, workload: Workload, priorities: list[Priority]) -> str:
    every = [latency for latencies in outcome.latencies.values() for latency in latencies]
    lost = ""
    if outcome.ended_sec:
        lost = f"{outcome.swapping / outcome.ended_sec / workload.memory:6.1%}"
    cells = [f"{name:16}{len(every):7}{outcome.loads:7}{lost:>8}{sum(every) / len(every):9.1f}"]
    for priority in priorities:
        latencies = outcome.latencies[priority]
        mean = sum(latencies) / len(latencies)
        cells.append(f"{mean:9.1f}{percentile(latencies, 0.95):8.1f}{max(latencies):8.1f}")
    return " |".join(cells)


def compare(workload: Workload, names: list[str], seed: int) -> None:
    present = {ask.priority for ask in workload.asks} | {loop.priority for loop in workload.loops}
    priorities = sorted(present)
    print(f"\n{workload.name}: {workload.about}")
    titles = " |".join(f"{priority.name.lower():>9}{'p95':>8}{'max':>8}" for priority in priorities)
    print(f"{'':16}{'served':>7}{'loads':>7}{'lost':>8}{'mean':>9} |{titles}")
    for name, build in variants().items():
        if name in names:
            outcome = Simulation(workload, build(workload), seed).run()
            print(line(name, outcome, workload, priorities))
            if outcome.rejected:
                print(f"{'':16}and {outcome.rejected} rejected")
    best = optimum(workload) if "optimum" in names else None
    if best is not None:
        print(line("optimum", best, workload, priorities))


def speed() -> None:
    """Processor time of the scheduler itself for a request that finds its model ready."""
    print("\nprocessor time per request (Submit and Finished)")
    for about, residents, waiting in (
        ("one model resident", 1, False),
        ("30 models resident", 30, False),
        ("30 models resident, another waits for room", 30, True),
    ):
        aliases = [f"m{number}" for number in range(residents + 1)]
        workload = Workload("", "", dict.fromkeys(aliases, 10.0), memory=residents, slots=2)
        scheduler = ours(workload, replace(PRESENT, max_concurrent_models=100, residency_factor=1000))
        engines = 0
        for number, alias in enumerate(aliases[: residents + waiting]):
            scheduler.step(Submit(0.0, f"first-{alias}", alias))
            scheduler.step(Inspected(0.0, alias, ({Device.gpu(0): 1},)))
            if number < residents:
                engines += 1
                scheduler.step(EngineReady(10.0, engines))
        pairs = 20_000 if not waiting else 2_000
        began = time.process_time()
        for number in range(pairs):
            at = 20.0 + number * 0.01
            scheduler.step(Submit(at, f"r{number}", aliases[number % residents]))
            scheduler.step(Finished(at + 0.005, f"r{number}"))
        spent = time.process_time() - began
        print(f"  {about:44}{spent / pairs * 1e6:8.1f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="*", help="names or beginnings of names; all when none is given")
    parser.add_argument("--policy", action="append", help="only these policies (may be repeated)")
    parser.add_argument("--csv", type=Path, help="a recorded workload: at_sec,model,service_sec[,priority]")
    parser.add_argument("--load-sec", type=float, default=8.0, help="load time of every model in --csv (8)")
    parser.add_argument("--memory", type=int, default=1, help="models of --csv that fit at once (1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="name workloads and policies")
    args = parser.parse_args()

    chosen = [recorded(args.csv, args.load_sec, args.memory)] if args.csv else list(workloads(args.seed))
    if args.workload:
        chosen = [workload for workload in chosen if workload.name.startswith(tuple(args.workload))]
    names = [*variants(), "optimum"]
    if args.list:
        for workload in chosen:
            print(f"{workload.name:14}{workload.about}")
        print("policies: " + "; ".join(names))
        return
    if unknown := set(args.policy or ()) - set(names):
        raise SystemExit(f"no policy is called {', '.join(sorted(unknown))}; there are: {'; '.join(names)}")
    if not chosen:
        raise SystemExit(f"no workload is called {', '.join(args.workload)}; --list names them")
    for workload in chosen:
        compare(workload, args.policy or names, args.seed)
    if not args.workload and not args.csv:
        speed()


if __name__ == "__main__":
    main()
