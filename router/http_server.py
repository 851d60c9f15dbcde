"""HTTP/1.1 to the clients: uvicorn's server, with a protocol of our own on its connections.

The protocol reads requests, one after the other, and gives each its turn. Those of the data plane are answered
by an `Exchange` without ASGI: a task, two queues of dictionaries and an event for every token cost more than all
else that happens to it. Every other request is a page of the ASGI application, run by uvicorn's own cycle.

It has what uvicorn's protocols lack: bounds on how long and how large a request's head may be, on its trailer,
and on how many requests wait behind one; and an end for clients that stop in the middle.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from functools import lru_cache
from typing import Any, Protocol, cast

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from router.answer import Answer
from router.anthropic_exchange import CountExchange, MessagesExchange
from router.choices_exchange import ENGINES_ROUTES, OPENAIS_ROUTES, ChoicesExchange
from router.engine_exchange import EngineExchange, is_for_engine, of_engine
from router.exchange import Exchange, Exchanges
from router.heads import BadTarget, Headers, Known, RequestHead
from router.ollama_exchange import OllamaExchange
from router.responses_exchange import ResponsesExchange
from router.routing import ROUTES, TRANSLATED_ROUTES

_log = logging.getLogger("router.http")

_LONGEST_HEAD = 64 * 1024
_HEAD_SEC = 30.0
_BODY_PAUSE_SEC = 60.0
_LINGER_SEC = 30.0
_LOOK_SEC = 10.0
_MOST_PIPELINED = 16

_OF_ENGINES: dict[str, type[Exchange]] = {
    **dict.fromkeys(ROUTES, Exchange),
    **dict.fromkeys(OPENAIS_ROUTES | ENGINES_ROUTES, ChoicesExchange),
    "/v1/messages": MessagesExchange,
    "/v1/messages/count_tokens": CountExchange,
    **dict.fromkeys(("/v1/responses", "/responses"), ResponsesExchange),
}
_EXCHANGES: dict[str, type[Exchange]] = {**_OF_ENGINES, **dict.fromkeys(TRANSLATED_ROUTES, OllamaExchange)}
"""The data plane; all else are pages."""


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


class _Waiting:
    """A request that waits for its turn."""

    __slots__ = ("body", "head", "is_whole")

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self.body = bytearray()
        self.is_whole = False


class HttpProtocol(asyncio.Protocol):
    """One client's connection. uvicorn makes it, and ends it by `shutdown`."""

    def __init__(
        self,
        exchanges: Exchanges,
        config: uvicorn.Config,
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
        self._parser = self._new_parser()
        self._url = b""
        self._headers: Headers = []
        self._turn: Turn | None = None
        self._begun: RequestHead | None = None
        """The head of a request of the data plane, if what was read last began with one."""
        self._known: Known[RequestHead] | None = None
        """Such a head, which the next request may have, too."""
        self._missing = 0
        """Bytes of the body of a request with such a head that are still to come: the parser never sees them."""
        self._waiting: deque[_Waiting] = deque()
        """Requests that were sent before the answer to the one before (pipelining)."""
        self._reading: str | None = "head"
        """The part of a request that is on its way; None between two requests."""
        self._beside_bodies = 0
        """Bytes since this request began, or since the last of its body: of its head, or of a trailer."""
        self._since = self._last = self.loop.time()
        self._answering = False
        """Of the answer to the request whose turn it is, some is written."""
        self._closing = False
        self._is_deaf = False
        """The last answer is written, and what still comes is thrown away."""
        self._patience: asyncio.TimerHandle | None = None

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # it is never looked at
        return parser

    # --- asyncio.Protocol -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one only by its methods
        self.flow = FlowControl(self.transport)
        self.server_state.connections.add(cast(Any, self))
        self._patience = self.loop.call_later(_LOOK_SEC, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.connections.discard(cast(Any, self))
        self._waiting.clear()
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
        if self._turn is not None:
            self._turn.pause()

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        if self._turn is not None:
            self._turn.resume()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._last = self.loop.time()
        if self._missing:
            data = self._read_body(data)
            if not data:
                return
        known = self._known
        is_first = self._reading is None and self._turn is None
        if is_first and known is not None and (found := known.body_of(data)) is not None:
            if not self.transport.is_closing():
                body, self._missing = found
                self._reading = "body" if self._missing else None
                try:
                    self._begin(known.head, self._missing, body, is_whole=not self._missing)
                except Exception as cause:  # as where the parser calls
                    self._broke(cause)
            return
        self._begun = None
        rest = data
        while rest and not self.transport.is_closing():
            self._beside_bodies += len(rest)
            rest = self._read(rest)
        begun, self._begun = self._begun, None
        if is_first and begun is not None and begun.keep_alive:
            self._known = Known.of(data, begun)
        if self._reading is not None and self._beside_bodies > _LONGEST_HEAD:
            self._refuse(b"431 Request Header Fields Too Large")

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

    def _read(self, data: bytes) -> bytes:
        """What is to be read instead of the rest of it, if anything."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__  # what one of the methods below has raised
            if cause is None or isinstance(cause, BadTarget):
                _log.warning("Invalid HTTP request received.")
                self._refuse(b"400 Bad Request", b"Invalid HTTP request received.")
            else:
                self._broke(cause)
        return b""

    def _broke(self, cause: BaseException) -> None:
        _log.error("a request broke the router", exc_info=cause)
        self._refuse(b"500 Internal Server Error", b"The router made a mistake; see its log.")

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
        if self._reading == "head":  # what comes in a trailer was not there when the request was admitted
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._is_deaf or self._parser.should_upgrade():
            return  # see _without_upgrade
        self._reading = "body"
        head = RequestHead(self._parser, self._url, self._headers)
        if self._turn is None:
            self._begin(head, head.declared)
            return
        self._waiting.append(_Waiting(head))
        if len(self._waiting) > _MOST_PIPELINED:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        self._beside_bodies = 0
        if self._waiting:
            waiting = self._waiting[-1]
            waiting.body += body
            if len(waiting.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
        elif self._turn is not None:  # else it has its answer already
            self._turn.add_body(body)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return
        self._reading = None
        if self._waiting:
            self._waiting[-1].is_whole = True
        elif self._turn is not None:
            self._turn.end_body()

    # --- turns ------------------------------------------------------------------------------------------

    def _begin(self, head: RequestHead, to_come: int, body: bytes = b"", *, is_whole: bool = False) -> None:
        """Give it its turn, with as much of its body as is here."""
        turn: Turn
        exchange = _EXCHANGES.get(head.path) if head.method == b"POST" else None
        begun = head
        if exchange is None and is_for_engine(head):
            head = of_engine(head, self._exchanges.dispatcher.config)
            exchange = (_OF_ENGINES.get(head.path) if head.method == b"POST" else None) or EngineExchange
        if exchange is not None:
            answer = Answer(self, keep_alive=head.keep_alive, http_1_0=head.http_version == "1.0")
            turn = exchange(self._exchanges, answer, head)
            self._begun = begun
        else:
            turn = _Page(self, head)
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
        self._answering = False
        self._last = self.loop.time()
        if not keep_alive:
            self.close()
        elif self._waiting and not self.transport.is_closing():
            self._begin_next()

    def _begin_next(self) -> None:
        request = self._waiting.popleft()
        self.flow.resume_reading()
        to_come = 0 if request.is_whole else request.head.declared
        self._begin(request.head, to_come, bytes(request.body), is_whole=request.is_whole)

    # --- answers ----------------------------------------------------------------------------------------

    @property
    def default_lines(self) -> bytes:
        return b"".join(map(_line, self.server_state.default_headers))

    def write(self, data: bytes) -> None:
        self._answering = True
        if not self._is_deaf and not self.transport.is_closing():  # uvloop raises when the client is gone
            self.transport.write(data)

    def invite_body(self) -> None:
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def abort(self) -> None:
        self.transport.abort()

    def close(self) -> None:
        """Once the rest is read; but nobody may hold the connection by not reading.

        Who is still sending would get a reset for it, and perhaps never see the answer: it is heard out first.
        """
        if self.transport.is_closing() or (self._is_deaf and not self._closing):
            return
        self._is_deaf = self._turn is None and self._reading == "body" and not self._closing
        if self._is_deaf:
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

    def _without_upgrade(self, rest: bytes) -> bytes:
        """The request whose head was read, and the rest.

        Java's HttpClient asks for HTTP/2 this way. Whoever does not upgrade answers the request as it is.
        """
        if self._parser.get_method() == b"CONNECT":
            self._refuse(b"400 Bad Request", b"Invalid HTTP request received.")
            return b""
        head = [self._parser.get_method(), b" ", self._url, b" HTTP/1.1\r\n"]
        for name, value in self._headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name != b"upgrade":
                head.append(b"%b: %b\r\n" % (name, value))
        self._parser = self._new_parser()
        return b"".join((*head, b"\r\n", rest))

    def _look(self) -> None:
        """Every few seconds: one timer for all limits, and none to set and cancel with every request."""
        self._patience = self.loop.call_later(_LOOK_SEC, self._look)
        if self.transport.is_closing() or self.flow.read_paused:  # then it is we who do not read
            return
        idle_sec = self.loop.time() - self._last
        if self._reading is None:
            if self._turn is None and idle_sec > self.config.timeout_keep_alive:
                self.close()
        elif idle_sec > _BODY_PAUSE_SEC or (
            self._reading == "head" and self.loop.time() - self._since > _HEAD_SEC
        ):
            self._refuse(b"408 Request Timeout")

    def _refuse(self, status: bytes, text: bytes = b"") -> None:
        if not self._answering:
            head = b"HTTP/1.1 %b\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            self.write(head % (status, len(text)) + text)
            self.close()
        else:
            self.transport.abort()


@lru_cache(maxsize=16)
def _line(header: tuple[bytes, bytes]) -> bytes:
    return b"%b: %b\r\n" % header


class _Page:
    """A request for the ASGI application: a turn, and the transport of the cycle that uvicorn runs for it."""

    def __init__(self, connection: HttpProtocol, request: RequestHead) -> None:
        self._connection = connection
        config, state = connection.config, connection.server_state
        awaits_invitation = (b"expect", b"100-continue") in request.headers
        scope = {
            "type": "http",
            "asgi": {"version": config.asgi_version, "spec_version": "2.3"},
            "http_version": request.http_version,
            "server": get_local_addr(connection.transport),
            "client": get_remote_addr(connection.transport),
            "scheme": "http",
            "root_path": "",
            "headers": request.headers,
            "state": connection.app_state.copy(),
            "method": request.method.decode("ascii"),
            "path": request.path,
            "raw_path": request.raw_path,
            "query_string": request.query,
        }
        self._cycle = RequestResponseCycle(
            scope=cast(Any, scope),
            transport=cast(asyncio.Transport, self),
            flow=connection.flow,
            logger=_log,
            access_logger=_log,
            access_log=False,
            default_headers=state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=awaits_invitation,
            keep_alive=request.keep_alive,
            on_response=self._answered,
        )

    # --- the turn ---------------------------------------------------------------------------------------

    def begin(self, to_come: int) -> None:
        work = self._cycle.run_asgi(self._connection.config.loaded_app)
        task = self._connection.loop.create_task(work)
        tasks = self._connection.server_state.tasks
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def add_body(self, part: bytes) -> None:
        if self._cycle.response_complete:
            return
        self._cycle.body += part
        if len(self._cycle.body) > HIGH_WATER_LIMIT:
            self._connection.flow.pause_reading()  # until the application asks for more
        self._cycle.message_event.set()

    def end_body(self) -> None:
        self._cycle.more_body = False
        self._cycle.message_event.set()

    def leave(self) -> None:
        self._cycle.disconnected = True
        self._cycle.message_event.set()

    def pause(self) -> None:
        """The cycle looks at the connection's flow."""

    def resume(self) -> None:
        """The same."""

    def hang_up(self) -> None:
        self._cycle.keep_alive = False

    def _answered(self) -> None:
        self._connection.flow.resume_reading()
        self._connection.answered(keep_alive=self._cycle.keep_alive)

    # --- the transport ----------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self._connection.write(data)

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def close(self) -> None:
        if not self._cycle.response_complete:  # half an answer must not look whole; `_answered` ends a whole one
            self._connection.abort()
