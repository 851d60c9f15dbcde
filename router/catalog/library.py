"""Pulls from the hub, and removals of pulled and created models, at the request of clients."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from router.catalog.lookup import check_name
from router.config.names import ALLOWED, candidates, is_alias, same_name, some_of
from router.config.resolved import Config
from router.config.schema import System
from router.config.source import Source
from router.formats import hf_cache
from router.http.errors import ApiError
from router.store import created, pulled, repository
from router.store.creations import Creations
from router.store.downloads import MOST_AT_ONCE, Downloads, NoMorePulls, Pull, TooManyPulls
from router.store.progress import Progress


class Library:
    """Pulls and removes models on behalf of the routes of all dialects."""

    def __init__(self, config: Callable[[], Config], downloads: Downloads, creations: Creations) -> None:
        self.downloads = downloads
        self.creations = creations
        self._config = config

    def pull(self, model: str, alias: str | None = None, quantize: str | None = None) -> Pull:
        """Start a pull, or join the running pull of the same model. Raises ApiError."""
        config = self._config()
        reference, alias, taken = _wanted(config, model, alias, quantize)
        try:
            return self.downloads.start(reference, alias, taken, _environ(config.system))
        except NoMorePulls:
            raise ApiError(503, "shutting_down", "The router is shutting down.", retry_after_sec=5) from None
        except TooManyPulls:
            message = f"{MOST_AT_ONCE} pulls are running already; wait for one, or cancel it."
            raise ApiError(429, "too_many_pulls", message, retry_after_sec=30) from None

    async def estimate(self, model: str, alias: str | None = None, quantize: str | None = None) -> Progress:
        """Return what a pull would tell before it downloads anything. Raises ApiError."""
        config = self._config()
        reference, alias, taken = _wanted(config, model, alias, quantize)
        return await self.downloads.estimate(reference, alias, taken, _environ(config.system))

    async def remove(self, name: str) -> tuple[str, int]:
        """Remove a pulled or created model; return its alias and the number of bytes freed. Raises ApiError.

        Files needed by another model are kept, and the model's engine finishes its requests first.
        """
        config, creations, downloads = self._config(), self.creations, self.downloads
        alias = self._removable(name, config)
        cache = hf_cache.folder(os.environ)
        there = config.aliases.get(alias) or config.models.get(alias)
        for pull in downloads.pulls.values():
            if not pull.over and pull.progress.alias == alias:
                message = f"{alias!r} is being pulled: cancel that first (DELETE /v1/models/pull/{pull.id})."
                raise ApiError(409, "model_in_use", message, "model")
        try:
            removed = await creations.remove(alias)
            if removed is not None:
                return alias, removed
            needed = created.made_from(creations.records, alias)
            if needed and there is not None and there.source == Source.PULLED:
                message = f"{some_of(needed)} was created from {alias!r}: remove that first."
                raise ApiError(409, "model_in_use", message, "model")
            if cache is None:
                raise pulled.NotPulled(f"no model was pulled as {alias!r}")
            freed = await asyncio.to_thread(pulled.remove, cache, alias)
        except pulled.NotPulled as error:
            reason = f"model {alias!r} not found: {error}"
            if there is not None:
                reason = f"{alias!r} was neither pulled nor created, but is from {there.source}"
            raise ApiError(404, "model_not_found", f"{reason}.", "model") from None
        except pulled.BeingPulled as error:
            raise ApiError(409, "model_in_use", f"{error}.", "model") from None
        except OSError as error:
            raise ApiError(500, "disk_error", f"{alias!r} could not be removed: {error}.") from None
        await downloads.look_again()
        return alias, freed

    def _removable(self, name: str, config: Config) -> str:
        """Return the alias of the model to remove. Raises ApiError 404 and 409.

        Removing a created model is final, so it must be given by its exact name.
        """
        check_name(name)
        records = self.creations.records
        alike = [same] if (same := same_name(name, records)) else candidates(name, config)
        if len(alike) > 1:
            message = f"{name!r} is ambiguous: it may mean {some_of(alike)}. Use the full name."
            raise ApiError(409, "name_taken", message, "model")
        alias = alike[0] if alike else name
        if alias in records and not same_name(name, (alias,)):
            raise ApiError(404, "model_not_found", f"model {name!r} not found. Did you mean {alias!r}?", "model")
        return alias


def _wanted(
    config: Config, model: str, alias: str | None, quantize: str | None
) -> tuple[repository.Reference, str | None, dict[str, str]]:
    """Return what to pull, its alias if that is given, and names of the repository that are in use, with the
    sources of those models. Raises ApiError."""
    for name in (model, alias or ""):
        check_name(name)
    if alias is not None and not is_alias(alias):
        message = f"{alias!r}: an alias is {ALLOWED}."
        raise ApiError(400, "invalid_alias", message, "alias")
    try:
        reference, listed_as = repository.permitted(model, config.system.allowed_models, os.environ)
        if quantize is not None:
            reference = repository.quantized(reference, quantize)
    except repository.BadReference as error:
        raise ApiError(400, "invalid_reference", f"{error}.", "model") from None
    except repository.NotAllowed as error:
        raise ApiError(403, "model_not_allowed", f"{error}.", "model") from None
    alias = alias or listed_as
    taken = _taken(config, reference.repo)
    if alias in taken:
        message = f"{alias!r} is taken by a model from {taken[alias]}: choose another alias."
        raise ApiError(409, "name_taken", message, "alias")
    return reference, alias, {name: taken[name] for name in taken if repository.is_of(reference.repo, name)}


def _environ(system: System) -> dict[str, str]:
    """Return the variables by which the process of a pull knows what is configured."""
    programs = {
        "LLAMA_SERVER_PATH": system.llama_server_path,
        "VLLM_PATH": system.vllm_path,
        "TRANSFORMERS_PATH": system.transformers_path,
    }
    named = {name: str(path) for name, path in programs.items() if path}
    return {**named, "MODEL_Q4_THRESHOLD_BYTES": str(system.q4_threshold_bytes)}


def _taken(config: Config, repo: str) -> dict[str, str]:
    """Return the names under which a pulled model would not be served, each with the source of what is served."""
    return {
        name: source
        for name, source in config.sources.items()
        if source != Source.PULLED
        and not (source == Source.HF_CACHE and repository.is_of(repo, name))  # the same file
    }
