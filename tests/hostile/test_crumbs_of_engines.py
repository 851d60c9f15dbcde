"""An engine that sends its answer in tiny chunks, faster than they are read, does not hold up others."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import pytest

from router.engines.base import Endpoint
from router.engines.upstream import Connection, EnginePool, Head

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CRUMBS = b"1\r\nx\r\n" * 200_000
ONE_READ = 256 << 10
ENOUGH = 4 * len(CRUMBS) // 6


class Listener:
    """Counts what comes in each turn of the event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.turns = [0]
        self.has_enough = self.loop.create_future()
        self.connection: Connection

    def connected(self, connection: Connection) -> None:
        self.connection = connection
        self._next_turn()

    def _next_turn(self) -> None:
        if not self.has_enough.done():
            self.turns.append(0)
            self.loop.call_soon(self._next_turn)

    def received(self, head: Head, part: bytes, last: bool) -> None:
        self.turns[-1] += len(part)
        if sum(self.turns) >= ENOUGH:
            self.connection.close()
            self.has_enough.set_result(None)

    def lost(self, reason: str) -> None:
        self.has_enough.set_exception(ConnectionError(reason))

    def failed(self, error: Exception) -> None:
        self.has_enough.set_exception(error)


def test_crumbs_are_read_once_in_a_turn() -> None:
    uvloop = pytest.importorskip("uvloop")

    def say(server: socket.socket) -> None:
        engine, _ = server.accept()
        with engine, contextlib.suppress(OSError):
            engine.recv(65536)
            engine.sendall(HEAD)
            while True:
                engine.sendall(CRUMBS)

    async def story(port: int) -> list[int]:
        pool = EnginePool(Endpoint(port), 1, lambda: True)
        listener = Listener()
        pool.ask(b"POST", b"/v1/chat/completions", b"", b"{}", listener)
        await asyncio.wait_for(listener.has_enough, 20)
        return listener.turns

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=say, args=(server,), daemon=True).start()
        turns = uvloop.run(story(server.getsockname()[1]))
    assert max(turns) <= ONE_READ // 6 + 1


def test_who_has_enough_of_crumbs_gets_no_more_until_he_asks_for_it() -> None:
    parts: asyncio.Queue[bytes]

    class Pausing(Listener):
        def received(self, head: Head, part: bytes, last: bool) -> None:
            self.connection.pause()
            parts.put_nowait(part)

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + CRUMBS)
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    async def story() -> None:
        nonlocal parts
        parts = asyncio.Queue()
        server = await asyncio.start_server(say, "127.0.0.1", 0)
        pool = EnginePool(Endpoint(server.sockets[0].getsockname()[1]), 1, lambda: True)
        listener = Pausing()
        pool.ask(b"POST", b"/v1/chat/completions", b"", b"{}", listener)
        for _ in range(3):
            await asyncio.wait_for(parts.get(), 20)
            await asyncio.sleep(0.05)
            assert parts.empty()
            listener.connection.resume()
        listener.has_enough.cancel()
        listener.connection.close()
        server.close()

    asyncio.run(story())
