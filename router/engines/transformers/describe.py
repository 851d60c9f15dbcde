"""Description of a model in safetensors without loading it. Reads files."""

from __future__ import annotations

from typing import Any

from router.config.resolved import ModelConfig
from router.engines.hf_card import card
from router.engines.transformers.model import TransformersModel
from router.formats import hf_model


def described(model: ModelConfig) -> dict[str, Any]:
    """Return what lists show of a model. Raises OSError and Unreadable."""
    assert isinstance(model, TransformersModel)
    files = hf_model.read(model.model_path)
    context = model.longest
    capabilities = ["completion", *(["vision"] if model.takes_media else [])]
    if files.has_chat_template and "tools" in _template(files):
        capabilities.append("tools")
    return card(files, context, capabilities)


def _template(files: hf_model.HfModel) -> str:
    """Return the text in which the chat template is."""
    names = (*hf_model.TEMPLATES, hf_model.TOKENIZER_CONFIG)
    found = (files.folder / name for name in names)
    return next((file.read_text("utf-8", "replace") for file in found if file.is_file()), "")
