"""The last requests that have ended, for those who ask later what happened to one.

They are kept as they were reported, and put into words only when somebody asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from router.observe.events import Events, RequestDone, RequestsDone

Numbered = tuple[int, RequestDone]
"""A request with its number: 1 for the first one that ended since the start."""


class RecentRequests:
    """The last requests that `events` reports, at most `limit()` of them.

    Requests that were refused before they asked for a slot are kept apart: a thousand wrong keys in a second do
    not push out what was served. They take the room that others leave, and at least a quarter.
    """

    def __init__(self, events: Events, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._settle = events.settle
        self._total = 0
        self.last: RequestDone | None = None
        """The last one, even if none are kept."""
        self._asked: deque[Numbered] = deque()
        self._turned_away: deque[Numbered] = deque()
        events.listen(RequestsDone, self._note)

    @property
    def total(self) -> int:
        """The number of requests that have ended since the start, which is that of the last one."""
        self._settle()
        return self._total

    def newest_first(self) -> list[Numbered]:
        """Return what is kept."""
        self._settle()
        self._trim()
        return sorted((*self._asked, *self._turned_away), key=_number, reverse=True)

    def _note(self, happening: RequestsDone) -> None:
        requests, asked = happening.requests, self._asked
        for number, done in enumerate(requests, self._total + 1):
            if done.priority:
                asked.append((number, done))
            else:
                self._turned_away.append((number, done))
        self._total += len(requests)
        self.last = requests[-1]
        self._trim()

    def _trim(self) -> None:
        limit = self._limit()
        asked, turned_away = self._asked, self._turned_away
        while len(asked) + len(turned_away) > limit:
            (turned_away if len(turned_away) > limit // 4 or not asked else asked).popleft()


def _number(numbered: Numbered) -> int:
    return numbered[0]
