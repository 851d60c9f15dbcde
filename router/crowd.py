"""Bounds on what all clients together may take of the router itself: connections, and memory for their bodies.

Beyond `api.max_connections` a few more are let in for pages only, so that whoever looks after the router still
reaches it when it is full. What is beyond those, too, is told so and closed. A queue of requests is bounded by
the scheduler; this bounds what never gets as far.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from router.api.errors import ApiError

_log = logging.getLogger("router")

SPARE = 32
"""Connections for pages only."""
_SPARE_SEC = 10.0
_SPARE_MOST_SEC = 60.0
_SPARE_BYTES = 2 << 20
"""Of requests, on one of these: heads have no bound of their own there."""
_TURNED_AWAY = 256
_TURNED_AWAY_SEC = 2.0
_COME_BACK_SEC = 5.0
_TELL_AGAIN_SEC = 60.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGI = Callable[[Scope, Receive, Send], Awaitable[None]]


class Door:
    """A protocol factory for uvicorn: `protocol` while there is room, else pages only, else a refusal."""

    def __init__(self, protocol: Callable[..., asyncio.Protocol], limit: int, routes: frozenset[str]) -> None:
        """`routes` are the paths of the data plane."""
        self._protocol = protocol
        self._limit = limit
        self._routes = routes
        self._turned_away = 0
        self._told_sec = -math.inf

    def __call__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> asyncio.Protocol:
        connections = len(server_state.connections)
        if connections < self._limit:
            return self._protocol(config=config, server_state=server_state, app_state=app_state, _loop=_loop)
        self._tell()
        if connections < self._limit + SPARE:
            return _ForPages(self._pages, config, server_state, app_state, _loop)
        return _TurnedAway(self)

    def enter(self) -> bool:
        """Whether one more may wait to hear that there is no room."""
        self._turned_away += 1
        return self._turned_away <= _TURNED_AWAY

    def leave(self) -> None:
        self._turned_away -= 1

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told_sec > _TELL_AGAIN_SEC:
            self._told_sec = now
            _log.warning("%d clients are connected (api.max_connections): more are turned away", self._limit)

    async def _pages(self, app: ASGI, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path not in self._routes and not path.endswith("/stream"):
            await app(scope, receive, send)
            return
        error = no_connection_left()
        headers = [*error.headers(), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": error.body(path)})


class _ForPages(HttpToolsProtocol):
    """uvicorn's own, for a moment."""

    def __init__(
        self,
        pages: Callable[[ASGI, Scope, Receive, Send], Awaitable[None]],
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        app = cast(ASGI, self.app)

        async def limited(scope: Any, receive: Any, send: Any) -> None:
            await pages(app, scope, receive, send)

        self.app = limited
        self._received = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(_SPARE_SEC, self._leave)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > _SPARE_BYTES:
            self.transport.abort()
        else:
            super().data_received(data)

    def _leave(self) -> None:
        """It may finish what it is at, but not for ever: others wait for the place."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
        else:
            self.loop.call_later(_SPARE_MOST_SEC, self.transport.abort)


class _TurnedAway(asyncio.Protocol):
    """Says why, once the client has said something: an answer before the question would be lost with it."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._door.enter():
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


class Bodies:
    """Bytes of all the request bodies that are held, from their first part to the end of their request."""

    def __init__(self) -> None:
        self.held = 0

    def check(self, size: int, limit: int) -> None:
        """Raises ApiError 503 when all together would be more than `limit` bytes."""
        if self.held + size > limit:
            message = (
                f"The bodies of all requests together would take more than {limit >> 20} MiB (api.max_bodies_mb)."
            )
            raise ApiError(503, "too_many_bodies", message, retry_after_sec=_COME_BACK_SEC)

    def hold(self, size: int, limit: int) -> None:
        """Raises ApiError 503 like `check`."""
        self.check(size, limit)
        self.held += size

    def release(self, size: int) -> None:
        self.held -= size
