"""Notices that files appeared, disappeared or changed, and triggers a scan.

The operating system reports changes (through `watchfiles`); where it cannot, as on network drives, a periodic scan
finds them. Folders that do not exist yet are waited for, and a folder that is replaced by another is watched anew.
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
"""Interval at which the existence of folders is checked."""
_QUIET_MS = 250
_NO_LATER_THAN_MS = 5000
_NOISE = frozenset({"blobs", ".locks"})
"""Folders to which the Hugging Face cache and Ollama's store write downloads before they get their names."""

_There = list[tuple[Path, int, int]]
"""Existing folders, each with device and inode, which identify a folder that replaces it."""


async def watch(folders: Callable[[], Sequence[Path]], look: Callable[[], Awaitable[bool]]) -> None:
    """Await `look` after every change below `folders`, once there are no changes for a moment, until cancelled.

    While `look` returns True, files are still being written, and it is called again after `SETTLE_SEC`.
    """
    while True:
        there = await apart(partial(_those_there, folders()))
        try:
            await _look_until_settled(look)
            if there:
                await _watch_these(there, folders, look)
            else:
                await _until_one_is_there(folders)
        except Exception as error:  # the system's limit on watches, a folder that is gone again, or a bug
            _log.warning("changes in model folders are noticed with a delay: %r", error)
            await asyncio.sleep(_UNTOLD_SEC)


async def watch_files(files: Callable[[], Sequence[Path]], look: Callable[[], Awaitable[bool]]) -> None:
    """Await `look` after every change of single files; changes of other files in their folders do not matter."""
    known: dict[Path, _Version] = {}
    while True:
        now = await apart(partial(_versions, files()))
        changed = any(known.get(file, version) != version for file, version in now.items())
        known = now
        if changed:
            await _look_until_settled(look)
        await asyncio.sleep(_THERE_SEC)


_Version = tuple[int, int] | None
"""Size and modification time (ns); None if the file does not exist."""


def _versions(files: Sequence[Path]) -> dict[Path, _Version]:
    """Return the versions of files. Blocks while a disk does not respond."""
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
    """Watch folders until one of them disappears or another one appears."""
    from watchfiles import awatch  # imported here to keep 40 ms out of the start

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
    looked_sec = -math.inf  # changes between the last look and the start of the watch are not reported
    async for changed in changes:
        made_anew = any(Path(path) in paths for _, path in changed)  # possibly with the same inode
        if made_anew or there != await apart(partial(_those_there, folders())):
            return
        if changed or time.monotonic() - looked_sec >= _UNTOLD_SEC:
            await _look_until_settled(look)
            looked_sec = time.monotonic()


async def _until_one_is_there(folders: Callable[[], Sequence[Path]]) -> None:
    while not await apart(partial(_those_there, folders())):  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(_THERE_SEC)


def _those_there(folders: Sequence[Path]) -> _There:
    """Return those of the folders that exist. Blocks while a disk does not respond."""
    there: _There = []
    for folder in folders:
        with contextlib.suppress(OSError):
            status = folder.stat()
            if stat.S_ISDIR(status.st_mode):
                there.append((folder, status.st_dev, status.st_ino))
    return there


def _is_noise(path: Path, folders: Sequence[Path]) -> bool:
    """Whether a path lies in a download folder below `folders`, or anywhere if it is below none of them."""
    inside = [path.relative_to(folder) for folder in folders if path.is_relative_to(folder)]
    return not any(_NOISE.isdisjoint(each.parts) for each in inside or [path])


async def _look_until_settled(look: Callable[[], Awaitable[bool]]) -> None:
    settling = await look()
    while settling:
        await asyncio.sleep(SETTLE_SEC)
        settling = await look()
