"""Checks of a server of which nothing is known: it is ready and healthy while it answers at a path, or accepts."""

from __future__ import annotations

import asyncio
import errno
import re

import anyio

from router.engines.base import PROBE_LIMIT_SEC, Endpoint, Facts
from router.engines.questions import CANNOT_ASK, status
from router.engines.supervised import SupervisedEngine

_POLL_SEC = (0.02, 0.5)
"""Interval of readiness checks: initial and longest."""
_OPEN_SEC = 0.2
"""Time for which a connection through a proxy must stay open."""


def log_of_probe(path: str | None) -> re.Pattern[str]:
    """Return a pattern for log lines about a GET of this path, in any format; without a path it matches none."""
    if path is None:
        return re.compile(r"(?!)")
    of_path = rf"(?<![\w/.-]){re.escape(path)}(?![\w/.-])"
    return re.compile(rf"\bGET\b.*{of_path}|{of_path}.*\bGET\b")


class Readiness:
    """Probes of one server: GET requests to `path`, or without one, connections to its port.

    `is_proxied`: another program listens on the port and forwards connections, as Docker does for published ports.
    It accepts them before the server listens, and then closes them.
    """

    def __init__(self, endpoint: Endpoint, path: str | None, *, is_proxied: bool = False) -> None:
        self._endpoint = endpoint
        self._path = path
        self._is_proxied = is_proxied
        self._log_of_probe = log_of_probe(path)
        self._last_status: int | None = None

    async def until_ready(self) -> None:
        pause_sec, latest = _POLL_SEC
        while not await self._serves():
            await asyncio.sleep(pause_sec)
            pause_sec = min(latest, 1.5 * pause_sec)

    async def _serves(self) -> bool:
        """A probe that is not answered in time is sent again: a server may lose those that come while it loads."""
        try:
            with anyio.fail_after(PROBE_LIMIT_SEC):
                return await self._answer() is True
        except TimeoutError:
            return False

    async def is_healthy(self, limit_sec: float) -> bool:
        try:
            with anyio.fail_after(limit_sec):
                return await self._answer() is not False
        except TimeoutError:
            return False

    async def _answer(self) -> bool | None:
        """Return whether it answers with 2xx at its path, or without a path, whether its port is open; None if the
        router is out of file descriptors."""
        if self._path is not None:
            answer = self._last_status = await status(self._endpoint, self._path)
            return None if answer == CANNOT_ASK else answer is not None and 200 <= answer < 300
        try:
            reader, writer = await asyncio.open_connection(self._endpoint.host, self._endpoint.port)
        except OSError as error:
            return None if error.errno in (errno.EMFILE, errno.ENFILE) else False
        try:
            return not self._is_proxied or await _stays_open(reader)
        finally:
            writer.close()

    def is_progress(self, lines: list[str]) -> bool:
        """Return whether log lines are a sign of loading. Those about our own probes do not count, or a server
        that logs its requests would load for ever."""
        return not lines or any(self._log_of_probe.search(line) is None for line in lines)

    def with_last_answer(self, signs: str) -> str:
        """Prepend the last answer to other signs of a server that did not become ready."""
        if self._path is None or self._last_status == CANNOT_ASK:
            return signs
        if self._last_status is None:
            return f"it does not answer {self._path} (ready_path); {signs}"
        return f"it answers {self._path} (ready_path) with {self._last_status}; {signs}"


class AnswersAtPath(SupervisedEngine):
    """Engine of which nothing is known but a path, or a port, at which it answers: see `Readiness`."""

    _readiness: Readiness

    async def _until_it_serves(self) -> None:
        await self._readiness.until_ready()

    async def healthy(self, limit_sec: float = PROBE_LIMIT_SEC) -> bool:
        return await self._readiness.is_healthy(limit_sec) and self.alive

    def _shows_progress(self, logged: int) -> bool:
        return self._readiness.is_progress(self.log.since(logged))

    def _signs(self) -> str:
        return self._readiness.with_last_answer(super()._signs())

    async def facts(self) -> Facts | None:
        """Return None: no server-independent way to ask exists."""
        return None


async def _stays_open(reader: asyncio.StreamReader) -> bool:
    try:
        with anyio.fail_after(_OPEN_SEC):
            return await reader.read(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False
