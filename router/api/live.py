"""Event streams: changes of models' states, and figures every two seconds.

Events are encoded once, when they happen, so that clients who reconnect get them as they were.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import anyio
from fastapi import APIRouter, Request
from sse_starlette import ServerSentEvent

from router.api.models import iso, status_of, status_of_all
from router.api.monitoring import READING_SEC
from router.api.openai import further_names, loading_status
from router.api.streams import EventStream, Feed, Shared, frame, unnamed
from router.http.auth import sees_all
from router.http.pages import Page, Right, needs
from router.observe.events import LoadMoved, ModelChanged, ModelsListed, RequestsDone, ServerChanged, ServerState
from router.runtime.dispatcher import Dispatcher
from router.scheduling.messages import ModelState, Refusal
from router.system.readings import Reading

router = APIRouter(tags=["monitoring"], route_class=Page)

_KEEP_ALIVE_SEC = 30
_FIGURES_SEC = 2.0
_KEPT_EVENTS = 1000
_KEPT_DECISIONS = 200


class Live:
    """Streams of model-state events and periodic metrics. Create it on the router's event loop."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.run = f"{int(dispatcher.started_at * 1000):x}"
        """Prefix of event ids, which differs between runs of the router."""
        self.states = {full: Feed(partial(self._status_of_all, full), _KEPT_EVENTS) for full in (True, False)}
        """The streams for full access (`True`) and for other clients: the same events in more or less detail."""
        self.decisions: dict[bool, deque[dict[str, Any]]] = {
            full: deque(maxlen=_KEPT_DECISIONS) for full in (True, False)
        }
        """The last changes of states, oldest first, including removed models; and displaced requests."""
        self._displaced: tuple[dict[str, Any] | None, int] = (None, 0)
        """The last decision about displaced requests, and their number."""
        self.as_llama_server = Feed(lambda: unnamed({"model": "*", "event": "models_reload"}), _KEPT_EVENTS)
        """The same events in the format of llama-server's router mode."""
        self.figures = Shared(lambda: frame("metrics", figures(dispatcher)))
        self.ending = asyncio.Event()
        """Set once the router shuts down."""
        dispatcher.events.listen(ModelChanged, self._model_changed)
        dispatcher.events.listen(LoadMoved, self._load_moved)
        dispatcher.events.listen(ModelsListed, self._models_listed)
        dispatcher.events.listen(ServerChanged, self._server_changed)
        dispatcher.events.listen(RequestsDone, self._requests_done)

    def number_of(self, event_id: str) -> int | None:
        """Return the number of the event with this id; None for an id of another run."""
        run, _, number = event_id.partition("-")
        return int(number) if run == self.run and number.isdecimal() and len(number) < 20 else None

    def _model_changed(self, change: ModelChanged) -> None:
        is_here = change.alias in self._dispatcher.scheduler.models
        reasons = {True: change.reason, False: change.told}
        self._decided(change.alias, change.state, reasons, change.at, is_event=is_here)
        if is_here:
            for full, reason in reasons.items():
                news = {"status": change.state, "reason": reason}
                self._send(full, "model_update", {**self._status(change.alias, full), **news})
            if change.state not in (ModelState.DRAINING, ModelState.STOPPING):  # still loaded
                self._tell_as_llama_server(change.alias, change.state)

    def _load_moved(self, load: LoadMoved) -> None:
        if load.alias not in self._dispatcher.scheduler.models:
            return
        if any(states.followers for states in self.states.values()):
            for full in self.states:
                self._send(full, "model_update", self._status(load.alias, full))
        if self._dispatcher.scheduler.state(load.alias) is ModelState.LOADING:
            self._tell_as_llama_server(load.alias, ModelState.LOADING)

    def _models_listed(self, _: ModelsListed) -> None:
        for states in self.states.values():
            states.start_anew()
        self.as_llama_server.start_anew()

    def _server_changed(self, change: ServerChanged) -> None:
        ends = change.status is ServerState.SHUTTING_DOWN
        self._decided(None, change.status, dict.fromkeys(self.states, ""), change.at, is_event=True)
        for full in self.states:
            self._send(full, "server_update", {"status": change.status, "at": iso(change.at)}, last=ends)
        if ends:
            self.as_llama_server.end()
            self.ending.set()

    def _requests_done(self, happening: RequestsDone) -> None:
        for labels, requests in happening.by_labels.items():
            if labels.outcome == Refusal.DISPLACED:
                self._tell_of_displaced(labels.alias, len(requests), requests[-1].at)

    def _tell_of_displaced(self, alias: str, count: int, at: float) -> None:
        """Report displaced requests in one decision until something else happens: there may be thousands."""
        last, before = self._displaced
        known = self.decisions[True]
        if known and known[-1] is last and last["model"] == alias:
            count += before
            for decisions in self.decisions.values():
                decisions.pop()
        requests = "1 request that waited" if count == 1 else f"{count} requests that waited"
        reason = f"{requests} gave way to others of a higher priority, for whom there was no room"
        self._decided(alias, Refusal.DISPLACED.value, dict.fromkeys(self.decisions, reason), at, is_event=False)
        self._displaced = known[-1], count

    def _decided(
        self, alias: str | None, state: str, reasons: dict[bool, str], at: float, *, is_event: bool
    ) -> None:
        """Record a decision. `is_event`: the next event to be sent is about it."""
        last = self.states[True].last
        identity = self._identity(last + 1) if is_event else f"{self._identity(last)}-{alias}"
        for full, reason in reasons.items():
            told = {"id": identity, "model": alias, "status": state, "reason": reason, "at": iso(at)}
            self.decisions[full].append(told)

    def _send(self, full: bool, name: str, document: dict[str, Any], *, last: bool = False) -> None:
        states = self.states[full]
        states.send(frame(name, document, self._identity(states.last + 1)), last=last)

    def _tell_as_llama_server(self, alias: str, state: ModelState) -> None:
        """Report a state under each of the model's names, as each has an entry of its own in lists."""
        feed, dispatcher = self.as_llama_server, self._dispatcher
        if not feed.followers:
            return
        status = loading_status(dispatcher, alias, state)
        data: dict[str, Any] = {"status": status["value"]}
        if state is ModelState.LOADING and (progress := _progress(dispatcher, alias)) is not None:
            data["progress"] = progress
        elif state in (ModelState.OFF, ModelState.FAILED):
            data["exit_code"] = status.get("exit_code", 0)
        names = [alias, *further_names(dispatcher.config).get(alias, ())]
        for name in names:
            feed.send(unnamed({"model": name, "event": "status_change", "data": data}))

    def _status_of_all(self, full: bool) -> bytes:
        status = status_of_all(self._dispatcher, full=full)
        return frame("full_status", status, self._identity(self.states[full].last))

    def _status(self, alias: str, full: bool) -> dict[str, Any]:
        return status_of(self._dispatcher, alias, full=full)

    def _identity(self, number: int) -> str:
        return f"{self.run}-{number}"


@router.get("/v1/decisions")
@needs(Right.USE)
async def decisions(request: Request) -> dict[str, Any]:
    """Most recent state changes of models and of the router, oldest first, each with its reason.

    `id` is that of the event in `/v1/models/status/stream`, if there was one. `model` is null for the router.
    """
    live: Live = request.app.state.live
    return {"decisions": list(live.decisions[sees_all(request)])}


def _progress(dispatcher: Dispatcher, alias: str) -> dict[str, Any] | None:
    """Return the progress of a load, if its engine reports it."""
    running = dispatcher.front_of(alias)
    progress = running.handle.load_progress if running is not None else None
    if progress is None or progress.stage is None:
        return None
    return {"stages": progress.stages or [progress.stage], "current": progress.stage, "value": progress.value}


@router.get("/models/sse")
@needs(Right.USE)
async def models_sse(request: Request) -> EventStream:
    """SSE like llama-server's in router mode: `status_change` of models, `models_reload` when the list changes.

    The first event is `models_reload`, so that reconnecting clients read the list again.
    """
    live: Live = request.app.state.live
    return EventStream(live.as_llama_server.follow(None), ping=_KEEP_ALIVE_SEC)


@router.get("/v1/models/status/stream")
@needs(Right.USE)
async def status_stream(request: Request) -> EventStream:
    """SSE: `full_status` first, then `model_update` and `server_update` on changes.

    A client that reconnects with `Last-Event-ID` gets the missed events instead, if they are still stored.
    """
    live: Live = request.app.state.live
    seen = live.number_of(request.headers.get("last-event-id", ""))
    states = live.states[sees_all(request)]
    return EventStream(states.follow(seen), ping=_KEEP_ALIVE_SEC, ping_message_factory=_heartbeat)


def _heartbeat() -> ServerSentEvent:
    return ServerSentEvent(f'{{"timestamp":"{iso(time.time())}"}}', event="heartbeat")


@router.get("/metrics/stream")
@needs(Right.USE)
async def metrics_stream(request: Request) -> EventStream:
    """SSE: `metrics` every two seconds, `shutdown` at the end."""
    return EventStream(_figures(request.app.state.dispatcher, request.app.state.live))


async def _figures(dispatcher: Dispatcher, live: Live) -> AsyncIterator[bytes]:
    while not live.ending.is_set():
        if not live.figures.is_fresh:
            await dispatcher.devices.read(READING_SEC)
        yield live.figures.get()
        with anyio.move_on_after(_FIGURES_SEC):
            await live.ending.wait()
    yield frame("shutdown", {})


def figures(dispatcher: Dispatcher) -> dict[str, Any]:
    """Return the state of devices, models and requests in a few numbers."""
    scheduler = dispatcher.scheduler
    models: dict[str, dict[str, Any]] = {}
    for alias, model in scheduler.models.items():
        accounts = [a for engine in model.engines if (a := dispatcher.ledger.accounts.get(engine.id)) is not None]
        models[alias] = {
            "status": scheduler.state(alias),
            "queue_length": len(model.queue),
            "active_requests": sum(engine.load for engine in model.engines),
            "vram_used_mb": sum(account.main_mib for account in accounts),
        }
    counts = dispatcher.counts.values()
    return {
        "timestamp": time.time(),
        "server": {
            "status": dispatcher.status,
            "uptime_seconds": round(dispatcher.uptime_sec, 1),
        },
        "gpu": _gpu(dispatcher.devices.last.gpus),
        "models": models,
        "totals": {
            "requests": sum(count.submitted for count in counts),
            "processed": sum(count.served for count in counts),
            "rejected": sum(count.rejected for count in counts),
            "queued": sum(model["queue_length"] for model in models.values()),
            "active": sum(model["active_requests"] for model in models.values()),
        },
    }


def _gpu(gpus: Sequence[Reading]) -> dict[str, Any]:
    """Return the sums of all GPUs, as they were read last."""
    total, free = sum(gpu.total_mib for gpu in gpus), sum(gpu.free_mib for gpu in gpus)
    busy = [gpu.utilization for gpu in gpus if gpu.utilization is not None]
    return {
        "vram_total_mb": total,
        "vram_used_mb": total - free,
        "vram_free_mb": free,
        "vram_used_percent": round(100 * (total - free) / total, 1) if total else 0.0,
        "utilization_percent": round(100 * sum(busy) / len(busy), 1) if busy else None,
    }
