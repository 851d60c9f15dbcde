"""`/v1/models`: what can be asked for, with what is known of each model without loading it."""

from __future__ import annotations

import asyncio
import contextlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from router import gguf
from router.config import AliasConfig, ModelConfig
from router.dispatcher import Dispatcher
from router.flags import Flags
from router.readings import apart
from router.routing import model_of

_LOOK_SEC = 2.0

router = APIRouter(tags=["models"])


@router.get("/v1/models")
@router.get("/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Every alias, loaded or not."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    config = dispatcher.config
    cards = await _cards_of(list(config.models.values()))
    for alias, card in cards.items():
        card["status"] = status_of(dispatcher, alias)
    named = {name: _named(cards[alias.uses], alias) for name, alias in config.aliases.items()}
    return {"object": "list", "data": list({**cards, **named}.values())}


@router.get("/v1/models/{alias:path}")
async def show_model(alias: str, request: Request) -> dict[str, Any]:
    """One alias."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    config = dispatcher.config
    model = model_of(alias, config)
    card = await apart(lambda: card_of(model))
    card["status"] = status_of(dispatcher, model.alias)
    return _named(card, config.aliases[alias]) if alias in config.aliases else card


async def _cards_of(models: list[ModelConfig]) -> dict[str, dict[str, Any]]:
    """By alias; with what is configured only, where a disk does not tell more in time."""
    cards = {model.alias: _configured(model) for model in models}

    def look() -> None:
        for model in models:
            cards[model.alias] = card_of(model)

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(apart(look), _LOOK_SEC)
    return dict(cards)


def status_of(dispatcher: Dispatcher, alias: str) -> str:
    return dispatcher.scheduler.state(alias) if alias in dispatcher.scheduler.models else "off"


def _named(card: dict[str, Any], alias: AliasConfig) -> dict[str, Any]:
    """A model's card under another name."""
    described = {"description": alias.description} if alias.description else {}
    further = {"uses": alias.uses} if alias.uses != alias.alias else {}
    return {**card, "id": alias.alias, "source": alias.source, **further, **described}


def card_of(model: ModelConfig) -> dict[str, Any]:
    """What is known of a model without loading it. Reads its file's header, so it may block."""
    card = _configured(model)
    try:
        stat = model.model_path.stat()
        card["created"] = int(stat.st_mtime)
        header = header_of(model)
        flags = Flags(model.flags)
        capabilities = _capabilities(flags, header)
    except (OSError, gguf.GGUFError):
        return card
    given = flags.integer("ctx-size", 0)
    context = given or header.context_length
    # Without a size in its flags, each slot gets all that the model was trained for, as far as memory allows.
    if context and not flags.kv_unified and (given or model.footprint_mb is not None):
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


def _configured(model: ModelConfig) -> dict[str, Any]:
    card: dict[str, Any] = {"id": model.alias, "object": "model", "created": 0, "owned_by": "llama-router"}
    card["source"] = model.source
    if model.description:
        card["description"] = model.description
    return card


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
