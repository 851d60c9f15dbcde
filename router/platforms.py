"""What differs between operating systems when processes live and die together. Nothing else knows them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
PIPE_BYTES = 1 << 20
"""What a `log_pipe` holds where the system lets us say so (else 64 KiB)."""


def log_pipe() -> tuple[int, int]:
    """A roomy pipe as (reading end, which never blocks; writing end for a child)."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # the user's limit on pipe memory
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reading, writing


def tie_to_parent() -> Callable[[], None] | None:
    """What a child runs between fork and exec so that it dies with us, or None where the system can't.

    Linux: the kernel sends SIGKILL when the thread that forked ends; we fork on the main thread only. Elsewhere
    the engine notices the end of its standard input.
    """
    if sys.platform != "linux":
        return None
    # Loaded here, before the fork: the child must not allocate, import or take locks.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)

    return die_with_parent


def signal_group(pid: int, number: int) -> None:
    """Signal a child and all that it started; it leads its own session. No error when it is gone."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:  # macOS answers so for a group of zombies
        pass
