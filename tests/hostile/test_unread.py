"""Clients that do not read their answers get no more than fits into the connection, and are disconnected.

The server is the router's, in this process, with documents larger than a connection's buffers, and with shorter
timeouts.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
import uvloop

from router.config.schema import Capture
from router.dataplane import server as http_server
from router.dataplane.answer import Answer
from router.dataplane.capture import Captures
from router.dataplane.exchange import Exchanges
from router.dataplane.heads import RequestHead
from router.dataplane.server import HttpProtocol
from router.observe.events import ClientRefused, Events
from router.observe.logs import Logs
from router.system.turns import Rounds

PAGE = b"x" * 1_000_000
ASK = b"GET /page HTTP/1.1\r\nhost: localhost\r\n\r\n"
IDLE_SEC = 1


class Server:
    """Serves `PAGE`, and counts how often it was asked for it."""

    def __init__(self) -> None:
        self.begun = 0
        self.refused: list[str] = []
        events = Events()
        events.listen(ClientRefused, lambda happening: self.refused.append(happening.reason))
        turns = {"/refused": Refused, "/form": Form}
        shared = SimpleNamespace(
            rounds=Rounds(),
            dispatcher=SimpleNamespace(events=events),
            by_path=turns,
            captures=Captures(Capture()),
        )
        protocol = partial(HttpProtocol, cast(Exchanges, shared))
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._app,
                http=cast(Any, protocol),
                timeout_keep_alive=IDLE_SEC,
                interface="asgi3",
                log_config=None,
                lifespan="off",
            )
        )

    @property
    def connections(self) -> set[HttpProtocol]:
        return cast(set[HttpProtocol], self._server.server_state.connections)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun += 1
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000000")]})
        await send({"type": "http.response.body", "body": PAGE})

    def run(
        self,
        story: Coroutine[Any, Any, None],
        listener: socket.socket,
        run: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run,
    ) -> None:
        async def serve() -> None:
            serving = asyncio.create_task(self._server.serve([listener]))
            await asyncio.wait_for(story, 30)
            self._server.should_exit = True
            await serving

        run(serve())


@pytest.fixture
def listener() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # else the system takes some megabytes of them
    return listener


def connected(listener: socket.socket) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(listener.getsockname())
    client.setblocking(False)
    return client


def test_who_reads_nothing_is_ended_like_the_idle(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_LOOK_SEC", 0.1)
    server = Server()

    async def story() -> None:
        loop = asyncio.get_running_loop()
        stuck, slow = connected(listener), connected(listener)
        for client in (stuck, slow):
            await loop.sock_sendall(client, ASK * 17)
        while not server.refused:
            assert await loop.sock_recv(slow, 50_000)
            await asyncio.sleep(0.05)
        await asyncio.sleep(IDLE_SEC / 2)
        assert await loop.sock_recv(slow, 50_000)
        assert server.refused == ["does_not_read"]  # and not who has read a little
        stuck.close()
        slow.close()

    server.run(story(), listener)


def test_however_much_is_asked_for_one_request_is_begun_at_once(listener: socket.socket) -> None:
    server = Server()

    async def story() -> None:
        loop = asyncio.get_running_loop()
        client = connected(listener)
        sending = asyncio.create_task(loop.sock_sendall(client, ASK * 500_000))
        await asyncio.sleep(0.3)
        assert server.begun <= 3
        assert not sending.done()  # it is not even heard
        received = 0
        while received < 20 * len(PAGE):
            received += len(await loop.sock_recv(client, 1 << 20))
        assert server.begun <= 20 + 3 + 2
        sending.cancel()
        client.close()

    server.run(story(), listener)


def test_of_each_connection_a_turn_of_the_event_loop_reads_one_buffer(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libuv reads a socket that is never empty 32 times before it turns to the next."""
    server = Server()
    read, turn = Counter[int](), 0
    buffer_updated = HttpProtocol.buffer_updated

    def counted(connection: HttpProtocol, nbytes: int) -> None:
        read[turn] += 1
        buffer_updated(connection, nbytes)

    monkeypatch.setattr(HttpProtocol, "buffer_updated", counted)

    async def story() -> None:
        loop = asyncio.get_running_loop()

        def next_turn() -> None:
            nonlocal turn
            turn += 1
            loop.call_soon(next_turn)

        next_turn()
        client = socket.create_connection(listener.getsockname())
        head = b"POST /form HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        body = b"1\r\nx\r\n" * 200_000 + b"0\r\n\r\n"
        await loop.run_in_executor(None, client.sendall, head + body)
        assert await loop.run_in_executor(None, client.recv, 4096)
        client.close()
        assert sum(read.values()) > 20
        assert max(read.values()) == 1

    server.run(story(), listener, uvloop.run)


class Refused:
    """A turn that is over as soon as it begins, as those of requests are that are refused by their heads."""

    begun = 0
    most_in_line = 0

    def __init__(self, shared: Any, answer: Answer, head: RequestHead) -> None:
        self._rounds: Rounds = shared.rounds
        self._answer = answer

    def begin(self, to_come: int) -> None:
        Refused.begun += 1
        Refused.most_in_line = max(Refused.most_in_line, len(self._rounds._patient) + len(self._rounds._busy))
        self._answer.whole(401, b"", b"no")

    def add_body(self, part: bytes) -> None: ...

    def end_body(self) -> None: ...


class Form(Refused):
    """A turn that is over when its body is."""

    def begin(self, to_come: int) -> None: ...

    def end_body(self) -> None:
        self._answer.whole(200, b"", b"yes")


@pytest.mark.parametrize("first", [ASK, ASK * 20_000], ids=["later", "at once"])
def test_of_what_comes_before_its_turn_little_is_held(listener: socket.socket, first: bytes) -> None:
    server = Server()

    async def story() -> None:
        loop = asyncio.get_running_loop()
        client = connected(listener)

        async def send() -> None:
            await loop.sock_sendall(client, first)
            await asyncio.sleep(0.1)
            await loop.sock_sendall(client, ASK * 500_000)

        sending = asyncio.create_task(send())
        await asyncio.sleep(0.4)
        (connection,) = server.connections
        assert 0 < len(connection._unread) <= 24 << 10
        sending.cancel()
        client.close()

    server.run(story(), listener)


def test_a_connection_stands_in_the_line_once(listener: socket.socket) -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        clients = [connected(listener) for _ in range(3)]
        request = b"POST /refused HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n"
        for client in clients:
            await loop.sock_sendall(client, request * 200)
        for client in clients:
            received = b""
            while received.count(b"HTTP/1.1 401 ") < 200:
                part = await loop.sock_recv(client, 65536)
                assert part, "the connection was closed before its last answer"
                received += part
            client.close()

    Server().run(story(), listener)
    assert Refused.begun == 600
    assert Refused.most_in_line <= 3


def test_of_lines_that_anybody_can_cause_one_a_second_is_logged_and_the_rest_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from queue import Queue

    caplog.set_level(logging.INFO, "router")
    logs, events = Logs(Queue(), None), Events()
    logs.log_refusals(events)

    async def story() -> None:
        for peer in ("1.2.3.4", "5.6.7.8"):
            for _ in range(1000):
                events.publish(ClientRefused("invalid_http", peer, "Invalid HTTP request received."))
        for number in range(5000):  # who has that many addresses is told apart no more
            events.publish(ClientRefused("invalid_http", f"fe80::{number:x}", "Invalid HTTP request received."))

    asyncio.run(story())
    assert caplog.messages[0] == "client 1.2.3.4: Invalid HTTP request received."
    assert sum("received" in message for message in caplog.messages) <= 1001
    caplog.clear()
    logs.close()
    assert caplog.messages[:2] == [
        f"client {peer}: 999 more connections within a second: invalid_http" for peer in ("1.2.3.4", "5.6.7.8")
    ]
    assert caplog.messages[2] == "client others: 4001 more connections within a second: invalid_http"
