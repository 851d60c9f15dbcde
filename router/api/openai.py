"""`/v1/models`: what can be asked for, with what is known of each model without loading it."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from router import gguf
from router.api.errors import ApiError
from router.config import ModelConfig
from router.dispatcher import Dispatcher
from router.flags import Flags
from router.messages import Refusal
from router.routing import unknown_model

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Every alias, loaded or not."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    models = list(dispatcher.config.models.values())
    cards = await asyncio.to_thread(lambda: [card_of(model) for model in models])
    for card in cards:
        card["status"] = status_of(dispatcher, card["id"])
    return {"object": "list", "data": cards}


@router.get("/v1/models/{alias:path}")
async def show_model(alias: str, request: Request) -> dict[str, Any]:
    """One alias."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    model = known_model(dispatcher, alias)
    card = await asyncio.to_thread(card_of, model)
    return {**card, "status": status_of(dispatcher, alias)}


def known_model(dispatcher: Dispatcher, alias: str) -> ModelConfig:
    """Raises ApiError 404 naming what is there."""
    models = dispatcher.config.models
    if alias not in models:
        raise ApiError(404, Refusal.MODEL_NOT_FOUND.value, unknown_model(alias, list(models)), "model")
    return models[alias]


def status_of(dispatcher: Dispatcher, alias: str) -> str:
    return dispatcher.scheduler.state(alias) if alias in dispatcher.scheduler.models else "off"


def card_of(model: ModelConfig) -> dict[str, Any]:
    """What is known of a model without loading it. Reads its file's header, so it may block."""
    card: dict[str, Any] = {"id": model.alias, "object": "model", "created": 0, "owned_by": "llama-router"}
    card["source"] = model.source
    if model.description:
        card["description"] = model.description
    try:
        stat = model.model_path.stat()
        card["created"] = int(stat.st_mtime)
        header = header_of(model)
        flags = Flags(model.flags)
        capabilities = _capabilities(flags, header)
    except (OSError, gguf.GGUFError):
        return card
    context = flags.integer("ctx-size", 0) or header.context_length
    if context and not flags.kv_unified:
        context //= flags.slots
    return {
        **card,
        "n_ctx": context,
        "context_length": context,
        "size": header.file_bytes,
        "parameters": header.parameter_count,
        "quantization": header.quantization,
        "architecture": header.architecture,
        "capabilities": capabilities,
    }


def _capabilities(flags: Flags, header: gguf.GGUF) -> list[str]:
    """What its engine, started with these flags, can be asked for."""
    if flags.switch("rerank", False):
        return ["rerank"]
    if flags.switch("embedding", False):
        return ["embedding"]
    projector = flags.last("mmproj")
    return list(gguf.capabilities(header, gguf.read(Path(projector.text)) if projector else None))


def header_of(model: ModelConfig) -> gguf.GGUF:
    """Of its file. Raises OSError and GGUFError."""
    stat = model.model_path.stat()
    return _header(model.model_path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1024)
def _header(path: Path, _mtime_ns: int, _size: int) -> gguf.GGUF:
    return gguf.read(path, require_data=False)
