"""Pulling models from the Hugging Face hub, with progress, and removing them. Requires a key with full access."""

from __future__ import annotations

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
from router.catalog.library import Library
from router.http.errors import ApiError
from router.http.pages import Page, Right, needs
from router.store import repository
from router.store.downloads import Downloads, Pull
from router.store.progress import Problem

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
"""The status of each error code of a failed pull; other codes are 500."""


class PullRequest(BaseModel):
    model: str = Field(
        description="hf.co/USER/REPO[:QUANT], or hf.co/USER/REPO/FILE.gguf. A repository without GGUF files is "
        "pulled whole if it holds a model in safetensors."
    )
    alias: str | None = Field(
        default=None,
        pattern=r"^[^_\s]\S*$",
        description="Name of the model. null: USER/REPO:QUANT, in safetensors USER/REPO.",
    )
    stream: bool = Field(default=False, description="Stream the progress as server-sent events.")


class PullAndWait(BaseModel):
    model: str = Field(description="Model to pull, as for /v1/models/pull.")
    quantize: str = Field(
        default=repository.AUTO,
        description="Quantization: `q4`, `q8`, …, `fp16`, `fp32`: the closest with that many bits; `no`: "
        "unquantized; `auto`: unquantized, or Q4_K_M or the closest if that is larger than "
        "system.q4_threshold_bytes or not available. For a model in safetensors, how it is loaded: `auto`, `q4`, "
        "`fp16`, `fp32` or `no`.",
    )
    init: bool = Field(default=False, description="Also load the model.")


@router.post(
    "/v1/models/pull",
    status_code=202,
    response_model=None,
    responses={200: {"description": "Progress events, with `stream`.", "content": {"text/event-stream": {}}}},
)
@needs(Right.MANAGE)
async def pull_model(body: PullRequest, request: Request) -> Response:
    """Start to pull a model, or join a pull in progress; responds with 202 and the progress."""
    library: Library = request.app.state.library
    pull = library.pull(body.model, body.alias)
    if body.stream:
        return _stream(pull)
    return JSONResponse(_shown(pull), 202, headers={"Location": f"/v1/models/pull/{pull.id}"})


@router.post("/pull")
@needs(Right.MANAGE)
async def pull_and_wait(body: PullAndWait, request: Request) -> dict[str, Any]:
    """Pull a model like `/v1/models/pull`; responds when it is available, or with `init` when it is loaded."""
    library: Library = request.app.state.library
    pull = library.pull(body.model, quantize=body.quantize)
    async for _ in pull.follow():
        pass
    progress = pull.progress
    if progress.error is not None:
        raise failed_pull(progress.error)
    if progress.alias is None or progress.path is None:
        raise ApiError(409, "cancelled", "The pull was cancelled; the next pull resumes it.")
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
    """Running pulls and the most recent finished ones."""
    downloads: Downloads = request.app.state.library.downloads
    return {"pulls": [_shown(pull) for pull in downloads.pulls.values()]}


@router.get("/v1/models/pull/{pull_id}")
@needs(Right.MANAGE)
async def show_pull(pull_id: str, request: Request) -> dict[str, Any]:
    """Progress of a pull."""
    return _shown(_known(request, pull_id))


@router.get("/v1/models/pull/{pull_id}/stream")
@needs(Right.MANAGE)
async def follow_pull(pull_id: str, request: Request) -> EventStream:
    """SSE: `progress` events, then a final `success`, `failed` or `cancelled`."""
    return _stream(_known(request, pull_id))


@router.delete("/v1/models/pull/{pull_id}")
@needs(Right.MANAGE)
async def cancel_pull(pull_id: str, request: Request) -> dict[str, Any]:
    """Cancel a pull; the next pull resumes it."""
    downloads: Downloads = request.app.state.library.downloads
    pull = _known(request, pull_id)
    await downloads.cancel(pull)
    return _shown(pull)


@router.delete("/v1/models/pulled/{alias:path}", responses={409: {}})
@needs(Right.MANAGE)
async def remove_pulled(alias: str, request: Request) -> dict[str, Any]:
    """Remove a pulled or created model and the files that only it uses; its engine finishes its requests first.

    Models that others were created from, and models being pulled, cannot be removed.
    """
    library: Library = request.app.state.library
    alias, freed = await library.remove(alias)
    return {"status": "success", "model": alias, "freed_bytes": freed}


def failed_pull(problem: Problem) -> ApiError:
    """Return the error for a client that waited for a pull, or for its estimate."""
    return ApiError(_STATUS.get(problem.code, 500), problem.code, problem.message, "model")


def _known(request: Request, pull_id: str) -> Pull:
    downloads: Downloads = request.app.state.library.downloads
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
