"""What is shown of a model in safetensors. The kinds of engine that load such models share it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from router.config.resolved import ModelConfig
from router.engines.kind import FileInfo
from router.formats import hf_cache, hf_model
from router.formats.hf_model import HfModel, Unreadable

_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def card(files: HfModel, context: int | None, capabilities: Sequence[str]) -> dict[str, Any]:
    """Return the card of a model that an engine serves with a context of so many tokens."""
    meta = {
        "n_ctx": context,
        "n_ctx_train": files.context,
        "n_embd": files.width,
        "n_params": files.parameters,
        "size": files.weight_bytes,
    }
    return {
        "n_ctx": context,
        "context_length": context,
        "size": files.weight_bytes,
        "parameters": files.parameters,
        "quantization": files.quantization or files.dtype,
        "family": files.model_type,
        "capabilities": list(capabilities),
        "meta": {key: value for key, value in meta.items() if value is not None},
    }


def file_info(model: ModelConfig) -> FileInfo:
    """Return the chat template, license and configuration of a model. Raises OSError."""
    folder = hf_cache.held(model.model_path)
    license_text = next((_text(folder / name) for name in _LICENSES if (folder / name).is_file()), "")
    config = _object(folder / "config.json")
    metadata = {"general.architecture": config.get("model_type"), **_as_in_gguf(folder), **config}
    return FileInfo(template=_template(folder), license=license_text, metadata=metadata)


def _as_in_gguf(folder: Path) -> dict[str, Any]:
    """Return figures by their names in GGUF files, by which clients of Ollama look; empty if they are unknown.

    Each kind of model has other names for them in its `config.json`.
    """
    try:
        found = hf_model.read(folder)
    except (OSError, Unreadable):
        return {}
    figures = {"context_length": found.context, "embedding_length": found.width, "block_count": found.layers}
    return {f"{found.model_type}.{name}": figure for name, figure in figures.items() if figure is not None}


def _template(folder: Path) -> str:
    """Return the chat template in a folder; empty if there is none. Raises OSError."""
    plain, in_json = (folder / name for name in hf_model.TEMPLATES)
    if plain.is_file():
        return _text(plain)
    template = _object(in_json if in_json.is_file() else folder / hf_model.TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):  # several, with names
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(file))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(file: Path) -> str:
    return file.read_text("utf-8", "replace")
