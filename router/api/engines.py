"""Engines' documents about themselves, at llama-server's paths: `/props`, `/slots`, `/lora-adapters`, `/metrics`.

The model is named in the query. Such a request loads nothing and waits for no slot: monitoring must not change
what it monitors. Without a name, it is about the default model if there is one, else about the only loaded model.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from router import __version__
from router.catalog.lookup import model_of, named_by_nobody
from router.config.names import meant
from router.engines import questions
from router.engines.documents import for_clients
from router.engines.llamacpp.capability import error_of_engine
from router.engines.running import RunningEngine
from router.http.auth import sees_all
from router.http.errors import ApiError
from router.http.pages import Page, Right, needs
from router.runtime.dispatcher import Dispatcher
from router.scheduling.messages import ModelState

router = APIRouter(tags=["monitoring"], route_class=Page)

_ANSWER_SEC = 10.0
"""Time for an engine to answer: it finishes a batch first."""
ERRORS: dict[int | str, dict[str, Any]] = {404: {}, 501: {}, 504: {}}

ModelQuery = Annotated[str | None, Query(description="Name of a model. The request does not load it.")]


@router.get("/props", responses=ERRORS)
@needs(Right.USE)
async def props(request: Request, model: ModelQuery = None) -> Response:
    """llama-server's `/props` of a model's engine; without `model`, those of a llama-server in router mode."""
    if model:
        return await said_by_engine(request, model, "/props")
    dispatcher: Dispatcher = request.app.state.dispatcher
    running = _watched(dispatcher)
    answer = None if running is None else await questions.document(running.handle.endpoint, "/props", _ANSWER_SEC)
    said: dict[str, Any] = {}
    if answer is not None and answer.status == 200:
        body = answer.body if sees_all(request) else for_clients(answer.body)
        with contextlib.suppress(msgspec.MsgspecError):  # another server's properties
            said = msgspec.json.decode(body, type=dict[str, Any])
    of_the_router = {
        "role": "router",
        "max_instances": dispatcher.scheduler.policy.places,
        "models_autoload": True,
        "build_info": f"llama-router {__version__}",
        "cors_proxy_enabled": False,
    }
    document = {**_NO_ENGINE, **said, **of_the_router}
    return Response(msgspec.json.encode(document), media_type="application/json")


_NO_ENGINE = {
    "model_alias": "llama-router",
    "model_path": "none",
    "default_generation_settings": {"params": {}, "n_ctx": 0},
    "ui_settings": {},
}
"""Properties of llama-server in router mode, which its web page expects."""


@router.get("/slots", responses=ERRORS)
@needs(Right.USE)
async def slots(request: Request, model: ModelQuery = None) -> Response:
    """llama-server's `/slots`: activity of each slot of a model's engine."""
    return await said_by_engine(request, model, "/slots")


@router.get("/lora-adapters", responses=ERRORS)
@needs(Right.USE)
async def lora_adapters(request: Request, model: ModelQuery = None) -> Response:
    """llama-server's `/lora-adapters` of a model's engine."""
    return await said_by_engine(request, model, "/lora-adapters")


async def said_by_engine(request: Request, model: str | None, path: str) -> Response:
    """Return the document of a model's engine at that path. Raises ApiError."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    running = _engine_of(dispatcher, model)
    answer = await questions.document(running.handle.endpoint, path, _ANSWER_SEC)
    if answer is None:
        raise ApiError(504, "request_timeout", f"The engine of {running.alias!r} did not answer.")
    if answer.status >= 400:
        raise error_of_engine(answer.status, answer.body)
    body = answer.body if sees_all(request) or path == "/metrics" else for_clients(answer.body)
    return Response(body, answer.status, media_type=answer.content_type)


def _engine_of(dispatcher: Dispatcher, model: str | None) -> RunningEngine:
    """Return a model's engine. Raises ApiError for a model that is unknown or not loaded."""
    if not model:
        if (running := _watched(dispatcher)) is not None:
            return running
        model = named_by_nobody(dispatcher.config)
    alias = model_of(model, dispatcher.config).alias
    running = _ready(dispatcher, alias)
    if running is not None:
        return running
    if dispatcher.scheduler.state(alias) is ModelState.LOADING:
        raise ApiError(503, "model_not_loaded", f"{alias!r} is loading.", "model", 1)
    message = f"{alias!r} is not loaded, and this request does not load it. Send a chat, or POST /v1/models/load."
    raise ApiError(400, "model_not_loaded", message, "model")


def _watched(dispatcher: Dispatcher) -> RunningEngine | None:
    """Return the engine that a request without a model is about, if it is loaded."""
    config = dispatcher.config
    if config.default_model is not None:
        known = meant(config.default_model, config)
        return None if known is None else _ready(dispatcher, config.model_of(known).alias)
    ready = [running for running in dispatcher.running.values() if running.ready_sec is not None]
    return ready[0] if len(ready) == 1 else None


def _ready(dispatcher: Dispatcher, alias: str) -> RunningEngine | None:
    running = dispatcher.front_of(alias)
    return running if running is not None and running.ready_sec is not None else None
