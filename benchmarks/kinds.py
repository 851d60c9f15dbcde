"""What does a request for vLLM cost the router, compared with one for llama-server?

    python benchmarks/kinds.py [--rounds 16] [--seconds 2] [--megabytes 30] [--vllm PROGRAM] [--alone]

One router has a model of each kind, both resident. Chats of one token, streams of 200 tokens, and streams whose
client asks for usage go to each in turn, one at a time and one after the other, with a pause that makes both
answer the same number of requests in a second. What is counted is the router's processor time (user + system) and
nothing of the engines'; ratios are taken within a round.

Engines differ in pace: the slower the tokens, the colder the processor's caches for each. `--megabytes` is the
size of llama-server's model, to be chosen so that both rates, which are printed, are alike. `--alone` takes
engines that answer from memory what real ones have said, byte for byte, an event every 4 ms: what the router does
for each is then all that differs.

`--calls` counts calls of Python's and C's functions instead, which nothing else on the machine changes.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import uvloop
from hf_models import LLAMA, write_model_of_bytes
from overhead import TOKENS, InstantEngine, serve_instantly
from peers import (
    CACHE,
    ROOT,
    Goals,
    Router,
    Server,
    chat_body,
    engine_or_embedded,
    model_file,
    print_table,
    router,
)

from router.engines.llamacpp.binary import Binary

FLAGS = {"parallel": "2", "ctx-size": "4096", "threads": "1"}
OURS, THEIRS = "llama-server", "vLLM"
SPEAKER = {**LLAMA, "hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 16, "vocab_size": 1024}
MESSAGES = [{"role": "user", "content": "Hello, who are you?"}]
LOADS: dict[str, dict[str, Any]] = {
    "1-token chats": {"tokens": 1, "messages": MESSAGES},
    f"{TOKENS}-token streams": {"tokens": TOKENS, "messages": MESSAGES, "stream": True},
    f"{TOKENS}-token streams with usage": {
        "tokens": TOKENS,
        "messages": MESSAGES,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
}
GOAL = 1.1


# --- engines that answer from memory ---------------------------------------------------------------------


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class InstantLlamaServer(InstantEngine):
    """What build 11434 says."""

    _LINES = b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\n"
    _MODEL = b'"model":"llama-server","system_fingerprint":"b11434-6a2cbbf"'
    _TIMINGS = (
        b'"timings":{"cache_n":27,"prompt_n":1,"prompt_ms":0.249,"prompt_per_token_ms":0.249,'
        b'"prompt_per_second":4016.0642570281125,"predicted_n":1,"predicted_ms":0.001,'
        b'"predicted_per_token_ms":0.0,"predicted_per_second":0.0}'
    )
    BODY = (
        b'{"choices":[{"finish_reason":"length","index":0,"message":{"role":"assistant","content":"!"}}],'
        b'"created":1795895315,%b,"object":"chat.completion","usage":{"completion_tokens":1,"prompt_tokens":28,'
        b'"total_tokens":29,"prompt_tokens_details":{"cached_tokens":27}},'
        b'"id":"chatcmpl-pcN2XynS69b9hiDzfTj3O8YrhCR3IUQx",%b}' % (_MODEL, _TIMINGS)
    )
    ANSWER = (
        b"%bContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n"
        b"Keep-Alive: timeout=5, max=100\r\n\r\n%b" % (_LINES, len(BODY), BODY)
    )
    HEAD = (
        _LINES + b"X-Accel-Buffering: no\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
        b"Keep-Alive: timeout=5, max=100\r\n\r\n"
    )
    _REST = b'"created":1795895329,"id":"chatcmpl-gQLAkzue9MkkYReQJLzFuL4ZOBbTMj2X",%b,"object":' % _MODEL
    EVENT = (
        b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":"!"}}],'
        b'%b"chat.completion.chunk"}\n\n' % _REST
    )
    CHUNK = chunk(EVENT)
    _LAST = (
        b'data: {"choices":[{"finish_reason":"length","index":0,"delta":{}}],%b"chat.completion.chunk",%b}\n\n'
        % (_REST, _TIMINGS)
    )
    END = chunk(_LAST) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class InstantVllm(InstantEngine):
    """What version 0.32 says."""

    _LINES = b"HTTP/1.1 200 OK\r\ndate: Sat, 28 Nov 2026 19:57:55 GMT\r\nserver: uvicorn\r\n"
    BODY = (
        b'{"id":"chatcmpl-8165166d3447cd68","object":"chat.completion","created":1795895876,"model":"vLLM","choices":'
        b'[{"index":0,"message":{"role":"assistant","content":"!","refusal":null,"annotations":null,"audio":null,'
        b'"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,'
        b'"token_ids":null,"routed_experts":null}],"service_tier":null,'
        b'"system_fingerprint":"vllm-0.32.0-7cf4310a","usage":{"prompt_tokens":19,"total_tokens":20,'
        b'"completion_tokens":1,"prompt_tokens_details":null,"completion_tokens_details":null},'
        b'"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,'
        b'"ec_transfer_params":null,"metrics":null}'
    )
    ANSWER = b"%bcontent-length: %d\r\ncontent-type: application/json\r\nvary: Origin\r\n\r\n%b" % (
        _LINES,
        len(BODY),
        BODY,
    )
    HEAD = (
        _LINES + b"content-type: text/event-stream; charset=utf-8\r\nvary: Origin\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )
    _FIRST = (
        b'data: {"id":"chatcmpl-9e8066d7785c7597","object":"chat.completion.chunk","created":1795895886,'
        b'"model":"vLLM","choices":'
    )
    EVENT = (
        _FIRST
        + b'[{"index":0,"delta":{"content":"!"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
    )
    CHUNK = chunk(EVENT)
    _USAGE = _FIRST + b'[],"usage":{"prompt_tokens":19,"total_tokens":219,"completion_tokens":200}}\n\n'
    END = (
        chunk(EVENT.replace(b'"finish_reason":null', b'"finish_reason":"length"'))
        + chunk(_USAGE)
        + chunk(b"data: [DONE]\n\n")
        + b"0\r\n\r\n"
    )


@dataclass(frozen=True)
class Sample:
    """One kind of engine in one round."""

    requests: int
    events: int
    size: int
    """Bytes of the answers."""
    seconds: float
    """Of waiting for answers."""
    cost: float
    """Microseconds of the router's processor time, or calls."""

    @property
    def per_request(self) -> float:
        return self.cost / self.requests

    @property
    def per_event(self) -> float:
        return self.cost / self.events


class Client:
    """A client with one connection that is kept open."""

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)

    def ask(self, body: bytes) -> bytes:
        self._connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise SystemExit(f"answered {answer.status}: {content.decode(errors='replace')[:500]}")
        return content


def measure(client: Client, meter: Meter, body: dict[str, Any], seconds: float, interval_sec: float) -> Sample:
    """Ask at intervals for a while."""
    asked = json.dumps(body).encode()
    requests = events = size = 0
    waited = 0.0
    meter.start()
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        content = client.ask(asked)
        requests += 1
        events += content.count(b"data: ") or 1
        size += len(content)
        took = time.perf_counter() - now
        waited += took
        time.sleep(max(0.0, interval_sec - took))
    return Sample(requests, events, size, waited, meter.stop())


class Meter:
    """The router's processor time, to the nanosecond: /proc has hundredths of a second."""

    unit = "µs"

    def __init__(self, server: Server) -> None:
        self._clock = ~server.process.pid << 3 | 2  # as clock_getcpuclockid makes it
        self._since = 0.0

    def start(self) -> None:
        self._since = time.clock_gettime(self._clock)

    def stop(self) -> float:
        return (time.clock_gettime(self._clock) - self._since) * 1e6


class CallMeter(Meter):
    """Calls of functions in the router's process, which `counted_router` counts between two signals."""

    unit = "calls"

    def __init__(self, server: Server, file: Path) -> None:
        super().__init__(server)
        self._process = server.process
        self._file = file
        self.latest: dict[str, int] = {}

    def start(self) -> None:
        self._file.unlink(missing_ok=True)
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)

    def stop(self) -> float:
        self._process.send_signal(signal.SIGUSR2)
        while not self._file.exists():
            time.sleep(0.01)
        self.latest = json.loads(self._file.read_text())
        return sum(self.latest.values())


def counted_router(arguments: list[str]) -> None:
    """This file as the router, which writes its calls between SIGUSR1 and SIGUSR2 to the first argument."""
    file = Path(arguments[0])
    calls: collections.Counter[str] = collections.Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            named = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
            calls[f"{Path(frame.f_code.co_filename).name} {named}"] += 1
        elif event == "c_call":
            calls[f"C {getattr(argument, '__qualname__', argument)}"] += 1

    def start(*_: object) -> None:
        calls.clear()
        sys.setprofile(count)

    def stop(*_: object) -> None:
        sys.setprofile(None)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(calls))
        part.rename(file)

    signal.signal(signal.SIGUSR1, start)
    signal.signal(signal.SIGUSR2, stop)
    from router.__main__ import main as serve

    sys.argv = [str(ROOT / "run.py"), *arguments[1:]]
    serve()


def instant_engines(folder: Path) -> tuple[Binary, str]:
    """Return this file as llama-server and as vLLM."""
    vllm = folder / "vllm"
    vllm.write_text(f'#!/bin/sh\nexec {shlex.join((sys.executable, __file__, "vllm"))} "$@"\n')
    vllm.chmod(0o755)
    return Binary((sys.executable, __file__, "llama-server"), "llama-server", "this benchmark"), str(vllm)


def started(
    stack: ExitStack, folder: Path, megabytes: int | None, binary: Binary, vllm: str | None, program: list[str]
) -> Router:
    CACHE.mkdir(exist_ok=True)
    speaker = CACHE / "speaker"
    if not speaker.exists():
        write_model_of_bytes(speaker, SPEAKER)
    entry = {
        "engine": "vllm",
        "model_path": str(speaker),
        "context": 1024,
        "slots": 2,
        "flags": ["--enforce-eager"],
    }
    system: dict[str, Any] = {"load_stall_sec": 300, "health_check_interval_sec": 3600}
    if vllm is not None:
        system["vllm_path"] = vllm
    server = router(
        {OURS: model_file("kinds", megabytes=megabytes)},
        FLAGS,
        binary,
        resident=2,
        folder=folder,
        program=program,
        more={THEIRS: entry},
        **system,
    )
    stack.enter_context(server)
    for name in (OURS, THEIRS):
        answer = server.chat(name, messages=MESSAGES, timeout_sec=600)
        if answer.status != 200:
            raise SystemExit(f"{name} does not answer: {answer.content!r}\n{server.log[-2000:]}")
    return server


def interval_sec(client: Client, load: dict[str, Any]) -> float:
    """Return a time in which both engines answer."""
    slowest = 0.0
    for name in (OURS, THEIRS):
        body = json.dumps(chat_body(name, **load)).encode()
        client.ask(body)
        began = time.perf_counter()
        for _ in range(5):
            client.ask(body)
        slowest = max(slowest, (time.perf_counter() - began) / 5)
    return 1.2 * slowest


def report(title: str, unit: str, samples: dict[str, list[Sample]], goals: Goals) -> None:
    streams = "stream" in title
    figure = "per_event" if streams else "per_request"
    ratios = [
        getattr(theirs, figure) / getattr(ours, figure)
        for ours, theirs in zip(samples[OURS], samples[THEIRS], strict=True)
    ]
    print(f"\n{title}: medians of {len(ratios)} rounds")
    rows = []
    for name, rounds in samples.items():
        requests = sum(sample.requests for sample in rounds)
        rows.append(
            [
                name,
                f"{statistics.median(sample.per_request for sample in rounds):,.0f}",
                f"{statistics.median(sample.per_event for sample in rounds):,.1f}",
                f"{sum(sample.events for sample in rounds) / requests:,.1f}",
                f"{sum(sample.size for sample in rounds) / sum(sample.events for sample in rounds):,.0f}",
                f"{sum(sample.events for sample in rounds) / sum(sample.seconds for sample in rounds):,.0f}",
            ]
        )
    titles = ["kind", f"{unit}/request", f"{unit}/event", "events/request", "bytes/event", "events/s"]
    print_table(titles, rows)
    print(f"to {OURS}: minimum {min(ratios):.3f}, median {statistics.median(ratios):.3f}, most {max(ratios):.3f}")
    what = "event" if streams else "request"
    goals.at_most(f"{title}: {unit} per {what}, {THEIRS} to {OURS}", statistics.median(ratios), GOAL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2, help="of each load, kind and round (2)")
    parser.add_argument("--megabytes", type=int, help="size of llama-server's model (tiny)")
    parser.add_argument("--vllm", metavar="PROGRAM", default=os.environ.get("VLLM_PATH"))
    parser.add_argument("--alone", action="store_true", help="with engines that answer from memory")
    parser.add_argument("--calls", action="store_true", help="count calls, and print which differ")
    args = parser.parse_args()
    goals = Goals()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "calls.json"
        program = [__file__, "counted", str(file)] if args.calls else [str(ROOT / "run.py")]
        binary, vllm = instant_engines(folder) if args.alone else (engine_or_embedded(), args.vllm)
        server = started(stack, folder, args.megabytes, binary, vllm, program)
        meter = CallMeter(server, file) if args.calls else Meter(server)
        client = Client(server)
        for title, load in LOADS.items():
            pace_sec = interval_sec(client, load)
            samples: dict[str, list[Sample]] = defaultdict(list)
            calls: dict[str, dict[str, float]] = {}
            for turn in range(args.rounds):
                for name in (OURS, THEIRS) if turn % 2 else (THEIRS, OURS):
                    sample = measure(client, meter, chat_body(name, **load), args.seconds, pace_sec)
                    samples[name].append(sample)
                    if isinstance(meter, CallMeter):
                        calls[name] = {call: count / sample.requests for call, count in meter.latest.items()}
            report(title, meter.unit, {name: samples[name] for name in (OURS, THEIRS)}, goals)
            if calls:
                print_differences(calls)
    return goals.judge()


def print_differences(calls: dict[str, dict[str, float]]) -> None:
    names = calls[OURS].keys() | calls[THEIRS].keys()
    differences = [(calls[THEIRS].get(name, 0) - calls[OURS].get(name, 0), name) for name in names]
    for more, name in sorted(differences, reverse=True):
        if abs(more) > 0.3:
            print(f"{more:+9.1f}  {name}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["counted"]:
        counted_router(sys.argv[2:])
    elif sys.argv[1:2] in (["llama-server"], ["vllm"]):
        protocol = InstantVllm if sys.argv[1] == "vllm" else InstantLlamaServer
        uvloop.run(serve_instantly(int(sys.argv[sys.argv.index("--port") + 1]), protocol))
    else:
        sys.exit(main())
