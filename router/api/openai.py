"""`/v1/models`: available models, with what is known of each without loading it.

An entry ("card") has OpenAI's fields, and those of llama-server in router mode: its clients read `status`,
`architecture`, `meta` and `aliases`. The router's own state of a model is `state`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from router.catalog.cards import Card, Cards, as_it_runs
from router.catalog.lookup import known_as
from router.config.resolved import AliasConfig, Config, ModelConfig
from router.config.source import Source
from router.http.documents import Document
from router.http.pages import Page, Right, needs
from router.runtime.dispatcher import Dispatcher
from router.scheduling.messages import ModelState
from router.system.turns import in_turns

router = APIRouter(tags=["models"], route_class=Page)

_VALUES = {
    ModelState.OFF: "unloaded",
    ModelState.LOADING: "loading",
    ModelState.READY: "loaded",
    ModelState.DRAINING: "loaded",
    ModelState.ASLEEP: "sleeping",
    ModelState.STOPPING: "unloaded",
    ModelState.FAILED: "failed",
}
"""llama-server's name of each state."""
_REMOVABLE = (Source.PULLED, Source.CREATED)


@router.get("/v1/models")
@needs(Right.USE)
async def list_models(request: Request) -> Document:
    """All models and aliases, loaded or not."""
    return Document({"object": "list", "data": await all_cards(request)})


async def all_cards(request: Request) -> list[Card]:
    """Return the cards of all names with their current state."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    config = dispatcher.config
    cards: Cards = request.app.state.cards
    found = await cards.of(config.models.values())
    models = {alias: as_it_runs(card, dispatcher.facts_of(alias)) async for alias, card in in_turns(found.items())}
    further = further_names(config)
    async for alias, card in in_turns(models.items()):
        card |= _now(dispatcher, config.models[alias], further.get(alias, []))
    named = {name: _named(models[alias.uses], alias) for name, alias in config.aliases.items()}
    return list({**models, **named}.values())


@router.get("/v1/models/{alias:path}")
@needs(Right.USE)
async def show_model(alias: str, request: Request) -> dict[str, Any]:
    """One model or alias."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    config = dispatcher.config
    alias = known_as(alias, config)
    model = config.model_of(alias)
    cards: Cards = request.app.state.cards
    card = as_it_runs((await cards.of([model]))[model.alias], dispatcher.facts_of(model.alias))
    card = {**card, **_now(dispatcher, model, further_names(config).get(model.alias, []))}
    return _named(card, config.aliases[alias]) if alias in config.aliases else card


def further_names(config: Config) -> dict[str, list[str]]:
    """Return the further names of each model that has any."""
    names: dict[str, list[str]] = {}
    for name, alias in config.aliases.items():
        if name != alias.uses:
            names.setdefault(alias.uses, []).append(name)
    return names


def loading_status(dispatcher: Dispatcher, alias: str, state: ModelState) -> dict[str, Any]:
    """Return llama-server's status for a state, with the exit code of the model's last engine if it failed."""
    if state is not ModelState.FAILED:
        return {"value": _VALUES[state]}
    ended = dispatcher.exits.get(alias)
    return {"value": "failed", "failed": True, "exit_code": (ended and ended.code) or 1}


def _now(dispatcher: Dispatcher, model: ModelConfig, further: list[str]) -> Card:
    alias = model.alias
    state = dispatcher.scheduler.state(alias) if alias in dispatcher.scheduler.models else ModelState.OFF
    return {
        "state": state,
        "status": loading_status(dispatcher, alias, state),
        "aliases": further,
        "can_remove": model.source in _REMOVABLE,
    }


def _named(card: Card, alias: AliasConfig) -> Card:
    """Return a model's card under another name."""
    described = {"description": alias.description} if alias.description else {}
    if alias.uses == alias.alias:
        return {**card, "source": alias.source, **described}
    further: Card = {
        "id": alias.alias,
        "uses": alias.uses,
        "aliases": [],
        "can_remove": alias.source == Source.CREATED,
    }
    return {**card, **further, "source": alias.source, **described}
