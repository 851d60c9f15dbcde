"""Memory that a model takes in Transformers, and the flags that make it run so.

Figures measured with transformers 5.24.0 and torch 2.13.0 on CPU; those of GPUs are estimates until an engine has
answered there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from router.config.schema import System
from router.engines.hf_entry import usable
from router.engines.hf_plan import Cache, Demand, HfPlan, caches
from router.engines.transformers.model import TransformersModel
from router.engines.transformers.program import Program
from router.formats import hf_model
from router.formats.hf_model import DTYPE_BITS, HfModel
from router.memory.measurements import Identity, Learned, files_of
from router.memory.plan import Ground, Inspection, Site, Unusable

_MIB = 1 << 20
_PLANNED_TOKENS = 8192
"""Of the cache where `context` is not set: it grows with the conversation, and few get longer."""
_WITHOUT_GPUS_MIB = 410
_WORK_WITHOUT_GPUS = 15
"""Numbers of working memory per token of a prompt, which is computed at once, for each number that represents a
token between layers."""
_BESIDE_GPUS_MIB = 1500
_ON_EACH_GPU_MIB = 700
_START_SEC = 10.0
_Q4_BYTES = 0.6
"""Per parameter: four bits for most, with their scales, and embeddings in 16 bits."""
_MOST_GPUS = 8


def inspect(
    model: TransformersModel, program: Program, system: System, ground: Ground, learned: Learned
) -> Inspection:
    """Return the alternatives of a model on this machine. Raises Unusable."""
    files = opened(model)
    return _Places(model, files, program, system, ground, learned).inspection()


def opened(model: TransformersModel) -> HfModel:
    """Return what the model's files say. Raises Unusable."""
    files = usable(model.model_path)
    if not files.writes_text:
        reason = f"{files.architecture} writes no text, and Transformers serves no other models here"
        raise Unusable(f"{model.model_path}: {reason}", reason)
    return files


def precision(model: TransformersModel, files: HfModel, program: Program, system: System, *, gpus: int) -> str:
    """Return the value of `quantize` that applies on this number of GPUs. Raises Unusable for one that cannot."""
    wanted = model.quantize
    lacks = "" if gpus else "a GPU"
    if not program.has_bitsandbytes:
        lacks = "bitsandbytes (pip install bitsandbytes)" + (f" and {lacks}" if lacks else "")
    if wanted == "q4" and lacks:
        reason = f"quantize: q4 needs {lacks}"
        raise Unusable(reason, reason)
    if wanted != "auto":
        return wanted
    is_large = files.quantization is None and files.weight_bytes > system.q4_threshold_bytes
    return "q4" if is_large and not lacks else "no"


def demand_of(files: HfModel, context: int, precision: str = "no", *, gpus: int) -> Demand:
    """Return the memory that a model takes with one request of `context` tokens, on up to so many GPUs."""
    dtype = {"fp16": "float16", "fp32": "float32"}.get(precision)
    bytes_each = {"fp16": 2.0, "fp32": 4.0, "q4": _Q4_BYTES}.get(precision)
    weights = files.weight_bytes if bytes_each is None else files.parameters * bytes_each
    work_bytes = _WORK_WITHOUT_GPUS * (files.width or 0) * DTYPE_BITS.get(dtype or files.dtype, 16) / 8
    return Demand(
        weights=weights / _MIB,
        kv=lambda tokens: (files.kv_bytes(tokens, dtype) or 0) / _MIB,
        caches=caches(context, 1, may_shorten=False),
        on_each_gpu=_ON_EACH_GPU_MIB,
        beside_gpus=_BESIDE_GPUS_MIB,
        without_gpus=_WITHOUT_GPUS_MIB,
        gpu_counts=range(1, min(gpus, _MOST_GPUS) + 1),
        start_sec=_START_SEC,
        work=lambda tokens: tokens * work_bytes / _MIB,
    )


class _Places(HfPlan):
    """Alternatives of one model."""

    def __init__(
        self,
        model: TransformersModel,
        files: HfModel,
        program: Program,
        system: System,
        ground: Ground,
        learned: Learned,
    ) -> None:
        """Raises Unusable."""
        self._model = model
        self._files = files_of(files.folder / hf_model.CONFIG, *files.files)
        self._build = f"transformers {program.version}"
        self._precision = precision(model, files, program, system, gpus=len(ground.gpus))
        context = model.context or min(files.context or _PLANNED_TOKENS, _PLANNED_TOKENS)
        demand = demand_of(files, context, self._precision, gpus=len(ground.gpus))
        super().__init__(demand, ground, learned)

    def identity(self, gpus: int, cache: Cache) -> Identity:
        return Identity(self._files, self._build, (*self._model.flags, *self._of_precision()), gpus)

    def flags(self, sites: Sequence[Site], cache: Cache, mib: int) -> tuple[str, ...]:
        if not sites:
            device = "auto" if sys.platform == "darwin" else "cpu"  # Apple's GPU computes in RAM
        else:
            device = "cuda:0" if len(sites) == 1 else "auto"
        return ("--device", device, *self._of_precision())

    def _of_precision(self) -> tuple[str, ...]:
        if self._precision == "q4":
            return ("--dtype", "auto", "--quantization", "bnb-4bit")
        return ("--dtype", {"fp16": "float16", "fp32": "float32"}.get(self._precision, "auto"))
