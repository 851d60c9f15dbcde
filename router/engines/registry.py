"""The kinds of engine. A new kind is a package beside this module, a line in `KINDS`, and a section in the union
`Entry` of `config/schema.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.config.resolved import DEFAULT_ENGINE, ModelConfig
from router.config.schema import OF_HF_MODELS
from router.engines.command.kind import COMMAND
from router.engines.kind import Kind
from router.engines.llamacpp.kind import LLAMACPP
from router.engines.transformers.kind import TRANSFORMERS
from router.engines.vllm.kind import VLLM

KINDS: Mapping[str, Kind] = {
    "llamacpp": LLAMACPP,
    "command": COMMAND,
    "vllm": VLLM,
    "transformers": TRANSFORMERS,
}
"""Kinds by the value of `engine` in entries."""


def kind_of(model: ModelConfig) -> Kind:
    """Return the kind of a model's engine."""
    return KINDS[model.engine]


def kind_of_entry(entry: Mapping[str, Any]) -> Kind:
    """Return the kind that an entry of the configuration names; the default one if it names none that exists."""
    named = entry.get("engine")
    return KINDS.get(named if isinstance(named, str) else "", KINDS[DEFAULT_ENGINE])


def is_for_hf_model(entry: Mapping[str, Any]) -> bool:
    """Whether an entry that names no kind of engine has keys of models in Hugging Face's format."""
    named = entry.get("model_path")
    is_gguf = isinstance(named, str) and named.lower().endswith(".gguf")
    return entry.get("engine", "auto") == "auto" and not is_gguf and not OF_HF_MODELS.isdisjoint(entry)


def is_for_gguf(entry: Mapping[str, Any]) -> bool:
    """Whether an entry can be for a GGUF file that is found under its name."""
    return kind_of_entry(entry).entries is None and not is_for_hf_model(entry)
