"""Adds and removes models created by clients: one change at a time, each saved before it takes effect.

Changes take effect like those of the configuration: requests in progress continue unchanged, and an engine whose
model has changed or was removed finishes its requests first.
"""

from __future__ import annotations

import asyncio
import errno
import math
from collections.abc import Awaitable, Callable, Mapping

from router.config.resolved import Config
from router.config.source import Source
from router.store import created
from router.store.blobs import Blobs
from router.store.created import Created
from router.system.state import State

_UNUSED_SEC = 24 * 3600.0
"""Time for which an uploaded file that no model uses is kept."""


class Creations:
    """The records and files of a router. `look_again` makes the router apply changes."""

    def __init__(self, state: State, look_again: Callable[[], Awaitable[object]]) -> None:
        """Read the records and remove unused files. Blocks."""
        self._file = state.file(created.FILE, dict[str, Created], "nothing can be created")
        self._look_again = look_again
        self._changing = asyncio.Lock()
        self.records: Mapping[str, Created] = self._file.read() or {}
        self.blobs: Blobs | None = None
        """None without a state directory; then nothing can be created."""
        if state.path is not None:
            self.blobs = created.blobs(state.path)
            # Records that were set aside may be repaired: their files are kept.
            spared_sec = math.inf if created.set_aside(state.path) else _UNUSED_SEC
            self.blobs.sweep(_files(self.records), spared_sec)

    def named(self, name: str, config: Config) -> Created | None:
        """Return the record of the model served under a name; None if it was not created by a client."""
        served = config.aliases.get(name) or config.models.get(name)
        return self.records.get(name) if served is not None and served.source == Source.CREATED else None

    async def put(self, name: str, made: Created) -> None:
        """Add a record, or replace the previous one of that name. Raises OSError."""
        async with self._changing:
            if gone := [digest for digest in made.files if self.blobs is None or not self.blobs.has(digest)]:
                raise FileNotFoundError(errno.ENOENT, "was removed meanwhile", f"sha256:{gone[0]}")
            await self._change({**self.records, name: made})

    async def remove(self, name: str) -> int | None:
        """Remove a record; return the number of bytes freed, or None if there is none. Raises OSError."""
        async with self._changing:
            if name not in self.records:
                return None
            return await self._change({other: made for other, made in self.records.items() if other != name})

    async def _change(self, records: dict[str, Created]) -> int:
        await asyncio.to_thread(self._file.replace, records)
        unused = _files(self.records) - _files(records)
        self.records = records
        await self._look_again()
        return await asyncio.to_thread(self.blobs.remove, unused) if self.blobs is not None else 0


def _files(records: Mapping[str, Created]) -> frozenset[str]:
    return frozenset(digest for made in records.values() for digest in made.files)
