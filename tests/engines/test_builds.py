"""The engine as it is: each build says in its own way that it is ready, has its own flags, and is slow to go.

The embedded engine is always tried, and a llama-server on PATH or in LLAMA_SERVER_PATH. `ENGINE_BUILDS="9294 10434
11434"` tries those builds, too, which it installs or compiles first: see `engine_builds.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import engine_builds
import httpx2 as httpx
import psutil
import pytest
from conftest import Router, eventually, models, starting

from router.engines.llamacpp import embedded
from router.engines.llamacpp.binary import Binary
from router.engines.llamacpp.flags import AUTO_SLOTS
from router.engines.llamacpp.server import LlamaServer
from router.engines.log_ring import LogRing
from router.engines.process import EngineOrder
from router.scheduling.messages import Retry

FOUND = os.environ.get("LLAMA_SERVER_PATH") or shutil.which("llama-server")
BUILDS = ["embedded", *([FOUND] if FOUND else []), *engine_builds.asked_for()]
FLAGS = ["-c", "1024", "-np", "1", "-t", "1", "--ignore-eos", "--context-shift"]
LETTERS = "root ::= [a-z]*"
DRAIN_SEC = 0.1
LATE_SEC = 0.7
"""For an engine to be gone: half a second is promised, and the machine may have more to do."""


@pytest.fixture(scope="module", params=BUILDS)
def server(request: pytest.FixtureRequest) -> str:
    """Path of a llama-server; empty for the embedded engine."""
    build: str = request.param
    return "" if build == "embedded" else str(engine_builds.llama_server(build))


@pytest.fixture(scope="module")
def router(server: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    system = {"max_drain_sec": DRAIN_SEC, **({"llama_server_path": server} if server else {})}
    auto = models(tiny, "auto", flags=[*FLAGS, "-np", "-1"])
    config = {"system": system, "models": models(tiny, "a", flags=FLAGS) | auto}
    for mode, flags in LOADING.items():
        config["models"] |= models(tiny, mode, flags=[*FLAGS, *flags])
    with starting(tmp_path_factory.mktemp("home")) as start:
        yield start(config)


LOADING = {
    "none": ["--load-mode", "none"],
    "older-none": ["--no-mmap"],
    "locked": ["--mlock"],
    "direct": ["--load-mode", "dio"],
}


def complete(router: Router, alias: str) -> httpx.Response:
    """Letters only: some builds find fault with nonsense."""
    body = {"model": alias, "prompt": "x", "n_predict": 3, "grammar": LETTERS}
    answer = router.http.post("/completion", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def test_it_becomes_ready_and_answers(router: Router) -> None:
    assert complete(router, "a").json()["tokens_predicted"] == 3
    assert router.status("a")["load_sec"] < 10


@pytest.mark.parametrize("mode", LOADING)
def test_flags_of_other_builds_mean_the_same(router: Router, mode: str) -> None:
    complete(router, mode)


def test_it_has_the_slots_that_are_counted(router: Router) -> None:
    for alias, slots in {"a": 1, "auto": AUTO_SLOTS}.items():
        complete(router, alias)
        props = router.http.get("/props", params={"model": alias}).json()
        assert props["total_slots"] == router.status(alias)["slots"] == slots


def maps(pid: int, path: Path) -> bool:
    return any(Path(mapped.path) == path for mapped in psutil.Process(pid).memory_maps())


def test_what_is_not_to_be_mapped_is_not(router: Router, tiny: Path) -> None:
    for mode, is_mapped in {"a": True, "none": False, "older-none": False, "direct": False}.items():
        complete(router, mode)
        assert maps(router.status(mode)["pid"], tiny) is is_mapped, mode


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_busy_engine_is_gone_half_a_second_after_its_time(router: Router, *, streams: bool) -> None:
    complete(router, "a")
    engine = psutil.Process(router.status("a")["pid"])
    body = json.dumps(
        {"model": "a", "prompt": "x", "n_predict": 1_000_000, "grammar": LETTERS, "stream": streams}
    ).encode()
    with socket.create_connection((router.http.base_url.host, router.http.base_url.port or 0)) as client:
        head = b"POST /completion HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
        client.sendall(head % len(body) + body)
        eventually(lambda: router.status("a")["in_flight"] == 1)
        time.sleep(0.2)  # it computes
        began = time.monotonic()
        router.http.post("/v1/models/eject", json={"model": "a"})
        took_sec = time.monotonic() - began
        assert not engine.is_running()
    assert took_sec < DRAIN_SEC + LATE_SEC


def test_an_idle_engine_is_gone_at_once(router: Router) -> None:
    complete(router, "a")
    began = time.monotonic()
    router.http.post("/v1/models/eject", json={"model": "a"})
    assert time.monotonic() - began < LATE_SEC


@pytest.mark.parametrize("speaks", [True, False])
def test_a_port_that_another_program_has_is_left_to_it(server: str, tiny: Path, speaks: bool) -> None:
    """Also where its words are lost: a thread of its own writes them, for which an exit does not wait."""
    binary = Binary((server,), "llama-server", "") if server else Binary(tuple(embedded.command()), "embedded", "")
    command = (*binary.argv, "-m", str(tiny))
    silenced = ("/bin/sh", "-c", 'exec "$@" 2>/dev/null', "sh", *command)

    async def lose(port: int) -> tuple[Retry, str]:
        order = EngineOrder("a", command if speaks else silenced)
        engine = LlamaServer.start(order, port, LogRing(100), None)
        reason = await engine.exited
        return engine.ending.retry, reason.told

    with socket.create_server(("127.0.0.1", 0)) as other:
        assert asyncio.run(lose(other.getsockname()[1])) == (Retry.AT_ONCE, "exited with code 1")
