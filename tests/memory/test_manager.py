"""What an engine is started with, when the world has changed since its place was found."""

from __future__ import annotations

import _thread
import asyncio
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from gpus import GPU0, GPU1
from sysfs import card, lay_out

from router.config.resolved import ModelConfig
from router.config.schema import System
from router.engines.launcher import LocalLauncher
from router.engines.llamacpp.backend import LlamaCpp
from router.engines.llamacpp.binary import Binary
from router.engines.llamacpp.model import LlamaCppModel
from router.engines.llamacpp.sizing import EngineKind
from router.engines.orphans import EngineRecord
from router.hardware.devices import Devices
from router.hardware.ram import ProcessMemory
from router.memory.manager import MemoryManager
from router.memory.measurements import Identity, Learned
from router.memory.plan import Alternative, Planner, Size, Unusable
from router.scheduling.messages import Event
from router.scheduling.scheduler import Scheduler
from router.system.devices import HOST, Device
from router.system.state import State


def embedded(_: ModelConfig) -> Planner:
    launcher = LocalLauncher(8085, EngineRecord(State()), None)
    return LlamaCpp(Binary(("python",), "embedded", "xllamacpp"), launcher, Learned())


@pytest.fixture
def manager(tmp_path: Path) -> MemoryManager:
    """On a machine without GPUs."""
    devices = Devices([], root=tmp_path)
    devices.read_blocking()
    posted: list[Event] = []
    return MemoryManager(System(), embedded, devices, Learned(), Scheduler(), posted.append)


def test_an_engine_whose_gpu_is_gone_is_not_started_elsewhere(manager: MemoryManager) -> None:
    chosen = Alternative((GPU0, GPU1), Size({}, "", {}), {GPU0: 500, GPU1: 500})
    account = manager.ledger.open(1, "a", chosen)
    with pytest.raises(Unusable, match="gpu0, gpu1 are gone"):
        manager.shows(account)


def test_an_engine_gets_what_was_found_when_room_was_made_for_it_also_after_a_later_look(
    manager: MemoryManager, tiny: Path
) -> None:
    async def look(*flags: str) -> dict[Device, int]:
        found = await manager.inspect(LlamaCppModel("a", tiny, flags), System())
        assert found.problem is None
        return dict(found.placements[0])

    async def story() -> None:
        first = await look("-c", "1024")
        second = await look("-c", "2048")
        assert first != second
        assert manager.open(1, "a", first).chosen.placement == first
        assert manager.open(2, "a", second).chosen.placement == second

    asyncio.run(story())


def test_an_engine_that_lacked_a_library_is_not_refused_once_it_has_it(tmp_path: Path) -> None:
    library, engine = tmp_path / "libggml.so", tmp_path / "llama-server"
    engine.write_text(f'#!/bin/sh\n[ -e {library} ] || {{ echo "libggml.so: cannot open" >&2; exit 127; }}\n')
    engine.chmod(0o755)
    kind = EngineKind(Binary((str(engine),), "llama-server", "here"))
    with pytest.raises(Unusable, match=r"llama-server cannot be run: libggml\.so: cannot open"):
        kind.check_runs()
    library.touch()
    kind.check_runs()


def test_an_engine_for_which_nothing_was_found_says_so(manager: MemoryManager) -> None:
    account = manager.open(1, "a", {HOST: 500})
    with pytest.raises(Unusable, match="plan has changed"):
        manager.shows(account)
    assert account.booked() == {HOST: 500}, "until its end is told"


def test_however_often_a_disk_that_hangs_is_looked_at_one_thread_waits_for_it(
    manager: MemoryManager, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = threading.Event()
    monkeypatch.setattr(LlamaCpp, "plan", lambda *_, **__: back.wait())

    async def story() -> None:
        manager.looks.limit_sec = 0.05
        threads = _thread._count()
        for alias in ("a", "b", "a"):
            with pytest.raises(Unusable, match=r"could not be inspected within 0\.05 s"):
                await manager.inspect(LlamaCppModel(alias, tiny, ()), System())
        assert _thread._count() <= threads + 1
        back.set()

    asyncio.run(story())


class SlowWalk(Devices):
    """Its looks at what engines have mapped take as long as they are made to."""

    def __init__(self, root: Path) -> None:
        super().__init__(environ={}, root=root)
        self.walks, self.goes_on = asyncio.Event(), asyncio.Event()

    async def held_by(
        self, pids: Iterable[int], deadline_sec: float = 2, *, mapped: bool = True
    ) -> Mapping[int, ProcessMemory]:
        if mapped:
            self.walks.set()
            await self.goes_on.wait()
        return dict.fromkeys(pids, ProcessMemory(100, 0))


def test_a_look_that_takes_long_does_not_bring_back_what_a_later_one_saw_gone(tmp_path: Path) -> None:
    def uses(mib: int) -> None:
        lay_out(tmp_path, card(0, vram_mib=16000, used_mib=mib, slot="0000:03:00.0"))

    async def story() -> None:
        devices = SlowWalk(tmp_path)
        uses(12000)
        manager = MemoryManager(System(), embedded, devices, Learned(), Scheduler(), lambda event: None)
        account = manager.ledger.open(1, "a", Alternative((), Size({}, "", {}), {HOST: 100}))
        account.pids = (4194303,)
        slow = asyncio.create_task(manager.look(mapped=True))
        await devices.walks.wait()
        uses(0)
        await manager.look()
        devices.goes_on.set()
        await slow
        assert manager.ledger.budgets()[0][GPU0] == 16000

    asyncio.run(story())


class Mapped(Devices):
    """Every engine has 40 MiB of its file mapped."""

    async def held_by(
        self, pids: Iterable[int], deadline_sec: float = 2, *, mapped: bool = True
    ) -> Mapping[int, ProcessMemory]:
        return dict.fromkeys(pids, ProcessMemory(100, 40))


def test_what_an_engine_has_mapped_is_remembered_also_when_it_answers_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        learned, identity = Learned(), Identity((), "xllamacpp", (), 0)
        devices = Mapped([], root=tmp_path)
        manager = MemoryManager(System(), embedded, devices, learned, Scheduler(), lambda event: None)
        size = Size({HOST: 110}, "file size", {HOST: 110}, identity)
        account = manager.ledger.open(1, "a", Alternative((), size, {HOST: 110}))
        account.pids = (4194303,)
        ready = asyncio.create_task(manager.ready(account))
        await asyncio.sleep(0)  # as long as it takes to send it a request
        account.has_answered = True
        await manager.answered(account)
        assert learned.measured(identity) == {HOST: 140}
        await ready

    asyncio.run(story())
