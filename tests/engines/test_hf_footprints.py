"""What the formulas say of models in safetensors, beside what engines took (`benchmarks/hf_footprints.py`).

MiB of the processes of vLLM 0.32 and Transformers 5.24, with all of the libraries' pages, after prompts of some
thousand tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_models import LLAMA, MIDDLE_LLAMA, MIDDLE_QWEN, SMALLER_QWEN, tensors_of, write_model

from router.config.schema import System
from router.engines.transformers import plan as of_transformers
from router.engines.transformers.model import TransformersModel
from router.engines.transformers.program import Program as TransformersProgram
from router.engines.vllm.model import VllmModel
from router.engines.vllm.plan import VllmPlan
from router.engines.vllm.program import Program as VllmProgram
from router.formats import hf_model
from router.memory.measurements import Learned
from router.memory.plan import Ground, Site
from router.system.devices import HOST

GROUND = Ground((), Site(HOST, 20000, 20000, total_mib=24000))
EAGER = ("--enforce-eager",)
TINY: Mapping[str, Any] = {**LLAMA, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
FOR_VLLM = {**TINY, "max_position_embeddings": 8192}
FOR_TRANSFORMERS = {**TINY, "max_position_embeddings": 512, "torch_dtype": "float32"}
VLLM: Sequence[tuple[Mapping[str, Any], Sequence[str], int, int]] = (
    (FOR_VLLM, EAGER, 8, 1481),
    (FOR_VLLM, (), 8, 1526),
    (MIDDLE_LLAMA, EAGER, 2, 2456),
    (MIDDLE_LLAMA, (), 2, 2393),
    (MIDDLE_QWEN, EAGER, 2, 3034),
    (MIDDLE_QWEN, (), 2, 3077),
    (SMALLER_QWEN, ("--dtype", "float32"), 2, 3129),
)
"""Configuration, flags, slots, MiB."""
TRANSFORMERS: Sequence[tuple[Mapping[str, Any], int]] = (
    (FOR_TRANSFORMERS, 410),
    (MIDDLE_LLAMA, 1120),
    (SMALLER_QWEN, 1819),
    (MIDDLE_QWEN, 1599),
)
"""Configuration, MiB."""


def by_vllm(folder: Path, flags: Sequence[str], slots: int) -> int:
    build = VllmProgram(Path("/bin/vllm"), "on PATH", "0.32.0", "cpu")
    model = VllmModel(alias="m", model_path=folder, flags=tuple(flags), slots=slots)
    found = VllmPlan(model, hf_model.read(folder), build, GROUND, Learned()).inspection()
    return found.alternatives[0].placement[HOST]


def by_transformers(folder: Path) -> int:
    model = TransformersModel(alias="m", model_path=folder)
    program = TransformersProgram(folder / "bin/transformers", "on PATH")
    found = of_transformers.inspect(model, program, System(), GROUND, Learned())
    return found.alternatives[0].placement[HOST]


def test_vllm_takes_what_the_formula_says(tmp_path: Path) -> None:
    errors = []
    for number, (config, flags, slots, held) in enumerate(VLLM):
        folder = write_model(tmp_path / str(number), config, tensors_of(config))
        errors.append(abs(by_vllm(folder, flags, slots) / held - 1))
    assert max(errors) <= 0.05, errors
    assert statistics.median(errors) <= 0.02


def test_transformers_takes_what_the_formula_says(tmp_path: Path) -> None:
    errors = []
    for number, (config, held) in enumerate(TRANSFORMERS):
        folder = write_model(tmp_path / str(number), config, tensors_of(config))
        errors.append(abs(by_transformers(folder) / held - 1))
    assert max(errors) <= 0.07, errors
    assert statistics.median(errors) <= 0.02
