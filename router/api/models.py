"""Management of models: load, eject, reset and state, and the reload of the configuration."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from pydantic import AwareDatetime, BaseModel, Field
from starlette.responses import JSONResponse

from router import __version__
from router.api.kv import summary
from router.api.openai import show_model
from router.catalog.lookup import model_of
from router.config.problems import ConfigError, dotted
from router.config.resolved import DEFAULT_ENGINE, ModelConfig
from router.config.schema import System
from router.config.show import settings
from router.engines.llamacpp.flags import Flags
from router.engines.registry import KINDS
from router.engines.running import RunningEngine
from router.http.auth import sees_all
from router.http.documents import Document
from router.http.errors import ApiError, refused
from router.http.pages import Page, Right, needs
from router.kv.store import KvStore
from router.memory.ledger import Account
from router.observe.events import ServerState
from router.runtime.dispatcher import Dispatcher
from router.scheduling.messages import ModelState, Refusal
from router.scheduling.residency import Engine, Model
from router.scheduling.wait_reason import why
from router.system.devices import by_name
from router.system.privacy import shown_words
from router.system.readings import apart
from router.system.turns import in_turns

router = APIRouter(tags=["management"], route_class=Page)

_LONGEST_PIN_SEC = 366 * 86_400.0


class ModelName(BaseModel):
    model: str = Field(description="An alias.")


class LoadRequest(ModelName):
    wait: bool = Field(
        default=True,
        description="`true`: respond when the model is ready. `false`: respond at once, with the "
        "reason for the wait.",
    )


class ModelToLoad(ModelName):
    device: str | None = Field(
        default=None,
        description="`cpu` or `cuda` (any GPU). The model's configuration decides about the device, and a "
        "contradicting request is refused; the response names the device.",
    )


@router.post(
    "/v1/models/load",
    response_model=None,
    responses={
        202: {
            "description": "With `wait: false`: the model is waiting or loading, with the reason. Eject "
            "cancels the load."
        }
    },
)
@needs(Right.MANAGE)
async def load_model(body: LoadRequest, request: Request) -> JSONResponse:
    """Load a model now, making room if necessary; responds when it is ready, or at once with `wait: false`."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    alias = to_load(body.model, dispatcher)
    state = await dispatcher.load(alias) if body.wait else dispatcher.ask_to_load(alias)
    model = dispatcher.scheduler.models.get(alias)
    if state is None and model is not None:
        status = dispatcher.scheduler.state(alias) if model.engines else "waiting"
        reason = dispatcher.in_full(alias, why(model, time.monotonic()))
        return JSONResponse({"status": status, "model": alias, "message": reason}, 202)
    if state is not ModelState.READY:
        to_load(alias, dispatcher)  # raises if that is why
        reason = (model.last_error if model else None) or f"it is {state}"
        if model is not None and model.too_big:
            raise refused(Refusal.INSUFFICIENT_MEMORY, reason, None)
        reason = dispatcher.in_full(alias, reason)
        told = reason if reason.startswith(repr(alias)) else f"{alias!r} was not loaded: {reason}"
        raise refused(Refusal.MODEL_FAILED, told, 1)
    return JSONResponse({"status": "success", "model": alias, "message": f"{alias} is ready"})


def to_load(name: str, dispatcher: Dispatcher) -> str:
    """Return the model's own name. Raises ApiError for an unknown or removed model, and during shutdown."""
    if dispatcher.status is ServerState.SHUTTING_DOWN:
        raise ApiError(503, "shutting_down", "The router is shutting down.", retry_after_sec=5)
    return model_of(name, dispatcher.config).alias


@router.post(
    "/v1/models/eject", responses={404: {"description": "The model is unknown or not loaded: `not_found`."}}
)
@needs(Right.MANAGE)
async def eject_model(body: ModelName, request: Request) -> JSONResponse:
    """Unload a model once its requests in flight are done, or cancel a pending load."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    alias = model_of(body.model, dispatcher.config).alias
    model = dispatcher.scheduler.models[alias]
    if not model.engines and model.wanted_since_sec is not None:
        await dispatcher.eject(alias)
        answer = {"status": "success", "model_ejected": None, "message": f"{alias} is not to be loaded any more"}
        return JSONResponse(answer)
    if not model.engines:
        answer = {"status": "not_found", "model_ejected": None, "message": f"{alias} is not loaded"}
        return JSONResponse(answer, 404)
    await dispatcher.eject(alias)
    return JSONResponse({"status": "success", "model_ejected": alias, "message": f"{alias} was unloaded"})


@router.post("/v1/models")
@needs(Right.MANAGE)
async def load_and_show_model(body: ModelToLoad, request: Request) -> dict[str, Any]:
    """Load a model now; responds with its list entry and the devices that it uses."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    if body.device:
        _check_device(body.device, model_of(body.model, dispatcher.config), dispatcher)
    await load_model(LoadRequest(model=body.model), request)
    accounts = dispatcher.ledger.accounts_of(model_of(body.model, dispatcher.config).alias)
    devices = {device for account in accounts for device in account.booked()}
    return {**await show_model(body.model, request), "devices": [str(device) for device in sorted(devices)]}


def _check_device(device: str, model: ModelConfig, dispatcher: Dispatcher) -> None:
    """Raise ApiError 400 for a device on which the model will not run."""
    kind = device.partition(":")[0].lower()
    kept_off, how = False, "set system.gpu_devices to [], which keeps all models on the CPU"
    if model.engine == DEFAULT_ENGINE:
        flags = Flags(model.flags, model.env)
        chosen = flags.last("device")
        kept_off = flags.text("n-gpu-layers", "") == "0" or (chosen is not None and chosen.text == "none")
        how = "its flags have to say `-ngl 0`, which keeps it on the CPU"
    there = any(known.is_gpu for known in dispatcher.ledger.devices)
    if kind not in ("cpu", "cuda", "gpu", "auto"):
        problem = f"There is no device {device!r}: name `cpu` or `cuda`, or leave it out"
    elif kind in ("cuda", "gpu") and not there:
        problem = f"{model.alias!r} cannot be loaded on {device!r}: the router uses no GPU here"
    elif kind in ("cuda", "gpu") and kept_off:
        problem = f"{model.alias!r} cannot be loaded on {device!r}: its flags keep it off the GPUs"
    elif kind == "cpu" and there and not kept_off:
        problem = f"{model.alias!r} would take a GPU: {how}"
    else:
        return
    raise ApiError(400, "not_supported", f"{problem}.", "device")


@router.delete("/v1/models/{alias:path}", responses={404: {"description": "The model is unknown or not loaded."}})
@needs(Right.MANAGE)
async def unload_model(alias: str, request: Request) -> JSONResponse:
    """Unload a model like `/v1/models/eject`; its files are kept."""
    return await eject_model(ModelName(model=alias), request)


@router.post("/v1/models/{alias:path}/reset")
@needs(Right.MANAGE)
async def reset_model(alias: str, request: Request) -> dict[str, Any]:
    """Clear the failures of a model, so that it may be loaded again at once."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    alias = model_of(alias, dispatcher.config).alias
    previous = _error(dispatcher, alias, full=True)
    dispatcher.reset(alias)
    return {"status": "success", "model": alias, "message": "may be loaded again", "previous_error": previous}


@router.get("/v1/models/found")
@needs(Right.MANAGE)
async def found_models(request: Request) -> dict[str, Any]:
    """Folders that are scanned for models, and what was found there but is not served, with the reason."""
    config = request.app.state.dispatcher.config
    return {
        "folders": [{"path": path, "source": source} for path, source in config.scanned],
        "not_served": [
            {"what": each.what, "source": each.source, "reason": each.reason} for each in config.unserved
        ],
    }


class Keep(BaseModel):
    until: AwareDatetime | None = Field(default=None, description="Time with its zone, in ISO 8601.")
    for_sec: float | None = Field(default=None, gt=0, le=_LONGEST_PIN_SEC)

    def seconds(self) -> float | None:
        """Return for how long the model is to be pinned; None: as configured. Raises ApiError 400."""
        if self.until is None:
            return self.for_sec
        if self.for_sec is not None:
            raise ApiError(400, "invalid_request", "Send either `until` or `for_sec`.", "for_sec")
        left_sec = self.until.timestamp() - time.time()
        if not 0 < left_sec <= _LONGEST_PIN_SEC:
            raise ApiError(400, "invalid_request", f"`until` is over, or too far away: {self.until}.", "until")
        return left_sec


@router.post("/v1/models/{alias:path}/keep")
@needs(Right.MANAGE)
async def keep_model(alias: str, body: Keep, request: Request) -> dict[str, Any]:
    """Pin a model for a while: it is neither unloaded when idle nor to make room, and replaced if its engine dies.

    Loads nothing: a model that is not loaded is pinned once it is. Without a time, its entry decides again, as it
    does after an eject by hand, and after a restart of the router.
    """
    dispatcher: Dispatcher = request.app.state.dispatcher
    alias = model_of(alias, dispatcher.config).alias
    dispatcher.pin(alias, body.seconds())
    model = dispatcher.scheduler.models[alias]
    until = pinned_until(model)
    message = f"is pinned until {until}" if until is not None else "is unloaded when idle, and to make room"
    if dispatcher.config.models[alias].pinned:
        message = "is pinned by its entry, at all times"
    said = {"status": "success", "model": alias, "message": f"{alias} {message}"}
    return {**said, "pinned": model.spec.pinned, "pinned_until": until}


def pinned_until(model: Model) -> str | None:
    """Return when an operator's pin ends; None if there is none, or the model's entry pins it anyway."""
    return _wall(model.pinned_until_sec) if model.unpinned is not None and model.pinned_until_sec else None


@router.get("/v1/models/failed")
@needs(Right.USE)
async def failed_models(request: Request) -> dict[str, Any]:
    """Models in cooldown after failed loads or crashes."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    scheduler = dispatcher.scheduler
    return {
        "failed_models": [
            {"model": alias, "attempts": model.tries, "error": _error(dispatcher, alias, full=sees_all(request))}
            for alias, model in scheduler.models.items()
            if scheduler.state(alias) is ModelState.FAILED
        ]
    }


@router.get("/v1/models/status")
@needs(Right.USE)
async def all_status(request: Request) -> Document:
    """State of every model."""
    return Document(await _status_in_turns(request))


@router.get("/status")
@needs(Right.USE)
async def diagnostics(request: Request) -> Document:
    """State of every model, with the engine, what is installed of each kind, the limit on resident models, failed
    models, and the effective values of the environment variables of earlier hosts."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    system, scheduler = dispatcher.config.system, dispatcher.scheduler
    kv_store: KvStore = request.app.state.kv_store
    told = {
        **await _status_in_turns(request),
        "engine": dispatcher.backend.name,
        "engines": await apart(partial(_engines, system, full=sees_all(request))),
        "cache": {
            "limit": system.max_concurrent_models,
            "models": [alias for alias, model in scheduler.models.items() if model.engines],
        },
        **await failed_models(request),
        "variables": {
            "MAX_CACHE_MODELS": system.max_concurrent_models,
            "MODEL_LOAD_COOLDOWN": system.model_load_cooldown_sec,
            "MODEL_Q4_THRESHOLD_BYTES": system.q4_threshold_bytes,
            "ALLOWED_MODELS_JSON": system.allowed_models,
        },
    }
    if sees_all(request):
        told["kv_store"] = summary(kv_store)
    return Document(told)


def _engines(system: System, *, full: bool) -> dict[str, Any]:
    """Return what is installed of each kind of engine; without paths to clients that do not see all. Blocking."""
    found = {name: kind.installed(system) for name, kind in KINDS.items()}
    return {
        name: {"can_run": not each.problem, **({} if not full else each._asdict())} for name, each in found.items()
    }


@router.get("/v1/models/{alias:path}/status")
@router.get("/status/{alias:path}")
@needs(Right.USE)
async def model_status(alias: str, request: Request) -> dict[str, Any]:
    """State of one model; for full keys with `command`, the command line of its engine: the one that runs, or what
    is known of it before its start."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    model = model_of(alias, dispatcher.config)
    status = {"model": model.alias, **status_of(dispatcher, model.alias, full=sees_all(request))}
    if sees_all(request):
        running = dispatcher.front_of(model.alias)
        command = dispatcher.backend_of(model).command(model) if running is None else running.handle.command
        status["command"] = shown_words(command)
    return status


@router.post("/v1/config/reload")
@needs(Right.MANAGE)
async def reload_config(request: Request) -> dict[str, Any]:
    """Reload the configuration file; a file with errors changes nothing."""
    try:
        changes: dict[str, Any] = await request.app.state.reload()
        return changes
    except ConfigError as error:
        problems = str(error)
        raise ApiError(400, "invalid_config", f"Nothing was changed. {problems}") from None


@router.get("/v1/config")
@needs(Right.MANAGE)
async def show_config(request: Request) -> dict[str, Any]:
    """The router's version and the settings in force, as text, except those of models. Keys are not shown."""
    config = request.app.state.dispatcher.config
    return {"version": __version__, "values": {dotted(path): text for path, text in settings(config)}}


async def _status_in_turns(request: Request) -> dict[str, Any]:
    dispatcher: Dispatcher = request.app.state.dispatcher
    known, full = dispatcher.scheduler.models, sees_all(request)
    aliases = in_turns(dispatcher.config.models)
    return _with_summary(
        dispatcher, {alias: status_of(dispatcher, alias, full=full) async for alias in aliases if alias in known}
    )


def status_of_all(dispatcher: Dispatcher, *, full: bool) -> dict[str, Any]:
    """Return the state of all models at one moment."""
    models = {alias: status_of(dispatcher, alias, full=full) for alias in dispatcher.config.models}
    return _with_summary(dispatcher, models)


def _with_summary(dispatcher: Dispatcher, models: dict[str, Any]) -> dict[str, Any]:
    by_status = {state: sum(m["status"] == state for m in models.values()) for state in ModelState}
    return {
        "server": {"status": dispatcher.status, "started_at": iso(dispatcher.started_at)},
        "models": models,
        "summary": {"total": len(models), "by_status": by_status, **by_status},
    }


def _error(dispatcher: Dispatcher, alias: str, *, full: bool) -> str | None:
    error = dispatcher.scheduler.models[alias].last_error
    return dispatcher.in_full(alias, error) if error is not None and full else error


def status_of(dispatcher: Dispatcher, alias: str, *, full: bool) -> dict[str, Any]:
    """Return the state of one model. `full`: with details for clients with full access."""
    scheduler = dispatcher.scheduler
    model = scheduler.models[alias]
    engines = [_engine(dispatcher, engine, full=full) for engine in model.engines]
    engine, running = model.front, dispatcher.front_of(alias)
    state = scheduler.state(alias)
    account = dispatcher.ledger.accounts.get(engine.id) if engine is not None else None
    vram_mib = sum(each["vram_used_mb"] for each in engines)
    progress = running.handle.load_progress if running is not None else None
    fraction = progress.value if progress is not None else 0
    unload_at_sec = scheduler.unload_at_sec(alias)
    first = model.queue.head()
    waiting: str | None = None
    if first is not None or model.wants_engine:
        waiting = why(model, time.monotonic(), slotless=first is not None and first.slotless)
    shown = running if full else None
    facts = running.facts if running is not None else None
    return {
        "alias": alias,
        "source": dispatcher.config.models[alias].source if alias in dispatcher.config.models else None,
        "status": state,
        "port": shown.handle.endpoint.port if shown is not None else None,
        "pid": shown.pid if shown is not None else None,
        "started_at": _wall(engine.started_sec) if engine is not None else None,
        "last_used_at": _wall(model.last_used_sec),
        "unload_at": _wall(unload_at_sec) if unload_at_sec is not None else None,
        "load_progress": 100 if state in (ModelState.READY, ModelState.DRAINING) else round(100 * fraction),
        "load": _load(model, running) if state is ModelState.LOADING else None,
        "load_sec": round(model.load_sec, 3) if model.load_is_known else None,
        "sleep": _sleep(dispatcher, model),
        "error_message": _error(dispatcher, alias, full=full),
        "vram_used_mb": vram_mib,
        "vram_mb": vram_mib,  # its name in an earlier router
        "memory": memory(account) if account is not None else None,
        "engine": _kind_of(dispatcher, alias),
        "engine_reason": _engine_reason(dispatcher, alias) if full else None,
        "fallback": dispatcher.fallback_of(alias),
        "slots": model.spec.slots,
        "context_length": facts.context if facts is not None else None,
        "in_flight": sum(each["in_flight"] for each in engines),
        "slotless": sum(each["slotless"] for each in engines),
        "waiting": len(model.queue),
        "load_asked_at": _wall(model.wanted_since_sec) if model.wanted_since_sec is not None else None,
        "why_waiting": dispatcher.in_full(alias, waiting) if waiting is not None and full else waiting,
        "pinned": model.spec.pinned,
        "pinned_until": pinned_until(model),
        "engines": engines,
        "updated_at": iso(time.time()),
    }


def _engine(dispatcher: Dispatcher, engine: Engine, *, full: bool) -> dict[str, Any]:
    """Return the state of one of a model's engines. The model's own fields are about its front engine."""
    running = dispatcher.running.get(engine.id) if full else None
    account = dispatcher.ledger.accounts.get(engine.id)
    return {
        "name": engine.name,
        "status": engine.state.value,
        "port": running.handle.endpoint.port if running is not None else None,
        "pid": running.pid if running is not None else None,
        "started_at": _wall(engine.started_sec),
        "slots": engine.spec.slots,
        "in_flight": len(engine.in_flight),
        "slotless": len(engine.slotless),
        "served": engine.served,
        "vram_used_mb": account.main_mib if account is not None else 0,
    }


def _kind_of(dispatcher: Dispatcher, alias: str) -> str | None:
    """Return the kind of a model's engine; None for a model that is not configured any more."""
    model = dispatcher.config.models.get(alias)
    return dispatcher.backend_of(model).name if model is not None else None


def _engine_reason(dispatcher: Dispatcher, alias: str) -> str | None:
    """Return why a model runs on its kind of engine; None if its entry names it, or there is no choice."""
    model = dispatcher.config.models.get(alias)
    return (model.chosen_because or None) if model is not None else None


def _sleep(dispatcher: Dispatcher, model: Model) -> dict[str, Any] | None:
    """Return what is known of the sleep of a model's engine; None if it has none, or is not to sleep."""
    problem = dispatcher.sleep_problem_of(model.spec.alias)
    if problem is None and all(engine.asleep is None for engine in model.engines):
        return None
    return {"wake_sec": None if model.wake_sec is None else round(model.wake_sec, 3), "problem": problem}


def _load(model: Model, running: RunningEngine | None) -> dict[str, Any]:
    """Return the progress of a load as its engine reports it, and the duration of the last load, or a guess."""
    engine = model.front
    progress = running.handle.load_progress if running is not None else None
    return {
        "stage": progress.stage if progress is not None else None,
        "fraction": progress.value if progress is not None else None,
        "elapsed_sec": round(time.monotonic() - engine.started_sec, 2) if engine is not None else 0.0,
        "expected_sec": round(model.comes_sec, 2),
    }


def memory(account: Account) -> dict[str, Any]:
    """Return an engine's devices, its memory in MiB on each, and the source of these figures."""
    chosen = account.chosen
    return {
        "source": chosen.size.source,
        "gpus": [str(gpu) for gpu in chosen.gpus],
        "estimated_mb": by_name(chosen.placement),
        "asleep_mb": by_name(chosen.asleep) if chosen.asleep is not None else None,
        "measured_mb": by_name(account.measured) or None,
        "booked_mb": by_name(account.booked()),
        "context": chosen.context,
        "added_flags": list(chosen.flags),
        "remark": chosen.remark or None,
    }


def iso(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="milliseconds")


def _wall(monotonic_sec: float) -> str | None:
    """Return a time of the scheduler's clock as wall-clock time; None for minus infinity."""
    if monotonic_sec == float("-inf"):
        return None
    return iso(time.time() - (time.monotonic() - monotonic_sec))
