"""Engines that are child processes of the router: their logs, how they are stopped, and why they exited.

Each kind of engine (see `base.py`) extends `EngineProcess` by how it becomes ready and how it is probed. The
scheduler decides which models have engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from router.engines.base import Ending, Endpoint, EngineFailed
from router.engines.log_ring import LogRing
from router.engines.supervised import Limits, SupervisedEngine
from router.hardware.ram import oom_kills, resident_bytes
from router.observe.reasons import Reason
from router.scheduling.messages import Retry
from router.system.processes import PIPE_BYTES, exit_code, is_foreign, log_pipe, signal_group, signal_name, spawn

_READS_AT_ONCE = 4
_DRAIN_SEC = (0.02, 1.0)
_KILLED_BEHIND = 128 + signal.SIGKILL
"""Exit code of a shell or a minder whose engine was killed."""


@dataclass(frozen=True, slots=True)
class EngineOrder:
    """Everything needed to start one engine."""

    alias: str
    argv: tuple[str, ...]
    """Command line, without the address and key that the router adds."""
    env: Mapping[str, str] = field(default_factory=dict)
    load_stall_sec: float = 60
    load_limit_sec: float | None = None
    stop_grace_sec: float = 10


@dataclass(frozen=True, slots=True)
class Spawned:
    """Child process, with the reading end of the pipe for its log."""

    process: subprocess.Popen[bytes]
    log: int
    argv: tuple[str, ...]

    @classmethod
    def by(
        cls,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        cwd: Path | None = None,
        logs_stdout: bool = False,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> Spawned:
        """Spawn a process. Without `logs_stdout`, its standard output is a pipe of its own. Raises
        EngineFailed."""
        log, log_of_child = log_pipe()
        stdout = log_of_child if logs_stdout else subprocess.PIPE
        try:
            process = spawn(argv, env, log_of_child, stdout=stdout, cwd=cwd, death_signal=death_signal)
            return cls(process, log, tuple(argv))
        except (OSError, ValueError) as error:
            os.close(log)
            raise EngineFailed(f"{argv[0]} cannot be run: {error}", "the engine cannot be run") from error
        finally:
            os.close(log_of_child)


class EngineProcess(SupervisedEngine):
    """Running engine. `exited` is done once the process has exited."""

    orphan_term_sec: ClassVar[float] = 2.0
    """Time that it has after SIGTERM if it has outlived its router."""
    folder: Path | None = None
    """Its folder for temporary files, which nothing else uses."""

    def __init__(
        self,
        order: EngineOrder,
        endpoint: Endpoint,
        mark: tuple[str, str],
        spawned: Spawned,
        log: LogRing,
    ) -> None:
        """`mark` is an environment variable with a unique value, by which it and its descendants are
        recognized."""
        limits = Limits(order.load_stall_sec, order.load_limit_sec, order.stop_grace_sec)
        super().__init__(endpoint, limits, log)
        self.order = order
        self.command = spawned.argv
        self.mark = mark
        self._process = spawned.process
        self._oom_kills = oom_kills()
        self._loop = asyncio.get_running_loop()
        self._log_pipe = spawned.log
        self._drain_timer = self._loop.call_later(_DRAIN_SEC[0], self._drain)
        self._drain_sec = _DRAIN_SEC[0]
        self._exited = asyncio.create_task(self._wait(), name=f"exit of {order.alias}")

    @property
    def exited(self) -> asyncio.Task[Reason]:
        return self._exited

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def pids(self) -> tuple[int, ...]:
        return (self._process.pid,)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    @property
    def lost_its_port(self) -> bool:
        """Whether it exited because another program has its port."""
        return self.ending.retry is Retry.AT_ONCE

    async def _terminate(self, second_sec: float, grace_sec: float) -> None:
        """Send SIGTERM, and after `second_sec` another one; return as `_ask_to_go` does."""
        for limit_sec in (second_sec, grace_sec - second_sec):
            if self.alive:
                signal_group(self.pid, signal.SIGTERM)
                await asyncio.wait({self.exited}, timeout=limit_sec)

    def kill(self, reason: str = "") -> None:
        if self.alive:  # once it is reaped, its number may be somebody else's
            self._killed_because = self._killed_because or reason
            self._kill_now()

    def _kill_now(self) -> None:
        """Have it and all its descendants ended at once."""
        signal_group(self.pid, signal.SIGKILL)

    async def _wait(self) -> Reason:
        code = await exit_code(self._process)
        await self._close_pipes()
        if self.folder is not None:
            await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
        self._drain_timer.cancel()
        self._drain()  # what it said last is the reason
        self._drain_timer.cancel()
        os.close(self._log_pipe)
        if self.endpoint.unix_socket is not None:
            with contextlib.suppress(OSError):
                self.endpoint.unix_socket.unlink()
        self.was_killed = bool(self._killed_because) and code == -signal.SIGKILL  # else it was gone before
        killed = code in (-signal.SIGKILL, _KILLED_BEHIND) or self._has_lost_a_process()
        self.out_of_memory = killed and not self.was_killed and oom_kills() != self._oom_kills
        if code in (126, 127) and is_foreign(self.order.argv[0]):  # a shell has tried to make sense of it
            what = "cannot be run: Exec format error (it is built for another processor)"
            return Reason(f"{self.order.argv[0]} {what}", f"the engine {what}")
        self.ending = self._why(code)
        if self.was_killed:
            return Reason(self._killed_because, self._killed_because)
        return self._describe_exit(code)

    def _has_lost_a_process(self) -> bool:
        """Return whether it ended because one of its other processes was killed."""
        return False

    async def _close_pipes(self) -> None:
        """Close the pipes other than the log's, after the exit."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _why(self, code: int) -> Ending:
        """Derive the consequences of the exit. An engine may exit before the thread that logs a taken port has
        done so; then the port itself is checked."""
        log = self.log.since(self._log_begin)
        retry = self.retry_after(code, log)
        if code > 0 and retry is Retry.LATER and not port_is_free(self.endpoint.port):
            retry = Retry.AT_ONCE
        return Ending(retry, self._wanted_mib(log))

    def _exit_in_words(self, code: int) -> str:
        if code == _KILLED_BEHIND:
            code = -signal.SIGKILL
        if code >= 0:
            return f"exited with code {code}"
        is_unknown = code == -signal.SIGKILL and self._oom_kills is None
        return f"killed by {signal_name(code)}{' (out of memory?)' if is_unknown else ''}"

    def _drain(self) -> None:
        """Read what the engine has logged since the last call.

        An engine logs several lines per request. Waking up for each costs more than the request itself, so the
        pipe is polled: soon again after much output, rarely after none.
        """
        size, logged = 0, self.log.total
        for _ in range(_READS_AT_ONCE):  # endless output must not block the event loop
            try:
                chunk = os.read(self._log_pipe, 1 << 18)
            except BlockingIOError:
                break
            if not chunk:
                break
            size += len(chunk)
            self.log.feed(chunk)
        soonest, latest = _DRAIN_SEC
        if size:
            if self._shows_progress(logged):
                self._last_sign = time.monotonic()
            self._drain_sec = soonest if size > PIPE_BYTES // 4 else min(self._drain_sec, latest / 4)
        else:
            self._drain_sec = min(latest, 2 * self._drain_sec)
        self._drain_timer = self._loop.call_later(self._drain_sec, self._drain)

    def _resident_bytes(self) -> int:
        return resident_bytes(self.pid)


def port_is_free(port: int, *, shared: bool = True) -> bool:
    """Return whether an engine could listen on the port.

    With SO_REUSEADDR (`shared`), as engines set it, neither TIME_WAIT counts nor a socket that is bound but does
    not listen yet.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(shared))
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
