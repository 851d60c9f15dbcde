"""uvicorn's HTTP protocol with what it lacks: bounds on how long and how large a request's head may be, an end
for clients that stop in the middle of one; and the head of an answer joined with what follows it.

uvicorn writes head and body one after the other. Each write is a system call that wakes up the other side; for a
small answer it costs as much as all the scheduling of the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_LONGEST_HEAD = 64 * 1024
_HEAD_SEC = 30.0
_BODY_PAUSE_SEC = 60.0
_LINGER_SEC = 30.0
_MOST_PIPELINED = 16


class JoinedHead:
    """A transport that keeps a head until the next write, or the end of the event loop's turn."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, torn: Callable[[], bool]
    ) -> None:
        """`torn` tells whether what was written is the beginning of an answer without its end."""
        self._transport = transport
        self._loop = loop
        self._torn = torn
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._transport.is_closing():  # uvloop raises when the client is gone
            return
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head + data)
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Once the rest is read; but nobody may hold the connection by not reading."""
        self._flush()
        if self._torn():
            self._transport.abort()
        elif not self._transport.is_closing():
            self._transport.close()
            if self._transport.get_write_buffer_size():
                self._loop.call_later(_LINGER_SEC, self._transport.abort)

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            if not self._transport.is_closing():
                self._transport.write(head)


class HttpProtocol(HttpToolsProtocol):
    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._reading: str | None = "head"
        """The part of a request that is on its way; None between two requests."""
        self._head_size = 0
        self._since = self._last = self.loop.time()
        self._patience: asyncio.TimerHandle | None = None
        self._unfinished: list[RequestResponseCycle] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        joined = JoinedHead(transport, self.loop, self._is_torn)
        super().connection_made(cast(asyncio.Transport, joined))
        self._patience = self.loop.call_later(_HEAD_SEC, self._check_patience)

    def connection_lost(self, exc: Exception | None) -> None:
        for cycle in self._unfinished:  # uvicorn tells only the last of those that were pipelined
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._last = self.loop.time()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._reading is None:
            return
        if self._reading == "head":
            self._head_size += len(data)
            if self._head_size > _LONGEST_HEAD:
                self._refuse(b"431 Request Header Fields Too Large")
                return
        if self._patience is None:
            self._patience = self.loop.call_later(_HEAD_SEC, self._check_patience)

    def on_message_begin(self) -> None:
        self._reading = "head"
        self._head_size = 0
        self._since = self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # see _decline_upgrade
        self._reading = "body"
        super().on_headers_complete()
        self._unfinished = [cycle for cycle in self._unfinished if not cycle.response_complete]
        self._unfinished.append(self.cycle)
        if self.pipeline:
            if len(self.pipeline) > _MOST_PIPELINED:
                self.transport.abort()
            self.flow.resume_reading()  # else nobody would notice that the client goes

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._reading = None
        super().on_message_complete()

    def _decline_upgrade(self, rest: bytes) -> None:
        """Java's HttpClient asks for HTTP/2 this way. Whoever does not upgrade answers the request as it is."""
        if self.parser.get_method() == b"CONNECT":
            self.send_400_response("Invalid HTTP request received.")
            return
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n"]
        for name, value in self.headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name != b"upgrade":
                head.append(b"%b: %b\r\n" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"".join((*head, b"\r\n", rest)))

    def _is_torn(self) -> bool:
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete

    def _check_patience(self) -> None:
        self._patience = None
        if self._reading is None or self.transport.is_closing():
            return
        now = self.loop.time()
        left = self._since + _HEAD_SEC - now if self._reading == "head" else self._last + _BODY_PAUSE_SEC - now
        if self.flow.read_paused:  # it is we who do not read
            left = _BODY_PAUSE_SEC
        if left > 0:
            self._patience = self.loop.call_later(left, self._check_patience)
        else:
            self._refuse(b"408 Request Timeout")

    def _refuse(self, status: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(b"HTTP/1.1 %b\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
        self.transport.close()
