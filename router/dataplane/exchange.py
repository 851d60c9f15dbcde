"""Exchange: one request of the data plane, queued, sent to an engine and answered.

The way to the queue is in `incoming`. There are no tasks or coroutines here. Events call methods that advance
the request: its client disconnects, it is granted a slot, its engine responds or fails. Guarantees:

- A client that disconnects frees its place at once: in the queue, or in the engine by closing the connection.
- A request whose engine died before anything reached the client goes back to the head of its queue.
- A stream that has begun ends with an error event, never with silence or a torn chunk.
- Every request ends in exactly one `RequestDone`, whatever happens to it. For that, all of an engine's answer goes
  through `AnswerMeter.note`, right before it is sent; the meter is read once, at the end.

From the queue to the end this is one class, as nearly any step may follow any other, and depends on what was done
before.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import lru_cache, partial
from typing import NamedTuple
from urllib.parse import quote

from router.catalog.cards import Cards
from router.config.schema import System
from router.dataplane.answer import DOCUMENT, Answer, BrokenAnswer, with_type
from router.dataplane.capture import Captures, Recording, forget, recording_of
from router.dataplane.heads import RequestHead
from router.dataplane.incoming import IncomingRequest
from router.dataplane.limits import Bodies
from router.dataplane.routing import Wish
from router.engines.llamacpp.capability import error_of_engine, refused_by_engine
from router.engines.llamacpp.usage import AnswerMeter
from router.engines.running import RunningEngine
from router.engines.upstream import Body, Connection, Head, Receiver
from router.http.auth import Keyring
from router.http.errors import CANCELLED, ApiError, refused
from router.http.origins import Browsers
from router.http.routes import KEPT, ROUTES, SERVED, Ask, Dialect, Stream, served_routes
from router.http.tools import form_of
from router.kv.keeper import Keeper, Placement, Source
from router.observe.events import ModelsListed, Outcome, RequestDone
from router.observe.usage import NO_USAGE, Usage
from router.runtime.dispatcher import Dispatcher, Ticket, Waiting
from router.scheduling.queue import NAMES
from router.system import threads
from router.system.large_memory import LargeMemory, Pieces
from router.system.turns import Rounds

_log = logging.getLogger("router")

_SERVED = Outcome.SERVED
"""Bound once, as looking up a member of an enumeration is slow."""
_STILL_READ_SEC = 30.0
"""Time for which an engine may keep reading a body after its client has disconnected."""
_LONGEST_TRACE = 128
"""Maximum length of a trace context that is kept; in version 00 it has 55 characters (W3C Trace Context, 3.2)."""
_BUFFERED_ANSWER = 4 << 20
"""Responses up to this size are read completely before any of it is sent, so that the request can be retried."""
_LONGEST_ANSWER = 4 << 30
"""Maximum size of a response. A million tokens, each with its twenty likeliest alternatives, take 3 GiB."""

_JSON = b"content-type: application/json"
_KV_STORE = b"x-kv-store"
_KV_LINES = {source: b"x-kv: %b\r\n" % source.value.encode() for source in Source}
_EVENT_STREAM = b"content-type: text/event-stream\r\ncache-control: no-cache\r\n"


class LiveRequest(NamedTuple):
    """What is known of a request that has not ended."""

    id: str
    ticket: Ticket | None
    """None: its body is still being received or read."""
    begun_sec: float
    """Time of its head (monotonic)."""
    route: str
    client: str
    owner: str
    """See `RequestDone.owner`."""
    peer: str
    streamed: bool
    request_bytes: int
    first_sec: float | None
    """Time of the first byte of its answer (monotonic)."""
    answer_bytes: int
    output_tokens: int
    """Pieces of text that a stream has had, nearly always a token each."""
    kv: str


class Exchanges:
    """State shared by all exchanges, and the exchanges that have not ended."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        keyring: Keyring,
        browsers: Browsers,
        cards: Cards,
        translators: Mapping[tuple[Dialect, Ask], type[Exchange]],
    ) -> None:
        """`translators` are the classes of exchanges for APIs whose requests or answers are translated."""
        self.by_path = {
            path: translators.get((route.dialect, route.asks), Exchange) for path, route in ROUTES.items()
        }
        """Routes of the data plane; all others are pages."""
        self.of_engines = {path: self.by_path[path] for path in SERVED}
        """Routes of `by_path` that engines have, too."""
        self.dispatcher = dispatcher
        self.keyring = keyring
        self.browsers = browsers
        self.cards = cards
        self.bodies = Bodies()
        self.rounds = Rounds()
        """Connections that have sent more than is read at once, served in turn."""
        self.readers = threads.pool("large bodies", 1)  # several would slow down the event loop
        self.live: dict[Exchange, float] = {}
        """Exchanges that have not ended, the oldest first, each with the time at which it began (monotonic)."""
        self.captures = Captures(dispatcher.config.system.capture)
        dispatcher.events.listen(ModelsListed, self._configured)
        self._watched: set[Exchange] = set()
        """Exchanges with an engine."""
        self._timer: asyncio.TimerHandle | None = None

    def release_later(self, size: int) -> None:
        """Release memory counted for an engine later: it reads a body to its end even without a client."""
        asyncio.get_running_loop().call_later(_STILL_READ_SEC, self.bodies.release, size)

    def _configured(self, _: ModelsListed) -> None:
        self.captures.set(self.dispatcher.config.system.capture)
        if not self.captures.enabled:
            for exchange in self.live:
                exchange.forget_captured()

    def watch(self, exchange: Exchange) -> None:
        """Watch an exchange for timeouts. One timer serves all: setting one for each would cost more."""
        self._watched.add(exchange)
        if self._timer is None:
            self._set_timer()

    def unwatch(self, exchange: Exchange) -> None:
        self._watched.discard(exchange)

    def _set_timer(self) -> None:
        system = self.dispatcher.config.system
        limit_sec = min(system.request_timeout_sec, system.answer_timeout_sec or math.inf)
        self._timer = asyncio.get_running_loop().call_later(min(1.0, limit_sec / 4), self._look)

    def _look(self) -> None:
        self._timer = None
        now, system = time.monotonic(), self.dispatcher.config.system
        try:
            for exchange in list(self._watched):
                exchange.attempt(exchange.must_have_moved, now, system)
        finally:
            if self._watched:
                self._set_timer()


class Exchange(IncomingRequest):
    """One request: a turn of its client's connection, and the receiver of its engine's answer."""

    __slots__ = (
        "_connection",
        "_gathered",
        "_heartbeat",
        "_is_paused",
        "_meter",
        "_names_slot",
        "_placement",
        "_reason",
        "_relays",
        "_resends",
        "_status",
        "_streams",
        "_ticket",
        "_waits",
    )

    _shared: Exchanges

    def __init__(self, shared: Exchanges, answer: Answer, head: RequestHead) -> None:
        super().__init__(shared, answer, head)
        self._gathered = bytearray()
        """Response received so far, if it is read completely before any of it is sent."""
        self._streams = False
        self._names_slot = False
        self._ticket: Ticket | None = None
        self._placement: Placement | None = None
        """Slot of the engine, if its states are kept."""
        self._connection: Connection | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._meter = AnswerMeter()
        self._resends = 0
        self._reason = ""
        """Error message sent to the client, if it was not served."""
        self._status = 0
        self._relays = False
        """True once part of the response has been sent to the client and the rest is relayed as it arrives."""
        self._is_paused = False
        self._waits = False
        """True while waiting for a slot; a request of higher priority may then displace it."""

    # --- the client -------------------------------------------------------------------------------------

    def _route(self) -> str:
        """Route for metrics."""
        return self._head.path

    def _is_slotless(self) -> bool:
        """Whether the request needs no slot of the engine."""
        return not ROUTES[self._head.path].needs_slot

    def _not_served(self, wish: Wish) -> ApiError | None:
        """Return an error if the model's engine is known not to serve this route."""
        path = self._path
        if not path or wish.is_served(path):
            return None
        others = self._others(lambda model: path in served_routes(model.routes))
        return ApiError(400, "not_supported", f"{wish.alias!r} does not serve {path}. {others}.", "model")

    def _submit(self, wish: Wish) -> None:
        refusal = self._not_served(wish)
        if refusal is not None:
            self._refuse(refusal)
            return
        self._identify_again()
        self._streams = wish.streams
        self._names_slot = wish.names_slot
        if self._client_name:
            self._lines += b"x-request-priority: %b\r\n" % NAMES[wish.priority].encode()
        ticket = self._dispatcher.submit(
            self._request_id, wish.alias, wish.priority, self._client_name, slotless=self._is_slotless()
        )
        self._ticket = ticket
        self._wait_for_slot(ticket)

    def leave(self) -> None:
        """Handle a disconnected client. With the last event of a stream sent, the request counts as served."""
        if not self._is_over:
            has_all = self._relays and self._meter.has_ended and not self._meter.ends_in_error
            self._end(_SERVED if has_all else Outcome.CANCELLED)

    def pause(self) -> None:
        """Pause the engine's connection while the client reads too slowly."""
        self._is_paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._is_paused = False
        if self._connection is not None:
            self._connection.resume()

    def known(self) -> LiveRequest:
        """Return what is known of the request, which has not ended."""
        meter, ticket = self._meter, self._ticket
        return LiveRequest(
            self._request_id,
            ticket,
            self._shared.live[self],
            self._route(),
            self._client_name,
            "" if self._client is None else self._client.owner,
            self._answer.peer,
            self._streams,
            len(self._body) or self._held,
            meter.first_sec,
            meter.size,
            meter.pieces() if self._relays and self._streams else 0,
            self._placement.source if self._placement is not None else "",
        )

    def is_called(self, request_id: str) -> bool:
        return self._request_id == request_id

    def captured(self) -> Recording | None:
        """Return the recording of its bodies so far, if it is recorded."""
        return recording_of(self._answer)

    def forget_captured(self) -> None:
        forget(self._answer)

    def cancel(self, reason: str) -> None:
        """End the request, in whatever state, on behalf of somebody else than its connection.

        Its client gets an error, or an event with it that ends its stream. A stream whose last event was sent is
        complete.
        """
        error = ApiError(CANCELLED, Outcome.CANCELLED.value, reason)
        if self._ticket is None:
            self._refuse(error)
        else:
            self._break_off(error)

    def hang_up(self) -> None:
        """Close the connection after this response."""
        self._answer.keep_alive = False

    # --- the queue --------------------------------------------------------------------------------------

    def _wait_for_slot(self, ticket: Ticket) -> None:
        if ticket.decided:
            self._decided()
            return
        ticket.when_decided(partial(self.attempt, self._decided))
        self._waits = True
        self._shared.bodies.wait(self, ticket.priority, self._held)
        if self._streams and self._heartbeat is None:
            self._set_heartbeat()

    def _decided(self) -> None:
        ticket = self._ticket
        if self._is_over or ticket is None:
            return
        if self._waits:
            self._wait_no_more(ticket)
        if ticket.rejection is not None:
            said = ticket.rejection
            reason = self._told(ticket, said.reason)
            self._fail(refused(said.refusal, reason, said.retry_after_sec, is_final=said.is_final))
            return
        model = None
        if self._manner(ticket.alias) is not self._read_for:
            model = self._dispatcher.config.models.get(ticket.alias)
        if model is None:  # as usual, or as it was removed meanwhile
            self._ask()
        else:
            loop = asyncio.get_running_loop()
            reading = self._shared.readers.submit(self._translate_anew, model)
            reading.add_done_callback(
                lambda reading: loop.call_soon_threadsafe(self.attempt, self._was_translated, reading)
            )

    def _was_translated(self, reading: Future[Body]) -> None:
        failure = reading.exception()
        if self._is_over:  # its client has left
            return
        if isinstance(failure, ApiError):
            self._fail(self._advised(failure))
        else:
            self._body = reading.result()
            self._ask()

    def _ask(self) -> None:
        """Send the request to the engine that was granted."""
        assert self._ticket is not None
        engine = self._ticket.engine
        assert engine is not None
        self._shared.watch(self)
        keeper = engine.handle.keeper
        if keeper is not None and not self._ticket.slotless:
            self._placement = placement = self._placed(keeper)
            if placement is not None and not placement.is_ready:
                placement.when_ready(partial(self.attempt, self._send, engine))
                return
        self._send(engine)

    def _placed(self, keeper: Keeper) -> Placement | None:
        """Return the slot for the request; None: the engine chooses."""
        client, body = self._client, self._body
        owner, keeps = ("", True) if client is None else (client.owner, client.kv_store)
        if _KV_STORE in self._head.fields and self._head.fields[_KV_STORE].lower() == b"no-store":
            keeps = False
        known = body if isinstance(body, bytes) and self._path in KEPT else None
        return keeper.place(known, owner, keeps=keeps, is_plain=not self._names_slot)

    def _send(self, engine: RunningEngine) -> None:
        target, lines = self._asked_of_engine()
        receiver: Receiver = self
        body = self._body if self._placement is None else self._placement.told()
        if (question := self._question) is not None:
            target, lines = question.path.encode(), with_type(lines, DOCUMENT)
            receiver = question.understood_by(self)
        engine.pool.ask(self._head.method, target, self._id_line + lines, body, receiver)

    def _wait_no_more(self, ticket: Ticket) -> None:
        self._waits = False
        self._shared.bodies.wait_no_more(self, ticket.priority)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            self._heartbeat = None

    def give_way(self, reason: str) -> None:
        """Give up waiting because a request of higher priority needs the memory of this body."""
        assert self._ticket is not None
        self._dispatcher.displace(self._ticket, reason)
        if self._ticket.rejection is not None:
            self._decided()

    def _asked_of_engine(self) -> tuple[bytes, bytes]:
        """Target and forwarded headers of the engine's request.

        Many clients do not say that their JSON is JSON (curl's `-d`), and some engines take nothing else.
        """
        lines = self._head.forwarded
        if _JSON not in lines and self._head.path in ROUTES and not self._head.is_form:
            lines = with_type(lines, DOCUMENT)
        target = self._head.target if self._path == self._head.path else self._path.encode()
        return target, lines

    def _set_heartbeat(self) -> None:
        beat_sec = self._dispatcher.config.api.heartbeat_sec
        if beat_sec > 0:
            self._heartbeat = asyncio.get_running_loop().call_later(beat_sec, self.attempt, self._beat)

    def _beat(self) -> None:
        """Send a heartbeat in a waiting stream, so that clients and proxies do not time out."""
        ticket = self._ticket
        assert ticket is not None
        wait = self._dispatcher.wait_of(ticket)
        if not self._answer.started:
            self._status = 200
            self._answer.start(200, _EVENT_STREAM + self._lines_of(ticket) + self._lines_of_wait(ticket, wait))
        if wait is not None and not self._is_paused:
            to_go = "time to go unknown" if wait.expected_sec is None else f"~{wait.expected_sec:.0f} s to go"
            figures = f"position {wait.position}, waited {wait.waited_sec:.0f} s, {to_go}"
            self._answer.write(f": {figures}: {_one_line(self._told(ticket, wait.why))}\n\n".encode())
        self._set_heartbeat()

    def _told(self, ticket: Ticket, text: str) -> str:
        """Return as much of a reason as the client may see."""
        return text if self._client is not None else self._dispatcher.in_full(ticket.alias, text)

    def _lines_of_wait(self, ticket: Ticket, wait: Waiting | None) -> bytes:
        """Headers that describe the wait at the time when the response started."""
        if wait is None:
            return b""
        expected = b"unknown" if wait.expected_sec is None else b"%d" % round(wait.expected_sec * 1000)
        reason = _one_line(self._told(ticket, wait.why)).encode("ascii", "replace")
        figures = (wait.position, expected, reason)
        return b"x-queue-position: %d\r\nx-queue-expected-ms: %b\r\nx-queue-reason: %b\r\n" % figures

    # --- the engine -------------------------------------------------------------------------------------

    def connected(self, connection: Connection) -> None:
        if self._is_over:
            connection.close()
            return
        if self._connection is not None:  # the engine was just closing the one that the request was sent on before
            self._resends += 1
        self._connection = connection
        if self._is_paused:
            connection.pause()

    def received(self, head: Head, part: bytes, last: bool) -> None:
        if last:
            self._connection = None  # it is back in its pool
        if not self._relays:
            if head.is_encoded and not self._takes_encoded:
                raise BrokenAnswer.unreadable("it is compressed although no encoding was requested")
            if self._is_read_whole(head):
                self._gather(head, part, last)
                return
            if self._tells_end(head.status, part):
                self._give_up_engine()
                return
            self._start_relaying(head)
        if part:
            self._meter.note(part)
        if last:
            self._end_relaying(head, part)
        else:
            self._answer.write(part)

    def _tells_end(self, status: int, body: bytes) -> bool:
        """Whether an answer, or a part of it, is that of an engine that has failed or is ending."""
        engine = self._ticket.engine if self._ticket is not None else None
        if engine is None or (tells_end := engine.pool.endpoint.tells_end) is None or not tells_end(status, body):
            return False
        engine.is_ending = True
        return True

    def _give_up_engine(self) -> None:
        """Nothing of the answer has reached the client."""
        if self._connection is not None:
            self._connection.close()
        self.lost("the engine has failed or is ending")

    def _gather(self, head: Head, part: bytes, last: bool) -> None:
        """Collect an answer that is read completely before any of it is sent."""
        if last:
            self._answer_whole(head, bytes(self._gathered + part) if self._gathered else part)
            return
        self._gathered += part
        if head.content_length is None and len(self._gathered) > _BUFFERED_ANSWER:
            raise BrokenAnswer.unreadable("it is too long")

    def _end_relaying(self, head: Head, part: bytes) -> None:
        """Relay the last part of an answer, perhaps empty. Raises BrokenAnswer for a stream without its end."""
        if head.streams and not (self._meter.has_ended or self._meter.ends_in_error) and self._has_last_event():
            if part:
                self._answer.write(part)
            raise BrokenAnswer(ApiError(502, "engine_lost", "The engine ended the stream before its last event."))
        part = self._answer.rest(part)
        outcome = self._outcome_of_stream()
        self._answer.end(part)
        self._end(outcome)

    def _has_last_event(self) -> bool:
        """Whether streams of this route and engine have a last event that marks their end."""
        route, ticket = self._route_of_engine(), self._ticket
        if route is None or ticket is None or ticket.engine is None:
            return False
        return route.stream is Stream.CLOSED and ticket.engine.pool.endpoint.marks_end

    def _outcome_of_stream(self) -> Outcome:
        tells_end = self._tells_end(self._status, self._meter.tail)
        if not (tells_end or self._meter.ends_in_error):
            return _outcome(self._status)
        self._reason = "the engine has ended the stream with an error"  # the engine's message may quote the prompt
        return Outcome.ENGINE_ERROR

    def lost(self, reason: str) -> None:
        if self._is_over or self._ticket is None:
            return
        self._connection = None
        self._shared.unwatch(self)
        if self._relays:
            self._break_off(ApiError(502, "engine_lost", f"The engine's response was interrupted: {reason}."))
        else:
            self._gathered.clear()
            if (placement := self._placement) is not None:
                placement.keeper.ended(placement, NO_USAGE)
                self._placement = None
            self._dispatcher.requeue(self._ticket, reason)
            self._wait_for_slot(self._ticket)

    def attempt(self, step: Callable[..., None], *arguments: object) -> None:
        """Take a step on behalf of the event loop, which could not tell the client of an exception."""
        try:
            step(*arguments)
        except Exception as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Handle an answer that makes no sense, or a mistake of the router: the client gets an error, or its
        connection is cut so that the answer is seen to be incomplete.
        """
        if isinstance(error, BrokenAnswer) and not self._is_over:
            said = error.error
            outcome: str = _outcome(said.status)
        else:
            _log.error("request %s: the response could not be relayed", self._request_id, exc_info=error)
            said = ApiError(500, "internal_error", "Internal error of the router; see its log.")
            outcome = said.code
        if self._is_over:
            self._answer.abort()
            return
        try:
            self._fail(said, outcome)
        except Exception:
            _log.exception("request %s: the error could not be sent either", self._request_id)
            self._answer.abort()

    def must_have_moved(self, now: float, system: System) -> None:
        """Abort an exchange that occupies a slot without progress of its engine or its client.

        A silent engine that responds to probes is computing: a long prompt, or a response that is sent whole.
        """
        ticket = self._ticket
        assert ticket is not None
        connection = self._connection
        moved_sec = ticket.granted_sec if connection is None else connection.last_byte_sec
        limit_sec, longest_sec = system.request_timeout_sec, system.answer_timeout_sec
        engine = ticket.engine
        assert engine is not None
        if self._meter.size > _LONGEST_ANSWER:
            message = f"The engine's response exceeds {_LONGEST_ANSWER >> 30} GiB."
            self._break_off(ApiError(502, "engine_error", message))
        elif longest_sec is not None and now - moved_sec >= longest_sec:
            self._time_out(f"The engine sent nothing for {longest_sec:g} s (answer_timeout_sec).")
        elif now - moved_sec < limit_sec:
            return
        elif self._is_paused:
            self._end(Outcome.CANCELLED)
            self._answer.abort()
        elif connection is None or not connection.is_open:
            self._time_out(f"The engine could not be reached for {limit_sec:g} s (request_timeout_sec).")
        elif connection.stopped_midway:  # nothing is being computed, whatever probes say
            self._time_out(f"The engine's response paused for {limit_sec:g} s (request_timeout_sec).")
        elif engine.failed_probes and now - engine.alive_sec >= limit_sec:
            self._time_out(
                f"The engine sent nothing and answered no probes for {limit_sec:g} s (request_timeout_sec)."
            )

    def _time_out(self, reason: str) -> None:
        self._break_off(ApiError(504, "request_timeout", reason))

    def _break_off(self, error: ApiError) -> None:
        """End an interrupted response. A stream whose last event has been sent is complete."""
        if self._relays and self._streams and not self._answer.has_length and self._meter.has_ended:
            rest = self._answer.rest(b"")
            outcome = self._outcome_of_stream()
            self._answer.end(rest)
            self._end(outcome)
        else:
            self._fail(error)

    _takes_encoded = False
    """True if the client's accepted encodings are forwarded."""

    def _is_read_whole(self, head: Head) -> bool:
        if self._answer.started:  # after heartbeats, only events may follow
            return head.status != 200 or not head.streams
        if head.content_length is None:
            return head.status >= 400
        return head.content_length <= _BUFFERED_ANSWER

    def _answer_whole(self, head: Head, body: bytes) -> None:
        ticket = self._ticket
        assert ticket is not None
        if self._tells_end(head.status, body):
            self._give_up_engine()
            return
        if head.status >= 400:
            refusal = refused_by_engine(head.status, body, ticket.alias, self._dispatcher.config.models)
            if refusal is not None:
                self._fail(refusal)
                return
        error = None
        if head.status >= 400:
            error = error_of_engine(head.status, body, form_of(self._head.path))
        self._status = head.status if error is None else error.status
        if self._answer.started:
            if error is None:
                raise BrokenAnswer.unreadable("it is a single document instead of a stream")
            self._answer.break_off(self._event_of(error))
        else:
            self._meter.note(body)
            if error is None:
                self._answer.whole(head.status, head.lines + self._lines_of(ticket), self._answer.told(body))
            else:
                self._write_error(error, self._lines_of(ticket))
        self._end(_outcome(self._status))

    def _start_relaying(self, head: Head) -> None:
        assert self._ticket is not None
        self._relays = True
        self._status = head.status
        if not self._answer.started:
            lines = head.lines + self._lines_of(self._ticket)
            self._answer.start(head.status, lines, head.content_length)

    def _lines_of(self, ticket: Ticket) -> bytes:
        lines = self._id_line + self._lines + _alias_line(ticket.alias)
        if ticket.engine is None:
            return lines
        if self._placement is not None:
            lines += _KV_LINES[self._placement.source]
        figures = (lines, ticket.queue_sec * 1000 + 0.5, ticket.load_sec * 1000 + 0.5)
        return b"%bx-queue-ms: %d\r\nx-load-ms: %d\r\n" % figures

    # --- the end ----------------------------------------------------------------------------------------

    def _refuse(self, error: ApiError) -> None:
        """Refuse a request that was never queued."""
        self._status = error.status
        self._reason = error.message
        self._end(error.code)
        self._received = b""
        self._write_error(error, self._id_line + self._lines)

    def _fail(self, error: ApiError, outcome: str = "") -> None:
        """End the request with an error, as far as its client can still get one. `outcome`: see `RequestDone`."""
        self._reason = error.message
        if not self._answer.started:
            self._status = error.status
        self._end(outcome or error.code)
        if not self._answer.started:
            self._write_error(error, self._id_line + self._lines)
        elif self._streams and not self._answer.has_length:
            self._answer.break_off(self._event_of(error))
        else:
            self._answer.abort()  # a partial document must not look complete

    def _write_error(self, error: ApiError, lines: bytes) -> None:
        own = b"".join(b"%b: %b\r\n" % header for header in error.headers())
        self._answer.whole(error.status, own + lines, error.body(self._head.path))

    def _event_of(self, error: ApiError) -> bytes:
        """Error event that ends a started stream."""
        return error.event(self._head.path)

    def _end(self, outcome: str) -> None:
        """Release all resources and publish the outcome. Remaining output may still be written."""
        self._is_over = True
        self._shared.unwatch(self)
        self._shared.live.pop(self, None)
        if self._shared.captures.enabled:
            self._shared.captures.keep(self._request_id, self._answer)
        if self._connection is not None:
            if self._burden:
                self._held -= self._burden
                self._shared.release_later(self._burden)
            self._connection.close()
            self._connection = None
        self._shared.bodies.release(self._held)
        if self._ticket is not None:
            if self._waits:
                self._wait_no_more(self._ticket)
            served = outcome is _SERVED
            computed = served and self._meter.size > 0 and not self._ticket.slotless
            self._dispatcher.finish(
                self._ticket, served=served or outcome is Outcome.ENGINE_REFUSED, computed=computed
            )
        self._publish(self._ticket, outcome)
        if self._large is not None:
            self._shared.readers.submit(_give_back, self._large, self._body)

    def _publish(self, ticket: Ticket | None, outcome: str) -> None:
        """Publish the one `RequestDone`. Without a ticket, the request was refused before it was queued."""
        now, at = time.monotonic(), time.time()
        admission = self._head.admission
        peer = self._answer.peer if admission is None else admission.peer
        owner = "" if self._client is None else self._client.owner
        if ticket is None:
            done = RequestDone(
                request_id=self._request_id,
                alias="",
                route=self._route(),
                priority="",
                outcome=outcome,
                status=self._status,
                queue_sec=0.0,
                load_sec=0.0,
                total_sec=0.0,
                at=at,
                trace=self._trace(),
                reason=self._reason,
                streamed=self._streams,
                request_bytes=len(self._body),
                client=self._client_name,
                peer=peer,
                refused=outcome is not _SERVED,
                owner=owner,
            )
        else:
            meter, arrival_sec = self._meter, ticket.arrival_sec
            try:
                usage = self._usage()
            except Exception:  # the request must end exactly once, whatever its engine reports
                _log.exception("request %s: the tokens of the response could not be counted", self._request_id)
                usage = NO_USAGE
            kv, placement, engine = "", self._placement, ticket.engine
            if placement is not None:
                kv = placement.keeper.ended(placement, usage)
                self._placement = None
            done = RequestDone(  # by position: keywords would take as long as all metrics together
                self._request_id,
                ticket.alias,
                self._route(),
                NAMES[ticket.priority],
                outcome,
                self._status,
                ticket.queue_sec if ticket.decided else now - arrival_sec,
                ticket.load_sec,
                now - arrival_sec,
                at,
                self._trace(),
                self._reason,
                None if meter.first_sec is None else meter.first_sec - arrival_sec,
                self._streams,
                len(self._body),
                meter.size,
                ticket.retries,
                self._resends,
                usage,
                ticket.client,
                peer,
                kv,
                ticket.rejection is not None,
                owner,
                None if engine is None else engine.id,
                ticket.attempts,
            )
        self._dispatcher.events.done(done)

    def _usage(self) -> Usage:
        """Token counts reported in the response."""
        return self._meter.usage()

    def _trace(self) -> str:
        """Trace context of the client, if any."""
        trace = self._head.fields.get(b"traceparent", b"")
        return trace.decode("latin-1") if len(trace) <= _LONGEST_TRACE else ""


def _give_back(large: LargeMemory, body: Body) -> None:
    if isinstance(body, Pieces):
        body.give_back()
    large.give_back()


def _one_line(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _outcome(status: int) -> Outcome:
    if status < 400:
        return _SERVED
    return Outcome.ENGINE_REFUSED if status < 500 else Outcome.ENGINE_ERROR


@lru_cache(maxsize=1024)
def _alias_line(alias: str) -> bytes:
    return f"x-model-alias: {quote(alias, safe='/:@ ')}\r\n".encode()
