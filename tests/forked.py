"""Processes of the router that are forked from one which has imported it, and so need not do that again.

Importing takes most of the time of a start, and a run of all tests starts some two hundred routers. A fork has
an environment, a folder and pipes of its own, and does what `run.py` does from there on, to the same exit codes.
What an interpreter or a library reads when it starts (`PYTHON…` and more, see `takes`) comes too late for it: such
routers are for `subprocess.Popen`, as are those of the tests that are about the start itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = str(Path(__file__).parent.parent)
_LONGEST_REQUEST = 1 << 17
_READ_EARLIER = ("LD_PRELOAD", "PYTHON", "OTEL_", "LANG", "LC_", "TZ")


def takes(environ: Mapping[str, str]) -> bool:
    """Whether a fork that gets these variables is what a process is that was started with them."""
    return not any(name.startswith(_READ_EARLIER) for name in environ)


class Forks:
    """Starts them, each as `python run.py ARGUMENTS…`, for as long as this process lives.

    All have the same `LD_LIBRARY_PATH`, which the loader reads when a program starts.
    """

    def __init__(self, library_path: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST_REQUEST)
        with theirs:
            environ = {"PATH": os.defpath, "PYTHONPATH": _ROOT, "LD_LIBRARY_PATH": library_path}
            self._process = subprocess.Popen([sys.executable, __file__], stdin=theirs.fileno(), env=environ)

    def start(self, arguments: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> Forked:
        ours, theirs = socket.socketpair()
        out, into_out = os.pipe()
        err, into_err = os.pipe()
        request = json.dumps([list(arguments), str(cwd), dict(environ)]).encode()
        socket.send_fds(self._control, [request], [theirs.fileno(), into_out, into_err])
        theirs.close()
        os.close(into_out)
        os.close(into_err)
        return Forked(ours, out, err)


class Forked:
    """What of `subprocess.Popen` tests use, for a process that is somebody else's child."""

    def __init__(self, teller: socket.socket, out: int, err: int) -> None:
        self._teller = teller.makefile("r")
        self._socket = teller
        self.stdout = os.fdopen(out)
        self.stderr = os.fdopen(err)
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
    """Returns in every fork, and nowhere else."""
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
        request, descriptors, _, _ = socket.recv_fds(control, _LONGEST_REQUEST, 3)
        if not request:
            os._exit(0)
        teller = socket.socket(fileno=descriptors[0])
        if pid := os.fork():
            os.close(descriptors[1])
            os.close(descriptors[2])
            teller.send(b"%d\n" % pid)
            tellers[pid] = teller
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for mine in (control, woken, wakes, teller, *tellers.values()):
            mine.close()
        _become(*json.loads(request), *descriptors[1:])
        return


def _tell_ends(tellers: dict[int, socket.socket]) -> None:
    while tellers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with tellers.pop(pid) as teller, contextlib.suppress(OSError):  # nobody may want to know any more
            teller.send(b"%d\n" % os.waitstatus_to_exitcode(status))


def _become(arguments: list[str], cwd: str, environ: dict[str, str], out: int, err: int) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    sys.argv = ["run.py", *arguments]
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, out, err)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", closefd=False)  # the one that was there may have been a file, and remembers it


if __name__ == "__main__":
    import router.serve
    from router.__main__ import main

    assert router.serve
    _fork_on_demand()
    main()
