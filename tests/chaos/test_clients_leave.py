"""Every third client goes away at a random point; slots and queues end at zero, and the others notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import time
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest
from bookkeeping import books, observed
from conftest import Router, Start, eventually, http_client, models
from storm import LONG, eject_all, scale, settle
from tiny_models import write_llama

ALIASES = ("a", "b")


@pytest.mark.timeout(900 if LONG else 120)
def test_every_third_client_leaves_at_a_random_point(start: Start, tiny: Path, tmp_path: Path) -> None:
    flags = ["-c", "2048", "-np", "2", "-t", "1", "--ignore-eos"]
    config = {
        "api": {"heartbeat_sec": 0.05},
        "system": {"max_queue_size_per_model": 1000},
        "models": models(tiny, *ALIASES, flags=flags),
    }
    router = start(config, **observed(tmp_path))
    for alias in ALIASES:
        assert router.chat(alias).status_code == 200
    eject_all(router, *ALIASES)
    router.keep_no_connection()
    eventually(lambda: books(router, tmp_path)["HttpProtocol"] == 0)
    before = books(router, tmp_path)

    seed = random.randrange(1 << 32)
    wrong = asyncio.run(everybody(router, random.Random(seed), scale(150, 2000)))
    assert wrong == [], seed

    eventually(lambda: not any(occupied(router, alias) for alias in ALIASES))
    summary = router.http.get("/v1/queue/stats").json()["summary"]
    assert summary["total_queued"] == summary["total_processing"] == 0
    eject_all(router, *ALIASES)
    assert books(router, tmp_path)["waiting for the garbage collector"] <= 2
    settle(router, tmp_path, before)
    assert "Traceback" not in router.log


@pytest.mark.parametrize("resumes", [False, True], ids=["", "with X-Conversation-Id"])
def test_a_slot_is_free_a_moment_after_its_client_left(start: Start, tmp_path: Path, resumes: bool) -> None:
    path = write_llama(tmp_path / "long.gguf", context_length=32768, n_embd=256)
    router = start({"models": models(path, "a", flags=["-c", "32768", "-t", "1", "--ignore-eos"])})
    router.chat("a")
    status = router.status("a")
    key = psutil.Process(status["pid"]).environ()["LLAMA_API_KEY"]
    engine = http_client(
        f"http://127.0.0.1:{status['port']}", headers={"authorization": f"Bearer {key}"}, timeout=10
    )

    def works() -> bool:
        return bool(engine.get("/slots").json()[0]["is_processing"])

    body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 32000, "stream": True}
    headers = {"x-conversation-id": "mine"} if resumes else {}
    took_sec = []
    for _ in range(7):
        with router.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert works()
        left = time.monotonic()
        while works():
            assert time.monotonic() - left < 10, "it works on for nobody"
        took_sec.append(time.monotonic() - left)
    assert statistics.median(took_sec) < 0.1, took_sec


def occupied(router: Router, alias: str) -> list[int]:
    """Slots in which the engine itself says that it works."""
    status = router.status(alias)
    if status["pid"] is None:
        return []
    key = psutil.Process(status["pid"]).environ()["LLAMA_API_KEY"]
    slots = httpx.get(f"http://127.0.0.1:{status['port']}/slots", headers={"authorization": f"Bearer {key}"})
    return [slot["id"] for slot in slots.json() if slot["is_processing"]]


async def everybody(router: Router, chance: random.Random, clients: int) -> list[str]:
    places = asyncio.Semaphore(48)
    wrong: list[str] = []

    async def one(number: int) -> None:
        async with places:
            problem = await visit(router, random.Random(chance.random()), leaves=number % 3 == 0)
            if problem:
                wrong.append(f"client {number}: {problem}")

    await asyncio.gather(*(one(number) for number in range(clients)))
    return wrong


async def visit(router: Router, chance: random.Random, *, leaves: bool) -> str | None:
    """One client's life; what is wrong with its answer, if it stayed for it."""
    streams = chance.random() < 0.5
    tokens = chance.randrange(1, 40)
    body = json.dumps(
        {
            "model": chance.choice(ALIASES),
            "messages": [{"role": "user", "content": "x" * chance.randrange(1, 200)}],
            "max_tokens": tokens,
            "stream": streams,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    )
    request = head % len(body) + body
    reader, writer = await asyncio.open_connection(*router.address)
    try:
        if leaves and chance.random() < 0.3:
            writer.write(request[: chance.randrange(len(request))])
            await writer.drain()
            return None
        writer.write(request)
        if leaves:
            patience = chance.choice((0, 0.001, 0.01, 0.05, 0.2, 0.5))
            with contextlib.suppress(asyncio.TimeoutError, asyncio.IncompleteReadError, ConnectionError):
                await asyncio.wait_for(reader.readexactly(chance.randrange(1, 3000)), patience)
            return None
        answer = await asyncio.wait_for(reader.read(), 60)
    except asyncio.TimeoutError:
        return "it hangs"
    finally:
        if leaves and chance.random() < 0.5:
            writer.transport.abort()
        writer.close()
    if not answer.startswith(b"HTTP/1.1 200 "):
        return answer.decode("latin-1")
    if b'"completion_tokens":%d,' % tokens not in answer and b'"completion_tokens":%d}' % tokens not in answer:
        return f"asked for {tokens} tokens: {answer[-300:]!r}"
    if streams and b"data: [DONE]\n\n" not in answer:
        return f"no end: {answer[-300:]!r}"
    return None
