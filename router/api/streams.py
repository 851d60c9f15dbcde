"""Server-sent events of the router itself: each is encoded once for all readers.

A reader that stops reading is disconnected; one that is too slow, or was away for too long, gets a new snapshot.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import Any

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

_log = logging.getLogger("router")

SEND_LIMIT_SEC = 30.0
"""Time for sending one event over a full connection, after which the client is taken not to read."""
_AWOKEN_AT_ONCE = 25
_SENT_AT_ONCE = 16
_FRESH_SEC = 1.0

_encode = msgspec.json.Encoder().encode


def frame(name: str, document: object, identity: str = "") -> bytes:
    """Encode one event. `document` is encoded as JSON."""
    head = f"id: {identity}\nevent: {name}\ndata: " if identity else f"event: {name}\ndata: "
    return b"%b%b\n\n" % (head.encode(), _encode(document))


def unnamed(document: object) -> bytes:
    """Encode one event of a stream whose events have no names."""
    return b"data: %b\n\n" % _encode(document)


class Shared:
    """A value that is made on demand, and cached for a second."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._made = b""
        self._made_sec = -math.inf

    @property
    def is_fresh(self) -> bool:
        return time.monotonic() - self._made_sec < _FRESH_SEC

    def get(self) -> bytes:
        if not self.is_fresh:
            self._made, self._made_sec = self._make(), time.monotonic()
        return self._made

    def forget(self) -> None:
        self._made_sec = -math.inf


class Feed:
    """Events for any number of followers, numbered from 1; the last `kept` can be requested again.

    `snapshot` is sent first, and in place of events that are no longer kept.
    """

    def __init__(self, snapshot: Callable[[], bytes], kept: int) -> None:
        self.last = 0
        """The number of the latest event."""
        self.followers = 0
        self._snapshot = Shared(snapshot)
        self._frames: deque[bytes] = deque(maxlen=kept)
        self._waiting: dict[asyncio.Future[None], None] = {}
        self._is_over = False

    def send(self, event: bytes, *, last: bool = False) -> None:
        """Send the next event. `last`: end all streams after it, as `end` does."""
        self.last += 1
        self._frames.append(event)
        self._is_over = self._is_over or last
        self._tell()

    def end(self) -> None:
        """End every stream once it has sent all events."""
        self._is_over = True
        self._tell()

    def start_anew(self) -> None:
        """Send everybody a new snapshot, after changes that have no events."""
        self.last += 1
        self._frames.clear()
        self._tell()

    def _tell(self) -> None:
        self._snapshot.forget()
        if self._waiting:
            waiting, self._waiting = self._waiting, {}
            asyncio.get_running_loop().call_soon(_awake, list(waiting))

    async def follow(self, after: int | None) -> AsyncIterator[bytes]:
        """Yield the events after that one, and new ones; None: a snapshot and new ones."""
        seen = -1 if after is None else after
        self.followers += 1
        try:
            while seen < self.last or not self._is_over:
                if not self.last - len(self._frames) <= seen <= self.last:
                    seen = self.last
                    yield self._snapshot.get()
                elif seen < self.last:
                    first = len(self._frames) - (self.last - seen)
                    news = list(islice(self._frames, first, first + _SENT_AT_ONCE))
                    seen += len(news)
                    yield b"".join(news)
                else:
                    await self._news()
        finally:
            self.followers -= 1

    async def _news(self) -> None:
        news = asyncio.get_running_loop().create_future()
        self._waiting[news] = None
        try:
            await news
        finally:
            self._waiting.pop(news, None)


def _awake(waiting: list[asyncio.Future[None]]) -> None:
    """Wake a few followers in each turn of the event loop, so that no token waits for all of them."""
    for news in waiting[-_AWOKEN_AT_ONCE:]:
        if not news.done():
            news.set_result(None)
    del waiting[-_AWOKEN_AT_ONCE:]
    if waiting:
        asyncio.get_running_loop().call_soon(_awake, waiting)


class EventStream(EventSourceResponse):
    """An `EventSourceResponse` that ends without a traceback if its client does not read."""

    def __init__(self, events: AsyncIterator[ServerSentEvent | bytes], **more: Any) -> None:
        super().__init__(events, **{"send_timeout": SEND_LIMIT_SEC, **more})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _log.warning("%s: disconnected a client that does not read", scope["path"])
