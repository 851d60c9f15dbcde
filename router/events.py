"""What happened, typed, and its fan-out to whoever watches.

A subscriber has a bounded buffer. One that reads too slowly loses its own oldest events, and is told so; it
never delays the router. This carries news, not commands: nothing in the router acts on it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelChanged:
    """A model entered a state (off, loading, ready, draining, stopping, failed)."""

    alias: str
    state: str
    reason: str
    at: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class ServerChanged:
    """initializing, ready or shutting_down."""

    status: str
    at: float


@dataclass(frozen=True, slots=True)
class RequestDone:
    """A request to a model got its outcome."""

    request_id: str
    alias: str
    route: str
    priority: str
    outcome: str
    """served, cancelled, engine_lost, or the code of the error that was answered"""
    status: int
    queue_sec: float
    load_sec: float
    total_sec: float


@dataclass(frozen=True, slots=True)
class Missed:
    """The subscriber was too slow: this many events before the next one are lost to it."""

    count: int


Happening = ModelChanged | ServerChanged | RequestDone | Missed


class Subscription:
    """Iterate over it to get the events from now on."""

    def __init__(self, capacity: int, kinds: tuple[type, ...]) -> None:
        self.kinds = kinds
        self._buffer: deque[Happening] = deque(maxlen=capacity)
        self._missed = 0
        self._arrived = asyncio.Event()

    def put(self, happening: Happening) -> None:
        if len(self._buffer) == self._buffer.maxlen:
            self._missed += 1
        self._buffer.append(happening)
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[Happening]:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            if self._missed:
                missed, self._missed = self._missed, 0
                yield Missed(missed)
            while self._buffer:
                yield self._buffer.popleft()


class Events:
    """The bus."""

    def __init__(self, capacity: int = 1000) -> None:
        self._capacity = capacity
        self._listeners: list[Callable[[Happening], None]] = []
        self._subscriptions: set[Subscription] = set()

    def publish(self, happening: Happening) -> None:
        for listener in self._listeners:
            listener(happening)
        for subscription in self._subscriptions:
            if isinstance(happening, subscription.kinds):
                subscription.put(happening)

    def listen(self, listener: Callable[[Happening], None]) -> None:
        """Have it called with every event, at once, in the router's own time: for what must not miss any."""
        self._listeners.append(listener)

    @contextmanager
    def subscribe(self, *kinds: type) -> Iterator[Subscription]:
        """Events of these kinds; nobody is woken up for any other."""
        subscription = Subscription(self._capacity, kinds)
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
