"""What lists show of vLLM's models without loading them, from their files and flags. Reads files."""

from __future__ import annotations

from typing import Any

from router.config.resolved import ModelConfig
from router.engines.hf_card import card
from router.engines.vllm.flags import Flags
from router.engines.vllm.model import VllmModel
from router.formats import hf_cache, hf_model
from router.formats.hf_model import HfModel


def described(model: ModelConfig) -> dict[str, Any]:
    """Return the card of a model. Raises Unreadable and OSError."""
    assert isinstance(model, VllmModel)
    found = hf_model.read(hf_cache.held(model.model_path))
    context = model.context or Flags(model.flags).size("max-model-len") or found.context
    return card(found, context, _capabilities(model, found))


def _capabilities(model: VllmModel, found: HfModel) -> list[str]:
    routes, flags = model.routes or (), Flags(model.flags)
    if "/v1/rerank" in routes:
        return ["rerank"]
    if "/v1/embeddings" in routes:
        return ["embedding"]
    capabilities = ["completion"]
    if found.takes_images:
        capabilities.append("vision")
    if "/v1/audio/transcriptions" in routes:
        capabilities.append("transcription")
    if "enable-auto-tool-choice" in flags:
        capabilities.append("tools")
    if "reasoning-parser" in flags:
        capabilities.append("thinking")
    return capabilities
