"""The waiting line of one model, in order of virtual deadlines.

A request's *virtual deadline* is `arrival + patience[priority]`, fixed when it arrives. So high goes before
normal before low, each class is first-in-first-out, and nobody starves: a low request overtakes a high one
that came `patience[low] - patience[high]` seconds after it. Within a class the order of arrival is the order
of deadlines; a line per class, of which the earliest head is served, is therefore all the sorting it takes,
and nothing has to age. Every operation costs the same however many wait.

This module orders; it does not decide who is served, and it does not know what time it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum


class Priority(IntEnum):
    """Value of the `X-Request-Priority` header: a name, or its number."""

    HIGH = 1
    NORMAL = 2
    LOW = 3


@dataclass(slots=True, eq=False)
class Request:
    """One request from its arrival to its outcome. Times in seconds on the scheduler's clock."""

    id: str
    alias: str
    priority: Priority
    arrival_sec: float
    deadline_sec: float
    seq: int
    queued_sec: float = 0.0
    """When it joined the line, for the last time: `retries` counts how often it came back."""
    granted_sec: float | None = None
    engine_id: int | None = None
    """The engine that serves it; None while it waits."""
    retries: int = 0


class PriorityQueue:
    """Requests that wait for one model."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: dict[Priority, OrderedDict[str, Request]] = {priority: OrderedDict() for priority in Priority}

    def __len__(self) -> int:
        high, normal, low = self._lines.values()
        return len(high) + len(normal) + len(low)

    def __iter__(self) -> Iterator[Request]:
        """In the order of service, if nobody else comes."""
        waiting = (request for line in self._lines.values() for request in line.values())
        return iter(sorted(waiting, key=lambda request: (request.deadline_sec, request.seq)))

    def push(self, request: Request) -> None:
        """Add a request; one that comes back (its engine died) stands before all that came after it."""
        line = self._lines[request.priority]
        line[request.id] = request
        if request.retries:
            for later in [other.id for other in line.values() if other.seq > request.seq]:
                line.move_to_end(later)

    def head(self) -> Request | None:
        """The request to be served next."""
        first: Request | None = None
        for line in self._lines.values():
            if line:
                request = next(iter(line.values()))
                if first is None or (request.deadline_sec, request.seq) < (first.deadline_sec, first.seq):
                    first = request
        return first

    def pop(self) -> Request:
        """Take the request to be served next; IndexError when nobody waits."""
        request = self.head()
        if request is None:
            raise IndexError("pop from an empty queue")
        del self._lines[request.priority][request.id]
        return request

    def remove(self, request: Request) -> None:
        """Take a request out wherever it stands; KeyError when it does not wait here."""
        del self._lines[request.priority][request.id]

    def count(self, priority: Priority) -> int:
        return len(self._lines[priority])

    def oldest(self, priority: Priority) -> Request | None:
        """The request of a class that arrived first."""
        line = self._lines[priority]
        return next(iter(line.values())) if line else None

    def longest_here(self) -> Request | None:
        """The request that joined first. Those that came back joined late and yet stand at the front."""
        longest: Request | None = None
        for line in self._lines.values():
            for request in line.values():
                if longest is None or request.queued_sec < longest.queued_sec:
                    longest = request
                if not request.retries:
                    break
        return longest
