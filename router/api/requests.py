"""Requests of the data plane one by one: those that have not ended, and the last ones that have.

Live ones are what the exchanges and the dispatcher know at the moment, ended ones what was reported at their end.
Nothing is put into words before somebody asks, and then in turns, as there may be thousands.

The id of a request may be its client's, and so another one may have had it before: an id means the live request,
else the last one that has ended, among those that whoever asks may see.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request

from router.api.live import Live
from router.api.models import iso
from router.api.request_timeline import Story, timeline
from router.config.names import meant
from router.dataplane.capture import Recording
from router.dataplane.exchange import Exchange, Exchanges, LiveRequest
from router.http.auth import Client, sees_all
from router.http.documents import Document
from router.http.errors import ApiError
from router.http.pages import Page, Right, needs
from router.observe.events import RequestDone
from router.observe.recent import RecentRequests
from router.observe.usage import NO_USAGE
from router.runtime.dispatcher import Dispatcher
from router.runtime.wait_log import WaitLog
from router.scheduling.queue import NAMES
from router.scheduling.residency import engine_name
from router.system.turns import in_turns

router = APIRouter(tags=["monitoring"], route_class=Page)

_MOST = 10_000
_MILLISECOND = 0.001
"""Precision of the times that are shown: a request that ended in the one that is named is not new."""
_CURSOR = re.compile(r"([0-9a-f]+)-(\d{1,18})")

State = Literal["receiving", "queued", "granted", "streaming", "done", "live"]
_NO_SUCH_REQUEST: dict[int | str, dict[str, Any]] = {404: {"description": "No such request is kept."}}


class Row(msgspec.Struct):
    """One request, as shown to users. Times in seconds; None for what is not known, or not yet."""

    id: str
    state: str
    """`receiving` (its body), `queued`, `granted` (an engine), `streaming` (its answer has begun), `done`."""
    model: str | None
    client: str | None
    peer: str | None
    route: str
    priority: str | None
    outcome: str | None
    """See `Outcome`, or the code of the error."""
    status: int | None
    reason: str | None
    """The error message that its client received."""
    why: str | None
    """What it waits for."""
    arrived_at: str
    ended_at: str | None
    waited_sec: float
    load_sec: float
    ttft_sec: float | None
    total_sec: float
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    kv: str | None
    engine: str | None
    streamed: bool
    request_bytes: int
    answer_bytes: int
    retries: int
    position: int | None
    expected_wait_sec: float | None
    number: int | None
    """Number among the requests that have ended since the start of the router; None for a live one."""


_encode = msgspec.json.Encoder().encode


@router.get("/v1/requests")
@needs(Right.USE)
async def requests(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=_MOST, description="Most live and most ended requests listed.")] = 100,
    model: Annotated[str | None, Query(description="Only requests for this model.")] = None,
    client: Annotated[str | None, Query(description="Only requests of this client.")] = None,
    outcome: Annotated[
        str | None, Query(description="Only requests that ended so: `served`, `queue_full`, …")
    ] = None,
    state: Annotated[
        State | None, Query(description="Only requests in this state; `live`: all but `done`.")
    ] = None,
    since: Annotated[
        str | None,
        Query(
            description="`cursor` of an earlier answer, or a time (ISO 8601): besides live requests, only those "
            "that have ended since."
        ),
    ] = None,
) -> Document:
    """Requests that have not ended, newest first, then the last ones that have; a key for inference gets its own.

    `kept` is the number of ended requests that are kept at most, `total` that of all since the start, `live` that
    of requests that have not ended. `since` is repeated if the answer continues there; null: it is complete.
    """
    now = _Now(request)
    recent: RecentRequests = request.app.state.recent_requests
    total = recent.total
    after, until_sec = now.begin(since, total)
    alias = None if model is None else now.alias_of(model)
    live: list[msgspec.Raw] = []
    count = 0
    async for exchange in in_turns(list(now.live())):
        row = now.row_of_live(exchange, is_one_of_many=True)
        count += row is not None
        wanted = row is not None and outcome is None and _is_wanted(row, alias, client, state)
        if wanted and len(live) < limit:
            live.append(msgspec.Raw(_encode(row)))
    ended: list[msgspec.Raw] = []
    kept = [] if state not in (None, "done") else recent.newest_first()
    async for number, done in in_turns(kept):
        if len(ended) == limit or number <= after or done.at < until_sec:
            break
        if (
            now.sees(done.owner)
            and (outcome is None or done.outcome == outcome)
            and (alias is None or done.alias == alias)
            and (client is None or done.client == client)
        ):
            ended.append(msgspec.Raw(_encode(now.row_of_ended(number, done))))
    system = now.dispatcher.config.system
    return Document(
        {
            "requests": live + ended,
            "kept": system.requests_kept,
            "total": total,
            "live": count,
            "cursor": now.cursor(total),
            "since": since if after or until_sec else None,
            "capture": system.capture.requests,
        }
    )


@router.get("/v1/requests/{request_id:path}", responses=_NO_SUCH_REQUEST)
@needs(Right.USE)
async def one_request(request_id: str, request: Request) -> Document:
    """One request with its `timeline`: why it waited, what its model did meanwhile, and how it ended.

    `capture` has the texts of the `request` and its `answer` for full keys, while `system.capture` is on.
    """
    now = _Now(request)
    exchange = now.find_live(request_id)
    row: Row | None
    if exchange is not None and (row := now.row_of_live(exchange)) is not None:
        story, recording = now.story_of_live(exchange.known()), exchange.captured()
    else:
        number, done = now.find_ended(request_id)
        row, story = now.row_of_ended(number, done), now.story_of_ended(done)
        recording = now.exchanges.captures.of(request_id)
    return Document(
        {
            **msgspec.structs.asdict(row),
            "timeline": now.timeline(story),
            "capture": await _captured(recording) if now.full and now.exchanges.captures.enabled else None,
        }
    )


@router.delete(
    "/v1/requests/{request_id:path}",
    responses={**_NO_SUCH_REQUEST, 409: {"description": "It has ended already."}},
)
@needs(Right.USE)
async def cancel_request(request_id: str, request: Request) -> Document:
    """Cancel a request that has not ended, and free its place in the queue or in the engine at once.

    Its client gets an error 499 `cancelled`, or in a stream an event with it. A key for inference cancels its own.
    """
    now = _Now(request)
    exchange = now.find_live(request_id)
    if exchange is None:
        now.find_ended(request_id)
        raise ApiError(409, "request_ended", "The request has ended already.", "id")
    who = "An operator" if now.full else "Its client"
    exchange.cancel(f"{who} cancelled the request (DELETE /v1/requests).")
    recent: RecentRequests = request.app.state.recent_requests
    number, done = recent.total, recent.last
    assert done is not None
    return Document(msgspec.structs.asdict(now.row_of_ended(number, done)))


async def _captured(recording: Recording | None) -> dict[str, str] | None:
    if recording is None:
        return None
    return (await asyncio.to_thread(recording.captured))._asdict()


def _is_wanted(row: Row, alias: str | None, client: str | None, state: str | None) -> bool:
    return (
        (alias is None or row.model == alias)
        and (client is None or row.client == client)
        and (state in (None, "live") or row.state == state)
    )


class _Now:
    """The requests as one requester may see them."""

    def __init__(self, request: Request) -> None:
        self.full = sees_all(request)
        self.dispatcher: Dispatcher = request.app.state.dispatcher
        self.exchanges: Exchanges = request.app.state.exchanges
        self._recent: RecentRequests = request.app.state.recent_requests
        self._live: Live = request.app.state.live
        self._waits: WaitLog = request.app.state.waits
        client: Client | None = request.state.client
        self._owner = None if client is None else client.owner
        self._wall_sec = time.time() - time.monotonic()
        """The epoch's second zero of the monotonic clock."""

    def sees(self, owner: str) -> bool:
        return self._owner is None or owner == self._owner

    # --- which requests -----------------------------------------------------------------------------------

    def live(self) -> Iterator[Exchange]:
        return reversed(self.exchanges.live)

    def find_live(self, request_id: str) -> Exchange | None:
        """Return a request that has not ended; one that is queued before one that is only coming in."""
        found = [exchange for exchange in self.live() if exchange.is_called(request_id)]
        seen = [exchange for exchange in found if self.sees(exchange.known().owner)]
        return min(seen, key=lambda exchange: exchange.known().ticket is None, default=None)

    def find_ended(self, request_id: str) -> tuple[int, RequestDone]:
        """Return the last request with this id. Raises ApiError 404."""
        for number, done in self._recent.newest_first():
            if done.request_id == request_id and self.sees(done.owner):
                return number, done
        kept = self.dispatcher.config.system.requests_kept
        message = (
            f"There is no request {request_id!r} among the live ones and the last {kept} (system.requests_kept)."
        )
        raise ApiError(404, "request_not_found", message, "id")

    def alias_of(self, name: str) -> str:
        """Return a model's own name; or the name itself, as the model may be gone."""
        config = self.dispatcher.config
        known = meant(name, config)
        return name if known is None else config.model_of(known).alias

    def cursor(self, total: int) -> str:
        return f"{self._live.run}-{total}"

    def begin(self, since: str | None, total: int) -> tuple[int, float]:
        """Return the number and the time after which requests are asked for. Raises ApiError 400."""
        if since is None:
            return 0, 0.0
        if (cursor := _CURSOR.fullmatch(since)) is not None:
            after = int(cursor[2])
            return (after, 0.0) if cursor[1] == self._live.run and after <= total else (0, 0.0)
        try:
            at = datetime.fromisoformat(since.strip().replace(" ", "+").replace("Z", "+00:00"))
            return 0, (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp() + _MILLISECOND
        except (ValueError, OverflowError):
            message = f"`since` must be a cursor or a time such as {iso(time.time())}, not {since!r}."
            raise ApiError(400, "invalid_request", message, "since") from None

    # --- how they are shown -------------------------------------------------------------------------------

    def row_of_live(self, exchange: Exchange, *, is_one_of_many: bool = False) -> Row | None:
        """Return the row of a request; None if it has ended meanwhile, or is not to be seen."""
        if exchange not in self.exchanges.live:
            return None
        known = exchange.known()
        if not self.sees(known.owner):
            return None
        now, ticket = time.monotonic(), known.ticket
        began_sec = known.begun_sec if ticket is None else ticket.arrival_sec
        wait = None
        if ticket is not None and not ticket.decided:
            wait = self.dispatcher.wait_of(ticket, is_one_of_many=is_one_of_many)
        has_engine = ticket is not None and ticket.engine is not None
        return Row(
            id=known.id,
            state=_state(known),
            model=None if ticket is None else ticket.alias,
            client=known.client or None,
            peer=known.peer or None,
            route=known.route,
            priority=None if ticket is None else NAMES[ticket.priority],
            outcome=None,
            status=None,
            reason=None,
            why=self._told(ticket.alias, wait.why) if ticket is not None and wait is not None else None,
            arrived_at=iso(self._wall_sec + began_sec),
            ended_at=None,
            waited_sec=_rounded(
                0.0 if ticket is None else ticket.queue_sec if ticket.decided else now - began_sec
            ),
            load_sec=_rounded(0.0 if ticket is None else ticket.load_sec),
            ttft_sec=None if known.first_sec is None else _rounded(known.first_sec - began_sec),
            total_sec=_rounded(now - began_sec),
            prompt_tokens=None,
            cached_tokens=None,
            output_tokens=known.output_tokens if known.first_sec is not None else None,
            kv=known.kv or None,
            engine=engine_name(ticket.alias, ticket.engine.id)
            if ticket is not None and ticket.engine is not None
            else None,
            streamed=known.streamed,
            request_bytes=known.request_bytes,
            answer_bytes=known.answer_bytes,
            retries=0 if ticket is None else ticket.retries,
            position=None if wait is None or has_engine else wait.position,
            expected_wait_sec=None if wait is None or wait.expected_sec is None else round(wait.expected_sec, 2),
            number=None,
        )

    def row_of_ended(self, number: int, done: RequestDone) -> Row:
        usage = done.usage
        is_counted = usage != NO_USAGE
        return Row(
            id=done.request_id,
            state="done",
            model=done.alias or None,
            client=done.client or None,
            peer=done.peer or None,
            route=done.route,
            priority=done.priority or None,
            outcome=done.outcome,
            status=done.status or None,
            reason=self._told(done.alias, done.reason) or None,
            why=None,
            arrived_at=iso(done.at - done.total_sec),
            ended_at=iso(done.at),
            waited_sec=_rounded(done.queue_sec),
            load_sec=_rounded(done.load_sec),
            ttft_sec=None if done.ttft_sec is None else _rounded(done.ttft_sec),
            total_sec=_rounded(done.total_sec),
            prompt_tokens=usage.prompt_tokens or None,  # unknown if the answer was broken off
            cached_tokens=usage.cached_tokens if usage.prompt_tokens else None,
            output_tokens=usage.output_tokens if is_counted else None,
            kv=done.kv or None,
            engine=None if done.engine_id is None else engine_name(done.alias, done.engine_id),
            streamed=done.streamed,
            request_bytes=done.request_bytes,
            answer_bytes=done.answer_bytes,
            retries=done.retries,
            position=None,
            expected_wait_sec=None,
            number=number,
        )

    def _told(self, alias: str, text: str) -> str:
        return self.dispatcher.in_full(alias, text) if self.full and text else text

    # --- what happened to one -----------------------------------------------------------------------------

    def story_of_live(self, known: LiveRequest) -> Story:
        ticket = known.ticket
        if ticket is None:
            return Story("", self._wall_sec + known.begun_sec, "")
        engine = ticket.engine
        return Story(
            ticket.alias,
            self._wall_sec + ticket.arrival_sec,
            NAMES[ticket.priority],
            None if engine is None else engine.id,
            None if engine is None else self._wall_sec + ticket.granted_sec,
            ticket.load_sec,
            known.kv,
            None if known.first_sec is None else self._wall_sec + known.first_sec,
            attempts=ticket.attempts,
        )

    def story_of_ended(self, done: RequestDone) -> Story:
        arrived_at = done.at - done.total_sec
        return Story(
            done.alias,
            arrived_at,
            done.priority,
            done.engine_id,
            None if done.engine_id is None else arrived_at + done.queue_sec,
            done.load_sec,
            done.kv,
            None if done.ttft_sec is None else arrived_at + done.ttft_sec,
            done.at,
            done.outcome,
            done.status,
            self._told(done.alias, done.reason),
            done.usage,
            done.attempts,
        )

    def timeline(self, story: Story) -> list[dict[str, Any]]:
        now = time.time()
        until = next((at for at in (story.granted_at, story.ended_at) if at is not None), now)
        waits = [
            noted._replace(reason=self._told(story.alias, noted.reason))
            for noted in self._waits.between(story.alias, story.arrived_at, until)
        ]
        return timeline(story, waits, self._live.decisions[self.full], now)


def _state(known: LiveRequest) -> str:
    if known.ticket is None:
        return "receiving"
    if known.ticket.engine is None:
        return "queued"
    return "granted" if known.first_sec is None else "streaming"


def _rounded(seconds: float) -> float:
    return round(max(0.0, seconds), 4)
