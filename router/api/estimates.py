"""Estimates of what a model would take, and of what would have to go for it, before it is pulled or loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from router.api.pulls import failed_pull
from router.catalog.library import Library
from router.config.names import meant
from router.config.resolved import ModelConfig
from router.http.errors import ApiError
from router.http.pages import Page, Right, needs
from router.memory.manager import inspected
from router.memory.plan import Unusable
from router.runtime.dispatcher import Dispatcher
from router.scheduling.eviction import Outlook
from router.scheduling.messages import Inspected
from router.scheduling.residency import memory_of
from router.store.progress import Progress
from router.system.devices import Device, by_name

router = APIRouter(tags=["management"], route_class=Page)

_GIB = 1024


class ToEstimate(BaseModel):
    model: str = Field(description="A model that is served; else what `/v1/models/pull` takes.")
    alias: str | None = Field(default=None, pattern=r"^[^_\s]\S*$", description="As for `/v1/models/pull`.")


@router.post("/v1/models/estimate")
@needs(Right.MANAGE)
async def estimate(body: ToEstimate, request: Request) -> dict[str, Any]:
    """Memory that a model would take here, what would be unloaded for it, and what would be downloaded.

    Of a model on the hub, only the headers of its files are read. `fits` is `now`, `after_unloading` or `never`,
    and null if that cannot be told.
    """
    dispatcher: Dispatcher = request.app.state.dispatcher
    if (name := meant(body.model, dispatcher.config)) is not None:
        return await _of_served(dispatcher, dispatcher.config.model_of(name))
    library: Library = request.app.state.library
    progress = await library.estimate(body.model, body.alias)
    if progress.error is not None and progress.memory is None:
        raise failed_pull(progress.error)
    return _of_hub(dispatcher, progress)


async def _of_served(dispatcher: Dispatcher, model: ModelConfig) -> dict[str, Any]:
    try:
        found = await dispatcher.plan(model.alias)
    except Unusable as unusable:
        raise ApiError(409, "model_failed", f"{model.alias!r}: {unusable.reason.full}.", "model") from None
    outlook = dispatcher.scheduler.outlook(inspected(model.alias, found))
    is_loaded = bool(dispatcher.scheduler.models[model.alias].engines)
    best = found.alternatives[0]
    need = _need(outlook, best.placement)
    words = _in_words(dispatcher, need, outlook)
    return {
        "model": model.alias,
        "alias": model.alias,
        "download_bytes": 0,
        "total_bytes": sum(size for _, size, *_ in model.files),
        "engine": dispatcher.backend_of(model).name,
        "source": best.size.source,
        "context": best.context,
        "context_key": None,
        "largest_context": None,
        **_memory(dispatcher, need),
        **_verdict(outlook),
        "is_loaded": is_loaded,
        "message": f"is loaded; {words}" if is_loaded else words,
        "problem": None,
    }


def _of_hub(dispatcher: Dispatcher, progress: Progress) -> dict[str, Any]:
    told: dict[str, Any] = {
        "model": progress.reference,
        "alias": progress.alias,
        "download_bytes": progress.total_bytes - progress.completed_bytes,
        "total_bytes": progress.total_bytes,
        "is_loaded": False,
        "problem": progress.error.message if progress.error is not None else None,
    }
    note = progress.memory
    if note is None:
        unknown = f"what it needs is unknown: {progress.memory_unknown}"
        nothing = dict.fromkeys(("engine", "source", "context", "context_key", "largest_context"))
        return {**told, **nothing, **_memory(dispatcher, {}), **_verdict(None), "message": unknown}
    placements = tuple(
        {Device.named(name): mib for name, mib in placement.items()} for placement in note.placements
    )
    advice = ""
    if note.largest_context:
        advice = f"it fits with a context of up to {note.largest_context} ({note.context_key})"
    asked = Inspected(
        time.monotonic(), progress.alias or progress.reference, placements, need=note.need, advice=advice
    )
    outlook = dispatcher.scheduler.outlook(asked)
    need = _need(outlook, placements[0])
    return {
        **told,
        "engine": note.engine or dispatcher.backend.name,
        "source": note.need.rpartition("(")[2].rstrip(")"),
        "context": note.context,
        "context_key": note.context_key,
        "largest_context": note.largest_context,
        **_memory(dispatcher, need),
        **_verdict(outlook),
        "message": _in_words(dispatcher, need, outlook),
    }


def _need(outlook: Outlook, best: Mapping[Device, int]) -> dict[Device, int]:
    """Return the memory of the way in which the model would be run, or of the best one if none is possible."""
    return memory_of(best if outlook.placement is None else outlook.placement)


def _memory(dispatcher: Dispatcher, need: Mapping[Device, int]) -> dict[str, Any]:
    """Return the need by device, with the size of these devices and what engines may use of them, in MiB."""
    lines = {line.device: line for line in dispatcher.ledger.lines() if line.device in need}
    return {
        "need_mib": by_name(need),
        "total_mib": {str(device): line.reading.total_mib for device, line in lines.items()},
        "budget_mib": {str(device): line.budget_mib for device, line in lines.items()},
        "free_mib": {str(device): line.free_mib for device, line in lines.items()},
    }


def _verdict(outlook: Outlook | None) -> dict[str, Any]:
    fits: str | None = None
    if outlook is not None:
        waits = outlook.victims or outlook.reason
        fits = "never" if outlook.placement is None else "after_unloading" if waits else "now"
    return {
        "fits": fits,
        "beside": list(outlook.beside) if outlook is not None else [],
        "unloads": list(outlook.victims) if outlook is not None else [],
    }


def _in_words(dispatcher: Dispatcher, need: Mapping[Device, int], outlook: Outlook) -> str:
    """Return the estimate as a sentence: `needs 5.2 GiB of 24 on gpu0, fits beside qwen`."""
    totals = {line.device: line.reading.total_mib for line in dispatcher.ledger.lines()}
    parts = [
        f"{mib / _GIB:.1f} GiB of {totals.get(device, 0) / _GIB:.0f} on {device}"
        for device, mib in sorted(need.items(), key=lambda item: not item[0].is_gpu)
        if mib
    ]
    needs = f"needs {' and '.join(parts) or 'no memory'}"
    if outlook.placement is None:
        return f"{needs}; does not fit: {outlook.reason}"
    if outlook.reason:
        return f"{needs}; fits later: {outlook.reason}"
    if outlook.victims:
        return f"{needs}, fits once {_names(outlook.victims)} {_is(outlook.victims)} unloaded"
    return f"{needs}, fits beside {_names(outlook.beside)}" if outlook.beside else f"{needs}, fits"


def _names(aliases: tuple[str, ...]) -> str:
    *first, last = aliases
    return f"{', '.join(first)} and {last}" if first else last


def _is(aliases: tuple[str, ...]) -> str:
    return "is" if len(aliases) == 1 else "are"
