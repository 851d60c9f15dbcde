"""Requests of higher priority displace earlier ones: in full queues, and where bodies fill the memory for them."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, eventually, fake, models

CLIENTS = {"jobs": {"key": "jobs-key", "priority": "low", "highest_priority": "low"}}
API = {"api_keys": ["full"], "clients": CLIENTS, "heartbeat_sec": 0.2}
FULL = {"authorization": "Bearer full"}
ROUTES = ("/v1/chat/completions", "/v1/messages", "/api/chat")


def ask(router: Router, stack: ExitStack, path: str, key: str = "jobs-key", **more: Any) -> socket.socket:
    """Somebody who asks, and waits for the answer."""
    body = json.dumps(
        {"model": "a", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}], **more}
    ).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
    head += f"content-length: {len(body)}\r\n"
    client = stack.enter_context(socket.create_connection(router.address, timeout=20))
    client.sendall(head.encode() + b"\r\n" + body)
    return client


def answer(client: socket.socket) -> tuple[str, Any]:
    """Its head, and its document."""
    received = b""
    while b"\r\n\r\n" not in received or not received.endswith(b"}"):
        part = client.recv(65536)
        assert part, received
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return head.decode(), json.loads(body)


def waiting(router: Router) -> list[str]:
    """By whom; without a name: the full key."""
    stats = router.http.get("/v1/queue/stats", headers=FULL).json()
    return [request["client"] or "" for request in stats["per_model"]["a"]["waiting"]]


@pytest.fixture
def full(start: Start, tiny: Path, tmp_path: Path) -> Router:
    """Room for three, of a model that never comes."""
    system = {"llama_server_path": fake(tmp_path, ready="never"), "max_queue_size_per_model": 3}
    return start({"api": API, "system": system, "models": models(tiny, "a")})


def test_a_client_that_fills_the_queue_keeps_out_nobody_of_a_higher_priority(full: Router) -> None:
    with ExitStack() as stack:
        jobs = []
        for number, path in enumerate(ROUTES, 1):
            jobs.append(ask(full, stack, path, stream=False))
            eventually(lambda number=number: len(waiting(full)) == number)
        assert full.chat("a", headers={"authorization": "Bearer jobs-key"}).status_code == 429
        for number, path in enumerate(ROUTES, 1):
            ask(full, stack, path, "full", stream=False)
            eventually(lambda number=number: waiting(full).count("") == number)
        chat, message, ollama = [answer(job) for job in jobs]
        for (head, _), status in ((chat, 429), (message, 429), (ollama, 503)):
            assert head.startswith(f"HTTP/1.1 {status} ")
            assert "x-should-retry: false" not in head
        assert chat[1]["error"]["code"] == "displaced"
        assert "higher priority" in chat[1]["error"]["message"]
        assert message[1]["error"]["type"] == "rate_limit_error"
        assert "busy" in ollama[1]["error"]
        assert "max_queue_size_per_model" in ollama[1]["error"]
        refused = full.chat("a", headers=FULL)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    counted = full.http.get("/metrics", headers=FULL).text
    line = 'router_requests_total{model="a",endpoint="%s",priority="low",status="displaced"} 1'
    assert all(line % path in counted for path in ROUTES)
    decisions = full.http.get("/v1/decisions", headers=FULL).json()["decisions"]
    told = [decision for decision in decisions if decision["status"] == "displaced"]
    assert [decision["model"] for decision in told] == ["a"]
    assert told[0]["reason"].startswith("3 requests that waited gave way")


def test_a_stream_that_is_displaced_ends_with_an_event_that_says_so(full: Router) -> None:
    with ExitStack() as stack:
        jobs = [ask(full, stack, "/v1/chat/completions", stream=True) for _ in range(3)]
        begun = [job.recv(65536) for job in jobs]
        assert all(part.startswith(b"HTTP/1.1 200 ") for part in begun)  # with a heartbeat
        ask(full, stack, "/v1/chat/completions", "full", stream=True)
        eventually(lambda: "" in waiting(full))
        last = b""
        while b"[DONE]" not in last:
            last += jobs[-1].recv(65536)
        assert b'"code":"displaced"' in last


def test_what_an_engine_takes_for_many_values_counts_as_their_body(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    system = {"llama_server_path": fake(tmp_path, ready="never")}
    router = start({"api": {**API, "max_bodies_mb": 64}, "system": system, "models": models(tiny, "a")})
    with ExitStack() as stack:
        for number in (1, 2):
            ask(router, stack, "/v1/completions", "full", prompt=[1] * 200_000)
            eventually(lambda number=number: len(waiting(router)) == number)
        refused = ask(router, stack, "/v1/completions", "full", prompt=[1] * 400_000)
        assert answer(refused)[1]["error"]["code"] == "too_many_bodies"
    eventually(lambda: waiting(router) == [])
    with ExitStack() as stack:
        ask(router, stack, "/v1/completions", "full", prompt=[1] * 400_000)
        eventually(lambda: len(waiting(router)) == 1)
        refused = ask(router, stack, "/v1/completions", "full", prompt=[1] * 1_000_000)  # it would never fit
        head, document = answer(refused)
        assert head.startswith("HTTP/1.1 413 ")
        assert "max_bodies_mb" in document["error"]["message"]


def test_bodies_that_wait_make_room_for_those_of_a_higher_priority(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    api = {**API, "max_body_mb": 4, "max_bodies_mb": 8}
    router = start(
        {"api": api, "system": {"llama_server_path": fake(tmp_path, ready="never")}, "models": models(tiny, "a")}
    )
    text = [{"role": "user", "content": "x" * (2 << 20)}]
    with ExitStack() as stack:
        jobs = []
        for number in (1, 2, 3):
            jobs.append(ask(router, stack, "/v1/chat/completions", messages=text))
            eventually(lambda number=number: len(waiting(router)) == number)
        refused = ask(router, stack, "/v1/chat/completions", messages=text)
        assert answer(refused)[1]["error"]["code"] == "too_many_bodies"  # for its like nobody goes
        ask(router, stack, "/v1/chat/completions", "full", messages=text)
        eventually(lambda: "" in waiting(router))
        assert waiting(router).count("jobs") == 2
        head, document = answer(jobs[-1])
        assert head.startswith("HTTP/1.1 429 ")
        assert document["error"]["code"] == "displaced"
        assert "max_bodies_mb" in document["error"]["message"]
        ask(router, stack, "/v1/chat/completions", "full", messages=text)
        eventually(lambda: waiting(router).count("") == 2)
        ask(router, stack, "/v1/chat/completions", "full", messages=text)
        eventually(lambda: waiting(router).count("") == 3)
        assert waiting(router).count("jobs") == 0
        refused = ask(router, stack, "/v1/chat/completions", "full", messages=text)
        assert answer(refused)[1]["error"]["code"] == "too_many_bodies"
    eventually(lambda: waiting(router) == [])
    with ExitStack() as stack:  # nothing is held any more
        for _ in range(3):
            ask(router, stack, "/v1/chat/completions", messages=text)
        eventually(lambda: waiting(router) == ["jobs"] * 3)
