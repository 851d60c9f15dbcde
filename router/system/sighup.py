"""SIGHUP from the first moment on. To the router it is a wish to reload, unless its terminal was closed.

Until the router can obey either, which takes a second, the signal is blocked, and so kept by the kernel: by
default it would end us, and who deploys a configuration may well send it right after a start.
"""

from __future__ import annotations

import os
import signal

_SIGHUP = frozenset({signal.SIGHUP})
_begun_in_terminal = False


def hold() -> None:
    """What comes from now on waits for `release`."""
    global _begun_in_terminal
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGHUP)
    # What nohup has started is meant to outlive its terminal, and comes with SIGHUP ignored.
    _begun_in_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()


def release() -> None:
    """What has come does what it does now: ends us, or is heard by who has set a handler."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGHUP)


def terminal_is_gone() -> bool:
    """Whether there was a terminal when we began, whose end is ours, too."""
    return _begun_in_terminal and not _has_terminal()


def _has_terminal() -> bool:
    """Whether there is a terminal whose keys, and whose end, reach us as signals."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
