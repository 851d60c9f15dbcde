"""Models that do not fit together: which requests wait, for how long, and how much is lost to swapping?

    python benchmarks/fairness.py [trace] [loops] [broken] [endless] [idle] [--seconds 60]

Real engines on random models of 340 MB, room for one of them; us first, then llama-server's router mode on the
same files with the same flags.

  trace    the requests A B A A C A B C, 20 ms apart: how many loads do they take?
  loops    one client each on A, B and C that asks again as soon as it is answered: how many answers?
  broken   a good model is in use while a broken one is asked for once a second: once with its file cut off, once
           with a tensor missing, which only the engine notices. Does the good one stay available?
  endless  six clients keep A busy without a pause; one request for B. When is it answered?
  idle     what a router takes that has nothing to do, without engines and with two (tiny ones)

Answers are one token long, which makes a swap dear beside an answer; --tokens makes them longer.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from peers import (
    Goals,
    Router,
    Server,
    engine_or_embedded,
    llama_server_router,
    model_file,
    print_table,
    router,
)

from router.config.schema import Scheduling
from router.engines.llamacpp.binary import Binary

MEGABYTES = 340
FLAGS = {"ctx-size": "2048", "threads": "1", "parallel": "4"}
IN_TIME_SEC = 2
"""An answer that takes longer than this does not count as available."""


@dataclass
class Answers:
    """The answers that clients got."""

    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def ask(self, server: Server, model: str, tokens: int = 1, timeout_sec: float = 120) -> None:
        began = time.perf_counter()
        try:
            answer = server.chat(model, tokens=tokens, timeout_sec=timeout_sec)
        except OSError as error:
            self.problems.append(f"{type(error).__name__}: {error}")
            return
        if answer.status == 200:
            self.seconds.append(time.perf_counter() - began)
        else:
            self.problems.append(f"{answer.status}: {answer.content[:200].decode(errors='replace')}")

    @property
    def asked(self) -> int:
        return len(self.seconds) + len(self.problems)

    @property
    def median_sec(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def longest_sec(self) -> float:
        return max(self.seconds, default=math.nan)


@dataclass(frozen=True)
class Bench:
    """Common parts of all scenarios."""

    binary: Binary
    folder: Path
    seconds: float
    tokens: int
    goals: Goals

    def each(self, models: dict[str, Path], resident: int = 1) -> Iterator[Server]:
        """Run our router, then the peer if there is one: one after the other, as they share the processor."""
        with router(models, FLAGS, self.binary, resident=resident, folder=self.folder) as ours:
            yield ours
        if self.binary.kind == "llama-server":
            with llama_server_router(models, FLAGS, self.binary, resident=resident, folder=self.folder) as peer:
                yield peer


def big_models(*names: str) -> dict[str, Path]:
    return {name: model_file(name, megabytes=MEGABYTES, seed=ord(name)) for name in names}


@contextmanager
def clients(server: Server, count: int, model: str, tokens: int) -> Iterator[Answers]:
    """Run so many clients, each asking again as soon as it is answered, until the block ends."""
    answers = Answers()
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            answers.ask(server, model, tokens)

    threads = [threading.Thread(target=loop) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# --- scenarios ------------------------------------------------------------------------------------------


def trace(bench: Bench) -> None:
    rows = []
    for server in bench.each(big_models("A", "B", "C")):
        answers = Answers()
        with ThreadPoolExecutor(8) as pool:
            for model in "ABAACABC":
                pool.submit(answers.ask, server, model, bench.tokens)
                time.sleep(0.02)
        answered, loads = len(answers.seconds), server.spawns()
        rows.append([server.name, str(answered), str(loads), f"{answers.longest_sec:.2f}"])
        if isinstance(server, Router):
            bench.goals.at_least("trace: answered of 8", answered, 8)
            bench.goals.at_most("trace: loads", loads, 3)
    print_table(["A B A A C A B C", "answered", "loads", "last after s"], rows)


def loops(bench: Bench) -> None:
    rows = []
    served = []
    for server in bench.each(big_models("A", "B", "C")):
        before = server.spawns()
        with (
            clients(server, 1, "A", bench.tokens) as a,
            clients(server, 1, "B", bench.tokens) as b,
            clients(server, 1, "C", bench.tokens) as c,
        ):
            time.sleep(bench.seconds)
            counts = [len(answers.seconds) for answers in (a, b, c)]
            loads = server.spawns() - before
        total = Answers([*a.seconds, *b.seconds, *c.seconds], [*a.problems, *b.problems, *c.problems])
        served.append(sum(counts))
        rows.append(
            [
                server.name,
                str(sum(counts)),
                " ".join(str(count) for count in counts),
                str(loads),
                f"{total.median_sec:.2f}",
                f"{total.longest_sec:.2f}",
                str(len(total.problems)),
            ]
        )
        if isinstance(server, Router):
            bench.goals.at_most("loops: failed requests", len(total.problems), 0)
    titles = [
        f"3 clients, {bench.seconds:g} s",
        "answered",
        "of A B C",
        "loads",
        "median s",
        "longest s",
        "failed",
    ]
    print_table(titles, rows)
    if len(served) == 2:
        bench.goals.at_least("loops: answers to llama-server router mode's", served[0] / max(1, served[1]), 3)


def broken(bench: Bench) -> None:
    tiny = model_file("broken")
    content = tiny.read_bytes()
    cut_off = bench.folder / "cut-off.gguf"
    cut_off.write_bytes(content[: len(content) * 3 // 5])
    incomplete = bench.folder / "incomplete.gguf"
    incomplete.write_bytes(content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    for what, file in (("file cut off", cut_off), ("tensor missing", incomplete)):
        rows = []
        for server in bench.each({**big_models("A"), "bad": file}):
            good, bad = Answers(), Answers()
            good.ask(server, "A")
            good.seconds.clear()
            with ThreadPoolExecutor(256) as pool:
                began = time.monotonic()
                for tick in range(round(bench.seconds * 10)):
                    time.sleep(max(0.0, began + tick / 10 - time.monotonic()))
                    pool.submit(good.ask, server, "A", 1, 30)
                    if tick % 10 == 5:
                        pool.submit(bad.ask, server, "bad", 1, 30)
            in_time = sum(took <= IN_TIME_SEC for took in good.seconds) / good.asked
            spawns = server.spawns("bad") * 60 / bench.seconds
            rows.append(
                [
                    server.name,
                    f"{in_time:.1%}",
                    f"{good.longest_sec:.2f}",
                    str(len(good.problems)),
                    f"{spawns:.1f}",
                    str(server.spawns("A") - 1),
                ]
            )
            if isinstance(server, Router):
                bench.goals.at_least(f"broken ({what}): good model available", 100 * in_time, 99, " %")
                bench.goals.at_most(f"broken ({what}): spawns per minute", spawns, 6)
                print(
                    f"{what}: clients read, for example: {bad.problems[-1] if bad.problems else 'no error at all'}"
                )
        titles = [what, f"good in {IN_TIME_SEC} s", "longest s", "failed", "bad spawns/min", "good reloads"]
        print_table(titles, rows)


def endless(bench: Bench) -> None:
    rows = []
    for server in bench.each(big_models("A", "B")):
        for model in ("B", "A"):  # so that their load times are known
            Answers().ask(server, model)
        b = Answers()
        with clients(server, 6, "A", bench.tokens) as a:
            time.sleep(3)
            asking = threading.Thread(target=b.ask, args=(server, "B", bench.tokens))
            began = time.monotonic()
            asking.start()
            asking.join(min(60.0, bench.seconds))
            while_busy = not asking.is_alive()
            answered = len(a.seconds)
            busy_sec = time.monotonic() - began + 3
        asking.join()
        wait = f"{b.longest_sec:.2f}" + ("" if while_busy else ", when A fell idle")
        rows.append(
            [server.name, wait, f"{answered / busy_sec:.1f}", f"{a.longest_sec:.2f}", str(len(a.problems))]
        )
        if isinstance(server, Router):
            bound = bound_sec(server, a.longest_sec if not while_busy else a.median_sec)
            bench.goals.at_most("endless: B answered after", b.longest_sec, bound, " s")
            bench.goals.at_most("endless: failed requests for A", len(a.problems), 0)
    print_table(["6 clients on A, 1 request for B", "B after s", "A's answers/s", "A's longest s", "failed"], rows)


def bound_sec(server: Server, answer_sec: float) -> float:
    """Return the bound that the configuration gives a normal request for B while A is busy, from measured loads.

    The request waits for its share of swaps or for A's quantum, whichever is longer, then for requests in flight
    on A, then for the load and its own answer; half a second is allowed for the processes that stop and start.
    """
    models = server.call("GET", "/v1/models/status").json()["models"]
    swap_sec = models["A"]["load_sec"] + models["B"]["load_sec"]
    policy = Scheduling()
    its_turn = min(policy.max_wait_sec.normal, policy.wait_factor.normal * swap_sec)
    quantum = policy.residency_factor * swap_sec
    return float(max(its_turn, quantum) + 2 * answer_sec + models["B"]["load_sec"] + 0.5)


def idle(bench: Bench) -> None:
    rows = []
    model = model_file("idle")
    seconds = min(30.0, bench.seconds)
    for server in bench.each({"A": model, "B": model}, resident=2):
        for engines, load in ((0, ""), (2, "AB")):
            for alias in load:
                Answers().ask(server, alias)
            time.sleep(3)  # until it has calmed down
            before = server.cpu()
            time.sleep(seconds)
            percent = (server.cpu() - before).total / seconds * 100
            rss = server.rss_mib()
            rows.append([f"{server.name}, {engines} engines", f"{percent:.2f} %", f"{rss:.0f} MiB"])
            if isinstance(server, Router):
                bench.goals.at_most(f"idle: CPU, {engines} engines", percent, 0.5, " %")
                bench.goals.at_most(f"idle: memory, {engines} engines", rss, 120, " MiB")
    print_table([f"idle for {seconds:g} s", "CPU", "RSS"], rows)


SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "trace": trace,
    "loops": loops,
    "broken": broken,
    "endless": endless,
    "idle": idle,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="*", help=f"{', '.join(SCENARIOS)}; all when none is given")
    parser.add_argument("--seconds", type=float, default=60, help="length of a scenario that has one (60)")
    parser.add_argument("--tokens", type=int, default=1, help="length of an answer (1)")
    args = parser.parse_args()
    if unknown := set(args.scenario) - set(SCENARIOS):
        parser.error(f"no scenario is called {', '.join(sorted(unknown))}; there are: {', '.join(SCENARIOS)}")

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(engine_or_embedded(), Path(folder), args.seconds, args.tokens, Goals())
        for name in args.scenario or SCENARIOS:
            print()
            SCENARIOS[name](bench)
    return bench.goals.judge()


if __name__ == "__main__":
    sys.exit(main())
