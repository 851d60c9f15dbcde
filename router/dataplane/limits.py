"""Limits on what all clients together take of the router itself: connections, and memory for request bodies.

At `api.max_connections`, a new connection replaces the one that has been idle, or in the middle of a request, for
the longest. If all connections wait for an answer or receive one, a few more are accepted for management only, so
that operators still reach a full router; these places change hands in the same way. Connections beyond those get
an error and are closed. The scheduler bounds the queues; these limits apply before a request gets there.
The size of one body (`api.max_body_mb`) is checked in `incoming`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from heapq import nsmallest
from itertools import chain, islice
from typing import Any, Protocol, cast

from router.dataplane.on_uvicorn import Config, ServerState, peer_of
from router.http.errors import ApiError
from router.observe.events import ClientRefused, Events
from router.scheduling.queue import Priority

_log = logging.getLogger("router")

SPARE = 32
"""Connections for pages only."""
_TURNED_AWAY = 256
_TURNED_AWAY_SEC = 2.0
_COME_BACK_SEC = 5.0
_TELL_AGAIN_SEC = 60.0
_FOUND_AT_ONCE = 256
_MOST_GIVE_WAY = 64
"""Maximum number of requests that are displaced for the body of one."""
_LOOK_AGAIN_SEC = 0.1
"""Pause before idle connections are looked for again, if there were none."""
_JUST_COME_SEC = 0.05
"""Connections that came within this time are not idle: their request may not have been read yet."""


class Guest(Protocol):
    """A client's connection."""

    @property
    def idle_since_sec(self) -> float | None:
        """Time of the last data from the client; None while an answer is awaited or on its way."""

    @property
    def is_gone(self) -> bool: ...

    def give_way(self) -> None:
        """Close the connection, as another one needs its place."""


class Door:
    """A protocol factory for uvicorn: `protocol` while there is room, else `pages`, else a refusal."""

    def __init__(
        self,
        protocol: Callable[..., asyncio.BaseProtocol],
        pages: Callable[..., asyncio.BaseProtocol],
        limit: int,
        events: Events,
    ) -> None:
        self._protocol = protocol
        self._pages = pages
        self.limit = limit
        self._guests: set[Guest] = set()
        self._events = events
        self._spare: list[Guest] = []
        self._idle: list[tuple[float, Guest]] = []
        """Idle connections found by the last search, the longest idle last."""
        self._look_again_sec = -math.inf
        self._turned_away = 0
        self._told_sec = -math.inf

    @property
    def connections(self) -> int:
        """The number of open connections, of which at most `SPARE` are beyond the limit."""
        return len(self._guests)

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> asyncio.BaseProtocol:
        self._guests = guests = cast(set[Guest], server_state.connections)
        now = asyncio.get_running_loop().time()
        protocol = self._protocol
        if len(guests) >= self.limit:
            self._spare = [guest for guest in self._spare if not guest.is_gone]
            if len(guests) - len(self._spare) >= self.limit and not self._someone_gives_way(guests, now):
                self._tell(now)
                if len(self._spare) >= SPARE:
                    idle = min(_idle(self._spare), key=_since, default=None)
                    if idle is None:
                        return _TurnedAway(self)
                    idle[1].give_way()
                    self._spare.remove(idle[1])
                protocol = self._pages
        made = protocol(config=config, server_state=server_state, app_state=app_state, _loop=_loop)
        if protocol is self._pages:
            self._spare.append(cast(Guest, made))
        return made

    def enter(self, peer: str) -> bool:
        """Count a refused connection. Returns whether it may stay open for an error response."""
        self._turned_away += 1
        said = "connection refused: too many clients are connected"
        self._events.publish(ClientRefused("too_many_connections", peer, said))
        return self._turned_away <= _TURNED_AWAY

    def leave(self) -> None:
        self._turned_away -= 1

    def _someone_gives_way(self, guests: set[Guest], now: float) -> bool:
        """Close the connection idle for the longest. Many are found at once, as thousands may be needed."""
        if not self._idle and now >= self._look_again_sec:
            spare = set(self._spare)
            idle = _idle(guest for guest in guests if guest not in spare)
            found = nsmallest(_FOUND_AT_ONCE, idle, key=_since)
            self._idle = [each for each in reversed(found) if each[0] <= now - _JUST_COME_SEC]
            if not self._idle:
                self._look_again_sec = now + _LOOK_AGAIN_SEC
        while self._idle:
            since, guest = self._idle.pop()
            if not guest.is_gone and guest.idle_since_sec == since:
                guest.give_way()
                return True
        return False

    def _tell(self, now: float) -> None:
        if now - self._told_sec > _TELL_AGAIN_SEC:
            self._told_sec = now
            _log.warning(
                "%d clients are connected (api.max_connections); further connections are refused", self.limit
            )


def _idle(guests: Iterable[Guest]) -> Iterable[tuple[float, Guest]]:
    return ((since, guest) for guest in guests if (since := guest.idle_since_sec) is not None)


def _since(found: tuple[float, Guest]) -> float:
    return found[0]


class _TurnedAway(asyncio.Protocol):
    """A refused connection: the error is sent after the client's first data; earlier it would be lost."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._door.enter(peer_of(self._transport)):
            asyncio.get_running_loop().call_later(_TURNED_AWAY_SEC, self._transport.abort)
        else:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            error = no_connection_left()
            body = error.body(data[:64].decode("latin-1").partition(" ")[2])
            lines = [b"HTTP/1.1 503 Service Unavailable", *(b"%b: %b" % header for header in error.headers())]
            lines += [b"content-length: %d" % len(body), b"connection: close", b"", body]
            transport.write(b"\r\n".join(lines))
            transport.write_eof()  # closed by the client, or in two seconds

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.leave()


def no_connection_left() -> ApiError:
    message = "Too many clients are connected (api.max_connections)."
    return ApiError(503, "too_many_connections", message, retry_after_sec=_COME_BACK_SEC)


class Holder(Protocol):
    """A waiting request that holds its body."""

    def give_way(self, reason: str) -> None:
        """Release the body and refuse the request with `reason`."""


class Bodies:
    """Bytes of all request bodies, each counted from its first part to the end of its request."""

    def __init__(self) -> None:
        self.held = 0
        self._waiting: dict[Priority, dict[Holder, int]] = {priority: {} for priority in Priority}

    def check(self, size: int, limit: int, priority: Callable[[], Priority]) -> None:
        """Raise ApiError 503 if all bodies would exceed `limit` bytes even with waiting requests of lower priority
        displaced.
        """
        if self.held + size > limit:
            self._who_give_way(self.held + size - limit, limit, priority())

    def hold(self, size: int, limit: int, priority: Callable[[], Priority]) -> None:
        """Hold bytes of a body, displacing requests of lower priority if necessary. Raises ApiError 503."""
        if self.held + size > limit:
            for holder in self._who_give_way(self.held + size - limit, limit, priority()):
                holder.give_way(f"{_too_many(limit)} A request of higher priority has arrived.")
        self.held += size

    def release(self, size: int) -> None:
        self.held -= size

    def wait(self, holder: Holder, priority: Priority, size: int) -> None:
        """Register a waiting request that may be displaced."""
        self._waiting[priority][holder] = size

    def wait_no_more(self, holder: Holder, priority: Priority) -> None:
        self._waiting[priority].pop(holder, None)

    def _who_give_way(self, missing: int, limit: int, priority: Priority) -> list[Holder]:
        """Return the requests to displace. Raises ApiError 503 if none, or only too many, would make room."""
        lower = [self._waiting[below] for below in (Priority.LOW, Priority.NORMAL) if below > priority]
        found: list[Holder] = []
        for holder, size in islice(chain.from_iterable(reversed(line.items()) for line in lower), _MOST_GIVE_WAY):
            found.append(holder)
            missing -= size
            if missing <= 0:
                return found
        raise ApiError(503, "too_many_bodies", _too_many(limit), retry_after_sec=_COME_BACK_SEC)


def _too_many(limit: int) -> str:
    return f"All request bodies together would exceed {limit >> 20} MiB (api.max_bodies_mb)."
