"""One `transformers serve` as a child process.

Measured with transformers 5.24.0: the model that it is started with is loaded before it listens, so an open port
means ready; `/health` answers all the while it computes; SIGTERM makes it wait for whoever is connected, without a
limit, and ends it with -15. It takes no key, so it listens on 127.0.0.1 only, and counts as ready only if the port
is its own.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import Sequence

import anyio
import psutil

from router.engines import MARK_VARIABLE
from router.engines.base import PROBE_LIMIT_SEC, Endpoint, Facts, Launch
from router.engines.log_ring import LogRing
from router.engines.process import EngineOrder, EngineProcess, Spawned
from router.engines.questions import CANNOT_ASK, status
from router.engines.transformers.entry import OFFLINE
from router.engines.transformers.model import TransformersModel
from router.scheduling.messages import Retry
from router.system.privacy import without_secrets
from router.system.readings import apart

_HOST = "127.0.0.1"
_POLL_SEC = 0.025
_HEALTH = "/health"
_PORT_IS_TAKEN = 3
_WRONG_USAGE = 2
_FOR_GOOD = re.compile(r"does not recognize this architecture|Unrecognized model in")


class TransformersServer(EngineProcess):
    """Running server. Create it with `start`."""

    def __init__(
        self,
        order: EngineOrder,
        endpoint: Endpoint,
        mark: str,
        spawned: Spawned,
        log: LogRing,
        context: int | None,
    ) -> None:
        super().__init__(order, endpoint, (MARK_VARIABLE, mark), spawned, log)
        self._context = context

    @classmethod
    def start(
        cls, launch: Launch, model: TransformersModel, argv: Sequence[str], port: int, log: LogRing
    ) -> TransformersServer:
        """Spawn it. Raises EngineFailed when its program cannot be run."""
        mark = secrets.token_hex(16)
        env = {**without_secrets(os.environ), **launch.shows, **OFFLINE, MARK_VARIABLE: mark}
        order = EngineOrder(
            model.alias,
            (*argv, "--host", _HOST, "--port", str(port)),
            env,
            launch.load_stall_sec,
            launch.load_limit_sec,
            launch.stop_grace_sec,
        )
        spawned = Spawned.by(order.argv, env, logs_stdout=True)
        return cls(order, Endpoint(port, host=_HOST), mark, spawned, log, model.longest)

    async def _until_it_serves(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SEC)
            if await self.healthy() and await apart(self._owns_port):
                return

    def _owns_port(self) -> bool:
        """Whether it is our child that listens there."""
        try:
            connections = psutil.Process(self.pid).net_connections("tcp")
        except psutil.Error:
            return False
        port = self.endpoint.port
        return any(each.status == psutil.CONN_LISTEN and each.laddr[1:] == (port,) for each in connections)

    async def healthy(self, limit_sec: float = PROBE_LIMIT_SEC) -> bool:
        try:
            with anyio.fail_after(limit_sec):
                answer = await status(self.endpoint, _HEALTH)
        except TimeoutError:
            return False
        return self.alive and answer in (200, CANNOT_ASK)

    async def facts(self) -> Facts | None:
        """Return what is known of the model's files: it tells nothing itself."""
        return Facts(self._context)

    async def _ask_to_go(self, grace_sec: float) -> None:
        await self._terminate(grace_sec, grace_sec)

    @staticmethod
    def retry_after(code: int, log: Sequence[str]) -> Retry:
        if code == _PORT_IS_TAKEN:
            return Retry.AT_ONCE
        if code == _WRONG_USAGE or any(map(_FOR_GOOD.search, log)):
            return Retry.NEVER
        return Retry.LATER
