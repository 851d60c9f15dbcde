"""One answer for each request, whatever becomes of the rest of it; and every answer for its own request."""

from __future__ import annotations

import json
import random
import re
import socket
from pathlib import Path

import pytest
from conftest import Router, Start, models

CHAT = json.dumps({"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
STREAM = CHAT[:-1] + b', "stream": true}'
KEY = b"authorization: Bearer full"


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    api = {"api_keys": ["full"], "max_body_mb": 1}
    return start_shared({"api": api, "models": models(tiny, "a")})


def head(method: bytes, path: bytes, *lines: bytes) -> bytes:
    return b"\r\n".join((b"%b %b HTTP/1.1" % (method, path), b"host: localhost", *lines, b"", b""))


POST = (b"POST", b"/v1/chat/completions")
CHUNKED = b"transfer-encoding: chunked"
TRAILER = b"1\r\n{\r\n0\r\n" + b"x: y\r\n" * 20_000


def read_to_the_answer(router: Router, refused: bytes, rest: bytes) -> bytes:
    """What comes when the rest is sent only after the answer to a request has begun."""
    with socket.create_connection(router.address, timeout=20) as client:
        client.sendall(refused)
        got = client.recv(65536)
        try:
            client.sendall(rest)
            while part := client.recv(65536):
                got += part
        except ConnectionError:
            pass
    return got


@pytest.mark.parametrize(
    "path", [b"/v1/chat/completions", b"/v1/messages", b"/api/chat", b"/v1/models/load", b"/v1/nonsense"]
)
@pytest.mark.parametrize(
    "rest", [b"nonsense\r\n", b"0;\x00\r\n\r\n", TRAILER], ids=["no chunk", "no extension", "an endless trailer"]
)
def test_who_is_refused_by_the_head_gets_no_second_answer_for_the_body(
    router: Router, path: bytes, rest: bytes
) -> None:
    answer = read_to_the_answer(router, head(b"POST", path, CHUNKED), rest)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_what_comes_after_a_request_does_not_become_its_answer(router: Router) -> None:
    chat = head(*POST, KEY, b"content-length: %d" % len(CHAT)) + CHAT
    for nonsense in (b"\x16\x03\x01", b"NONSENSE\r\n\r\n", head(b"GET", b"/live", b"no colon")):
        answer = read_to_the_answer(router, chat + nonsense, b"")
        assert re.findall(rb"HTTP/1\.1 (\d+) ", answer) == [b"200", b"400"]


def test_what_is_asked_for_that_is_no_path_is_told_so(router: Router) -> None:
    for target in (b"/\xff", b"http://", b"a:b"):
        answer = read_to_the_answer(router, head(b"GET", target), b"")
        assert re.findall(rb"HTTP/1\.1 (\d+) ", answer) == [b"400"], target


PARTS = {
    b"200": head(*POST, KEY, b"content-length: %d" % len(CHAT)) + CHAT,
    b"200 in chunks": head(*POST, KEY, CHUNKED)
    + b"".join(b"1\r\n%c\r\n" % byte for byte in CHAT)
    + b"0\r\nx: y\r\n\r\n",
    b"200 as a stream": head(*POST, KEY, b"content-length: %d" % len(STREAM)) + STREAM,
    b"200 of a page": head(b"GET", b"/live"),
    b"401": head(*POST, b"content-length: 40") + b"\r\n\r\n" * 10,
    b"401 of a page": head(b"GET", b"/v1/models"),
    b"400": head(*POST, KEY, b"content-length: 1") + b"{",
    b"404": head(b"GET", b"/nonsense", KEY),
    b"405": head(b"GET", b"/v1/chat/completions", KEY),
    b"413": head(*POST, KEY, b"content-length: 2000000") + b"x" * 2_000_000,
    b"415": head(*POST, KEY, b"content-encoding: gzip", b"content-length: 4") + b"\r\n\r\n",
    b"200 by an upgrade": head(b"GET", b"/live", b"connection: upgrade", b"upgrade: h2c"),
}


def test_requests_of_all_kinds_in_pieces_of_all_sizes_get_their_answers_in_order(router: Router) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    for _ in range(25):
        names = chance.choices(list(PARTS), k=chance.randint(1, 30))
        sent = b"".join(PARTS[name] for name in names)
        sent += head(b"GET", b"/live", b"connection: close")
        cuts = sorted(chance.randrange(len(sent)) for _ in range(chance.choice((0, 1, 5, 50))))
        pieces = [sent[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
        with socket.create_connection(router.address, timeout=60) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            got = b""
            client.settimeout(0.001)
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    try:
                        view = view[client.send(view) :]
                    except TimeoutError:
                        got += some(client)
            client.settimeout(60)
            while part := client.recv(65536):
                got += part
        statuses = re.findall(rb"HTTP/1\.1 (\d+) ", got)
        assert statuses == [*(name[:3] for name in names), b"200"], seed
    assert "Traceback" not in router.log


def some(client: socket.socket) -> bytes:
    try:
        return client.recv(65536)
    except TimeoutError:
        return b""
