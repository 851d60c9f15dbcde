"""Endpoints for clients of llama-server's own router mode: its web page, and Open WebUI's llama.cpp provider.

They list models at `/v1/models` and `/models`; their events, `/models/sse`, are in `live`, documents of engines in
`engines`. Formats are those of build 10434.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request

from router.api.models import to_load
from router.api.openai import all_cards
from router.catalog.lookup import model_of
from router.config.resolved import DEFAULT_ENGINE
from router.http.documents import NAMES_A_MODEL, Document, read_body
from router.http.errors import ApiError
from router.http.pages import Page, Right, needs
from router.runtime.dispatcher import Dispatcher
from router.scheduling.messages import ModelState
from router.system.turns import in_turns

router = APIRouter(tags=["llama-server"], route_class=Page)


class _Named(msgspec.Struct):
    model: str


@router.get("/models")
@needs(Right.USE)
async def list_with_engines(request: Request) -> Document:
    """List of `/v1/models`, and `models` in the format of an earlier host. `load_duration` is in nanoseconds."""
    cards = await all_cards(request)
    earlier = [_as_an_earlier_host(card, request) async for card in in_turns(cards)]
    return Document({"object": "list", "data": cards, "models": earlier})


def _as_an_earlier_host(card: dict[str, Any], request: Request) -> dict[str, Any]:
    dispatcher: Dispatcher = request.app.state.dispatcher
    model = dispatcher.scheduler.models.get(card.get("uses", card["id"]))
    engine = model.front if model is not None else None
    kind = dispatcher.config.model_of(card["id"]).engine
    took_sec = (
        engine.ready_sec - engine.started_sec if engine is not None and engine.ready_sec is not None else None
    )
    return {
        "model": card["id"],
        "description": card.get("description"),
        "loaded": card["status"]["value"] == "loaded",
        "backend": "llama.cpp" if kind == DEFAULT_ENGINE else kind,
        "size_bytes": card.get("size"),
        "load_duration": round(took_sec * 1e9) if took_sec is not None else None,
    }


@router.post("/models/load", openapi_extra=NAMES_A_MODEL)
@needs(Right.MANAGE)
async def load(request: Request) -> dict[str, bool]:
    """Load a model; responds without waiting for it."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    alias = to_load((await read_body(request, _Named)).model, dispatcher)
    if dispatcher.scheduler.state(alias) in (ModelState.LOADING, ModelState.READY):
        raise ApiError(400, "invalid_request", "model is already running", "model")
    dispatcher.ask_to_load(alias)
    return {"success": True}


@router.post("/models/unload", openapi_extra=NAMES_A_MODEL)
@needs(Right.MANAGE)
async def unload(request: Request) -> dict[str, bool]:
    """Unload a model once its requests in flight are done; responds without waiting for it."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    alias = model_of((await read_body(request, _Named)).model, dispatcher.config).alias
    model = dispatcher.scheduler.models[alias]
    if model.wanted_since_sec is None and dispatcher.scheduler.state(alias) not in (
        ModelState.LOADING,
        ModelState.READY,
        ModelState.ASLEEP,
        ModelState.DRAINING,
    ):
        raise ApiError(400, "invalid_request", "model is not running", "model")
    dispatcher.begin_eject(alias)
    return {"success": True}
