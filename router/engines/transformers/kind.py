"""Transformers as a kind of engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.engines.documents import Documents
from router.engines.kind import Kind
from router.engines.transformers.describe import described
from router.engines.transformers.entry import ENTRIES
from router.engines.transformers.questions import MANNER

if TYPE_CHECKING:
    from router.config.schema import System
    from router.engines.base import EngineBackend
    from router.engines.launcher import LocalLauncher
    from router.memory.measurements import Learned


def _backend(system: System, launcher: LocalLauncher, learned: Learned) -> EngineBackend:
    """Return the backend."""
    from router.engines.transformers.backend import Transformers

    return Transformers(system, launcher, learned)


def _can_run(system: System) -> bool:
    """Return whether `transformers` is installed."""
    from router.engines.transformers.program import is_installed

    return is_installed(system.transformers_path)


_PRIVATE = frozenset({"/v1/models"})

TRANSFORMERS = Kind(
    backend=_backend,
    described=described,
    documents=Documents(_PRIVATE | {"/health", "/openapi.json"}, _PRIVATE, frozenset({"/load_model", "/reset"})),
    file_format="safetensors",
    manner=MANNER,
    can_run=_can_run,
    entries=ENTRIES,
)
