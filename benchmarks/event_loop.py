"""How long does one request keep all others waiting, and how much memory does it take? A router has one event
loop, and each token passes it.

    python benchmarks/event_loop.py [--models 1000] [--waiting 1000] [--megabytes 100] [--rounds 3] [--only WORDS]

A clock in the router's own process ticks a thousand times a second on its event loop, and notes by how much a tick
comes late. What the machine's other programs took meanwhile is left out: the time that counts is the shorter of
wall-clock and CPU time between two ticks, and of several rounds the best. Beside it stand the wall-clock time, and
the CPU time of the loop's own thread, which leaves out what it has waited for other threads. Every kind of request
is sent alone, large bodies to an engine that answers from memory; then every page is asked for while many wait.

Of large bodies it is measured, too, how much more memory the process had at most, in multiples of the body, and
how much of it is left two seconds after the answer (Linux).
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import math
import mmap
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvloop
from holders import Holders
from overhead import FLAGS
from peers import Goals, Server, model_file, print_table, router

from router.engines.llamacpp.binary import Binary

GOAL_MS = 20.0
JSON = "application/json"
TICK_SEC = 0.001
MOST_MEMORY = 4.0
"""Of a body's size."""
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


HELD = struct.Struct("ddd")
"""The longest times between two ticks: that counts, by the wall clock, of the loop's thread."""


def watched(place: str, arguments: list[str]) -> None:
    """Serve as `llama-router`, and keep the longest times for which its event loop was held in a file."""
    from router import server as serve
    from router.__main__ import main

    with Path(place).open("r+b") as file:
        longest = mmap.mmap(file.fileno(), HELD.size)
    tune = serve._tune_the_interpreter

    def begin() -> None:
        tune()
        loop = asyncio.get_running_loop()

        def clocks() -> tuple[float, float, float]:
            return time.perf_counter(), time.process_time(), time.thread_time()

        before = clocks()
        holders = Holders(Path(os.environ["HOLDERS"])) if "HOLDERS" in os.environ else None

        def tick() -> None:
            if holders is not None:
                holders.tick()
            nonlocal before
            now = clocks()
            wall_sec, process_sec, thread_sec = (
                later - earlier for later, earlier in zip(now, before, strict=True)
            )
            before = now
            held = (min(wall_sec, process_sec) - TICK_SEC, wall_sec - TICK_SEC, thread_sec)
            longest[:] = HELD.pack(*map(max, held, HELD.unpack(longest[:])))
            loop.call_later(TICK_SEC, tick)

        tick()

    serve._tune_the_interpreter = begin
    main(arguments)


class Engine(asyncio.Protocol):
    """Reads a request, however large, and answers from memory; not at all if it is asked to be slow."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one only by its methods
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


Body = tuple[str, str, str, bytes]
"""What it is, its path, its type, itself."""


def bodies(megabytes: int) -> Iterator[Body]:
    size = (megabytes << 20) - 4096  # with what is around it
    yield from chats(size)
    yield from other_documents(size)
    yield from forms(size)


def filled(one: bytes, size: int, between: bytes = b",") -> bytes:
    return between.join([one] * (size // (len(one) + len(between))))


def chats(size: int) -> Iterator[Body]:
    """Return chats of this size: unchanged, with an alias's system prompt, and for the other APIs."""
    kilobyte = json.dumps(SENTENCE * 22)[1:-1].encode()
    image = b"data:image/png;base64,iVBORw0KGgo" + b"A" * size
    said = b'{"role": "user", "content": %b}'
    texts = {
        "an image": said % b'[{"type": "image_url", "image_url": {"url": "%b"}}]' % image,
        "one message": said % b'"%b"' % json.dumps(SENTENCE * (size // len(SENTENCE + "n")))[1:-1].encode(),
        "escapes": said % b'"%b"' % filled(rb"\u0041", size, b""),
        "messages of 1 KiB": filled(said % b'"%b"' % kilobyte, size),
        "messages of a word": filled(said % b'"a"', size),
        "lists in lists": said % b"[%b]" % filled(b"[" * 90 + b"]" * 90, size),
    }
    beside = {
        "a million numbers": b'"logit_bias": [%b]' % filled(b"1234567", size),
        "many keys": filled(b'"key": 1', size),
        "many tools": b'"tools": [%b]'
        % filled(b'{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}', size),
    }
    contents = {name: b'"messages": [%b]' % text for name, text in texts.items()}
    contents |= {name: b'"messages": [%b], %b' % (said % b'"a"', more) for name, more in beside.items()}
    for name, content in contents.items():
        for how, path, model in (
            ("", "/v1/chat/completions", b"model-0"),
            (", system prompt", "/v1/chat/completions", b"prompted"),
            (", Ollama's", "/api/chat", b"model-0"),
            (", Anthropic's", "/v1/messages", b"model-0"),
            (", Anthropic's with a seed", "/v1/messages", b"model-0"),
        ):
            seed = b'"seed": 1, ' if how.endswith("seed") else b""
            if how == ", Ollama's" and name == "an image":
                content = b'"messages": [{"role": "user", "images": ["%b"]}]' % image.partition(b",")[2]
            yield f"{name}{how}", path, JSON, b'{"model": "%b", "stream": false, %b%b}' % (model, seed, content)
        if name in ("one message", "messages of 1 KiB", "messages of a word"):
            inputs = content.replace(b'"messages"', b'"input"', 1)
            yield f"{name}, a response", "/v1/responses", JSON, b'{"model": "model-0", %b}' % inputs
    turns = contents["messages of 1 KiB"]
    yield "what is no JSON", "/v1/chat/completions", JSON, b'{"model": "model-0", %b' % turns
    yield "a chat, upstream", "/upstream/model-0/v1/chat/completions", JSON, b"{%b}" % turns


def other_documents(size: int) -> Iterator[Body]:
    numbers, words = filled(b"1234567", size), filled(b'"a"', size)
    text = json.dumps(SENTENCE * (size // len(SENTENCE + "n")))[1:-1].encode()
    plain = b'{"model": "model-0", "%b": %b}'
    yield "numbers to embed", "/v1/embeddings", JSON, plain % (b"input", b"[%b]" % numbers)
    yield "words to embed, Ollama's", "/api/embed", JSON, plain % (b"input", b"[%b]" % words)
    yield "a prompt of tokens", "/v1/completions", JSON, plain % (b"prompt", b"[%b]" % numbers)
    yield "many prompts", "/v1/completions", JSON, plain % (b"prompt", b"[%b]" % words)
    yield "a prompt, Ollama's", "/api/generate", JSON, plain % (b"prompt", b'"%b"' % text)
    yield "a name", "/v1/completions", JSON, b'{"model": "%b", "prompt": "a"}' % text


def forms(size: int) -> Iterator[Body]:
    field = b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    model = field % (b"model", b"", b"model-0")
    file = field % (b"file", b'; filename="a.wav"', b"\0" * size)
    headers = b'--x\r\nContent-Disposition: form-data; name="model"\r\n%b\r\na\r\n' % (b"a:b\r\n" * 700)
    for name, parts in {
        "a file": file + model,
        "parts of a byte": model + filled(field % (b"a", b"", b"a"), size, b""),
        "what is like a boundary": model + filled(b"\r\n--xy", size, b""),
        "parts with many headers": filled(headers, size, b"") + model,
        "a long field": field % (b"model", b"", b"a" * size),
    }.items():
        yield f"form: {name}", "/v1/audio/transcriptions", "multipart/form-data; boundary=x", parts + b"--x--\r\n"


def small_bodies() -> Iterator[Body]:
    """That are read at once, or go to pages, and have as much in them as there can be."""
    for size in (1 << 20, 200 << 10, 16 << 10):
        for name, path, kind, body in (*chats(size - 4096), *other_documents(size - 4096), *forms(size - 4096)):
            yield f"{size >> 10} KiB: {name}", path, kind, body
    much = {"lists": b"[]", "objects": b"{}", "lists in lists": b"[" * 90 + b"]" * 90}
    for path in ("/v1/models/load", "/api/create", "/api/show", "/v1/models/pull", "/models/load"):
        for name, one in much.items():
            yield f"1 MiB: {name} for {path}", path, JSON, b'{"model": [%b]}' % filled(one, (1 << 20) - 4096)


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
def waiting(server: Server, number: int, models: int) -> Iterator[None]:
    """Keep so many requests waiting for so many models."""
    body = {"messages": [], "slow": True}
    connections = []
    for index in range(number):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        document = json.dumps({"slow": "slow", "model": f"model-{index % models}", **body})
        connection.request("POST", "/v1/chat/completions", document, {"Content-Type": JSON})
        connections.append(connection)
    yield
    for connection in connections:
        connection.close()


class Gauge:
    """Measures the router's process."""

    def __init__(self, place: Path, rounds: int) -> None:
        place.write_bytes(bytes(HELD.size))
        with place.open("r+b") as file:
            self._longest = mmap.mmap(file.fileno(), HELD.size)
        self._rounds = rounds
        self.answer: object = None
        """The last one."""
        self.folder = Path("/nowhere")
        """Of the process, in /proc."""

    def held_ms(self, work: Callable[[], Any]) -> tuple[float, ...]:
        best = (math.inf,) * 3
        for _ in range(self._rounds):
            self._longest[:] = bytes(HELD.size)
            self.answer = work()
            time.sleep(0.05)
            best = tuple(map(min, best, HELD.unpack(self._longest[:])))
        return tuple(seconds * 1000 for seconds in best)

    def memory(self, work: Callable[[], Any]) -> tuple[int, int]:
        """Return the bytes taken at most, and those not released afterwards."""
        (self.folder / "clear_refs").write_text("5")  # the peak is what it holds now
        before, _ = self._memory()
        work()
        _, peak = self._memory()
        time.sleep(2)
        left, _ = self._memory()
        return peak - before, left - before

    def _memory(self) -> tuple[int, int]:
        lines = dict(line.split(":", 1) for line in (self.folder / "status").read_text().splitlines())
        now, peak = (int(lines[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
        return now, peak


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", type=int, default=1000)
    options.add_argument("--waiting", type=int, default=1000)
    options.add_argument("--megabytes", type=int, default=100)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", default="", help="kinds whose name has these words")
    asked = options.parse_args()
    goals = Goals()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gauge = Gauge(folder / "longest", asked.rounds)
        model = model_file("overhead")
        engine = Binary((sys.executable, __file__, "engine"), "llama-server", "this benchmark")
        names = {f"model-{index}": model for index in range(asked.models)}
        program = (__file__, "watched", str(folder / "longest"))
        server = stack.enter_context(router(names, FLAGS, engine, folder=folder, program=program, aliases=ALIASES))
        gauge.folder = Path("/proc", str(server.process.pid))

        rows: list[tuple[str, ...]] = []

        def judge(name: str, work: Callable[[], Any], size: int = 0) -> None:
            if asked.only not in name:
                return
            figures = gauge.held_ms(work)
            goals.at_most(name, figures[0], GOAL_MS, " ms")
            memory: tuple[str, ...] = ("", "")
            if size > 2 << 20 and (gauge.folder / "clear_refs").exists():
                peak, left = gauge.memory(work)
                goals.at_most(f"{name}: memory", peak / size, MOST_MEMORY, " × the body")
                memory = (f"{peak / size:.1f} ×", f"{left / 1048576:.0f}")
            if gauge.answer == 503:
                raise SystemExit(f"{name}: the router has no engine for it")
            rows.append((name, str(gauge.answer or ""), *(f"{figure:.1f}" for figure in figures), *memory))
            print(*rows[-1], sep="  ", flush=True)

        def judge_body(name: str, path: str, kind: str, body: bytes) -> None:
            judge(name, lambda: ask(server, "POST", path, body, kind), len(body))

        def judge_lists(when: str) -> None:
            for path in LISTS:
                judge(f"{path}{when}", partial(ask, server, "GET", path, None, JSON))

        ask(server, "POST", "/v1/models/load", b'{"model": "model-0"}', JSON)
        judge_body("a refused embedding", "/v1/embeddings", JSON, b'{"model": "model-0", "input": "a"}')
        for name, path, kind, body in bodies(asked.megabytes):
            judge_body(f"{asked.megabytes} MiB: {name}", path, kind, body)
        for name, path, kind, body in small_bodies():
            judge_body(name, path, kind, body)
        judge_lists("")
        for models in (10, asked.models):
            with waiting(server, asked.waiting, models):
                when = f", {asked.waiting} wait for {models} models"
                judge(f"nothing is asked for{when}", lambda: time.sleep(3))
                judge_lists(when)
    print_table(("event loop held", "answer", "ms", "wall", "its CPU", "memory", "MiB left"), rows)
    return goals.judge()


if __name__ == "__main__":
    if sys.argv[1:2] == ["watched"]:
        watched(sys.argv[2], sys.argv[3:])
    elif sys.argv[1:2] == ["engine"]:
        uvloop.run(serve_engine(sys.argv[2:]))
    else:
        sys.exit(main())
