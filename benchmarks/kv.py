"""What does a return to a conversation cost whose model had to make room, and what does keeping it cost others?

    python benchmarks/kv.py [returns] [crowd] [unique] [--repeat 3] [--tokens 2000 8000]

`returns`: models A and B, room for one. A conversation with A of so many tokens, a word with B, and the next turn
with A: time to its first byte, less that of a swap to A with a prompt of one word. Beside us with `kv_store` and
without it: llama-server's router mode, which starts its engines anew like any other router.

`crowd`: conversations in turn through two slots of one engine, whose cache in RAM (`--cache-ram`) holds a fifth of
them: the share of cached tokens, and turns per second, with `kv_store` and without.

`unique`: prompts that nobody asks again, with `kv_store` and without, in turns: rate, processor time per request
of the router, and the 99th percentile of the time to the first byte.

The models are random ones of 100 MB, whose tokens are bytes. Weights and states come from the page cache.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from peers import (
    CACHE,
    Goals,
    Server,
    engine_or_embedded,
    llama_server_router,
    print_table,
    router,
)
from tiny_models import write_llama

from router.engines.llamacpp.binary import Binary

CONTEXT = 16384
TOKEN_BYTES = 3072
"""What these models cache for each token: keys and values of 256 numbers of 16 bits in three layers."""
OURS, WITHOUT, PEER = "llama-router", "llama-router without kv_store", "llama-server router mode"
WORDS = [f"{number:x}" for number in range(4096)]


def model_of(name: str) -> Path:
    """Return a random model of 100 MB with a long context."""
    path = CACHE / f"kv-{name}.gguf"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        write_llama(part, name=name, seed=ord(name), target_bytes=100 << 20, context_length=CONTEXT)
        part.rename(path)
    path.read_bytes()
    return path


def text_of(tokens: int, seed: int) -> str:
    """Return a text of so many bytes, each of which is a token."""
    words = random.Random(seed).choices(WORDS, k=tokens)
    return " ".join(words)[:tokens]


@dataclass(frozen=True)
class Turn:
    first_byte_sec: float
    cached: int
    tokens: int


def ask(server: Server, model: str, prompt: str) -> Turn:
    """Ask for one token, an `a`: builds since 10434 answer 500 to bytes of random weights that are no text."""
    body = {"model": model, "prompt": prompt, "n_predict": 1, "grammar": 'root ::= "a"'}
    answer = server.call("POST", "/completion", body, timeout_sec=1200)
    if answer.status != 200:
        raise SystemExit(
            f"{server.name} answered {answer.status}: {answer.content.decode(errors='replace')[:500]}"
        )
    said = json.loads(answer.content)
    timings = said["timings"]
    cached = timings.get("cache_n", 0)
    return Turn(answer.first_byte_sec, cached, cached + timings["prompt_n"])


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


# --- a crowd --------------------------------------------------------------------------------------------


def crowd(binary: Binary, conversations: int, tokens: int, turns: int, goals: Goals) -> None:
    cache_mib = max(1, conversations * tokens * TOKEN_BYTES // 5 >> 20)
    flags = {"ctx-size": str(2 * CONTEXT), "threads": "2", "parallel": "2", "cache-ram": str(cache_mib)}
    rates, shares = {}, {}
    for name, kv_store in ((OURS, True), (WITHOUT, False)):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            models = {"a": model_of("a")}
            ours = stack.enter_context(router(models, flags, binary, folder=folder, name=name, kv_store=kv_store))
            prompts = [text_of(tokens, seed) for seed in range(conversations)]
            for prompt in prompts:
                ask(ours, "a", prompt)
            began, cached, whole = time.perf_counter(), 0, 0
            for turn in range(turns):
                for number, prompt in enumerate(prompts):
                    answer = ask(ours, "a", f"{prompt} turn {turn}?")
                    prompts[number] = f"{prompt} turn {turn}?"
                    cached, whole = cached + answer.cached, whole + answer.tokens
            rates[name] = conversations * turns / (time.perf_counter() - began)
            shares[name] = cached / whole
    print(f"\n{binary.kind}: {conversations} conversations of {tokens} tokens in turn through two slots")
    print_table(
        ["", "turns a second", "cached"], [[name, f"{rates[name]:.2f}", f"{shares[name]:.3f}"] for name in rates]
    )
    goals.at_least("crowd: cached share", shares[OURS], 0.9)
    goals.at_least("crowd: turns to those without kv_store", rates[OURS] / rates[WITHOUT], 3)


# --- prompts of their own -------------------------------------------------------------------------------


def unique(binary: Binary, tokens: int, repeat: int, goals: Goals) -> None:
    flags = {"ctx-size": str(CONTEXT), "threads": "2", "parallel": "1"}
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
        for _ in range(repeat):
            for server in servers:
                before, began = server.cpu(), time.perf_counter()
                for _ in range(10):
                    seed += 1
                    firsts[server.name].append(ask(server, "a", text_of(tokens, seed)).first_byte_sec)
                took = time.perf_counter() - began
                figures[server.name].append((10 / took, (server.cpu() - before).total / 10))
    print(f"\n{binary.kind}: {tokens} tokens that nobody asks again, {repeat} times 10 each")
    rates, cpus = (
        {name: statistics.median(one[place] for one in figures[name]) for name in figures} for place in (0, 1)
    )
    p99s = {name: sorted(times)[int(0.99 * len(times))] for name, times in firsts.items()}
    print_table(
        ["", "a second", "router CPU ms", "first byte p99 ms"],
        [[n, f"{rates[n]:.2f}", f"{cpus[n] * 1000:.2f}", f"{p99s[n] * 1000:.0f}"] for n in rates],
    )
    goals.at_least("unique: rate to that without kv_store", rates[OURS] / rates[WITHOUT], 0.98)
    goals.at_most("unique: router CPU to that without kv_store", cpus[OURS] / cpus[WITHOUT], 1.03)
    goals.at_most("unique: p99 of the first byte to that without", p99s[OURS] / p99s[WITHOUT], 1.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", help="returns, crowd, unique; all of them without")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 8000], help="of `returns`")
    parser.add_argument("--conversations", type=int, default=50, help="of `crowd`")
    parser.add_argument("--crowd-tokens", type=int, default=4000)
    args = parser.parse_args()
    binary, goals = engine_or_embedded(), Goals()
    trials = args.trials or ["returns", "crowd", "unique"]
    if "returns" in trials:
        for tokens in args.tokens:
            returns(binary, tokens, args.repeat, goals)
    if "crowd" in trials:
        crowd(binary, args.conversations, args.crowd_tokens, 2, goals)
    if "unique" in trials:
        unique(binary, 600, args.repeat, goals)
    return goals.judge()


if __name__ == "__main__":
    sys.exit(main())
