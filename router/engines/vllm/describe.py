"""What is known of vLLM's models without loading them, from their files and flags. Reads files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from router.config.resolved import ModelConfig
from router.engines.hf_card import card
from router.engines.kind import FileInfo
from router.engines.vllm.flags import Flags
from router.engines.vllm.model import VllmModel
from router.formats import hf_cache, hf_model
from router.formats.hf_model import HfModel

_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


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


def file_info(model: ModelConfig) -> FileInfo:
    """Return the chat template, license and configuration of a model. Raises OSError."""
    folder = hf_cache.held(model.model_path)
    license_text = next((_text(folder / name) for name in _LICENSES if (folder / name).is_file()), "")
    return FileInfo(template=template_of(folder), license=license_text, metadata=_config(folder))


def template_of(folder: Path) -> str:
    """Return the chat template in a folder; empty if there is none. Raises OSError."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _text(file)
    template = _object(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else ""


def _config(folder: Path) -> dict[str, Any]:
    return _object(folder / "config.json")


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(file))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(file: Path) -> str:
    return file.read_text("utf-8", "replace")
