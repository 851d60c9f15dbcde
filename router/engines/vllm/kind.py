"""vLLM, as a kind of engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.engines.documents import Documents
from router.engines.hf_card import file_info
from router.engines.kind import EngineTexts, Installed, Kind
from router.engines.vllm.describe import described
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


def _installed(system: System) -> Installed:
    """Return the program `vllm`, and whether the machine has what its build needs."""
    from router.engines.vllm.program import find_program, lacking
    from router.memory.plan import Unusable

    try:
        program = find_program(system.vllm_path)
    except Unusable as error:
        return Installed(problem=str(error))
    lacks = lacking(program, uses_gpus=system.gpu_devices != ())
    return Installed(str(program.path), program.full_version, program.origin, lacks)


_FOR_DEVELOPERS = (
    *("/sleep", "/wake_up", "/is_sleeping", "/release_kv_cache_memory", "/server_info", "/collective_rpc"),
    *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
    *("/pause", "/resume", "/is_paused", "/abort_requests", "/get_world_size"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/weight_info", "/weight_checker"),
    *("/start_weight_update", "/start_draft_weight_update", "/finish_weight_update"),
    *("/update_weights", "/update_weight_version"),
)
"""Routes with VLLM_SERVER_DEV_MODE, as one that sleeps has it. Its key does not guard them."""
_PRIVATE = frozenset({"/v1/models"})
VLLM = Kind(
    backend=_backend,
    described=described,
    documents=Documents(
        _PRIVATE | {"/health", "/ping", "/version", "/load", "/metrics"}, _PRIVATE, frozenset(_FOR_DEVELOPERS)
    ),
    file_format="safetensors",
    purposes=frozenset({"completion", "embedding", "rerank"}),
    file_info=file_info,
    needs_chat_template=True,
    installed=_installed,
    metrics=EngineTexts(lambda _: True, families),
    entries=ENTRIES,
)
