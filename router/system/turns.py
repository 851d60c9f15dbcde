"""Work that takes long, in several turns of the event loop, so that no token waits for all of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Protocol, TypeVar

_T = TypeVar("_T")

_TURN_SEC = 0.002
_STEPS = 2
"""Steps of a turn. A step may start a task for a page, which takes its time after the step, so whoever arrives
meanwhile waits for all of them, twice. One more turn costs hardly anything."""
_STEPS_AT_ONCE = 8
"""Steps of a turn that are taken as soon as data arrives, without standing in line."""


_in_progress = 0
"""Number of `in_turns`, which share the time of a turn: no token waits for a dozen pages, one after the other."""


async def in_turns(items: Iterable[_T]) -> AsyncIterator[_T]:
    """Yield the items, and give other tasks their turns whenever making and using them has taken a while.

    Copy first what may change meanwhile.
    """
    global _in_progress
    _in_progress += 1
    try:
        since_sec = time.perf_counter()
        for item in items:
            yield item
            if time.perf_counter() - since_sec > _TURN_SEC / _in_progress:
                await asyncio.sleep(0)
                since_sec = time.perf_counter()
    finally:
        _in_progress -= 1


class Worker(Protocol):
    """A connection, or anything else, that may have more to do than fits into one turn."""

    def step(self) -> bool:
        """Do a little of the work. Return whether there is more that could be done at once."""

    def rested(self) -> None:
        """A turn is over since it asked to `rest`."""


class Rounds:
    """Shares the event loop among workers: a few steps in every turn, of one worker after the other.

    However many workers there are, and however much work each of them has, everything else has its turn in
    between. Workers that ask for a single step go first, as new flows do in FQ-CoDel (RFC 8290): a client that
    waits for each answer before it asks again does not wait for those that send without end. These have every
    other step.
    """

    def __init__(self) -> None:
        self._patient: deque[Worker] = deque()
        self._busy: deque[Worker] = deque()
        self._resting: list[Worker] = []
        self._steps_at_once = _STEPS_AT_ONCE
        self._is_set = False

    def admit(self, *, is_patient: bool) -> bool:
        """Return whether a worker may take a step of this turn at once instead of joining the line.

        `is_patient`: it asks for a single step, and had asked for none before its last was done.
        """
        if not self._steps_at_once or (self._busy and not is_patient):
            return False
        self._steps_at_once -= 1
        self._set()
        return True

    def join(self, worker: Worker, *, is_patient: bool) -> None:
        """Have the worker's steps taken until it has nothing more to do. It must not be in the line already."""
        (self._patient if is_patient else self._busy).append(worker)
        self._set()

    def rest(self, worker: Worker) -> None:
        """Call the worker's `rested` in the next turn."""
        self._resting.append(worker)
        self._set()

    def _set(self) -> None:
        if not self._is_set:
            self._is_set = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._is_set = False
        self._steps_at_once = _STEPS_AT_ONCE
        resting, self._resting = self._resting, []
        until_sec = time.perf_counter() + _TURN_SEC
        lines = (self._patient, self._busy)
        try:
            for worker in resting:
                worker.rested()
            for count in range(_STEPS):
                line = lines[count % 2] or lines[1 - count % 2]
                if not line:
                    break
                worker = line.popleft()
                if worker.step():
                    self._busy.append(worker)
                if time.perf_counter() > until_sec:
                    break
        finally:  # a worker that raises is out of the line; the others are not
            if self._patient or self._busy:
                self._set()
