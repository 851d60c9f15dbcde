"""One `vllm serve`, and the processes that it starts.

Measured with vLLM 0.32. It binds its port long before it listens there, and one that has lost the port to another
program never listens, but stays. So it counts as ready only if the listening socket belongs to one of its
processes. `minder.py` stops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar

import psutil

from router.engines import minder
from router.engines.base import Ending, EngineFailed, Launch
from router.engines.log_ring import LogRing
from router.engines.process import EngineOrder, EngineProcess, Spawned
from router.engines.vllm import log as words
from router.engines.vllm import sleep
from router.engines.vllm.engine import COMPUTES, OFFLINE, QUIET, VllmEngine, arguments, endpoint_of, probe_of
from router.engines.vllm.entry import KEY_VARIABLE
from router.engines.vllm.model import VllmModel
from router.engines.vllm.program import Program
from router.scheduling.messages import Retry
from router.system.privacy import without_secrets
from router.system.processes import descendants, signal_group
from router.system.readings import apart

_HOST = "127.0.0.1"
_MINDER_SEC = 9.0
"""For the minder to kill what is left, and to remove what that leaves."""
_LONGEST_FOLDER = 60
"""Of the temporary folder: sockets in it have names of 40 characters, and paths of sockets may have 107."""


class VllmServer(VllmEngine, EngineProcess):
    """Running server. Create it with `start`."""

    orphan_term_sec: ClassVar[float] = 12.0

    def __init__(
        self,
        order: EngineOrder,
        model: VllmModel,
        port: int,
        key: str,
        spawned: Spawned,
        log: LogRing,
        folder: Path,
    ) -> None:
        """`folder` is for temporary files."""
        super().__init__(order, endpoint_of(_HOST, port, key), (KEY_VARIABLE, key), spawned, log)
        self.folder = folder
        self._probe = probe_of(model)
        self._port_is_foreign = False
        if sleep.FLAG in order.argv:
            self.sleeper = sleep.VllmSleeper(self.endpoint)

    @classmethod
    def start(cls, launch: Launch, model: VllmModel, program: Program, port: int, log: LogRing) -> VllmServer:
        """Spawn a server. Raises EngineFailed if it cannot be run."""
        key = secrets.token_hex(24)
        try:
            folder = Path(tempfile.mkdtemp(prefix="llama-router-", dir=_temporary()))
        except OSError as error:
            raise EngineFailed(
                f"its temporary folder cannot be made: {error}", "its folder cannot be made"
            ) from error
        argv = (
            *(sys.executable, "-I", "-S", str(minder.__file__), str(launch.stop_grace_sec), str(folder)),
            *(str(program.path), "serve"),
            *arguments(launch, model, program, str(model.model_path), _HOST, port),
        )
        own = {KEY_VARIABLE: key, "TMPDIR": str(folder)}
        env = {**without_secrets(os.environ), **OFFLINE, **QUIET, **launch.shows, **own}
        if sleep.FLAG in argv:
            env[sleep.VARIABLE] = "1"
        order = EngineOrder(
            model.alias, argv, env, launch.load_stall_sec, launch.load_limit_sec, launch.stop_grace_sec
        )
        try:
            spawned = Spawned.by(argv, env, logs_stdout=True, death_signal=signal.SIGTERM)
        except EngineFailed:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        server = cls(order, model, port, key, spawned, log, folder)
        if model.sleep and server.sleeper is None:
            server.cannot_sleep = f"{program.build} computes on the CPU here, and vLLM sleeps on GPUs only"
        return server

    async def _until_it_serves(self) -> None:
        await super()._until_it_serves()
        if not await apart(self._listens):
            self._port_is_foreign = True
            told = f"another program listens on its port, {self.endpoint.port}"
            raise EngineFailed(told, told)

    def _listens(self) -> bool:
        """Return whether one of its processes has the socket that listens; True where the system does not say."""
        for pid in descendants(self.pid):
            try:
                sockets = psutil.Process(pid).net_connections("tcp")
            except psutil.NoSuchProcess:
                continue
            except psutil.AccessDenied:
                return True
            if any(each.status == psutil.CONN_LISTEN and each.laddr[1] == self.endpoint.port for each in sockets):
                return True
        return False

    def _watch_work(self) -> Callable[[], Awaitable[bool]]:
        before_sec, began = self._computed_sec(), self._loop.time()

        async def computes() -> bool:
            return self._computed_sec() - before_sec >= COMPUTES * (self._loop.time() - began)

        return computes

    def _computed_sec(self) -> float:
        """Return the processor time of all its processes."""
        total = 0.0
        for pid in descendants(self.pid):
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                total += times.user + times.system
        return total

    async def _ask_to_go(self, grace_sec: float) -> None:
        self._is_asked_to_go = True
        os.kill(self.pid, signal.SIGTERM)  # to the minder, which kills all of it after the same time
        await asyncio.wait({self.exited}, timeout=grace_sec + _MINDER_SEC)

    def _kill_now(self) -> None:
        """Have the minder kill it, so that nothing is left in shared memory; soon after, kill both."""
        os.kill(self.pid, signal.SIGINT)
        self._loop.call_later(_MINDER_SEC, self._kill_with_minder)

    def _kill_with_minder(self) -> None:
        if self.alive:
            signal_group(self.pid, signal.SIGKILL)

    def _has_lost_a_process(self) -> bool:
        return words.has_lost_a_process(self.log.since(self._log_begin))

    def _why(self, code: int) -> Ending:
        ending = super()._why(code)
        return ending._replace(retry=Retry.AT_ONCE) if self._port_is_foreign else ending


def _temporary() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _LONGEST_FOLDER else "/tmp"  # noqa: S108 - the folder in it is for its owner only
