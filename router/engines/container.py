"""Engines that run in containers: their logs, how they are stopped, and why they exited.

The death of a container, and that of its daemon, is the death of the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import time

import anyio

from router.engines.base import Ending, Endpoint
from router.engines.docker import Containers, Started, address
from router.engines.log_ring import LogRing
from router.engines.supervised import Limits, SupervisedEngine
from router.hardware.ram import resident_bytes
from router.observe.reasons import Reason
from router.system.processes import birth, signal_name

_LAST_WORDS_SEC = 2.0
"""Time for the rest of the log after an exit."""
_KILL_SEC = 10.0
"""Time after which a daemon that was asked to kill a container is given up."""
_REMOVE_SEC = 5.0
"""Time for which a daemon that has been given up may still remove a container."""
_STATS_SEC = 8.0
"""Time limit for figures of a container."""
_LOOK_SEC = 1.0
"""Time between two looks at what a container has computed: Docker looks each second, Podman when it is asked."""
_COMPUTES = 0.1
"""Processors in use from which on an engine that does not answer is at work."""
_READ_AT_ONCE = 1 << 16
_PAUSE_SEC = 0.02
"""Pause after so many characters of log, as an engine may write without end."""


ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - inside a container; outside, 127.0.0.1 or a network of Docker's


class ContainerEngine(SupervisedEngine):
    """Running engine in a container. `exited` is done once the container is removed."""

    def __init__(
        self, containers: Containers, started: Started, endpoint: Endpoint, limits: Limits, log: LogRing
    ) -> None:
        super().__init__(endpoint, limits, log)
        self.command = started.command
        self._containers = containers
        self._started = started
        self._exit_code: int | None = None
        self._is_over = False
        self._given_up = asyncio.Event()
        self._killing: asyncio.Task[None] | None = None
        self._exited = asyncio.create_task(self._wait(), name=f"exit of {started.name}")

    @property
    def exited(self) -> asyncio.Task[Reason]:
        return self._exited

    @property
    def pids(self) -> tuple[int, ...]:
        return () if self._started.pid is None else (self._started.pid,)

    @property
    def alive(self) -> bool:
        return not self._is_over

    @property
    def exit_code(self) -> int | None:
        return self._exit_code

    async def _ask_to_go(self, grace_sec: float) -> None:
        """Let the daemon send the image's stop signal, and SIGKILL after the grace period."""
        asked = asyncio.create_task(self._stop(grace_sec))
        await asyncio.wait({self.exited}, timeout=grace_sec)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    async def _stop(self, grace_sec: float) -> None:
        # A little later than the router's own kill, which knows why.
        with contextlib.suppress(Exception):  # whatever it is, the kill that follows reports it
            await self._started.container.stop(t=math.ceil(grace_sec) + 1)

    def kill(self, reason: str = "") -> None:
        if self.alive and self._killing is None:
            self._killed_because = self._killed_because or reason
            self._killing = asyncio.create_task(self._kill(), name=f"kill of {self._started.name}")

    async def _kill(self) -> None:
        with contextlib.suppress(Exception):  # whatever it is, the container is given up
            with anyio.fail_after(_KILL_SEC):
                await self._started.container.kill()
            await asyncio.wait({self._exited}, timeout=_KILL_SEC)
        self._given_up.set()

    async def _computes(self) -> bool:
        """Return whether its processes compute, by what the daemon sees of them in a second."""
        try:
            with anyio.fail_after(_STATS_SEC):
                before_sec, after_sec = await self._used_sec()
                if not before_sec:
                    await asyncio.sleep(_LOOK_SEC)
                    before_sec, (_, after_sec) = after_sec, await self._used_sec()
                return after_sec - before_sec >= _COMPUTES * _LOOK_SEC
        except Exception:  # of any kind: then nothing is known to compute
            return False

    async def _used_sec(self) -> tuple[float, float]:
        """Return the processor time of the container a second ago, 0 if the daemon does not say, and now."""
        (seen,) = await self._started.container.stats(stream=False)
        before, after = (seen[key]["cpu_usage"]["total_usage"] / 1e9 for key in ("precpu_stats", "cpu_stats"))
        return before, after

    def _resident_bytes(self) -> int:
        return 0 if self._started.pid is None else resident_bytes(self._started.pid)

    async def _wait(self) -> Reason:
        """Wait for the end of the container, of its daemon, or of patience with the daemon; then remove it."""
        follows = asyncio.create_task(self._follow_log())
        waits = asyncio.create_task(self._ended())
        gives_up = asyncio.create_task(self._given_up.wait())
        ended = None
        try:
            await asyncio.wait({waits, gives_up}, return_when=asyncio.FIRST_COMPLETED)
            self._is_over = True
            ended = waits.result() if waits.done() else None
            await asyncio.wait({follows}, timeout=_LAST_WORDS_SEC)
            return self._reason(ended)
        finally:
            self._is_over = True
            for task in (follows, waits, gives_up):
                task.cancel()
            await asyncio.gather(follows, waits, gives_up, return_exceptions=True)
            await self._containers.remove(self._started.container, None if ended else _REMOVE_SEC)
            await self._started.docker.close()

    async def _ended(self) -> tuple[int, bool] | None:
        """Return exit code and whether the kernel killed it for lack of memory; None if the daemon has gone."""
        try:
            code = (await self._started.container.wait())["StatusCode"]
            state = (await self._started.container.show())["State"]
        except Exception:  # of any kind: nobody watches the container any more
            return None
        return code, state.get("OOMKilled", False)

    def _reason(self, ended: tuple[int, bool] | None) -> Reason:
        self.was_killed = bool(self._killed_because)
        if ended is None:
            self._end_process()
            lost = f"the daemon at {address()} that ran its container has gone or does not answer"
            return Reason(self._killed_because or lost, self._killed_because or "its Docker daemon has gone")
        code, self.out_of_memory = ended
        self._exit_code = 128 - code if 128 < code < 128 + signal.NSIG else code
        log = self.log.since(self._log_begin)
        self.ending = Ending(self.retry_after(code, log), self._wanted_mib(log))
        if self._killed_because and self._exit_code == -signal.SIGKILL:
            return Reason(self._killed_because, self._killed_because)
        self.was_killed = False
        return self._describe_exit(self._exit_code)

    def _exit_in_words(self, code: int) -> str:
        how = f"exited with code {code}" if code >= 0 else f"was killed by {signal_name(code)}"
        return f"its container {how}"

    def _end_process(self) -> None:
        """End the process of a container whose daemon has gone, where it can be seen and is still the same."""
        pid, born = self._started.pid, self._started.born
        if pid is not None and born is not None and birth(pid) == born:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    async def _follow_log(self) -> None:
        size = 0
        try:
            async for text in self._started.container.log(stdout=True, stderr=True, follow=True):
                self._hear(text)
                size += len(text)
                if size > _READ_AT_ONCE:
                    size = 0
                    await asyncio.sleep(_PAUSE_SEC)
        except Exception as error:  # of any kind: an engine without a log still serves
            if self.alive:
                self._hear(f"the log of container {self._started.name} cannot be read: {error}\n")

    def _hear(self, text: str) -> None:
        logged = self.log.total
        self.log.feed(text.encode())
        if self._shows_progress(logged):
            self._last_sign = time.monotonic()
