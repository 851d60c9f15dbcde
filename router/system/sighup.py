"""Handling of SIGHUP from the start of the process: it means reload, unless the terminal was closed.

Until the router can do either, which takes a second, the signal is blocked and kept pending by the kernel: by
default it would end the process, and deployments may well send it right after a start.
"""

from __future__ import annotations

import os
import signal

_SIGHUP = frozenset({signal.SIGHUP})
_begun_in_terminal = False


def hold() -> None:
    """Block SIGHUP until `release`."""
    global _begun_in_terminal
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGHUP)
    # nohup starts processes with SIGHUP ignored, so that they outlive the terminal.
    _begun_in_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()


def release() -> None:
    """Unblock SIGHUP: a pending signal ends the process, or calls the handler that was set."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGHUP)


def terminal_is_gone() -> bool:
    """Whether the process was started in a terminal that is now closed, which ends the router as well."""
    return _begun_in_terminal and not _has_terminal()


def _has_terminal() -> bool:
    """Whether the process has a controlling terminal, which sends it signals."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
