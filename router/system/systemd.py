"""What systemd hears from the router: that it serves, reloads, stops, and that its event loop still turns.

The protocol is sd_notify(3): lines in a datagram to the socket that NOTIFY_SOCKET names. Nothing is said if there
is none. The packages for it hardly save more than the three lines that send the datagram.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, MutableMapping

_STATUS_SEC = 10.0


class Notifier:
    """Takes the variables out of the environment, so that no engine speaks in our name."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        watched_pid = environ.pop("WATCHDOG_PID", "")
        watchdog_usec = environ.pop("WATCHDOG_USEC", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_sec: float | None = None
        if watchdog_usec.isdecimal() and watched_pid in ("", str(os.getpid())):
            self._watchdog_sec = int(watchdog_usec) / 1e6
        self._status = ""

    def ready(self) -> None:
        self._tell("READY=1")

    def reloading(self) -> None:
        """`ready` must follow, also when nothing could be reloaded."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, within_sec: float) -> None:
        """It may take longer than the unit file says."""
        self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(within_sec * 1e6)}")

    async def keep_telling(self, status: Callable[[], str]) -> None:
        """The status when it has changed; and that the event loop turns, in half the time that it may take."""
        if not self._address:
            return
        pause_sec = min(_STATUS_SEC, (self._watchdog_sec or _STATUS_SEC) / 2)
        while True:
            alive = ("WATCHDOG=1",) if self._watchdog_sec else ()
            self._tell(*alive, *self._changed(status()))
            await asyncio.sleep(pause_sec)

    def _changed(self, status: str) -> tuple[str, ...]:
        if status == self._status:
            return ()
        self._status = status
        return (f"STATUS={status}",)

    def _tell(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)
            channel.sendto("\n".join(lines).encode(), self._address)
