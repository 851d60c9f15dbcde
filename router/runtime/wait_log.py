"""What the models' first waiting requests have waited for, as it changed.

It is looked at every second, by model: nothing is done per request, and waits that are over still have reasons.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict, deque
from typing import NamedTuple

from router.runtime.dispatcher import Dispatcher
from router.scheduling.wait_reason import why
from router.system.turns import in_turns

_LOOK_SEC = 1.0
_KEPT = 200
"""Number of reasons kept of each model."""
_FIGURES = re.compile(r"\d+(?:\.\d+)?")


class Noted(NamedTuple):
    """A reason, from the time on at which it was noted."""

    at: float
    """Seconds since the epoch."""
    reason: str
    """In the words that every client may see; empty: nobody waited any more."""


class WaitLog:
    """The reasons of all models."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._of_model: defaultdict[str, deque[Noted]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._waiting: set[str] = set()
        """Models with requests that wait."""

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SEC)
            await self.look()

    async def look(self) -> None:
        """Note what has changed."""
        models = self._dispatcher.scheduler.models
        for alias in [alias for alias in self._waiting if alias not in models or not models[alias].queue]:
            self._waiting.discard(alias)
            self._of_model[alias].append(Noted(time.time(), ""))
        async for model in in_turns([model for model in models.values() if model.queue]):
            if (first := model.queue.head()) is None:
                continue
            alias = model.spec.alias
            self._waiting.add(alias)
            reason = why(model, time.monotonic(), slotless=first.slotless)
            noted = self._of_model[alias]
            if not noted or _without_figures(noted[-1].reason) != _without_figures(reason):
                noted.append(Noted(time.time(), reason))
        for gone in self._of_model.keys() - models.keys():
            del self._of_model[gone]

    def between(self, alias: str, begin: float, end: float) -> list[Noted]:
        """Return the reasons of a time, beginning with the one that held at its begin."""
        found: list[Noted] = []
        for noted in self._of_model.get(alias, ()):
            if noted.at > end:
                break
            if noted.at <= begin:
                found = [noted._replace(at=begin)]
            else:
                found.append(noted)
        return [noted for noted in found if noted.reason]


def _without_figures(reason: str) -> str:
    """Return a reason without what counts down or up in it."""
    return _FIGURES.sub("", reason)
