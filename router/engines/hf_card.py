"""What lists show of a model in safetensors. The kinds of engine that load such models share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router.formats.hf_model import HfModel


def card(files: HfModel, context: int | None, capabilities: Sequence[str]) -> dict[str, Any]:
    """Return the card of a model that an engine serves with a context of so many tokens."""
    return {
        "n_ctx": context,
        "context_length": context,
        "size": files.weight_bytes,
        "parameters": files.parameters,
        "quantization": files.quantization or files.dtype,
        "family": files.model_type,
        "capabilities": list(capabilities),
    }
