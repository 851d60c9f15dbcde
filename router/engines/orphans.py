"""Record of the running engines, by which the next router ends those that outlive a killed router.

Engines normally die with their router (`system.processes.spawn`), but not on every platform, nor can every engine
be made to. A starting router therefore ends the engines recorded in its state directory by a dead one. An engine
is recognized by its mark, an environment variable that its descendants inherit; where environments cannot be read,
by its pid together with its start time. A pid alone is never enough, since it may have been reused. Descendants
that have wiped their environment, as vLLM's do to change their names, are recognized by their session, whose
number no other process can have while a member lives. Their folders for temporary files are removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence

import msgspec
import psutil

from router.engines.process import EngineProcess
from router.system.processes import birth
from router.system.state import State

_log = logging.getLogger("router")

_KILL_SEC = 3.0
_LOOK_AGAIN_SEC = 0.02


class _Engine(msgspec.Struct, frozen=True):
    alias: str
    pid: int
    born: str
    port: int
    key_sha256: str
    """Hash of the value of the variable `marked_by`."""
    marked_by: str = "LLAMA_API_KEY"
    term_sec: float = 2.0
    """Time from SIGTERM to SIGKILL."""
    folder: str = ""
    """Its folder for temporary files, if it has one."""


class _Record(msgspec.Struct, frozen=True):
    router_pid: int
    router_born: str
    engines: tuple[_Engine, ...]


class EngineRecord:
    """Record of engines: add them as they start; they are removed when they exit. Use it on one event loop."""

    def __init__(self, state: State) -> None:
        loss = "an engine that outlives this router, should it be killed, is not found by the next one."
        self._file = state.file("engines", _Record, loss)
        self._router = os.getpid(), birth(os.getpid()) or ""
        self._engines: dict[EngineProcess, _Engine] = {}
        self._unsaved = False
        self._writer: asyncio.Task[None] | None = None

    def end_leftovers(self) -> None:
        """End the engines that a dead router has left. Blocks for seconds at most; call it before the event
        loop."""
        record = self._file.read()
        if record is None or not record.engines:
            return
        if birth(record.router_pid) == record.router_born:
            _log.warning(
                "the state directory lists engines of a running router (pid %d); they are left alone",
                record.router_pid,
            )
            return
        left = _leftovers(record.engines)
        if left:
            _log.warning("stopping engines left by a killed router: %s", _named(left))
            survivors = _end(left, max(engine.term_sec for engine in record.engines))
            if survivors:
                _log.error("%s could not be stopped, and may still hold memory and ports", _named(survivors))
        for engine in record.engines:
            if engine.folder:
                shutil.rmtree(engine.folder, ignore_errors=True)
        self._file.write(_Record(*self._router, ()))

    def add(self, engine: EngineProcess) -> None:
        born = birth(engine.pid)
        if born is None:  # it has exited already
            return
        (variable, value), port = engine.mark, engine.endpoint.port
        key_sha256, alias = _sha256(value), engine.order.alias
        self._engines[engine] = _Engine(
            alias, engine.pid, born, port, key_sha256, variable, engine.orphan_term_sec, str(engine.folder or "")
        )
        engine.exited.add_done_callback(lambda _: self._remove(engine))
        self._save()

    def _remove(self, engine: EngineProcess) -> None:
        del self._engines[engine]
        self._save()

    def _save(self) -> None:
        """Write the record in the background. Changes during a write are combined into one write after it."""
        self._unsaved = True
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="record of engines")

    async def _write(self) -> None:
        while self._unsaved:
            self._unsaved = False
            await asyncio.to_thread(self._file.write, _Record(*self._router, tuple(self._engines.values())))

    async def saved(self) -> None:
        if self._writer is not None:
            await self._writer


def _leftovers(engines: Sequence[_Engine]) -> list[psutil.Process]:
    marks = {(engine.marked_by, engine.key_sha256) for engine in engines}
    variables = {engine.marked_by for engine in engines}
    births = {engine.pid: engine.born for engine in engines}
    sessions = {pid: born for pid, born in births.items() if birth(pid) in (None, born)}
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            carried: set[tuple[str, str]] = set()
            environ: dict[str, str] | None = None
            with contextlib.suppress(psutil.AccessDenied):
                environ = process.environ()
                carried = {(name, _sha256(environ[name])) for name in variables if name in environ}
            born = birth(process.pid)
            if born is None:
                continue
            is_known = births.get(process.pid) == born or (
                not environ and _is_of_session(process.pid, born, sessions)
            )
            if carried & marks if carried else is_known:
                left.append(process)
    return left


def _is_of_session(pid: int, born: str, sessions: Mapping[int, str]) -> bool:
    """Return whether a process is of one of the sessions, given with the start times of their leaders."""
    try:
        leader_born = sessions.get(os.getsid(pid))
    except ProcessLookupError:
        return False
    if leader_born is None or sys.platform != "linux":
        return False
    (boot, ticks), (leader_boot, leader_ticks) = (text.rsplit(" ", 1) for text in (born, leader_born))
    return boot == leader_boot and int(ticks) >= int(leader_ticks)


def _end(processes: Sequence[psutil.Process], term_sec: float) -> list[psutil.Process]:
    """End processes, and return those that could not be ended."""
    for process in processes:
        with contextlib.suppress(psutil.Error):  # psutil checks that the pid is still that process's
            process.terminate()
    left = _wait(processes, term_sec)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return _wait(left, _KILL_SEC)


def _wait(processes: Sequence[psutil.Process], limit_sec: float) -> list[psutil.Process]:
    """Wait for processes to exit, and return those that have not within `limit_sec`."""
    deadline = time.monotonic() + limit_sec
    while True:
        processes = [process for process in processes if process.is_running() and birth(process.pid)]
        if not processes or time.monotonic() >= deadline:
            return list(processes)
        time.sleep(_LOOK_AGAIN_SEC)


def _named(processes: Sequence[psutil.Process]) -> str:
    return ", ".join(f"pid {process.pid} ({_name(process)})" for process in processes)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return "gone"


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
