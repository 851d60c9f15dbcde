"""Any server by its command line, as a kind of engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.engines.command.describe import described
from router.engines.command.entry import ENTRIES
from router.engines.documents import OF_LLAMA_SERVER
from router.engines.kind import Installed, Kind

if TYPE_CHECKING:
    from router.config.schema import System
    from router.engines.base import EngineBackend
    from router.engines.launcher import LocalLauncher
    from router.memory.measurements import Learned


def _backend(system: System, launcher: LocalLauncher, learned: Learned) -> EngineBackend:
    """Return the backend."""
    from router.engines.command.backend import Command

    return Command(launcher, learned)


COMMAND = Kind(
    installed=lambda _: Installed("any", origin="as `cmd` or `container` of an entry says"),
    backend=_backend,
    described=described,
    documents=OF_LLAMA_SERVER,  # many commands start one, or a server with its routes
    entries=ENTRIES,
)
