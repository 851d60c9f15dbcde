"""Use of memory per device and per model, with the source of each figure."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from router.api.models import memory
from router.catalog.lookup import model_of
from router.http.auth import sees_all
from router.http.pages import Page, Right, needs
from router.memory.ledger import Account, Line
from router.runtime.dispatcher import Dispatcher
from router.scheduling.residency import ENGINES, engine_name

router = APIRouter(tags=["monitoring"], route_class=Page)

_WARNING, _CRITICAL = 80, 95
_ADD_UP = ("vram_used_mb", "vram_used_gb", "average_usage_mb", "vram_percentage")
"""Figures of engines that are added up for a model."""


@router.get("/vram")
@needs(Right.USE)
async def vram(request: Request) -> dict[str, Any]:
    """Memory of every device and loaded model. Top-level figures are for all GPUs, or for RAM without GPUs."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    models = [_model(request, account) for account in dispatcher.ledger.accounts.values()]
    return {
        **_summary(dispatcher),
        "models": models,
        "devices": [_device(line) for line in dispatcher.ledger.lines()],
    }


@router.get("/vram/summary")
@needs(Right.USE)
async def vram_summary(request: Request) -> dict[str, Any]:
    """Top-level figures of `/vram`."""
    return _summary(request.app.state.dispatcher)


@router.get("/vram/models/{alias:path}")
@needs(Right.USE)
async def vram_of_model(alias: str, request: Request) -> dict[str, Any]:
    """Memory of one model: all its engines together, and each of them; empty if it is not loaded."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    alias = model_of(alias, dispatcher.config).alias
    engines = [_model(request, account) for account in dispatcher.ledger.accounts_of(alias)]
    if not engines:
        return {"model_alias": alias, "status": dispatcher.scheduler.state(alias), "vram_used_mb": 0}
    added = {key: sum(engine[key] for engine in engines) for key in _ADD_UP}
    return {**engines[0], **added, "engines": engines}


def _summary(dispatcher: Dispatcher) -> dict[str, Any]:
    ledger = dispatcher.ledger
    lines = _main(ledger.lines())
    total, used = sum(line.reading.total_mib for line in lines), sum(line.used_mib for line in lines)
    free = max((line.free_mib for line in lines), default=0)
    allocated = sum(account.main_mib for account in ledger.accounts.values())
    percentage = _percentage(used, total)
    system = dispatcher.config.system
    has_place = dispatcher.scheduler.free().get(ENGINES, 0) > 0
    return {
        "gpu_info": {
            **_both("total", total),
            **_both("used", used),
            **_both("free", total - used),
            "usage_percentage": percentage,
            "baseline_used_mb": sum(line.external_mib for line in lines),
        },
        "tracked_models_count": len(dispatcher.scheduler.models),
        "loaded_models_count": len(ledger.accounts),
        **_both("total_allocated_by_models", allocated),
        "can_load_more": has_place and free >= system.min_vram_required,
        **_both("estimated_free_for_new_model", free),
        "status": "critical" if percentage >= _CRITICAL else "warning" if percentage >= _WARNING else "healthy",
    }


def _main(lines: list[Line]) -> list[Line]:
    """Return the lines of the GPUs, or of RAM without GPUs."""
    return [line for line in lines if line.device.is_gpu] or lines


def _device(line: Line) -> dict[str, Any]:
    reading = line.reading
    return {
        "name": str(line.device),
        "kind": reading.kind,
        "label": reading.label,
        "total_mb": reading.total_mib,
        "used_mb": line.used_mib,
        "free_mb": reading.free_mib,
        "external_mb": line.external_mib,
        "reserve_mb": line.reserve_mib,
        "budget_mb": line.budget_mib,
        "booked_mb": line.booked_mib,
        "reserved_mb": line.reserved_mib,
        "free_for_new_model_mb": line.free_mib,
        "utilization": reading.utilization,
        "temperature_c": reading.temperature_c,
        "power_w": reading.power_w,
    }


def _model(request: Request, account: Account) -> dict[str, Any]:
    dispatcher: Dispatcher = request.app.state.dispatcher
    running = dispatcher.running.get(account.engine_id)
    ready_sec = running.ready_sec if running is not None else None
    total = sum(line.reading.total_mib for line in _main(dispatcher.ledger.lines()))
    return {
        "model_alias": account.alias,
        "engine": engine_name(account.alias, account.engine_id),
        "port": running.handle.endpoint.port if running is not None and sees_all(request) else None,
        "status": dispatcher.scheduler.state(account.alias),
        **_both("vram_used", account.main_mib),
        "average_usage_mb": account.main_mib,
        "load_duration_sec": round(ready_sec - running.started_sec, 3) if running and ready_sec else None,
        "vram_percentage": _percentage(account.main_mib, total),
        **memory(account),
    }


def _both(name: str, mib: int) -> dict[str, Any]:
    return {f"{name}_mb": mib, f"{name}_gb": round(mib / 1024, 2)}


def _percentage(part: int, whole: int) -> float:
    return round(100 * part / whole, 1) if whole else 0.0
