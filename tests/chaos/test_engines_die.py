"""Engines are killed and stopped under load; their clients must not notice more than they have to."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from bookkeeping import books, observed
from conftest import Start, eventually, models
from storm import LONG, Crowd, eject_all, scale, settle


@pytest.mark.timeout(900 if LONG else 120)
def test_kill_9_of_random_engines(start: Start, tiny: Path, tmp_path: Path) -> None:
    kills = scale(12, 100)
    system = {
        # One request can meet every one of the kills, and one model all of them before it serves anybody. With
        # these bounds out of reach the promise is absolute: no plain request fails, and no stream before it began.
        "max_request_retries": kills,
        "model_load_max_retries": kills,
        "model_crash_window_sec": 0.001,
        "preload_models": ["*"],
        "preload_delay_sec": 0,
    }
    entries = models(tiny, "a", "b", flags=["-c", "2048", "-np", "2", "-t", "1", "--ignore-eos"])
    router = start({"system": system, "models": entries}, **observed(tmp_path))
    for alias in entries:
        assert router.chat(alias).status_code == 200
    eject_all(router, *entries)
    router.keep_no_connection()
    eventually(lambda: books(router, tmp_path)["HttpProtocol"] == 0)
    before = books(router, tmp_path)

    crowd = Crowd(router, tuple(entries))
    crowd.start(16, crowd.ask_plainly)
    crowd.start(4, crowd.ask_for_a_stream)
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    killed: set[int] = set()
    while len(killed) < kills:
        answered = crowd.answered + chance.randrange(1, 8)
        eventually(lambda goal=answered: crowd.answered >= goal, timeout_sec=60)  # type: ignore[misc]
        crowd.over.wait(chance.uniform(0, 0.1))
        alive = [engine for engine in router.engines if engine.pid not in killed]
        if alive:
            victim = chance.choice(alive)
            victim.kill()
            killed.add(victim.pid)
    crowd.finish()

    assert crowd.failures == [], seed
    assert crowd.outcomes["plain 200"] > kills
    assert crowd.outcomes["stream complete"] > 0
    stats = router.http.get("/v1/queue/stats").json()["summary"]
    assert stats["total_queued"] == stats["total_processing"] == 0
    eject_all(router, *entries)
    settle(router, tmp_path, before)
    assert "Traceback" not in router.log


def test_an_engine_that_is_stopped_holds_up_its_own_requests_only(start: Start, tiny: Path) -> None:
    system = {"request_timeout_sec": 1, "stop_grace_sec": 0.5}
    router = start({"system": system, "models": models(tiny, "a", "b")})
    assert router.chat("a").status_code == router.chat("b").status_code == 200
    hung = router.status("a")["pid"]
    os.kill(hung, signal.SIGSTOP)
    began = time.monotonic()
    answer = router.chat("a")
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "request_timeout"
    assert time.monotonic() - began < 3
    assert router.chat("b").status_code == 200
    assert router.stop() == 0  # also an engine that cannot hear SIGTERM goes
    assert not psutil.pid_exists(hung)


def test_a_stream_whose_engine_is_stopped_ends_with_an_error_event(start: Start, tiny: Path) -> None:
    router = start({"system": {"request_timeout_sec": 1}, "models": models(tiny, "a")})
    router.chat("a")
    body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "stream": True}
    with router.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(router.status("a")["pid"], signal.SIGSTOP)
        rest = [line for line in lines if line]
    assert "request_timeout" in rest[-2]
    assert rest[-1] == "data: [DONE]"
