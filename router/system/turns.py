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
"""Of a turn. A step may start a task for a page, which takes its time only after that, and whoever comes meanwhile
waits for all of them, twice. A further turn costs hardly anything."""


async def in_turns(items: Iterable[_T]) -> AsyncIterator[_T]:
    """These. To make one, and what is done with it, may take a while: in between others have their turns.

    What may change meanwhile has to be copied first.
    """
    since_sec = time.perf_counter()
    for item in items:
        yield item
        if time.perf_counter() - since_sec > _TURN_SEC:
            await asyncio.sleep(0)
            since_sec = time.perf_counter()


class Worker(Protocol):
    """Somebody who has more to do than one turn is for."""

    def step(self) -> bool:
        """Do a little of it. Whether it could go on at once."""


class Rounds:
    """Those who have much to do: a step each, in a circle, for a moment of every turn of the event loop.

    However many they are, and however much each of them has, all others have their turns in between.
    """

    def __init__(self) -> None:
        self._line: deque[Worker] = deque()
        self._is_set = False

    def join(self, worker: Worker) -> None:
        """Have its steps taken until there is nothing to go on with. It must not be in the line already."""
        self._line.append(worker)
        self._set()

    def _set(self) -> None:
        if not self._is_set:
            self._is_set = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._is_set = False
        until_sec = time.perf_counter() + _TURN_SEC
        try:
            for _ in range(_STEPS):
                if not self._line:
                    break
                worker = self._line.popleft()
                if worker.step():
                    self._line.append(worker)
                if time.perf_counter() > until_sec:
                    break
        finally:  # one that breaks is out; the others are not
            if self._line:
                self._set()
