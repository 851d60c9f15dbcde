"""Notices that files came, went or changed while the router runs. What it means is for others to find out.

The system tells of changes (through `watchfiles`); where it can't, on network drives for example, a look now and
then finds them. A folder that is not there yet is waited for; one whose place another has taken is left for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from router.store.discovery import SETTLE_SEC
from router.system.readings import apart

_log = logging.getLogger("router")

_UNTOLD_SEC = 300
_THERE_SEC = 2
"""Between two looks at which folders are there."""
_QUIET_MS = 250
_NO_LATER_THAN_MS = 5000
_NOISE = frozenset({"blobs", ".locks"})
"""Where downloads are written in the Hugging Face cache and in Ollama's store, before they are named."""

_There = list[tuple[Path, int, int]]
"""Folders, each with what tells it from one that is put in its place: its device and inode."""


async def watch(folders: Callable[[], Sequence[Path]], look: Callable[[], Awaitable[bool]]) -> None:
    """Until cancelled, await `look` after every change below `folders`, once things are quiet for a moment.

    While `look` returns True, something there is still in motion, and it is called again after `SETTLE_SEC`.
    """
    while True:
        there = await apart(partial(_those_there, folders()))
        try:
            await _look_until_settled(look)
            if there:
                await _watch_these(there, folders, look)
            else:
                await asyncio.sleep(_THERE_SEC)
        except (
            Exception
        ) as error:  # the system's limit of watches, or a folder that is gone again, or a mistake of ours
            _log.warning("changes in model folders are noticed with a delay: %r", error)
            await asyncio.sleep(_UNTOLD_SEC)


async def watch_files(files: Callable[[], Sequence[Path]], look: Callable[[], Awaitable[bool]]) -> None:
    """The same for single files, of which nobody wants to know what else is in their folders."""
    known: dict[Path, _Version] = {}
    while True:
        now = await apart(partial(_versions, files()))
        changed = any(known.get(file, version) != version for file, version in now.items())
        known = now
        if changed:
            await _look_until_settled(look)
        await asyncio.sleep(_THERE_SEC)


_Version = tuple[int, int] | None
"""Size and time of the last change; None: it is not there."""


def _versions(files: Sequence[Path]) -> dict[Path, _Version]:
    """Blocks for as long as a disk does not answer."""
    versions: dict[Path, _Version] = {}
    for file in files:
        versions[file] = None
        with contextlib.suppress(OSError):
            status = file.stat()
            versions[file] = (status.st_size, status.st_mtime_ns)
    return versions


async def _watch_these(
    there: _There, folders: Callable[[], Sequence[Path]], look: Callable[[], Awaitable[bool]]
) -> None:
    """Until one of the folders goes, or another one is there."""
    from watchfiles import awatch  # here, because it takes 40 ms that the start need not wait for

    paths = [path for path, *_ in there]
    changes = awatch(
        *paths,
        watch_filter=lambda _, path: not _is_noise(Path(path), paths),
        step=_QUIET_MS,
        debounce=_NO_LATER_THAN_MS,
        rust_timeout=1000 * _THERE_SEC,
        yield_on_timeout=True,
        ignore_permission_denied=True,
    )
    looked_sec = -math.inf  # what has changed since the last look and before the system listens is told by nobody
    async for changed in changes:
        made_anew = any(Path(path) in paths for _, path in changed)  # perhaps with the inode of the one before
        if made_anew or there != await apart(partial(_those_there, folders())):
            return
        if changed or time.monotonic() - looked_sec >= _UNTOLD_SEC:
            await _look_until_settled(look)
            looked_sec = time.monotonic()


def _those_there(folders: Sequence[Path]) -> _There:
    """Blocks for as long as a disk does not answer."""
    there: _There = []
    for folder in folders:
        with contextlib.suppress(OSError):
            status = folder.stat()
            if stat.S_ISDIR(status.st_mode):
                there.append((folder, status.st_dev, status.st_ino))
    return there


def _is_noise(path: Path, folders: Sequence[Path]) -> bool:
    """What the folders themselves are called does not matter, unless the system gives them other names."""
    inside = [path.relative_to(folder) for folder in folders if path.is_relative_to(folder)]
    return not any(_NOISE.isdisjoint(each.parts) for each in inside or [path])


async def _look_until_settled(look: Callable[[], Awaitable[bool]]) -> None:
    settling = await look()
    while settling:
        await asyncio.sleep(SETTLE_SEC)
        settling = await look()
