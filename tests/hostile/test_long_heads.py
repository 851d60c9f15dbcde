"""Heads that an engine would not accept are refused by the router, and do the engine no harm."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from conftest import Router, Start, models

CHAT = b'{"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}'


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    router = start_shared({"models": models(tiny, "a")})
    assert router.chat("a").status_code == 200
    return router


def ask(router: Router, line: bytes, *headers: bytes, body: bytes = b"") -> tuple[int, bytes]:
    with socket.create_connection(router.address, timeout=20) as client:
        lines = (line + b" HTTP/1.1", b"host: localhost", b"connection: close", *headers)
        client.sendall(b"\r\n".join((*lines, b"content-length: %d" % len(body), b"", body)))
        received = b""
        while part := client.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 ") == 1
    return int(received[9:12]), received


POST = b"POST /v1/chat/completions"
LARGE = CHAT[:-1] + b', "user": "' + b"x" * 4_000_000 + b'"}'
"""An engine that refuses the head of this has closed the connection before it is written."""


@pytest.mark.parametrize("body", [CHAT, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("line", "headers", "status", "code"),
    [
        (POST + b"?x=" + b"y" * 33_000, (), 414, b"target_too_long"),
        (b"POST /upstream/a/props?x=" + b"y" * 33_000, (), 414, b"target_too_long"),
        (b"POST /upstream/a/" + b"%25" * 11_000, (), 414, b"target_too_long"),
        (POST, (b"user-agent: " + b"y" * 8200,), 431, b"head_too_large"),
        (POST, (b"user-agent: y",) * 95, 431, b"head_too_large"),
        (POST, (b"x-mine: y",) * 101, 431, b"head_too_large"),
        (b"GET /live", (b"x-mine: y",) * 101, 431, b"head_too_large"),
        (b"POST /upstream/a/props", (b"accept-encoding: " + b"y" * 8200,), 431, b"head_too_large"),
    ],
    ids=["query", "query of an engine's page", "path", "header", "headers", "others", "of a page", "encodings"],
)
def test_what_an_engine_would_not_take_never_reaches_it(
    router: Router, line: bytes, headers: tuple[bytes, ...], status: int, code: bytes, body: bytes
) -> None:
    got, answer = ask(router, line, *headers, body=body)
    assert (got, code in answer) == (status, True), answer[:500]
    assert b"x-should-retry: false" in answer
    assert b'"type":"invalid_request_error"' in answer, "it is not the server's fault"
    assert unharmed(router)


@pytest.mark.parametrize("body", [CHAT, LARGE], ids=["small", "large"])
def test_what_an_engine_just_takes_reaches_it(router: Router, body: bytes) -> None:
    for line, headers in (
        (POST + b"?x=" + b"y" * 31_900, ()),
        (POST, (b"accept: text/html;q=5",)),  # which an engine would refuse, were it told
        (POST, (b"user-agent: " + b"y" * 8170,)),
        (POST, (b"user-agent: y",) * 85),
        (POST, (b"x-mine: y",) * 95),
        (POST, (b"cookie: " + b"y" * 20_000,)),  # of other programs at this address: no engine gets to see it
    ):
        status, answer = ask(router, line, *headers, body=body)
        assert status == 200, answer[:500]
    assert unharmed(router)


def unharmed(router: Router) -> bool:
    """No request went back to a queue, no engine was thought to be broken."""
    counted = router.http.get("/metrics").text
    retries = re.findall(r'router_retry_attempts_total{model="a"} ([\d.]+)', counted)
    return [float(count) for count in retries] == [0] and router.status("a")["status"] == "ready"
