"""Mutated requests on every route: each is answered or refused, and none makes the router fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httptools
import pytest
from conftest import Router, Start
from mutations import LONG, SEED, mutated
from played_router import PlayedRouter

from router.http.routes import ROUTES

_COUNT = 50_000 if LONG else 800
_COUNT_OF_ALL_ROUTES = 50_000 if LONG else 120
_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
_FIELDS: dict[str, Any] = {
    "model": "a",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "tool_result", "content": "5"}]},
        {"role": "assistant", "content": "é", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "user", "content": "and?", "images": [_PNG]},
    ],
    "prompt": ["hi", "you"],
    "input": [{"role": "user", "content": "hi"}],
    "system": [{"type": "text", "text": "s"}],
    "instructions": "i",
    "stream": False,
    "stream_options": {"include_usage": True},
    "n": 2,
    "max_tokens": 3,
    "stop_sequences": ["x"],
    "seed": 1,
    "tools": [_TOOL],
    "tool_choice": {"type": "auto"},
    "options": {"num_predict": 3, "temperature": 0.5, "stop": ["x"]},
    "format": _SCHEMA,
    "text": {"format": {"type": "json_schema", "name": "n", "schema": _SCHEMA}},
    "output_config": {"format": {"type": "json_schema", "schema": _SCHEMA}},
    "keep_alive": "5m",
    "think": True,
    "query": "q",
    "documents": ["a", "b"],
    "suffix": "s",
    "context": [1, 2],
}
_FORM = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
)


def request(chance: random.Random, path: str, model: str, method: str = "POST") -> bytes:
    fields = {**_FIELDS, "model": model, "name": model, "stream": chance.random() < 0.5}
    kept = chance.sample(sorted(fields), chance.randint(3, len(fields)))
    body = json.dumps({key: fields[key] for key in fields if key in kept or key == "model"}).encode()
    kind = b"application/json"
    if chance.random() < 0.1:
        body, kind = _FORM, b"multipart/form-data; boundary=b"
    if method == "GET":
        body = b""
    if chance.random() < 0.7:
        body = mutated(chance, body)
    lines = [
        b"%b %b HTTP/1.1" % (method.encode(), path.encode()),
        b"Host: localhost",
        b"Content-Type: " + kind,
        *chance.sample(
            (
                b"X-Request-Id: abc",
                b"X-Request-Priority: high",
                b"Accept: text/event-stream",
                b"traceparent: 00-1-2",
            ),
            chance.randint(0, 4),
        ),
    ]
    if body and chance.random() < 0.2:
        cut = chance.randint(0, len(body))
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:cut], body[cut:]) if part)
        lines.append(b"Transfer-Encoding: chunked")
        body = chunks + b"0\r\n\r\n"
    else:
        lines.append(b"Content-Length: %d" % len(body))
    told = b"\r\n".join((*lines, b"Connection: close", b"", body))
    return mutated(chance, told, most=2) if chance.random() < 0.4 else told


class Statuses:
    """Of all answers on a connection."""

    def __init__(self, received: bytes) -> None:
        self.seen: list[int] = []
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(received)

    def on_headers_complete(self) -> None:
        self.seen.append(self._parser.get_status_code())


async def ask(router: PlayedRouter, told: bytes, chance: random.Random) -> list[int]:
    client, seen = router.client()
    size = chance.choice((1, 100, 70_000)) if len(told) < 3000 else 70_000
    router.engines.clear()
    router.done_requests.clear()
    answered = 0
    for at in range(0, len(told), size):
        if seen.is_closing():
            break
        client.data_received(told[at : at + size])
        for engine in router.engines[answered:]:
            engine.data_received(b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"choices":[]}')
        answered = len(router.engines)
    for _ in range(5):  # of pages, and of looks at what a model is capable of
        await asyncio.sleep(0)
    client.connection_lost(None)
    for done in router.done_requests:
        assert done.outcome not in ("internal_error", ""), done
    ids = [done.request_id for done in router.done_requests]
    assert len(ids) == len(set(ids)), "counted twice"
    statuses = Statuses(bytes(seen.written)).seen
    assert 500 not in statuses
    return statuses


def test_every_request_to_an_engine_is_answered_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(SEED)
    routes = sorted(ROUTES)
    ends: Counter[int] = Counter()

    async def run() -> None:
        router = PlayedRouter()
        for number in range(_COUNT):
            told = request(chance, chance.choice(routes), "a")
            try:
                ends.update(await ask(router, told, chance))
            except Exception as error:
                raise AssertionError(f"request {number}: {told[:3000]!r}") from error
        router.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert not [record for record in caplog.records if record.exc_info], caplog.text
    assert ends[200] > _COUNT / 20
    assert ends[400] > _COUNT / 20


@pytest.fixture(scope="module")
def demo(start_shared: Start) -> Router:
    """With no hub within reach."""
    return start_shared(HF_ENDPOINT="http://127.0.0.1:9")


def every_route(router: Router) -> Iterator[tuple[str, str]]:
    """Method and path of all but those that do not end, or end others' work."""
    for path, item in router.http.get("/openapi.json").json()["paths"].items():
        if not re.search(r"/(stream|sse)$|/pull$", path):
            for method in item:
                yield method.upper(), re.sub(r"\{[^}]*\}", "demo", path)


def status_of(address: tuple[str, int], told: bytes) -> int:
    """0 if it waits for more, or has closed the connection. What an engine says is its own, a 500 of its too."""
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=1) as client:
        client.sendall(told)
        while part := client.recv(65536):
            received += part
    assert b"Internal error of the router" not in received, (told[:2000], received[:2000])
    status = re.match(rb"HTTP/1\.1 (\d+)", received)
    return int(status[1]) if status else 0


def test_every_route_takes_whatever_comes(demo: Router) -> None:
    chance = random.Random(SEED)
    routes = list(every_route(demo))
    models = ("demo", "demo-embed", "x" * 300, "")
    requests = [
        request(chance, path, chance.choice(models), method)
        for method, path in (chance.choice(routes) for _ in range(_COUNT_OF_ALL_ROUTES))
    ]
    with ThreadPoolExecutor(8) as pool:  # most of the time goes by in waiting for what never comes
        ends = Counter(pool.map(status_of, [demo.address] * len(requests), requests))
    assert "Traceback" not in demo.log
    assert demo.http.get("/live").status_code == 200
    assert demo.chat("demo").status_code == 200
    assert ends[200]
    assert ends[400]
