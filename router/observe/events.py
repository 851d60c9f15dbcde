"""What happened, typed, and told to whoever listens: metrics, telemetry, logs, traces, streams.

This carries news, not commands: nothing in the router acts on it. Watchers over the network are the business of
`api/streams.py`.
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
    INITIALIZING = "initializing"
    READY = "ready"
    SHUTTING_DOWN = "shutting_down"


class Outcome(Word):
    """What came of a request; of one that an error of our own ended, that is the code of the error."""

    SERVED = "served"
    CANCELLED = "cancelled"
    """Its client has left."""
    ENGINE_REFUSED = "engine_refused"
    """The engine has answered 4xx."""
    ENGINE_ERROR = "engine_error"
    """It has answered 5xx, or what cannot be read."""


class Breakdown(Word):
    """How an engine ended that nobody had asked to go."""

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
    """The reason as everybody may hear it."""
    engine_id: int | None = None
    """Of the engine whose state that is; None where the model has none."""


@dataclass(frozen=True, slots=True)
class EngineEnded:
    """An engine's process is gone."""

    engine_id: int
    alias: str
    cause: StopCause | Breakdown
    wanted: bool
    reason: str
    """For people: its exit and its last words."""
    at: float


@dataclass(frozen=True, slots=True)
class LoadMoved:
    """An engine that loads has told how far it is."""

    alias: str
    at: float


@dataclass(frozen=True, slots=True)
class ServerChanged:
    """The router starts, is there, or goes."""

    status: ServerState
    at: float


@dataclass(frozen=True, slots=True)
class ModelsListed:
    """Models came, went or changed by a new configuration."""

    at: float


@dataclass(frozen=True, slots=True)
class ClientRefused:
    """A connection is closed for what its client does or does not, before that was a request or after."""

    reason: str
    """One of few: the code of the error that it got, if it got one; else `gave_way` or `does_not_read`."""
    peer: str
    """Its address."""
    message: str
    """For people."""


class RequestDone(msgspec.Struct, frozen=True):
    """A request on the data plane is over. Made exactly once for each, after its last byte.

    There is one per request: a struct is as immutable as a dataclass, and made in a fifth of the time.
    """

    request_id: str
    alias: str
    """A configured one; empty when the request was turned away before it asked for a slot."""
    route: str
    priority: str
    """Empty likewise."""
    outcome: str
    """An `Outcome`, or the code of our own error."""
    status: int
    queue_sec: float
    load_sec: float
    total_sec: float
    """From the moment that the whole request was there to the last byte of the answer."""
    at: float = 0.0
    """When it ended; seconds since the epoch."""
    trace: str = ""
    """The client's `traceparent` (W3C Trace Context)."""
    reason: str = ""
    """What the client was told when it was not served."""
    ttft_sec: float | None = None
    """From there to the first byte of the engine's answer to the client; None when there was none."""
    streamed: bool = False
    """The client had asked for a stream."""
    request_bytes: int = 0
    answer_bytes: int = 0
    """Of the engine's answer."""
    retries: int = 0
    """How often it went back to its queue because its engine broke."""
    resends: int = 0
    """How often it was sent again because an idle connection had just been closed."""
    usage: Usage = NO_USAGE
    client: str = ""
    """Its name, if its key has one."""
    peer: str = ""
    """Its address, if the router refused it, or it left before it asked for a slot: no engine was asked."""


class Labels(NamedTuple):
    """What requests have in common that count for the same series."""

    alias: str
    route: str
    priority: str
    outcome: str
    client: str


@dataclass(frozen=True)
class RequestsDone:
    """Requests that are over since the last of these, in the order of their ends."""

    requests: Sequence[RequestDone]

    @cached_property
    def by_labels(self) -> Mapping[Labels, Sequence[RequestDone]]:
        """The same, sorted by their labels, whose series are looked for once."""
        found: defaultdict[tuple[str, str, str, str, str], list[RequestDone]] = defaultdict(list)
        for done in self.requests:
            found[done.alias, done.route, done.priority, done.outcome, done.client].append(done)
        return {Labels(*key): requests for key, requests in found.items()}


Happening = ModelChanged | ModelsListed | EngineEnded | LoadMoved | ServerChanged | ClientRefused | RequestsDone
Kind = TypeVar("Kind", bound=Happening)


class Events:
    """The bus. Listeners are called at once, in the router's own time, so they must be quick."""

    def __init__(self) -> None:
        self._listeners: defaultdict[type, list[Callable[[Any], None]]] = defaultdict(list)
        self._done: list[RequestDone] = []
        self._settling: asyncio.TimerHandle | None = None

    def listen(self, kind: type[Kind], listener: Callable[[Kind], None]) -> None:
        """Have it called with all that is of this kind."""
        self._listeners[kind].append(listener)

    def publish(self, happening: Happening) -> None:
        for listener in self._listeners[type(happening)]:
            try:
                listener(happening)
            except Exception:  # what cannot be told must not keep anything from being done
                _log.exception("%s could not be told to all", type(happening).__name__)

    def done(self, request: RequestDone) -> None:
        """A request is over. That is told with others, soon: a count takes a third of the time among its like.

        Between two tokens everything that it touches has to be fetched into the processor's caches again.
        """
        if self._settling is None:
            self._settling = asyncio.get_running_loop().call_later(_TOLD_WITHIN_SEC, self.settle)
        self._done.append(request)
        if len(self._done) >= _MOST_AT_ONCE:
            self.settle()

    def settle(self) -> None:
        """Tell of all requests that are over. For those who are about to read what was counted."""
        if self._settling is not None:  # one that is left over would tear the next of them apart
            self._settling.cancel()
            self._settling = None
        if self._done:
            done, self._done = self._done, []
            self.publish(RequestsDone(done))
