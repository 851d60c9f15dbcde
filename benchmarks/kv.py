"""What does a return to a conversation cost whose model had to make room, and what does keeping it cost others?

    python benchmarks/kv.py [returns] [killed] [crowd] [unique] [short] [ahead] [--repeat 3] [--tokens 2000 8000]

`returns`: models A and B, room for one. A conversation with A of so many tokens, a word with B, and the next turn
with A: time to its first byte, less that of a swap to A with a prompt of one word. Beside us with `kv_store` and
without it: llama-server's router mode, which starts its engines anew like any other router.

`killed`: a conversation whose engine is killed (SIGKILL) in the middle of its next answer: the share of cached
tokens when its client asks again.

`crowd`: conversations in turn through two slots of one engine, whose cache in RAM (`--cache-ram`) is too small for
them: the share of cached tokens, and turns per second, with `kv_store` and without.

`unique`: prompts that nobody asks again, with `kv_store` and without, in turns: rate, processor time of the router
and its engine per request, and the 99th percentile of the time to the first byte.

`short`: chats of a few words, answered by an engine from memory: processor time of the router per request.

`ahead`: a swap to a model of 800 MB that is not in the page cache, on a disk limited to 200 MB/s, while the victim
finishes an answer for as long as the load takes: time to the first byte, with reading ahead and without. What is
left of a load once the file is read, a second of processor time, is in both. Needs root, control groups that limit
block devices, and the system's temporary folder (TMPDIR) on a file system of one.

The models are random ones, whose tokens are bytes. But for `ahead`, weights and states come from the page cache.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from kinds import MESSAGES, Client, InstantLlamaServer, Meter, measure
from overhead import serve_instantly
from peers import (
    CACHE,
    ROOT,
    Goals,
    Router,
    Server,
    chat_body,
    engine_or_embedded,
    llama_server_router,
    model_file,
    print_table,
    router,
)
from tiny_models import write_llama

from router.engines.llamacpp.binary import Binary

CONTEXT = 16384
OURS, WITHOUT, PEER = "llama-router", "llama-router without kv_store", "llama-server router mode"
WITHOUT_AHEAD = "llama-router that does not read ahead"
SIZES: dict[str, dict[str, Any]] = {
    "large": {"target_bytes": 100 << 20},
    "fast": {"n_embd": 256, "n_layer": 6, "n_head": 4, "n_ff": 512},
    "file": {"target_bytes": 800_000_000},
}
"""On two cores, `large` computes some 450 tokens of a prompt a second, and keeps 3 KB of each; `fast` some 2,500,
and keeps 6 KB. What matters of `file` is its size."""
WORDS = [f"{number:x}" for number in range(4096)]
DISK_BYTES_PER_SEC = 200_000_000


def model_of(name: str, size: str = "large") -> Path:
    """Return a random model with a long context."""
    path = CACHE / f"kv-{size}-{name}.gguf"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        write_llama(part, name=name, seed=ord(name), context_length=CONTEXT, **SIZES[size])
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(path)
    path.read_bytes()
    return path


def text_of(tokens: int, seed: int) -> str:
    """Return a text of so many bytes, each of which is a token: a space would be three."""
    return ".".join(random.Random(seed).choices(WORDS, k=tokens))[:tokens]


@dataclass(frozen=True)
class Turn:
    first_byte_sec: float
    cached: int
    tokens: int


def body_of(model: str, prompt: str, tokens: int = 1, **more: Any) -> dict[str, Any]:
    """Ask for so many `a`: builds since 10434 answer 500 to bytes of random weights that are no text."""
    return {"model": model, "prompt": prompt, "n_predict": tokens, "grammar": 'root ::= "a"*', **more}


def ask(server: Server, model: str, prompt: str) -> Turn:
    answer = server.call("POST", "/completion", body_of(model, prompt), timeout_sec=1200)
    if answer.status != 200:
        raise SystemExit(
            f"{server.name} answered {answer.status}: {answer.content.decode(errors='replace')[:500]}"
        )
    said = json.loads(answer.content)
    timings = said["timings"]
    cached = timings.get("cache_n", 0)
    return Turn(answer.first_byte_sec, cached, cached + timings["prompt_n"])


class Answering:
    """An answer that goes on until it is closed, or its engine is gone."""

    def __init__(self, server: Server, model: str, prompt: str, **headers: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        body = json.dumps(body_of(model, prompt, 100_000, stream=True, ignore_eos=True))
        self._connection.request("POST", "/completion", body, {**server.headers, **headers})
        self._answer = self._connection.getresponse()
        self._answer.readline()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
            while self._answer.read1(65536):
                pass

    def close(self) -> None:
        if (connected := self._connection.sock) is not None:
            connected.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._connection.close()


# --- a return -------------------------------------------------------------------------------------------


def returns(binary: Binary, tokens: int, repeat: int, goals: Goals) -> None:
    models = {name: model_of(name) for name in "ab"}
    flags = {"ctx-size": str(CONTEXT), "threads": "2", "parallel": "1"}
    least = {2000: 0.08, 8000: 0.03}.get(tokens)
    sums: dict[str, list[float]] = defaultdict(list)
    loads: dict[str, list[float]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [
            stack.enter_context(router(models, flags, binary, folder=folder, name=OURS)),
            stack.enter_context(router(models, flags, binary, folder=folder, name=WITHOUT, kv_store=False)),
        ]
        if binary.kind == "llama-server":
            servers.append(stack.enter_context(llama_server_router(models, flags, binary, folder=folder)))
        for server in servers:
            ask(server, "b", "hello")  # warm
        for turn in range(repeat):
            for server in servers:
                ask(server, "b", "hello")
                loads[server.name].append(ask(server, "a", "hello").first_byte_sec)
                prompt = text_of(tokens, turn)
                ask(server, "a", prompt)
                ask(server, "b", "hello")
                back = ask(server, "a", f"{prompt} and then?")
                sums[server.name].append(back.first_byte_sec)
                shares[server.name].append(back.cached / back.tokens)
    print(f"\n{binary.kind}: return to a conversation of {tokens} tokens after a swap, {repeat} of them, medians")
    beyond = {name: statistics.median(sums[name]) - statistics.median(loads[name]) for name in sums}
    print_table(
        ["", "first byte ms", "bare load ms", "beyond the load ms", "cached"],
        [
            [
                name,
                f"{statistics.median(sums[name]) * 1000:.0f}",
                f"{statistics.median(loads[name]) * 1000:.0f}",
                f"{beyond[name] * 1000:.0f}",
                f"{statistics.median(shares[name]):.3f}",
            ]
            for name in sums
        ],
    )
    for peer in (WITHOUT, PEER):
        if peer in beyond and least is not None:
            goals.at_most(
                f"{tokens} tokens: return beyond the load to {peer}'s", beyond[OURS] / beyond[peer], least
            )
    whole = statistics.median(sums[OURS]) / statistics.median(loads[OURS])
    goals.at_most(f"{tokens} tokens: the whole return to the bare load", whole, 1.15)


# --- a killed engine -------------------------------------------------------------------------------------


def killed(binary: Binary, tokens: int, repeat: int, goals: Goals) -> None:
    flags = {"ctx-size": str(CONTEXT), "threads": "2", "parallel": "1"}
    shares: dict[str, list[float]] = defaultdict(list)
    for name, kv_store in ((OURS, True), (WITHOUT, False)):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            models = {"a": model_of("a", "fast")}
            server = stack.enter_context(
                router(models, flags, binary, folder=folder, name=name, kv_store=kv_store)
            )
            for turn in range(repeat):
                prompt = text_of(tokens, turn)
                ask(server, "a", prompt)
                time.sleep(2)  # it is quiet: its client reads the answer
                answering = Answering(server, "a", f"{prompt} and then?")
                for process in server.process.children(recursive=True):
                    if str(models["a"]) in process.cmdline():
                        process.send_signal(signal.SIGKILL)
                answering.close()
                back = ask(server, "a", f"{prompt} and then?")
                shares[name].append(back.cached / back.tokens)
    print(
        f"\n{binary.kind}: a conversation of {tokens} tokens whose engine is killed as it answers, {repeat} times"
    )
    print_table(["", "least cached"], [[name, f"{min(shares[name]):.3f}"] for name in shares])
    goals.at_least("killed: cached share of the next turn", min(shares[OURS]), 0.9)


# --- a crowd --------------------------------------------------------------------------------------------


def crowd(binary: Binary, conversations: int, tokens: int, turns: int, cache_mib: int, goals: Goals) -> None:
    flags = {"ctx-size": str(2 * CONTEXT), "threads": "2", "parallel": "2", "cache-ram": str(cache_mib)}
    rates, shares, firsts = {}, {}, {}
    for name, kv_store in ((OURS, True), (WITHOUT, False)):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            models = {"a": model_of("a", "fast")}
            ours = stack.enter_context(router(models, flags, binary, folder=folder, name=name, kv_store=kv_store))
            prompts = [text_of(tokens, seed) for seed in range(conversations)]
            began = time.perf_counter()
            for prompt in prompts:
                ask(ours, "a", prompt)
            firsts[name] = conversations / (time.perf_counter() - began)
            began, cached, whole = time.perf_counter(), 0, 0
            for turn in range(turns):
                for number, prompt in enumerate(prompts):
                    answer = ask(ours, "a", f"{prompt} turn {turn}?")
                    prompts[number] = f"{prompt} turn {turn}?"
                    cached, whole = cached + answer.cached, whole + answer.tokens
            rates[name] = conversations * turns / (time.perf_counter() - began)
            shares[name] = cached / whole
    print(
        f"\n{binary.kind}: {conversations} conversations of {tokens} tokens in turn through two slots, "
        f"--cache-ram {cache_mib}, {turns} turns after the first"
    )
    print_table(
        ["", "first turns a second", "turns a second", "cached"],
        [[name, f"{firsts[name]:.2f}", f"{rates[name]:.2f}", f"{shares[name]:.3f}"] for name in rates],
    )
    goals.at_least("crowd: cached share", shares[OURS], 0.9)
    goals.at_least("crowd: turns to those without kv_store", rates[OURS] / rates[WITHOUT], 3)


# --- prompts of their own -------------------------------------------------------------------------------


def cpu_sec(server: Server) -> float:
    """Return the processor time of a router and its engines."""
    spent = server.cpu().total
    for process in server.process.children(recursive=True):
        times = process.cpu_times()
        spent += times.user + times.system
    return spent


def unique(binary: Binary, tokens: int, repeat: int, goals: Goals) -> None:
    flags = {"ctx-size": str(CONTEXT), "threads": "2", "parallel": "2"}
    at_once = 10
    figures: dict[str, list[tuple[float, float]]] = defaultdict(list)
    firsts: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = {"a": model_of("a")}
        servers = [
            stack.enter_context(router(models, flags, binary, folder=folder, name=name, kv_store=kept))
            for name, kept in ((OURS, True), (WITHOUT, False))
        ]
        seed = 10_000
        for server in servers:
            ask(server, "a", "hello")
        for turn in range(repeat):
            for server in servers if turn % 2 else servers[::-1]:
                before, began = cpu_sec(server), time.perf_counter()
                for _ in range(at_once):
                    seed += 1
                    firsts[server.name].append(ask(server, "a", text_of(tokens, seed)).first_byte_sec)
                took = time.perf_counter() - began
                figures[server.name].append((at_once / took, (cpu_sec(server) - before) / at_once))
    print(f"\n{binary.kind}: {tokens} tokens that nobody asks again, {repeat} times {at_once} each")
    rates, cpus = (
        {name: statistics.median(one[place] for one in figures[name]) for name in figures} for place in (0, 1)
    )
    p99s = {name: sorted(times)[int(0.99 * len(times))] for name, times in firsts.items()}
    print_table(
        ["", "a second", "router and engine CPU ms", "first byte p50 ms", "first byte p99 ms"],
        [
            [
                name,
                f"{rates[name]:.2f}",
                f"{cpus[name] * 1000:.0f}",
                f"{statistics.median(firsts[name]) * 1000:.0f}",
                f"{p99s[name] * 1000:.0f}",
            ]
            for name in (OURS, WITHOUT)
        ],
    )
    goals.at_least("unique: rate to that without kv_store", rates[OURS] / rates[WITHOUT], 0.98)
    goals.at_most("unique: CPU of router and engine to that without", cpus[OURS] / cpus[WITHOUT], 1.03)
    goals.at_most("unique: p99 of the first byte to that without", p99s[OURS] / p99s[WITHOUT], 1.05)


def short(rounds: int, goals: Goals) -> None:
    binary = Binary((sys.executable, __file__, "llama-server"), "llama-server", "this benchmark")
    costs: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clients: dict[str, tuple[Client, Meter]] = {}
        models = {"a": model_file("kinds")}
        for name, kept in ((OURS, True), (WITHOUT, False)):
            server = router(models, {"parallel": "2", "ctx-size": "4096"}, binary, folder=folder, kv_store=kept)
            stack.enter_context(server)
            clients[name] = Client(server), Meter(server)
        body = chat_body("a", messages=MESSAGES)
        for client, meter in clients.values():
            measure(client, meter, body, 0.5, 0)
        for turn in range(rounds):
            for name in (OURS, WITHOUT) if turn % 2 else (WITHOUT, OURS):
                client, meter = clients[name]
                costs[name].append(measure(client, meter, body, 0.7, 0).per_request)
    print(f"\nchats of {len(json.dumps(body))} bytes, two slots: medians of {rounds} rounds")
    print_table(["", "router CPU µs"], [[name, f"{statistics.median(costs[name]):.0f}"] for name in costs])
    ratio = statistics.median(costs[OURS]) / statistics.median(costs[WITHOUT])
    goals.at_most("short: router CPU to that without kv_store", ratio, 1.03)


# --- files that are read ahead ----------------------------------------------------------------------------


@contextmanager
def slow_disk(folder: Path, bytes_per_sec: int) -> Iterator[Path]:
    """Make a control group whose processes read no faster from the device of a folder; its file of processes."""
    device = folder.stat().st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    known = Path("/sys/dev/block", numbers).resolve()
    if (known / "partition").exists():  # only whole disks can be limited
        numbers = (known.parent / "dev").read_text().strip()
    version_1 = Path("/sys/fs/cgroup/blkio")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"llama-router-kv-{os.getpid()}"
    try:
        if not known.is_dir():
            raise OSError(f"{folder} is not on a block device ({numbers})")
        group.mkdir()
        if version_1.is_dir():
            (group / "blkio.throttle.read_bps_device").write_text(f"{numbers} {bytes_per_sec}")
        else:
            (group / "io.max").write_text(f"{numbers} rbps={bytes_per_sec}")
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        raise SystemExit(f"ahead: the disk cannot be limited here: {error}") from None
    try:
        yield group / "cgroup.procs"
    finally:
        for _ in range(100):
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.05)


def forget(file: Path) -> None:
    """Take a file that nobody maps out of the page cache."""
    opened = os.open(file, os.O_RDONLY)
    os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(opened)


def ahead(binary: Binary, repeat: int, goals: Goals) -> None:
    models = {"a": model_of("a"), "b": model_of("b", "file")}
    flags = {"ctx-size": "4096", "threads": "2", "parallel": "1", "no-warmup": ""}
    swaps: dict[str, list[float]] = defaultdict(list)
    loads: list[float] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = stack.enter_context(slow_disk(CACHE, DISK_BYTES_PER_SEC))
        servers: Mapping[str, Router] = {
            name: router(models, flags, binary, folder=folder, name=name, program=program, aliases={})
            for name, program in ((OURS, [str(ROOT / "run.py")]), (WITHOUT_AHEAD, [__file__, "without-ahead"]))
        }
        for server in servers.values():
            stack.enter_context(server)
            processes.write_text(str(server.process.pid))  # and its engines, which it starts later
            ask(server, "b", "hello")
            ask(server, "a", "hello")
            forget(models["b"])
            loads.append(ask(server, "b", "hello").first_byte_sec)
            ask(server, "a", "hello")  # nobody has `b` mapped: what is mapped stays in the page cache
        load_sec = statistics.median(loads)
        for turn in range(repeat):
            for name, server in servers.items() if turn % 2 else list(servers.items())[::-1]:
                forget(models["b"])
                answering = Answering(server, "a", "hello", **{"X-Request-Priority": "low"})
                swap: list[float] = []
                asking = threading.Thread(target=_swap, args=(server, swap))
                asking.start()
                while server.call("GET", "/v1/models/a").json()["state"] != "draining":
                    time.sleep(0.02)
                drains_since = time.perf_counter()
                time.sleep(load_sec)
                if server.call("GET", "/v1/models/a").json()["state"] != "draining":
                    raise SystemExit("ahead: the victim has finished too early")
                answering.close()
                asking.join()
                swaps[name].append(swap[0] - drains_since)
                ask(server, "a", "hello")
    print(
        f"\n{binary.kind}: a swap to 800 MB at 200 MB/s whose victim finishes for {load_sec:.2f} s, {repeat} times"
    )
    medians = {name: statistics.median(swaps[name]) for name in (OURS, WITHOUT_AHEAD)}
    print_table(["", "to the first byte ms"], [[name, f"{medians[name] * 1000:.0f}"] for name in medians])
    goals.at_most("ahead: swap to one without reading ahead", medians[OURS] / medians[WITHOUT_AHEAD], 0.65)


def _swap(server: Server, ended: list[float]) -> None:
    """Ask for the other model, before all others; note when the answer begins."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    headers = {**server.headers, "X-Request-Priority": "high"}
    connection.request("POST", "/completion", json.dumps(body_of("b", "hello")), headers)
    if connection.getresponse().status == 200:
        ended.append(time.perf_counter())
    connection.close()


def router_without_ahead(arguments: list[str]) -> None:
    """This file as a router that does not read ahead."""
    from router.__main__ import main as serve
    from router.hardware import page_cache

    page_cache.read_ahead = lambda files, most: 0
    sys.argv = [str(ROOT / "run.py"), *arguments]
    serve()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trials = ["returns", "killed", "crowd", "unique", "short", "ahead"]
    parser.add_argument("trials", nargs="*", help=f"{', '.join(trials)}; all but the last without")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 8000], help="of `returns`")
    parser.add_argument("--conversations", type=int, default=50, help="of `crowd`")
    parser.add_argument("--crowd-tokens", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=1, help="of each conversation of `crowd`, after the first")
    parser.add_argument("--cache-ram", type=int, default=1024, help="of the engine of `crowd`, in MiB")
    args = parser.parse_args()
    goals = Goals()
    wanted = args.trials or trials[:-1]
    binary = engine_or_embedded()
    if "returns" in wanted:
        for tokens in args.tokens:
            returns(binary, tokens, args.repeat, goals)
    if "killed" in wanted:
        killed(binary, 2000, args.repeat, goals)
    if "crowd" in wanted:
        crowd(binary, args.conversations, args.crowd_tokens, args.turns, args.cache_ram, goals)
    if "unique" in wanted:
        unique(binary, 600, 2 * args.repeat, goals)
    if "short" in wanted:
        short(20 * args.repeat, goals)
    if "ahead" in wanted:
        ahead(binary, args.repeat, goals)
    return goals.judge()


if __name__ == "__main__":
    if sys.argv[1:2] == ["without-ahead"]:
        router_without_ahead(sys.argv[2:])
    elif sys.argv[1:2] == ["llama-server"]:
        uvloop.run(serve_instantly(int(sys.argv[sys.argv.index("--port") + 1]), InstantLlamaServer))
    else:
        sys.exit(main())
