"""Endpoints for clients of llama-swap: running models, their events and logs, and unloading.

Requests to engines, `/upstream`, are in `dataplane/engine_exchange.py`. Formats are those of its commit 0bdb372
(August 2026). Command line and address of an engine are left empty.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable
from operator import itemgetter
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse

from router.api.monitoring import log_named
from router.api.openai import further_names
from router.api.streams import EventStream, Feed, frame
from router.catalog.lookup import model_of
from router.engines.log_ring import LogRing
from router.http.errors import ApiError
from router.http.pages import Page, Right, needs
from router.observe.events import ModelChanged, ModelsListed, ServerChanged, ServerState
from router.runtime.dispatcher import Dispatcher
from router.scheduling.messages import ModelState
from router.scheduling.residency import Engine

router = APIRouter(tags=["llama-swap"], route_class=Page)

DONE_BY_GET = frozenset({"/unload"})
"""Paths at which a GET has side effects, and needs what a POST needs."""

_STATES = {
    ModelState.OFF: "stopped",
    ModelState.FAILED: "stopped",
    ModelState.LOADING: "starting",
    ModelState.READY: "ready",
    ModelState.DRAINING: "ready",
    ModelState.ASLEEP: "stopped",
    ModelState.STOPPING: "stopping",
}
"""llama-swap's name of each state."""
_KEEP_ALIVE_SEC = 30
_LOG_LOOK_SEC = 0.25
_LINES = 200
_NoHistory = Annotated[str | None, Query(alias="no-history", description="Send new lines only. Needs no value.")]


class Events:
    """llama-swap's events: the states of all models, whenever one changes."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.feed = Feed(lambda: frame("message", _told(dispatcher)), 1)
        dispatcher.events.listen(ModelChanged, lambda _: self.feed.start_anew())
        dispatcher.events.listen(ModelsListed, lambda _: self.feed.start_anew())
        dispatcher.events.listen(ServerChanged, self._server_changed)

    def _server_changed(self, change: ServerChanged) -> None:
        if change.status is ServerState.SHUTTING_DOWN:
            self.feed.end()


def _told(dispatcher: Dispatcher) -> dict[str, str]:
    further, state = further_names(dispatcher.config), dispatcher.scheduler.state
    known = dispatcher.scheduler.models
    models = [
        {
            "id": alias,
            "name": "",
            "description": model.description,
            "state": _STATES[state(alias) if alias in known else ModelState.OFF],
            "unlisted": False,
            "peerID": "",
            "aliases": further.get(alias, []),
        }
        for alias, model in sorted(dispatcher.config.models.items())
    ]
    return {"type": "modelStatus", "data": msgspec.json.encode(models).decode()}


@router.get("/api/events")
@needs(Right.USE)
async def events(request: Request) -> EventStream:
    """SSE: `modelStatus` with the states of all models, at the start and on every change."""
    told: Events = request.app.state.as_llama_swap
    return EventStream(told.feed.follow(None), ping=_KEEP_ALIVE_SEC)


@router.get("/running")
@needs(Right.USE)
async def running(request: Request) -> dict[str, Any]:
    """Models that have an engine. `ttl` is in seconds; 0: the model is not unloaded when idle."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    models = dispatcher.scheduler.models.items()
    resident = [(alias, engine) for alias, model in models if (engine := model.front) is not None]
    return {
        "running": [_running(dispatcher, alias, engine) for alias, engine in sorted(resident, key=itemgetter(0))]
    }


def _running(dispatcher: Dispatcher, alias: str, engine: Engine) -> dict[str, Any]:
    config = dispatcher.config.models.get(alias)
    idle_sec = engine.idle_timeout_sec(dispatcher.scheduler.policy)
    return {
        "model": alias,
        "state": _STATES[dispatcher.scheduler.state(alias)],
        "cmd": "",
        "proxy": "",
        "ttl": round(idle_sec) if idle_sec < math.inf else 0,
        "name": "",
        "description": config.description if config is not None else "",
    }


# --- unloading ------------------------------------------------------------------------------------------


@router.get("/unload", response_class=PlainTextResponse)
@needs(Right.MANAGE)
async def unload(request: Request) -> Response:
    """Unload all models, each once its requests in flight are done; responds when all are unloaded."""
    await _unload_all(request.app.state.dispatcher)
    return PlainTextResponse("OK")


@router.post("/api/models/unload")
@needs(Right.MANAGE)
async def unload_all(request: Request) -> JSONResponse:
    """Unload all models, as `/unload`."""
    await _unload_all(request.app.state.dispatcher)
    return JSONResponse({"msg": "ok"})


@router.post("/api/models/unload/{alias:path}", response_class=PlainTextResponse)
@needs(Right.MANAGE)
async def unload_one(alias: str, request: Request) -> Response:
    """Unload a model once its requests in flight are done; responds when it is unloaded."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    await dispatcher.eject(model_of(alias, dispatcher.config).alias)
    return PlainTextResponse("OK")


async def _unload_all(dispatcher: Dispatcher) -> None:
    """Unload all models, and cancel pending loads."""
    models = dispatcher.scheduler.models.items()
    going = [alias for alias, model in models if model.engines or model.wanted_since_sec is not None]
    await asyncio.gather(*map(dispatcher.eject, going))


# --- logs -----------------------------------------------------------------------------------------------


@router.get("/logs", response_class=PlainTextResponse)
@needs(Right.MANAGE)
async def logs(request: Request) -> Response:
    """Most recent log lines of the engines, by model. Browsers are redirected to the web page."""
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse("./", 302)
    dispatcher: Dispatcher = request.app.state.dispatcher
    lines = (line for log in dispatcher.logs.values() for line in log.tail(_LINES))
    return PlainTextResponse("".join(f"{line}\n" for line in lines))


@router.get("/logs/stream", response_class=PlainTextResponse)
@router.get("/logs/stream/upstream", response_class=PlainTextResponse)
@needs(Right.MANAGE)
async def stream_all(request: Request, no_history: _NoHistory = None) -> StreamingResponse:
    """Most recent log lines of the engines, followed by new ones."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    return _stream(dispatcher, dispatcher.logs.values, no_history)


@router.get("/logs/stream/{alias:path}", response_class=PlainTextResponse)
@needs(Right.MANAGE)
async def stream_one(alias: str, request: Request, no_history: _NoHistory = None) -> StreamingResponse:
    """Most recent log lines of one model's engines, followed by new ones."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    if alias == "proxy":
        raise ApiError(404, "not_found", "The router's own log is written to its standard error and not stored.")
    log = log_named(alias, dispatcher)
    return _stream(dispatcher, lambda: (log,), no_history)


def _stream(
    dispatcher: Dispatcher, logs: Callable[[], Iterable[LogRing]], no_history: str | None
) -> StreamingResponse:
    before = 0 if no_history is not None else _LINES
    return StreamingResponse(
        _follow(dispatcher, logs, before), media_type="text/plain", headers={"x-accel-buffering": "no"}
    )


async def _follow(
    dispatcher: Dispatcher, logs: Callable[[], Iterable[LogRing]], before: int
) -> AsyncIterator[str]:
    """Yield `before` lines of each log, and all new lines; all lines of a log that is new."""
    seen = {id(log): log.total - len(log.tail(before)) for log in logs()}
    yield ""
    while dispatcher.status is not ServerState.SHUTTING_DOWN:
        for log in tuple(logs()):
            news = log.since(seen.get(id(log), 0))
            seen[id(log)] = log.total
            if news:
                yield "".join(f"{line}\n" for line in news)
        await asyncio.sleep(_LOG_LOOK_SEC)
