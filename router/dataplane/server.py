"""HTTP/1.1 for clients: uvicorn's server, with the router's own protocol on its connections.

The protocol reads requests one after the other, and makes each a `Turn`. Requests of the data plane are answered
by an `Exchange` without ASGI: a task, two queues of dictionaries and an event for every token would cost more than
all other work on a token. Every other request is a page of the ASGI application, run by uvicorn's own cycle.

Unlike uvicorn's protocols, it limits the time and size of a request's head, and of its trailer, and ends
connections of clients that stop in the middle of a request, or that do not read. Requests of a client are read in
small steps and one at a time: the next one does not begin before the answer to the last is complete, and most of
it read. One turn of the event loop reads at most one buffer of a connection. A client that sends more waits in
`Rounds` while others are served.

Reading, answering and timing a connection share one state, so this is one class.
"""

from __future__ import annotations

import asyncio
import logging
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Protocol, cast

import httptools

from router.dataplane.answer import Answer, Wire
from router.dataplane.capture import RecordedWire
from router.dataplane.engine_exchange import EngineExchange, is_for_engine, of_engine
from router.dataplane.exchange import Exchanges
from router.dataplane.heads import (
    LONGEST_TARGET,
    MOST_HEADERS,
    BadTarget,
    RequestHead,
    head_too_large,
    target_too_long,
)
from router.dataplane.limits import no_connection_left
from router.dataplane.on_uvicorn import Config, FlowControl, Page, ServerState, peer_of
from router.http.errors import ApiError
from router.http.known_heads import Headers, Known
from router.http.routes import ROUTES, is_endless
from router.observe.events import ClientRefused

_log = logging.getLogger("router.http")

_LONGEST_HEAD = 64 * 1024
_HEAD_SEC = 30.0
_BODY_PAUSE_SEC = 60.0
_LINGER_SEC = 30.0
_LOOK_SEC = 10.0
_SPARE_SEC = 10.0
_SPARE_MOST_SEC = 60.0
_STEP = 8192
"""Bytes parsed in one step, except for a body of known length: each tiny chunk costs a method call."""
_ROOM = memoryview(bytearray(256 << 10))
"""Read buffer shared by all connections: its content is copied out before anything else is read."""
_LITTLE_ROOM = _ROOM[: 16 << 10]
"""Buffer for data that may have to be kept until it is parsed, on each of ten thousand connections. Few requests
are larger, and the rest of those is known to be a body."""
_STEPS_AT_ONCE = 2
"""One step for a head, and one for a body."""
_END_OF_HEAD = b"\r\n\r\n"
"""End of a head or trailer. Apart from this, a request can only end with the announced length of its body."""


class Turn(Protocol):
    """The one request that a connection is serving, from its head to the end of its answer."""

    def begin(self, to_come: int) -> None:
        """Begin: the connection is ready for the answer. `to_come`: bytes of the body yet to arrive, if known."""

    def add_body(self, part: bytes) -> None: ...

    def end_body(self) -> None: ...

    def leave(self) -> None:
        """Handle a disconnected client."""

    def pause(self) -> None:
        """Write no more until `resume`, as the client reads too slowly."""

    def resume(self) -> None: ...

    def hang_up(self) -> None:
        """Have the connection closed after the answer."""

    def failed(self, error: Exception) -> None:
        """Handle an exception that one of these methods raised."""


class HttpProtocol(asyncio.BufferedProtocol):
    """One client's connection, which uvicorn makes, and ends by `shutdown`.

    It provides the read buffer: uvloop's own has 256 KB, most of which might have to be kept here.
    """

    def __init__(
        self,
        exchanges: Exchanges,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.config = config
        self.server_state = server_state
        self.app_state = app_state
        self.loop = _loop or asyncio.get_running_loop()
        self.transport: asyncio.Transport
        self.flow: FlowControl
        self._exchanges = exchanges
        self._parts: list[bytes] = []
        """Parts of a body in the data parsed last."""
        self.on_body = self._parts.append  # no Python frame for a tiny chunk
        self._parser = self._new_parser()
        self._unread = b""
        """Received data, not parsed yet from `_at` on."""
        self._at = 0
        self._tail = b""
        """The last bytes that were parsed, if they may be the beginning of `_END_OF_HEAD`."""
        self._in_line = False
        """True while the connection waits for its next step."""
        self._rests = False
        """True once the connection has read a full buffer in this turn of the event loop."""
        self._is_full = False
        """True while a page has enough of a body, until it asks for more."""
        self._url = b""
        self._headers: Headers = []
        self._head: RequestHead | None = None
        """The head of a request that is about to begin."""
        self._unreadable: ApiError | None = None
        """The error in the data parsed last, if any."""
        self._turn: Turn | None = None
        self._begun: RequestHead | None = None
        """The head of a request of the data plane, if the data received last began with one."""
        self._known: Known[RequestHead] | None = None
        """The last such head, which the next request may repeat."""
        self._missing = 0
        """Bytes yet to arrive of the body of a request with a known head: they bypass the parser."""
        self._to_come = 0
        """Bytes yet to arrive of the body of any other request, if announced."""
        self._reading: str | None = "head"
        """The part of a request that is being received; None between two requests."""
        self._beside_bodies = 0
        """Bytes of the head or trailer so far: since the request began, or since the last part of its body."""
        self._since = self._last = self.loop.time()
        self._answering = False
        """True once part of the current answer has been written."""
        self._stuck: tuple[float, int] = (0.0, 0)
        """Time since which the client has read nothing, and the bytes that wait for it."""
        self._closing = self._is_gone = False
        self._is_deaf = False
        """True once the last answer is written: further data is discarded."""
        self._patience: asyncio.TimerHandle | None = None

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # which is never parsed
        return parser

    # --- asyncio.BufferedProtocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, but not the type
        self.flow = FlowControl(self.transport)
        self.server_state.connections.add(cast(Any, self))
        self._patience = self.loop.call_later(_LOOK_SEC, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.connections.discard(cast(Any, self))
        self._is_gone = True
        self._unread = b""
        del self._parser  # a reference cycle, and the parser keeps up to 64 KiB of a head
        if self._patience is not None:
            self._patience.cancel()
        if self._turn is not None:
            turn, self._turn = self._turn, None
            turn.leave()
        self.flow.resume_writing()  # a page that waits for this must see that the client is gone

    def eof_received(self) -> None:
        pass

    def pause_writing(self) -> None:
        self.flow.pause_writing()
        self._stuck = self.loop.time(), self.transport.get_write_buffer_size()
        if self._turn is not None:
            self._turn.pause()

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        if self._turn is not None:
            self._turn.resume()
        self._go_on()

    def get_buffer(self, sizehint: int) -> memoryview:
        if (
            self._is_deaf
            or self._missing > len(_LITTLE_ROOM)
            or (self._to_come > len(_LITTLE_ROOM) and not (self._unread or self._is_full))
        ):
            return _ROOM
        return _LITTLE_ROOM

    def buffer_updated(self, nbytes: int) -> None:
        if not self._is_deaf:
            self.data_received(bytes(_ROOM[:nbytes]))
        if nbytes >= len(_LITTLE_ROOM) and not self._rests:  # otherwise, libuv reads on at once, up to 32 times
            self._rests = True
            self.flow.pause_reading()
            self._exchanges.rounds.rest(self)

    def rested(self) -> None:
        self._rests = False
        self._regulate()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._last = self.loop.time()
        if self._missing:
            data = self._read_body(data)
            if not data:
                return
        if self._unread:  # parsed in its turn; reading is paused if the client sends more
            self._unread = self._unread[self._at :] + data
            self._at = 0
            self._regulate()
            return
        known = self._known
        is_first = self._reading is None and self._turn is None
        if (
            is_first
            and known is not None
            and not self.flow.write_paused
            and (found := known.body_of(data)) is not None
        ):
            if not self.transport.is_closing():
                body, self._missing = found
                self._reading = "body" if self._missing else None
                try:
                    self._begin(known.head, self._missing, body, is_whole=not self._missing)
                except Exception as cause:  # as for methods that the parser calls
                    self._broke(cause)
            return
        self._begun = None
        self._unread, self._at = data, 0
        is_patient = is_first and len(data) <= _STEP
        is_bounded = self._to_come > 0  # a body whose length was announced
        if is_bounded or self._exchanges.rounds.admit(is_patient=is_patient):
            for _ in range(_STEPS_AT_ONCE):
                if self._may_read():
                    self._read()
        begun, self._begun = self._begun, None
        if is_first and begun is not None and begun.keep_alive:
            self._known = Known.of(data, begun)
        if self._unread:
            self._go_on(is_patient=is_patient)
            self._regulate()

    def _read_body(self, data: bytes) -> bytes:
        """Pass on body data of a request whose head was known. Returns data of the next request."""
        part, rest = data[: self._missing], data[self._missing :]
        self._missing -= len(part)
        turn = self._turn
        if not self._missing:
            self._reading = None
        if turn is not None:  # else it has its answer already
            try:
                turn.add_body(part)
                if not self._missing:
                    turn.end_body()
            except Exception as cause:
                self._broke(cause)
        return rest

    # --- steps ------------------------------------------------------------------------------------------

    def step(self) -> bool:
        if self._may_read():
            self._read()
            self._regulate()
        self._in_line = self._may_read()  # set last: `_go_on`, called meanwhile, must not queue it twice
        return self._in_line

    def _go_on(self, *, is_patient: bool = False) -> None:
        """Queue a step for unparsed data, if it may be parsed now."""
        if not self._in_line and self._may_read():
            self._in_line = True
            self._exchanges.rounds.join(self, is_patient=is_patient)

    def _may_read(self) -> bool:
        """Whether data may be parsed: a request begins once the last answer is complete, and mostly read."""
        if not self._unread or self._is_deaf or self.transport.is_closing():
            return False
        if self._reading == "body":
            return not self._is_full
        return self._turn is None and not self.flow.write_paused

    def _regulate(self) -> None:
        """Pause reading beyond one step of unparsed data. Reading a little more detects disconnection."""
        if self._rests or self.transport.is_closing():
            return
        if len(self._unread) - self._at > _STEP:
            self.flow.pause_reading()
        else:
            self.flow.resume_reading()

    def _read(self) -> None:
        """Parse one step, at most to the end of a head or of a request, and begin or continue the request."""
        unread, at = self._unread, self._at
        end = at + self._to_come if self._to_come else self._end_of_step()
        if end < len(unread):
            piece, self._at = unread[at:end], end
        else:
            piece, self._unread, self._at = unread[at:] if at else unread, b"", 0
        self._to_come -= min(self._to_come, len(piece))
        was_reading = self._reading
        try:
            self._parse(piece)
            self._beside_bodies += len(piece)
            if len(self._headers) > MOST_HEADERS:
                self._unreadable = head_too_large(f"A request has more than {MOST_HEADERS} headers.")
            elif self._head is not None and len(self._url) > LONGEST_TARGET:
                self._unreadable = target_too_long()
            elif self._beside_bodies > _LONGEST_HEAD and not self._parts:
                said = f"The head or the trailer of the request is larger than {_LONGEST_HEAD} bytes."
                self._unreadable = head_too_large(said)
            if self._unreadable is not None:
                self._refuse(self._unreadable)
                return
            head, self._head = self._head, None
            body = b"".join(self._parts) if len(self._parts) != 1 else self._parts[0]
            if body:
                self._parts.clear()
                self._beside_bodies = 0
            is_whole = self._reading is None
            if head is not None:
                self._begin(head, 0 if is_whole else head.declared, body, is_whole=is_whole)
            elif self._turn is not None and was_reading == "body":  # else it has its answer already
                if body:
                    self._turn.add_body(body)
                if is_whole and self._turn is not None:
                    self._turn.end_body()
        except Exception as cause:
            self._broke(cause)

    def _end_of_step(self) -> int:
        """Return the end of the step, so that it has no two heads: the parser cannot be paused between them."""
        at, tail = self._at, self._tail
        begin = at - len(tail)
        found = (tail + self._unread[at : at + 3]).find(_END_OF_HEAD) if tail else -1
        if found < 0:
            found, begin = self._unread.find(_END_OF_HEAD, at, at + _STEP), 0
        if found < 0:
            self._tail = (tail + self._unread[at : at + _STEP][-3:])[-3:]
            return at + _STEP
        self._tail = b""
        return begin + found + len(_END_OF_HEAD)

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._parse_without_upgrade()
        except httptools.HttpParserError as error:
            cause = error.__context__  # an exception of one of the methods below
            if cause is None or isinstance(cause, BadTarget):
                self._unreadable = _not_understood()
                return
            try:
                raise cause from None
            finally:
                del cause  # a reference cycle by its traceback would keep the request alive

    def _broke(self, cause: BaseException) -> None:
        turn = self._turn
        if turn is not None and isinstance(cause, Exception):  # it counts itself, and reports errors in its API
            turn.hang_up()
            turn.failed(cause)
            return
        _log.error("unhandled error while serving a request", exc_info=cause)
        self._refuse(ApiError(500, "internal_error", "Internal error of the router; see its log."))

    # --- httptools --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = []
        self._reading = "head"
        self._beside_bodies = 0
        self._since = self._last

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading == "head" and len(self._headers) <= MOST_HEADERS:  # trailers are ignored
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if not self._parser.should_upgrade():  # see _parse_without_upgrade
            self._head = head = RequestHead(self._parser, self._url, self._headers)
            self._reading = "body"
            self._to_come = head.declared

    def on_message_complete(self) -> None:
        if not self._parser.should_upgrade():
            self._reading = None

    # --- turns ------------------------------------------------------------------------------------------

    def _begin(self, head: RequestHead, to_come: int, body: bytes = b"", *, is_whole: bool = False) -> None:
        """Begin a request, with as much of its body as has arrived."""
        turn: Turn
        wire: Wire
        exchanges, is_post = self._exchanges, head.method == b"POST"
        exchange = exchanges.by_path.get(head.path) if is_post else None
        begun = head
        if exchange is None and is_for_engine(head):
            head = of_engine(head, exchanges.dispatcher.config)
            exchange = (exchanges.of_engines.get(head.path) if is_post else None) or EngineExchange
        if exchange is not None:
            wire = RecordedWire(self) if exchanges.captures.enabled else self
            answer = Answer(wire, keep_alive=head.keep_alive, http_1_0=head.http_version == "1.0")
            turn = exchange(exchanges, answer, head)
            self._begun = begun
        else:
            turn = Page(self, head)
            self._begun = None
        self._turn = turn
        if self._closing:
            turn.hang_up()
        if self.flow.write_paused:
            turn.pause()
        turn.begin(to_come)
        if body:
            turn.add_body(body)
        if is_whole:
            turn.end_body()

    def answered(self, *, keep_alive: bool) -> None:
        self._turn = None
        self._answering = self._is_full = False
        self._last = self.loop.time()
        if not keep_alive:
            self.close()
        elif self._unread:
            self._go_on()

    def hold_body(self) -> None:
        """Stop reading a body, as the page has enough for now."""
        self._is_full = True

    def take_body(self) -> None:
        """Read on, as the page asks for more."""
        self._is_full = False
        self._go_on()

    # --- answers ----------------------------------------------------------------------------------------

    @property
    def default_lines(self) -> bytes:
        return b"".join(map(_line, self.server_state.default_headers))

    def write(self, data: bytes) -> None:
        self._answering = True
        if not self._is_deaf and not self.transport.is_closing():  # uvloop raises if the client is gone
            self.transport.write(data)

    @property
    def peer(self) -> str:
        return peer_of(self.transport)

    @property
    def is_gone(self) -> bool:
        return self._is_gone

    @property
    def idle_since_sec(self) -> float | None:
        """Time of the last data of a request; None while an answer is awaited, or not read by the client."""
        if self._answering or self._unread or (self._turn is not None and self._reading is None):
            return None
        if self._patience is None or self.transport.is_closing() or self.transport.get_write_buffer_size():
            return None  # not connected yet, closing, or with output to be sent
        return self._last

    def give_way(self) -> None:
        """Close the connection, as another one needs its place."""
        if self._turn is not None or (self._reading == "head" and self._beside_bodies):
            self._refuse(no_connection_left())
        else:
            self._tell("gave_way", "it was idle, and another connection needed its place (api.max_connections)")
            self.transport.abort()

    def invite_body(self) -> None:
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def abort(self) -> None:
        self.transport.abort()

    def close(self) -> None:
        """Close once the client has read the rest, or has had time to.

        A client that is still sending would get a reset, and perhaps never see the answer: its data is read and
        discarded first.
        """
        self._unread = b""
        if self.transport.is_closing() or (self._is_deaf and not self._closing):
            return
        self._is_deaf = self._turn is None and self._reading == "body" and not self._closing
        if self._is_deaf:
            self.flow.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()
        if self._is_deaf or self.transport.get_write_buffer_size():
            self.loop.call_later(_LINGER_SEC, self.transport.abort)

    def shutdown(self) -> None:
        """Finish the current request and close, as uvicorn is about to end."""
        self._closing = True
        if self._turn is None:
            self.close()
        else:
            self._turn.hang_up()

    # --- what can go wrong ------------------------------------------------------------------------------

    def _parse_without_upgrade(self) -> None:
        """Parse the last head again, as if it did not ask for an upgrade.

        Java's HttpClient asks for HTTP/2 this way. A server that does not upgrade answers the request as it is.
        """
        if self._unreadable is not None:
            return
        if self._parser.get_method() == b"CONNECT":
            self._unreadable = _not_understood()
            return
        head = [self._parser.get_method(), b" ", self._url, b" HTTP/1.1\r\n"]
        for name, value in self._headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name != b"upgrade":
                head.append(b"%b: %b\r\n" % (name, value))
        self._parser = self._new_parser()
        self._parse(b"".join((*head, b"\r\n")))

    def _look(self) -> None:
        """Check all time limits every few seconds: a timer for each request would cost more."""
        self._patience = self.loop.call_later(_LOOK_SEC, self._look)
        if self.transport.is_closing():
            return
        now = self.loop.time()
        if self.flow.write_paused and self._reads_nothing(now):
            self._tell("does_not_read", "it does not read its answer")
            self.transport.abort()
            return
        if self._unread:  # the router itself is not reading
            return
        idle_sec = now - self._last
        if self._reading is None:
            if self._turn is None and idle_sec > self.config.timeout_keep_alive:
                self.close()
        elif idle_sec > _BODY_PAUSE_SEC or (self._reading == "head" and now - self._since > _HEAD_SEC):
            self._refuse(ApiError(408, "request_too_slow", "The rest of the request did not arrive in time."))

    def _reads_nothing(self, now: float) -> bool:
        """Whether the client has read nothing of its answer for longer than it might have been idle."""
        since, size = self._stuck
        left = self.transport.get_write_buffer_size()
        self._stuck = now if left < size else since, left
        return now - self._stuck[0] > self.config.timeout_keep_alive

    def _refuse(self, error: ApiError) -> None:
        """Answer a request that cannot be read to its end, unless it has an answer, and close."""
        self._tell(error.code, error.message)
        if self._answering:
            self.transport.abort()
            return
        is_begun = self._turn is not None
        if is_begun or self._reading == "head" or self._head is not None:  # else it has its answer
            head = b"HTTP/1.1 %d %b\r\n%bcontent-length: %d\r\nconnection: close\r\n\r\n"
            body = error.body(self._url.decode("latin-1"))
            lines = b"".join(map(_line, error.headers()))
            self.write(head % (error.status, HTTPStatus(error.status).phrase.encode(), lines, len(body)) + body)
        self.close()

    def _tell(self, reason: str, message: str) -> None:
        self._exchanges.dispatcher.events.publish(ClientRefused(reason, self.peer, message))


def _not_understood() -> ApiError:
    return ApiError(400, "invalid_http", "Invalid HTTP request received.")


class PagesProtocol(HttpProtocol):
    """A connection beyond `api.max_connections`, for pages, and closed after a short time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.loop.call_later(_SPARE_SEC, self._leave)

    def _begin(self, head: RequestHead, to_come: int, body: bytes = b"", *, is_whole: bool = False) -> None:
        if head.path not in ROUTES and not is_endless(head.path) and not is_for_engine(head):
            super()._begin(head, to_come, body, is_whole=is_whole)
            return
        error = no_connection_left()
        lines = b"".join(map(_line, error.headers()))
        Answer(self, keep_alive=False, http_1_0=False).whole(error.status, lines, error.body(head.path))

    def _leave(self) -> None:
        """Close the connection once its request has ended, or after `_SPARE_MOST_SEC`: others need its place."""
        if self._turn is None:
            self.transport.abort()
        else:
            self.loop.call_later(_SPARE_MOST_SEC, self.transport.abort)


@lru_cache(maxsize=16)
def _line(header: tuple[bytes, bytes]) -> bytes:
    return b"%b: %b\r\n" % header
