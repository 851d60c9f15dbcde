"""Engines on this machine: ports for child processes and a record of them, and containers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from router.config.schema import KvStore as Settings
from router.engines.base import EngineFailed
from router.engines.docker import Containers
from router.engines.orphans import EngineRecord
from router.engines.process import EngineProcess, port_is_free
from router.kv.store import KvStore
from router.system.state import State

LAST_PORT = 65535
_LOST_SEC = 60.0
"""Time for which a port is avoided after an engine could not bind it although it seemed free."""

E = TypeVar("E", bound=EngineProcess)


class LocalLauncher:
    """Starts engines of any kind on ports from `base_port` on, skipping those in use.

    `folder` holds the Unix sockets of engines that support them and is used by nothing else; None: no sockets.
    """

    def __init__(
        self,
        base_port: int,
        record: EngineRecord,
        folder: Path | None,
        containers: Containers | None = None,
        kv_store: KvStore | None = None,
    ) -> None:
        self.base_port = base_port
        self.kv_store = kv_store if kv_store is not None else KvStore(None, Settings())
        self.containers = containers if containers is not None else Containers(State())
        self._record = record
        self._sockets = None if folder is None else _made_ready(folder.absolute())
        self._engines: dict[int, EngineProcess] = {}
        self._lost_sec: dict[int, float] = {}

    def launch(self, start: Callable[[int], E], *, binds_early: bool = False) -> E:
        """Return the engine that `start` spawns for a free port. Raises EngineFailed.

        `binds_early`: such engines, also those of other routers, bind a port long before they listen.
        """
        port = self._free_port(shared=not binds_early)
        engine = self._engines[port] = start(port)
        self._record.add(engine)
        return engine

    @property
    def has_sockets(self) -> bool:
        """Whether engines can have Unix sockets now; the folder may have been deleted."""
        return self._sockets is not None and self._sockets.is_dir()

    def unix_socket(self, port: int) -> Path | None:
        """Path of the socket of an engine with this port; None without sockets."""
        return None if self._sockets is None else self._sockets / f"{port}.sock"

    def _free_port(self, *, shared: bool) -> int:
        """Return a free port, a recently lost one only if there is no other. Raises EngineFailed."""
        now = time.monotonic()
        for port, engine in list(self._engines.items()):
            if engine.exited.done():  # not before: a dead one still has to remove its socket
                del self._engines[port]
                if engine.lost_its_port:
                    self._lost_sec[port] = now
        self._lost_sec = {port: sec for port, sec in self._lost_sec.items() if now - sec < _LOST_SEC}
        for lost in (False, True):
            for port in range(self.base_port, LAST_PORT + 1):
                if port in self._engines or (port in self._lost_sec) is not lost:
                    continue
                if port_is_free(port, shared=shared):
                    return port
        raise EngineFailed(f"no port is free from {self.base_port} on", "no port is free")


def _made_ready(folder: Path) -> Path | None:
    """Remove old sockets and return the folder; None if sockets cannot be created there or passed to engines."""
    if "," in str(folder) or '"' in str(folder):  # `--host` takes CSV
        return None
    longest = folder / f"{LAST_PORT}.sock"
    try:
        for left in folder.glob("*.sock"):
            left.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.bind(str(longest))
        longest.unlink()
    except OSError:  # the path is too long, or the file system has no sockets
        return None
    return folder
