"""What is shown of a model in safetensors. The kinds of engine that load such models share it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from router.config.resolved import ModelConfig
from router.engines.kind import FileInfo
from router.formats import hf_cache
from router.formats.hf_model import HfModel

_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_NAMES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
}
"""Names in the metadata of GGUF files, by which clients of Ollama look, and in `config.json`."""


def card(files: HfModel, context: int | None, capabilities: Sequence[str]) -> dict[str, Any]:
    """Return the card of a model that an engine serves with a context of so many tokens."""
    meta = {
        "n_ctx": context,
        "n_ctx_train": files.context,
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
    kind = config.get("model_type")
    named = {f"{kind}.{name}": config[key] for name, key in _NAMES.items() if key in config}
    metadata = {"general.architecture": kind, **named, **config}
    return FileInfo(template=_template(folder), license=license_text, metadata=metadata)


def _template(folder: Path) -> str:
    """Return the chat template in a folder; empty if there is none. Raises OSError."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _text(file)
    template = _object(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else ""


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(file))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(file: Path) -> str:
    return file.read_text("utf-8", "replace")
