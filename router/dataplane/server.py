"""HTTP/1.1 to the clients: uvicorn's server, with a protocol of our own on its connections.

The protocol reads requests, one after the other, and gives each its turn. Those of the data plane are answered
by an `Exchange` without ASGI: a task, two queues of dictionaries and an event for every token cost more than all
else that happens to it. Every other request is a page of the ASGI application, run by uvicorn's own cycle.

It has what uvicorn's protocols lack: bounds on how long and how large a request's head may be, and on its trailer;
an end for clients that stop in the middle, and for those that do not read. And what one client sends is read in
small steps, a request at a time: the next one is not begun before the answer to the last is whole, and most of it
read; a turn of the event loop reads no more than one buffer of a connection. A client that sends more waits, in
`Rounds`, while others have their turns.

What is read, answered and timed of a connection is one state, and so one class.
"""

from __future__ import annotations

import asyncio
import logging
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Protocol, cast

import httptools

from router.dataplane.answer import Answer
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
"""Bytes that are read at once, but for a body whose length is known: crumbs are worth a method's call each."""
_ROOM = memoryview(bytearray(256 << 10))
"""Where what is read lies until it is looked at, before anything else is read."""
_LITTLE_ROOM = _ROOM[: 16 << 10]
"""For what may have to be kept until its turn comes, on each of ten thousand connections. A head with its body is
seldom larger; where one is, the rest is known to be a body."""
_STEPS_AT_ONCE = 2
"""A head, and a body."""
_END_OF_HEAD = b"\r\n\r\n"
"""Of a trailer, too: nothing else ends a request, but for the length of its body."""


class Turn(Protocol):
    """A request whose turn it is, from its head to the end of its answer."""

    def begin(self, to_come: int) -> None:
        """The connection is ready for its answer. `to_come`: bytes of its body that are not here yet, if known."""

    def add_body(self, part: bytes) -> None: ...

    def end_body(self) -> None: ...

    def leave(self) -> None:
        """The client is gone."""

    def pause(self) -> None:
        """The client reads too slowly: write no more until `resume`."""

    def resume(self) -> None: ...

    def hang_up(self) -> None:
        """Close the connection after the answer."""

    def failed(self, error: Exception) -> None:
        """One of these methods has raised this."""


class HttpProtocol(asyncio.BufferedProtocol):
    """One client's connection. uvicorn makes it, and ends it by `shutdown`.

    It says how much is read at once, where uvloop would read 256 KB, of which most might have to wait here.
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
        """Of a body, in what was read last."""
        self.on_body = self._parts.append  # no frame of Python for a crumb
        self._parser = self._new_parser()
        self._unread = b""
        """What has come, and is not read yet, from `_at` on."""
        self._at = 0
        self._tail = b""
        """The last bytes that were read, as far as they may begin the end of a head."""
        self._in_line = False
        """It waits for its next step."""
        self._rests = False
        """It has read as much as one turn is for."""
        self.stepped_sec = float("-inf")
        self._is_full = False
        """A page has as much of a body as it takes, until it asks for more."""
        self._url = b""
        self._headers: Headers = []
        self._head: RequestHead | None = None
        """Of a request that is to be begun."""
        self._unreadable: ApiError | None = None
        """Why what was read last cannot be gone on with."""
        self._turn: Turn | None = None
        self._begun: RequestHead | None = None
        """The head of a request of the data plane, if what was read last began with one."""
        self._known: Known[RequestHead] | None = None
        """Such a head, which the next request may have, too."""
        self._missing = 0
        """Bytes of the body of a request with such a head that are still to come: the parser never sees them."""
        self._to_come = 0
        """Bytes of the body of another, if their number was said."""
        self._reading: str | None = "head"
        """The part of a request that is on its way; None between two requests."""
        self._beside_bodies = 0
        """Bytes since this request began, or since the last of its body: of its head, or of a trailer."""
        self._since = self._last = self.loop.time()
        self._answering = False
        """Of the answer to the request whose turn it is, some is written."""
        self._stuck: tuple[float, int] = (0.0, 0)
        """Since when the client has read nothing of so many bytes that wait for it."""
        self._closing = self._is_gone = False
        self._is_deaf = False
        """The last answer is written, and what still comes is thrown away."""
        self._patience: asyncio.TimerHandle | None = None

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # it is never looked at
        return parser

    # --- asyncio.BufferedProtocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one only by its methods
        self.flow = FlowControl(self.transport)
        self.server_state.connections.add(cast(Any, self))
        self._patience = self.loop.call_later(_LOOK_SEC, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.connections.discard(cast(Any, self))
        self._is_gone = True
        self._unread = b""
        del self._parser  # they hold each other, and a parser holds what it has read of a head: 64 KiB perhaps
        if self._patience is not None:
            self._patience.cancel()
        if self._turn is not None:
            turn, self._turn = self._turn, None
            turn.leave()
        self.flow.resume_writing()  # whoever waits for that must learn that the client is gone

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
        if nbytes >= len(_LITTLE_ROOM) and not self._rests:  # then libuv reads on at once, up to 32 times
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
        if self._unread:  # its turn comes; who goes on sending is not heard until then
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
                except Exception as cause:  # as where the parser calls
                    self._broke(cause)
            return
        self._begun = None
        self._unread, self._at = data, 0
        if self._to_come or self._exchanges.rounds.admit(self, self._last):  # the length of a body bounds its cost
            for _ in range(_STEPS_AT_ONCE):
                if self._may_read():
                    self._read()
        begun, self._begun = self._begun, None
        if is_first and begun is not None and begun.keep_alive:
            self._known = Known.of(data, begun)
        if self._unread:
            self._go_on()
            self._regulate()

    def _read_body(self, data: bytes) -> bytes:
        """Of a request whose head was known. What is left is the next one's."""
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
        self._in_line = self._may_read()  # not before: it stands in the line once, though an answer bids it go on
        return self._in_line

    def _go_on(self) -> None:
        """With what is not read yet, if that may be, in a step of its own."""
        if not self._in_line and self._may_read():
            self._in_line = True
            self._exchanges.rounds.join(self, self.loop.time())

    def _may_read(self) -> bool:
        """A request is begun when the answer to the last is whole, and when not too much of it is unread."""
        if not self._unread or self._is_deaf or self.transport.is_closing():
            return False
        if self._reading == "body":
            return not self._is_full
        return self._turn is None and not self.flow.write_paused

    def _regulate(self) -> None:
        """Hear no more than a little beyond what can be read now; whether the client has left is part of it."""
        if self._rests or self.transport.is_closing():
            return
        if len(self._unread) - self._at > _STEP:
            self.flow.pause_reading()
        else:
            self.flow.resume_reading()

    def _read(self) -> None:
        """Read on: at most to the end of a head, and to the end of a request. What is whole by that is begun."""
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
                said = f"What a request has beside its body takes more than {_LONGEST_HEAD} bytes."
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
        """Where to stop, so that no two heads are in what is read: a parser cannot be held up between them."""
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
            cause = error.__context__  # what one of the methods below has raised
            if cause is None or isinstance(cause, BadTarget):
                self._unreadable = _not_understood()
                return
            try:
                raise cause from None
            finally:
                del cause  # its traceback holds this frame, and all of the request would wait for the collector

    def _broke(self, cause: BaseException) -> None:
        turn = self._turn
        if turn is not None and isinstance(cause, Exception):  # it accounts for itself, and knows how it is told
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
        if self._reading == "head" and len(self._headers) <= MOST_HEADERS:  # a trailer says nothing that matters
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
        """Give it its turn, with as much of its body as is here."""
        turn: Turn
        exchanges, is_post = self._exchanges, head.method == b"POST"
        exchange = exchanges.by_path.get(head.path) if is_post else None
        begun = head
        if exchange is None and is_for_engine(head):
            head = of_engine(head, exchanges.dispatcher.config)
            exchange = (exchanges.of_engines.get(head.path) if is_post else None) or EngineExchange
        if exchange is not None:
            answer = Answer(self, keep_alive=head.keep_alive, http_1_0=head.http_version == "1.0")
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
        """A page has enough of it for now."""
        self._is_full = True

    def take_body(self) -> None:
        """The page asks for more."""
        self._is_full = False
        self._go_on()

    # --- answers ----------------------------------------------------------------------------------------

    @property
    def default_lines(self) -> bytes:
        return b"".join(map(_line, self.server_state.default_headers))

    def write(self, data: bytes) -> None:
        self._answering = True
        if not self._is_deaf and not self.transport.is_closing():  # uvloop raises when the client is gone
            self.transport.write(data)

    @property
    def peer(self) -> str:
        return peer_of(self.transport)

    @property
    def is_gone(self) -> bool:
        return self._is_gone

    @property
    def idle_since_sec(self) -> float | None:
        """Since when nothing has come of a request; None while an answer is asked for, or not read yet."""
        if self._answering or self._unread or (self._turn is not None and self._reading is None):
            return None
        if self._patience is None or self.transport.is_closing() or self.transport.get_write_buffer_size():
            return None  # not here yet, on its way out, or with some of its answer to come
        return self._last

    def give_way(self) -> None:
        """Others need its place."""
        if self._turn is not None or (self._reading == "head" and self._beside_bodies):
            self._refuse(no_connection_left())
        else:
            self._tell("gave_way", "it was idle, and others came (api.max_connections)")
            self.transport.abort()

    def invite_body(self) -> None:
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def abort(self) -> None:
        self.transport.abort()

    def close(self) -> None:
        """Once the rest is read; but nobody may hold the connection by not reading.

        Who is still sending would get a reset for it, and perhaps never see the answer: it is heard out first.
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
        """uvicorn is about to end: finish what was begun."""
        self._closing = True
        if self._turn is None:
            self.close()
        else:
            self._turn.hang_up()

    # --- what can go wrong ------------------------------------------------------------------------------

    def _parse_without_upgrade(self) -> None:
        """Read the head that was read as if it did not ask for an upgrade.

        Java's HttpClient asks for HTTP/2 this way. Whoever does not upgrade answers the request as it is.
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
        """Every few seconds: one timer for all limits, and none to set and cancel with every request."""
        self._patience = self.loop.call_later(_LOOK_SEC, self._look)
        if self.transport.is_closing():
            return
        now = self.loop.time()
        if self.flow.write_paused and self._reads_nothing(now):
            self._tell("does_not_read", "it does not read what it has asked for")
            self.transport.abort()
            return
        if self._unread:  # then it is we who do not read
            return
        idle_sec = now - self._last
        if self._reading is None:
            if self._turn is None and idle_sec > self.config.timeout_keep_alive:
                self.close()
        elif idle_sec > _BODY_PAUSE_SEC or (self._reading == "head" and now - self._since > _HEAD_SEC):
            self._refuse(ApiError(408, "request_too_slow", "The rest of the request did not arrive in time."))

    def _reads_nothing(self, now: float) -> bool:
        """Whether its client has taken none of what is written for longer than it might have been idle."""
        since, size = self._stuck
        left = self.transport.get_write_buffer_size()
        self._stuck = now if left < size else since, left
        return now - self._stuck[0] > self.config.timeout_keep_alive

    def _refuse(self, error: ApiError) -> None:
        """Answer a request that cannot be read to its end, if it has no answer yet, and close."""
        self._tell(error.code, error.message)
        if self._answering:
            self.transport.abort()
            return
        is_begun = self._turn is not None
        if (
            is_begun or self._reading == "head" or self._head is not None
        ):  # else it has its answer, and gets no other
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
    """A connection beyond those that there may be: for a page, and for a moment."""

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
        """It may finish what it is at, but not for ever: others wait for the place."""
        if self._turn is None:
            self.transport.abort()
        else:
            self.loop.call_later(_SPARE_MOST_SEC, self.transport.abort)


@lru_cache(maxsize=16)
def _line(header: tuple[bytes, bytes]) -> bytes:
    return b"%b: %b\r\n" % header
