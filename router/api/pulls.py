"""Pulling models from the Hugging Face hub, how far that is, and removing them. For full keys only."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import datetime, timezone
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sse_starlette import ServerSentEvent
from starlette.responses import JSONResponse, Response

from router.api.models import LoadRequest, load_model
from router.api.streams import EventStream
from router.catalog.lookup import check_name
from router.config.names import candidates, same_name, some_of
from router.config.schema import Config
from router.config.source import Source
from router.http.errors import ApiError
from router.http.pages import Page, Right, needs
from router.observe.events import ServerState
from router.runtime.dispatcher import Dispatcher
from router.store import created, pulled, repository
from router.store.creations import Creations
from router.store.discovery import is_alias
from router.store.downloads import MOST_AT_ONCE, Downloads, Pull, TooManyPulls

router = APIRouter(tags=["management"], route_class=Page)

_KEEP_ALIVE_SEC = 30
_STATUS = {
    "invalid_reference": 400,
    "access_denied": 403,
    "gated": 403,
    "no_such_file": 404,
    "not_found": 404,
    "alias_taken": 409,
    "name_taken": 409,
    "checksum_mismatch": 502,
    "hub_error": 502,
    "unreachable": 502,
    "disk_full": 507,
}
"""Of a failed pull, by its code; the others are 500."""


class PullRequest(BaseModel):
    model: str = Field(description="hf.co/USER/REPO[:QUANT], or hf.co/USER/REPO/FILE.gguf.")
    alias: str | None = Field(
        default=None, pattern=r"^[^_\s]\S*$", description="Name to serve it under; null means USER/REPO:QUANT."
    )
    stream: bool = Field(default=False, description="Answer with its progress as server-sent events.")


class PullAndWait(BaseModel):
    model: str = Field(description="As for /v1/models/pull.")
    quantize: str = Field(
        default=repository.AUTO,
        description="A quantization; `q4`, `q8`, …, `fp16`, `fp32`: the closest with so many bits; `no`: what is "
        "not quantized; `auto`: that, but if it is larger than system.q4_threshold_bytes, or not there, Q4_K_M or "
        "the closest.",
    )
    init: bool = Field(default=False, description="Load it, too.")


@router.post(
    "/v1/models/pull",
    status_code=202,
    response_model=None,
    responses={200: {"description": "With `stream`.", "content": {"text/event-stream": {}}}},
)
@needs(Right.MANAGE)
async def pull_model(body: PullRequest, request: Request) -> Response:
    """Begin to pull a model, or join the pull that does so already; 202 with how far it is."""
    pull = begin(request, body.model, body.alias)
    if body.stream:
        return _stream(pull)
    return JSONResponse(_shown(pull), 202, headers={"Location": f"/v1/models/pull/{pull.id}"})


def begin(request: Request, model: str, alias: str | None, quantize: str | None = None) -> Pull:
    """Raises ApiError."""
    for name in (model, alias or ""):
        check_name(name)
    downloads: Downloads = request.app.state.downloads
    dispatcher: Dispatcher = request.app.state.dispatcher
    system = dispatcher.config.system
    if dispatcher.status is ServerState.SHUTTING_DOWN:
        raise ApiError(503, "shutting_down", "The router is shutting down.", retry_after_sec=5)
    if alias is not None and not is_alias(alias):
        message = f"{alias!r}: an alias is one or more printable characters without spaces."
        raise ApiError(400, "invalid_alias", message, "alias")
    try:
        reference, listed_as = repository.permitted(model, system.allowed_models, os.environ)
        if quantize is not None:
            reference = repository.quantized(reference, quantize)
        alias = alias or listed_as
        taken = _taken(dispatcher.config, reference.repo)
        if alias in taken:
            message = f"{alias!r} is taken by a model of this name, from {taken[alias]}: choose another alias."
            raise ApiError(409, "name_taken", message, "alias")
        taken = {name: source for name, source in taken.items() if repository.is_of(reference.repo, name)}
        return downloads.start(reference, alias, taken, system.q4_threshold_bytes)
    except repository.BadReference as error:
        raise ApiError(400, "invalid_reference", f"{error}.", "model") from None
    except repository.NotAllowed as error:
        raise ApiError(403, "model_not_allowed", f"{error}.", "model") from None
    except TooManyPulls:
        message = f"{MOST_AT_ONCE} pulls are running already; wait for one, or cancel it."
        raise ApiError(429, "too_many_pulls", message, retry_after_sec=30) from None


def _taken(config: Config, repo: str) -> dict[str, str]:
    """Names under which what is pulled would not be what is served, with where that is from."""
    return {
        name: source
        for name, source in config.sources.items()
        if source != Source.PULLED
        and not (source == Source.HF_CACHE and repository.is_of(repo, name))  # the same file
    }


@router.post("/pull")
@needs(Right.MANAGE)
async def pull_and_wait(body: PullAndWait, request: Request) -> dict[str, Any]:
    """Pull a model as `/v1/models/pull` does; answers when it is there, and with `init` when it is loaded."""
    pull = begin(request, body.model, None, body.quantize)
    async for _ in pull.follow():
        pass
    progress = pull.progress
    if progress.error is not None:
        raise ApiError(_STATUS.get(progress.error.code, 500), progress.error.code, progress.error.message, "model")
    if progress.alias is None or progress.path is None:
        raise ApiError(409, "cancelled", "The pull was cancelled; the next one goes on with what has arrived.")
    if body.init:
        await load_model(LoadRequest(model=progress.alias), request)
    return {
        "status": "ok",
        "model": progress.alias,
        "cached": progress.cached,
        "backend": {
            "local_path": progress.path,
            "preferred_quantized": repository.is_quantized(progress.path),
            "size_bytes": progress.total_bytes,
        },
    }


@router.get("/v1/models/pull")
@needs(Right.MANAGE)
async def list_pulls(request: Request) -> dict[str, Any]:
    """The pulls that run, and the last ones that are over."""
    downloads: Downloads = request.app.state.downloads
    return {"pulls": [_shown(pull) for pull in downloads.pulls.values()]}


@router.get("/v1/models/pull/{pull_id}")
@needs(Right.MANAGE)
async def show_pull(pull_id: str, request: Request) -> dict[str, Any]:
    """How far a pull is."""
    return _shown(_known(request, pull_id))


@router.get("/v1/models/pull/{pull_id}/stream")
@needs(Right.MANAGE)
async def follow_pull(pull_id: str, request: Request) -> EventStream:
    """SSE: `progress` until a last `success`, `failed` or `cancelled`."""
    return _stream(_known(request, pull_id))


@router.delete("/v1/models/pull/{pull_id}")
@needs(Right.MANAGE)
async def cancel_pull(pull_id: str, request: Request) -> dict[str, Any]:
    """Cancel a pull; the next one goes on with what has arrived."""
    downloads: Downloads = request.app.state.downloads
    pull = _known(request, pull_id)
    await downloads.cancel(pull)
    return _shown(pull)


@router.delete("/v1/models/pulled/{alias:path}", responses={409: {}})
@needs(Right.MANAGE)
async def remove_pulled(alias: str, request: Request) -> dict[str, Any]:
    """Remove a pulled or created model and the files that are only its own; its engine finishes its work first.

    A pulled one that something was created from stays, as does one that is being pulled.
    """
    creations: Creations = request.app.state.creations
    config: Config = request.app.state.dispatcher.config
    alias = _removable(alias, creations, config)
    cache = pulled.cache_folder(os.environ)
    there = config.aliases.get(alias) or config.models.get(alias)
    downloads: Downloads = request.app.state.downloads
    for pull in downloads.pulls.values():
        if not pull.over and pull.progress.alias == alias:
            message = f"{alias!r} is being pulled: cancel that first (DELETE /v1/models/pull/{pull.id})."
            raise ApiError(409, "model_in_use", message, "model")
    try:
        removed = await creations.remove(alias)
        if removed is not None:
            return {"status": "success", "model": alias, "freed_bytes": removed}
        needed = created.made_from(creations.records, alias)
        if needed and there is not None and there.source == Source.PULLED:
            message = f"{some_of(needed)} was created from {alias!r}: remove that first."
            raise ApiError(409, "model_in_use", message, "model")
        if cache is None:
            raise pulled.NotPulled(f"no model was pulled as {alias!r}")
        freed = await asyncio.to_thread(pulled.remove, cache, alias)
    except pulled.NotPulled as error:
        reason = f"model {alias!r} not found: {error}"
        if there is not None:
            reason = f"{alias!r} was neither pulled nor created, but is from {there.source}"
        raise ApiError(404, "model_not_found", f"{reason}.", "model") from None
    except pulled.BeingPulled as error:
        raise ApiError(409, "model_in_use", f"{error}.", "model") from None
    except OSError as error:
        raise ApiError(500, "disk_error", f"{alias!r} could not be removed: {error}.") from None
    await downloads.look_again()
    return {"status": "success", "model": alias, "freed_bytes": freed}


def _removable(name: str, creations: Creations, config: Config) -> str:
    """The alias of what is to be removed. Raises ApiError 404 and 409.

    What was created is gone for good: it has to be called by its name, not by what may stand for that.
    """
    check_name(name)
    alike = [same] if (same := same_name(name, creations.records)) else candidates(name, config)
    if len(alike) > 1:
        raise ApiError(409, "name_taken", f"{name!r} may be {some_of(alike)}: say which is to go.", "model")
    alias = alike[0] if alike else name
    if alias in creations.records and not same_name(name, (alias,)):
        raise ApiError(404, "model_not_found", f"model {name!r} not found. Did you mean {alias!r}?", "model")
    return alias


def _known(request: Request, pull_id: str) -> Pull:
    downloads: Downloads = request.app.state.downloads
    if pull_id not in downloads.pulls:
        raise ApiError(404, "pull_not_found", f"There is no pull {pull_id!r}; GET /v1/models/pull lists them.")
    return downloads.pulls[pull_id]


def _shown(pull: Pull) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(pull.progress)
    started_at = datetime.fromtimestamp(pull.started_at, timezone.utc).isoformat(timespec="milliseconds")
    return {"id": pull.id, "started_at": started_at, **shown}


def _stream(pull: Pull) -> EventStream:
    async def events() -> AsyncIterator[ServerSentEvent]:
        async for progress in pull.follow():
            name = progress.status if pull.over and progress is pull.progress else "progress"
            yield ServerSentEvent(msgspec.json.encode(_shown(pull)).decode(), event=name)

    return EventStream(events(), ping=_KEEP_ALIVE_SEC)
