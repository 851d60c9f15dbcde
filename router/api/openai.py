"""`/v1/models`: what can be asked for, with what is known of each model without loading it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from router.api.cards import Cards, as_it_runs
from router.config import AliasConfig
from router.dispatcher import Dispatcher
from router.routing import known_as

router = APIRouter(tags=["models"])


@router.get("/v1/models")
@router.get("/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Every alias, loaded or not."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    config = dispatcher.config
    cards: Cards = request.app.state.cards
    found = await cards.of(config.models.values())
    models = {alias: as_it_runs(card, dispatcher.props_of(alias)) for alias, card in found.items()}
    for alias, card in models.items():
        card["status"] = status_of(dispatcher, alias)
    named = {name: _named(models[alias.uses], alias) for name, alias in config.aliases.items()}
    return {"object": "list", "data": list({**models, **named}.values())}


@router.get("/v1/models/{alias:path}")
async def show_model(alias: str, request: Request) -> dict[str, Any]:
    """One alias."""
    dispatcher: Dispatcher = request.app.state.dispatcher
    config = dispatcher.config
    alias = known_as(alias, config)
    model = config.model_of(alias)
    cards: Cards = request.app.state.cards
    card = as_it_runs((await cards.of([model]))[model.alias], dispatcher.props_of(model.alias))
    card["status"] = status_of(dispatcher, model.alias)
    return _named(card, config.aliases[alias]) if alias in config.aliases else card


def status_of(dispatcher: Dispatcher, alias: str) -> str:
    return dispatcher.scheduler.state(alias) if alias in dispatcher.scheduler.models else "off"


def _named(card: dict[str, Any], alias: AliasConfig) -> dict[str, Any]:
    """A model's card under another name."""
    described = {"description": alias.description} if alias.description else {}
    further = {"uses": alias.uses} if alias.uses != alias.alias else {}
    return {**card, "id": alias.alias, "source": alias.source, **further, **described}
