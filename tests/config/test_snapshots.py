"""Reads of files on a disk that hangs; the disk is simulated by a thread that waits."""

from __future__ import annotations

import _thread
import asyncio
import gc
import threading
import time
from pathlib import Path

import pytest

from router.config.snapshots import DiskHangs, FolderHangs, FolderLooks, Looks


def test_a_look_that_hangs_is_told_and_keeps_no_further_ones_once_it_has_ended(tmp_path: Path) -> None:
    async def story() -> None:
        looks, back = Looks(silent_sec=0.01, longest_sec=0.05), threading.Event()
        threads = _thread._count()
        for _ in range(3):
            with pytest.raises(DiskHangs, match=f"a file in {tmp_path} could not be read"):
                await looks.take(back.wait, [tmp_path])
        assert _thread._count() == threads + 1
        back.set()
        assert await looks.take(lambda: "all", [tmp_path]) == "all"

    asyncio.run(story())


def test_a_look_that_nobody_waits_for_any_more_fails_unsaid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    back = threading.Event()

    def look() -> None:
        back.wait()
        raise OSError("stale")

    async def story() -> None:
        looks = Looks(silent_sec=0.01, longest_sec=0.05)
        with pytest.raises(DiskHangs):
            await looks.take(look, [tmp_path])
        back.set()
        assert await looks.take(lambda: "all", [tmp_path]) == "all"
        gc.collect()

    asyncio.run(story())
    assert not caplog.records


def test_a_folder_of_which_nothing_can_be_told_is_named(tmp_path: Path) -> None:
    back = threading.Event()

    class Gone(type(tmp_path)):  # type: ignore[misc]
        """On a drive whose server does not answer."""

        def exists(self) -> bool:
            return back.wait()

    async def story() -> None:
        looks, gone = Looks(silent_sec=0.01, place_sec=0.2), Gone("/nfs/models")
        threads = _thread._count()
        for _ in range(3):
            with pytest.raises(DiskHangs, match="/nfs/models does not respond"):
                await looks.take(back.wait, [tmp_path, gone])
        assert _thread._count() == threads + 2  # one looks, one asks
        back.set()

    asyncio.run(story())


def test_a_disk_that_answers_slowly_for_each_of_many_folders_does_not_hang(tmp_path: Path) -> None:
    told = threading.Event()

    class Slow(type(tmp_path)):  # type: ignore[misc]
        def exists(self) -> bool:
            time.sleep(0.03)
            if self.name == "29":
                told.set()
            return True

    async def story() -> bool:
        places = [Slow(f"/models/{number}") for number in range(10, 30)]
        return await Looks(silent_sec=0.01, place_sec=0.5).take(told.wait, places)

    assert asyncio.run(story())


def test_a_slow_disk_is_waited_for(tmp_path: Path) -> None:
    told = threading.Event()

    async def story() -> bool:
        asyncio.get_running_loop().call_later(0.05, told.set)
        return await Looks(silent_sec=0.01).take(told.wait, [tmp_path])

    assert asyncio.run(story())


def test_a_folder_that_hangs_has_one_look_and_the_others_are_looked_into(tmp_path: Path) -> None:
    async def story() -> None:
        looks, back = FolderLooks(limit_sec=0.05), threading.Event()
        threads = _thread._count()
        for _ in range(3):
            with pytest.raises(FolderHangs):
                await looks.take(back.wait, tmp_path / "nfs")
        assert _thread._count() == threads + 1
        assert await looks.take(lambda: "there", tmp_path / "ssd") == "there"
        back.set()
        looks.limit_sec = 10
        assert await looks.take(lambda: "back", tmp_path / "nfs") == "back"

    asyncio.run(story())
