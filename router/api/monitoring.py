"""Health, readiness, metrics, queues and engine logs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from sse_starlette import ServerSentEvent
from starlette.responses import JSONResponse, PlainTextResponse, Response

from router.api.engines import ERRORS, ModelQuery, said_by_engine
from router.api.streams import EventStream
from router.catalog.lookup import model_of
from router.config.names import meant
from router.engines.log_ring import LogRing
from router.engines.metrics import EngineMetrics
from router.hardware.devices import Devices
from router.http.auth import sees_all
from router.http.documents import Document
from router.http.errors import ApiError
from router.http.pages import Page, Right, needs
from router.observe.events import ServerState
from router.observe.metrics import Metrics, NotAcceptable
from router.runtime.dispatcher import Dispatcher, LastExit, Waiting
from router.scheduling.queue import NAMES
from router.scheduling.residency import Model
from router.system.processes import signal_name
from router.system.turns import in_turns

router = APIRouter(tags=["monitoring"], route_class=Page)

_LOG_LOOK_SEC = 0.25
_MOST_SHOWN = 100
READING_SEC = 0.5
"""Time for drivers and engines to report; after that, their last values count."""


@router.get("/health")
@router.get("/v1/health")
@needs(Right.NONE)
async def health(request: Request) -> JSONResponse:
    """Health of the router. A machine without a GPU is healthy."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    working = dispatcher.status is not ServerState.SHUTTING_DOWN
    answer = {
        "status": "ok" if working else "degraded",
        "checks": {
            "gpu": {"available": any(device.is_gpu for device in dispatcher.ledger.devices)},
            "manager": {"status": dispatcher.status, "active_models": len(dispatcher.scheduler.engines)},
            "http_client": _connections(dispatcher),
            "background": _background(dispatcher),
        },
    }
    return JSONResponse(answer, 200 if working else 503)


def _connections(dispatcher: Dispatcher) -> dict[str, Any]:
    """Return the state of connections to engines: degraded while a ready engine fails probes."""
    ready = [running for running in dispatcher.running.values() if running.ready_sec is not None]
    silent = sorted(running.alias for running in ready if running.failed_probes)
    return {"status": "degraded" if silent else "ok", "engines": len(ready), "not_answering": silent}


def _background(dispatcher: Dispatcher) -> dict[str, Any]:
    """Return the state of background tasks: degraded while one keeps failing. Each is restarted every time."""
    failing = [each.name for each in dispatcher.background if not each.is_well]
    failures = {each.name: each.failures for each in dispatcher.background}
    return {"status": "degraded" if failing else "ok", "failing": failing, "failures": failures}


@router.get("/live")
@needs(Right.NONE)
async def live() -> dict[str, str]:
    """Liveness: the process responds."""
    return {"status": "ok"}


@router.get("/ready")
@needs(Right.NONE)
async def ready(request: Request) -> JSONResponse:
    """Readiness: 503 until startup is complete, and again once shutdown has begun."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    return JSONResponse({"status": dispatcher.status}, 200 if dispatcher.status is ServerState.READY else 503)


@router.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
@needs(Right.USE)
async def metrics(request: Request, model: ModelQuery = None) -> Response:
    """Metrics in Prometheus text format, or OpenMetrics if accepted; with `model`, those of its engine."""
    if model:
        return await said_by_engine(request, model, "/metrics")
    collected: Metrics = request.app.state.metrics
    of_engines: EngineMetrics = request.app.state.engine_metrics
    devices: Devices = request.app.state.dispatcher.devices
    await asyncio.gather(devices.read(READING_SEC), of_engines.read(READING_SEC))
    client = request.state.client
    whose = None if client is None else client.name
    try:
        text, content_type = await collected.exposition(request.headers.get("accept", ""), whose)
    except NotAcceptable:
        raise ApiError(400, "invalid_request", "The Accept header is not valid.", "accept") from None
    return Response(text, headers={"content-type": content_type})


@router.get("/metrics/report")
@needs(Right.USE)
async def metrics_report(request: Request) -> dict[str, Any]:
    """Aggregated figures of the last five minutes."""
    report: dict[str, Any] = await request.app.state.telemetry.window(300)
    return report


@router.get("/v1/telemetry/summary")
@needs(Right.USE)
async def telemetry(
    request: Request,
    models: Annotated[bool, Query(description="Whether to list them by model, too.")] = True,
) -> dict[str, Any]:
    """Request statistics since the start, and for the last one and five minutes."""
    summary: dict[str, Any] = await request.app.state.telemetry.summary(by_model=models)
    return summary


@router.get("/v1/logs/{alias:path}/stream")
@needs(Right.MANAGE)
async def log_stream(alias: str, request: Request, lines: Annotated[int, Query(ge=0)] = 0) -> EventStream:
    """SSE: most recent log lines of a model's engines, followed by new ones, one line per event.

    `missed` reports how many lines were dropped because they arrived faster than they could be sent.
    """
    dispatcher: Dispatcher = request.app.state.dispatcher
    return EventStream(_follow(dispatcher, log_named(alias, dispatcher), lines))


async def _follow(dispatcher: Dispatcher, log: LogRing, lines: int) -> AsyncIterator[ServerSentEvent]:
    seen = log.total - len(log.tail(lines))
    while dispatcher.status is not ServerState.SHUTTING_DOWN:
        news, missed = log.since(seen), log.total - seen
        seen += missed
        if missed > len(news):
            yield ServerSentEvent(str(missed - len(news)), event="missed")
        for line in news:
            yield ServerSentEvent(line, event="log")
        await asyncio.sleep(_LOG_LOOK_SEC)


@router.get("/v1/logs/{alias:path}", response_class=PlainTextResponse)
@needs(Right.MANAGE)
async def logs(alias: str, request: Request, lines: Annotated[int, Query(ge=1)] = 200) -> PlainTextResponse:
    """Most recent log lines of a model's engines, including engines that have exited.

    The log of a single running engine has the engine's name in the model's status, such as `a#3` (`a%233`)."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    return PlainTextResponse("".join(f"{line}\n" for line in log_named(alias, dispatcher).tail(lines)))


def log_named(name: str, dispatcher: Dispatcher) -> LogRing:
    """Return the log of a model's engines, or of one running engine by its name in the model's status: `a#3`.

    Raises ApiError.
    """
    if meant(name, dispatcher.config) is None:
        for running in dispatcher.running.values():
            if running.name == name:
                return running.log
    return dispatcher.log_of(model_of(name, dispatcher.config).alias)


@router.get("/v1/health/models")
@needs(Right.MANAGE)
async def model_health(request: Request) -> dict[str, Any]:
    """Engine of each model: uptime, whether it responds, and how the previous one ended."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    now = time.monotonic()
    health: dict[str, Any] = {}
    for alias, model in dispatcher.scheduler.models.items():
        running = dispatcher.front_of(alias)
        ended = dispatcher.exits.get(alias)
        if running is None and ended is None:
            continue
        ready_sec = running.ready_sec if running is not None else None
        latency_sec = running.probe_latency_sec if running is not None else None
        health[alias] = {
            "status": dispatcher.scheduler.state(alias),
            "healthy": running is not None and ready_sec is not None and running.failed_probes == 0,
            "uptime_sec": round(now - ready_sec, 1) if ready_sec is not None else None,
            "last_probe_ms": round(latency_sec * 1000, 1) if latency_sec is not None else None,
            "failed_probes": running.failed_probes if running is not None else 0,
            "crashes": dispatcher.crashes[alias],
            "restarts": dispatcher.restarts[alias],
            "last_error": dispatcher.in_full(alias, model.last_error) if model.last_error else None,
            "retry_in_sec": _left(max(model.retry_at_sec, model.failed_until_sec) - now),
            "last_exit": _exit(ended) if ended is not None else None,
        }
    return {"models": health}


def _left(seconds: float) -> float | None:
    return round(seconds, 1) if seconds > 0 else None


def _exit(ended: LastExit) -> dict[str, Any]:
    by_signal = ended.code is not None and ended.code < 0
    return {
        "reason": ended.reason,
        "at": ended.at,
        "wanted": ended.wanted,
        "code": ended.code if not by_signal else None,
        "signal": signal_name(ended.code) if ended.code is not None and by_signal else None,
        "out_of_memory": ended.out_of_memory,
        "log_tail": list(ended.log_tail),
    }


@router.get("/v1/queue/stats")
@needs(Right.USE)
async def queue_stats(
    request: Request,
    active_within: Annotated[
        float | None,
        Query(ge=0, description="Only models that have requests, or had one within so many seconds."),
    ] = None,
) -> Document:
    """Waiting and running requests per model; the first hundred waiting ones with the reason for their wait.

    The summary is always of all models.
    """
    dispatcher: Dispatcher = request.app.state.dispatcher
    models = dispatcher.scheduler.models
    shown = models.items()
    if active_within is not None:
        since = time.monotonic() - active_within
        shown = {alias: model for alias, model in shown if _is_active(model, since)}.items()
    per_model: dict[str, dict[str, Any]] = {}
    async for alias, model in in_turns(list(shown)):
        counts = dispatcher.counts[alias]
        in_flight = [request_id for engine in model.engines for request_id in engine.in_flight]
        per_model[alias] = {
            "queue_length": len(model.queue),
            "by_priority": {name: model.queue.count(priority) for priority, name in NAMES.items()},
            "total_requests": counts.submitted,
            "total_processed": counts.served,
            "total_rejected": counts.rejected,
            "current_processing": len(in_flight),
            "processing": in_flight,
            "waiting": [_waiting(wait, request) for wait in dispatcher.waits(alias, _MOST_SHOWN)],
        }
    all_counts = [dispatcher.counts[alias] for alias in models]
    engines = dispatcher.scheduler.engines.values()
    summary = {
        "total_queued": sum(len(model.queue) for model in models.values()),
        "total_processing": sum(len(engine.in_flight) for engine in engines),
        "total_processed": sum(counts.served for counts in all_counts),
        "total_rejected": sum(counts.rejected for counts in all_counts),
    }
    return Document({"summary": summary, "per_model": per_model})


def _is_active(model: Model, since: float) -> bool:
    return bool(model.queue) or model.last_used_sec >= since or any(engine.is_busy for engine in model.engines)


def _waiting(wait: Waiting, request: Request) -> dict[str, Any]:
    dispatcher: Dispatcher = request.app.state.dispatcher
    is_shown = sees_all(request) or wait.client == request.state.client.name
    return {
        "id": wait.id,
        "alias": wait.alias,
        "priority": NAMES[wait.priority],
        "client": (wait.client or None) if is_shown else None,
        "position": wait.position,
        "waited_sec": round(wait.waited_sec, 3),
        "expected_wait_sec": None if wait.expected_sec is None else round(wait.expected_sec, 2),
        "why": dispatcher.in_full(wait.alias, wait.why) if sees_all(request) else wait.why,
    }
