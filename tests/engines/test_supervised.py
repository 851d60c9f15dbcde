"""The load of an engine ends with the engine, at whatever moment that dies."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from router.engines import readiness
from router.engines.base import Endpoint, EngineFailed
from router.engines.log_ring import LogRing
from router.engines.readiness import AnswersAtPath, Readiness
from router.engines.supervised import Limits
from router.observe.reasons import Reason
from router.scheduling.messages import Retry


class Dying(AnswersAtPath):
    """An engine without a process, which ends when `died` is set."""

    pids = ()
    alive = True
    exit_code = None

    def __init__(self, died: asyncio.Event) -> None:
        super().__init__(Endpoint(1), Limits(60, None, 1), LogRing(10))
        self._readiness = Readiness(self.endpoint, "/health")
        self._exited = asyncio.create_task(self._wait(died))

    @property
    def exited(self) -> asyncio.Task[Reason]:
        return self._exited

    async def _wait(self, died: asyncio.Event) -> Reason:
        await died.wait()
        return Reason("killed by SIGKILL", "killed by SIGKILL")

    async def _ask_to_go(self, grace_sec: float) -> None:
        """Nothing: it dies by itself."""

    def kill(self, reason: str = "") -> None:
        """Nothing: it dies by itself."""

    @staticmethod
    def retry_after(code: int, log: Sequence[str]) -> Retry:
        return Retry.LATER

    def _exit_in_words(self, code: int) -> str:
        return ""

    def _resident_bytes(self) -> int:
        return 0


@pytest.mark.parametrize("turns", range(6))
def test_a_death_is_noticed_while_a_probe_is_being_refused(monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    """The probe fails because of the same death, so many turns of the event loop after it."""

    async def load() -> None:
        died = asyncio.Event()

        async def refused(*_: object) -> None:
            await died.wait()
            for _turn in range(turns):
                await asyncio.sleep(0)

        monkeypatch.setattr(readiness, "status", refused)
        loading = asyncio.create_task(Dying(died).ready())
        await asyncio.sleep(0.01)
        died.set()
        await asyncio.wait({loading}, timeout=5)
        assert loading.done(), "it loads for ever"
        assert isinstance(loading.exception(), EngineFailed)

    asyncio.run(asyncio.wait_for(load(), 10))
