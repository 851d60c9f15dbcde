"""Requests on a connection: their order, their framing, and slow clients and engines."""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import Router, Start, fake, models

CHAT = json.dumps({"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
STREAM = json.dumps({"model": "a", "messages": [], "stream": True}).encode()


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    api = {"max_body_mb": 1, "cors_origins": ["http://my.page"]}
    return start_shared({"api": api, "models": models(tiny, "a")})


def connect(router: Router) -> socket.socket:
    return socket.create_connection(router.address, timeout=20)


def post(body: bytes, *headers: bytes, version: bytes = b"1.1") -> bytes:
    lines = [b"POST /v1/chat/completions HTTP/%b" % version, b"host: localhost", *headers]
    return b"\r\n".join((*lines, b"content-length: %d" % len(body), b"", body))


def get(path: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join((b"GET %b HTTP/1.1" % path, b"host: localhost", *headers, b"", b""))


def rest_of(client: socket.socket) -> bytes:
    received = b""
    while chunk := client.recv(65536):
        received += chunk
    return received


def exchange(router: Router, request: bytes) -> bytes:
    """All that comes until the router closes the connection, which the request must make it do."""
    with connect(router) as client:
        client.sendall(request)
        return rest_of(client)


def test_chats_and_pages_on_one_connection_are_answered_in_their_order(router: Router) -> None:
    requests = (
        get(b"/live"),
        post(CHAT, b"x-request-id: first"),
        get(b"/v1/nonsense"),
        post(b'{"model": "b"}', b"x-request-id: second"),
        post(b"", b"content-encoding: gzip", b"x-request-id: third"),
        get(b"/live"),
        post(CHAT, b"x-request-id: fourth", b"connection: close"),
        get(b"/live"),  # after the last
    )
    received = exchange(router, b"".join(requests))
    statuses = re.findall(rb"HTTP/1\.1 (\d+) ", received)
    assert statuses == [b"200", b"200", b"404", b"404", b"415", b"200", b"200"]
    assert re.findall(rb"x-request-id: (\w+)", received) == [b"first", b"second", b"third", b"fourth"]


def test_a_request_in_small_pieces_is_the_same_request(router: Router) -> None:
    with connect(router) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in post(CHAT, b"connection: close"):
            client.sendall(bytes((byte,)))
        assert rest_of(client).startswith(b"HTTP/1.1 200 ")


def test_requests_with_one_head_are_served_in_whatever_pieces_they_come(router: Router) -> None:
    """As from Python's clients, which send the head and then the body, again and again on one connection."""
    names = ["no-" + "x" * length for length in (1, 40, 5, 2, 7)]
    bodies = [json.dumps({"model": name, "messages": []}).encode() for name in names]
    heads = [post(body).removesuffix(body) for body in bodies]
    requests = list(zip(heads, bodies, strict=True))
    apart = [piece for request in requests for piece in request]
    halved = [piece for head, body in requests for piece in (head, body[:9], body[9:])]
    begun = [piece for head, body in requests for piece in (head + body[:9], body[9:])]
    next_heads = [body + head for (_, body), (head, _) in pairwise(requests[2:])]
    joined = [*apart[:5], *next_heads, bodies[-1]]
    for pieces in (apart, halved, begun, joined):
        with connect(router) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in (*pieces, get(b"/live", b"connection: close")):
                client.sendall(piece)
                time.sleep(0.001)  # so that the router reads them apart
            received = rest_of(client)
        assert re.findall(rb"HTTP/1\.1 (\d+) ", received) == [*[b"404"] * len(names), b"200"]
        assert re.findall(rb"model '(no-x*)' not found", received) == [name.encode() for name in names]


def test_a_stream_for_http_1_0_has_no_chunks_and_ends_with_its_connection(router: Router) -> None:
    head, _, body = exchange(router, post(STREAM, version=b"1.0")).partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert b"transfer-encoding" not in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_body_that_awaits_an_invitation_is_invited_only_where_it_is_welcome(router: Router) -> None:
    request = post(CHAT, b"expect: 100-continue", b"connection: close")
    head, body = request[: -len(CHAT)], CHAT
    with connect(router) as client:
        client.sendall(head)
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert rest_of(client).startswith(b"HTTP/1.1 200 ")
    too_large = head.replace(b"content-length: ", b"content-length: 1000000")
    assert exchange(router, too_large).startswith(b"HTTP/1.1 413 ")


def test_what_is_refused_by_its_head_does_not_spoil_the_next_request(router: Router) -> None:
    refused = post(b"x" * 100_000, b"content-encoding: gzip")
    with connect(router) as client:
        client.sendall(refused[:300])
        assert client.recv(65536).startswith(b"HTTP/1.1 415 ")
        client.sendall(refused[300:] + post(CHAT, b"connection: close"))
        assert rest_of(client).startswith(b"HTTP/1.1 200 ")


def test_who_sends_a_large_body_hears_why_it_is_refused(router: Router) -> None:
    """Though the connection ends with the answer, as urllib wants it; a reset would be all that it sees."""
    with connect(router) as client:
        client.sendall(post(b"x" * 8_000_000, b"content-encoding: gzip", b"connection: close"))
        assert rest_of(client).startswith(b"HTTP/1.1 415 ")
    refused = post(b"x", b"content-encoding: gzip", b"connection: keep-alive", version=b"1.0")
    assert exchange(router, refused * 2).count(b"HTTP/1.1 ") == 1  # and nothing more is taken for a request


def test_a_page_may_read_the_answer_to_a_chat_if_its_origin_is_allowed(router: Router) -> None:
    mine = router.chat("a", headers={"origin": "http://my.page"}).headers
    assert mine["access-control-allow-origin"] == "http://my.page"
    assert "X-Model-Alias" in mine["access-control-expose-headers"]
    error = router.chat("b", headers={"origin": "http://my.page"})
    assert error.status_code == 404
    assert error.headers["access-control-allow-origin"] == "http://my.page"
    assert "access-control-allow-origin" not in router.chat("a", headers={"origin": "http://evil.page"}).headers


def test_a_client_that_reads_late_gets_all_of_it_and_then_the_next_answer(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    count = 20_000
    engine = fake(tmp_path, chunks=str(count))
    router = start({"system": {"llama_server_path": engine}, "models": models(tiny, "a", "b")})
    with connect(router) as client:
        client.sendall(post(STREAM) + post(STREAM, b"connection: close"))
        assert client.recv(1)
        assert router.chat("b").status_code == 200  # others do not wait for it
        received = rest_of(client)
    events = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", received)  # what was between two chunks
    assert events.count(b"data: [DONE]\n\n") == 2
    assert events.count(b'"delta"') == 2 * count


def test_a_request_in_crumbs_behind_another_keeps_nobody_waiting(start: Start, tiny: Path, tmp_path: Path) -> None:
    engine = fake(tmp_path, chunks="1000", chunk_sec="0.01")
    router = start({"system": {"llama_server_path": engine}, "models": models(tiny, "a")})
    head = post(b"", b"transfer-encoding: chunked").replace(b"content-length: 0\r\n", b"")
    with connect(router) as client:
        client.sendall(post(STREAM) + head + b"2\r\n  \r\n" * 60_000)
        assert client.recv(1)
        assert router.http.get("/live", timeout=3).status_code == 200


def test_idle_connections_do_not_delay_the_end(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "a")})
    with connect(router) as client:
        client.sendall(post(CHAT))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert router.stop(signal.SIGTERM, timeout_sec=10) == 0
        assert rest_of(client) == b""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's table of connections")
def test_the_system_asks_silent_clients_whether_they_are_there(router: Router) -> None:
    """One whose machine lost its power says no goodbye; it would keep its place in a queue for ever."""
    with connect(router) as client:
        client.sendall(get(b"/live"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        ends = [f":{port:04X}" for port in (client.getpeername()[1], client.getsockname()[1])]
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        (timer,) = [row[5] for row in rows if [row[1][8:], row[2][8:]] == ends]
        assert timer.startswith("02:")  # the keep-alive timer
