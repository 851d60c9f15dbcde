"""Transformers as a kind of engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.engines.documents import Documents
from router.engines.hf_card import file_info
from router.engines.kind import Installed, Kind
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


def _installed(system: System) -> Installed:
    """Return the program `transformers`, and whether it can load models in four bits."""
    from router.engines.transformers.program import find_program
    from router.memory.plan import Unusable

    try:
        program = find_program(system.transformers_path)
    except Unusable as error:
        return Installed(problem=str(error))
    bits = "with" if program.has_bitsandbytes else "without"
    return Installed(str(program.path), program.version, f"{program.origin}, {bits} bitsandbytes")


_PRIVATE = frozenset({"/v1/models"})

TRANSFORMERS = Kind(
    backend=_backend,
    described=described,
    documents=Documents(_PRIVATE | {"/health", "/openapi.json"}, _PRIVATE, frozenset({"/load_model", "/reset"})),
    file_format="safetensors",
    file_info=file_info,
    manner=MANNER,
    installed=_installed,
    entries=ENTRIES,
)
