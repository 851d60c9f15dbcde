"""Does the router lose requests or grow under everything at once for a long time?

Three models of which two fit, so that they swap all the time; clients of all priorities that ask plainly, ask for
streams, and leave at random points; engines that are killed and stopped at random; reloads of a configuration that
changes, and ejects. Every request of a client that stays must get exactly one whole answer: what was asked for, an
error in its envelope, or a stream that ends with an error event. At the end, when all clients have gone, the
router must hold as much as at the beginning: descriptors, tasks, its objects per request, and nearly the memory.

    python benchmarks/soak.py [--minutes 30]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "router" / "store" / "demo" / "demo.gguf"
OBSERVER = ROOT / "tests" / "observer"
ALIASES = ("a", "b", "c")
ANSWER_LIMIT_SEC = 120
CODE = re.compile(rb'"code": ?"?(\w+)')
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


@dataclass
class Tally:
    """Outcomes of the requests."""

    asked: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    waits_sec: list[float] = field(default_factory=list)


class Router:
    """The router in a process of its own, and what can be seen of it from outside."""

    def __init__(self, folder: Path, base_port: int) -> None:
        self.folder = folder
        self.base_port = base_port
        self.configuration = folder / "config.json"
        self.lines: list[str] = []
        self.configure(slots=2)
        environ = {
            **os.environ,
            "PYTHONPATH": f"{OBSERVER}{os.pathsep}{ROOT}",
            "OBSERVATION": str(folder / "observation.json"),
            "LLAMA_ROUTER_STATE_DIR": str(folder / "state"),
        }
        command = [sys.executable, str(ROOT / "run.py"), "--config", str(self.configuration), "--port", "0"]
        self.child = subprocess.Popen(command, cwd=folder, env=environ, stderr=subprocess.PIPE, text=True)
        self.process = psutil.Process(self.child.pid)
        self.port = 0
        listening = threading.Event()
        threading.Thread(target=self._read, args=(listening,), daemon=True).start()
        if not listening.wait(60) or not self.port:
            sys.exit("".join(self.lines))

    def _read(self, listening: threading.Event) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            self.lines.append(line)
            if found := re.search(r"listens on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                listening.set()
        listening.set()

    def configure(self, slots: int) -> None:
        """Write a configuration; `slots` of model c differ from time to time."""
        flags = ["-c", "2048", "-t", "1", "-np"]
        system = {
            "base_port": self.base_port,
            "max_concurrent_models": 2,
            "max_queue_size_per_model": 60,
            "stall_timeout_sec": 3,
            "load_stall_sec": 5,
            "health_check_interval_sec": 10,
            "stop_grace_sec": 2,
            "model_crash_window_sec": 0.01,  # crashes are our doing, and no reason to give a model up
            "model_load_max_retries": 1000,
            "max_request_retries": 1000,
        }
        models = {
            alias: {"model_path": str(MODEL), "flags": [*flags, str(slots if alias == "c" else 2)]}
            for alias in ALIASES
        }
        api = {"heartbeat_sec": 1}
        self.configuration.write_text(json.dumps({"api": api, "system": system, "models": models}))

    @property
    def engines(self) -> list[psutil.Process]:
        return self.process.children()

    @property
    def memory_mib(self) -> float:
        return float(self.process.memory_info().rss) / 2**20

    def books(self) -> dict[str, int]:
        """Return the counts of descriptors, processes, tasks, and objects of requests and connections."""
        observation = self.folder / "observation.json"
        observation.unlink(missing_ok=True)
        self.child.send_signal(signal.SIGUSR1)
        while not observation.exists():
            time.sleep(0.02)
        counts: dict[str, int] = json.loads(observation.read_text())
        processes = len(self.process.children(recursive=True))
        return {**counts, "descriptors": self.process.num_fds(), "processes": processes}


async def exchange(port: int, request: bytes, most: int | None = None) -> bytes:
    """Send a request on a connection of its own; its whole answer, or the first `most` bytes of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await (reader.read() if most is None else reader.readexactly(most))
    finally:
        writer.close()


def message(method: str, path: str, body: object = None, **headers: str) -> bytes:
    content = json.dumps(body).encode() if body is not None else b""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", "connection: close"]
    lines += ["content-type: application/json", f"content-length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, "", "")).encode() + content


async def call(router: Router, method: str, path: str, body: object = None) -> Any:
    answer = await asyncio.wait_for(exchange(router.port, message(method, path, body)), 60)
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def outcome_of(answer: bytes, tokens: int, *, streams: bool) -> str:
    """The outcome that a whole answer tells; ValueError when it is not whole."""
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        raise ValueError("no answer")
    status = int(head[9:12])
    if streams and status == 200:
        if not body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            raise ValueError("a stream without an end")
        if b'"error":' in body:
            return f"stream, error event {CODE.findall(body)[-1].decode()}"
        return "stream, complete"
    length = LENGTH.search(head + b"\r\n")
    if length is None or len(body) != int(length[1]):
        raise ValueError("half an answer")
    document = json.loads(body)
    if status == 200:
        if not 1 <= document["usage"]["completion_tokens"] <= tokens:
            raise ValueError("somebody else's answer")
        return "plain, complete"
    return f"{status} {document['error']['code']}"


async def client(router: Router, tally: Tally, chance: random.Random, over: asyncio.Event) -> None:
    while not over.is_set():
        tokens, streams, leaves = chance.randrange(1, 40), chance.random() < 0.5, chance.random() < 0.2
        body = {
            "model": chance.choice(ALIASES),
            "messages": [
                {"role": "user", "content": "".join(chance.choices("abcdefgh ", k=chance.randrange(1, 80)))}
            ],
            "max_tokens": tokens,
            "stream": streams,
        }
        priority = chance.choice(("high", "normal", "normal", "low"))
        request = message("POST", "/v1/chat/completions", body, x_request_priority=priority)
        tally.asked += 1
        began = time.monotonic()
        if leaves:
            patience = chance.choice((0.0, 0.01, 0.1, 0.5, 2.0))
            with contextlib.suppress(asyncio.TimeoutError, asyncio.IncompleteReadError, OSError):
                await asyncio.wait_for(exchange(router.port, request, chance.randrange(1, 3000)), patience)
            tally.outcomes["left"] += 1
            continue
        try:
            answer = await asyncio.wait_for(exchange(router.port, request), ANSWER_LIMIT_SEC)
            tally.outcomes[outcome_of(answer, tokens, streams=streams)] += 1
            tally.waits_sec.append(time.monotonic() - began)
        except (ValueError, LookupError, OSError, asyncio.TimeoutError) as error:
            tally.outcomes["lost"] += 1
            tally.lost.append(f"{type(error).__name__} {error} after {time.monotonic() - began:.1f} s, {body}")
        if chance.random() < 0.3:
            await asyncio.sleep(chance.expovariate(2))


async def trouble(router: Router, done: Counter[str], chance: random.Random, over: asyncio.Event) -> None:
    """Break something every few seconds."""
    while not over.is_set():
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(over.wait(), chance.uniform(1, 6))
        engines = router.engines
        what = chance.choice(("kill -9", "kill -9", "SIGSTOP", "SIGSEGV", "reload", "changed reload", "eject"))
        with contextlib.suppress(psutil.Error):
            match what:
                case "reload":
                    await call(router, "POST", "/v1/config/reload")
                case "changed reload":
                    router.configure(slots=chance.choice((1, 2, 3)))
                    await call(router, "POST", "/v1/config/reload")
                case "eject":
                    await call(router, "POST", "/v1/models/eject", {"model": chance.choice(ALIASES)})
                case _ if engines:
                    number = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}.get(what, signal.SIGSEGV)
                    chance.choice(engines).send_signal(number)
            done[what] += 1


async def watch(router: Router, samples: list[tuple[float, float]], over: asyncio.Event) -> None:
    began = time.monotonic()
    while not over.is_set():
        samples.append((time.monotonic() - began, router.memory_mib))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(over.wait(), 2)


async def quiet(router: Router) -> dict[str, int]:
    """Unload everything, and wait until no client is connected."""
    for alias in ALIASES:
        await call(router, "POST", "/v1/models/eject", {"model": alias})
    for _ in range(100):
        if not router.engines:
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    return router.books()


def growth_percent(samples: list[tuple[float, float]]) -> float:
    """Of the memory, from after the warm-up (the first third) to the end; medians of a tenth of the time each."""
    end = samples[-1][0]
    early = [mib for at, mib in samples if end / 3 <= at <= end / 3 + end / 10]
    late = [mib for at, mib in samples if at >= 0.9 * end]
    return 100 * (statistics.median(late) / statistics.median(early) - 1)


async def soak(router: Router, minutes: float, clients: int, seed: int) -> bool:
    chance = random.Random(seed)
    for alias in ALIASES:
        body = {"model": alias, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        await call(router, "POST", "/v1/chat/completions", body)
    before = await quiet(router)
    tally, troubles, over = Tally(), Counter[str](), asyncio.Event()
    samples: list[tuple[float, float]] = []
    crowd = [client(router, tally, random.Random(chance.random()), over) for _ in range(clients)]
    asyncio.get_running_loop().call_later(60 * minutes, over.set)
    await asyncio.gather(*crowd, trouble(router, troubles, chance, over), watch(router, samples, over))
    router.configure(slots=2)
    await call(router, "POST", "/v1/config/reload")
    summary = (await call(router, "GET", "/v1/queue/stats"))["summary"]
    loads = sum("loading" in line and "takes" in line for line in router.lines)
    after = await quiet(router)
    for _ in range(20):  # kept-alive and closing connections take a moment
        if not held(before, after):
            break
        await asyncio.sleep(1)
        after = router.books()
    router.child.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(router.child.wait, 60)

    print(f"{minutes:g} minutes, {clients} clients, {tally.asked} requests, {loads} loads, seed {seed}\n")
    for outcome, count in sorted(tally.outcomes.items(), key=lambda each: -each[1]):
        print(f"  {count:8d}  {outcome}")
    print("\ntrouble: " + ", ".join(f"{count} × {what}" for what, count in sorted(troubles.items())))
    tenths = samples[:: max(1, len(samples) // 10)]
    print("memory, MiB: " + ", ".join(f"{mib:.1f}" for _, mib in tenths))
    waits = sorted(tally.waits_sec)
    print(f"answered after: median {waits[len(waits) // 2]:.2f} s, longest {waits[-1]:.1f} s\n")
    tracebacks = sum("Traceback" in line for line in router.lines)
    goals = [
        ("requests without exactly one whole answer", "0", str(len(tally.lost)), not tally.lost),
        (
            "growth of the memory after the warm-up",
            "< 5 %",
            f"{growth_percent(samples):.1f} %",
            growth_percent(samples) < 5,
        ),
        (
            "waiting or in flight at the end",
            "0",
            str(pending := summary["total_queued"] + summary["total_processing"]),
            not pending,
        ),
        (
            "held at the end and not before",
            "nothing",
            str(held(before, after) or "nothing"),
            not held(before, after),
        ),
        ("tracebacks in the log", "0", str(tracebacks), not tracebacks),
        ("exit code after SIGTERM", "0", str(code), code == 0),
    ]
    for what, goal, figure, reached in goals:
        print(f"{'ok    ' if reached else 'MISSED'}  {what}: {figure} (goal: {goal})")
    for line in tally.lost[:20]:
        print(f"lost: {line}")
    return all(reached for *_, reached in goals)


def held(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Return what has grown. One or two objects more may be variables that still name the last one."""
    exact = ("descriptors", "processes", "tasks")
    return {
        name: after[name] - before[name]
        for name in after
        if after[name] > before[name] + (0 if name in exact else 2)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--base-port", type=int, default=8085, help="of the engines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        router = Router(Path(folder), options.base_port)
        try:
            reached = asyncio.run(soak(router, options.minutes, options.clients, options.seed))
        finally:
            router.child.kill()
        if not reached:
            Path("soak-router.log").write_text("".join(router.lines))
            sys.exit("The router's log is in soak-router.log.")


if __name__ == "__main__":
    main()
