"""Ollama's API but for the four calls that engines answer (`ollama_exchange`): lists, states, pulls.

What only Ollama has (making models out of others, pushing them) is refused in its words, with what to do instead.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from router.api import pulls
from router.api.errors import ApiError
from router.api.openai import card_of, header_of
from router.config import ModelConfig
from router.devices import HOST
from router.dispatcher import Dispatcher
from router.downloads import Pull
from router.gguf import GGUF, ArrayStub, GGUFError
from router.ollama_requests import alias_of, listed_name
from router.progress import Progress
from router.routing import model_of

router = APIRouter(tags=["Ollama"])

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["model"], "properties": {"model": {"type": "string"}}}
            }
        },
    }
}

API_VERSION = "0.32.1"
"""Of Ollama's API that this is. Clients compare it with what they need, number by number."""

_FOR_EVER = timedelta(days=365 * 200)
"""With Ollama, too, a model that stays expires centuries from now."""


class _Named(msgspec.Struct):
    model: str | None = None
    name: str | None = None
    """Older name of `model`."""
    stream: bool | None = None


@router.get("/api/version")
async def version() -> dict[str, str]:
    """The version of Ollama's API."""
    return {"version": API_VERSION}


@router.get("/api/tags")
async def tags(request: Request) -> dict[str, Any]:
    """Every alias, loaded or not."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    return {"models": await _listed([_known(name, dispatcher) for name in dispatcher.config.names])}


@router.get("/api/ps")
async def running(request: Request) -> dict[str, Any]:
    """The models that are loaded; the one that stays longest comes first."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    state = dispatcher.scheduler.state
    models = dispatcher.config.models
    loaded = [model for alias, model in models.items() if state(alias) in ("ready", "draining")]
    states = [_residency(dispatcher, model.alias) for model in loaded]
    entries = [{**entry, **state} for entry, state in zip(await _listed(loaded), states, strict=True)]
    return {"models": sorted(entries, key=lambda entry: str(entry["expires_at"]), reverse=True)}


@router.post("/api/show", openapi_extra=_BODY, responses={415: {}, 500: {}})
async def show(request: Request) -> dict[str, Any]:
    """One model: what its file says of it."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    asked = await _named(request)
    model = _known(asked.model or "", dispatcher)
    try:
        return await asyncio.to_thread(_described, model)
    except (OSError, GGUFError) as error:
        raise ApiError(500, "model_failed", f"{model.alias!r} cannot be read: {error}") from None


@router.post("/api/pull", response_model=None, openapi_extra=_BODY, responses={415: {}, 429: {}, 500: {}})
async def pull(request: Request) -> Response:
    """Pull a model from the Hugging Face hub, or join the pull that does so already."""
    asked = await _named(request)
    wanted = pulls.begin(request, asked.model or "", None)
    if asked.stream is not False:
        return StreamingResponse(_lines(wanted), media_type="application/x-ndjson")
    async for _ in wanted.follow():
        pass
    if wanted.progress.status != "success":
        raise ApiError(500, "pull_failed", _problem(wanted.progress))
    return JSONResponse({"status": "success"})


@router.delete("/api/delete", response_model=None, openapi_extra=_BODY, responses={404: {}, 415: {}, 500: {}})
async def delete(request: Request) -> Response:
    """Remove a pulled model and the files that are only its own."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    asked = await _named(request)
    await pulls.remove_pulled(alias_of(asked.model or "", dispatcher.config.models), request)
    return Response()


@router.post("/api/copy", responses={501: {}})
@router.post("/api/create", responses={501: {}})
@router.post("/api/push", responses={501: {}})
async def not_here() -> None:
    """What Ollama does in a store of its own. Always an error, which says what to do instead."""
    message = "not supported here: models and their names are in the router's configuration (`models`), with the "
    message += "file (`model_path`) and llama-server's arguments (`flags`), and are read again while it runs"
    raise ApiError(501, "not_supported", message)


@router.post("/api/blobs/{digest}", responses={501: {}})
async def no_blob(digest: str) -> None:
    """The first step of making a model out of a file."""
    await not_here()


async def _named(request: Request) -> _Named:
    """The body, of whatever type it says to be: `curl -d` sends a form. Raises ApiError 400."""
    content_type = request.headers.get("content-type", "")
    if "origin" in request.headers and not content_type.startswith("application/json"):
        # Pages of any site may send forms and texts here without asking first.
        raise ApiError(415, "unsupported_type", "From a browser, send Content-Type: application/json.")
    try:
        asked = msgspec.json.decode(await request.body(), type=_Named)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"invalid request: {error}") from None
    asked.model = asked.model or asked.name
    if not asked.model:
        raise ApiError(400, "model_required", "model is required", "model")
    return asked


# --- models ---------------------------------------------------------------------------------------------


def _known(name: str, dispatcher: Dispatcher) -> ModelConfig:
    """A model under the name that it is asked for by. Raises ApiError 404."""
    alias = alias_of(name, dispatcher.config.names)
    return replace(model_of(alias, dispatcher.config), alias=alias)


async def _listed(models: list[ModelConfig]) -> list[dict[str, Any]]:
    return await asyncio.to_thread(lambda: [_entry(model) for model in models])


def _entry(model: ModelConfig) -> dict[str, Any]:
    card = card_of(model)
    name = listed_name(model.alias)
    return {
        "name": name,
        "model": name,
        "modified_at": _moment(card["created"]),
        "size": card.get("size", 0),
        "digest": hashlib.sha256(f"{model.model_path} {card['created']}".encode()).hexdigest(),
        "details": _details(card),
        "capabilities": card.get("capabilities", []),
        "context_length": card.get("context_length"),
    }


def _details(card: dict[str, Any]) -> dict[str, Any]:
    family = card.get("architecture") or ""
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _short(card.get("parameters", 0)),
        "quantization_level": card.get("quantization") or "unknown",
    }


def _residency(dispatcher: Dispatcher, alias: str) -> dict[str, Any]:
    engine = dispatcher.scheduler.models[alias].engine
    account = dispatcher.ledger.accounts.get(engine.id) if engine is not None else None
    booked = account.booked() if account is not None else {}
    unload_at_sec = dispatcher.scheduler.unload_at_sec(alias)
    left = _FOR_EVER if unload_at_sec is None else timedelta(seconds=unload_at_sec - time.monotonic())
    return {
        "size": sum(booked.values()) << 20,
        "size_vram": sum(mib for name, mib in booked.items() if name != HOST) << 20,
        "expires_at": (datetime.now(timezone.utc) + left).isoformat(),
    }


def _described(model: ModelConfig) -> dict[str, Any]:
    header = header_of(model)
    card = card_of(model)
    template = header.metadata.get("tokenizer.chat_template")
    context = card.get("context_length")
    return {
        "modelfile": f"# Served by llama-router; see `models` in its configuration.\nFROM {model.alias}\n",
        "parameters": f"num_ctx {context}" if context else "",
        "template": template if isinstance(template, str) else "",
        "license": str(header.metadata.get("general.license", "")),
        "modified_at": _moment(card["created"]),
        "details": _details(card),
        "model_info": _metadata(header),
        "capabilities": _capabilities(header, list(card.get("capabilities", []))),
    }


def _metadata(header: GGUF) -> dict[str, Any]:
    """Without long arrays, of which Ollama, too, shows nothing."""
    shown = {
        key: None if isinstance(value, ArrayStub | tuple) else value
        for key, value in header.metadata.items()
        if key != "tokenizer.chat_template" and not (isinstance(value, float) and not math.isfinite(value))
    }
    return {**shown, "general.parameter_count": header.parameter_count}


def _capabilities(header: GGUF, capabilities: list[str]) -> list[str]:
    """With those that show in a chat template, as clients choose by them what to offer."""
    template = header.metadata.get("tokenizer.chat_template")
    if "completion" in capabilities and isinstance(template, str):
        if "tools" in template:
            capabilities.append("tools")
        if any(word in template for word in ("enable_thinking", "<think>", "reasoning_effort")):
            capabilities.append("thinking")
    if any(
        key in header.metadata for key in ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id")
    ):
        capabilities.append("insert")
    return capabilities


def _short(count: int) -> str:
    """`8.0B`, `135M`"""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}" if letter == "B" else f"{count / size:.0f}{letter}"
    return str(count)


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).isoformat()


# --- pulls ----------------------------------------------------------------------------------------------


async def _lines(wanted: Pull) -> AsyncIterator[bytes]:
    """Its progress in Ollama's words. A pull goes on when its client leaves, as others may wait for it."""
    yield _line(status="pulling manifest")
    async for progress in wanted.follow():
        for file in progress.files:
            if progress.status == "downloading":
                yield _line(
                    status=f"pulling {file.path}",
                    digest=file.path,
                    total=file.total_bytes,
                    completed=file.completed_bytes,
                )
    if wanted.progress.status == "success":
        yield _line(status="verifying sha256 digest")
        yield _line(status="writing manifest")
        yield _line(status="success")
    else:
        yield _line(error=_problem(wanted.progress))


def _problem(progress: Progress) -> str:
    return progress.error.message if progress.error is not None else f"the pull was {progress.status}"


def _line(**fields: Any) -> bytes:
    return msgspec.json.encode(fields) + b"\n"
