"""Typed events and the bus that delivers them to metrics, telemetry, logs, traces and streams.

Events report what happened; no component controls another through them. Subscribers over the network are handled
by `api/streams.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import msgspec

from router.observe.usage import NO_USAGE, Usage
from router.scheduling.messages import ModelState, StopCause
from router.system.words import Word

_log = logging.getLogger("router")

_MOST_AT_ONCE = 64
_TOLD_WITHIN_SEC = 0.2


class ServerState(Word):
    """State of the router."""

    INITIALIZING = "initializing"
    READY = "ready"
    SHUTTING_DOWN = "shutting_down"


class Outcome(Word):
    """How a request ended. If the router's own error ended it, the outcome is the error code instead."""

    SERVED = "served"
    CANCELLED = "cancelled"
    """The client disconnected, or somebody cancelled the request (`DELETE /v1/requests/{id}`)."""
    ENGINE_REFUSED = "engine_refused"
    """The engine responded with 4xx."""
    ENGINE_ERROR = "engine_error"
    """The engine responded with 5xx, or with something unreadable."""


class Breakdown(Word):
    """How an engine ended that was not stopped by the router."""

    CRASHED = "crashed"
    HUNG = "hung"
    LOAD_FAILED = "load_failed"


@dataclass(frozen=True, slots=True)
class ModelChanged:
    """A model entered a state."""

    alias: str
    state: ModelState
    reason: str
    at: float
    """Seconds since the epoch."""
    told: str
    """The reason in the words that every client may see."""
    engine_id: int | None = None
    """Id of the engine whose state it is; None if the model has none."""


@dataclass(frozen=True, slots=True)
class EngineEnded:
    """An engine's process has ended."""

    engine_id: int
    alias: str
    cause: StopCause | Breakdown
    wanted: bool
    reason: str
    """Description for people: exit status and last output."""
    at: float


@dataclass(frozen=True, slots=True)
class LoadMoved:
    """A loading engine has reported progress."""

    alias: str
    at: float


@dataclass(frozen=True, slots=True)
class ServerChanged:
    """The router entered a state."""

    status: ServerState
    at: float


@dataclass(frozen=True, slots=True)
class ModelsListed:
    """Models were added, removed or changed by a new configuration."""

    at: float


@dataclass(frozen=True, slots=True)
class ClientRefused:
    """A connection was closed because of its client, outside of a request on the data plane."""

    reason: str
    """The code of the error that the client received, else `gave_way` or `does_not_read`."""
    peer: str
    """The client's address."""
    message: str
    """Description for people."""


class Attempt(msgspec.Struct, frozen=True):
    """A time that a request was granted an engine in vain: the engine failed, and the request went back."""

    engine_id: int
    granted_sec: float
    """Time of the grant, and of the failure, in seconds since the request's arrival."""
    failed_sec: float
    reason: str


class RequestDone(msgspec.Struct, frozen=True):
    """A request on the data plane has ended. Created exactly once for each, after its last byte.

    One is created per request: a msgspec struct is as immutable as a dataclass and takes a fifth of the time.
    """

    request_id: str
    alias: str
    """A configured alias; empty if the request was refused before it asked for a slot."""
    route: str
    priority: str
    """Empty in the same case."""
    outcome: str
    """An `Outcome`, or the code of the router's own error."""
    status: int
    queue_sec: float
    load_sec: float
    total_sec: float
    """Time from the complete request to the last byte of the response."""
    at: float = 0.0
    """Time of its end, in seconds since the epoch."""
    trace: str = ""
    """The client's `traceparent` (W3C Trace Context)."""
    reason: str = ""
    """The error message that the client received, if it was not served."""
    ttft_sec: float | None = None
    """Time from the complete request to the first byte of the engine's response; None if there was none."""
    streamed: bool = False
    """Whether the client requested a stream."""
    request_bytes: int = 0
    answer_bytes: int = 0
    """Size of the engine's response."""
    retries: int = 0
    """Number of times it returned to the queue because its engine failed."""
    resends: int = 0
    """Number of times it was sent again because an idle connection had just been closed."""
    usage: Usage = NO_USAGE
    client: str = ""
    """Name of the client, if its key has one."""
    peer: str = ""
    """Address of the client."""
    kv: str = ""
    """Where the beginning of its prompt came from (`Source` in `kv/keeper.py`); empty if nobody knows."""
    refused: bool = False
    """Whether it was refused, or ended before it asked for a slot."""
    owner: str = ""
    """Whose request it was (`Client.owner`); empty for a full key, without keys, and without a valid key."""
    engine_id: int | None = None
    """The engine that it was granted last; None: none."""
    attempts: tuple[Attempt, ...] = ()
    """Engines that it was granted before, in vain."""


class Labels(NamedTuple):
    """Labels shared by the requests that count for the same series."""

    alias: str
    route: str
    priority: str
    outcome: str
    client: str


@dataclass(frozen=True)
class RequestsDone:
    """Requests that ended since the previous event of this kind, in that order."""

    requests: Sequence[RequestDone]

    @cached_property
    def by_labels(self) -> Mapping[Labels, Sequence[RequestDone]]:
        """The requests grouped by labels, so that each series is looked up once."""
        found: defaultdict[tuple[str, str, str, str, str], list[RequestDone]] = defaultdict(list)
        for done in self.requests:
            found[done.alias, done.route, done.priority, done.outcome, done.client].append(done)
        return {Labels(*key): requests for key, requests in found.items()}


Happening = ModelChanged | ModelsListed | EngineEnded | LoadMoved | ServerChanged | ClientRefused | RequestsDone
Kind = TypeVar("Kind", bound=Happening)


class Events:
    """The event bus. Listeners are called synchronously on the event loop, so they must be fast."""

    def __init__(self) -> None:
        self._listeners: defaultdict[type, list[Callable[[Any], None]]] = defaultdict(list)
        self._done: list[RequestDone] = []
        self._settling: asyncio.TimerHandle | None = None

    def listen(self, kind: type[Kind], listener: Callable[[Kind], None]) -> None:
        """Register a listener for all events of a kind."""
        self._listeners[kind].append(listener)

    def publish(self, happening: Happening) -> None:
        """Call all listeners for the event; exceptions are logged."""
        for listener in self._listeners[type(happening)]:
            try:
                listener(happening)
            except Exception:  # a failing listener must not affect the router's work
                _log.exception("a listener for %s failed", type(happening).__name__)

    def done(self, request: RequestDone) -> None:
        """Record the end of a request, to be published in a batch: that takes a third of the time for counting.

        A single count, between two tokens, has to fetch everything it touches into the processor's caches again.
        """
        if self._settling is None:
            self._settling = asyncio.get_running_loop().call_later(_TOLD_WITHIN_SEC, self.settle)
        self._done.append(request)
        if len(self._done) >= _MOST_AT_ONCE:
            self.settle()

    def settle(self) -> None:
        """Publish all recorded requests now. To be called before counts are read."""
        if self._settling is not None:  # a timer left running would publish the next batch too early
            self._settling.cancel()
            self._settling = None
        if self._done:
            done, self._done = self._done, []
            self.publish(RequestsDone(done))
