"""Notifies systemd that the router is ready, reloading or stopping, and that its event loop is alive.

The protocol is sd_notify(3): lines in a datagram to the socket named by NOTIFY_SOCKET; without it, nothing is
sent. The packages for it would save little more than the three lines that send the datagram.
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
    """Sends notifications. Removes its variables from the environment, so that engines cannot send any."""

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
        """Announce a reload. `ready` must follow, even if the reload failed."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, within_sec: float) -> None:
        """Announce the shutdown, which may take longer than the unit file allows."""
        self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(within_sec * 1e6)}")

    async def keep_telling(self, status: Callable[[], str]) -> None:
        """Send the status when it changes, and the watchdog signal twice per period, until cancelled."""
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
