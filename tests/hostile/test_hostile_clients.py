"""Clients that lie, dawdle, babble and leave: over raw sockets, because no client library would.

With every one of them: nothing is passed on that was not requested, no answer is a mistake of the router, its
memory and its log stay clean, and the next client is served as usual.

`CHAOS=long` sends 20,000 mutated requests and waits for the clients that never finish theirs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Router, Start, eventually, fake, models

LONG = os.environ.get("CHAOS") == "long"
PATH = b"/v1/chat/completions"
CHAT = json.dumps({"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
STREAM = json.dumps({"model": "a", "messages": [], "stream": True}).encode()
FORWARDED = {"host", "authorization", "content-length", "x-request-id", "content-type", "accept", "user-agent"}
FORWARDED |= {"anthropic-beta", "anthropic-version", "traceparent", "tracestate"}


class Engine:
    """The recording engine behind a router."""

    def __init__(self, folder: Path) -> None:
        script = Path(__file__).parents[1] / "chaos" / "recording_engine.py"
        self._record = folder / "requests.jsonl"
        launch = folder / "recording-llama-server"
        launch.write_text(f"#!/bin/sh\nRECORD='{self._record}' exec {sys.executable} {script} \"$@\"\n")
        launch.chmod(0o755)
        self.path = str(launch)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What clients sent; the router itself only ever asks with GET whether the engine is well."""
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        return [request for request in map(json.loads, lines) if not request["line"].startswith("GET ")]

    def forget(self) -> None:
        self._record.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def engine(recording: Engine) -> Engine:
    """It has heard nothing yet."""
    recording.forget()
    return recording


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path, recording: Engine) -> Router:
    return start_shared({"system": {"llama_server_path": recording.path}, "models": models(tiny, "a", "b")})


def connect(router: Router) -> socket.socket:
    return socket.create_connection(router.address, timeout=10)


def post(body: bytes, *headers: bytes, path: bytes = PATH, length: int | None = None) -> bytes:
    lines = [b"POST %b HTTP/1.1" % path, b"host: localhost", *headers]
    lines.append(b"content-length: %d" % (len(body) if length is None else length))
    return b"\r\n".join((*lines, b"", body))


def answers(router: Router, request: bytes) -> bytes:
    """Everything that comes until the router closes the connection, which the request must make it do."""
    with connect(router) as client:
        client.sendall(request)
        received = b""
        while chunk := client.recv(65536):
            received += chunk
    return received


def memory_mib(router: Router) -> float:
    return float(psutil.Process(router.process.pid).memory_info().rss) / 2**20


def connections_of(router: Router, client: socket.socket) -> int:
    port = client.getsockname()[1]
    known = psutil.Process(router.process.pid).net_connections("tcp")
    return sum(bool(connection.raddr) and connection.raddr[1] == port for connection in known)


def processing(router: Router) -> int:
    return int(router.http.get("/v1/queue/stats").json()["summary"]["total_processing"])


def assert_unharmed(router: Router) -> None:
    assert router.chat("a").status_code == 200
    summary = router.http.get("/v1/queue/stats").json()["summary"]
    assert summary["total_queued"] == summary["total_processing"] == 0
    assert "Traceback" not in router.log


# --- one request must not look like two --------------------------------------------------------------------


def chunked(body: bytes, coding: bytes = b"chunked") -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: %b\r\n\r\n%b" % (PATH, coding, body)


CHUNK = b"%x\r\n%b\r\n" % (len(CHAT), CHAT)
HIDDEN = post(b'{"model":"b"}', path=b"/completion")
BAD_CHUNKS = {
    "with 0x": b"0x" + CHUNK,
    "with a sign": b"+" + CHUNK,
    "after a space": b" " + CHUNK,
    "before a space": CHUNK.replace(b"\r\n", b" \r\n", 1),
    "before LF": CHUNK.replace(b"\r\n", b"\n", 1),
    "with LF in its extension": CHUNK.replace(b"\r\n", b";a\n", 1),
    "with CR in its extension": CHUNK.replace(b"\r\n", b";a\rb\r\n", 1),
    "without an end": CHUNK[:-2] + b"0\r\n\r\n" + HIDDEN,
    "that ends in LF": CHUNK[:-2] + b"\n0\r\n\r\n",
    "that is longer": CHUNK[:-2] + b"XX0\r\n\r\n",
    "that is the last, with LF": CHUNK + b"0\n\n",
    "with a coding in the trailer": CHUNK + b"0\r\ntransfer-encoding: chunked\r\n\r\n",
}
AMBIGUOUS = {
    "two lengths": post(CHAT, b"content-length: 3"),
    "two lengths in one": post(CHAT, b"content-length: 3, 3"),
    "length and chunked": post(b"0\r\n\r\n" + HIDDEN, b"transfer-encoding: chunked"),
    "chunked and length": post(b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding:\tchunked"),
    "chunked, somehow": post(b"0\r\n\r\n" + HIDDEN, b"transfer-encoding: xchunked"),
    "chunked twice": post(b"0\r\n\r\n" + HIDDEN, b"transfer-encoding: chunked, identity"),
    "length with a sign": post(CHAT, b"content-length: +%d" % len(CHAT)),
    "negative length": post(CHAT, b"content-length: -1"),
    "length beyond 64 bits": post(CHAT, b"content-length: 18446744073709551617"),
    "bare LF": post(CHAT, b"user-agent: x\nx-evil: 1"),
    "bare CR": post(CHAT, b"user-agent: x\rx-evil: 1"),
    "obs-fold": post(CHAT, b"user-agent: x\r\n x-evil: 1"),
    "obs-fold with a tab": post(CHAT, b"user-agent: x\r\n\tcontent-length: 0"),
    "NUL": post(CHAT, b"user-agent: x\0y"),
    "space before the colon": post(CHAT, b"content-length : 3"),
    "no colon": post(CHAT, b"garbage"),
    "no name": post(CHAT, b": x"),
    "only LF": post(CHAT).replace(b"\r\n", b"\n"),
    "no number for a chunk": post(b"", b"transfer-encoding: chunked").replace(b"content-length: 0", b"x: 0")
    + b"zz\r\n",
    "chunk beyond 64 bits": post(b"", b"transfer-encoding: chunked").replace(b"content-length: 0", b"x: 0")
    + b"f" * 20
    + b"\r\n",
    "length in a trailer": post(b"", b"transfer-encoding: chunked").replace(b"content-length: 0", b"x: 0")
    + b"%x\r\n%b\r\n0\r\ncontent-length: 3\r\n\r\n" % (len(CHAT), CHAT),
    **{f"chunk {name}": chunked(body) for name, body in BAD_CHUNKS.items()},
    "chunked, quoted": chunked(CHUNK + b"0\r\n\r\n", b'"chunked"'),
    "chunked after a vertical tab": chunked(CHUNK + b"0\r\n\r\n", b"\x0bchunked"),
    "hexadecimal length": post(CHAT).replace(b"length: ", b"length: 0x"),
    "length with an underscore": post(CHAT).replace(b"length: ", b"length: 1_"),
    "no length": post(b"").replace(b"length: 0", b"length: "),
    "the same length twice": post(CHAT, b"content-length: %d" % len(CHAT)),
    "a header that continues the request line": post(CHAT).replace(b"\r\nhost", b"\r\n host"),
    "NUL in a name": post(CHAT, b"x\0y: 1"),
    "NUL in the path": post(CHAT, path=PATH + b"\0"),
    "HTTP/1.2": post(CHAT).replace(b"HTTP/1.1", b"HTTP/1.2"),
    "http": post(CHAT).replace(b"HTTP", b"http"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": b"CONNECT localhost:22 HTTP/1.1\r\nhost: localhost\r\n\r\n",
}


def test_what_can_be_read_in_two_ways_is_not_read(router: Router, engine: Engine) -> None:
    for name, request in AMBIGUOUS.items():
        answer = answers(router, request)
        assert answer.startswith(b"HTTP/1.1 400 "), name
        assert answer.count(b"HTTP/1.1 ") == 1, name
    assert engine.requests == []
    assert_unharmed(router)


def test_a_request_inside_a_body_stays_there(router: Router, engine: Engine) -> None:
    body = CHAT[:-1] + b',"x":"' + HIDDEN.replace(b"\r\n", b"\\r\\n").replace(b'"', b'\\"') + b'"}'
    tail = b"\r\n\r\n" + HIDDEN  # white space after the document, and then what is no request
    answers(router, post(body, b"connection: close"))
    answers(router, post(CHAT + tail, b"connection: close"))
    assert [request["line"] for request in engine.requests] == ["POST /v1/chat/completions HTTP/1.1"]
    assert engine.requests[0]["body"].encode() == body


def test_the_engine_sees_our_headers_and_no_others(router: Router, engine: Engine) -> None:
    headers = (
        b"Connection: close, content-length",
        b"X-Forwarded-For: 1.2.3.4",
        b"Authorization: Bearer mine",
        b"Cookie: a=b",
        b"Proxy-Authorization: x",
        b"TE: trailers",
        b"User-Agent: \xff\xfe",
    )
    assert answers(router, post(CHAT, *headers)).startswith(b"HTTP/1.1 200 ")
    (request,) = engine.requests
    assert {name.lower() for name in request["names"]} <= FORWARDED
    assert len(request["names"]) == len(set(request["names"]))
    assert "mine" not in request["head"]


def test_chunks_trailers_and_extensions_arrive_as_one_body(router: Router, engine: Engine) -> None:
    chunks = b"1;a=b\r\n%b\r\n%x\r\n%b\r\n0\r\nx-evil: 1\r\nuser-agent: x\r\n\r\n" % (
        CHAT[:1],
        len(CHAT) - 1,
        CHAT[1:],
    )
    head = b"POST %b HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n" % PATH
    assert answers(router, head + chunks).startswith(b"HTTP/1.1 200 ")
    (request,) = engine.requests
    assert request["body"].encode() == CHAT
    assert not {"x-evil", "user-agent"} & set(request["names"])


def test_pipelined_requests_are_answered_in_their_order(router: Router) -> None:
    ids = [b"x-request-id: number-%d" % number for number in range(8)]
    requests = [post(CHAT, name) for name in ids[:-1]] + [post(CHAT, ids[-1], b"connection: close")]
    received = answers(router, b"".join(requests))
    assert re.findall(rb"x-request-id: number-\d", received) == ids


# --- junk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"model":' + b'{"a":' * 100_000, 400),
        (b'{"model":"\xff"}', 400),
        (b'{"model":"\\ud800"}', 400),
        (b'{"model":"\\u0000"}', 404),
        (b'{"model":"a%b"}' % (b":latest" * 2000), 400),
    ],
    ids=["deep", "deep model", "not UTF-8", "half a surrogate", "NUL", "the latest of all"],
)
def test_json_that_bites(router: Router, body: bytes, status: int) -> None:
    answer = router.http.post(PATH.decode(), content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert_unharmed(router)


def test_an_endless_name_costs_nobody_any_time(router: Router) -> None:
    body = b'{"model":"%b"}' % (b"abcdefgh" * (1 << 20))
    before = time.monotonic()
    answer = router.http.post(PATH.decode(), content=body)
    assert answer.status_code == 400
    assert len(answer.content) < 1000
    assert time.monotonic() - before < 2
    assert_unharmed(router)


def test_a_client_that_would_like_http_2_gets_an_answer(router: Router) -> None:
    """Java's HttpClient asks like this with its first request, body and all."""
    wish = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")
    with connect(router) as client:
        client.sendall(post(CHAT, *wish))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(post(CHAT))  # and the connection goes on
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    wishes = b"POST /completion HTTP/1.1\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n" * 3000
    assert answers(router, wishes + post(CHAT, b"connection: close")).count(b"HTTP/1.1 400 ") == 3000
    assert_unharmed(router)


def test_clients_with_the_same_request_id_are_different_clients(start: Start, tiny: Path, tmp_path: Path) -> None:
    engine = fake(tmp_path, answer_sec="0.1")
    router = start({"system": {"llama_server_path": engine}, "models": models(tiny, "a")})
    clients = [connect(router) for _ in range(4)]
    for client in clients:  # the router has heard of all of them before the first is whole
        client.sendall(post(CHAT, b"x-request-id: mine", b"connection: close")[: -len(CHAT)])
    router.http.get("/live")
    for client in clients:
        client.sendall(CHAT)
    for client in clients:
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.close()
    assert_unharmed(router)


# --- too much ------------------------------------------------------------------------------------------------


def flood(router: Router, beginning: bytes, piece: bytes, most: int) -> int:
    """How much of an endless thing the router takes before it hangs up."""
    sent = 0
    with connect(router) as client:
        try:
            client.sendall(beginning)
            while sent < most:
                client.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
    return sent


@pytest.fixture(scope="module")
def router_for_little(start_shared: Start, tiny: Path) -> Router:
    return start_shared({"api": {"max_body_mb": 1}, "models": models(tiny, "a")})


@pytest.mark.parametrize(
    ("beginning", "piece"),
    [
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\n", b"x-a: %b\r\n" % (b"y" * 8000)),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-a: ", b"y" * 65536),
        (b"GET /", b"y" * 65536),
        (post(b"", path=b"/v1/models/load", length=1 << 40), b"y" * 65536),
        (post(b"", length=1 << 40), b"y" * 65536),
        (
            post(b"", b"transfer-encoding: chunked").replace(b"content-length: 0\r\n", b""),
            b"1000\r\n%b\r\n" % (b"y" * 4096),
        ),
        (chunked(CHUNK + b"0\r\n"), b"x-a: %b\r\n" % (b"y" * 8000)),
        (chunked(CHUNK + b"0\r\nx-a: "), b"y" * 65536),
    ],
    ids=["headers", "header", "path", "body to manage", "announced body", "chunks", "trailers", "trailer"],
)
def test_what_has_no_end_is_cut_off(router_for_little: Router, beginning: bytes, piece: bytes) -> None:
    router = router_for_little
    before = memory_mib(router)
    most = threading.Thread(target=flood, args=(router, beginning, piece, 64 << 20), daemon=True)
    most.start()
    peak = before
    while most.is_alive():
        peak = max(peak, memory_mib(router))
        assert router.http.get("/live", timeout=2).status_code == 200
    assert peak - before < 24
    assert "Traceback" not in router.log


# --- too slow ------------------------------------------------------------------------------------------------


def test_clients_that_wait_in_the_middle_of_a_request_keep_nobody_waiting(router: Router) -> None:
    whole = post(CHAT)
    dawdlers = [connect(router) for _ in range(200)]
    for number, client in enumerate(dawdlers):
        client.sendall(whole[: number % len(whole)])
    assert_unharmed(router)
    for number, client in enumerate(dawdlers[:40]):  # late, but welcome
        client.sendall(whole[number % len(whole) :])
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    before = psutil.Process(router.process.pid).num_fds()
    for client in dawdlers:
        client.close()
    eventually(lambda: psutil.Process(router.process.pid).num_fds() <= before - len(dawdlers))
    assert_unharmed(router)


@pytest.mark.skipif(not LONG, reason="takes minutes: CHAOS=long")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "part", [b"", b"POST /v1", post(CHAT)[:60], post(CHAT)[:-5]], ids=["none", "line", "head", "body"]
)
def test_clients_that_never_finish_their_request_are_not_kept(router: Router, part: bytes) -> None:
    client = connect(router)
    client.sendall(part)
    eventually(lambda: connections_of(router, client) == 1)
    eventually(lambda: connections_of(router, client) == 0, timeout_sec=120)
    client.close()


def test_a_client_that_does_not_read_loses_its_place_and_its_connection(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    engine = fake(tmp_path, chunks="1000000")
    router = start(
        {"system": {"llama_server_path": engine, "request_timeout_sec": 1}, "models": models(tiny, "a")}
    )
    router.chat("a")
    before = memory_mib(router)
    client = connect(router)
    client.sendall(post(STREAM))
    eventually(lambda: processing(router) == 1)
    eventually(lambda: processing(router) == 0)
    eventually(lambda: connections_of(router, client) == 0)
    assert memory_mib(router) - before < 16
    assert "Traceback" not in router.log
    client.close()


def leave(client: socket.socket, *, rudely: bool) -> None:
    if rudely:  # a reset instead of a goodbye
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.fixture(scope="module")
def router_that_streams(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    engine = fake(tmp_path_factory.mktemp("streaming"), chunks="100000", chunk_sec="0.005")
    return start_shared({"system": {"llama_server_path": engine}, "models": models(tiny, "a")})


@pytest.mark.parametrize("rudely", [False, True], ids=["politely", "rudely"])
@pytest.mark.parametrize("pipelined", [False, True], ids=["one request", "another behind it"])
def test_a_client_that_leaves_its_stream_frees_the_slot_at_once(
    router_that_streams: Router, rudely: bool, pipelined: bool
) -> None:
    router = router_that_streams
    client = connect(router)
    client.sendall(post(STREAM))
    client.recv(100)
    if pipelined:
        client.sendall(post(CHAT))
        router.http.get("/live")
    assert processing(router) == 1
    leave(client, rudely=rudely)
    eventually(lambda: processing(router) == 0, timeout_sec=1)
    assert "Traceback" not in router.log


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_mistake_of_ours(router: Router) -> None:
    described = router.http.get("/openapi.json").json()["paths"]
    digest = f"sha256:{'0' * 64}"
    paths = {re.sub("{digest}", digest, re.sub("{(alias|path)}", "a", path)) for path in described}
    assert {"/api/show", "/v1/models/load", f"/api/blobs/{digest}", "/v1/messages"} < paths
    for path in sorted(paths):
        with connect(router) as client:
            client.sendall(post(b'{"model": "', b"content-type: application/json", path=path.encode(), length=50))
            router.http.get("/live")  # it has been read
    assert_unharmed(router)


# --- anything ------------------------------------------------------------------------------------------------

SEEDS = (
    post(CHAT),
    post(STREAM, b"Accept: text/event-stream", b"User-Agent: x", b"X-Request-Priority: low"),
    post(
        b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\na\r\n--x--\r\n',
        b"content-type: multipart/form-data; boundary=x",
        path=b"/v1/audio/transcriptions",
    ),
    post(CHAT, b"Expect: 100-continue", b"X-Request-Id: abc", b"Origin: http://localhost:3000"),
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
    % (len(CHAT), CHAT),
    post(b'{"model":"a"}', b"content-type: application/json", path=b"/v1/models/a/reset"),
    b"GET /v1/models/a/status?x=1 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"GET /v1/logs/a?lines=5 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"GET /metrics HTTP/1.0\r\n\r\n",
    b"OPTIONS /v1/models HTTP/1.1\r\nhost: localhost\r\norigin: http://localhost:3000\r\n"
    b"access-control-request-method: GET\r\n\r\n",
)
SPLINTERS = (
    b"\r\n",
    b"\n",
    b"\0",
    b"\r",
    b":",
    b" ",
    b"\t",
    b"\xff",
    b"%00",
    b"%2e%2e/",
    b"{",
    b"[" * 50,
    b'"',
    b"\\u",
    b"-1",
    b"99999999999999999999",
    b"chunked",
    b"content-length: 5\r\n",
    b"HTTP/1.1",
    b"0\r\n\r\n",
    b"?",
    b"#",
    b"\xc3\x28",
    b"a" * 5000,
)


def mutated(random_: random.Random) -> bytes:
    request = bytearray(random_.choice(SEEDS))
    for _ in range(random_.choice((1, 1, 2, 3, 8))):
        here = random_.randrange(len(request) + 1)
        there = min(len(request), here + random_.randrange(1, 30))
        match random_.randrange(6):
            case 0:
                request[here:here] = random_.choice(SPLINTERS)
            case 1:
                request[here:there] = b""
            case 2:
                request[here:there] = random_.choice(SPLINTERS)
            case 3:
                request[here:here] = request[here:there]
            case 4 if here < len(request):
                request[here] ^= 1 << random_.randrange(8)
            case _:
                other = random_.choice(SEEDS)
                request[here:] = other[random_.randrange(len(other)) :]
    return bytes(request)


async def throw(router: Router, requests: list[bytes], at_once: int = 32) -> list[bytes]:
    """Send each on a connection of its own; the beginning of each answer. Whoever gets none soon, leaves."""
    places = asyncio.Semaphore(at_once)

    async def one(request: bytes) -> bytes:
        async with places:
            reader, writer = await asyncio.open_connection(*router.address)
            try:
                writer.write(request)
                return await asyncio.wait_for(reader.read(65536), 0.3)
            except (asyncio.TimeoutError, OSError):
                return b""
            finally:
                writer.close()

    return await asyncio.gather(*(one(request) for request in requests))


@pytest.mark.timeout(900)
def test_mutated_requests(router: Router, engine: Engine) -> None:
    seed = random.randrange(1 << 32)
    random_ = random.Random(seed)
    requests = [mutated(random_) for _ in range(20_000 if LONG else 1500)]
    received = asyncio.run(throw(router, requests))
    for request, answer in zip(requests, received, strict=True):
        if answer:
            assert re.match(rb"HTTP/1\.1 [1234]\d\d ", answer), (seed, request, answer)
    assert sum(map(bool, received)) > len(requests) / 2
    for request in engine.requests:
        assert {name.lower() for name in request["names"]} <= FORWARDED, (seed, request)
        assert sum(name.lower() == "content-length" for name in request["names"]) == 1, (seed, request)
    assert len(engine.requests) <= len(requests)
    eventually(lambda: processing(router) == 0)
    router.http.post("/v1/models/a/reset")
    assert_unharmed(router)
