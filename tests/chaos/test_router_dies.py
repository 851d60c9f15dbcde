"""The router itself is killed, whatever it is doing: nothing of it may remain, and the next one serves."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import threading
from pathlib import Path

import httpx2 as httpx
import pytest
from conftest import Router, Start, eventually, http_client, models
from storm import LONG, processes_about, scale


@pytest.mark.timeout(900 if LONG else 120)
def test_kill_9_of_the_router_at_random_moments(start: Start, tiny: Path, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    path = Path(shutil.copy(tiny, tmp_path / "mine.gguf"))
    config = {"system": {"preload_models": ["a"]}, "models": models(path, "a", "b", "c")}
    loading = 0
    for _ in range(scale(10, 50)):
        router = start(config)
        ask(router, *chance.sample(["a", "b", "c"], chance.randrange(3)))
        threading.Event().wait(chance.uniform(0, 0.6))
        loading += any("loading" in line for line in router.output[-1:])
        router.process.send_signal(signal.SIGKILL)
        router.process.wait()
        try:
            eventually(lambda: processes_about(path) == [], timeout_sec=2)
        except AssertionError:
            raise AssertionError((seed, processes_about(path))) from None
    assert start(config).chat("b").status_code == 200


def ask(router: Router, *aliases: str) -> None:
    """Send requests in the background and ignore their answers."""

    def chat(alias: str) -> None:
        body = {"model": alias, "messages": [{"role": "user", "content": "x"}], "max_tokens": 500}
        with contextlib.suppress(httpx.HTTPError), http_client(router.url, timeout=10) as http:
            http.post("/v1/chat/completions", json=body)  # fails once the router has been killed

    for alias in aliases:
        threading.Thread(target=chat, args=(alias,), daemon=True).start()
