"""Mistakes of the router while it reads a request are answered and logged, and leave nothing in memory."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from played_router import PlayedRouter

from router.dataplane import server


def test_a_mistake_at_a_head_is_a_500_and_waits_for_no_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Exception]] = []

    class Mistake(Exception):
        def __init__(self) -> None:
            made.append(weakref.ref(self))

    def break_down(*_: object) -> None:
        raise Mistake

    async def ask() -> bytes:
        router = PlayedRouter()
        protocol, client = router.client()
        protocol.data_received(b"GET /none HTTP/1.1\r\nHost: localhost\r\n\r\n")
        router.close()
        return bytes(client.written)

    monkeypatch.setattr(server, "RequestHead", break_down)
    monkeypatch.setattr(server._log, "disabled", True)  # pytest keeps what is logged
    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(ask()).startswith(b"HTTP/1.1 500 ")
        assert [mistake() for mistake in made] == [None]
    finally:
        gc.enable()
