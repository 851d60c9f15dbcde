"""Child processes, their lifetimes and signals: everything that differs between operating systems."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import psutil

from router.system import threads

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ORPHANS_SEC = 2.0
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Seconds of silence (by Linux's and macOS's names), seconds between probes, number of unanswered probes."""
_TELLS_CHILDREN = os.path.exists("/proc/thread-self/children")
"""Whether the kernel lists child processes: Linux does if built with CONFIG_PROC_CHILDREN."""
PIPE_BYTES = 1 << 20
"""Capacity of a `log_pipe` where it can be set; 64 KiB elsewhere."""


def log_pipe() -> tuple[int, int]:
    """Create a large pipe; return its non-blocking reading end, and its writing end for a child."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # the user's limit on pipe memory
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reading, writing


def spawn(
    argv: Sequence[str],
    env: Mapping[str, str],
    stderr: int,
    *,
    stdout: int = subprocess.PIPE,
    cwd: Path | None = None,
    death_signal: signal.Signals = signal.SIGKILL,
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, with a pipe as its input, that gets a signal when the router dies.

    Linux can send a signal at the death of a parent (strictly: of the thread that started the child, so call this
    on the main thread). `setpriv` requests it, because a function to run after the fork would require a fork of
    the router's whole memory instead of a vfork. Elsewhere an engine notices the end of its standard input.
    Raises OSError.
    """
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    if setpriv is not None and not _sets_death_signal(setpriv):
        setpriv = None
    return subprocess.Popen(  # noqa: S603 - what is configured is trusted
        [setpriv, "--pdeathsig", death_signal.name.removeprefix("SIG"), "--", *argv] if setpriv else argv,
        env=env,
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        bufsize=0,
        start_new_session=True,
        preexec_fn=None if setpriv else _tie_to_parent(death_signal),
    )


@lru_cache
def _sets_death_signal(setpriv: str) -> bool:
    """Whether `setpriv` can set the signal: BusyBox's (Alpine) and util-linux's before 2.33 (RHEL 8) cannot."""
    quiet = subprocess.DEVNULL
    argv = [setpriv, "--pdeathsig", "KILL", "--", "true"]
    return subprocess.run(argv, stdin=quiet, stdout=quiet, stderr=quiet).returncode == 0  # noqa: S603 - found on PATH


def is_foreign(program: str) -> bool:
    """Whether an ELF program is built for another kind of processor than this interpreter."""
    try:
        with open(program, "rb") as theirs, open(sys.executable, "rb") as ours:
            heads = theirs.read(20), ours.read(20)
    except OSError:
        return False
    return all(head[:4] == b"\x7fELF" for head in heads) and heads[0][18:] != heads[1][18:]


def _tie_to_parent(death_signal: signal.Signals) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    # Loaded here, before the fork: the child must not allocate, import or take locks.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)

    return die_with_parent


async def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Wait until a child has ended and return its exit code.

    A thread waits for it, which works on every system, and reaps it, for which the kernel may take half a second.
    The processes that the child has started are killed before it is reaped: until then its pid cannot be reused.
    Its `returncode` is set in between, on the event loop's thread, which sends all other signals and none from
    then on.
    """
    loop = asyncio.get_running_loop()
    reaped: asyncio.Future[int] = loop.create_future()
    may_be_reaped = threading.Event()

    def end(code: int) -> None:
        signal_group(process.pid, signal.SIGKILL)
        process.returncode = code
        may_be_reaped.set()

    def tell(code: int) -> None:
        if not reaped.done():
            reaped.set_result(code)

    def wait() -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            code = _code_of_dead(process.pid)
            loop.call_soon_threadsafe(end, process.wait() if code is None else code)
            may_be_reaped.wait()
            if code is not None:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, 0)
            loop.call_soon_threadsafe(tell, process.returncode)

    threads.begin(wait)
    return await reaped


def _code_of_dead(pid: int) -> int | None:
    """Wait until a child has ended, without reaping it; return its exit code as in `Popen.returncode`.

    None if it is unknown: the child was reaped elsewhere, or this is macOS before Python 3.13.
    """
    if not hasattr(os, "waitid"):
        return None
    try:
        dead = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return None
    assert dead is not None  # as it does with WNOHANG alone
    return dead.si_status if dead.si_code == os.CLD_EXITED else -dead.si_status


async def reap_orphans() -> None:
    """Reap orphans, forever. Needed as process 1 in a container, which becomes the parent of all orphans.

    The router's own children are waited for and reaped immediately. A child that is still a zombie at the next
    check is an orphan.
    """
    before: set[int] = set()
    while True:
        await asyncio.sleep(_ORPHANS_SEC)
        zombies = {
            child.pid for child in await asyncio.to_thread(psutil.Process().children) if not birth(child.pid)
        }
        for pid in zombies & before:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - it does not wait
        before = zombies


def descendants(pid: int) -> list[int]:
    """Return the pids of all descendants of a process; none if it has ended."""
    if not _TELLS_CHILDREN:
        try:
            return [child.pid for child in psutil.Process(pid).children(recursive=True)]
        except psutil.Error:
            return []
    found = _children(pid)
    for child in found:  # the list grows during the loop
        found += _children(child)
    return found


def _children(pid: int) -> list[int]:
    """Return the children that the kernel lists; psutil would examine every process of the machine."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                children += map(int, file.read().split())
    return children


def birth(pid: int) -> str | None:
    """Return an identifier that distinguishes a live process from others with the same pid; None if it has ended.

    On Linux it is based on ticks since the boot, so that changes of the clock have no effect.
    """
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/stat", "rb") as stat, open("/proc/sys/kernel/random/boot_id") as boot:
                fields = stat.read().rpartition(b")")[2].split()  # the name before it may contain anything
                return None if fields[0] in b"ZX" else f"{boot.read().strip()} {int(fields[19])}"
        except (OSError, IndexError):
            return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return None


def notice_vanished_peers(listener: socket.socket) -> None:
    """Enable TCP keep-alive for a listener and, by inheritance, its connections.

    A client that loses power or network closes nothing, and while it waits in a queue nothing is sent to it that
    could fail.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def allow_many_files() -> int:
    """Raise the limit of open files as far as allowed, and return it. Every client and engine uses some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS: the hard limit may be more than is allowed
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft


def signal_name(code: int) -> str:
    """Return the name of the signal that a negative exit code stands for."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def signal_group(pid: int, number: int) -> None:
    """Send a signal to a child and its process group; it leads its own session. No error if it has ended."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:  # macOS answers so for a group of zombies
        pass
