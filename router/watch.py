"""Notices that files came or went below folders, while the router runs. What it means is for others to find out.

The system tells of changes (through `watchfiles`); where it can't, on network drives for example, a look now and
then finds them. A folder that is not there yet is waited for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from router.hub import SETTLE_SEC

_log = logging.getLogger("router")

_UNTOLD_SEC = 300
_ABSENT_SEC = 2
_QUIET_MS = 250
_NO_LATER_THAN_MS = 5000
_NOISE = frozenset({"blobs", ".locks"})
"""Where downloads are written in the Hugging Face cache and in Ollama's store, before they are named."""


async def watch(folders: Callable[[], Sequence[Path]], look: Callable[[], Awaitable[bool]]) -> None:
    """Until cancelled, await `look` after every change below `folders`, once things are quiet for a moment.

    While `look` returns True, something there is still in motion, and it is called again after `SETTLE_SEC`.
    """
    while True:
        there = [folder for folder in folders() if folder.is_dir()]
        try:
            await _look_until_settled(look)
            if there:
                await _watch_these(there, folders, look)
            else:
                await asyncio.sleep(_ABSENT_SEC)
        except (
            Exception
        ) as error:  # the system's limit of watches, or a folder that is gone again, or a mistake of ours
            _log.warning("changes in folders of models are noticed after a while only: %r", error)
            await asyncio.sleep(_UNTOLD_SEC)


async def _watch_these(
    there: Sequence[Path], folders: Callable[[], Sequence[Path]], look: Callable[[], Awaitable[bool]]
) -> None:
    """Until one of the folders goes, or another one is there."""
    from watchfiles import awatch  # here, because it takes 40 ms that the start need not wait for

    complete = len(there) == len(folders())
    changes = awatch(
        *there,
        watch_filter=lambda _, path: _NOISE.isdisjoint(Path(path).parts),
        step=_QUIET_MS,
        debounce=_NO_LATER_THAN_MS,
        rust_timeout=1000 * (_UNTOLD_SEC if complete else _ABSENT_SEC),
        yield_on_timeout=True,
        ignore_permission_denied=True,
    )
    looked_sec = time.monotonic()
    async for changed in changes:
        if there != [folder for folder in folders() if folder.is_dir()]:
            return
        if changed or time.monotonic() - looked_sec >= _UNTOLD_SEC:
            await _look_until_settled(look)
            looked_sec = time.monotonic()


async def _look_until_settled(look: Callable[[], Awaitable[bool]]) -> None:
    settling = await look()
    while settling:
        await asyncio.sleep(SETTLE_SEC)
        settling = await look()
