"""Conversations that are kept on disk: what is saved of which model, and their deletion."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from router.catalog.lookup import check_name
from router.config.names import meant
from router.http.documents import Document
from router.http.errors import ApiError
from router.http.pages import Page, Right, needs
from router.kv.store import KvStore, Saved, Totals, by_model
from router.runtime.dispatcher import Dispatcher
from router.system.turns import in_turns

router = APIRouter(tags=["management"], route_class=Page)


@router.get("/v1/kv")
@needs(Right.MANAGE)
async def saved_conversations(
    request: Request,
    conversations: Annotated[bool, Query(description="`false`: without the list of each model.")] = True,
) -> Document:
    """Conversations kept on disk, by model, with what they have saved since the start, and the limits."""
    store: KvStore = request.app.state.kv_store
    dispatcher: Dispatcher = request.app.state.dispatcher
    models = {}
    async for alias, saved in in_turns(_by_model(store, dispatcher).items()):
        listed = [_conversation(one) async for one in in_turns(saved)] if conversations else None
        models[alias] = {
            **_sums(saved),
            "since_start": _since_start(store, alias),
            **({"conversations": listed} if listed is not None else {}),
        }
    settings = store.settings
    return Document(
        {
            **summary(store),
            "folder": str(store.folder) if store.folder is not None else None,
            "limits": {
                "bytes": int(settings.max_gb * 1e9),
                "age_sec": settings.max_age_h * 3600,
                "min_tokens": settings.min_tokens,
            },
            "shared": store.shares,
            "models": models,
            "distrusted": _distrusted(store, dispatcher),
        }
    )


@router.delete("/v1/kv", responses={404: {"description": "No such model, and nothing is saved of one."}})
@needs(Right.MANAGE)
async def delete_conversations(
    request: Request,
    model: Annotated[str | None, Query(description="A model; without it, the conversations of all.")] = None,
) -> dict[str, Any]:
    """Delete the conversations kept on disk, of one model or of all.

    Those of a model are all that it could restore: also what others have saved that are configured with the same
    files. What engines hold of them in memory is not saved any more either. A file that an engine is reading is
    deleted when it has read it.
    """
    store: KvStore = request.app.state.kv_store
    dispatcher: Dispatcher = request.app.state.dispatcher
    gone = await store.clear(*([] if model is None else _named(model, store, dispatcher)))
    return {
        "status": "success",
        "deleted": _sums(gone),
        "models": {alias: _sums(saved) for alias, saved in by_model(gone).items()},
    }


def summary(store: KvStore) -> dict[str, Any]:
    """Return whether conversations are kept, and how much all of them are."""
    return {"enabled": store.enabled, "total": _sums(store)}


def _named(name: str, store: KvStore, dispatcher: Dispatcher) -> list[str]:
    """Return the own names of all models with the files of one that is served, or the name of one of which
    something is left. Raises ApiError 404."""
    check_name(name)
    config = dispatcher.config
    if name not in config.names and any(saved.model == name for saved in store):
        return [name]
    if (alias := meant(name, config)) is not None:
        known = config.model_of(alias)
        return [
            alias for alias, model in config.models.items() if model is known or model.files == known.files != ()
        ]
    raise ApiError(404, "model_not_found", f"model {name!r} not found, and nothing is saved of it.", "model")


def _by_model(store: KvStore, dispatcher: Dispatcher) -> dict[str, list[Saved]]:
    """Return what is saved, the last used first, of models in the order of the configuration; then of others."""
    saved = {alias: sorted(of, key=lambda one: -one.used_at) for alias, of in by_model(store).items()}
    served = [alias for alias in dispatcher.config.models if alias in saved or alias in store.totals]
    return {alias: saved.get(alias, []) for alias in (*served, *(other for other in saved if other not in served))}


def _sums(saved: Iterable[Saved]) -> dict[str, int]:
    known = list(saved)
    return {
        "count": len(known),
        "tokens": sum([one.tokens for one in known]),
        "bytes": sum([one.nbytes for one in known]),
    }


def _since_start(store: KvStore, alias: str) -> dict[str, Any]:
    totals = store.totals.get(alias, Totals())
    return {
        "saves": totals.saves,
        "restores": totals.restores,
        "failures": totals.failures,
        "restored_tokens": totals.restored_tokens,
        "prefill_saved_sec": round(totals.prefill_saved_sec, 3),
    }


def _conversation(saved: Saved) -> dict[str, Any]:
    named = not saved.client.startswith("_")  # what stands for a key without a name
    return {
        "tokens": saved.tokens,
        "bytes": saved.nbytes,
        "prefill_sec": round(saved.prefill_sec, 3),
        "age_sec": round(max(0.0, time.time() - saved.used_at), 1),
        "uses": saved.uses,
        "client": saved.client if saved.client and named else None,
    }


def _distrusted(store: KvStore, dispatcher: Dispatcher) -> list[dict[str, Any]]:
    """Return what is left alone, and why, with the loaded models that this concerns."""
    loaded: dict[str, set[str]] = {}
    for running in dispatcher.running.values():
        if (keeper := running.handle.keeper) is not None:
            loaded.setdefault(keeper.group, set()).add(running.alias)
    return [
        {"group": group, "reason": reason, "models": sorted(loaded.get(group, ()))}
        for group, reason in store.distrusted.items()
    ]
