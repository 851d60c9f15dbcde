"""Engines as child processes of this machine: ports for them, and a record of them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from router.engines.base import EngineFailed
from router.engines.orphans import EngineRecord
from router.engines.process import EngineProcess, port_is_free

LAST_PORT = 65535
_LOST_SEC = 60.0
"""How long a port is left alone that an engine could not get although it seemed free."""

E = TypeVar("E", bound=EngineProcess)


class LocalLauncher:
    """Starts engines on ports from `base_port` on, whatever their kind; ports that are in use are skipped.

    Unix sockets for those that take them are made in `folder`, which is ours alone (None: there are none).
    """

    def __init__(self, base_port: int, record: EngineRecord, folder: Path | None) -> None:
        self.base_port = base_port
        self._record = record
        self._sockets = None if folder is None else _made_ready(folder.absolute())
        self._engines: dict[int, EngineProcess] = {}
        self._lost_sec: dict[int, float] = {}

    def launch(self, start: Callable[[int], E]) -> E:
        """Return the engine that `start` spawns for a free port. Raises EngineFailed."""
        port = self._free_port()
        engine = self._engines[port] = start(port)
        self._record.add(engine)
        return engine

    @property
    def has_sockets(self) -> bool:
        """Whether engines can have Unix sockets now: somebody may have cleaned up."""
        return self._sockets is not None and self._sockets.is_dir()

    def unix_socket(self, port: int) -> Path | None:
        """That of an engine with this port."""
        return None if self._sockets is None else self._sockets / f"{port}.sock"

    def _free_port(self) -> int:
        """Raises EngineFailed. Of those that were just lost none is taken as long as there is another."""
        now = time.monotonic()
        for port, engine in list(self._engines.items()):
            if engine.exited.done():  # only then: one that is dead has yet to clear its socket away
                del self._engines[port]
                if engine.lost_its_port:
                    self._lost_sec[port] = now
        self._lost_sec = {port: sec for port, sec in self._lost_sec.items() if now - sec < _LOST_SEC}
        for lost in (False, True):
            for port in range(self.base_port, LAST_PORT + 1):
                if port not in self._engines and (port in self._lost_sec) is lost and port_is_free(port):
                    return port
        raise EngineFailed(f"no port is free from {self.base_port} on", "no port is free")


def _made_ready(folder: Path) -> Path | None:
    """The folder, without what is left of earlier sockets; None if engines can't make any there, or be told."""
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
