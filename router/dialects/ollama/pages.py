"""Ollama's API except for the calls that engines answer (`exchange.py`) and those that create models
(`create.py`): lists, states, pulls.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from router.catalog.cards import Card, Cards, as_it_runs, card_of
from router.catalog.library import Library
from router.catalog.lookup import known_as
from router.config.names import listed_name
from router.config.resolved import AliasConfig, Config, ModelConfig
from router.engines.base import Facts
from router.engines.llamacpp.flags import FlagError
from router.engines.registry import kind_of
from router.formats.gguf_cursor import GGUFError
from router.formats.modelfile import parameter_lines
from router.formats.ollama_options import as_options, option_lines
from router.http.auth import sees_all
from router.http.documents import NAMES_A_MODEL, Document, read_body
from router.http.errors import ApiError
from router.http.pages import Page, Right, needs
from router.runtime.dispatcher import Dispatcher
from router.scheduling.messages import ModelState
from router.scheduling.residency import total
from router.store.created import Created
from router.store.creations import Creations
from router.store.downloads import Pull
from router.store.progress import Progress
from router.system.readings import apart
from router.system.turns import in_turns

router = APIRouter(tags=["Ollama"], route_class=Page)

API_VERSION = "0.32.1"
"""The version of Ollama's API that is supported. Clients compare it with the one that they need."""

_FOR_EVER = timedelta(days=365 * 200)
"""Expiry of models that stay loaded: Ollama, too, reports one that is centuries away."""


class _Named(msgspec.Struct):
    model: str | None = None
    name: str | None = None
    """Older name of `model`."""
    stream: bool | None = None


@router.get("/api/version")
@needs(Right.USE)
async def version() -> dict[str, str]:
    """Version of Ollama's API that the router supports."""
    return {"version": API_VERSION}


@router.get("/api/tags")
@needs(Right.USE)
async def tags(request: Request) -> Document:
    """All models and aliases, loaded or not."""
    config: Config = request.app.state.dispatcher.config
    names = [_known(name, request, config) async for name in in_turns(config.names)]
    return Document({"models": await _listed(names, request)})


@router.get("/api/ps")
@needs(Right.USE)
async def running(request: Request) -> dict[str, Any]:
    """Loaded models, in descending order of their expiry."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    state = dispatcher.scheduler.state
    models = dispatcher.config.models
    loaded = [model for alias, model in models.items() if state(alias) in (ModelState.READY, ModelState.DRAINING)]
    states = [_residency(dispatcher, model.alias) for model in loaded]
    entries = await _listed([_known(model.alias, request) for model in loaded], request)
    entries = [{**entry, **state} for entry, state in zip(entries, states, strict=True)]
    return {"models": sorted(entries, key=lambda entry: str(entry["expires_at"]), reverse=True)}


@router.post("/api/show", openapi_extra=NAMES_A_MODEL, responses={500: {}})
@needs(Right.USE)
async def show(request: Request) -> dict[str, Any]:
    """Details of one model from its file and its alias; system prompts require a key with full access."""
    asked = await _named(request)
    known, full = _known(asked.model or "", request), sees_all(request)
    cards: Cards = request.app.state.cards
    if not await cards.answers(known.model):
        where = str(known.model.model_path.parent) if full else f"The folder of {known.name!r}"
        raise ApiError(500, "model_failed", f"{where} does not respond; is its disk connected?")
    try:
        facts = request.app.state.dispatcher.facts_of(known.model.alias)
        return await apart(lambda: _described(known, facts, full=full))
    except (OSError, GGUFError, FlagError) as error:
        reason = f": {error}" if full else "."
        raise ApiError(500, "model_failed", f"{known.name!r} cannot be read{reason}") from None


@router.post("/api/pull", response_model=None, openapi_extra=NAMES_A_MODEL, responses={409: {}, 429: {}, 500: {}})
@needs(Right.MANAGE)
async def pull(request: Request) -> Response:
    """Pull a model from the Hugging Face hub, or join a pull in progress."""
    asked = await _named(request)
    library: Library = request.app.state.library
    wanted = library.pull(asked.model or "")
    if asked.stream is not False:
        return StreamingResponse(_lines(wanted), media_type="application/x-ndjson")
    async for _ in wanted.follow():
        pass
    if wanted.progress.status != "success":
        raise ApiError(500, "pull_failed", _problem(wanted.progress))
    return JSONResponse({"status": "success"})


@router.delete(
    "/api/delete", response_model=None, openapi_extra=NAMES_A_MODEL, responses={404: {}, 409: {}, 500: {}}
)
@needs(Right.MANAGE)
async def delete(request: Request) -> Response:
    """Remove a pulled or created model and the files that only it uses."""
    asked = await _named(request)
    library: Library = request.app.state.library
    await library.remove(asked.model or "")
    return Response()


@router.post("/api/push", responses={501: {}})
@needs(Right.MANAGE)
async def push() -> None:
    """Not supported: the router has no registry to push to."""
    raise ApiError(501, "not_supported", "not supported here: upload models with the hub's own tools (hf upload)")


async def _named(request: Request) -> _Named:
    asked = await read_body(request, _Named)
    asked.model = asked.model or asked.name
    if not asked.model:
        raise ApiError(400, "model_required", "model is required", "model")
    return asked


# --- models ---------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """The model that a name stands for."""

    model: ModelConfig
    named: AliasConfig | None = None
    """The alias, if the name is one."""
    made: Created | None = None
    """Its description, if it was created here."""

    @property
    def name(self) -> str:
        return self.model.alias if self.named is None else self.named.alias

    def modified_at(self, card: Card) -> str:
        return _moment(card["created"] if self.made is None else self.made.created_at)


def _known(name: str, request: Request, config: Config | None = None) -> _Known:
    """Resolve a name, by the current configuration unless one is given. Raises ApiError 404."""
    config = config or request.app.state.dispatcher.config
    creations: Creations = request.app.state.library.creations
    alias = known_as(name, config)
    return _Known(config.model_of(alias), config.aliases.get(alias), creations.named(alias, config))


async def _listed(names: list[_Known], request: Request) -> list[dict[str, Any]]:
    cards: Cards = request.app.state.cards
    dispatcher: Dispatcher = request.app.state.dispatcher
    found = await cards.of(known.model for known in names)
    models = {alias: as_it_runs(card, dispatcher.facts_of(alias)) async for alias, card in in_turns(found.items())}
    return [_entry(known, models[known.model.alias]) async for known in in_turns(names)]


def _entry(known: _Known, card: Card) -> dict[str, Any]:
    name = listed_name(known.name)
    return {
        "name": name,
        "model": name,
        "modified_at": known.modified_at(card),
        "size": card.get("size", 0),
        "digest": hashlib.sha256(_identity(known, card)).hexdigest(),
        "details": _details(known, card),
        "capabilities": card.get("capabilities", []),
        "context_length": card.get("context_length"),
    }


def _identity(known: _Known, card: Card) -> bytes:
    """Return the same bytes for names that behave alike."""
    named = known.named
    changes = () if named is None or not named.rewrites else replace(named, alias="", description="", source="")
    return f"{known.model.model_path} {known.model.flags} {card['created']} {changes}".encode()


def _details(known: _Known, card: Card) -> dict[str, Any]:
    meta = card.get("meta", {})
    family = card.get("family") or ""
    return {
        "parent_model": known.model.alias if known.name != known.model.alias else "",
        "format": kind_of(known.model).file_format,
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _short(card.get("parameters", 0)),
        "quantization_level": card.get("quantization") or "unknown",
        "context_length": meta.get("n_ctx_train"),
        "embedding_length": meta.get("n_embd"),
    }


def _residency(dispatcher: Dispatcher, alias: str) -> dict[str, Any]:
    accounts = dispatcher.ledger.accounts_of(alias)
    booked = total(account.booked() for account in accounts)
    unload_at_sec = dispatcher.scheduler.unload_at_sec(alias)
    left = _FOR_EVER if unload_at_sec is None else timedelta(seconds=unload_at_sec - time.monotonic())
    return {
        "size": sum(booked.values()) << 20,
        "size_vram": sum(mib for device, mib in booked.items() if device.is_gpu) << 20,
        "expires_at": (datetime.now(timezone.utc) + left).isoformat(),
    }


def _described(known: _Known, facts: Facts | None, *, full: bool) -> dict[str, Any]:
    info = kind_of(known.model).file_info(known.model)
    card = as_it_runs(card_of(known.model), facts)
    context = card.get("context_length")
    named = known.named or AliasConfig(known.name, known.name)
    if not full:
        named = replace(named, system_prompt="", messages=())
    options = {**({"num_ctx": context} if context else {}), **as_options({**named.defaults, **named.forced})}
    licenses = known.made.license if known.made is not None else ()
    shown = {
        "modelfile": _modelfile(known.model.alias, named, options),
        "parameters": "\n".join(option_lines(options)),
        "template": info.template,
        "system": named.system_prompt,
        "messages": list(named.messages),
        "license": "\n".join(licenses) or info.license,
        "modified_at": known.modified_at(card),
        "details": _details(known, card),
        "model_info": info.metadata,
        "projector_info": info.projector,
        "capabilities": card.get("capabilities", []),
    }
    return {key: value for key, value in shown.items() if value or key not in _ONLY_IF_THERE}


_ONLY_IF_THERE = ("system", "messages", "projector_info")


def _modelfile(model: str, named: AliasConfig, options: dict[str, Any]) -> str:
    """Return a Modelfile from which `ollama create` makes the same model here."""
    lines = ["# Served by llama-router.", f"FROM {model}"]
    if named.system_prompt:
        lines.append(f'SYSTEM """{named.system_prompt}"""')
    lines += [f"PARAMETER {line}" for line in parameter_lines(options)]
    lines += [f'MESSAGE {turn["role"]} """{turn["content"]}"""' for turn in named.messages]
    return "\n".join(lines) + "\n"


def _short(count: int) -> str:
    """Format a number of parameters: `8.0B`, `135M`."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}" if letter == "B" else f"{count / size:.0f}{letter}"
    return str(count)


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).isoformat()


# --- pulls ----------------------------------------------------------------------------------------------


async def _lines(wanted: Pull) -> AsyncIterator[bytes]:
    """Yield the progress in Ollama's format. A pull goes on without its client, as others may wait for it."""
    yield _line(status="pulling manifest")
    async for progress in wanted.follow():
        for file in progress.files:
            if progress.status == "downloading":
                yield _line(
                    status=f"pulling {file.path}",
                    digest=file.path,
                    total=file.total_bytes,
                    completed=file.completed_bytes,
                )
    if wanted.progress.status == "success":
        yield _line(status="verifying sha256 digest")
        yield _line(status="writing manifest")
        yield _line(status="success")
    else:
        yield _line(error=_problem(wanted.progress))


def _problem(progress: Progress) -> str:
    return progress.error.message if progress.error is not None else f"the pull was {progress.status}"


def _line(**fields: Any) -> bytes:
    return msgspec.json.encode(fields) + b"\n"
