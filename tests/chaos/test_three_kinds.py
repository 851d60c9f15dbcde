"""A GGUF, a vLLM and a Transformers share memory for one: nobody is lost, and nobody waits longer than promised.

With VLLM and TRANSFORMERS naming the programs `vllm` and `transformers`, it is the long form with the real ones,
which takes half an hour; else with those that behave like them.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from conftest import ROOT, Router, Start, eventually, models
from hf_models import played_transformers, write_model_of_bytes
from storm import Crowd, eject_all

REAL = {name: os.environ.get(name.upper(), "") for name in ("vllm", "transformers")}
LONG = all(REAL.values())
KILLS = 50 if LONG else 6
LIMIT_SEC = 900 if LONG else 60
PRIORITIES = ("high", "normal", "low")
ALIASES = ("gguf", "vllm", "tf")
ROOM_MIB = 1600
"""vLLM takes 1501 MiB by its formula, the GGUF 1319, and Transformers 401, or 348 once it was measured."""
RESIDENCY_FACTOR = 0.3 if LONG else 1
STEP_SEC = 8 if LONG else 0.4
pytestmark = pytest.mark.timeout(3600 if LONG else 90)


def config(folder: Path, gguf: Path) -> dict[str, Any]:
    """Three models, no two of which fit together."""
    tiny = str(write_model_of_bytes(folder / "tiny"))
    programs = dict(REAL)
    if not LONG:
        programs["vllm"] = str(folder / "vllm")
        Path(programs["vllm"]).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/fake_vllm.py" "$@"\n')
        Path(programs["vllm"]).chmod(0o755)
        programs["transformers"] = str(played_transformers(folder))
    system = {
        **{f"{name}_path": path for name, path in programs.items()},
        # The played ones take next to nothing of what the real ones need.
        **({"memory_budget_mb": ROOM_MIB} if LONG else {"max_concurrent_models": 1}),
        "load_stall_sec": 300,
        "queue_timeout_sec": LIMIT_SEC,
        # One request can meet every one of the kills, and one model all of them before it serves anybody.
        "max_request_retries": 10 * KILLS,
        "model_load_max_retries": 10 * KILLS,
        "model_crash_window_sec": 0.001,
    }
    large = ["-c", "400000", "-np", "2", "-ub", "64", "-t", "1", "--ignore-eos"] if LONG else None
    vllm = {"context": 1024, "slots": 2, "flags": ["--enforce-eager"]}
    return {
        "system": system,
        "scheduling": {"residency_factor": RESIDENCY_FACTOR},
        "models": {
            **models(gguf, "gguf", **({"flags": large} if large else {})),
            "vllm": {"engine": "vllm", "model_path": tiny, **vllm},
            "tf": {"engine": "transformers", "model_path": tiny},
        },
    }


class Mixed(Crowd):
    """Clients of all priorities. Two in three want a document, the others a stream."""

    def body(self, chance: random.Random, **more: Any) -> dict[str, Any]:
        body = super().body(chance, temperature=0, **more)
        body["messages"][0]["content"] = "a " * (10 if LONG else 200)  # those played repeat it
        return body

    def ask(self, http: httpx.Client, chance: random.Random) -> str:
        http.timeout = httpx.Timeout(LIMIT_SEC)
        http.headers["X-Request-Priority"] = chance.choice(PRIORITIES)
        return self.ask_for_a_stream(http, chance) if chance.random() < 1 / 3 else self.ask_plainly(http, chance)


def requests_in(log: list[str]) -> list[dict[str, Any]]:
    """What the access log says of each request."""
    return [json.loads(line) for line in log if '"message":"request"' in line]


def loads_in(log: list[str]) -> dict[str, list[float]]:
    """How long each load of each model took, in seconds."""
    loads: dict[str, list[float]] = defaultdict(list)
    for line in log:
        if '"reason": "loaded in ' in line:
            told = json.loads(line)
            loads[told["alias"]].append(float(told["reason"].split()[2]))
    return loads


def there(router: Router) -> tuple[str, list[psutil.Process]]:
    """The model that has an engine, and the processes of that; without the tracker, for which nobody waits."""
    engines = router.http.get("/v1/models/status").json()["models"]
    alias, pid = next(((name, each["pid"]) for name, each in engines.items() if each["pid"]), ("", 0))
    found: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):  # it is just going
        tree = (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)) if pid else ()
        found.extend(each for each in tree if "resource_tracker" not in " ".join(each.cmdline()))
    return alias, found


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_three_kinds_share_memory_for_one(start: Start, tmp_path: Path, tiny: Path, middling: Path) -> None:
    router = start(config(tmp_path, middling if LONG else tiny), TMPDIR=str(tmp_path))
    crowd = Mixed(router, ALIASES)
    crowd.start(9, crowd.ask)
    turns = 2 if LONG else 1
    most_at_once = 0
    while min(len(loads_in(router.output)[alias]) for alias in ALIASES) < turns:
        most_at_once = max(most_at_once, len(router.engines))
        assert crowd.failures == []
        time.sleep(0.2)
    calm = len(router.output)
    assert most_at_once == 1, "no two of them fit together"
    _nobody_waits_longer_than_promised(router.output[:calm])

    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    killed: list[str] = []
    seen: set[psutil.Process] = set()
    while len(killed) < KILLS:
        crowd.over.wait(chance.uniform(0, STEP_SEC))
        assert crowd.failures == [], seed
        alias, processes = there(router)
        seen.update(processes)
        # The longer one loads, the less often it is killed, or it would never be there.
        if processes and chance.random() < STEP_SEC / 2 / max(loads_in(router.output)[alias]):
            victim = chance.choice(processes)
            with suppress(psutil.NoSuchProcess):
                what = f"{alias} {router.status(alias)['status']} {' '.join(victim.cmdline())[-20:]}"
                victim.kill()
                killed.append(what)
                print(f"killed {len(killed)}: {what}", flush=True)
    crowd.finish(LIMIT_SEC)

    assert crowd.failures == [], seed
    assert crowd.outcomes["plain 200"] > 0
    assert crowd.outcomes["stream complete"] > 0
    done = requests_in(router.output)
    print(dict(crowd.outcomes), {alias: sum(each["alias"] == alias for each in done) for alias in ALIASES})
    stats = router.http.get("/v1/queue/stats").json()["summary"]
    assert stats["total_queued"] == stats["total_processing"] == 0
    eject_all(router, *ALIASES)
    eventually(lambda: not any(map(is_alive, seen)), 15)
    assert not list(tmp_path.glob("llama-router-*"))


def _nobody_waits_longer_than_promised(log: list[str]) -> None:
    """The waits of each priority, against its bounds: see docs/scheduling.md.

    At worst, a request is let pass for its patience; then each of the two other models is kept for the bound of
    the wait or its quantum, answers what is in flight, and is swapped.
    """
    loads = {alias: max(each) for alias, each in loads_in(log).items()}
    cost_sec = sum(sorted(loads.values())[-2:])
    done = requests_in(log)
    drain_sec = max(each["total_sec"] - each["queue_sec"] for each in done)
    most = {"high": (0, 0, 0), "normal": (15, 30, 4), "low": (120, 300, 20)}
    for priority, (patience_sec, wait_sec, factor) in most.items():
        waits = sorted(each["queue_sec"] for each in done if each["priority"] == priority)
        bound_sec = patience_sec + 2 * (
            max(min(wait_sec, factor * cost_sec), RESIDENCY_FACTOR * cost_sec) + drain_sec + cost_sec
        )
        print(
            f"{priority}: {len(waits)} waits, median {waits[len(waits) // 2]:.1f} s, longest {waits[-1]:.1f} s, "
            f"promised {bound_sec:.1f} s"
        )
        assert waits[-1] < bound_sec
    print(f"loads took at most {loads}, answers {drain_sec:.1f} s")
