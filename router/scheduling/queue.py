"""Queue of one model: a heap by virtual deadline.

A request's *virtual deadline* is `arrival + patience[priority]`, fixed on arrival. High priority thus goes before
normal and low, each class is first-in-first-out, and no request starves: a low request goes before any high one
that arrives more than `patience[low] - patience[high]` seconds after it. Keys never change, so the heap needs no
re-sorting and no aging.

Requests that need no slot share the queue while there is no engine; with an engine, neither kind waits for the
other.

The queue only orders requests; it neither decides which are served nor reads a clock.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Literal, get_args

import msgspec


class Priority(IntEnum):
    """Value of the `X-Request-Priority` header: a name, or its number."""

    HIGH = 1
    NORMAL = 2
    LOW = 3


PriorityName = Literal["high", "normal", "low"]
"""Names used by clients, configuration and metrics, most urgent first."""
BY_NAME: dict[PriorityName, Priority] = dict(zip(get_args(PriorityName), Priority, strict=True))
NAMES = {priority: name for name, priority in BY_NAME.items()}
"""Cached, because the names of an enum are slow."""


class Request(msgspec.Struct, eq=False):
    """One request from its arrival to its outcome. Times in seconds on the scheduler's clock."""

    id: str
    alias: str
    priority: Priority
    arrival_sec: float
    deadline_sec: float
    seq: int
    queued_sec: float = 0.0
    """Time at which it last joined the queue; `retries` counts its returns."""
    granted_sec: float | None = None
    engine_id: int | None = None
    """Engine that serves it; None while it waits."""
    retries: int = 0
    slotless: bool = False


_Entry = tuple[float, int, int, Request]


class PriorityQueue:
    """Requests that wait for one model. `push`, `pop` and `remove` cost O(log n), amortised."""

    __slots__ = ("_heaps", "_length", "_lines", "_pushes")

    def __init__(self) -> None:
        # A request that leaves early stays in its heap until it reaches the top; `_lines` is authoritative.
        self._heaps: tuple[list[_Entry], list[_Entry]] = ([], [])
        """Heaps of requests that need a slot, and of those that do not."""
        self._pushes = 0
        self._length = 0
        self._lines: dict[Priority, OrderedDict[str, Request]] = {priority: OrderedDict() for priority in Priority}

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """Iterate in the order of service."""
        waiting = (request for line in self._lines.values() for request in line.values())
        return iter(sorted(waiting, key=lambda request: (request.deadline_sec, request.seq)))

    def places(self) -> Iterator[tuple[int, Request]]:
        """Yield each request with its position among its kind; 1 is served next."""
        ahead = [0, 0]
        for request in self:
            ahead[request.slotless] += 1
            yield ahead[request.slotless], request

    def push(self, request: Request) -> None:
        """Add a request; one that returns after its engine died precedes all that arrived after it."""
        line = self._lines[request.priority]
        line[request.id] = request
        self._length += 1
        if request.retries:
            for later in [other.id for other in line.values() if other.seq > request.seq]:
                line.move_to_end(later)
        self._pushes += 1
        heapq.heappush(self._heaps[request.slotless], (request.deadline_sec, request.seq, self._pushes, request))

    def head(self) -> Request | None:
        """Return the next request of either kind; None if the queue is empty."""
        heads = [request for slotless in (False, True) if (request := self._next(slotless)) is not None]
        return min(heads, key=lambda request: (request.deadline_sec, request.seq), default=None)

    def take(self, *, slotless: bool) -> Request | None:
        """Remove and return the next request of a kind; None if there is none."""
        request = self._next(slotless)
        if request is not None:
            heapq.heappop(self._heaps[slotless])
            self._leave(request)
        return request

    def pop(self) -> Request:
        """Remove and return the next request of either kind. Raises IndexError if the queue is empty."""
        request = self.head()
        if request is None:
            raise IndexError("pop from an empty queue")
        self.take(slotless=request.slotless)
        return request

    def remove(self, request: Request) -> None:
        """Remove a request at any position. Raises KeyError if it is not in the queue."""
        self._leave(request)
        heap = self._heaps[request.slotless]
        if len(heap) > 2 * len(self) + 16:
            heap[:] = [entry for entry in heap if self._waits(entry[3])]
            heapq.heapify(heap)

    def _next(self, slotless: bool) -> Request | None:
        heap = self._heaps[slotless]
        while heap:
            request = heap[0][3]
            if self._waits(request):
                return request
            heapq.heappop(heap)
        return None

    def _leave(self, request: Request) -> None:
        del self._lines[request.priority][request.id]
        self._length -= 1

    def _waits(self, request: Request) -> bool:
        return self._lines[request.priority].get(request.id) is request

    def count(self, priority: Priority) -> int:
        return len(self._lines[priority])

    def line(self, priority: Priority) -> Iterable[Request]:
        """Return the requests of a priority in order."""
        return self._lines[priority].values()

    def oldest(self, priority: Priority) -> Request | None:
        """Return the oldest request of a priority; None if there is none."""
        line = self._lines[priority]
        return next(iter(line.values())) if line else None

    def newest(self, priority: Priority) -> Request | None:
        """Return the newest request of a priority; None if there is none."""
        line = self._lines[priority]
        return next(reversed(line.values())) if line else None

    def longest_here(self) -> Request | None:
        """Return the request that has been queued longest. Returned requests joined late but stand at the
        front."""
        longest: Request | None = None
        for line in self._lines.values():
            for request in line.values():
                if longest is None or request.queued_sec < longest.queued_sec:
                    longest = request
                if not request.retries:
                    break
        return longest
