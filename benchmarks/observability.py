"""What does observability cost?

    python benchmarks/observability.py [--aliases 200] [--end-to-end] [--rounds 7] [--seconds 3]

First its cost per request and per relayed chunk, measured in this process with everything on: the meter that an
answer passes, its figures, the event, metrics, telemetry, and a JSON line of the access log in a file. Then a
scrape with many models that have each served requests of all priorities.

`--end-to-end` compares two routers on an engine that answers from memory: one with everything, one without
listeners and meters. That needs an idle machine: the difference is a few percent of the cost of a request.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import uvloop
from overhead import FLAGS, TOKENS, InstantEngine, measure, serve_instantly
from peers import Goals, Server, chat_body, generator, model_file, print_table, router

from router.config.resolved import Config
from router.engines.launcher import LocalLauncher
from router.engines.llamacpp.backend import LlamaCpp
from router.engines.llamacpp.binary import Binary
from router.engines.llamacpp.model import LlamaCppModel
from router.engines.llamacpp.usage import AnswerMeter
from router.engines.orphans import EngineRecord
from router.hardware.devices import Devices
from router.memory.measurements import Learned
from router.observe import logs
from router.observe.events import Events, RequestDone
from router.observe.metrics import Metrics
from router.observe.statistics import Telemetry
from router.observe.usage import Usage
from router.runtime.dispatcher import Dispatcher
from router.runtime.gauges import gauges_of
from router.system.state import State


def without_observers() -> None:
    """Serve as `llama-router`, without listeners and meters."""
    from router.__main__ import main

    Events.listen = lambda self, kind, listener: None  # type: ignore[method-assign]
    AnswerMeter.note = lambda self, part: None  # type: ignore[method-assign]
    main(sys.argv[2:])


class TellingEngine(InstantEngine):
    """An engine that reports usage and times at the end of an answer, as llama-server does."""

    TIMINGS = (
        b'"usage":{"completion_tokens":200,"prompt_tokens":5,"total_tokens":205,"prompt_tokens_details":'
        b'{"cached_tokens":4}},"id":"chatcmpl-FjcuTuH7f3qWT9iGr5iNAWAgvQDUEqoS","timings":{"cache_n":4,"prompt_n":1,'
        b'"prompt_ms":0.374,"prompt_per_token_ms":0.374,"prompt_per_second":2673.7967914438505,"predicted_n":200,'
        b'"predicted_ms":80.471,"predicted_per_token_ms":0.2355,"predicted_per_second":4246.284501061571}}'
    )
    BODY = InstantEngine.BODY[:-1] + b"," + TIMINGS
    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        len(BODY),
        BODY,
    )

    def tick(self, left: int) -> None:
        if not left:
            for event in (b"data: {%b\n\n" % self.TIMINGS, b"data: [DONE]\n\n"):
                self.write(b"%x\r\n%b\r\n" % (len(event), event))
        super().tick(left)


def servers(stack: ExitStack, folder: Path) -> dict[str, Server]:
    instant = Binary((sys.executable, __file__, "engine"), "llama-server", "this benchmark")
    model = model_file("overhead")
    (folder / "on").mkdir()
    (folder / "off").mkdir()
    on = router({"m": model}, FLAGS, instant, folder=folder / "on", structured_logs=True)
    off = router({"m": model}, FLAGS, instant, folder=folder / "off", program=(__file__, "off"))
    for server in (on, off):
        stack.enter_context(server)
        if server.chat("m").status != 200:
            raise SystemExit(f"{server.name} does not answer:\n{server.log[-2000:]}")
    return {"everything on": on, "nobody listens": off}


def compare(paths: dict[str, Server], rounds: int, seconds: float, goals: Goals) -> None:
    for title, body, chunks, limit_us in (
        ("small answers", chat_body("m"), 0, 10.0),
        (f"streams of {TOKENS} chunks", chat_body("m", tokens=TOKENS, stream=True), TOKENS, 10.0 + TOKENS),
    ):
        costs: dict[str, list[float]] = {name: [] for name in paths}
        for server in paths.values():
            measure(server, body, 16, 1)
        for turn in range(rounds):
            names = list(paths) if turn % 2 else list(reversed(paths))
            for name in names:
                costs[name].append(measure(paths[name], body, 16, seconds).cpu_us)
        on, off = costs.values()
        differences = [a - b for a, b in zip(on, off, strict=True)]
        print(f"\n{title}: CPU per request, over {rounds} rounds of {seconds:g} s")
        rows = [[name, f"{min(values):.1f}", f"{statistics.median(values):.1f}"] for name, values in costs.items()]
        rows.append(["difference", f"{min(on) - min(off):.1f}", f"{statistics.median(differences):.1f}"])
        print_table(["", "minimum µs", "median µs"], rows)
        print(f"ratio {min(on) / min(off):.3f} (minimum), {statistics.median(on) / statistics.median(off):.3f}")
        if chunks:
            print(f"{(min(on) - min(off)) / chunks:.2f} µs per chunk, all counted to the chunks")
        goals.at_most(f"{title}: what it costs (minimum)", min(on) - min(off), limit_us, " µs")


class _World:
    """A dispatcher with models and everything that listens, in this process."""

    def __init__(self, names: list[str]) -> None:
        models = {name: LlamaCppModel(name, Path(f"/{name}.gguf"), ()) for name in names}
        devices = Devices(())
        devices.read_blocking()
        self.events = Events()
        learned, launcher = Learned(), LocalLauncher(8085, EngineRecord(State()), None)  # nothing is launched
        backend = LlamaCpp(Binary(("none",), "embedded", "this benchmark"), launcher, learned)
        dispatcher = Dispatcher(Config(models=models), {"llamacpp": backend}, devices, learned, self.events)
        self.metrics = Metrics(self.events, dispatcher.scheduler, lambda: gauges_of(dispatcher, launcher.kv_store))
        dispatcher.start()


def done(alias: str, priority: str, usage: Usage) -> RequestDone:
    return RequestDone(
        request_id="8cfdf00564706c14294936cd",
        alias=alias,
        route="/v1/chat/completions",
        priority=priority,
        outcome="served",
        status=200,
        queue_sec=0.00012,
        load_sec=0.0,
        total_sec=1.0,
        at=time.time(),
        ttft_sec=0.2,
        streamed=True,
        request_bytes=300,
        answer_bytes=40_000,
        usage=usage,
    )


def cpu_us(work: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times * 1e6


async def price(folder: Path, goals: Goals) -> None:
    world = _World(["m"])
    meter = AnswerMeter()
    event = b"data: {%b\n\n" % TellingEngine.TIMINGS

    def note_twice(fresh: AnswerMeter) -> None:
        fresh.note(event)
        fresh.note(event)

    for part in (TellingEngine.EVENT, event, b"data: [DONE]\n\n"):
        meter.note(part)
    usage = meter.usage()
    finished = done("m", "normal", usage)
    only_telemetry = Events()
    Telemetry(only_telemetry, time.monotonic)
    with (folder / "log").open("w") as file:
        stderr, sys.stderr = sys.stderr, file
        log = logs.set_up(debug=False, structured=True)
        sys.stderr = stderr
        only_log = Events()
        log.log_requests(only_log)
        steps: list[tuple[str, Callable[[], object]]] = [
            ("meter, two parts", lambda: note_twice(AnswerMeter())),
            ("figures of the answer", meter.usage),
            ("the event", lambda: done("m", "normal", usage)),
            ("metrics", lambda: world.events.done(finished)),
            ("telemetry", lambda: only_telemetry.done(finished)),
        ]
        best = {name: min(cpu_us(work, 5000) for _ in range(7)) for name, work in steps}
        lines = []
        for _ in range(7):
            began = time.process_time()
            for _ in range(5000):
                only_log.done(finished)
            await asyncio.sleep(0.3)
            log.close()
            lines.append((time.process_time() - began) / 5000 * 1e6)
        best["access log, formatted and written by its thread"] = min(lines)
    chunk_us = min(cpu_us(lambda: meter.note(event), 20_000) for _ in range(7))
    print("CPU per request (minimum of 7)")
    rows = [[name, f"{us:.2f}"] for name, us in best.items()]
    print_table(["", "µs"], [*rows, ["together", f"{sum(best.values()):.2f}"]])
    goals.at_most("everything on: per request", sum(best.values()), 10, " µs")
    goals.at_most("everything on: per relayed chunk", chunk_us, 1, " µs")


async def scrape(aliases: int, goals: Goals) -> None:
    names = [f"model-{number}" for number in range(aliases)]
    world = _World(names)
    usage = Usage(100, 50, 20, 0.1, 0.4)

    def serve_all() -> None:
        for name in names:
            for priority in ("high", "normal", "low"):
                world.events.done(done(name, priority, usage))
        world.events.settle()

    def scraped() -> bytes:
        """Render the metrics completely, without pauses in between."""
        scrape = world.metrics.exposition()
        try:
            while True:
                scrape.send(None)
        except StopIteration as told:
            text, _ = told.value
            return bytes(text)

    def take_ms() -> float:
        return cpu_us(scraped, 1) / 1000

    serve_all()
    take_ms()
    busy, calm = [], []
    for _ in range(15):
        serve_all()
        busy.append(take_ms())
        calm.append(take_ms())
    lines = scraped().count(b"\n")
    print(f"\nscrape with {aliases} models that have all served, {lines:,} lines (minimum / median)")
    print_table(
        ["", "ms"],
        [
            ["every histogram changed since the last", f"{min(busy):.2f} / {statistics.median(busy):.2f}"],
            ["nothing changed", f"{min(calm):.2f} / {statistics.median(calm):.2f}"],
        ],
    )
    goals.at_most(f"scrape with {aliases} models, nothing changed (minimum)", min(calm), 5, " ms")
    goals.at_most(f"scrape with {aliases} models, everything changed (minimum)", min(busy), 5, " ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3, help="of load per path and round (3)")
    parser.add_argument("--aliases", type=int, default=200)
    args = parser.parse_args()
    goals = Goals()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        asyncio.run(price(folder, goals))
        asyncio.run(scrape(args.aliases, goals))
        if args.end_to_end:
            print(f"\n16 connections, load from {generator()}")
            compare(servers(stack, folder), args.rounds, args.seconds, goals)
    return goals.judge()


if __name__ == "__main__":
    if sys.argv[1:2] == ["off"]:
        without_observers()
    elif sys.argv[1:2] == ["engine"]:
        uvloop.run(serve_instantly(int(sys.argv[sys.argv.index("--port") + 1]), TellingEngine))
    else:
        sys.exit(main())
