"""Work that takes long, in several turns of the event loop, so that no token waits for all of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

_T = TypeVar("_T")

_TURN_SEC = 0.002


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
