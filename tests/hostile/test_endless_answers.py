"""Engines whose answers do not end: their slot is freed once no honest answer would be as long."""

from __future__ import annotations

import asyncio
import json

import pytest
from played_router import PlayedRouter

from router.dataplane import exchange

_BEGUN = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


@pytest.mark.parametrize("kind", [b"text/event-stream", b"text/plain"])
def test_who_babbles_is_cut_off(monkeypatch: pytest.MonkeyPatch, kind: bytes) -> None:
    monkeypatch.setattr(exchange, "_LONGEST_ANSWER", 100_000)
    streams = kind == b"text/event-stream"
    body = json.dumps({"model": "a", "messages": [], "stream": streams}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"

    async def story() -> None:
        router = PlayedRouter()
        client, seen = router.client()
        client.data_received(head % len(body) + body)
        (engine,) = router.engines
        engine.data_received(_BEGUN % kind)
        for _ in range(500):
            while not router.done_requests and len(seen.written) < 200_000:
                engine.data_received(b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT))
            if router.done_requests:
                break
            await asyncio.sleep(0.01)
        (done,) = router.done_requests
        assert done.outcome == "engine_error"
        assert not engine.is_open
        if streams:
            assert b"response exceeds" in seen.written[-1000:]
        else:
            assert seen.aborted  # half a document must not look whole
        client.connection_lost(None)
        router.close()

    asyncio.run(story())
