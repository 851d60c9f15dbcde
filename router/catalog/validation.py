"""Turns a completed draft into the resolved configuration, and collects everything that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from router.catalog.discovered import Discovered
from router.catalog.engine_choice import hf_models, is_hf_model
from router.catalog.engine_flags import files_of, final_flags, told_by
from router.config.draft import DEFAULT
from router.config.errors import did_you_mean
from router.config.names import ALLOWED, is_alias, meant
from router.config.paths import not_a_path, wrong_with_program
from router.config.problems import KeyPath, Problem, dotted
from router.config.resolved import AliasConfig, Config, ModelConfig, idle_timeout
from router.config.schema import AliasEntry, Api, KvStore, ModelEntry, Scheduling, System
from router.config.source import FOUND
from router.engines.llamacpp import adapters
from router.engines.llamacpp.flags import FlagError, Flags
from router.engines.llamacpp.model import LlamaCppModel
from router.engines.registry import kind_of_entry
from router.formats.gguf import GGUF, SplitName
from router.formats.gguf_cursor import GGUFError
from router.scheduling.queue import BY_NAME
from router.store import repository
from router.store.discovery import Unfinished, Unfit

_UNKNOWN = "?"  # stands in for an invalid model_path or uses, so that checking can continue


def validated(discovered: Discovered) -> Config:
    """Resolve the draft of discovered models; the result is only valid if the draft has no problems afterwards."""
    return _Validation(discovered).config()


class _Validation:
    def __init__(self, discovered: Discovered) -> None:
        self.draft = discovered.draft
        self.discovered = discovered
        self.otherwise: dict[str, ModelConfig] = {}
        """By alias, the model on another kind of engine."""

    def config(self) -> Config:
        api = self.draft.section(Api, ("api",)) or Api()
        for name in api.clients:
            if not is_alias(name):
                self.draft.problem(("api", "clients", name), f"a name is {ALLOWED}")
        system = self._system()
        scheduling = self.draft.section(Scheduling, ("scheduling",)) or Scheduling()
        patience = scheduling.patience_sec
        if not patience.high <= patience.normal <= patience.low:
            self.draft.problem(("scheduling", "patience_sec"), "high must not exceed normal, nor normal low")
        entries = self.draft.values.get("models", {})
        if not isinstance(entries, dict):
            self.draft.problem(("models",), "should map model names to entries with model_path and flags")
            entries = {}
        self._check_clients(api)
        models = {alias: self._model(alias, system) for alias in entries}
        aliases = self._aliases(entries)
        for index, alias in enumerate(system.preload_models):
            path = ("system", "preload_models", index)
            if alias == "*" and len(system.preload_models) > 1:
                self.draft.problem(path, '"*" means all models and cannot be combined with others')
            elif alias != "*" and alias not in entries:
                self._no_model(path, alias, entries)
        self._check_pins(models, system.max_concurrent_models)
        if api.ollama_port == api.port:
            self.draft.problem(
                ("api", "ollama_port"), f"{api.port} is already api.port, which Ollama's clients can use as well"
            )
        self._check_openness(api)
        there = {alias: model for alias, model in models.items() if model}
        usable = {name: alias for name, alias in aliases.items() if alias.uses in there}
        self.discovered.lost |= {name: alias.uses for name, alias in aliases.items() if name not in usable}
        usable |= dict(self.discovered.stored_aliases(usable, there))
        usable |= dict(self.discovered.created_aliases(usable, there))
        config = Config(
            api,
            system,
            scheduling,
            there,
            adapters.named(usable, there),
            kv_store=self._kv_store(),
            otherwise={alias: other for alias, other in self.otherwise.items() if alias in there},
            lost=self.discovered.lost,
            scanned=tuple(self.discovered.scanned),
            unserved=tuple(self.discovered.unserved),
        )
        if api.default_model is not None and meant(api.default_model, config) is None:  # it may be pulled later
            message = f"there is currently no model {api.default_model!r}"
            self.draft.warn(("api", "default_model"), message + did_you_mean(api.default_model, config.names))
        return config

    def _check_openness(self, api: Api) -> None:
        exposed = api.host not in ("localhost", "::1") and not api.host.startswith("127.")
        is_open = exposed and not (api.api_keys or api.inference_keys or api.clients)
        for name, problem in self.draft.foreign.items():
            if name == "API_KEY" and is_open:  # it may have been meant to protect this router
                self.draft.problem((), f"{problem}, and {api.host} would be open to the network without a key", "")
            else:
                self.draft.warnings.append(f"{problem}; ignored, as it seems to be meant for another program")
        if is_open:
            message = f"{api.host} is open to the network and no API key is set: anybody there may use the router"
            self.draft.warn(("api", "host"), message)

    def _check_clients(self, api: Api) -> None:
        owners = {key.get_secret_value(): "one of api_keys" for key in api.api_keys}
        owners |= {key.get_secret_value(): "one of inference_keys" for key in api.inference_keys}
        for name, client in api.clients.items():
            path = ("api", "clients", name)
            owner = owners.setdefault(client.key.get_secret_value(), f"the key of {name!r}")
            if owner != f"the key of {name!r}":
                self.draft.problem((*path, "key"), f"is also {owner}: each client needs a key of its own")
            if client.priority and BY_NAME[client.priority] < BY_NAME[client.highest_priority]:
                self.draft.problem((*path, "priority"), f"is above highest_priority, {client.highest_priority}")

    def _check_pins(self, models: Mapping[str, ModelConfig | None], places: int) -> None:
        pinned = [alias for alias, model in models.items() if model and model.pinned]
        if places <= len(pinned) < len(models) or places < len(pinned):
            key = ("system", "max_concurrent_models")
            source = self.draft.origin_of(key)
            message = f"{places} leaves no place beside the pinned models ({', '.join(pinned)}) for others"
            self.draft.warnings.append(str(Problem(dotted(key), message, "" if source == DEFAULT else source)))

    def _system(self) -> System:
        system = self.draft.section(System, ("system",)) or System()
        if system.queue_processor_idle_sec is not None:
            self.draft.warn(
                ("system", "queue_processor_idle_sec"), "is obsolete and ignored: the queue is not polled"
            )
        changes: dict[str, Any] = {}
        if system.parallel_requests is not None:
            path = ("system", "parallel_requests")
            self.draft.warn(path, "is the former name of default_parallel")
            if "default_parallel" not in system.model_fields_set:
                changes["default_parallel"] = system.parallel_requests
                self.draft.origins["system", "default_parallel"] = self.draft.origin_of(path)
        for alias, text in (system.allowed_models or {}).items():
            allowed = ("system", "allowed_models", alias)
            if not is_alias(alias):
                self.draft.problem(allowed, f"an alias is {ALLOWED}")
            try:
                repository.parse(text, self.draft.environ)
            except repository.BadReference as error:
                self.draft.problem(allowed, str(error))
        for key in ("llama_server_path", "vllm_path", "transformers_path"):
            program = getattr(system, key)
            if program and os.sep in program:
                path = ("system", key)
                binary = self.draft.resolve(program, self.draft.base_of(path))
                changes[key] = str(binary)
                self.draft.check_file(path, binary, wrong_with_program)
        changes["base_models_path"] = str(self.draft.models_folder())
        for key in ("state_dir", "log_dir"):
            if folder := getattr(system, key):
                changes[key] = str(self.draft.resolve(folder, self.draft.base_of(("system", key))))
        return system.model_copy(update=changes)

    def _kv_store(self) -> KvStore:
        kv_store = self.draft.section(KvStore, ("kv_store",)) or KvStore()
        if kv_store.dir is None:
            return kv_store
        folder = self.draft.resolve(kv_store.dir, self.draft.base_of(("kv_store", "dir")))
        return kv_store.model_copy(update={"dir": str(folder)})

    def _model(self, alias: str, system: System) -> ModelConfig | None:
        path = ("models", alias)
        if not is_alias(alias):
            self.draft.problem(path, f"an alias is {ALLOWED}")
        given = self.draft.values["models"][alias]
        if isinstance(given, dict) and (own := kind_of_entry(given).entries) is not None:
            read = self.draft.section(own.schema, path, **own.stand_ins)
            return None if read is None else own.read(self.draft, alias, read, system)
        if isinstance(given, dict) and is_hf_model(self.draft, given, Path(system.base_models_path)):
            models = hf_models(self.draft, alias, system)
            if len(models) > 1:
                self.otherwise[alias] = models[1]
            return models[0] if models else None
        if isinstance(given, dict) and "model_path" not in given:
            message = "is required, because no model of this name was found"
            if self.draft.check_files:
                self.draft.problem((*path, "model_path"), message)
            else:
                self.draft.warnings.append(
                    str(Problem(dotted((*path, "model_path")), message, self.draft.file_name))
                )
        entry = self.draft.section(ModelEntry, path, model_path=_UNKNOWN)
        if entry is None or entry.model_path is None:
            return None
        folder = Path(system.base_models_path)
        model_path = self.draft.resolve(entry.model_path, folder)
        if entry.model_path != _UNKNOWN:
            for part in self._parts((*path, "model_path"), model_path):
                self.draft.check_file((*path, "model_path"), part, _wrong_with_model)
        mmproj = self.draft.resolve(entry.mmproj, folder) if entry.mmproj else None
        if mmproj is not None:
            self.draft.check_file((*path, "mmproj"), mmproj, _wrong_with_model)
        flags, slots = final_flags(self.draft, path, entry, system, mmproj, self._header(model_path))
        purposes, most_tokens = told_by(flags, entry.env)
        return LlamaCppModel(
            alias=alias,
            model_path=model_path,
            flags=flags,
            slots=slots,
            env=entry.env,
            files=self._identity(model_path, flags, entry.env),
            pinned=entry.pinned,
            idle_timeout_sec=idle_timeout(entry.idle_timeout_sec),
            footprint_mb=entry.footprint_mb,
            priority=entry.priority or "normal",
            description=entry.description,
            source=self.draft.origin_of((*path, "model_path")),
            projector_was_found=mmproj is not None
            and self.draft.origin_of((*path, "mmproj")) in FOUND
            and str(mmproj) in flags,
            purposes=purposes,
            most_tokens=most_tokens,
        )

    def _header(self, file: Path) -> GGUF | None:
        """Return the header of a model's file; None if it cannot be read, which is reported when it is loaded."""
        if not self.draft.is_for_here:
            return None
        try:
            return self.discovered.headers.of(file)
        except FileNotFoundError:
            return self.discovered.headers.last(file)
        except (Unfit, Unfinished, GGUFError, OSError):
            return None

    def _identity(
        self, model_path: Path, flags: Sequence[str], env: Mapping[str, str]
    ) -> tuple[tuple[str, int, int], ...]:
        """Return path, size and modification time of all files that an engine is started with."""
        if not self.draft.is_for_here:
            return ()
        try:
            named = files_of(Flags(flags, {**self.draft.environ, **env}))
            return tuple(
                stamp for file in (model_path, *named) for stamp in self.discovered.headers.identity(file)
            )
        except (FlagError, OSError):
            return ()

    def _aliases(self, models: Mapping[str, Any]) -> dict[str, AliasConfig]:
        entries = self.draft.values.get("aliases", {})
        if not isinstance(entries, dict):
            self.draft.problem(("aliases",), "should map names to models")
            return {}
        for name, entry in list(entries.items()):
            if isinstance(entry, str):
                self.draft.put(("aliases", name), {"uses": entry}, self.draft.origin_of(("aliases", name)))
        aliases = {name: self._alias(name, models, entries) for name in entries}
        return {name: alias for name, alias in aliases.items() if alias}

    def _alias(self, name: str, models: Mapping[str, Any], aliases: Mapping[str, Any]) -> AliasConfig | None:
        path = ("aliases", name)
        if not is_alias(name):
            self.draft.problem(path, f"an alias is {ALLOWED}")
        entry = self.draft.section(AliasEntry, path, uses=_UNKNOWN)
        if entry is None:
            return None
        if name in models and entry.uses != name:
            self.draft.problem(path, "there is a model of this name")
        uses = (*path, "uses")
        if entry.uses in aliases and entry.uses not in models:
            self.draft.problem(uses, f"{entry.uses!r} is an alias itself; name the model")
        elif entry.uses not in (_UNKNOWN, *models):
            self._no_model(uses, entry.uses, models)
        if entry.system_prompt_replaces and entry.system_prompt_yields:
            self.draft.problem(path, "system_prompt_replaces and system_prompt_yields cannot both be true")
        named = [*entry.defaults, *entry.forced, *entry.removed]
        for parameter in sorted({parameter for parameter in named if named.count(parameter) > 1}):
            self.draft.problem(path, f"{parameter!r} may appear only once in defaults, forced and removed")
        messages = tuple(turn.model_dump() for turn in entry.messages)
        source = self.draft.origin_of((*path, "uses"))
        return AliasConfig(**{**dict(entry), "alias": name, "messages": messages, "source": source})

    def _no_model(self, path: KeyPath, alias: str, models: Iterable[str]) -> None:
        message = f"there is no model {alias!r}" + did_you_mean(alias, models)
        if self.draft.check_files:
            self.draft.problem(path, message)
        else:  # the model may exist on the other machine, or have existed at the start
            self.draft.warn(path, message)

    def _parts(self, path: KeyPath, file: Path) -> list[Path]:
        """Return the files of a model: one, unless it is split."""
        split = SplitName.of(file.name)
        if split is None:
            return [file]
        if split.part != 1:
            message = f"{file.name} is one part of a split model; name the first one, {split.name()}"
            self.draft.problem(path, message)
            return []
        return [file.with_name(name) for name in split.names]


def _wrong_with_model(file: Path) -> str:
    """Say why a model file cannot be read; empty if it can. Raises OSError."""
    if file.is_dir():
        return f"{file} is a folder; name the GGUF file in it"
    if not file.parent.is_dir():
        return f"there is no file {file}: " + (not_a_path(file) or "its folder is missing")
    if not file.is_file():
        return f"there is no file {file}" + did_you_mean(
            file.name, [each.name for each in file.parent.glob("*.gguf")]
        )
    return "" if os.access(file, os.R_OK) else f"{file} cannot be read: permission denied"
