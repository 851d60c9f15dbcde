"""A router's data path in this process: its own parsers and exchanges between a played client and a played engine.

Nothing is sent over a socket or waits, so that tens of thousands of requests and answers pass in seconds.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, cast

import uvicorn
from uvicorn.server import ServerState

from router.catalog.cards import Cards
from router.config.resolved import Config
from router.dataplane.exchange import Exchanges
from router.dataplane.server import HttpProtocol
from router.dialects.translators import TRANSLATORS
from router.engines.base import Endpoint
from router.engines.llamacpp.model import LlamaCppModel
from router.engines.upstream import Body, Connection, EnginePool, Receiver
from router.http.auth import Keyring
from router.http.origins import Browsers
from router.observe.events import RequestDone
from router.runtime.dispatcher import Ticket
from router.scheduling.messages import Refusal, Reject

CONFIG = Config(models={"a": LlamaCppModel("a", Path("a.gguf"), (), slots=4)})
_MOST_TRIES = 2


class PlayedTransport:
    """A transport that keeps what is written."""

    def __init__(self, protocol: asyncio.Protocol, descriptor: socket.socket) -> None:
        self.written = bytearray()
        self.aborted = self.closed = False
        self._protocol = protocol
        self._descriptor = descriptor

    def write(self, data: bytes) -> None:
        assert not self.is_closing(), "written after the end"
        self.written += data

    def writelines(self, parts: Any) -> None:
        self.write(b"".join(map(bytes, parts)))

    def write_eof(self) -> None: ...

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.aborted or self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._descriptor if name == "socket" else default


class _PlayedPool:
    """Asks the engine of `PlayedRouter`, and keeps no connection."""

    def __init__(self, router: PlayedRouter) -> None:
        self._router = router
        self.asked_sec = self.heard_sec = 0.0
        self.endpoint = Endpoint(0, knows_key=True)

    def ask(self, method: bytes, target: bytes, lines: bytes, body: Body, receiver: Receiver) -> None:
        router = self._router
        connection = Connection(cast(EnginePool, self))
        connection.connection_made(cast(asyncio.Transport, PlayedTransport(connection, router.descriptor)))
        router.asked.append((target, bytes(body) if isinstance(body, bytes | bytearray) else b""))
        router.engines.append(connection)
        connection.send(b"%b %b\r\n%b\r\n" % (method, target, lines), body, receiver)

    def opened(self, connection: Connection) -> None: ...

    def lost(self, connection: Connection) -> None: ...

    def give_back(self, connection: Connection) -> None:
        connection.close()


class _PlayedHandle:
    keeper = None


class _PlayedEngine:
    handle = _PlayedHandle()
    id = 1
    ready_sec = failed_probes = 0
    alive_sec = 0.0

    def __init__(self, pool: _PlayedPool) -> None:
        self.pool = pool

    def loading_sec(self, *, since: float) -> float:
        return 0.0


class PlayedRouter:
    """The router, and the dispatcher of its exchanges, which grants every request a slot at once."""

    def __init__(self) -> None:
        self.descriptor, self._other = socket.socketpair()
        self.config = CONFIG
        self.asked: list[tuple[bytes, bytes]] = []
        self.engines: list[Connection] = []
        self.done_requests: list[RequestDone] = []
        self.events = self
        self._engine: Any = _PlayedEngine(_PlayedPool(self))
        keyring = Keyring(CONFIG.api)
        self._exchanges = Exchanges(cast(Any, self), keyring, Browsers(CONFIG.api, keyring), Cards(), TRANSLATORS)
        self._state = ServerState()

    # --- what is played -----------------------------------------------------------------------------------

    def client(self) -> tuple[HttpProtocol, PlayedTransport]:
        """Open a connection; returns its protocol, and its transport with what was written."""
        config = uvicorn.Config(_no_page, interface="asgi3", log_config=None, lifespan="off")
        config.loaded_app = _no_page
        protocol = HttpProtocol(self._exchanges, config, self._state, {}, asyncio.get_running_loop())
        transport = PlayedTransport(protocol, self.descriptor)
        protocol.connection_made(cast(asyncio.Transport, transport))
        return protocol, transport

    def close(self) -> None:
        self.descriptor.close()
        self._other.close()

    # --- the dispatcher -----------------------------------------------------------------------------------

    def is_taken(self, request_id: str) -> bool:
        return False

    def submit(
        self, request_id: str, alias: str, priority: Any, client: str = "", *, slotless: bool = False
    ) -> Ticket:
        ticket = Ticket(request_id, alias, priority, 0.0, 0.0, client, slotless)
        ticket.decide(0.0, self._engine, None)
        return ticket

    def requeue(self, ticket: Ticket, reason: str) -> None:
        ticket.engine = None
        ticket.retries += 1
        if ticket.retries < _MOST_TRIES:
            ticket.decide(0.0, self._engine, None)
        else:
            ticket.decide(0.0, None, Reject(ticket.id, Refusal.MODEL_FAILED, reason))

    def finish(self, ticket: Ticket, *, served: bool, computed: bool) -> None: ...

    def keep_alive(self, alias: str, idle_sec: float) -> None: ...

    def wait_of(self, ticket: Ticket, *, is_one_of_many: bool = False) -> None: ...

    def facts_of(self, alias: str) -> None: ...

    def in_full(self, alias: str, text: str) -> str:
        return text

    def publish(self, happening: object) -> None: ...

    def listen(self, kind: type, listener: object) -> None: ...

    def done(self, request: RequestDone) -> None:
        self.done_requests.append(request)


async def _no_page(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
