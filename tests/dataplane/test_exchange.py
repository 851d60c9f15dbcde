"""An exchange in each of its states, and every event that can happen in it: a table.

Client, dispatcher and engine are played in this process: each request is brought into a state, and then one event
happens. Stories with real engines are in `tests/runtime` and `tests/chaos`.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
from played_router import CONFIG, PlayedRouter, PlayedTransport

from router.config.schema import Capture
from router.dataplane.answer import BrokenAnswer
from router.dataplane.exchange import Exchange
from router.engines.upstream import Body, Connection, Receiver
from router.observe.events import ModelsListed
from router.runtime.dispatcher import Ticket
from router.scheduling.messages import Refusal, Reject

HEAD = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DOCUMENT = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
LAST_EVENT = b"data: [DONE]\n\n"
LONG_AGO_SEC = 1_000.0


def chunk(part: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(part), part)


class Lane(PlayedRouter):
    """A router with one request, which gets a slot and a connection when it is told so."""

    def __init__(self, path: str = "/v1/chat/completions", *, streams: bool = True) -> None:
        super().__init__()
        self.engine = self._engine
        self.engine.pool.ask = self._ask
        self.told: list[str] = []
        """What the dispatcher has heard."""
        self.ticket: Ticket | None = None
        self.held: tuple[bytes, Receiver] | None = None
        body = json.dumps({"model": "a", "messages": [], "stream": streams}).encode()
        self._request = HEAD % (path.encode(), len(body)) + body
        self.protocol, self.client_end = self.client()

    # --- how far it is led ----------------------------------------------------------------------------------

    def come_in_part(self) -> None:
        self.protocol.data_received(self._request[:-5])

    def come(self) -> None:
        self.protocol.data_received(self._request)

    async def be_granted(self) -> None:
        assert self.ticket is not None
        self.ticket.decide(time.monotonic(), self.engine, None)
        await asyncio.sleep(0)

    def be_connected(self) -> None:
        assert self.held is not None
        head, receiver = self.held
        connection = Connection(cast(Any, self.engine.pool))
        transport = PlayedTransport(connection, self.descriptor)
        connection.connection_made(cast(asyncio.Transport, transport))
        self.engines.append(connection)
        connection.send(head, b"", receiver)

    def engine_says(self, data: bytes) -> None:
        self.engines[-1].data_received(data)

    @property
    def exchange(self) -> Exchange:
        turn = self.protocol._turn if self._begun is None else self._begun
        assert isinstance(turn, Exchange)
        self._begun = turn
        return turn

    _begun: Exchange | None = None

    # --- the dispatcher and the engine's pool ---------------------------------------------------------------

    def _ask(self, method: bytes, target: bytes, lines: bytes, body: Body, receiver: Receiver) -> None:
        self.held = (b"%b %b\r\n%b\r\n" % (method, target, lines), receiver)

    def submit(
        self, request_id: str, alias: str, priority: Any, client: str = "", *, slotless: bool = False
    ) -> Ticket:
        now = time.monotonic()
        self.ticket = Ticket(request_id, alias, priority, now, now, client, slotless)
        return self.ticket

    def requeue(self, ticket: Ticket, reason: str) -> None:
        ticket.engine = None
        self.told.append("again")

    def finish(self, ticket: Ticket, *, served: bool, computed: bool) -> None:
        self.told.append("over, and computed" if computed else "over" if served else "over, in vain")

    def displace(self, ticket: Ticket, reason: str) -> None:
        ticket.decide(0.0, None, Reject(ticket.id, Refusal.DISPLACED, reason))


# --- states ---------------------------------------------------------------------------------------------------


async def reading(lane: Lane) -> None:
    """Of its body, some is here."""
    lane.come_in_part()
    assert lane.exchange is not None


async def waiting(lane: Lane) -> None:
    """In the queue."""
    lane.come()
    assert lane.exchange is not None


async def granted(lane: Lane) -> None:
    """It has a slot, and no connection yet."""
    await waiting(lane)
    await lane.be_granted()


async def asking(lane: Lane) -> None:
    """Its engine has been asked, and has said nothing."""
    await granted(lane)
    lane.be_connected()


async def gathering(lane: Lane) -> None:
    """Of a document that is read whole, some is here."""
    await asking(lane)
    lane.engine_says(DOCUMENT + b'{"choices"')


async def relaying(lane: Lane) -> None:
    """Of a stream, some has reached the client."""
    await asking(lane)
    lane.engine_says(STREAM + chunk(EVENT))


async def complete(lane: Lane) -> None:
    """Of a stream, the last event has reached the client, and its end has not come."""
    await relaying(lane)
    lane.engine_says(chunk(LAST_EVENT))


async def stuck(lane: Lane) -> None:
    """As `relaying`, and its client does not read."""
    await relaying(lane)
    lane.exchange.pause()


# --- what happens ---------------------------------------------------------------------------------------------


async def leaves(lane: Lane) -> None:
    """The client is gone."""
    exchange = lane.exchange
    lane.protocol.connection_lost(None)
    assert exchange._is_over


async def is_cancelled(lane: Lane) -> None:
    """An operator ends it."""
    assert lane.exchange in lane._exchanges.live
    lane.exchange.cancel("It is not wanted.")


async def refused(lane: Lane) -> None:
    """Its model failed."""
    assert lane.ticket is not None
    lane.ticket.decide(0.0, None, Reject(lane.ticket.id, Refusal.MODEL_FAILED, "It is broken."))
    await asyncio.sleep(0)


async def displaced(lane: Lane) -> None:
    """Others need the memory of its body."""
    lane.exchange.give_way("Others came.")


async def is_lost(lane: Lane) -> None:
    """Its engine is gone."""
    if lane.engines:
        lane.engines[-1].break_off()
    else:
        lane.exchange.lost("it died")


async def is_garbled(lane: Lane) -> None:
    """Its engine says what makes no sense."""
    lane.exchange.failed(BrokenAnswer.unreadable("it is none"))


async def breaks(lane: Lane) -> None:
    """The router makes a mistake."""
    lane.exchange.failed(ZeroDivisionError())


async def is_silent(lane: Lane) -> None:
    """Nothing moves for longer than anybody may be silent, though the engine answers probes."""
    lane.exchange.must_have_moved(time.monotonic() + LONG_AGO_SEC, CONFIG.system)


async def is_silent_and_deaf(lane: Lane) -> None:
    """The same, and the engine answers no probe."""
    lane.engine.failed_probes = 3
    await is_silent(lane)


async def ends(lane: Lane) -> None:
    """Its engine's answer ends."""
    lane.engine_says(b"0\r\n\r\n")


async def ends_document(lane: Lane) -> None:
    """The rest of a document comes."""
    lane.engine_says(b":[]      }")


State = Happening = Callable[[Lane], Any]

WAITS, GONE = "it waits on", "nothing more is said"
TABLE: Mapping[tuple[State, Happening], tuple[str, list[str], str]] = {
    # what happens where: what the client sees, what the dispatcher hears, what the request is counted as
    (reading, leaves): (GONE, [], "cancelled"),
    (reading, breaks): ("500 internal_error", [], "internal_error"),
    (reading, is_cancelled): ("499 cancelled", [], "cancelled"),
    (waiting, leaves): (GONE, ["over, in vain"], "cancelled"),
    (waiting, refused): ("503 model_failed", ["over, in vain"], "model_failed"),
    (waiting, displaced): ("429 displaced", ["over, in vain"], "displaced"),
    (waiting, breaks): ("500 internal_error", ["over, in vain"], "internal_error"),
    (waiting, is_cancelled): ("499 cancelled", ["over, in vain"], "cancelled"),
    (granted, leaves): (GONE, ["over, in vain"], "cancelled"),
    (granted, is_lost): (WAITS, ["again"], ""),
    (granted, is_silent): ("504 request_timeout", ["over, in vain"], "request_timeout"),
    (granted, breaks): ("500 internal_error", ["over, in vain"], "internal_error"),
    (granted, is_cancelled): ("499 cancelled", ["over, in vain"], "cancelled"),
    (asking, leaves): (GONE, ["over, in vain"], "cancelled"),
    (asking, is_lost): (WAITS, ["again"], ""),
    (asking, is_garbled): ("502 engine_error", ["over, in vain"], "engine_error"),
    (asking, breaks): ("500 internal_error", ["over, in vain"], "internal_error"),
    (asking, is_silent): (WAITS, [], ""),
    (asking, is_silent_and_deaf): ("504 request_timeout", ["over, in vain"], "request_timeout"),
    (asking, is_cancelled): ("499 cancelled", ["over, in vain"], "cancelled"),
    (gathering, leaves): (GONE, ["over, in vain"], "cancelled"),
    (gathering, is_lost): (WAITS, ["again"], ""),
    (gathering, is_garbled): ("502 engine_error", ["over, in vain"], "engine_error"),
    (gathering, breaks): ("500 internal_error", ["over, in vain"], "internal_error"),
    (gathering, is_silent): ("504 request_timeout", ["over, in vain"], "request_timeout"),
    (gathering, ends_document): ("200 whole", ["over, and computed"], "served"),
    (gathering, is_cancelled): ("499 cancelled", ["over, in vain"], "cancelled"),
    (relaying, leaves): (GONE, ["over, in vain"], "cancelled"),
    (relaying, is_lost): ("event engine_lost", ["over, in vain"], "engine_lost"),
    (relaying, is_garbled): ("event engine_error", ["over, in vain"], "engine_error"),
    (relaying, breaks): ("event internal_error", ["over, in vain"], "internal_error"),
    (relaying, is_silent): (WAITS, [], ""),
    (relaying, is_silent_and_deaf): ("event request_timeout", ["over, in vain"], "request_timeout"),
    (relaying, ends): ("event engine_lost", ["over, in vain"], "engine_error"),
    (relaying, is_cancelled): ("event cancelled", ["over, in vain"], "cancelled"),
    (complete, leaves): (GONE, ["over, and computed"], "served"),
    (complete, is_lost): ("stream whole", ["over, and computed"], "served"),
    (complete, ends): ("stream whole", ["over, and computed"], "served"),
    (complete, is_silent_and_deaf): ("stream whole", ["over, and computed"], "served"),
    (complete, is_cancelled): ("stream whole", ["over, and computed"], "served"),
    (stuck, leaves): (GONE, ["over, in vain"], "cancelled"),
    (stuck, is_silent): ("cut", ["over, in vain"], "cancelled"),
    (stuck, is_cancelled): ("event cancelled", ["over, in vain"], "cancelled"),
    (stuck, is_lost): ("event engine_lost", ["over, in vain"], "engine_lost"),
}


def seen(transport: PlayedTransport) -> str:
    """By the client."""
    written = bytes(transport.written)
    if transport.aborted:
        return "cut"
    code = re.search(rb'"code":"(\w+)"', written)
    if written.endswith(b"\r\n0\r\n\r\n"):
        assert written.count(LAST_EVENT) == 1, "a stream ends once"
        return f"event {code[1].decode()}" if code else "stream whole"
    if written and b"event-stream" not in written:
        assert written.count(b"HTTP/1.1 ") == 1, "a request has one answer"
        return f"{written[9:12].decode()} {code[1].decode() if code else 'whole'}"
    return ""


@pytest.mark.parametrize(
    ("state", "happens", "expected"),
    [(*key, expected) for key, expected in TABLE.items()],
    ids=[f"{state.__name__}-{happens.__name__}" for state, happens in TABLE],
)
def test_whatever_happens_a_request_is_ended_once_and_as_it_should(
    state: State, happens: Happening, expected: tuple[str, list[str], str]
) -> None:
    async def story() -> None:
        lane = Lane()
        try:
            await state(lane)
            before = bytes(lane.client_end.written)
            await happens(lane)
            client, dispatcher, outcome = expected
            assert lane.told == dispatcher
            assert [done.outcome for done in lane.done_requests] == [outcome][: bool(outcome)]
            if client in (WAITS, GONE):
                assert bytes(lane.client_end.written) == before
            else:
                assert seen(lane.client_end) == client
            assert all(not engine.is_open for engine in lane.engines) or not outcome, "its slot is free"
            assert len(lane._exchanges.live) == (not outcome)
            if outcome:
                await nothing_more(lane)
        finally:
            lane.close()

    asyncio.run(story())


async def nothing_more(lane: Lane) -> None:
    """A request that is over is over, whatever comes."""
    exchange, written, ended = lane._begun, bytes(lane.client_end.written), len(lane.done_requests)
    assert exchange is not None
    exchange.add_body(b"more")
    exchange.end_body()
    exchange.leave()
    if lane.held is not None:
        exchange.lost("it died")
    await asyncio.sleep(0)
    assert (bytes(lane.client_end.written), len(lane.done_requests)) == (written, ended)


def test_of_a_trace_context_no_more_is_kept_than_it_may_have() -> None:
    """The last requests are remembered, also those of strangers."""

    async def story() -> None:
        router = PlayedRouter()
        for length in (55, 8_000):
            protocol, _ = router.client()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTraceparent: %b\r\n\r\n"
            protocol.data_received(head % (b"0" * length))
        assert [done.trace for done in router.done_requests] == ["0" * 55, ""]
        router.close()

    asyncio.run(story())


def test_what_is_recorded_is_forgotten_when_that_is_switched_off_also_of_those_in_flight() -> None:
    async def story() -> None:
        lane = Lane()
        captures = lane._exchanges.captures
        captures.set(Capture(requests=1))
        await relaying(lane)
        recording = lane.exchange.captured()
        assert recording is not None
        assert '"content":"hi"' in recording.captured().answer
        lane._exchanges._configured(ModelsListed(0.0))  # which captures nothing
        captures.set(Capture(requests=1))
        assert lane.exchange.captured() is None
        await is_cancelled(lane)
        (done,) = lane.done_requests
        assert (done.outcome, captures.of(done.request_id)) == ("cancelled", None)
        lane.close()

    asyncio.run(story())
