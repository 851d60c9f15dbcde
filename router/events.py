"""What happened, typed, and its fan-out to whoever watches.

A subscriber has a bounded buffer. One that reads too slowly loses its own oldest events, and is told so; it
never delays the router. This carries news, not commands: nothing in the router acts on it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from router.meter import NO_USAGE, Usage


@dataclass(frozen=True, slots=True)
class ModelChanged:
    """A model entered a state (off, loading, ready, draining, stopping, failed)."""

    alias: str
    state: str
    reason: str
    at: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class EngineEnded:
    """An engine's process is gone."""

    alias: str
    cause: str
    """Why it was stopped (a `StopCause`); or `crashed`, `hung`, `load_failed`, which nobody wanted."""
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
    """initializing, ready or shutting_down."""

    status: str
    at: float


class RequestDone(msgspec.Struct, frozen=True):
    """A request on the data plane is over. Published exactly once for each, after its last byte.

    There is one per request: a struct is as immutable as a dataclass, and made in a fifth of the time.
    """

    request_id: str
    alias: str
    """A configured one; empty when the request was turned away before it asked for a slot."""
    route: str
    priority: str
    """Empty likewise."""
    outcome: str
    """served, cancelled, engine_lost, or the code of the error that was answered"""
    status: int
    queue_sec: float
    load_sec: float
    total_sec: float
    """From the moment that the whole request was there to the last byte of the answer."""
    at: float = 0.0
    """When it ended; seconds since the epoch."""
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
    reason: str = ""
    """What the client was told when it was not served."""
    usage: Usage = NO_USAGE
    trace: str = ""
    """The client's `traceparent` (W3C Trace Context)."""

    @property
    def stream_sec(self) -> float:
        """From the first byte of the answer to its last."""
        return 0.0 if self.ttft_sec is None else self.total_sec - self.ttft_sec


@dataclass(frozen=True, slots=True)
class Missed:
    """The subscriber was too slow: this many events before the next one are lost to it."""

    count: int


Happening = ModelChanged | EngineEnded | LoadMoved | ServerChanged | RequestDone | Missed


_KEPT = (ModelChanged, ServerChanged)
"""What somebody who comes back may ask for again: few, and what they tell can't be read from anywhere else."""


class Subscription:
    """Iterate over it to get the events from now on, or from where `resumes`."""

    def __init__(self, capacity: int) -> None:
        self.last_id = 0
        """Of the kept event that was yielded last."""
        self.resumes = False
        """What was missed comes first, and nothing of it is lost."""
        self._buffer: deque[tuple[int, Happening]] = deque(maxlen=capacity)
        self._missed = 0
        self._arrived = asyncio.Event()

    def put(self, number: int, happening: Happening) -> None:
        if len(self._buffer) == self._buffer.maxlen:
            self._missed += 1
        self._buffer.append((number, happening))
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[Happening]:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            if self._missed:
                missed, self._missed = self._missed, 0
                yield Missed(missed)
            while self._buffer:
                self.last_id, happening = self._buffer.popleft()
                yield happening


class Events:
    """The bus."""

    def __init__(self, capacity: int = 1000) -> None:
        self._capacity = capacity
        self._listeners: list[Callable[[Happening], None]] = []
        self._subscribers: dict[type, set[Subscription]] = defaultdict(set)
        """By kind: thousands who watch models cost the requests nothing."""
        self._last_id = 0
        self._kept: deque[tuple[int, Happening]] = deque(maxlen=capacity)

    def publish(self, happening: Happening) -> None:
        if isinstance(happening, _KEPT):
            self._last_id += 1
            self._kept.append((self._last_id, happening))
        for listener in self._listeners:
            listener(happening)
        for subscription in self._subscribers[type(happening)]:
            subscription.put(self._last_id, happening)

    def listen(self, listener: Callable[[Happening], None]) -> None:
        """Have it called with every event, at once, in the router's own time: for what must not miss any."""
        self._listeners.append(listener)

    @contextmanager
    def subscribe(self, *kinds: type, after: int | None = None) -> Iterator[Subscription]:
        """Events of these kinds; nobody is woken up for any other. `after`: the last id that was seen."""
        subscription = Subscription(self._capacity)
        subscription.last_id = self._last_id
        first_kept = self._kept[0][0] if self._kept else 1
        if after is not None and first_kept - 1 <= after <= self._last_id:
            subscription.resumes = True
            for number, happening in self._kept:
                if number > after and isinstance(happening, kinds):
                    subscription.put(number, happening)
        for kind in kinds:
            self._subscribers[kind].add(subscription)
        try:
            yield subscription
        finally:
            for kind in kinds:
                self._subscribers[kind].discard(subscription)
