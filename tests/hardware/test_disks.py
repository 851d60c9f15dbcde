"""What is free at the places where the router writes."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from router.hardware import disks
from router.hardware.disks import Disks


class Usage:
    """Plays `shutil.disk_usage`: folders have what they are named after, and `hangs` does not answer."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def __call__(self, folder: Path) -> Any:
        if folder.name == "hangs":
            self.go_on.wait()
        if folder.name == "absent":
            raise FileNotFoundError
        if not folder.name.isdigit():
            raise PermissionError
        return shutil._ntuple_diskusage(1000, 1000 - int(folder.name), int(folder.name))


@pytest.fixture
def usage(monkeypatch: pytest.MonkeyPatch) -> Usage:
    played = Usage()
    monkeypatch.setattr(shutil, "disk_usage", played)
    monkeypatch.setattr(disks, "_ANSWER_SEC", 0.05)
    return played


def free(looked_at: Disks) -> dict[str, int]:
    return {place: space.free for place, space in looked_at.spaces().items()}


def test_of_several_disks_the_fullest_counts_and_a_folder_that_is_not_there_yet_has_that_of_its_parent(
    usage: Usage,
) -> None:
    places = {
        "models": (Path("/900"), Path("/20"), Path("/forbidden")),
        "kv": (Path("/300/absent"),),
        "log": (Path("/forbidden"),),
        "state": (),
    }
    looked_at = Disks(lambda: places)
    assert free(looked_at) == {}
    asyncio.run(looked_at.look())
    assert free(looked_at) == {"models": 20, "kv": 300}


def test_a_disk_that_hangs_has_no_figures_and_keeps_none_from_the_others(
    usage: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = Disks(lambda: {"state": (Path("/700"),), "cache": (Path("/hangs"), Path("/5"))})
    asyncio.run(looked_at.look())
    assert free(looked_at) == {"state": 700, "cache": 5}
    before = threading.active_count()
    asyncio.run(looked_at.look())
    assert threading.active_count() == before, "it is not asked again"
    usage.go_on.set()
    monkeypatch.setattr(disks, "_OLDEST_SEC", 0)
    assert free(looked_at) == {}, "what was read long ago is told no more"
