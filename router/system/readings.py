"""Readings of devices, and how to take readings of something that may hang.

Readings come from `hardware/` or, for a Vulkan build, from the engine; `hardware/devices.py` selects the devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import anyio

from router.system import threads
from router.system.devices import Device

T = TypeVar("T")

_log = logging.getLogger("router")


@dataclass(frozen=True, slots=True)
class Reading:
    """State of a device as reported by its driver. None for values that it does not report."""

    device: Device
    kind: Literal["cuda", "rocm", "vulkan", "host"]
    label: str
    """Name of the product."""
    uuid: str
    """Identifier that makes the device visible to an engine; for Vulkan, its number among the loader's devices."""
    total_mib: int
    free_mib: int
    used_by: Mapping[int, int] | None = None
    """MiB by process id, for the processes that the driver reports."""
    utilization: float | None = None
    """0 to 1"""
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None

    def __str__(self) -> str:
        if not self.device.is_gpu:
            return f"{self.free_mib} of {self.total_mib} MiB RAM free"
        return f"{self.free_mib} of {self.total_mib} MiB free on {self.device} ({self.label})"


async def apart(work: Callable[[], T]) -> T:
    """Run blocking work in a daemon thread of its own, and return or raise what it does: for work that may hang.

    A thread pool would lose a thread to each hanging call, and wait for all of them at the end of the process.
    """
    return await begun(work)


def begun(work: Callable[[], T]) -> asyncio.Future[T]:
    """Begin work as `apart` does, without waiting for it."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # cancelling the wait does not cancel the work

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    threads.begin(run)
    return asyncio.wrap_future(outcome)


class Watch(Generic[T]):
    """Readings of something that may take long or hang forever, such as a driver.

    Each reading runs in a daemon thread, one at a time; concurrent calls wait for the same reading. (Threads of a
    pool are joined at exit, so a hanging driver would keep the process from ending.)
    """

    def __init__(self, take: Callable[[], T], first: T, name: str) -> None:
        self.last = first
        self.taken_sec: float | None = None
        """Start of the last reading, by the monotonic clock; None before the first."""
        self._take = take
        self._name = name
        self._lock = threading.Lock()
        self._busy = False
        self._is_late = False
        self._has_failed = False
        self._waiting: list[Callable[[], None]] = []

    async def read(self, deadline_sec: float) -> T:
        """Return a fresh reading, or the last one if none is available within the deadline. Never raises."""
        loop = asyncio.get_running_loop()
        answered = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(answered.set)

        self._ask(tell)
        try:
            with anyio.fail_after(deadline_sec):
                await answered.wait()
        except TimeoutError:
            self._is_overdue(deadline_sec)
        finally:
            self._forget(tell)
        return self.last

    def read_blocking(self, deadline_sec: float) -> T:
        """Like `read`, without an event loop."""
        answered = threading.Event()
        tell = answered.set
        self._ask(tell)
        if not answered.wait(deadline_sec):
            self._is_overdue(deadline_sec)
        self._forget(tell)
        return self.last

    def _ask(self, tell: Callable[[], None]) -> None:
        with self._lock:
            self._waiting.append(tell)
            if self._busy:
                return
            self._busy = True
        try:
            threads.begin(self._run)
        except RuntimeError as error:  # no more threads
            _log.warning("%s: %s", self._name, error)
            self._done()

    def _run(self) -> None:
        began_sec = time.monotonic()
        try:
            self.last = self._take()
            self.taken_sec = began_sec
            self._has_failed = False
        except Exception:
            if not self._has_failed:
                _log.exception("%s: failed; using the last reading until it works again", self._name)
            self._has_failed = True
        finally:
            self._done()

    def _done(self) -> None:
        with self._lock:
            self._busy = False
            was_late, self._is_late = self._is_late, False
            waiting, self._waiting = self._waiting, []
        if was_late:
            _log.warning("%s: responding again", self._name)
        for tell in waiting:
            tell()

    def _is_overdue(self, deadline_sec: float) -> None:
        with self._lock:
            is_news, self._is_late = self._busy and not self._is_late, self._busy
        if is_news:
            _log.warning(
                "%s: no response within %g s; using the last reading until then", self._name, deadline_sec
            )

    def _forget(self, tell: Callable[[], None]) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._waiting.remove(tell)
