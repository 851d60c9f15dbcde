"""All that the router uses of uvicorn beyond its public API: flow control, ASGI cycle, internals of the server.

No other module imports uvicorn, and `pyproject.toml` pins the minor version for which this one was written. A test
shows what another version changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Generator
from typing import Any, Protocol, cast

import anyio
import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from router.dataplane.heads import RequestHead

__all__ = ["HIGH_WATER_LIMIT", "Config", "FlowControl", "Page", "Server", "ServerState", "peer_of"]

_log = logging.getLogger("router.http")

_TICK_SEC = 1.0
_GRACE_SEC = 2
"""Time for writing what is left when the server ends; requests have been finished by then."""


class Server(uvicorn.Server):
    """A server that leaves signals to the router, which answers requests with 503 until those in flight end."""

    def __init__(
        self,
        app: ASGIApp,
        protocols: Callable[..., asyncio.BaseProtocol],
        on_ready: Callable[[], None],
        *,
        keep_alive_sec: int,
    ) -> None:
        """`protocols` makes the protocol of each connection."""
        config = Config(
            cast(Any, app),
            http=cast(Any, protocols),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=keep_alive_sec,
            timeout_graceful_shutdown=_GRACE_SEC,
        )
        super().__init__(config)
        self._on_ready = on_ready
        self._is_to_end = asyncio.Event()

    def end(self) -> None:
        self.should_exit = True
        self._is_to_end.set()

    async def main_loop(self) -> None:
        """Renew the Date header every second. uvicorn's own loop wakes up ten times a second for that."""
        while not await self.on_tick(0):
            with anyio.move_on_after(_TICK_SEC):
                await self._is_to_end.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def peer_of(transport: asyncio.Transport) -> str:
    """Return the client's address, or "unknown"."""
    address = get_remote_addr(transport)
    return address[0] if address is not None else "unknown"


class Line(Protocol):
    """The connection on which a page was requested."""

    config: Config
    server_state: ServerState
    app_state: dict[str, Any]
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    flow: FlowControl

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...

    def answered(self, *, keep_alive: bool) -> None: ...

    def hold_body(self) -> None: ...

    def take_body(self) -> None: ...


class Page:
    """A request for the ASGI application: a turn of the connection, and the transport of uvicorn's cycle."""

    def __init__(self, connection: Line, request: RequestHead) -> None:
        self._connection = connection
        config, state = connection.config, connection.server_state
        awaits_invitation = (b"expect", b"100-continue") in request.headers
        scope = {
            "type": "http",
            "asgi": {"version": config.asgi_version, "spec_version": "2.3"},
            "http_version": request.http_version,
            "server": get_local_addr(connection.transport),
            "client": get_remote_addr(connection.transport),
            "scheme": "http",
            "root_path": "",
            "headers": request.headers,
            "state": connection.app_state.copy(),
            "method": request.method.decode("ascii"),
            "path": request.path,
            "raw_path": request.raw_path,
            "query_string": request.query,
        }
        self._cycle = RequestResponseCycle(
            scope=cast(Any, scope),
            transport=cast(asyncio.Transport, self),
            flow=cast(FlowControl, self),
            logger=_log,
            access_logger=_log,
            access_log=False,
            default_headers=state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=awaits_invitation,
            keep_alive=request.keep_alive,
            on_response=self._answered,
        )

    # --- the turn ---------------------------------------------------------------------------------------

    def begin(self, to_come: int) -> None:
        work = self._cycle.run_asgi(self._connection.config.loaded_app)
        task = self._connection.loop.create_task(work)
        self._connection.server_state.tasks.add(task)
        task.add_done_callback(self._ended)

    def add_body(self, part: bytes) -> None:
        if self._cycle.response_complete:
            return
        self._cycle.body += part
        if len(self._cycle.body) > HIGH_WATER_LIMIT:
            self._connection.hold_body()  # until the application asks for more
        self._cycle.message_event.set()

    def end_body(self) -> None:
        self._cycle.more_body = False
        self._cycle.message_event.set()

    def leave(self) -> None:
        self._cycle.disconnected = True
        self._cycle.message_event.set()

    def pause(self) -> None:
        """Do nothing: the cycle watches the connection's flow control."""

    def resume(self) -> None:
        """Do nothing, as in `pause`."""

    def hang_up(self) -> None:
        self._cycle.keep_alive = False

    def failed(self, error: Exception) -> None:
        _log.error("unhandled error while serving a request", exc_info=error)
        self._connection.abort()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._connection.server_state.tasks.discard(task)
        cycle = self._cycle
        cast(dict[str, Any], cycle.scope).clear()  # reference cycles would keep the headers alive
        del cycle.transport, cycle.flow

    def _answered(self) -> None:
        self._connection.answered(keep_alive=self._cycle.keep_alive)

    # --- the flow, and the transport --------------------------------------------------------------------

    @property
    def write_paused(self) -> bool:
        return self._connection.flow.write_paused

    async def drain(self) -> None:
        await self._connection.flow.drain()

    def resume_reading(self) -> None:
        self._connection.take_body()

    def write(self, data: bytes) -> None:
        self._connection.write(data)

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def close(self) -> None:
        if not self._cycle.response_complete:  # a partial answer must not look complete; `_answered` ends those
            self._connection.abort()
