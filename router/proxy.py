"""The data path: read a request, find its model, wait for a slot, relay the answer byte for byte.

Raw ASGI, because it runs for every token. Only `model` and `stream` are picked out of the body; neither it nor
the answer is built into objects. What it promises:

- A client that goes away frees its place at once: in the queue, or in the engine by closing the connection.
- A request whose engine died before anything reached the client goes back to the head of its queue.
- A stream that has begun ends with an error event, never with silence or a torn chunk.
- Every request ends in exactly one `RequestDone`, whatever happens to it. For that, all of an engine's answer goes
  through `AnswerMeter.note`, right before it is sent; the meter is read once, when all is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from random import getrandbits
from typing import Any
from urllib.parse import quote

import msgspec

from router.api.auth import Keyring
from router.api.errors import ApiError, error_event, refused
from router.crowd import Bodies
from router.dispatcher import Dispatcher, Ticket
from router.events import RequestDone
from router.messages import Refusal
from router.meter import NO_USAGE, AnswerMeter
from router.queue import Priority
from router.upstream import Connection, EngineLost, Head

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/input_tokens",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/input_tokens",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/reranking",
        "/v1/audio/transcriptions",
        "/chat/completions",
        "/chat/completions/input_tokens",
        "/completions",
        "/completion",
        "/responses",
        "/responses/input_tokens",
        "/embeddings",
        "/embedding",
        "/rerank",
        "/reranking",
        "/audio/transcriptions",
        "/infill",
        "/tokenize",
        "/detokenize",
        "/apply-template",
    }
)
"""Everything that llama-server answers for one model, and that names the model in its body. All POST."""

_FORWARDED = frozenset(
    {
        b"accept",
        b"anthropic-beta",
        b"anthropic-version",
        b"content-type",
        b"traceparent",
        b"tracestate",
        b"user-agent",
        b"x-conversation-id",
    }
)
_NOT_RELAYED = frozenset(
    {
        b"connection",
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
_PRIORITIES = {
    **{priority.name.lower().encode(): priority for priority in Priority},
    **{str(priority.value).encode(): priority for priority in Priority},
}
_BUFFERED_ANSWER = 4 << 20
"""Answers up to this size are read whole before the client sees any of it, so that they can be tried again."""

_LONGEST_NAME = 256


class _Envelope(msgspec.Struct):
    model: Any = None
    stream: Any = None


_decode = msgspec.json.Decoder(_Envelope).decode


class Proxy:
    """ASGI application of the data plane."""

    def __init__(self, dispatcher: Dispatcher, keyring: Keyring) -> None:
        self.dispatcher = dispatcher
        self.keyring = keyring
        self.bodies = Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """One request on its way through the router."""

    __slots__ = (
        "_alias",
        "_awaits_engine",
        "_bodies",
        "_body",
        "_connection",
        "_dispatcher",
        "_gone",
        "_headers",
        "_held",
        "_keyring",
        "_meter",
        "_path",
        "_progress",
        "_reason",
        "_receive",
        "_request_id",
        "_resends",
        "_scope",
        "_send",
        "_started",
        "_status",
        "_streams",
        "_task",
        "_timed_out",
        "_timer",
    )

    def __init__(self, proxy: Proxy, scope: Scope, receive: Receive, send: Send) -> None:
        self._dispatcher = proxy.dispatcher
        self._bodies = proxy.bodies
        self._held = 0
        self._keyring = proxy.keyring
        self._scope = scope
        self._receive = receive
        self._send = send
        self._path: str = scope["path"]
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._request_id = ""
        self._alias = ""
        self._body = b""
        self._streams = False
        self._meter = AnswerMeter()
        self._resends = 0
        self._reason = ""
        """What the client was told when it was not served."""
        self._started = False
        """The client has got a head."""
        self._status = 0
        self._connection: Connection | None = None
        self._gone = False
        self._timed_out = False
        self._progress = 0.0
        self._awaits_engine = False
        self._timer: asyncio.TimerHandle | None = None
        task = asyncio.current_task()
        assert task is not None
        self._task = task

    async def run(self) -> None:
        try:
            with contextlib.suppress(OSError):  # uvicorn's way to say that the client is gone
                await self._run()
        finally:
            self._bodies.release(self._held)

    async def _run(self) -> None:
        try:
            self._request_id = self._identify()
            self._keyring.check(self._scope["headers"], manages=False)
            self._body = await self._read_body()
            priority = self._route()
        except ApiError as error:
            try:
                await self._answer_error(error)
            finally:
                self._publish(None, error.code)
            return
        except _ClientGone:
            self._publish(None, "cancelled")
            return
        if self._dispatcher.is_taken(self._request_id):  # by one that came while the body was read
            self._request_id = _new_id()
        ticket = self._dispatcher.submit(self._request_id, self._alias, priority)
        watch = _ClientWatch(self._receive, self._client_left)
        outcome = "cancelled"
        try:
            outcome = await self._serve(ticket)
        except ApiError as error:
            outcome = error.code
            await self._answer_error(error)
        except asyncio.CancelledError:
            if not (self._gone or self._timed_out):
                raise
            self._drop_connection()
            if self._timed_out and self._awaits_engine:
                limit = self._dispatcher.config.system.request_timeout_sec
                reason = f"The engine sent nothing for {limit:g} s (request_timeout_sec)."
                outcome = "request_timeout"
                await self._answer_error(ApiError(504, outcome, reason))
        finally:
            watch.close()
            self._stop_watching()
            self._drop_connection()
            self._dispatcher.finish(ticket, served=outcome == "served")
            self._publish(ticket, outcome)

    # --- the request ------------------------------------------------------------------------------------

    def _identify(self) -> str:
        given = self._headers.get(b"x-request-id", b"")
        if 0 < len(given) <= 128 and all(0x21 <= byte <= 0x7E for byte in given):
            request_id = given.decode("ascii")
            if not self._dispatcher.is_taken(request_id):
                return request_id
        return _new_id()

    async def _read_body(self) -> bytes:
        if self._headers.get(b"content-encoding", b"identity") != b"identity":
            raise ApiError(415, "unsupported_encoding", "Send the body without Content-Encoding.")
        limit = self._dispatcher.config.api.max_body_mb << 20
        declared = self._headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise self._too_large()
        most = self._dispatcher.config.api.max_bodies_mb << 20
        if declared.isdigit():  # no use to begin
            self._bodies.check(int(declared), most)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _ClientGone
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise self._too_large()
            self._bodies.hold(len(part), most)
            self._held = size
            if not message.get("more_body", False):
                return b"".join((*parts, part)) if parts else part
            parts.append(part)

    def _too_large(self) -> ApiError:
        limit = self._dispatcher.config.api.max_body_mb
        return ApiError(413, "body_too_large", f"The body is larger than {limit} MiB (api.max_body_mb).")

    def _route(self) -> Priority:
        """Find the alias, whether a stream is wanted, and the priority. Raises ApiError."""
        content_type = self._headers.get(b"content-type", b"")
        if content_type.startswith(b"multipart/form-data"):
            fields = _form_fields(self._body, content_type, (b"model", b"stream"))
            model: object = fields.get(b"model")
            self._streams = fields.get(b"stream", "").lower() in ("true", "1")
        else:
            try:
                envelope = _decode(self._body)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                what = f"is not a JSON object: {error}" if self._body else "is empty"
                raise ApiError(400, "invalid_json", f"The body {what}.") from None
            except RecursionError:
                raise ApiError(400, "invalid_json", "The body is nested too deeply.") from None
            model = envelope.model
            self._streams = envelope.stream is True
        models = self._dispatcher.config.models
        if model is None:
            raise ApiError(400, "model_required", f"Name a `model`: {_some_of(list(models))}.", "model")
        if not isinstance(model, str):
            raise ApiError(400, "invalid_model", f"`model` must be a string, not {type(model).__name__}.", "model")
        known = models.get(model)
        if known is None:
            raise ApiError(404, Refusal.MODEL_NOT_FOUND.value, unknown_model(model, list(models)), "model")
        self._alias = model
        wanted = self._headers.get(b"x-request-priority")
        if wanted is None:
            return Priority[known.priority.upper()]
        priority = _PRIORITIES.get(wanted.strip().lower())
        if priority is None:
            raise ApiError(
                400,
                "invalid_priority",
                "X-Request-Priority must be high, normal or low (1, 2 or 3).",
                "X-Request-Priority",
            )
        return priority

    # --- the answer -------------------------------------------------------------------------------------

    async def _serve(self, ticket: Ticket) -> str:
        """Relay an engine's answer; returns the outcome. Raises ApiError."""
        while True:
            await self._wait_for_slot(ticket)
            try:
                return await self._relay(ticket)
            except EngineLost as lost:
                self._drop_connection()
                self._stop_watching()
                if self._status:  # some of the engine's answer has reached the client
                    raise ApiError(502, "engine_lost", f"The engine broke off: {lost}.") from lost
                self._dispatcher.requeue(ticket, str(lost))

    async def _wait_for_slot(self, ticket: Ticket) -> None:
        if not ticket.decided:
            beat_sec = self._dispatcher.config.api.heartbeat_sec
            if self._streams and beat_sec > 0:
                while not ticket.decided:
                    try:
                        await asyncio.wait_for(ticket.decision(), beat_sec)
                    except asyncio.TimeoutError:
                        await self._heartbeat(ticket)
            else:
                await ticket.decision()
        if self._gone:  # Python before 3.12 loses a cancellation that comes together with what is waited for
            raise asyncio.CancelledError
        if ticket.rejection is not None:
            rejection = ticket.rejection
            raise refused(rejection.refusal, rejection.reason, rejection.retry_after_sec)

    async def _heartbeat(self, ticket: Ticket) -> None:
        if not self._started:
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
            await self._start(200, [*headers, *self._own_headers(ticket)])
        model = self._dispatcher.scheduler.models.get(ticket.alias)
        why = model.why_waiting if model is not None else ""
        position = self._dispatcher.position(ticket) or 1
        waited = time.monotonic() - ticket.arrival_sec
        await self._send_part(f": position {position}, waited {waited:.0f} s: {why}\n\n".encode())

    async def _relay(self, ticket: Ticket) -> str:
        engine = ticket.engine
        assert engine is not None
        self._watch_progress()
        target = self._path.encode()  # one of ROUTES: nothing to quote
        if query := self._scope["query_string"]:
            target += b"?" + query
        headers = [header for header in self._scope["headers"] if header[0] in _FORWARDED]
        headers.append((b"x-request-id", self._request_id.encode()))
        connection, head = await engine.pool.request("POST", target, headers, self._body, self._note_resend)
        self._connection = connection
        if self._started:
            return await self._continue_stream(connection, head)
        answer = [header for header in head.headers if _is_relayed(header[0])]
        answer.extend(self._own_headers(ticket))
        if head.content_length is not None and head.content_length <= _BUFFERED_ANSWER:
            body = await self._collect(connection)
            self._status = head.status
            await self._start(head.status, answer)
            self._meter.note(body)
            await self._send_part(body, last=True)
        else:
            first = await connection.chunk()  # until then nothing has reached the client: it can be tried again
            self._status = head.status
            await self._start(head.status, answer)
            await self._pass_on(connection, first)
        return "served" if head.status < 500 else "engine_error"

    async def _continue_stream(self, connection: Connection, head: Head) -> str:
        """The client has seen heartbeats already: whatever the engine answers must be events."""
        if head.status == 200 and head.streams:
            first = await connection.chunk()
            self._status = 200
            await self._pass_on(connection, first)
            return "served"
        body = (await self._collect(connection)).replace(b"\n", b" ")
        await self._send_part(error_event(body, self._path), last=True)
        return "served" if head.status < 500 else "engine_error"

    async def _pass_on(self, connection: Connection, part: bytes | None) -> None:
        """The answer from `part` on to the client, as it comes."""
        clock = asyncio.get_running_loop().time
        send = self._send
        note = self._meter.note
        while part is not None:
            self._awaits_engine = False
            note(part)
            await send({"type": "http.response.body", "body": part, "more_body": True})
            self._awaits_engine = True
            self._progress = clock()
            part = await connection.chunk()
        self._release_connection()
        await self._send_part(b"", last=True)

    async def _collect(self, connection: Connection) -> bytes:
        """The rest of the answer, whole."""
        parts = []
        while (part := await connection.chunk()) is not None:
            parts.append(part)
        self._release_connection()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _own_headers(self, ticket: Ticket) -> Headers:
        headers = [(b"x-request-id", self._request_id.encode()), _alias_header(self._alias)]
        if ticket.engine is not None:
            headers.append((b"x-queue-ms", b"%d" % round(ticket.queue_sec * 1000)))
            headers.append((b"x-load-ms", b"%d" % round(ticket.load_sec * 1000)))
        return headers

    async def _start(self, status: int, headers: Headers) -> None:
        self._started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_part(self, part: bytes, *, last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": not last})

    async def _answer_error(self, error: ApiError) -> None:
        self._reason = error.message
        if self._started:
            if self._streams:
                await self._send_part(error.event(self._path), last=True)
            # Else it stays unfinished, and the server closes the connection: half a document must not look whole.
            return
        self._status = error.status
        headers = error.headers()
        if self._request_id:
            headers.append((b"x-request-id", self._request_id.encode()))
        await self._start(error.status, headers)
        await self._send_part(error.body(self._path), last=True)

    # --- what can go wrong ------------------------------------------------------------------------------

    def _client_left(self) -> None:
        self._gone = True
        self._task.cancel()

    def _watch_progress(self) -> None:
        """Nobody may hold a slot without moving: neither an engine that hangs nor a client that does not read."""
        loop = asyncio.get_running_loop()
        self._progress = loop.time()
        self._awaits_engine = True
        if self._timer is None:
            limit = self._dispatcher.config.system.request_timeout_sec
            self._timer = loop.call_later(limit, self._check_progress, limit)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_progress(self, limit: float) -> None:
        loop = asyncio.get_running_loop()
        left = self._progress + limit - loop.time()
        if left > 0:
            self._timer = loop.call_later(left, self._check_progress, limit)
        else:
            self._timed_out = True
            self._task.cancel()

    def _release_connection(self) -> None:
        if self._connection is not None:
            self._connection.release()
            self._connection = None

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _note_resend(self) -> None:
        self._resends += 1

    def _publish(self, ticket: Ticket | None, outcome: str) -> None:
        """Once, at the very end. Without a ticket: the request was turned away before it asked for a slot."""
        meter = self._meter
        now = time.monotonic()
        arrival_sec = now if ticket is None else ticket.arrival_sec
        self._dispatcher.events.publish(
            RequestDone(
                request_id=self._request_id,
                alias=self._alias,
                route=self._path,
                priority="" if ticket is None else ticket.priority.name.lower(),
                outcome=outcome,
                status=self._status,
                queue_sec=ticket.queue_sec if ticket is not None and ticket.decided else now - arrival_sec,
                load_sec=0.0 if ticket is None else ticket.load_sec,
                total_sec=now - arrival_sec,
                at=time.time(),
                ttft_sec=None if meter.first_sec is None else meter.first_sec - arrival_sec,
                streamed=self._streams,
                request_bytes=len(self._body),
                answer_bytes=meter.size,
                retries=0 if ticket is None else ticket.retries,
                resends=self._resends,
                reason=self._reason,
                usage=meter.usage() if meter.size else NO_USAGE,
                trace=self._headers.get(b"traceparent", b"").decode("latin-1"),
            )
        )


def _new_id() -> str:
    return f"{getrandbits(96):024x}"


class _ClientGone(Exception):
    """It left before its request was whole."""


class _ClientWatch:
    """Calls `left` as soon as the client is gone, which `receive` waits for.

    A task to wait in would cost more than all the scheduling of a request. So the coroutine is stepped by hand,
    as a task would: it runs up to the future that it waits for, and on when that is done.
    """

    __slots__ = ("_left", "_receive", "_waiting")

    def __init__(self, receive: Receive, left: Callable[[], None]) -> None:
        self._receive = receive
        self._left = left
        self._waiting: Any = None
        self._step(None)

    def close(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def _step(self, _: object) -> None:
        while True:
            if self._waiting is None:
                self._waiting = self._receive()
            try:
                future = self._waiting.send(None)
            except StopIteration as received:
                self._waiting = None
                if received.value["type"] == "http.disconnect":
                    self._left()
                    return
            else:
                future._asyncio_future_blocking = False  # what a task does to say: I am waiting
                future.add_done_callback(self._resume)
                return

    def _resume(self, future: object) -> None:
        if self._waiting is not None:
            self._step(future)


@lru_cache(maxsize=1024)
def _alias_header(alias: str) -> tuple[bytes, bytes]:
    return b"x-model-alias", quote(alias, safe="/:@ ").encode()


def _is_relayed(name: bytes) -> bool:
    return name not in _NOT_RELAYED and not name.startswith(b"access-control-")


def unknown_model(name: str, aliases: list[str]) -> str:
    """What to say to somebody who asks for a model that is not there."""
    if len(name) > _LONGEST_NAME:
        return f"There is no model of {len(name)} characters. There are: {_some_of(aliases)}."
    close = difflib.get_close_matches(name, aliases, n=3)
    if close:
        return f"There is no model {name!r}. Did you mean {_some_of(close)}?"
    return f"There is no model {name!r}. There are: {_some_of(aliases)}."


def _some_of(aliases: list[str]) -> str:
    shown = ", ".join(repr(alias) for alias in aliases[:10])
    return f"{shown} and {len(aliases) - 10} more (GET /v1/models)" if len(aliases) > 10 else shown


def _form_fields(body: bytes, content_type: bytes, names: tuple[bytes, ...]) -> dict[bytes, str]:
    """Short text fields of a multipart body (RFC 7578), found without copying its files."""
    _, found, boundary = content_type.partition(b"boundary=")
    boundary = boundary.split(b";")[0].strip().strip(b'"')
    if not found or not boundary:
        raise ApiError(400, "invalid_multipart", "The Content-Type names no multipart boundary.")
    delimiter = b"--" + boundary
    fields: dict[bytes, str] = {}
    start = body.find(delimiter)
    while start >= 0:
        start += len(delimiter)
        if body.startswith(b"--", start):
            return fields
        head_end = body.find(b"\r\n\r\n", start)
        end = body.find(b"\r\n" + delimiter, start)
        if head_end < 0 or end < head_end + 2:
            break
        head = body[start:head_end].lower()
        for name in names:
            if b'name="%b"' % name in head and b"filename=" not in head:
                fields[name] = body[head_end + 4 : end].decode("utf-8", "replace").strip()
        start = end + 2
    raise ApiError(400, "invalid_multipart", "The multipart body is cut off or malformed.")
