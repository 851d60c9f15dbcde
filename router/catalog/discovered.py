"""Discovered models: those in folders and stores, and those created by clients.

They are added to a draft as entries of the configuration, so that they pass the same checks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from router.catalog import engine_choice
from router.config.draft import Draft
from router.config.names import is_alias
from router.config.resolved import AliasConfig, Unserved
from router.config.schema import Api
from router.config.source import Source
from router.engines.hf_choice import SAFETENSORS
from router.engines.registry import is_for_gguf, kind_of_entry
from router.formats import hf_cache
from router.formats.hf_model import HfModel, Purpose
from router.store import created, discovery, external, pulled
from router.system.state import default_path

_Look = Callable[[], discovery.Discovery]


class Discovered:
    """The models found by one scan of all places, which `add` enters into the draft."""

    def __init__(self, draft: Draft, state_dir: Path | None, headers: discovery.Headers) -> None:
        self.draft = draft
        self.state_dir = state_dir
        self.headers = headers
        self.folders: list[Path] = []
        """Folders that were scanned."""
        self.scanned: list[tuple[str, str]] = []
        """The same folders, each with the source of what is found there."""
        self.unserved: list[Unserved] = []
        self.lost: dict[str, str] = {}
        """Names that cannot be served, each with the file or model that is missing."""
        self._missing: dict[Purpose, str] = {}
        """What is missing to run models in safetensors, by their purpose."""
        self._layers: dict[str, tuple[created.Created, str]] = {}
        """System prompts, parameters and flags that a store attaches to its models, each with the store."""
        self._created: dict[str, created.Created] = {}
        self._engines: dict[str, str] = {}
        """Created models that need an engine of their own, each with the name of the model that provides it."""

    def add(self, models_dirs: Sequence[Path]) -> None:
        """Add discovered models. Entries of the configuration take precedence, then the place that comes first."""
        models = self.draft.values.setdefault("models", {})
        if not isinstance(models, dict):
            return
        aliases = self.draft.values.get("aliases")
        self._read_created(models, aliases if isinstance(aliases, dict) else {})
        paths = map(self._path_of, models.values())
        served = {os.path.realpath(path) for path in paths if path is not None}
        unrunnable: dict[str, list[Path]] = {}
        for origin, folder, look in self._places(models_dirs):
            self.folders.append(folder)
            self.scanned.append((str(folder), origin))
            try:
                looked = look()
            except OSError as error:
                self.draft.problem((), f"{folder}: {error.strerror or error}", origin)
                continue
            for skipped in looked.skipped:
                self._leave_out(skipped.path, skipped.reason, origin)
            for found in looked.models:
                if isinstance(found.model, HfModel):
                    if (purpose := found.model.purpose) is None:
                        reason = f"{found.model.architecture} neither writes text nor embeds nor ranks"
                        self._leave_out(found.path, reason, origin)
                        continue
                    if origin is not Source.PULLED and (lacks := self._lacks(purpose)):
                        unrunnable.setdefault(lacks, []).append(found.path)
                        self.unserved.append(Unserved(str(found.path), lacks, origin))
                        continue
                # A pulled model keeps the alias that was requested, even if its file is served under another name.
                if origin is not Source.PULLED and os.path.realpath(found.path) in served:
                    continue
                if not is_alias(found.alias):
                    self._leave_out(found.path, f"{found.alias!r} is not a valid name", origin)
                    continue
                if isinstance(aliases, dict) and _model_named(aliases, found.alias) not in (None, found.alias):
                    self._leave_out(found.path, "an alias has the same name", origin)
                    continue
                if found.alias in self._created:
                    self._leave_out(found.path, "a created model has the same name", origin)
                    continue
                keys = {"model_path": str(found.path)}
                if isinstance(found.model, HfModel):
                    if found.quantize is not None:
                        keys["quantize"] = found.quantize
                elif found.projector is not None:
                    keys["mmproj"] = str(found.projector.path)
                entry = models.setdefault(found.alias, {})
                if not isinstance(entry, dict):
                    continue
                if other := _of_another_kind(entry, found):
                    self._leave_out(found.path, f"{other} has the same name", origin)
                    continue
                if first := entry.get("model_path", entry.get("repo")):
                    if self._path_of(entry) != found.path:
                        self._leave_out(found.path, f"{first} has the same name", origin)
                    continue
                for key, value in keys.items():
                    if key not in entry:
                        self.draft.put(("models", found.alias, key), value, origin)
                if found.made is not None:
                    self._add_layers(found.alias, found.made, origin)
            served |= {os.path.realpath(found.path) for found in looked.models}
        for lacks, (one, *others) in unrunnable.items():
            more = f" and {len(others)} others in safetensors" if others else ""
            self.draft.warnings.append(f"{one}{more}: not served, as {lacks}")
        self._add_created(models, aliases if isinstance(aliases, dict) else {})

    def _leave_out(self, path: Path, reason: str, origin: str) -> None:
        """Note a model that is not served, and warn of it."""
        self.draft.warnings.append(f"{path} is not served: {reason}")
        self.unserved.append(Unserved(str(path), reason, origin))

    def _leave_out_created(self, name: str, reason: str) -> None:
        self.draft.warnings.append(f"the created model {name!r} is not served: {reason}")
        self.unserved.append(Unserved(name, reason, Source.CREATED))

    def _path_of(self, entry: Any) -> Path | None:
        """Return the file or the folder that an entry of the configuration names; None if it names none."""
        if not isinstance(entry, dict):
            return None
        path, repo = entry.get("model_path"), entry.get("repo")
        if isinstance(path, str):
            return self.draft.resolve(path, self.draft.models_folder())
        cache = hf_cache.folder(self.draft.environ) if self.draft.is_for_here else None
        return hf_cache.snapshot(cache, repo) if isinstance(repo, str) and cache is not None else None

    def _lacks(self, purpose: Purpose) -> str:
        """Say what is missing to run models in safetensors for a purpose; empty if nothing is."""
        if purpose not in self._missing:
            self._missing[purpose] = engine_choice.missing(self.draft, purpose)
        return self._missing[purpose]

    def _add_layers(self, alias: str, made: created.Created, origin: str) -> None:
        """Add what a store attaches to a model. Flags of the configuration take precedence over the store's."""
        self._layers[alias] = made, origin
        words = [word for flag in made.flags.items() for word in flag]
        own = self.draft.values["models"][alias].get("flags", [])
        if words and isinstance(own, list):
            self.draft.put(("models", alias, "flags"), [*words, *own], origin)

    def _read_created(self, models: Mapping[str, Any], aliases: Mapping[str, Any]) -> None:
        """Read the models created by clients, except those whose names the configuration uses."""
        folder = self._state_folder() if self.draft.is_for_here else None
        if folder is None:
            return
        try:
            records = created.read(folder)
        except OSError as error:
            self.draft.warnings.append(f"created models cannot be read: {error}")
            return
        for name, made in records.items():
            entry = models.get(name)
            has_model = isinstance(entry, dict) and ("model_path" in entry or not is_for_gguf(entry))
            if name in aliases or has_model:
                self._leave_out_created(name, "the configuration uses its name")
            elif missing := created.missing_file(made, folder):
                self._leave_out_created(name, f"there is no file {missing}")
                self.lost[name] = str(missing)
            else:
                self._created[name] = made

    def _add_created(self, models: dict[str, Any], aliases: Mapping[str, Any]) -> None:
        """Add the created models that have an engine of their own. The configuration takes precedence."""
        folder = self._state_folder()
        if folder is None:
            return

        def model_of(name: str) -> str:
            return str(_model_named(aliases, name) or name)

        self._engines = created.engines(self._created, tuple(models))
        for name, entry in created.model_entries(self._created, self._engines, folder, models, model_of):
            configured = models.setdefault(name, {})
            if not isinstance(configured, dict):
                continue
            if isinstance(configured.get("flags"), list):
                entry["flags"] = [*entry.get("flags", ()), *configured["flags"]]
            for key, value in entry.items():
                if key == "flags" or key not in configured:
                    self.draft.put(("models", name, key), value, Source.CREATED)

    def _state_folder(self) -> Path | None:
        """Return the state directory of this configuration; None if there is none."""
        if self.state_dir is not None:
            return self.state_dir
        system, api = self.draft.values.get("system"), self.draft.values.get("api")
        named = system.get("state_dir") if isinstance(system, dict) else None
        if isinstance(named, str) and named:
            return self.draft.resolve(named, self.draft.base_of(("system", "state_dir")))
        port = api.get("port", Api().port) if isinstance(api, dict) else Api().port
        return default_path(port, self.draft.environ) if isinstance(port, int) and port else None

    def _places(self, models_dirs: Sequence[Path]) -> Iterator[tuple[Source, Path, _Look]]:
        """List the places to scan: the source, its folder, and the function that scans it."""
        system = self.draft.values.get("system")
        system = system if isinstance(system, dict) and self.draft.is_for_here else {}
        cache = hf_cache.folder(self.draft.environ) if self.draft.is_for_here else None
        if cache is not None:
            yield Source.PULLED, cache, partial(pulled.discover, cache, self.headers)
        key = ("system", "models_dirs")
        named = system.get("models_dirs")
        texts = named if isinstance(named, list) and all(isinstance(text, str) for text in named) else []
        dirs = [
            (Source.ON_COMMAND_LINE, self.draft.resolve(str(folder), self.draft.cwd)) for folder in models_dirs
        ]
        dirs += [(Source.MODELS_DIRS, self.draft.resolve(text, self.draft.base_of(key))) for text in texts]
        settle_sec = discovery.SETTLE_SEC
        for origin, folder in dirs:
            yield origin, folder, partial(discovery.discover, folder, self.headers, settle_sec=settle_sec)
        if system.get("hf_cache") is True and cache is not None:
            look = partial(external.hugging_face, cache, self.headers, settle_sec=settle_sec)
            yield Source.HF_CACHE, cache, look
        store = external.ollama_folder(self.draft.environ)
        if system.get("ollama_store") is True and store is not None:
            look = partial(external.ollama, store, self.headers, settle_sec=settle_sec)
            yield Source.OLLAMA_STORE, store, look

    def stored_aliases(self, aliases: Container[str], models: Container[str]) -> Iterator[tuple[str, AliasConfig]]:
        """Yield the aliases that stored models imply, unless the configuration has an alias of that name."""
        for name, (made, origin) in self._layers.items():
            named = replace(created.alias(name, made, name, None), source=origin)
            if name in models and name not in aliases and named.rewrites:
                self.draft.origins["aliases", name] = origin
                yield name, named

    def created_aliases(
        self, aliases: Mapping[str, AliasConfig], models: Container[str]
    ) -> Iterator[tuple[str, AliasConfig]]:
        for name, made in self._created.items():
            base = aliases.get(made.base)
            model = self._engines.get(name) or (made.base if base is None else base.uses)
            if model not in models:
                self._leave_out_created(name, f"{made.base!r} no longer exists")
                self.lost[name] = made.base
                continue
            named = created.alias(name, made, model, base)
            if name != model or named.rewrites:
                self.draft.origins["aliases", name] = Source.CREATED
                yield name, named


def _model_named(aliases: Mapping[str, Any], name: str) -> object:
    """Return what an alias refers to, as it is written; None if there is no such alias."""
    entry = aliases.get(name)
    return entry.get("uses") if isinstance(entry, dict) else entry


def _of_another_kind(entry: Mapping[str, Any], found: discovery.Found) -> str:
    """Say what an entry without a path is if it cannot be one for the discovered model; empty if it can."""
    named = entry.get("engine", "auto")
    takes_it = named == "auto" or kind_of_entry(entry).file_format == SAFETENSORS
    if takes_it if isinstance(found.model, HfModel) else is_for_gguf(entry):
        return ""
    return "a model in safetensors" if named == "auto" else f"a model of engine {named}"
