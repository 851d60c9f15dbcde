"""What a reading of a device says, and how one is taken of something that may hang.

They come from `hardware/`, for a Vulkan build from the engine; `hardware/devices.py` says which devices are ours.
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

from router.system import threads
from router.system.devices import Device

T = TypeVar("T")

_log = logging.getLogger("router")


@dataclass(frozen=True, slots=True)
class Reading:
    """What the driver of a device says of it now. None where it does not tell."""

    device: Device
    kind: Literal["cuda", "rocm", "vulkan", "host"]
    label: str
    """The product's name."""
    uuid: str
    """By which an engine is shown it; with Vulkan its number among all that Vulkan's loader has."""
    total_mib: int
    free_mib: int
    used_by: Mapping[int, int] | None = None
    """Process id -> MiB, by those processes of which the driver tells."""
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
    """What it returns or raises, from a daemon thread of its own: for work that a disk may keep from ever ending.

    A thread pool loses a thread to each of these, and waits for them all when the process is to end.
    """
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # who stops waiting does not stop it

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    threads.begin(run)
    return await asyncio.wrap_future(outcome)


class Watch(Generic[T]):
    """Readings of something that may take long or hang for ever, such as a driver.

    A reading runs on a daemon thread of its own, never more than one at a time: who asks meanwhile waits for that
    one. (A thread pool's threads are joined at exit, and a hanging driver would keep the process from ending.)
    """

    def __init__(self, take: Callable[[], T], first: T, name: str) -> None:
        self.last = first
        self.taken_sec: float | None = None
        """When the last reading began, by the monotonic clock; None before the first."""
        self._take = take
        self._name = name
        self._lock = threading.Lock()
        self._busy = False
        self._is_late = False
        self._has_failed = False
        self._waiting: list[Callable[[], None]] = []

    async def read(self, deadline_sec: float) -> T:
        """A fresh reading, or the last one if none comes within the deadline. Never raises."""
        loop = asyncio.get_running_loop()
        answered = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
                loop.call_soon_threadsafe(answered.set)

        self._ask(tell)
        try:
            await asyncio.wait_for(answered.wait(), deadline_sec)
        except asyncio.TimeoutError:
            self._is_overdue(deadline_sec)
        finally:
            self._forget(tell)
        return self.last

    def read_blocking(self, deadline_sec: float) -> T:
        """As `read`, for where there is no event loop."""
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
                _log.exception("%s: failed, the last answer counts until it works again", self._name)
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
