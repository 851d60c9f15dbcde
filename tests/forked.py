"""Python programs that are forked from a process which has imported the router, and so need not do that again.

Importing takes most of the time of a start, and a run of all tests starts some two hundred routers. A fork has
an environment, a folder and pipes of its own, and runs `run.py` from its first line on, to the same exit codes.
What an interpreter or a library reads when it starts (`PYTHON…` and more, see `takes`) comes too late for it: such
programs are for `subprocess.Popen`, as are those of the tests that are about the start itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = str(Path(__file__).parent.parent)
_READ_EARLIER = ("LD_PRELOAD", "PYTHON", "OTEL_", "LANG", "LC_", "TZ")


def takes(environ: Mapping[str, str]) -> bool:
    """Return whether a fork with these variables behaves like a process that was started with them."""
    return not any(name.startswith(_READ_EARLIER) for name in environ)


class Forks:
    """Starts forks for as long as this process lives.

    All have the same `LD_LIBRARY_PATH`, which the loader reads when a program starts.
    """

    def __init__(self, library_path: str) -> None:
        self._control, theirs = socket.socketpair()
        self._asking = threading.Lock()
        with theirs:
            environ = {"PATH": os.defpath, "PYTHONPATH": _ROOT, "LD_LIBRARY_PATH": library_path}
            self._process = subprocess.Popen([sys.executable, __file__], stdin=theirs.fileno(), env=environ)

    def start(self, command: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> Forked:
        """Start `python COMMAND…`; the first word is the path of a program."""
        ours, teller = socket.socketpair()
        from_stdin, stdin = os.pipe()
        stdout, into_stdout = os.pipe()
        stderr, into_stderr = os.pipe()
        request = json.dumps([list(command), str(cwd), dict(environ)]).encode()
        theirs = [teller.fileno(), from_stdin, into_stdout, into_stderr]
        with self._asking:
            socket.send_fds(self._control, [b"%8d" % len(request)], theirs)
            self._control.sendall(request)
        teller.close()
        for descriptor in theirs[1:]:
            os.close(descriptor)
        return Forked(ours, stdin, stdout, stderr)


class Forked:
    """The part of `subprocess.Popen` that tests use, for a process that is not a child of this one."""

    def __init__(self, teller: socket.socket, stdin: int, stdout: int, stderr: int) -> None:
        self._teller = teller.makefile("r")
        self._socket = teller
        self.stdin = os.fdopen(stdin, "w", buffering=1)
        self.stdout = os.fdopen(stdout)
        self.stderr = os.fdopen(stderr)
        self.pid = int(self._teller.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"router {self.pid}", timeout or 0)
            self.returncode = int(self._teller.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it is gone this very moment
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _fork_on_demand() -> None:
    """Fork on demand. Returns in every fork, and only there."""
    control = socket.socket(fileno=os.dup(0))
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    tellers: dict[int, socket.socket] = {}
    while True:
        readable, _, _ = select.select([control, woken], [], [])
        if woken in readable:
            woken.recv(4096)
            _tell_ends(tellers)
        if control not in readable:
            continue
        size, descriptors, _, _ = socket.recv_fds(control, 8, 4)
        if not size:
            os._exit(0)
        request = b""
        while len(request) < int(size):
            request += control.recv(int(size) - len(request))
        teller, files = socket.socket(fileno=descriptors[0]), descriptors[1:]
        if pid := os.fork():
            for descriptor in files:
                os.close(descriptor)
            teller.send(b"%d\n" % pid)
            tellers[pid] = teller
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for mine in (control, woken, wakes, teller, *tellers.values()):
            mine.close()
        command, cwd, environ = json.loads(request)
        _become(command, cwd, environ, files)
        return


def _tell_ends(tellers: dict[int, socket.socket]) -> None:
    while tellers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with tellers.pop(pid) as teller, contextlib.suppress(OSError):  # nobody may want to know any more
            teller.send(b"%d\n" % os.waitstatus_to_exitcode(status))


def _become(command: list[str], cwd: str, environ: dict[str, str], files: list[int]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    sys.argv = command
    for number, descriptor in enumerate(files):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", closefd=False)  # the one that was there may have been a file, and remembers it


if __name__ == "__main__":
    from router.engines.registry import KINDS

    # What a router imports at its start, also that which it imports only when it knows that it will be a router.
    for module in (
        "router.cli.check",
        "router.cli.remote",
        "router.server",
        *(f"router.engines.{kind}.backend" for kind in KINDS),
        "router.engines.minder",
        "anyio._backends._asyncio",
        "uvicorn.lifespan.off",
        "uvloop",
    ):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    _fork_on_demand()
    runpy.run_path(sys.argv[0], run_name="__main__")
