"""What an engine is started with, when the world has changed since its place was found."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from router.accountant import Accountant
from router.config import ModelConfig, System
from router.devices import Devices
from router.engine import Binary, EngineFailed
from router.learning import Learned
from router.messages import Event
from router.placing import Alternative
from router.scheduler import Scheduler
from router.sizing import Size

EMBEDDED = Binary(("python",), "embedded", "xllamacpp")


@pytest.fixture
def accountant(tmp_path: Path) -> Accountant:
    """On a machine without GPUs."""
    devices = Devices([], root=tmp_path)
    devices.read_blocking()
    posted: list[Event] = []
    return Accountant(System(), EMBEDDED, devices, Learned(), Scheduler(), posted.append)


def test_an_engine_whose_gpu_is_gone_is_not_started_elsewhere(accountant: Accountant) -> None:
    chosen = Alternative(("gpu0", "gpu1"), Size({}, "", {}), {"gpu0": 500, "gpu1": 500})
    account = accountant.ledger.open(1, "a", chosen)
    with pytest.raises(EngineFailed, match="gpu0, gpu1 are gone"):
        accountant.environment(account, {})


def test_an_engine_gets_what_was_found_when_room_was_made_for_it_also_after_a_later_look(
    accountant: Accountant, tiny: Path
) -> None:
    async def look(*flags: str) -> dict[str, int]:
        found = await accountant.inspect(ModelConfig("a", tiny, flags), System())
        assert found.problem is None
        return dict(found.placements[0])

    async def story() -> None:
        first = await look("-c", "1024")
        second = await look("-c", "2048")
        assert first != second
        assert accountant.open(1, "a", first).chosen.placement == first
        assert accountant.open(2, "a", second).chosen.placement == second

    asyncio.run(story())


def test_an_engine_for_which_nothing_was_found_says_so(accountant: Accountant) -> None:
    account = accountant.open(1, "a", {"host": 500})
    with pytest.raises(EngineFailed, match="planned anew"):
        accountant.environment(account, {})
    assert account.booked() == {"host": 500}, "until its end is told"
