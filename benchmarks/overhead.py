"""What does a router cost per request? Us, the engine without a router, and others, on the same load.

    python benchmarks/overhead.py [--rounds 5] [--seconds 4] [--connections 16] [--megabytes N]

Three loads: chats of one token, where the router's cost per request shows; the same from clients that pause, so
that the machine is not full; and streams of 200 tokens, where its cost per event shows. Each round loads every
path in turn, in rotating order, so that what else the machine does hits all alike; ratios are taken within a
round, and their minimum and median are printed. The model is tiny, so a token costs the engine next to nothing:
no real model lets a router weigh more. `--megabytes 340` takes one of that size and leaves the streams out.

CPU is that of the routing process alone (user + system), without its engines and without the load generator; of
`direct` it is the engine's. Where all cores are busy, whatever the router takes is taken from the others: with E
for the engine, G for the load generator and R for the router, no throughput beyond (E + G) / (E + G + R) of the
direct one is possible, however little the router delays. It is printed beside what was measured.

The paths: `direct` is an engine by hand; `llama-router` is us; `llama-server router mode` is the peer; `fastapi +
httpx2` is the proxy that one writes in an afternoon. `llama-router alone` stands in front of an engine that
answers from memory: what the router could do if engines cost nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
import uvloop
from fastapi import FastAPI, Request
from peers import (
    Goals,
    Load,
    Server,
    chat_body,
    closed_loop,
    engine,
    engine_or_embedded,
    free_port,
    generator,
    llama_server_router,
    model_file,
    print_table,
    router,
)
from starlette.responses import StreamingResponse

from router.engines.llamacpp.binary import Binary

TOKENS = 200
PAUSE_SEC = 0.1
_STREAMS_FOR = 4
FLAGS = {"parallel": "16", "ctx-size": "8192", "threads": "1"}
OURS, PEER, PROXY, ALONE = "llama-router", "llama-server router mode", "fastapi + httpx2", "llama-router alone"


@dataclass(frozen=True)
class Sample:
    """One path in one round."""

    load: Load
    user_us: float
    system_us: float
    generator_us: float

    @property
    def cpu_us(self) -> float:
        """Per request."""
        return self.user_us + self.system_us


def measure(
    server: Server, body: dict[str, Any], connections: int, seconds: float, pause_sec: float = 0
) -> Sample:
    before = server.cpu()
    load = closed_loop(server, body, connections, seconds, pause_sec)
    spent = server.cpu() - before  # of a server that still lives
    requests = max(1, load.requests)
    return Sample(
        load,
        spent.user / requests * 1e6,
        spent.system / requests * 1e6,
        load.generator_sec / requests * 1e6,
    )


# --- two servers of our own -----------------------------------------------------------------------------


def serve_proxy(port: int, upstream: int, key: str) -> None:
    """A minimal proxy as FastAPI's and httpx's documentation write it."""
    app = FastAPI()
    client = httpx2.AsyncClient(
        base_url=f"http://127.0.0.1:{upstream}", headers={"Authorization": f"Bearer {key}"}, timeout=120
    )

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        document = await request.json()
        sent = client.build_request("POST", request.url.path, json=document)
        answer = await client.send(sent, stream=True)

        async def relay() -> AsyncIterator[bytes]:
            async for chunk in answer.aiter_raw():
                yield chunk
            await answer.aclose()

        return StreamingResponse(relay(), answer.status_code, media_type=answer.headers["content-type"])

    uvicorn.run(app, port=port, log_level="critical", access_log=False)


class InstantEngine(asyncio.Protocol):
    """Answers from memory; streams an event every 4 ms."""

    BODY = b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}}]}' * 6
    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        len(BODY),
        BODY,
    )
    HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    EVENT = (
        b'data: {"choices": [{"index": 0, "delta": {"content": "x"}}], "object": "chat.completion.chunk"}\n\n' * 2
    )
    CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
    END = b"0\r\n\r\n"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.write: Callable[[bytes], None] = transport.write  # type: ignore[attr-defined]
        self.seen = b""

    def data_received(self, data: bytes) -> None:
        self.seen += data
        head, found, body = self.seen.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)  # none: it is asked how it is
        if not found or len(body) < int(length[1] if length else 0):
            return
        self.seen = b""
        if re.search(rb'"stream": ?true', body):
            self.write(self.HEAD)
            self.tick(TOKENS)
        else:
            self.write(self.ANSWER)

    def tick(self, left: int) -> None:
        if left:
            self.write(self.CHUNK)
            asyncio.get_running_loop().call_later(0.004, self.tick, left - 1)
        else:
            self.write(self.END)


async def serve_instantly(port: int, protocol: type[InstantEngine] = InstantEngine) -> None:
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", port)
    # What llama-server says to a router that started it.
    print('cmd_child_to_router:state:{"state":"ready","payload":{}}', flush=True)
    await server.serve_forever()


def own_server(arguments: list[str]) -> None:
    """This file as one of the two; the arguments are those of an engine."""
    if arguments[0] == "proxy":
        serve_proxy(int(arguments[1]), int(arguments[2]), arguments[3])
    else:
        uvloop.run(serve_instantly(int(arguments[arguments.index("--port") + 1])))


# --- the comparison -------------------------------------------------------------------------------------


def start_paths(stack: ExitStack, folder: Path, megabytes: int | None) -> dict[str, Server]:
    model = model_file("overhead", megabytes=megabytes)
    binary = engine_or_embedded()
    direct = stack.enter_context(engine(binary, model, FLAGS))
    paths: dict[str, Server] = {"direct": direct}
    paths[OURS] = router({"m": model}, FLAGS, binary, folder=folder)
    if binary.kind == "llama-server":
        paths[PEER] = llama_server_router({"m": model}, FLAGS, binary, folder=folder)
    port = free_port()
    key = direct.headers["Authorization"].removeprefix("Bearer ")
    paths[PROXY] = Server(PROXY, [sys.executable, __file__, "proxy", str(port), str(direct.port), key], port)
    instant = Binary((sys.executable, __file__, "instant"), "llama-server", "this benchmark")
    paths[ALONE] = router({"m": model}, FLAGS, instant, folder=folder)
    for server in paths.values():
        if server is not direct:
            stack.enter_context(server)
        if server.chat("m").status != 200:
            raise SystemExit(f"{server.name} does not answer:\n{server.log[-2000:]}")
    return paths


def _median(samples: list[Sample], figure: str) -> float:
    return float(statistics.median(getattr(sample, figure) for sample in samples))


def spread(values: list[float]) -> str:
    return f"{min(values):.3f} / {statistics.median(values):.3f}"


def report(title: str, samples: dict[str, list[Sample]], events: int) -> None:
    print(f"\n{title}: median over {len(samples['direct'])} rounds; ratios are minimum / median")
    rows = []
    for path, rounds in samples.items():
        row = [path, f"{statistics.median(sample.load.rate for sample in rounds):,.0f}"]
        if path in ("direct", ALONE):
            row.append("")
        else:
            row.append(spread([a.load.rate / b.load.rate for a, b in zip(rounds, samples["direct"], strict=True)]))
        row.append(f"{_median(rounds, 'cpu_us'):,.0f}")
        row.append(f"{_median(rounds, 'user_us'):,.0f} + {_median(rounds, 'system_us'):,.0f}")
        if events > 1:
            row.append(f"{_median(rounds, 'cpu_us') / events:.1f}")
        ratios = [a.cpu_us / b.cpu_us for a, b in zip(rounds, samples[OURS], strict=True)]
        row.append("" if path == "direct" else spread(ratios))
        rows.append(row)
    per_event = ["CPU µs/event"] if events > 1 else []
    titles = ["path", "requests/s", "of direct", "CPU µs/request", "user + system", *per_event, "CPU to ours"]
    print_table(titles, rows)
    engine_us, generator_us, ours_us = (
        _median(samples["direct"], "cpu_us"),
        _median(samples["direct"], "generator_us"),
        _median(samples[OURS], "cpu_us"),
    )
    direct_us = engine_us + generator_us
    rate = statistics.median(sample.load.rate for sample in samples["direct"])
    print(
        f"engine {engine_us:,.0f}, load generator {generator_us:,.0f} µs per request: direct keeps "
        f"{rate * direct_us / 1e6:.2f} of {os.cpu_count()} cores busy; with all of them busy, {OURS} could reach "
        f"{direct_us / (direct_us + ours_us):.3f} of direct"
    )
    for path, rounds in samples.items():
        for sample in rounds:
            if sample.load.trouble:
                print(f"{path}: {sample.load.trouble}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of load per path and round (4); streams: 4 ×")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--megabytes", type=int, help="size of the model (tiny)")
    args = parser.parse_args()

    goals = Goals()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = start_paths(stack, folder, args.megabytes)
        print(f"{args.connections} connections, load from {generator()}")
        chats = chat_body("m")
        loads = [
            ("1-token chats", chats, 0.0, args.seconds),
            (f"1-token chats, {PAUSE_SEC:g} s apart", chats, PAUSE_SEC, args.seconds),
        ]
        if args.megabytes is None:
            # All streams run in step, and only whole ones are counted: a short time would count 3 or 4 of 3.9.
            streams = chat_body("m", tokens=TOKENS, stream=True)
            loads.append((f"{TOKENS}-token streams", streams, 0.0, _STREAMS_FOR * args.seconds))
        for title, body, pause_sec, seconds in loads:
            samples: dict[str, list[Sample]] = defaultdict(list)
            names = list(paths)
            for server in paths.values():
                measure(server, body, args.connections, 1)  # warm
            for turn in range(args.rounds):
                for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
                    sample = measure(paths[name], body, args.connections, seconds, pause_sec)
                    samples[name].append(sample)
            events = paths[OURS].call("POST", "/v1/chat/completions", body).content.count(b"data: ") or 1
            report(title, {name: samples[name] for name in names}, events)
            ours = samples[OURS]
            cpu_us = statistics.median(sample.cpu_us for sample in ours)
            if events == 1:
                ratios = [a.load.rate / b.load.rate for a, b in zip(ours, samples["direct"], strict=True)]
                goals.at_least(f"{title}: throughput of direct (median)", statistics.median(ratios), 0.95)
            goals.at_most(f"{title}: CPU per request (median)", cpu_us, 100 if events == 1 else 2500, " µs")
            goals.at_most(f"{title}: requests that failed", sum(bool(s.load.trouble) for s in ours), 0)
    return goals.judge()


if __name__ == "__main__":
    if sys.argv[1:2] in (["proxy"], ["instant"]):
        own_server(sys.argv[1:])
    else:
        sys.exit(main())
