"""Free space of the disks that the router writes to, and of those with models."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from router.system.readings import Watch

_LOOK_SEC = 15.0
_ANSWER_SEC = 5.0
_OLDEST_SEC = 60.0
"""Age from which a reading does not count any more: its disk hangs."""


class Space(NamedTuple):
    """Sizes in bytes; `free` is what the router may use."""

    free: int
    total: int


class Disks:
    """What is free at each place, looked at apart from requests: a disk that hangs costs its own reading only."""

    def __init__(self, places: Callable[[], Mapping[str, Iterable[Path]]]) -> None:
        """`places` returns the folders of each place, which may be on several disks or not exist yet."""
        self._places = places
        self._watches: dict[Path, Watch[Space | None]] = {}

    async def watch(self) -> None:
        """Look at all of them again and again, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_SEC)

    async def look(self) -> None:
        """Look at all of them once."""
        folders = {folder for those in self._places().values() for folder in those}
        self._watches = {
            folder: self._watches.get(folder) or Watch(lambda it=folder: _space(it), None, f"disk of {folder}")  # type: ignore[misc]
            for folder in folders
        }
        await asyncio.gather(*(watch.read(_ANSWER_SEC) for watch in self._watches.values()))

    def spaces(self) -> dict[str, Space]:
        """Return the space at each place; of several disks, that of the fullest. Nothing of those that hang."""
        found = {place: [*filter(None, map(self._last, those))] for place, those in self._places().items()}
        return {place: min(spaces) for place, spaces in found.items() if spaces}

    def _last(self, folder: Path) -> Space | None:
        watch = self._watches.get(folder)
        if watch is None or watch.taken_sec is None or time.monotonic() - watch.taken_sec > _OLDEST_SEC:
            return None
        return watch.last


def _space(folder: Path) -> Space | None:
    """Return the space of the disk with a folder, or with the one in which it would be created."""
    for each in (folder, *folder.parents):
        try:
            usage = shutil.disk_usage(each)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return Space(usage.free, usage.total)
    return None
