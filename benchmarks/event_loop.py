"""How long does one request keep all others waiting? A router has one event loop, and each token passes it.

    python benchmarks/event_loop.py [--models 1000] [--waiting 1000] [--megabytes 100] [--rounds 3]

A clock in the router's own process ticks a thousand times a second on its event loop, and notes by how much a tick
comes late. What the machine's other programs took meanwhile is left out: the time that counts is the shorter of
wall-clock and CPU time between two ticks, and of several rounds the best. Every kind of request is sent by itself,
large bodies to an engine that answers from memory; then every page is asked for while many wait.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import mmap
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvloop
from overhead import FLAGS
from peers import Goals, Server, model_file, print_table, router

from router.engine import Binary

GOAL_MS = 20.0
JSON = "application/json"
TICK_SEC = 0.001
SENTENCE = "The quick brown fox jumps over the lazy dog.\n"
ALIASES = {"prompted": {"uses": "model-0", "system_prompt": "You are brief."}}
LISTS: tuple[str, ...] = (
    "/v1/models",
    "/api/tags",
    "/api/ps",
    "/v1/models/status",
    "/v1/queue/stats",
    "/v1/decisions",
    "/metrics",
)
LISTS += ("/v1/health/models", "/v1/telemetry/summary", "/vram", "/health", "/status", "/openapi.json")


# --- in the router's process ----------------------------------------------------------------------------


def watched(place: str, arguments: list[str]) -> None:
    """Serves as `llama-router`, and keeps the longest time that its event loop was held, in a file."""
    from router import cli, serve

    with Path(place).open("r+b") as file:
        longest = mmap.mmap(file.fileno(), 8)
    tune = serve._tune_the_interpreter

    def begin() -> None:
        tune()
        loop = asyncio.get_running_loop()
        before = (time.perf_counter(), time.process_time())

        def tick() -> None:
            nonlocal before
            now = (time.perf_counter(), time.process_time())
            held_sec = min(now[0] - before[0], now[1] - before[1]) - TICK_SEC
            before = now
            if held_sec > struct.unpack("d", longest[:])[0]:
                longest[:] = struct.pack("d", held_sec)
            loop.call_later(TICK_SEC, tick)

        tick()

    serve._tune_the_interpreter = begin
    cli.main(arguments)


class Engine(asyncio.Protocol):
    """Reads a request, however large, and answers from memory; not at all if it is asked to be slow."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._head = b""
        self._missing = -1

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            _, _, length = head.lower().partition(b"content-length: ")
            self._missing = int(length.partition(b"\r\n")[0] or 0)
            self._is_slow = b'"slow"' in data[:100]
        self._missing -= len(data)
        if self._missing <= 0 and not self._is_slow:
            status, body = b"200 OK", b'{"choices": [{"index": 0, "text": "x"}], "data": [], "usage": {}}'
            if b"/v1/embeddings" in self._head[:40]:
                status = b"501 Not Implemented"
                body = b'{"error": {"message": "This server does not support embeddings"}}'
            head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            self._transport.write(head % (status, len(body)) + body)
            self._head, self._missing = b"", -1


async def serve_engine(arguments: list[str]) -> None:
    port = int(arguments[arguments.index("--port") + 1])
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port)
    print('cmd_child_to_router:state:{"state":"ready","payload":{}}', flush=True)
    await server.serve_forever()


# --- what is asked --------------------------------------------------------------------------------------


def bodies(megabytes: int) -> Iterator[tuple[str, str, str, bytes]]:
    """What it is, its path, its type, itself."""
    size = (megabytes << 20) - 4096  # with what is around it
    image = b"iVBORw0KGgo" + b"A" * size
    text = json.dumps(SENTENCE * (size // len(SENTENCE)))[1:-1].encode()
    kilobyte = json.dumps(SENTENCE * 22)[1:-1].encode()
    turns = b",".join([b'{"role": "user", "content": "%b"}' % kilobyte] * (size // 1050))
    numbers = b",".join(b"%d" % n for n in range(size // 8))
    sent = (
        b'{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%b"}}]}'
    )
    chat, plain, prompted = "/v1/chat/completions", b"model-0", b"prompted"
    for name, model in (("", plain), (", system prompt", prompted)):
        document = b'{"model": "%b", "messages": [%%b]}' % model
        yield f"chat with an image{name}", chat, JSON, document % (sent % image)
        yield f"chat of one message{name}", chat, JSON, document % (b'{"role": "user", "content": "%b"}' % text)
        yield f"chat of many messages{name}", chat, JSON, document % turns
    yield "numbers to embed", "/v1/embeddings", JSON, b'{"model": "model-0", "input": [%b]}' % numbers
    yield (
        "Ollama's chat with an image",
        "/api/chat",
        JSON,
        (b'{"model": "model-0", "stream": false, "messages": [{"role": "user", "images": ["%b"]}]}' % image),
    )
    yield (
        "Ollama's chat of many messages",
        "/api/chat",
        JSON,
        (b'{"model": "model-0", "stream": false, "messages": [%b]}' % turns),
    )
    form = b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    parts = form % (b"file", b'; filename="a.wav"', image) + form % (b"model", b"", plain) + b"--x--\r\n"
    yield "a form with a file", "/v1/audio/transcriptions", "multipart/form-data; boundary=x", parts
    yield "what is no JSON", chat, JSON, b'{"model": "model-0", "messages": [%b' % turns


def ask(server: Server, method: str, path: str, body: bytes | None, kind: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    try:
        connection.request(method, path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


@contextmanager
def waiting(server: Server, number: int) -> Iterator[None]:
    """So many requests that wait, for ten models."""
    body = {"messages": [], "slow": True}
    connections = []
    for index in range(number):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        document = json.dumps({"slow": "slow", "model": f"model-{index % 10}", **body})
        connection.request("POST", "/v1/chat/completions", document, {"Content-Type": JSON})
        connections.append(connection)
    yield
    for connection in connections:
        connection.close()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", type=int, default=1000)
    options.add_argument("--waiting", type=int, default=1000)
    options.add_argument("--megabytes", type=int, default=100)
    options.add_argument("--rounds", type=int, default=3)
    asked = options.parse_args()
    goals = Goals()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = folder / "longest"
        place.write_bytes(bytes(8))
        longest = mmap.mmap(stack.enter_context(place.open("r+b")).fileno(), 8)
        model = model_file("overhead")
        engine = Binary((sys.executable, __file__, "engine"), "llama-server", "this benchmark")
        names = {f"model-{index}": model for index in range(asked.models)}
        program = (__file__, "watched", str(place))
        server = stack.enter_context(router(names, FLAGS, engine, folder=folder, program=program, aliases=ALIASES))

        def held_ms(work: Callable[[], Any]) -> float:
            best = float("inf")
            for _ in range(asked.rounds):
                longest[:] = bytes(8)
                work()
                time.sleep(0.05)
                best = min(best, struct.unpack("d", longest[:])[0] * 1000)
            return best

        rows: list[tuple[str, str]] = []

        def judge(name: str, method: str, path: str, body: bytes | None = None, kind: str = JSON) -> None:
            figure = held_ms(lambda: ask(server, method, path, body, kind))
            rows.append((name, f"{figure:.1f}"))
            goals.at_most(name, figure, GOAL_MS, " ms")

        ask(server, "POST", "/v1/models/load", b'{"model": "model-0"}', JSON)
        judge("a refused embedding", "POST", "/v1/embeddings", b'{"model": "model-0", "input": "a"}')
        for name, path, kind, body in bodies(asked.megabytes):
            judge(f"{asked.megabytes} MiB: {name}", "POST", path, body, kind)
        for path in LISTS:
            judge(path, "GET", path)
        with waiting(server, asked.waiting):
            rows.append((f"nothing is asked for, {asked.waiting} wait", f"{held_ms(lambda: time.sleep(3)):.1f}"))
            for path in LISTS:
                judge(f"{path}, {asked.waiting} wait", "GET", path)
    print_table(("event loop held", "ms"), rows)
    return goals.judge()


if __name__ == "__main__":
    if sys.argv[1:2] == ["watched"]:
        watched(sys.argv[2], sys.argv[3:])
    elif sys.argv[1:2] == ["engine"]:
        uvloop.run(serve_engine(sys.argv[2:]))
    else:
        sys.exit(main())
