"""What do honest clients feel of all attacks at once?

    python benchmarks/hostile.py [--minutes 3] [--attacks KIND…]

Honest clients chat, read streams, and look at lists and pages, alone for a while, then for twice as long beside
all attackers, and so on. The attackers and their target are in `tests/hostile/`. Attackers run at the lowest
priority (`nice 19`, for their sessions, too, where Linux shares processors among these); their CPU time is
printed, because it is missing elsewhere on the machine. Figures are those of honest clients beside the attacks,
as multiples of those without. Three more show the share of the machine: how long a server took that does nothing
but answer; for how long the event loop had work and no processor (Linux); and for how long its own thread held
it, which is due to the router alone.

Memory is compared with that of a router after some seconds of all attacks, because the first page and the first
large body create what is kept once. Its memory before is printed, too; the sizes after each round show whether it
goes on growing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import InitVar, dataclass, field
from pathlib import Path

import psutil
from peers import ROOT, Goals, Router, Server, free_port, model_file, print_table

sys.path[:0] = [str(ROOT / "tests" / "hostile")]

import event_loop  # noqa: E402
from honest import BARE, KILLED, Tally, be_honest  # noqa: E402
from trial import ATTACKS, LOADED, attacked, configuration  # noqa: E402

WARM_UP_SEC = 10.0
ROUND_SEC = 60.0
PAUSE_SEC = 5.0
"""Time for the router to clear up after the attackers before clients are measured alone again."""
SETTLED_SEC = 30.0


class Cpu:
    """CPU time by process, in seconds."""

    def __init__(self, router: psutil.Process) -> None:
        self._router = router
        self._engines: dict[int, float] = {}
        self._over = threading.Event()
        self.shares: Counter[str] = Counter()
        self.seconds = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        before, began = self._taken(), time.monotonic()
        looker = threading.Thread(target=self._look)
        self._over.clear()
        looker.start()
        try:
            yield
        finally:
            self._over.set()
            looker.join()
            self.seconds += time.monotonic() - began
            self.shares.update({who: taken - before[who] for who, taken in self._taken().items()})

    def _look(self) -> None:
        """Engines are killed, and take what is known of them along."""
        while not self._over.wait(0.5):
            self._taken()

    def _taken(self) -> dict[str, float]:
        for engine in self._router.children():
            try:
                times = engine.cpu_times()
                self._engines[engine.pid] = times.user + times.system
            except psutil.Error:
                pass
        own, router, machine = os.times(), self._router.cpu_times(), psutil.cpu_times()
        waited = Path(f"/proc/{self._router.pid}/task/{self._router.pid}/schedstat")
        waited_ns = int(waited.read_text().split()[1]) if waited.exists() else 0
        return {
            "the router": router.user + router.system,
            "engines": sum(self._engines.values()),
            "honest clients": own.user + own.system,
            "attackers": own.children_user + own.children_system,
            "the machine, all together": sum(machine) - machine.idle - machine.iowait,
            "(the event loop had work, and none)": waited_ns / 1e9,
        }


@dataclass
class Phase:
    """Figures of all rounds without attackers, or of all rounds with them."""

    router: InitVar[psutil.Process]
    tally: Tally = field(default_factory=Tally)
    cpu: Cpu = field(init=False)
    held_ms: tuple[float, ...] = (0.0, 0.0, 0.0)
    """The longest times for which the event loop was held, by the clocks of `event_loop.py`."""
    rss_mib: list[float] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """What it has to say that is not of honest requests."""

    def __post_init__(self, router: psutil.Process) -> None:
        self.cpu = Cpu(router)


class Trial:
    """The router, and its figures without and with attackers."""

    def __init__(self, server: Server, bare: Server, configuration_file: Path, held: mmap.mmap) -> None:
        self._server, self._bare = server, bare
        self._configuration_file = configuration_file
        self._held = held
        self.router = psutil.Process(server.process.pid)
        self.alone, self.beside = Phase(self.router), Phase(self.router)
        self.told: dict[str, Counter[str]] = {}
        self.fresh_mib = 0.0
        """Memory of the router before any attack."""

    def warm_up(self, kinds: list[str]) -> None:
        asyncio.run(be_honest(self._server.port, WARM_UP_SEC))
        self.fresh_mib = self._server.rss_mib()
        with attacked(self._server.port, self.router.pid, self._configuration_file, WARM_UP_SEC, kinds):
            time.sleep(WARM_UP_SEC)
        time.sleep(PAUSE_SEC)

    def be_alone(self, seconds: float) -> None:
        with self._measured(self.alone):
            self.alone.tally.add(asyncio.run(be_honest(self._server.port, seconds, self._bare.port)))

    def be_attacked(self, seconds: float, kinds: list[str]) -> None:
        attack = attacked(self._server.port, self.router.pid, self._configuration_file, seconds, kinds)
        with self._measured(self.beside), attack as told:
            self.beside.tally.add(asyncio.run(be_honest(self._server.port, seconds, self._bare.port)))
        for who, by_kind in told.items():
            for kind, did in by_kind.items():
                if isinstance(did, list):  # of a flood, whose kinds are many
                    kind, did = "bytes", dict(zip(("sent", "read", "connections ended"), did, strict=True))
                self.told.setdefault(f"{who}: {kind}", Counter()).update(did)

    @contextmanager
    def _measured(self, phase: Phase) -> Iterator[None]:
        self._held[:] = bytes(len(self._held))
        lines = len(self._server.log.splitlines())
        with phase.cpu.watching():
            yield
        held_ms = (sec * 1000 for sec in event_loop.HELD.unpack(self._held[:]))
        phase.held_ms = tuple(map(max, phase.held_ms, held_ms))
        phase.rss_mib.append(self._server.rss_mib())
        phase.log += [line for line in self._server.log.splitlines()[lines:] if "honest-" not in line]


def bare_server() -> Server:
    """Run a server that does nothing but answer."""
    port = free_port()
    command = [sys.executable, event_loop.__file__, "engine", "--port", str(port)]
    return Server("a bare server", command, port)


def tell(trial: Trial) -> None:
    print("\nwhat attackers did, and were answered:")
    for kind, did in trial.told.items():
        print(f"  {kind}: " + ", ".join(f"{count} × {what}" for what, count in did.most_common(12)))
    print()
    phases = (trial.alone, trial.beside)
    taken = [
        (who, *(f"{phase.cpu.shares[who] / phase.cpu.seconds:.2f}" for phase in phases))
        for who in trial.alone.cpu.shares
    ]
    print_table(("processors taken by", "alone", "beside"), taken)
    print()
    rows = []
    for kind in sorted(trial.alone.tally.took_sec):
        figures = []
        for phase in phases:
            took = sorted(phase.tally.took_sec[kind])
            figures += [str(len(took)), *(f"{took[int(len(took) * share)] * 1000:.1f}" for share in (0.5, 0.99))]
            figures.append(f"{took[-1] * 1000:.0f}")
        rows.append((kind, *figures))
    columns = ("answers", "median", "p99", "most")
    print_table(("ms", *(f"{name} {when}" for when in ("alone", "beside") for name in columns)), rows)
    for name, phase in zip(("alone", "beside"), phases, strict=True):
        gaps = [gap_sec * 1000 for gap_sec in sorted(phase.tally.gaps_sec)]
        held, wall, own = phase.held_ms
        print(f"\n{name}: in {len(gaps)} streams the largest gap was {gaps[len(gaps) // 2]:.0f} ms in the median,")
        print(f"  {gaps[-1]:.0f} ms at most; the event loop was held for {held:.0f} ms at most, by the wall")
        rss = ", ".join(f"{mib:.0f}" for mib in phase.rss_mib)
        print(f"  clock {wall:.0f}, by its thread's {own:.0f}; RSS after each round {rss} MiB")
    for what in trial.alone.tally.lost[:10]:
        print(f"lost alone: {what}")
    for what in trial.beside.tally.lost[:30]:
        print(f"lost: {what}")


def judge(trial: Trial, settled_mib: float) -> int:
    alone, beside = trial.alone.tally, trial.beside.tally
    goals = Goals()
    goals.at_most(f"honest requests lost, of {beside.asked}", len(beside.lost), 0)
    for kind in sorted(alone.took_sec.keys() - {BARE, f"chat with {KILLED}, normal"}):
        goals.at_most(f"{kind}: p99, beside it alone", beside.slow_sec(kind) / alone.slow_sec(kind), 3)
    goals.at_most("/live: p99", beside.slow_sec("/live") * 1000, 50, " ms")
    goals.at_most("/live: p99, beside a bare server's", beside.slow_sec("/live") / beside.slow_sec(BARE), 3)
    goals.at_most("event loop held by its own thread", trial.beside.held_ms[2], 20, " ms")
    gap_sec = max(beside.gaps_sec) - max(alone.gaps_sec)
    goals.at_most("largest gap in a stream, over that alone", gap_sec * 1000, 100, " ms")
    first_mib = trial.alone.rss_mib[0]
    goals.at_most(
        f"RSS {SETTLED_SEC:.0f} s after, over {first_mib:.0f} MiB before, {trial.fresh_mib:.0f} fresh",
        100 * (settled_mib / first_mib - 1),
        5,
        " %",
    )
    log = trial.beside.log
    goals.at_most("lines in the log about attackers, a second", len(log) / trial.beside.cpu.seconds, 100)
    goals.at_most("tracebacks in it", sum("Traceback" in line for line in log), 0)
    return goals.judge()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=3)
    options.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    options.add_argument("--log", type=Path, help="a file for the router's log")
    options.add_argument("--holders", type=Path, help="a file for who held the event loop; watching takes time")
    options.add_argument("--own-processor", action="store_true", help="the router's, and nobody else's (taskset)")
    asked = options.parse_args()
    *others, own = sorted(os.sched_getaffinity(0)) if asked.own_processor else (0,)
    if asked.own_processor:
        os.sched_setaffinity(0, others)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        large, small = model_file("hostile", megabytes=40), model_file("overhead")
        setup = configuration(folder, large=large, small=small, processors=",".join(map(str, others)))
        setup["system"]["base_port"] = free_port()
        configuration_file = folder / "config.json"
        configuration_file.write_text(json.dumps(setup))
        place = folder / "held"
        place.write_bytes(bytes(event_loop.HELD.size))
        held = mmap.mmap(stack.enter_context(place.open("r+b")).fileno(), event_loop.HELD.size)
        port = free_port()
        command = [sys.executable, event_loop.__file__, "watched", str(place)]
        command += ["--config", str(configuration_file), "--port", str(port)]
        if asked.own_processor:
            command = ["taskset", "-c", str(own), *command]
        environ = {"LLAMA_ROUTER_STATE_DIR": str(folder / "state")}
        if asked.holders:
            environ["HOLDERS"] = str(asked.holders.absolute())
        server = stack.enter_context(Router("llama-router", command, port, key="full", environ=environ))
        for model in LOADED:
            answer = server.call("POST", "/v1/models/load", {"model": model})
            if answer.status != 200:
                raise SystemExit(f"{model}: {answer.content.decode()}")
        bare = stack.enter_context(bare_server())
        trial = Trial(server, bare, configuration_file, held)
        trial.warm_up(asked.attacks)
        round_sec = min(ROUND_SEC, asked.minutes * 60)
        began, took_sec = time.monotonic(), 0.0
        while took_sec < asked.minutes * 60 - PAUSE_SEC:
            trial.be_alone(round_sec / 3)
            trial.be_attacked(round_sec * 2 / 3, asked.attacks)
            server.must_live()
            time.sleep(PAUSE_SEC)
            took_sec = time.monotonic() - began
            lost = len(trial.beside.tally.lost)
            print(f"after {took_sec / 60:.1f} minutes: {lost} lost, {server.rss_mib():.0f} MiB", flush=True)
        time.sleep(SETTLED_SEC)
        settled_mib = server.rss_mib()
        if asked.log:
            asked.log.write_text(server.log)
        tell(trial)
        return judge(trial, settled_mib)


if __name__ == "__main__":
    sys.exit(main())
