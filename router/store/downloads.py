"""Runs the pulls of a router, each in a process of its own, so that none delays requests.

A pull belongs to the router, not to the client that requested it: it continues when the client disconnects, and
requests for the same model join it. `pull.py` does the work; this module starts, follows and stops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import anyio
import msgspec

from router.memory.plan import Site
from router.store import repository
from router.store.progress import Order, Problem, Progress
from router.system import processes

_log = logging.getLogger("router")

MOST_AT_ONCE = 4
_REMEMBERED = 50
_LONGEST_LINE = 1 << 20
_START = "import sys; sys.path[:0] = {folders!r}; from router.store.pull import child; child(sys.argv[1])"
_MOST_ESTIMATES = 2
_ESTIMATE_SEC = 60.0


class TooManyPulls(Exception):
    """Raised when the maximum number of pulls is running."""


class NoMorePulls(Exception):
    """Raised when the router is shutting down."""


class Pull:
    """A pull, running or ended."""

    def __init__(self, reference: repository.Reference, alias: str | None) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.wanted = (reference, alias)
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
        """Yield the progress, now and at every change up to the last; slow readers skip intermediate ones."""
        while True:
            news, over = self._news, self.over
            yield self.progress
            if over:
                return
            await news.wait()


class Downloads:
    """Starts pulls and keeps the recent ones.

    `look_again` makes the router scan for models, and `sites` returns its devices for estimates.
    """

    def __init__(
        self, look_again: Callable[[], Awaitable[object]], sites: Callable[[], Sequence[Site]] = tuple
    ) -> None:
        self.pulls: dict[str, Pull] = {}
        self.look_again = look_again
        self._sites = sites
        self._estimates = anyio.CapacityLimiter(_MOST_ESTIMATES)
        self._is_ending = False
        self.ended = dict.fromkeys(("success", "failed", "cancelled"), 0)
        """How many pulls have ended, by outcome."""
        self.received_bytes = 0
        """What all of them have brought."""

    @property
    def running(self) -> int:
        return sum(not pull.over for pull in self.pulls.values())

    def start(
        self,
        reference: repository.Reference,
        alias: str | None,
        taken: Mapping[str, str],
        environ: Mapping[str, str],
    ) -> Pull:
        """Start a pull, or join the running pull of the same model. Raises TooManyPulls, NoMorePulls.

        `taken` maps names of the repository that are already in use to the sources of those models, and `environ`
        are variables for the process.
        """
        if self._is_ending:
            raise NoMorePulls
        running = [pull for pull in self.pulls.values() if not pull.over]
        for pull in running:
            if pull.wanted == (reference, alias) and not pull.cancelled:
                return pull
        if len(running) >= MOST_AT_ONCE:
            raise TooManyPulls
        pull = Pull(reference, alias)
        over = [pull for pull in self.pulls.values() if pull.over]
        for old in over[: max(0, len(self.pulls) + 1 - _REMEMBERED)]:
            del self.pulls[old.id]
        self.pulls[pull.id] = pull
        order = Order(str(reference), alias, taken, tuple(self._sites()))
        pull.task = asyncio.get_running_loop().create_task(
            self._run(pull, order, environ), name=f"pull of {reference}"
        )
        return pull

    async def estimate(
        self,
        reference: repository.Reference,
        alias: str | None,
        taken: Mapping[str, str],
        environ: Mapping[str, str],
    ) -> Progress:
        """Return what a pull would tell before it downloads anything: its status is `estimated`, or `failed`."""
        last = Progress(str(reference), alias)
        order = Order(str(reference), alias, taken, tuple(self._sites()), only_estimate=True)
        async with self._estimates:
            with anyio.move_on_after(_ESTIMATE_SEC):
                async with contextlib.aclosing(_progress(order, environ)) as told:
                    async for progress in told:
                        last = progress
        if last.status not in ("estimated", "failed"):
            problem = Problem("unreachable", f"the estimate did not end within {_ESTIMATE_SEC:g} s")
            last = msgspec.structs.replace(last, status="failed", error=problem)
        return last

    async def cancel(self, pull: Pull) -> None:
        """Stop a pull. The partial download is kept for the next one."""
        if pull.task is not None and not pull.over:
            pull.cancelled = True
            pull.task.cancel()
            await asyncio.wait({pull.task})

    async def shut_down(self) -> None:
        self._is_ending = True
        for pull in self.pulls.values():
            await self.cancel(pull)

    async def _run(self, pull: Pull, order: Order, environ: Mapping[str, str]) -> None:
        _log.info("pull of %s: started", pull.progress.reference)
        last = pull.progress
        arrived: int | None = None
        try:
            async with contextlib.aclosing(_progress(order, environ)) as told:
                async for last in told:
                    if last.status != "resolving":
                        there, arrived = arrived, last.completed_bytes
                        self.received_bytes += 0 if there is None else max(0, arrived - there)
                    if last.status in ("resolving", "downloading"):
                        pull.tell(last)
            if last.status == "success":
                await self.look_again()  # before success is reported, so that clients can use the model
            if last.status not in ("success", "failed"):
                problem = Problem("internal_error", "The download failed; see the router's log.")
                last = msgspec.structs.replace(last, status="failed", error=problem)
        except asyncio.CancelledError:
            last = msgspec.structs.replace(last, status="cancelled", eta_sec=None, bytes_per_sec=0.0)
        except Exception as error:  # followers must not wait forever
            _log.exception("pull of %s: the download broke", pull.progress.reference)
            problem = Problem("internal_error", f"The download failed: {error}")
            last = msgspec.structs.replace(last, status="failed", error=problem)
        finally:
            outcome = f"{last.status}: {last.error.message}" if last.error else last.status
            _log.info("pull of %s: %s", pull.progress.reference, outcome)
            self.ended[last.status] += 1
            pull.tell(last, over=True)


def _command(order: Order) -> list[str]:
    folders = [str(Path(__file__).resolve().parents[2]), *(path for path in sys.path if path)]
    return [sys.executable, "-c", _START.format(folders=folders), msgspec.json.encode(order).decode()]


async def _progress(order: Order, environ: Mapping[str, str]) -> AsyncGenerator[Progress, None]:
    """Yield the progress that the process reports; the process is killed when the generator ends."""
    process = processes.spawn(_command(order), {**os.environ, **environ}, sys.stderr.fileno())
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
