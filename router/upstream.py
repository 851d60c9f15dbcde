"""HTTP/1.1 to the engines: one small pool of kept-alive connections each, nothing between the bytes and us.

Made for what the data path does all day: a small request in one write, and an answer that is a small document
or a stream of events. The body is relayed as it comes; the head is parsed by httptools.

llama-server closes idle connections whenever it likes. A request that was written to a pooled connection and
saw no byte of an answer is therefore sent again, on a fresh connection. When a fresh one fails, too, the engine
is lost (`EngineLost`), and what to do about it is the caller's business.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import httptools

_KEEP_ALIVE_MAX = re.compile(rb"max=(\d+)")
_HIGH_WATER = 256 * 1024
_LOW_WATER = 64 * 1024


class EngineLost(Exception):
    """The connection broke. `answered` tells whether a byte of the answer had come."""

    def __init__(self, reason: str, *, answered: bool) -> None:
        super().__init__(reason)
        self.answered = answered


@dataclass(slots=True)
class Head:
    """Status and headers of an answer, names in lower case."""

    status: int
    headers: list[tuple[bytes, bytes]]
    content_length: int | None
    streams: bool
    """`text/event-stream`"""
    keep_alive_max: float
    """Requests that the engine takes on one connection (`Keep-Alive: max=100`), before it closes it."""


class Connection(asyncio.Protocol):
    """One connection, one request at a time: `send`, then `head`, then `chunk` until it returns None."""

    __slots__ = (
        "_answered",
        "_chunks",
        "_complete",
        "_error",
        "_head",
        "_headers",
        "_may_stay",
        "_parser",
        "_paused",
        "_pool",
        "_size",
        "_transport",
        "_uses",
        "_waiter",
        "reused",
    )

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: str | None = None
        self._paused = False
        self._uses = 0
        self._may_stay = False
        self.reused = False
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._head: Head | None = None
        self._complete = False
        self._answered = False

    # --- asyncio.Protocol -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one only by its methods

    def data_received(self, data: bytes) -> None:
        self._answered = True
        self._pool.last_sign_sec = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the engine does not speak HTTP: {error}")
            self.close()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self._complete:
            if self._head is not None and self._ends_with_connection():
                self._complete = True
            else:
                self._fail(str(exc) if exc else "the engine closed the connection")
        self._wake()

    # --- httptools --------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue and its like announce the real one
            self._headers = []
            return
        length = None
        streams = False
        most = math.inf
        for name, value in self._headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"content-type":
                streams = value.startswith(b"text/event-stream")
            elif name == b"keep-alive" and (found := _KEEP_ALIVE_MAX.search(value)):
                most = int(found[1])
        self._head = Head(status, self._headers, length, streams, most)

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._size += len(body)
        if self._size > _HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._head is not None:
            self._complete = True
            self._uses += 1
            self._may_stay = self._parser.should_keep_alive() and self._uses < self._head.keep_alive_max

    # --- use --------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, head: bytes, body: bytes) -> None:
        assert self._transport is not None
        if len(body) < 65536:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    async def head(self) -> Head:
        """Raises EngineLost."""
        while self._head is None:
            if self._error is not None:
                raise EngineLost(self._error, answered=self._answered)
            await self._wait()
        return self._head

    async def chunk(self) -> bytes | None:
        """All of the body that has come since; None at its end. Raises EngineLost when it breaks off."""
        while not self._chunks:
            if self._complete:
                return None
            if self._error is not None:
                raise EngineLost(self._error, answered=True)
            await self._wait()
        if len(self._chunks) == 1:
            data = self._chunks.popleft()
        else:
            data = b"".join(self._chunks)
            self._chunks.clear()
        self._size = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def release(self) -> None:
        """Back to the pool when the answer was read to its end, closed otherwise."""
        if self._complete and self._may_stay and not self._chunks and self.is_open:
            self._reset()
            self.reused = True
            self._pool.give_back(self)
        else:
            self.close()

    def close(self) -> None:
        """At once, so that the engine notices and frees its slot."""
        if self._transport is not None:
            self._transport.abort()

    def _ends_with_connection(self) -> bool:
        assert self._head is not None
        chunked = any(
            name == b"transfer-encoding" and b"chunked" in value.lower() for name, value in self._head.headers
        )
        return self._head.content_length is None and not chunked

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, reason: str) -> None:
        if self._error is None:
            self._error = reason


class EnginePool:
    """Connections to one engine. Not more idle ones than `max_idle`; the number in use is the slots' business."""

    def __init__(self, port: int, key: str, max_idle: int) -> None:
        self.port = port
        self.last_sign_sec = 0.0
        """When the engine last sent a byte, or was last sent a request (monotonic)."""
        self._authorization = f"authorization: Bearer {key}\r\n".encode()
        self._max_idle = max_idle
        self._idle: deque[Connection] = deque()
        self._closed = False

    async def request(
        self,
        method: str,
        target: bytes,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
        resent: Callable[[], None],
    ) -> tuple[Connection, Head]:
        """Send and wait for the head of the answer. Raises EngineLost; cancelling closes the connection.

        `headers` are sent as they are; Host, Content-Length and the engine's key are added. `resent` is called
        each time that the request is about to be sent again.
        """
        lines = [b"%b %b HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n" % (method.encode(), target, self.port)]
        lines.append(self._authorization)
        lines.extend(b"%b: %b\r\n" % header for header in headers)
        lines.append(b"content-length: %d\r\n\r\n" % len(body))
        head = b"".join(lines)
        while True:
            connection = await self._connection()
            try:
                connection.send(head, body)
                self.last_sign_sec = time.monotonic()
                return connection, await connection.head()
            except EngineLost as lost:
                connection.close()
                if lost.answered or not connection.reused:
                    raise
                resent()
            except BaseException:
                connection.close()
                raise

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()  # the one used last is the likeliest to live
            if connection.is_open:
                return connection
        if self._closed:
            raise EngineLost("the engine is stopped", answered=False)
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: Connection(self), "127.0.0.1", self.port)
        except OSError as error:
            raise EngineLost(f"cannot connect to the engine: {error}", answered=False) from error
        return connection

    def give_back(self, connection: Connection) -> None:
        if self._closed or len(self._idle) >= self._max_idle:
            connection.close()
        else:
            self._idle.append(connection)

    def close_idle(self) -> None:
        """Its engine is going: keep nothing, let what is in flight finish."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
