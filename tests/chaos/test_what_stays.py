"""Nothing stays in memory of a request that is over, whatever its outcome."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from bookkeeping import books, observed
from conftest import Router, Start, eventually, http_client, models
from storm import eject_all

SAID = {"messages": [{"role": "user", "content": "How are you?"}]}
ROUTES = {
    "/v1/chat/completions": {**SAID, "n": 2},
    "/v1/completions": {"prompt": "How are you?"},
    "/v1/messages": {**SAID, "seed": 1},
    "/v1/responses": {"input": "How are you?", "max_output_tokens": 2},
    "/api/chat": SAID,
    "/api/generate": {"prompt": "How are you?", "raw": True},
}
"""Routes and their bodies: all on which the router builds documents of its own."""
MANY_VALUES = (
    b'{"model": "a", "messages": [{"role": "user", "content": "a"}], %b}' % (b'"key": 1, ' * 250_000)[:-2]
)
"""A body with too many values, which is noticed when most of them have been read."""
MORE_MIB = 12
"""Growth that a second round may add to the first: memory that the allocator keeps of a body or two."""


@pytest.fixture
def router(start: Start, tiny: Path, tmp_path: Path) -> Router:
    entries = models(tiny, "a", flags=["-c", "4096", "-np", "2", "-t", "1"])
    return start({"models": entries}, **observed(tmp_path))


def test_nothing_of_a_request_waits_for_the_garbage_collector(router: Router, tmp_path: Path) -> None:
    router.chat("a")
    books(router, tmp_path)
    with http_client(router.url, headers={"connection": "close"}) as http:
        for path, asked in ROUTES.items():
            for streams in (False, True):
                body = {"model": "a", "stream": streams, "max_tokens": 2, **asked}
                assert http.post(path, json=body).status_code == 200
                assert http.post(path, json={**body, "model": "nobody"}).status_code == 404
        for path in ("/v1/chat/completions", "/v1/messages", "/api/chat"):
            assert http.post(path, content=MANY_VALUES).status_code == 413
        for path in ("/v1/models", "/api/tags", "/metrics", "/v1/nonsense"):
            http.get(path)
        for path in ("/v1/models/load", "/api/show"):
            assert http.post(path, content=b"{").status_code == 400
    leave_while_waiting(router)
    leave_in_the_body_of_a_page(router)
    eject_all(router, "a")  # and its connections
    assert books(router, tmp_path)["waiting for the garbage collector"] <= 1


def leave_in_the_body_of_a_page(router: Router) -> None:
    head = b"POST /v1/models/load HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
    for _ in range(4):
        with socket.create_connection(router.address) as client:
            client.sendall(head)


def leave_while_waiting(router: Router) -> None:
    """Connect sixteen clients that leave when many of them wait."""
    body = json.dumps(
        {"model": "a", "prompt": "", **SAID, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    ).encode()
    with ExitStack() as clients:
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/completions", "/api/chat") * 4:
            client = clients.enter_context(socket.create_connection(router.address))
            client.sendall(b"POST %b HTTP/1.1\r\nhost: localhost\r\n" % path.encode())
            client.sendall(b"content-length: %d\r\n\r\n%b" % (len(body), body))
        eventually(lambda: router.queued >= 8)
    eventually(lambda: router.queued == 0)


def test_a_second_round_of_bodies_that_are_refused_takes_no_more_memory(router: Router) -> None:
    process = psutil.Process(router.process.pid)

    def refused() -> float:
        for path in ("/v1/chat/completions", "/v1/messages", "/api/chat") * 3:
            assert router.http.post(path, content=MANY_VALUES).status_code == 413
        return float(process.memory_info().rss / 2**20)

    first_mib, second_mib = refused(), refused()
    assert second_mib - first_mib < MORE_MIB
