"""What does an open page cost the router, and how much work is it for the browser?

    python benchmarks/open_page.py [--seconds 60] [--models 200] [--rate 50] [--only PART …]

The page is open in a headless Chromium (found as the tests find it; needs playwright). The parts:

- `load`: chats at a fixed rate from one client, in turn without a page and with one that shows the overview, or
  the list of requests. The difference of the router's CPU is what the page costs it.
- `idle`: what a page that shows the overview receives while nothing happens, once it has been loaded, counted by
  the browser with the heads of answers.
- `render`: time in scripts until the overview and the list of models are drawn, by the browser's own figure
  (`ScriptDuration`), with many models.
- `requests`: time in scripts for a key pressed in the filter of the list of requests, when 1,000 are listed.

The models are tiny, and one of them is resident; the others are only listed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import Goals, Router, Server, chat_body, engine_or_embedded, model_file, print_table, router

ROUNDS = 3
FLAGS = {"parallel": "4", "ctx-size": "2048", "threads": "1"}
BUSY = "model-0"


@dataclass
class Bench:
    server: Router
    browser: Any
    seconds: float
    models: int
    rate: float
    goals: Goals

    @contextmanager
    def page(self, address: str = "") -> Iterator[tuple[Any, Any]]:
        """Open the page; yields it with a session of Chrome's own protocol."""
        window = self.browser.new_context()
        page = window.new_page()
        session = window.new_cdp_session(page)
        session.send("Performance.enable")
        page.goto(f"http://127.0.0.1:{self.server.port}/{address}")
        yield page, session
        window.close()


def script_sec(session: Any) -> float:
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(float(metric["value"]) for metric in metrics if metric["name"] == "ScriptDuration")


# --- what it costs the router ---------------------------------------------------------------------------


def chats(server: Server, rate: float, seconds: float) -> int:
    """Send chats of one token at a rate; return how many were answered by 200."""
    with ThreadPoolExecutor(1) as pool:  # playwright has the loop of this thread
        return pool.submit(asyncio.run, _chats(server, rate, seconds)).result()


async def _chats(server: Server, rate: float, seconds: float) -> int:
    body = json.dumps(chat_body(BUSY)).encode()
    head = "".join(f"{name}: {value}\r\n" for name, value in server.headers.items())
    request = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(body)}\r\n\r\n"
    sent = request.encode() + body
    served = 0
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask() -> None:
        nonlocal served
        reader, writer = free.pop() if free else await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(int(length.partition(b":")[2]))
        served += answer.startswith(b"HTTP/1.1 200")
        free.append((reader, writer))

    began = time.perf_counter()
    asked: list[asyncio.Task[None]] = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        asked.append(asyncio.create_task(ask()))
    await asyncio.gather(*asked)
    for _, writer in free:
        writer.close()
    return served


def load(bench: Bench) -> None:
    """Print the share of a core that a page costs the router, beside chats at a fixed rate."""
    seconds = bench.seconds / ROUNDS

    def percent() -> float:
        before = bench.server.cpu()
        began = time.perf_counter()
        served = chats(bench.server, bench.rate, seconds)
        took = time.perf_counter() - began
        if served < 0.99 * bench.rate * seconds:
            print(f"only {served} of {bench.rate * seconds:.0f} chats were served")
        return (bench.server.cpu() - before).total / took * 100

    costs: dict[str, list[float]] = {address: [] for address in ("#/", "#/requests")}
    rows = []
    percent()  # warm
    for _ in range(ROUNDS):
        for address, of_page in costs.items():
            without = percent()
            with bench.page(address) as (page, _session):
                page.locator("section.view:visible").first.wait_for()
                time.sleep(3)
                shown = percent()
            of_page.append(shown - without)
            rows.append([address, f"{without:.2f} %", f"{shown:.2f} %", f"{of_page[-1]:+.2f} %"])
    print_table([f"CPU at {bench.rate:g} chats/s", "no page", "one page", "the page"], sorted(rows))
    for address, of_page in costs.items():
        bench.goals.at_most(f"load: CPU for an open {address}, of a core", statistics.median(of_page), 1.0, " %")


def idle(bench: Bench) -> None:
    """Print the bytes per second that an open page gets while nothing happens, and what it costs the router."""
    cpu = bench.server.cpu()
    time.sleep(bench.seconds / 2)
    alone = (bench.server.cpu() - cpu).total / (bench.seconds / 2) * 100
    with bench.page() as (page, session):
        received = _Received()
        session.send("Network.enable")
        session.on("Network.requestWillBeSent", received.asked)
        session.on("Network.dataReceived", received.part)
        session.on("Network.loadingFinished", received.finished)
        page.reload()
        page.locator("section.view:visible").first.wait_for()
        page.wait_for_timeout(15_000)
        loaded = received.by_path(bench.server.port)
        cpu = bench.server.cpu()
        page.wait_for_timeout(1000 * bench.seconds)
        shown = (bench.server.cpu() - cpu).total / bench.seconds * 100
        sizes = received.by_path(bench.server.port)
    more = {path: size - loaded.get(path, 0) for path, size in sizes.items()}
    total = sum(more.values()) / bench.seconds
    rows = [
        [path, f"{size / bench.seconds:.0f} B/s"]
        for path, size in sorted(more.items(), key=lambda item: -item[1])
        if size
    ]
    print_table([f"idle, {bench.models} models", "received"], [*rows, ["all", f"{total:.0f} B/s"]])
    print(f"The router's CPU when idle: {alone:.2f} % of a core without a page, {shown:.2f} % with one")
    bench.goals.at_most("idle: received by an open page", total / 1024, 2.0, " KiB/s")


class _Received:
    """Bytes that the browser has received, by request: with the heads of answers, once these are complete."""

    def __init__(self) -> None:
        self._urls: dict[str, str] = {}
        self._sizes: defaultdict[str, int] = defaultdict(int)

    def asked(self, event: dict[str, Any]) -> None:
        self._urls[event["requestId"]] = event["request"]["url"]

    def part(self, event: dict[str, Any]) -> None:
        self._sizes[event["requestId"]] += event["encodedDataLength"] or event["dataLength"]

    def finished(self, event: dict[str, Any]) -> None:
        self._sizes[event["requestId"]] = event["encodedDataLength"]

    def by_path(self, port: int) -> dict[str, int]:
        sizes: defaultdict[str, int] = defaultdict(int)
        for request, size in self._sizes.items():
            path = self._urls.get(request, "").partition(f":{port}")[2]
            sizes[path.partition("since=")[0]] += int(size)
        return dict(sizes)


# --- what it costs the browser --------------------------------------------------------------------------


def render(bench: Bench) -> None:
    rows = []
    for name, address, drawn in (
        ("overview", "#/", "#resident-rows tr, #no-residents:not([hidden])"),
        ("models", "#/models", "#model-rows tr"),
    ):
        times = []
        for _ in range(ROUNDS):
            with bench.page(address) as (page, session):
                page.locator(drawn).first.wait_for()
                page.wait_for_timeout(1500)
                times.append(1000 * script_sec(session))
        rows.append([name, f"{min(times):.0f} ms", f"{statistics.median(times):.0f} ms"])
        bench.goals.at_most(f"render: scripts for {name}", statistics.median(times), 200, " ms")
    print_table([f"first render, {bench.models} models", "min", "median"], rows)


def requests(bench: Bench) -> None:
    chats(bench.server, 200, 1050 / 200)
    with bench.page("#/requests") as (page, session):
        box = page.locator("#request-filter")
        box.wait_for()
        page.wait_for_timeout(4000)
        times = []
        for key in "model-0 chat served":
            before = script_sec(session)
            box.press(key)
            page.wait_for_timeout(100)
            times.append(1000 * (script_sec(session) - before))
    print_table(
        ["filter of 1,000 requests, per key", "median", "longest"],
        [["scripts", f"{statistics.median(times):.1f} ms", f"{max(times):.1f} ms"]],
    )
    bench.goals.at_most("requests: scripts for a key in the filter", statistics.median(times), 50, " ms")


PARTS: dict[str, Callable[[Bench], None]] = {"load": load, "idle": idle, "render": render, "requests": requests}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="length of the parts that have one (60)")
    parser.add_argument("--models", type=int, default=200, help="number of models that are listed (200)")
    parser.add_argument("--rate", type=float, default=50, help="chats per second (50)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    args = parser.parse_args()
    from conftest import chromium  # of the tests

    tiny = model_file("page")
    models = {f"model-{number}": tiny for number in range(args.models)}
    with (
        tempfile.TemporaryDirectory() as folder,
        router(models, FLAGS, engine_or_embedded(), resident=4, folder=Path(folder)) as server,
        chromium() as browser,
    ):
        assert isinstance(server, Router)
        server.call("POST", "/v1/models/load", {"model": BUSY})
        time.sleep(10)  # until the router has looked at all files again
        bench = Bench(server, browser, args.seconds, args.models, args.rate, Goals())
        for name in args.only:
            print()
            PARTS[name](bench)
    return bench.goals.judge()


if __name__ == "__main__":
    sys.exit(main())
