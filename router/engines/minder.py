"""Stands between the router and an engine that is a tree of processes, and outlives both if need be.

vLLM is several processes. If the first is killed, the others live on and hold the GPU; a SIGTERM during a load is
swallowed or ends in a deadlock; an end by SIGKILL leaves shared memory behind. So the router starts this program,
which starts the engine and ends when all of the engine is gone. It is told by signals:

SIGTERM   stop: SIGTERM to the engine, again after two seconds, and SIGKILL to all of it after the time given.
          The end of standard input means the same: then the router is dead.
SIGINT    stop at once, by SIGKILL.
SIGKILL   cannot be heeded: the engine gets SIGINT then, from the kernel.

It ends as the engine's first process did, and by SIGKILL if it had to use that. If somebody else has killed the
first process by SIGKILL, it exits with 137, as a shell does. The engine's folder for temporary files is removed in
any case. Nothing but the standard library is imported, so that it starts fast and stays small.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_SECOND_WORD_SEC = 2.0
_REST_SEC = 10.0
"""For what the first process of an engine leaves, from SIGTERM to SIGKILL."""
_KILLED_SEC = 8.0
"""For what was killed to be gone, and for Python's tracker of resources to remove its shared memory after that.
Both took half a second for vLLM beside 12 busy processes."""
_AGAIN_SEC = 0.2
_KILLED_BY_OTHERS = 128 + signal.SIGKILL
_TRACKER = b"multiprocessing.resource_tracker"


class Minder:
    """One engine, from its start to the end of its last process."""

    def __init__(self, grace_sec: float, command: list[str]) -> None:
        self._grace_sec = grace_sec
        self._wakes, wake = os.pipe()
        for end in (self._wakes, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._pid = subprocess.Popen(  # noqa: S603 - the router's own order
            command, stdin=subprocess.DEVNULL, preexec_fn=_tie_to_minder()
        ).pid
        self._status: int | None = None
        self._steps: deque[tuple[float, Callable[[], None]]] = deque()
        """What is to be done to end it, and when (monotonic)."""
        self._has_router = True
        self._is_told = False
        self._rests = False
        """The first process has ended, and the others are to."""
        self._is_over = False
        self._has_killed = False
        """The first process was killed by us."""

    def run(self) -> int:
        """Return how to end: the exit code, negative for a signal."""
        while self._reap() and not self._is_over:
            if self._status is None:
                signals = self._wait()
                if signal.SIGINT in signals:
                    self._kill_all()
                elif not self._is_told and (signal.SIGTERM in signals or not self._has_router):
                    self._is_told = True
                    self._plan((0, self._tell), (_SECOND_WORD_SEC, self._tell), (self._grace_sec, self._kill_all))
            elif not self._rests:
                self._rests = True
                self._plan((0, self._tell_rest), (_REST_SEC, self._kill_all))
            elif signal.SIGINT in self._wait():
                self._kill_all()
            self._do_what_is_due()
        if self._has_killed or self._status is None:
            return -signal.SIGKILL
        code = os.waitstatus_to_exitcode(self._status)
        return _KILLED_BY_OTHERS if code == -signal.SIGKILL else code

    def _plan(self, *steps: tuple[float, Callable[[], None]]) -> None:
        now = time.monotonic()
        self._steps = deque((now + after_sec, step) for after_sec, step in steps)

    def _do_what_is_due(self) -> None:
        while self._steps and self._steps[0][0] <= time.monotonic():
            _, step = self._steps.popleft()
            step()

    def _reap(self) -> bool:
        """Collect what has ended; return whether anything is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == self._pid:
                self._status = status
            elif not pid:
                return True

    def _wait(self, limit_sec: float = math.inf) -> bytes:
        """Return the signals that have come by the next step, or within a limit."""
        if self._steps:
            limit_sec = min(limit_sec, max(0.0, self._steps[0][0] - time.monotonic()))
        inputs = [self._wakes, sys.stdin.fileno()] if self._has_router else [self._wakes]
        ready, _, _ = select.select(inputs, [], [], None if limit_sec == math.inf else limit_sec)
        if self._has_router and sys.stdin.fileno() in ready:
            self._has_router = bool(os.read(sys.stdin.fileno(), 4096))
        return os.read(self._wakes, 4096) if self._wakes in ready else b""

    def _tell(self) -> None:
        """Ask the first process to go. Its number is its own until it is reaped."""
        os.kill(self._pid, signal.SIGTERM)

    def _tell_rest(self) -> None:
        """Ask what the first process has left to go."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # we are one of the group
        os.killpg(0, signal.SIGTERM)

    def _kill_all(self) -> None:
        """Kill all other processes of the session, and those that they were starting meanwhile.

        The trackers of shared memory end by themselves once they have removed what the others left.
        """
        self._is_over = True
        self._has_killed = self._status is None
        self._steps.clear()
        until = time.monotonic() + _KILLED_SEC
        while self._reap() and time.monotonic() < until:
            for pid in _session():
                if _TRACKER not in _command_line(pid):
                    _kill(pid)
            self._wait(_AGAIN_SEC)
        for pid in _session():
            _kill(pid)
        self._reap()


def _tie_to_minder() -> Callable[[], None] | None:
    """Return what a child runs before its program, so that it gets SIGINT if the minder is killed.

    While vLLM loads, it would swallow a SIGTERM, and nobody would send the second.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)


def _session() -> list[int]:
    """Return the other processes of this session; all of the engine's, unless one has begun another."""
    if not os.path.isdir("/proc/self"):
        return _children()
    ours = os.getsid(0)
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    fields = stat.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == ours:
                found.append(int(name))
    return found


def _children() -> list[int]:
    """Return the processes of our group by `ps`, where there is no /proc."""
    command = ["/bin/ps", "-o", "pid=", "-g", str(os.getpgrp())]
    listed = subprocess.run(command, capture_output=True)  # noqa: S603
    return [int(word) for word in listed.stdout.split() if int(word) != os.getpid()]


def _command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _end_with(code: int) -> None:
    if code >= 0:
        os._exit(code)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


def main() -> None:
    """`minder.py GRACE_SEC FOLDER PROGRAM ARGUMENTS…`, where FOLDER is for temporary files, and ours to remove."""
    grace, folder, *command = sys.argv[1:]
    if sys.platform == "linux":  # whoever loses its parent becomes our child, and is waited for
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        code = Minder(float(grace), command).run()
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _end_with(code)


if __name__ == "__main__":
    main()
