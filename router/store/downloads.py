"""The pulls of a running router, each in a process of its own, so that none can hold up a request.

A pull belongs to the router, not to who asked for it: it goes on when they leave, and who asks for the same one
joins it. What a pull does is in `pull.py`; here it is started, listened to and stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import msgspec

from router.store import repository
from router.store.progress import Problem, Progress
from router.system import processes

_log = logging.getLogger("router")

MOST_AT_ONCE = 4
_REMEMBERED = 50
_LONGEST_LINE = 1 << 20
_START = "import sys; sys.path[:0] = {folders!r}; from router.store.pull import child; child(*sys.argv[1:])"


class TooManyPulls(Exception):
    """As many as may are running."""


class NoMorePulls(Exception):
    """The router is about to end."""


class Pull:
    """One download, running or over."""

    def __init__(
        self, reference: repository.Reference, alias: str | None, taken: Mapping[str, str], q4_above_bytes: int
    ) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.wanted = (reference, alias)
        self.taken = taken
        self.q4_above_bytes = q4_above_bytes
        self.started_at = time.time()
        """Seconds since the epoch."""
        self.progress = Progress(str(reference), alias)
        self.over = False
        self.cancelled = False
        self.task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def tell(self, progress: Progress, *, over: bool = False) -> None:
        self.progress = progress
        self.over = over
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self) -> AsyncIterator[Progress]:
        """The progress, now and at every change that the reader keeps up with, to the last."""
        while True:
            news, over = self._news, self.over
            yield self.progress
            if over:
                return
            await news.wait()


class Downloads:
    """Starts pulls and remembers the last ones. `look_again` makes the router see the files that are there."""

    def __init__(self, look_again: Callable[[], Awaitable[object]]) -> None:
        self.pulls: dict[str, Pull] = {}
        self.look_again = look_again
        self._is_ending = False

    def start(
        self, reference: repository.Reference, alias: str | None, taken: Mapping[str, str], q4_above_bytes: int
    ) -> Pull:
        """Pull a model, or join the pull that does so already. Raises TooManyPulls, NoMorePulls.

        `taken` are names of its repository under which something else is served, each with where that is from.
        """
        if self._is_ending:
            raise NoMorePulls
        running = [pull for pull in self.pulls.values() if not pull.over]
        for pull in running:
            if pull.wanted == (reference, alias) and not pull.cancelled:
                return pull
        if len(running) >= MOST_AT_ONCE:
            raise TooManyPulls
        pull = Pull(reference, alias, taken, q4_above_bytes)
        over = [pull for pull in self.pulls.values() if pull.over]
        for old in over[: max(0, len(self.pulls) + 1 - _REMEMBERED)]:
            del self.pulls[old.id]
        self.pulls[pull.id] = pull
        pull.task = asyncio.get_running_loop().create_task(self._run(pull), name=f"pull of {reference}")
        return pull

    async def cancel(self, pull: Pull) -> None:
        """Stop it. What has arrived is kept for the next time."""
        if pull.task is not None and not pull.over:
            pull.cancelled = True
            pull.task.cancel()
            await asyncio.wait({pull.task})

    async def shut_down(self) -> None:
        self._is_ending = True
        for pull in self.pulls.values():
            await self.cancel(pull)

    async def _run(self, pull: Pull) -> None:
        _log.info("pull of %s: started", pull.progress.reference)
        last = pull.progress
        try:
            async with contextlib.aclosing(_progress(pull)) as told:
                async for last in told:
                    if last.status in ("resolving", "downloading"):
                        pull.tell(last)
            if last.status == "success":
                await self.look_again()  # so that who hears of it can use it
            if last.status not in ("success", "failed"):
                problem = Problem("internal_error", "The download failed; see the router's log.")
                last = msgspec.structs.replace(last, status="failed", error=problem)
        except asyncio.CancelledError:
            last = msgspec.structs.replace(last, status="cancelled", eta_sec=None, bytes_per_sec=0.0)
        except Exception as error:  # whatever it is, nobody must wait for more
            _log.exception("pull of %s: the download broke", pull.progress.reference)
            problem = Problem("internal_error", f"The download failed: {error}")
            last = msgspec.structs.replace(last, status="failed", error=problem)
        finally:
            outcome = f"{last.status}: {last.error.message}" if last.error else last.status
            _log.info("pull of %s: %s", pull.progress.reference, outcome)
            pull.tell(last, over=True)


def _command(pull: Pull) -> list[str]:
    folders = [str(Path(__file__).resolve().parents[2]), *(path for path in sys.path if path)]
    reference, alias = pull.wanted
    arguments = [str(reference), msgspec.json.encode(pull.taken).decode(), *([alias] if alias else [])]
    return [sys.executable, "-c", _START.format(folders=folders), *arguments]


async def _progress(pull: Pull) -> AsyncGenerator[Progress, None]:
    """What the process says. It is gone when this ends, however it ends."""
    environ = {**os.environ, "MODEL_Q4_THRESHOLD_BYTES": str(pull.q4_above_bytes)}
    process = processes.spawn(_command(pull), environ, sys.stderr.fileno())
    reader = asyncio.StreamReader(limit=_LONGEST_LINE)
    transport: asyncio.BaseTransport | None = None
    try:
        loop = asyncio.get_running_loop()
        assert process.stdout is not None
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), process.stdout)
        while line := await reader.readline():
            yield msgspec.json.decode(line, type=Progress)
    finally:
        if transport is not None:
            transport.close()
        process.kill()
        await processes.exit_code(process)
        if process.stdin is not None:
            process.stdin.close()
