"""Description of a GGUF model without loading it, by its file's header and its flags. Reads files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from router.config.resolved import ModelConfig
from router.engines.kind import FileInfo
from router.engines.llamacpp.flags import Flags, as_started
from router.engines.llamacpp.footprint import slot_context
from router.engines.llamacpp.model import LlamaCppModel
from router.formats import gguf


def described(model: ModelConfig) -> dict[str, Any]:
    """Return what lists show of a model. Raises OSError, GGUFError and FlagError."""
    assert isinstance(model, LlamaCppModel)
    header = header_of(model)
    flags = as_started(model.flags, model.env)
    context = slot_context(header, flags, is_sized=model.footprint_mb is not None) or None
    return {
        "n_ctx": context,
        "context_length": context,
        "size": header.file_bytes,
        "parameters": header.parameter_count,
        "quantization": header.quantization,
        "family": header.architecture,
        "capabilities": _capabilities(header, flags),
        "meta": _meta(header, context),
    }


def _meta(header: gguf.GGUF, context: int | None) -> dict[str, Any]:
    """Return the `meta` that llama-server reports for a loaded model."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    told = {
        "n_ctx": context,
        "n_ctx_train": header.context_length,
        "n_embd": header.embedding_length,
        "n_params": header.parameter_count,
        "n_vocab": tokens.length if isinstance(tokens, gguf.ArrayStub) else None,
        "size": header.file_bytes,
        "ftype": header.quantization,
    }
    return {key: value for key, value in told.items() if value is not None}


def _capabilities(header: gguf.GGUF, flags: Flags) -> list[str]:
    """Return what an engine with these flags can do; clients offer features accordingly."""
    if flags.switch("rerank", False):
        return ["rerank"]
    if flags.switch("embedding", False):
        return ["embedding"]
    projector = flags.last("mmproj")
    found = ["completion", *(gguf.senses(gguf.read(Path(projector.text))) if projector else ())]
    template = _template(header, flags)
    if "tools" in template:
        found.append("tools")
    if any(word in template for word in ("enable_thinking", "<think>", "reasoning_effort")):
        found.append("thinking")
    if any(
        key in header.metadata for key in ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id")
    ):
        found.append("insert")
    return found


def template_of(model: ModelConfig) -> str:
    """Return the chat template that its engine uses; empty if none. Raises OSError and GGUFError."""
    return _template(header_of(model), as_started(model.flags, model.env))


def file_info(model: ModelConfig) -> FileInfo:
    """Return what the model's file and its projector contain. Raises OSError, GGUFError and FlagError."""
    header, flags = header_of(model), as_started(model.flags, model.env)
    projector = flags.last("mmproj")
    return FileInfo(
        template=_template(header, flags),
        license=str(header.metadata.get("general.license", "")),
        metadata=_metadata(header),
        projector=_metadata(gguf.read(Path(projector.text))) if projector is not None else None,
    )


def _metadata(header: gguf.GGUF) -> dict[str, Any]:
    """Return the metadata of a file without long arrays and without its chat template."""
    shown = {
        key: None if isinstance(value, gguf.ArrayStub | tuple) else value
        for key, value in header.metadata.items()
        if key != "tokenizer.chat_template" and not (isinstance(value, float) and not math.isfinite(value))
    }
    return {**shown, "general.parameter_count": header.parameter_count}


def _template(header: gguf.GGUF, flags: Flags) -> str:
    file, text = flags.last("chat-template-file"), flags.last("chat-template")
    if file is not None and (text is None or flags.given.index(file) > flags.given.index(text)):
        return Path(file.text).read_text()
    if text is not None:
        return text.text
    template = header.metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else ""


def header_of(model: ModelConfig) -> gguf.GGUF:
    """Return the header of its file. Raises OSError and GGUFError."""
    return gguf.read(model.model_path, require_data=False)
