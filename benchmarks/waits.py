"""How accurate are forecasts of waiting times? Compares those given to waiting requests with the real waits.

In the simulation of `policies.py`, with the router's own scheduler, each waiting request gets a forecast on
arrival and after 1, 3, 10, 30, 100 and 300 s, which is compared with the real wait once it has its slot. A
forecast may be "unknown"; the share of these is shown. Service and load times vary around their means, and
arrivals are random.

Waits below a second, forecast or real, count as a second. The goals, for each workload: a median error of at most
25 %, at most 5 % of the forecasts below half of the real wait, and at most 20 % unknown.

`--all` also has the workloads of `policies.py`, of which the traces are about first loads, and these are unknown.
`--seed` has other chances. `--live` asks a real router with real engines for two minutes: six clients on three
models with room for one; it ends when one of them does.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers import Server, chat_body, engine_or_embedded, model_file, router
from policies import LOW, NORMAL, PRESENT, Ask, Loop, Simulation, Workload, evenly, ours, poisson, workloads

from router.scheduling.messages import Event, Tick

MOMENTS_SEC = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
SHORTEST_SEC = 1.0
MEDIAN_ERROR = 0.25
LEAST_SHARE = 0.5
MOST_BELOW = 0.05
MOST_UNKNOWN = 0.2


@dataclass
class Told:
    """Forecasts of waits, and the real waits."""

    pairs: list[tuple[float, float]] = field(default_factory=list)
    unknown: int = 0
    forecasts: int = 0
    seconds: float = 0.0
    """CPU time of all forecasts."""

    @property
    def errors(self) -> list[float]:
        return sorted(abs(told - real) / real for told, real in self.pairs)

    @property
    def median_error(self) -> float:
        return statistics.median(self.errors or [0.0])

    @property
    def below(self) -> float:
        """Return the share of requests that waited more than twice as long as forecast."""
        return sum(told < LEAST_SHARE * real for told, real in self.pairs) / max(1, len(self.pairs))

    @property
    def above(self) -> float:
        return sum(told > real / LEAST_SHARE for told, real in self.pairs) / max(1, len(self.pairs))

    @property
    def unknown_share(self) -> float:
        return self.unknown / max(1, self.unknown + len(self.pairs))

    @property
    def is_true(self) -> bool:
        return (
            self.median_error <= MEDIAN_ERROR and self.below <= MOST_BELOW and self.unknown_share <= MOST_UNKNOWN
        )

    def hear(self, told_sec: float | None, real_sec: float) -> None:
        if told_sec is None:
            self.unknown += 1
        else:
            self.pairs.append((max(SHORTEST_SEC, told_sec), max(SHORTEST_SEC, real_sec)))


class Listening(Simulation):
    """Collects the forecasts of waiting requests until they are served."""

    def __init__(self, workload: Workload, seed: int, spread: float = 0.3) -> None:
        self.scheduler = ours(workload, PRESENT)
        super().__init__(workload, self.scheduler, seed)
        self.told = Told()
        self.spread = spread
        self.hears: dict[str, list[tuple[float, float | None]]] = {}

    def ask(self, ask: Ask, loop: Loop | None) -> Event:
        if loop is not None:
            spread = self.rng.uniform(1 - self.spread, 1 + self.spread)
            ask = Ask(ask.at, ask.alias, ask.service_sec * spread, ask.priority)
        event = super().ask(ask, loop)
        request_id = next(reversed(self.asked))
        self.hears[request_id] = []
        for moment_sec in MOMENTS_SEC:
            self.later(self.now + moment_sec, lambda id=request_id: self.listen(id))  # type: ignore[misc]
        return event

    def load_sec(self, alias: str) -> float:
        return super().load_sec(alias) * self.rng.uniform(1 - self.spread, 1 + self.spread)

    def listen(self, request_id: str) -> Event:
        if request_id in self.hears:
            began = time.process_time()
            forecast = self.scheduler.forecast(self.now)
            self.told.seconds += time.process_time() - began
            self.told.forecasts += 1
            self.hears[request_id].append((self.now, forecast.wait_sec(request_id, self.now)))
        return Tick(self.now)

    def granted(self, request_id: str) -> None:
        for at, told_sec in self.hears.pop(request_id):
            self.told.hear(told_sec, self.now - at)


def stated(seed: int) -> Iterator[Workload]:
    """Return the workloads that are about waiting."""
    rng = random.Random(seed)
    three, one = dict.fromkeys("ABC", 8.0), {"A": 8.0}
    twelve = tuple(Loop("A", 3.0) for _ in range(12))
    yield Workload(
        "saturated", "twelve clients without think time on one model, two slots", one, (), twelve, 600, slots=2
    )
    crowd = poisson(rng, 300, {"A": 1.2}, 1.0)
    yield Workload(
        "crowd", "for five minutes one model is asked for 1.2 times as often as it can serve", one, crowd
    )
    each = tuple(Loop(alias, 3.0) for alias in "ABCABCABC")
    yield Workload(
        "rotating", "nine clients without think time on three models, one place", three, (), each, 1200, slots=2
    )
    crowds = poisson(rng, 600, evenly(0.9, "ABC"), 1.5)
    yield Workload(
        "crowds", "three models, one place, for ten minutes 1.35 times as much as they can serve", three, crowds
    )
    quick = dict.fromkeys("ABC", 1.0)
    each = tuple(Loop(alias, 1.0) for alias in "AABBCC")
    yield Workload(
        "quick", "six clients without think time on three models that load in a second", quick, (), each, 600
    )
    normal = tuple(Loop("A", 2.0) for _ in range(4))
    low = (
        Loop("A", 2.0, lambda rng: rng.expovariate(1 / 30), LOW, 20.0),
        Loop("A", 2.0, priority=LOW, begins_sec=5.0),
    )
    yield Workload(
        "low", "two low clients behind four normal ones without think time, one slot", one, (), normal + low, 1200
    )
    mix = {NORMAL: 0.9, LOW: 0.1}
    stream = poisson(rng, 1800, {"A": 0.45}, 2.0, mix)
    yield Workload(
        "low-behind", "a stream of normal requests that takes 81 % of one model, and some low ones", one, stream
    )
    short = tuple(Loop("A", 1.5, ends_sec=200) for _ in range(8))
    long = tuple(Loop("A", 12.0, begins_sec=200) for _ in range(8))
    yield Workload(
        "longer",
        "eight clients without think time, two slots; answers take eight times as long from one moment on",
        one,
        (),
        short + long,
        600,
        slots=2,
    )
    seldom = poisson(rng, 3600, evenly(0.02, "ABCDEF"), 2.0)
    yield Workload(
        "cold",
        "six models that are seldom asked for, places for three",
        dict.fromkeys("ABCDEF", 8.0),
        seldom,
        memory=3,
    )


def listen(workload: Workload, seed: int) -> Told:
    simulation = Listening(workload, seed)
    simulation.run()
    return simulation.told


class Client(threading.Thread):
    """Asks a model again and again, for answers of various lengths."""

    def __init__(self, router: Server, alias: str, until_sec: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.router = router
        self.alias = alias
        self.until_sec = until_sec
        self.rng = random.Random(seed)
        self.waited_sec: dict[str, float] = {}
        self.died_of: Exception | None = None

    def run(self) -> None:
        try:
            self.ask()
        except Exception as error:  # whatever it is, what the others were told is worth nothing then
            self.died_of = error

    def ask(self) -> None:
        while time.monotonic() < self.until_sec:
            headers = self.router.headers | {"x-request-id": f"{self.alias}-{self.rng.getrandbits(48):x}"}
            connection = http.client.HTTPConnection("127.0.0.1", self.router.port, timeout=120)
            body = json.dumps(chat_body(self.alias, tokens=self.rng.randint(20, 80)))
            connection.request("POST", "/v1/chat/completions", body, headers)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{self.alias} is not served: {answer.status}")
            self.waited_sec[headers["x-request-id"]] = int(answer.headers["x-queue-ms"]) / 1000
            connection.close()


def live(seconds: float = 120, megabytes: int | None = 100) -> Told:
    """Compare `/v1/queue/stats`, read twice a second, with `X-Queue-Ms` of clients without think time."""
    told = Told()
    hears: dict[str, list[tuple[float, float | None]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        files = {alias: model_file(alias, megabytes=megabytes, seed=number) for number, alias in enumerate("abc")}
        flags = {"ctx-size": "1024", "threads": "1"}
        with router(files, flags, engine_or_embedded(), folder=Path(folder)) as server:
            until_sec = time.monotonic() + seconds
            clients = [Client(server, alias, until_sec, number) for number, alias in enumerate("aabbcc")]
            for client in clients:
                client.start()
            while any(client.is_alive() for client in clients):
                for stats in server.call("GET", "/v1/queue/stats").json()["per_model"].values():
                    for request in stats["waiting"]:
                        hears[request["id"]].append((request["waited_sec"], request["expected_wait_sec"]))
                time.sleep(0.5)
                for client in clients:
                    if client.died_of is not None:
                        raise SystemExit(f"a client of {client.alias} died: {client.died_of!r}")
    for client in clients:
        for request_id, waited_sec in client.waited_sec.items():
            for after_sec, told_sec in hears[request_id]:
                told.hear(told_sec, waited_sec - after_sec)
    return told


def line(name: str, told: Told) -> str:
    cost_ms = told.seconds / max(1, told.forecasts) * 1e3
    return (
        f"{name:14}{len(told.pairs):7}{told.unknown_share:9.1%}{told.median_error:9.1%}"
        f"{told.below:9.1%}{told.above:9.1%}{cost_ms:9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="*", help="names or beginnings of names; all if none is given")
    parser.add_argument("--all", action="store_true", help="the workloads of policies.py, too")
    parser.add_argument("--live", action="store_true", help="real engines instead")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(f"{'':14}{'told':>7}{'unknown':>9}{'error':>9}{'< half':>9}{'> twice':>9}{'ms each':>9}")
    if args.live:
        print(line("live", live()))
        return
    missed: list[str] = []
    for workload in [*stated(args.seed), *(workloads(args.seed) if args.all else ())]:
        if args.workload and not workload.name.startswith(tuple(args.workload)):
            continue
        told = listen(workload, args.seed)
        print(line(workload.name, told), flush=True)
        if not told.is_true and not workload.name.startswith("trace"):
            missed.append(workload.name)
    if missed:
        raise SystemExit(f"the goals are missed by {', '.join(missed)}")


if __name__ == "__main__":
    main()
