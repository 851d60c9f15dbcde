"""vLLM, as a kind of engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.engines.documents import Documents
from router.engines.kind import EngineTexts, Kind
from router.engines.vllm.describe import described, file_info
from router.engines.vllm.entry import ENTRIES
from router.engines.vllm.metrics import families

if TYPE_CHECKING:
    from router.config.schema import System
    from router.engines.base import EngineBackend
    from router.engines.launcher import LocalLauncher
    from router.memory.measurements import Learned


def _backend(system: System, launcher: LocalLauncher, learned: Learned) -> EngineBackend:
    """Return the backend."""
    from router.engines.vllm.backend import Vllm

    return Vllm(system.vllm_path, launcher, learned)


def _can_run(system: System) -> bool:
    """Return whether `vllm` is installed, and the machine has what its build needs."""
    from router.engines.vllm.program import is_for_here

    return is_for_here(system.vllm_path, uses_gpus=system.gpu_devices != ())


_PRIVATE = frozenset({"/v1/models", "/server_info"})
VLLM = Kind(
    backend=_backend,
    described=described,
    documents=Documents(_PRIVATE | {"/health", "/ping", "/version", "/load", "/metrics"}, _PRIVATE),
    file_format="safetensors",
    file_info=file_info,
    needs_chat_template=True,
    can_run=_can_run,
    metrics=EngineTexts(lambda _: True, families),
    entries=ENTRIES,
)
