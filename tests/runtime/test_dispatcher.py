"""When the router itself makes a mistake, nobody but whom it concerns notices; and they are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import BASE_PORT

from router.config.resolved import Config
from router.engines.launcher import LocalLauncher
from router.engines.llamacpp import embedded
from router.engines.llamacpp.backend import LlamaCpp
from router.engines.llamacpp.binary import Binary
from router.engines.llamacpp.model import LlamaCppModel
from router.engines.orphans import EngineRecord
from router.engines.running import RunningEngine
from router.hardware.devices import Devices
from router.memory.measurements import Learned
from router.observe.events import Events
from router.runtime.background import Background
from router.runtime.dispatcher import Dispatcher, Ticket
from router.scheduling.messages import Placement, Refusal
from router.scheduling.queue import Priority
from router.system.state import State


@asynccontextmanager
async def dispatching(tiny: Path, *aliases: str, slots: int = 1) -> AsyncIterator[Dispatcher]:
    """One with real engines, in this process."""
    flags = ("-c", "1024", "-t", "1", "-np", str(slots))
    config = Config(models={alias: LlamaCppModel(alias, tiny, flags, slots=slots) for alias in aliases})
    binary = Binary(tuple(embedded.command()), "embedded", "here")
    devices = Devices(())
    devices.read_blocking()
    learned, launcher = Learned(), LocalLauncher(BASE_PORT, EngineRecord(State()), None)
    dispatcher = Dispatcher(config, {"llamacpp": LlamaCpp(binary, launcher, learned)}, devices, learned, Events())
    dispatcher.start()
    try:
        yield dispatcher
    finally:
        await dispatcher.shut_down()


async def decided(*tickets: Ticket) -> None:
    """Until each has a slot or a refusal."""
    for ticket in tickets:
        if not ticket.decided:
            told = asyncio.Event()
            ticket.when_decided(told.set)
            await asyncio.wait_for(told.wait(), 30)


class Forgetful(dict[int, RunningEngine]):
    """Breaks whoever asks it for the first time."""

    asked = 0

    def __getitem__(self, engine_id: int) -> RunningEngine:
        self.asked += 1
        if self.asked == 1:
            raise KeyError(engine_id)
        return super().__getitem__(engine_id)


def test_a_grant_that_fails_costs_those_of_the_same_moment_nothing(tiny: Path) -> None:
    async def story() -> None:
        async with dispatching(tiny, "a", slots=2) as dispatcher:
            dispatcher.running = Forgetful()
            tickets = [dispatcher.submit(name, "a", Priority.NORMAL) for name in ("unlucky", "lucky", "next")]
            await decided(*tickets[:2])
            unlucky, lucky, third = tickets
            assert unlucky.rejection is not None
            assert unlucky.rejection.refusal is Refusal.INTERNAL_ERROR
            assert lucky.engine is not None
            assert not third.decided
            dispatcher.finish(unlucky, served=False, computed=False)  # once its client has heard: its slot is free
            await decided(third)
            assert third.engine is lucky.engine
            for ticket in (lucky, third):
                dispatcher.finish(ticket, served=True, computed=False)

    asyncio.run(story())


def test_an_engine_that_cannot_be_started_by_a_mistake_fails_its_model_alone(tiny: Path) -> None:
    async def story() -> None:
        async with dispatching(tiny, "broken", "sound") as dispatcher:
            manager = dispatcher._memory_manager
            opens = manager.open

            def breaks(engine_id: int, alias: str, placement: Placement) -> Any:
                if alias == "broken":
                    raise RuntimeError("a mistake")
                return opens(engine_id, alias, placement)

            manager.open = breaks  # type: ignore[method-assign]
            tickets = [dispatcher.submit(alias, alias, Priority.NORMAL) for alias in ("broken", "sound")]
            await decided(*tickets)
            broken, sound = tickets
            assert broken.rejection is not None
            assert broken.rejection.refusal is Refusal.MODEL_FAILED
            assert "could not be started" in broken.rejection.reason
            assert sound.engine is not None
            for ticket in tickets:
                dispatcher.finish(ticket, served=False, computed=False)

    asyncio.run(story())


def test_a_scheduler_that_breaks_turns_away_whom_it_broke_at_and_goes_on(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with dispatching(tiny, "a") as dispatcher:
            with monkeypatch.context() as patch:
                patch.setattr(dispatcher.scheduler, "_submit", lambda event: 1 / 0)
                unlucky = dispatcher.submit("unlucky", "a", Priority.NORMAL)
            lucky = dispatcher.submit("lucky", "a", Priority.NORMAL)
            await decided(unlucky, lucky)
            assert unlucky.rejection is not None
            assert unlucky.rejection.refusal is Refusal.INTERNAL_ERROR
            assert lucky.engine is not None
            for ticket in (unlucky, lucky):
                dispatcher.finish(ticket, served=False, computed=False)

    asyncio.run(story())


def test_who_waits_for_a_load_no_more_is_forgotten(tiny: Path) -> None:
    async def story() -> None:
        async with dispatching(tiny, "a") as dispatcher:
            for _ in range(10):
                loading = asyncio.create_task(dispatcher.load("a"))
                await asyncio.sleep(0)
                loading.cancel()
                await asyncio.wait({loading})
                assert loading.cancelled()
            assert not any(dispatcher._changes.values())
            assert await dispatcher.load("a") == "ready"

    asyncio.run(story())


def test_what_goes_on_in_the_background_is_begun_again_with_growing_pauses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story() -> None:
        begun: list[float] = []
        goes_on = asyncio.Event()

        async def work() -> None:
            begun.append(time.monotonic())
            if len(begun) <= 4:
                raise RuntimeError("a mistake")
            goes_on.set()
            await asyncio.Event().wait()

        background = Background(pause_sec=(0.02, 0.05))
        kept = background.keep("watch of memory", work)
        (upkeep,) = background
        assert upkeep.is_well
        await asyncio.wait_for(goes_on.wait(), 30)
        pauses = [later - earlier for earlier, later in pairwise(begun)]
        for pause, shortest in zip(pauses, (0.02, 0.04, 0.05, 0.05), strict=True):
            assert pause >= shortest
        assert (upkeep.failures, upkeep.is_well, kept.done()) == (4, False, False)
        kept.cancel()
        await asyncio.wait({kept})
        assert kept.cancelled()

    asyncio.run(story())
    assert caplog.text.count("watch of memory broke, and is begun again in") == 4
