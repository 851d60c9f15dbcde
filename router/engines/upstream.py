"""HTTP/1.1 client for engines, with a small pool of keep-alive connections for each.

Designed for the common case of the data path: a small request in one write, and a response that is a small
document or an event stream. The sender of a request is a `Receiver`, which is called with the bytes of the
response in the same iteration of the event loop that read them. A task or future for each read would cost more
than everything else.

llama-server closes idle connections at any time. A request that was written to a pooled connection and got no byte
of a response is therefore sent again on a fresh connection. If that fails too, the engine is lost, and the
receiver decides what to do.

Engines are not trusted to end what they send: heads and everything else that is no body are bounded. Data that was
not requested closes the connection, so that it is never taken for a response.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Protocol, cast

import httptools
import msgspec

from router.engines.base import Endpoint
from router.http.known_heads import Headers, Known
from router.system.large_memory import Pieces

_NOT_RELAYED = frozenset(
    {
        b"connection",
        b"content-length",
        b"date",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"server",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
    }
)
_STATUSES = frozenset(HTTPStatus)
"""Known status codes; others are not passed on."""
_KEEP_ALIVE_MAX = re.compile(rb"max=(\d+)")
_DYING_SEC = 0.05
"""Time until the exit of an engine has been noticed."""
_LONGEST_HEAD = 64 * 1024
"""Limit on a response's head, with all interim responses before it, and on chunk extensions and trailers."""
_ENDS_OF_CHUNKS = 32
"""Reads up to this size without any of the body are the end of a chunk, split from the next one."""
_ONE_WRITE = 65536
"""Head and body are joined up to this size; beyond it, copying costs more than a second write."""
_PART = 256 << 10
_PARTS_AT_ONCE = 4
"""Part of a large body that is written per iteration of the event loop: a fast engine would accept all at once."""
_CRUMBS = 256
"""Beyond this number of chunks in one read, parsing yields to other work of the event loop."""


Body = bytes | memoryview | Pieces


class Head(msgspec.Struct):
    """Head of a response."""

    status: int
    lines: bytes
    """Header lines to be passed on to the client: names in lower case, each with its line end."""
    content_length: int | None
    is_chunked: bool
    streams: bool
    """`text/event-stream`"""
    is_encoded: bool
    """The body is compressed (`Content-Encoding`)."""
    keep_alive_max: float
    """Number of requests that the engine accepts on one connection (`Keep-Alive: max=100`)."""


class Receiver(Protocol):
    """Receiver of the response to a request. No calls follow after `last`, `lost` or `failed`."""

    def connected(self, connection: Connection) -> None:
        """Called before the request is written; closing the connection cancels it."""

    def received(self, head: Head, part: bytes, last: bool) -> None:
        """Called with more of the body, its end, or both; `head` is the same each time."""

    def lost(self, reason: str) -> None:
        """Called if the engine cannot be reached, closed the connection early, or violated HTTP."""

    def failed(self, error: Exception) -> None:
        """Called with an exception that one of these methods raised."""


class Connection(asyncio.Protocol):
    """Connection to an engine, with one request at a time."""

    __slots__ = (
        "_answered",
        "_beside_body",
        "_complete",
        "_head",
        "_headers",
        "_is_full",
        "_is_held",
        "_known",
        "_may_stay",
        "_parser",
        "_parts",
        "_poll",
        "_pool",
        "_receiver",
        "_request",
        "_transport",
        "_unsent",
        "_uses",
        "last_byte_sec",
        "on_body",
    )

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._request: tuple[bytes, Body] = (b"", b"")
        self._unsent: Iterator[memoryview] | None = None
        """Rest of a large body that is still to be written."""
        self._is_full = False
        """True while the transport's write buffer is full."""
        self._is_held = False
        """True while the receiver has paused reading."""
        self._uses = 0
        self._headers: Headers = []
        self._head: Head | None = None
        self._known: Known[Head] | None = None
        """Head of the last response, if the next one may equal it."""
        self._parts: list[bytes] = []
        self._beside_body = 0
        """Number of bytes of this response in reads without any of its body."""
        self._poll: select.poll | None = None
        """Reports unread data of the socket."""
        self._answered = False
        self._complete = False
        self._may_stay = False
        self.last_byte_sec = 0.0
        """Time of the last data from the engine or of the last request to it (monotonic)."""
        self.on_body = self._parts.append  # no Python frame per token
        self._parser = httptools.HttpResponseParser(self)

    # --- use --------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def is_fresh(self) -> bool:
        """Whether it can be reused: neither data nor an end has arrived since the last response."""
        transport, poll = self._transport, self._poll
        return transport is not None and not transport.is_closing() and not (poll is not None and poll.poll(0))

    @property
    def stopped_midway(self) -> bool:
        """Whether part of a response has arrived that the engine sends as a whole; False for streams."""
        return self._answered and (self._head is None or self._head.content_length is not None)

    def send(self, head: bytes, body: Body, receiver: Receiver) -> None:
        assert self._transport is not None
        self._receiver = receiver
        self._request = (head, body)
        self._uses += 1
        self._pool.asked_sec = self.last_byte_sec = time.monotonic()
        receiver.connected(self)
        if self._receiver is None:  # it has thought better of it
            return
        if isinstance(body, Pieces):
            self._transport.write(head)
            self._unsent = body.in_parts(_PART)
            self._send_on()
        elif len(body) < _ONE_WRITE:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def _send_on(self) -> None:
        for _ in range(_PARTS_AT_ONCE):
            if self._is_full or self._unsent is None or self._transport is None:
                return
            part = next(self._unsent, None)
            if part is None:
                self._unsent = None
                return
            self._transport.write(part)
        asyncio.get_running_loop().call_soon(self._send_on)

    def condemn(self, reason: str) -> None:
        """End the engine: its answer shows that it can answer nothing any more."""
        self._pool.condemn(reason)

    def pause(self) -> None:
        """Stop reading until `resume`; backpressure makes the engine wait."""
        self._is_held = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        self._is_held = False
        if self._transport is not None:
            self._transport.resume_reading()

    def _let_others_read(self) -> None:
        """Let other connections proceed: uvloop reads up to 32 times from a socket that is never empty."""
        if self.is_open:
            cast(asyncio.Transport, self._transport).pause_reading()
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        if self.is_open and not self._is_held:
            cast(asyncio.Transport, self._transport).resume_reading()

    def close(self) -> None:
        """Close at once, so that the engine notices and frees the slot."""
        self._receiver = self._unsent = None
        if self._transport is not None:
            self._transport.abort()

    def break_off(self) -> None:
        """Close as if the engine had exited; a waiting receiver is notified."""
        receiver = self._receiver
        self.close()
        if receiver is not None:
            _tell_lost(receiver, "it was stopped")

    # --- asyncio.Protocol -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one only by its methods
        self._poll = select.poll()
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        self._pool.opened(self)

    def data_received(self, data: bytes) -> None:
        self._pool.heard_sec = self.last_byte_sec = time.monotonic()
        receiver = self._receiver
        if receiver is None:  # nothing was requested
            self.close()
            return
        try:
            is_first = not self._answered
            if is_first:
                self._answered = True
                known = self._known
                if known is not None and (found := known.body_of(data)) is not None and not found[1]:
                    self._may_stay = self._uses < known.head.keep_alive_max
                    self._give_back()
                    body = found[0]
                    receiver.received(msgspec.structs.replace(known.head, content_length=len(body)), body, True)
                    return
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                self.close()
                receiver.lost(f"the engine does not speak HTTP: {_told(error)}")
                return
            head = self._head
            if head is None:
                self._note_beside_body(len(data), receiver)
                return
            if head.status == 401 and self._pool.endpoint.knows_key:
                self.close()
                receiver.lost("its port is somebody else's: the key of the engine is not known there")
                return
            parts = self._parts
            if len(parts) == 1:
                part = parts[0]
            else:
                part = b"".join(parts)
                if len(parts) > _CRUMBS:
                    self._let_others_read()
            parts.clear()
            if self._complete:
                if is_first and head.status == 200 and self._may_stay:
                    self._known = Known.of(data, head)
                self._give_back()
                receiver.received(head, part, True)
            elif part:
                receiver.received(head, part, False)
            elif len(data) > _ENDS_OF_CHUNKS:
                self._note_beside_body(len(data), receiver)
        except Exception as error:  # whatever it is, nobody must wait for the rest of the answer
            self.close()
            receiver.failed(error)

    def _note_beside_body(self, size: int, receiver: Receiver) -> None:
        self._beside_body += size
        if self._beside_body > _LONGEST_HEAD:
            self.close()
            part = "head" if self._head is None else "chunks without any content"
            receiver.lost(f"the engine sends more than {_LONGEST_HEAD >> 10} KiB of {part}")

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._send_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self._unsent = None
        del self._parser  # a reference cycle that keeps what was read alive
        self._pool.lost(self)
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            return
        head = self._head
        if head is not None and head.content_length is None and not head.is_chunked:  # such a body ends here
            try:
                receiver.received(head, b"", True)
            except Exception as error:
                receiver.failed(error)
        elif self._uses > 1 and not self._answered:
            self._pool.connect(*self._request, receiver)
        else:
            _tell_lost(receiver, str(exc) if exc else "the engine closed the connection")

    # --- httptools --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("more data than requested")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if not 100 <= status < 200 and status not in _STATUSES:
            raise ValueError(f"status {status}")
        if status < 200:  # 100 Continue and its like announce the real one
            self._headers = []
            return
        fields = dict(self._headers)
        length = fields.get(b"content-length")
        coding = fields.get(b"transfer-encoding", b"").lower()
        if coding not in (b"", b"chunked"):
            raise ValueError("a transfer coding that was not requested")
        streams = fields.get(b"content-type", b"").startswith(b"text/event-stream")
        most = _KEEP_ALIVE_MAX.search(fields.get(b"keep-alive", b""))
        self._head = Head(
            status,
            _relayed(self._headers),
            int(length) if length is not None else None,
            coding == b"chunked",
            streams,
            fields.get(b"content-encoding", b"identity") != b"identity",
            int(most[1]) if most is not None else math.inf,
        )

    def on_message_complete(self) -> None:
        if self._head is not None:
            self._complete = True
            self._may_stay = self._parser.should_keep_alive() and self._uses < self._head.keep_alive_max

    def _give_back(self) -> None:
        if self._unsent is not None or (self._transport is not None and self._transport.get_write_buffer_size()):
            self._may_stay = False  # it has answered before it has read all
        self._receiver = None
        self._request = (b"", b"")
        self._head = None
        self._headers = []
        self._beside_body = 0
        self._answered = self._complete = False
        if self._may_stay:
            self._pool.give_back(self)
        else:
            self.close()


def _told(error: Exception) -> str:
    """Describe an error briefly, whatever the engine has sent."""
    cause = error.__context__  # what one of the parser's callbacks has raised
    if isinstance(error, httptools.HttpParserUpgrade):
        return "it switches to another protocol"
    return str(cause) if isinstance(cause, ValueError) else str(error)[:200]


def _tell_lost(receiver: Receiver, reason: str) -> None:
    try:
        receiver.lost(reason)
    except Exception as error:
        receiver.failed(error)


def _relayed(headers: Headers) -> bytes:
    lines = b""
    for header in headers:
        if header[0] not in _NOT_RELAYED and not header[0].startswith(b"access-control-"):
            lines += b"%b: %b\r\n" % header
    return lines


def _first_lines(endpoint: Endpoint) -> bytes:
    """Return the part of the request after its target."""
    headers = (("host", f"{endpoint.host}:{endpoint.port}"), *endpoint.headers)
    lines = "".join(f"{name.lower()}: {value}\r\n" for name, value in headers)
    return f" HTTP/1.1\r\n{lines}".encode()


class EnginePool:
    """Connections to one engine, with at most `max_idle` idle ones; the slots limit the number in use."""

    def __init__(
        self,
        endpoint: Endpoint,
        max_idle: int,
        is_alive: Callable[[], bool],
        condemn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`condemn` ends an engine whose answer shows that it can answer nothing any more, with the reason."""
        self.condemn = condemn
        self.asked_sec = 0.0
        """Time of the last request to the engine (monotonic)."""
        self.heard_sec = 0.0
        """Time of the last byte from it."""
        self.endpoint = endpoint
        self._is_alive = is_alive
        self._lines = _first_lines(endpoint)
        self._max_idle = max_idle
        self._idle: deque[Connection] = deque()
        self._connections: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._closed = False

    def ask(self, method: bytes, target: bytes, lines: bytes, body: Body, receiver: Receiver) -> None:
        """Send a request. `lines` are headers, each with its end; those of the endpoint and of HTTP are added."""
        head = b"%b %b%b%bcontent-length: %d\r\n\r\n" % (method, target, self._lines, lines, len(body))
        while self._idle:
            connection = self._idle.pop()  # the one used last is the likeliest to live
            if connection.is_fresh:
                connection.send(head, body, receiver)
                return
            connection.close()
        self.connect(head, body, receiver)

    @property
    def silent_since_sec(self) -> float:
        """Time since which the engine has sent nothing, if requests are in flight."""
        return max(self.asked_sec, self.heard_sec)

    def connect(self, head: bytes, body: Body, receiver: Receiver) -> None:
        """Send a request on a fresh connection."""
        task = asyncio.get_running_loop().create_task(self._connect(head, body, receiver))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, head: bytes, body: Body, receiver: Receiver) -> None:
        if self._closed or not self._is_alive():  # its port may belong to another program by now
            _tell_lost(receiver, "the engine is stopped")
            return
        try:
            connection = await self._open()
        except Exception as error:  # nobody else would tell the receiver
            number = error.errno if isinstance(error, OSError) else None  # its text may hold the address
            reason = type(error).__name__ if number is None else os.strerror(number)
            _tell_lost(receiver, f"cannot connect to the engine: {reason}")
            return
        if self._closed:
            connection.close()
            _tell_lost(receiver, "the engine is stopped")
            return
        if not connection.is_open:
            _tell_lost(receiver, "the engine closed the connection")
            return
        try:
            connection.send(head, body, receiver)
        except Exception as error:
            connection.close()
            receiver.failed(error)

    async def _open(self) -> Connection:
        """Raises OSError."""
        loop, endpoint = asyncio.get_running_loop(), self.endpoint
        if endpoint.unix_socket is not None:
            try:
                _, connection = await loop.create_unix_connection(
                    lambda: Connection(self), str(endpoint.unix_socket)
                )
            except ConnectionRefusedError:  # it has died just now, or (macOS) too many knock at once
                await asyncio.sleep(_DYING_SEC)
                if not self._is_alive():
                    raise
            except OSError:  # somebody has cleaned up the folder, or too many knock at once
                pass
            else:
                return connection
        _, connection = await loop.create_connection(lambda: Connection(self), endpoint.host, endpoint.port)
        return connection

    def give_back(self, connection: Connection) -> None:
        if self._closed or len(self._idle) >= self._max_idle:
            connection.close()
        else:
            self._idle.append(connection)

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def lost(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def close_idle(self) -> None:
        """Keep no idle connections, because the engine is stopping; requests in flight finish."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def break_off(self) -> None:
        """Close all connections, because the engine is stopped now and waits for connected clients."""
        self.close_idle()
        for connection in tuple(self._connections):
            connection.break_off()
