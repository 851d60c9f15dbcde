"""Where the configuration comes from (file < environment < command line), and all that is wrong with it.

`load` is a function of its arguments and of the files they name, so a reload is one more call. It starts
nothing and changes nothing, and it reports all problems at once. Every value's origin is kept, for
`llama-router check`. What keys there are and what they mean is in `schema.py`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from router.config.errors import did_you_mean, explain, section_at, single_value, unknown_key
from router.config.file import read_file
from router.config.names import meant
from router.config.problems import ConfigError, KeyPath, Problem, dotted
from router.config.schema import (
    AliasConfig,
    AliasEntry,
    Api,
    Config,
    ConfigFile,
    Key,
    ModelConfig,
    ModelEntry,
    Scheduling,
    Section,
    System,
)
from router.config.show import leaves
from router.engines.llamacpp import adapters
from router.engines.llamacpp.flags import (
    FORMS,
    OWNED,
    OWNED_VARIABLES,
    SPELLINGS,
    Flag,
    FlagError,
    Flags,
    Purpose,
    argv,
    as_started,
    from_environment,
    parse,
)
from router.engines.llamacpp.purpose import SAYS_IF_IT_EMBEDS, flags_for
from router.formats.gguf import GGUF, SPLIT_NAME, GGUFError
from router.scheduling.queue import BY_NAME
from router.store import created, pulled, repository
from router.store import discovery as hub
from router.store import external as stores
from router.system.state import default_path

_VARIABLES: dict[str, KeyPath] = {
    "LLAMA_SERVER_PATH": ("system", "llama_server_path"),
    "BASE_MODELS_PATH": ("system", "base_models_path"),
    "LLAMA_ROUTER_STATE_DIR": ("system", "state_dir"),
    "MAX_CACHE_MODELS": ("system", "max_concurrent_models"),
    "MODEL_LOAD_COOLDOWN": ("system", "model_load_cooldown_sec"),
    "ALLOWED_MODELS_JSON": ("system", "allowed_models"),
    "MODEL_Q4_THRESHOLD_BYTES": ("system", "q4_threshold_bytes"),
    "API_KEY": ("api", "api_keys"),
    "DEBUG": ("system", "debug"),
    "STRUCTURED_LOGS": ("system", "structured_logs"),
}
_PREFIX = "LLAMA_ROUTER__"
"""`LLAMA_ROUTER__SYSTEM__BASE_PORT` sets `system.base_port`; so for every key that is not a list."""

_OWN_FILE_NAMES = ("llama-router.yaml", "llama-router.yml", "llama-router.json")
_FILE_NAMES = (*_OWN_FILE_NAMES, "config.json", "config.yaml", "config.yml")
_MISSPELT_NAME = "konfig.json"
"""What the documents of an earlier router call its configuration in one place."""
_SECTION = re.compile(rf"""(?:^|[\s{{,])["']?(?:{"|".join(ConfigFile.model_fields)})["']?\s*:""")
_ANYBODYS = frozenset({"API_KEY", "DEBUG", "STRUCTURED_LOGS"})
"""Variables that other programs know by the same name, with values of their own."""

_DOTENV = re.compile(r"""(?:export\s+)?(\w+)\s*=(?:\s+#.*|\s*(?:"(.*?)"|'(.*?)'|(.*?))(?:\s+#.*)?)""")
_DEFAULT = "default"
_FOUND = frozenset({"pulled", "--models-dir", "models_dirs", "hf_cache", "ollama_store"})
"""Where models come from that nobody has named, and their projectors."""
_UNKNOWN = "?"  # for going on after a wrong model_path or uses
_S = TypeVar("_S", bound=Section)


@dataclass(frozen=True, slots=True)
class Loaded:
    config: Config
    origins: Mapping[str, str]
    """Where the value of each key comes from: `default`, `config.json`, `env API_KEY`, `--port` …"""
    warnings: tuple[str, ...]
    source: Path | None
    """The configuration file; None if there is none."""
    folders: tuple[Path, ...]
    """Where models were looked for, beyond those that the configuration names."""
    files: tuple[Path, ...]
    """What engines are started with that lies elsewhere."""
    headers: hub.Headers
    """What is known of the files of models."""
    look_again: Callable[[], Loaded]
    """The same configuration with the files that are there now. Raises ConfigError."""

    @property
    def settling(self) -> bool:
        """A file is still being written: look again after `hub.SETTLE_SEC`."""
        return self.headers.settling


Load = Callable[[Path | None, Loaded | None], Loaded]
"""Gives the configuration, with the state directory that is in use and the configuration that is gone by."""


def load(
    path: Path | None = None,
    *,
    environ: Mapping[str, str],
    cwd: Path,
    overrides: Mapping[str, tuple[str, Any]] | None = None,
    models_dirs: Sequence[Path] = (),
    check_files: bool = True,
    state_dir: Path | None = None,
    before: Loaded | None = None,
) -> Loaded:
    """Read, merge and check the configuration. Raises `ConfigError` with all that is wrong.

    `path` is the file that the command line names; else the variable `CONFIG_PATH`; else `llama-router.yaml` or
    `.json` in `cwd`, else a `config.json` or `config.yaml` there that is meant for the router. `overrides` maps a
    key to the option that sets it and its value: `{"api.port": ("--port", 9000)}`; `models.ALIAS` takes a whole
    entry. Each GGUF file below `models_dirs` is served under its name, unless the configuration already serves it.
    Without `check_files`, models and engine need not exist, and no models are looked for but in `models_dirs`: for
    reading the configuration of another machine. `state_dir` is the one that a running router works with, whatever
    the file says by now, and `before` what it goes by: a file of a model that is just being replaced is still what
    it was there.

    Blocks for up to `hub.SETTLE_SEC` when a file to be discovered has only just been written.
    """
    draft = _Draft(environ, cwd, check_files, state_dir)
    source = draft.find_file(path)
    if source is not None:
        draft.read(source)
    draft.apply_environment()
    for key, (option, value) in (overrides or {}).items():
        parts = key.split(".", 1) if key.startswith("models.") else key.split(".")
        draft.put(tuple(parts), value, option)
    known = before.headers if before is not None else None
    complete = _with_discovered(draft, models_dirs, known)
    if complete.headers.settling:
        time.sleep(hub.SETTLE_SEC)
        complete = _with_discovered(draft, models_dirs, known)
    loaded = _built(complete, draft, models_dirs, source)
    draft.check_files = False  # from now on a configured file that is missing is said to whoever asks for it
    return loaded


def _with_discovered(read: _Draft, models_dirs: Sequence[Path], known: hub.Headers | None) -> _Draft:
    """What was read, completed with the models in folders and stores."""
    draft = copy.deepcopy(read)
    draft.headers = hub.Headers(known)
    draft.add_discovered(models_dirs)
    return draft


def _built(draft: _Draft, read: _Draft, models_dirs: Sequence[Path], source: Path | None) -> Loaded:
    """What a complete draft comes to; `read` is it without the models that were found. Raises ConfigError."""
    headers = draft.headers
    config = draft.build()
    if draft.problems:
        raise ConfigError(draft.problems)
    return Loaded(
        config,
        origins={dotted(path): draft.origin_of(path) for path, _ in leaves(config)},
        warnings=tuple(draft.warnings),
        source=source,
        folders=tuple(draft.folders),
        files=tuple(_elsewhere(config, draft.folders)),
        headers=headers,
        look_again=lambda: _built(_with_discovered(read, models_dirs, headers), read, models_dirs, source),
    )


def _elsewhere(config: Config, folders: Sequence[Path]) -> Iterator[Path]:
    files = {file for model in config.models.values() for file, *_ in model.files}
    above = [f"{folder}{os.sep}" for folder in folders]
    return (Path(file) for file in sorted(files) if not any(map(file.startswith, above)))


class _Draft:
    """The values as they come in, each with its origin, and everything that was found wrong with them."""

    def __init__(self, environ: Mapping[str, str], cwd: Path, check_files: bool, state_dir: Path | None) -> None:
        self.cwd = Path(os.path.abspath(cwd))
        self.check_files = check_files
        self.is_for_here = check_files
        self.state_dir = state_dir
        self.values: dict[str, Any] = {}
        self.origins: dict[KeyPath, str] = {}
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.headers = hub.Headers()
        self.folders: list[Path] = []
        self.layers: dict[str, tuple[created.Created, str]] = {}
        """What stores add to the models that they hold, and which store."""
        self.created: dict[str, created.Created] = {}
        self.engines: dict[str, str] = {}
        """Which of them have an engine of their own, and under which name that is."""
        self.lost: dict[str, str] = {}
        self.foreign: dict[str, str] = {}
        """Variables whose values can only be meant for another program, and what is wrong with them for us."""
        self.environ = dict(environ)
        self.file_name = ""
        self.folder = self.cwd
        self.home = environ.get("HOME", "~")
        self.variables = {name: (value, f".env {name}") for name, value in self._dotenv()}
        # Set to nothing is not set, as a variable that a container's file passes on and nobody has set.
        self.variables |= {name: (value, f"env {name}") for name, value in environ.items() if value}

    # --- sources, weakest first ---------------------------------------------------------------------------

    def _dotenv(self) -> Iterator[tuple[str, str]]:
        try:
            lines = (self.cwd / ".env").read_text("utf-8-sig").splitlines()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return
        except (OSError, UnicodeDecodeError) as error:
            # Going on without it might serve everybody without the API key that it holds.
            self.problem((), f"cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}", ".env")
            return
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line or line.startswith("#"):
                continue
            if "\0" in line:
                self.problem((), "holds a NUL character, which no variable can", f".env:{number}")
                continue
            match = _DOTENV.fullmatch(line)
            if match is None:
                self.warnings.append(f".env:{number}: is not NAME=VALUE; ignored")
            else:
                yield match[1], match[2] or match[3] or match[4] or ""

    def find_file(self, path: Path | None) -> Path | None:
        named, _ = self.variables.get("CONFIG_PATH", ("", ""))
        if path is not None or named:
            return self.resolve(str(path or named), self.cwd)
        there = [name for name in _FILE_NAMES if (self.cwd / name).is_file()]
        ours = [name for name in there if name in _OWN_FILE_NAMES or _speaks_of_models(self.cwd / name)]
        for name in there:
            if name not in ours:
                self.warnings.append(
                    f"{name} has none of the keys {', '.join(ConfigFile.model_fields)}: it is taken for another "
                    "program's; if it is this router's, name it with --config"
                )
        if len(ours) > 1:
            self.warnings.append(f"{ours[0]} is used, {' and '.join(ours[1:])} is not")
        if not ours and (self.cwd / _MISSPELT_NAME).is_file():
            self.warnings.append(
                f"{_MISSPELT_NAME} is not read: call it config.json, or name it with --config or CONFIG_PATH"
            )
        return self.cwd / ours[0] if ours else None

    def read(self, source: Path) -> None:
        inside = source.is_relative_to(self.cwd)
        self.file_name = str(source.relative_to(self.cwd) if inside else source)
        self.folder = source.parent
        for key, value in read_file(source, self.file_name).items():
            if key in ConfigFile.model_fields:
                self.put((key,), {} if value is None else value, self.file_name)
            elif key != "$schema":
                self.problem((key,), unknown_key(ConfigFile, key), self.file_name)

    def apply_environment(self) -> None:
        for name, key in _VARIABLES.items():
            value, origin = self.variables.get(name, ("", ""))
            if not value:
                continue
            field = single_value(key)  # None for API_KEY: one key of a list
            if name in _ANYBODYS and (problem := _not_one_of_ours(key, field, value)):
                self.foreign[name] = f"{origin} {problem}"
            else:
                self.put(key, [value] if field is None else _from_text(field, value), origin)
        for name, (value, origin) in self.variables.items():
            if not name.startswith(_PREFIX):
                continue
            path: tuple[str, ...] = tuple(name.removeprefix(_PREFIX).lower().split("__"))
            named = path[0] in ("models", "aliases")
            field = None if named else single_value(path)
            section = section_at(path[:-1])
            if field is not None:
                self.put(path, _from_text(field, value), origin)
            elif named or (section and path[-1] in section.model_fields):
                self.problem((), "a variable can set a single value only; write this into a file", origin)
            else:
                self.problem((), unknown_key(section, path[-1]), origin)

    def add_discovered(self, models_dirs: Sequence[Path]) -> None:
        """Models that nobody named. What the configuration names wins, then the place that comes first."""
        models = self.values.setdefault("models", {})
        if not isinstance(models, dict):
            return
        aliases = self.values.get("aliases")
        self.read_created(models, aliases if isinstance(aliases, dict) else {})
        base = self.models_folder()
        served = {
            os.path.realpath(self.resolve(entry["model_path"], base))
            for entry in models.values()
            if isinstance(entry, dict) and isinstance(entry.get("model_path"), str)
        }
        for origin, folder, look in self.places(models_dirs):
            self.folders.append(folder)
            try:
                discovery = look()
            except OSError as error:
                self.problem((), f"{folder}: {error.strerror or error}", origin)
                continue
            self.warnings += [f"{skipped.path} is not served: {skipped.reason}" for skipped in discovery.skipped]
            for found in discovery.models:
                # A pulled model has the alias that it was asked for, whatever else its file is called.
                if origin != "pulled" and os.path.realpath(found.path) in served:
                    continue
                if not hub.is_alias(found.alias):
                    self.warnings.append(f"{found.path} is not served: nothing can be called {found.alias!r}")
                    continue
                if isinstance(aliases, dict) and _model_named(aliases, found.alias) not in (None, found.alias):
                    self.warnings.append(f"{found.path} is not served: an alias has the same name")
                    continue
                if found.alias in self.created:
                    self.warnings.append(f"{found.path} is not served: what was created has the same name")
                    continue
                files = {"model_path": str(found.path)}
                if found.projector is not None:
                    files["mmproj"] = str(found.projector.path)
                entry = models.setdefault(found.alias, {})
                if not isinstance(entry, dict):
                    continue
                if first := entry.get("model_path"):
                    if not isinstance(first, str) or self.resolve(first, base) != found.path:
                        self.warnings.append(f"{found.path} is not served: {first} has the same name")
                    continue
                for key, file in files.items():
                    if key not in entry:
                        self.put(("models", found.alias, key), file, origin)
                if found.made is not None:
                    self.add_layers(found.alias, found.made, origin)
            served |= {os.path.realpath(found.path) for found in discovery.models}
        self.add_created(models, aliases if isinstance(aliases, dict) else {})

    def add_layers(self, alias: str, made: created.Created, origin: str) -> None:
        """What a store adds to a model's file. The flags that the configuration gives it count more."""
        self.layers[alias] = made, origin
        words = [word for flag in made.flags.items() for word in flag]
        own = self.values["models"][alias].get("flags", [])
        if words and isinstance(own, list):
            self.put(("models", alias, "flags"), [*words, *own], origin)

    def read_created(self, models: Mapping[str, Any], aliases: Mapping[str, Any]) -> None:
        """What clients have made, but for names that the configuration uses."""
        folder = self.state_folder() if self.is_for_here else None
        if folder is None:
            return
        try:
            records = created.read(folder)
        except OSError as error:
            self.warnings.append(f"what was created cannot be read: {error}")
            return
        for name, made in records.items():
            entry = models.get(name)
            if name in aliases or (isinstance(entry, dict) and "model_path" in entry):
                self.warnings.append(
                    f"{name!r}, which was created, is not served: the configuration uses its name"
                )
            elif missing := created.missing_file(made, folder):
                self.warnings.append(f"{name!r}, which was created, is not served: there is no file {missing}")
                self.lost[name] = str(missing)
            else:
                self.created[name] = made

    def add_created(self, models: dict[str, Any], aliases: Mapping[str, Any]) -> None:
        """Those that have an engine of their own. What the configuration says of them wins."""
        folder = self.state_folder()
        if folder is None:
            return

        def model_of(name: str) -> str:
            return str(_model_named(aliases, name) or name)

        self.engines = created.engines(self.created, tuple(models))
        for name, entry in created.model_entries(self.created, self.engines, folder, models, model_of):
            configured = models.setdefault(name, {})
            if not isinstance(configured, dict):
                continue
            if isinstance(configured.get("flags"), list):
                entry["flags"] = [*entry.get("flags", ()), *configured["flags"]]
            for key, value in entry.items():
                if key == "flags" or key not in configured:
                    self.put(("models", name, key), value, created.SOURCE)

    def state_folder(self) -> Path | None:
        """Where the router of this configuration keeps its state; None if it keeps none."""
        if self.state_dir is not None:
            return self.state_dir
        system, api = self.values.get("system"), self.values.get("api")
        named = system.get("state_dir") if isinstance(system, dict) else None
        if isinstance(named, str) and named:
            return self.resolve(named, self.base_of(("system", "state_dir")))
        port = api.get("port", Api().port) if isinstance(api, dict) else Api().port
        return default_path(port, self.environ) if isinstance(port, int) and port else None

    def places(self, models_dirs: Sequence[Path]) -> Iterator[tuple[str, Path, Callable[[], hub.Discovery]]]:
        """Where models may be found: what the place is called, its folder, and how to look into it."""
        system = self.values.get("system")
        system = system if isinstance(system, dict) and self.is_for_here else {}
        cache = pulled.cache_folder(self.environ) if self.is_for_here else None
        if cache is not None:
            yield "pulled", cache, partial(pulled.discover, cache, self.headers)
        key = ("system", "models_dirs")
        named = system.get("models_dirs")
        texts = named if isinstance(named, list) and all(isinstance(text, str) for text in named) else []
        dirs = [("--models-dir", self.resolve(str(folder), self.cwd)) for folder in models_dirs]
        dirs += [("models_dirs", self.resolve(text, self.base_of(key))) for text in texts]
        for origin, folder in dirs:
            yield origin, folder, partial(hub.discover, folder, self.headers, settle_sec=hub.SETTLE_SEC)
        if system.get("hf_cache") is True and cache is not None:
            yield "hf_cache", cache, partial(stores.hugging_face, cache, self.headers, settle_sec=hub.SETTLE_SEC)
        store = stores.ollama_folder(self.environ)
        if system.get("ollama_store") is True and store is not None:
            yield "ollama_store", store, partial(stores.ollama, store, self.headers, settle_sec=hub.SETTLE_SEC)

    # --- values, origins, problems ------------------------------------------------------------------------

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        *parents, key = path
        at: Any = self.values
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                return  # reported when the section is checked
        at[key] = value
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        self._mark(path, value, origin)

    def _mark(self, path: KeyPath, value: Any, origin: str) -> None:
        if isinstance(value, dict) and (value or single_value(path) is None):
            for key, item in value.items():
                self._mark((*path, key), item, origin)
        else:
            self.origins[path] = origin

    def origin_of(self, path: KeyPath) -> str:
        """Of the value itself, or of the list that it is in."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return _DEFAULT

    def problem(self, path: KeyPath, message: str, source: str | None = None) -> None:
        if source is None:
            origin = self.origin_of(path)
            source = self.file_name if origin == _DEFAULT else origin
        self.problems.append(Problem(dotted(path), message, source))

    def warn(self, path: KeyPath, message: str) -> None:
        self.warnings.append(str(Problem(dotted(path), message, self.origin_of(path))))

    def resolve(self, text: str, base: Path) -> Path:
        """Absolute, without `..`, symbolic links left as they are."""
        if text == "~" or text.startswith("~/"):
            text = self.home + text[1:]
        return Path(os.path.normpath(base / text))

    def base_of(self, path: KeyPath) -> Path:
        """Where a relative path starts: in the folder of its file, else in the working directory."""
        return self.folder if self.origin_of(path) == self.file_name else self.cwd

    def models_folder(self) -> Path:
        path = ("system", "base_models_path")
        system = self.values.get("system")
        text = system.get(path[1]) if isinstance(system, dict) else None
        return self.resolve(text, self.base_of(path)) if text and isinstance(text, str) else self.folder

    # --- checks -------------------------------------------------------------------------------------------

    def build(self) -> Config:
        api = self.section(Api, ("api",)) or Api()
        for name in api.clients:
            if not hub.is_alias(name):
                self.problem(("api", "clients", name), "a name is up to 256 printable characters without spaces")
        system = self.system()
        scheduling = self.section(Scheduling, ("scheduling",)) or Scheduling()
        patience = scheduling.patience_sec
        if not patience.high <= patience.normal <= patience.low:
            self.problem(("scheduling", "patience_sec"), "high must not exceed normal, nor normal low")
        entries = self.values.get("models", {})
        if not isinstance(entries, dict):
            self.problem(("models",), "should be aliases, each with its model_path and flags")
            entries = {}
        self.check_clients(api)
        models = {alias: self.model(alias, system) for alias in entries}
        aliases = self.aliases(entries)
        for index, alias in enumerate(system.preload_models):
            path = ("system", "preload_models", index)
            if alias == "*" and len(system.preload_models) > 1:
                self.problem(path, '"*" means all models and stands alone')
            elif alias != "*" and alias not in entries:
                self.no_model(path, alias, entries)
        self.check_pins(models, system.max_concurrent_models)
        if api.ollama_port == api.port:
            self.problem(("api", "ollama_port"), f"{api.port} is api.port already: Ollama's clients may use that")
        self.check_openness(api)
        there = {alias: model for alias, model in models.items() if model}
        usable = {name: alias for name, alias in aliases.items() if alias.uses in there}
        self.lost |= {name: alias.uses for name, alias in aliases.items() if name not in usable}
        usable |= dict(self.stored_aliases(usable, there))
        usable |= dict(self.created_aliases(usable, there))
        config = Config(api, system, scheduling, there, adapters.named(usable, there), self.lost)
        if api.default_model is not None and meant(api.default_model, config) is None:  # it may come yet
            message = f"there is no model {api.default_model!r} now"
            self.warn(("api", "default_model"), message + did_you_mean(api.default_model, config.names))
        return config

    def check_openness(self, api: Api) -> None:
        exposed = api.host not in ("localhost", "::1") and not api.host.startswith("127.")
        is_open = exposed and not (api.api_keys or api.inference_keys or api.clients)
        for name, problem in self.foreign.items():
            if name == "API_KEY" and is_open:  # perhaps it was meant to keep others out
                self.problem((), f"{problem}, and {api.host} would be open to the network without a key", "")
            else:
                self.warnings.append(f"{problem}; ignored, as another program's")
        if is_open:
            message = f"{api.host} is open to the network and no API key is set: anybody there may use the router"
            self.warn(("api", "host"), message)

    def check_clients(self, api: Api) -> None:
        owners = {key.get_secret_value(): "one of api_keys" for key in api.api_keys}
        owners |= {key.get_secret_value(): "one of inference_keys" for key in api.inference_keys}
        for name, client in api.clients.items():
            path = ("api", "clients", name)
            owner = owners.setdefault(client.key.get_secret_value(), f"the key of {name!r}")
            if owner != f"the key of {name!r}":
                self.problem((*path, "key"), f"is {owner}, too: whose is a request that comes with it?")
            if client.priority and BY_NAME[client.priority] < BY_NAME[client.highest_priority]:
                self.problem((*path, "priority"), f"is above highest_priority, {client.highest_priority}")

    def check_pins(self, models: Mapping[str, ModelConfig | None], places: int) -> None:
        pinned = [alias for alias, model in models.items() if model and model.pinned]
        if places <= len(pinned) < len(models) or places < len(pinned):
            key = ("system", "max_concurrent_models")
            source = self.origin_of(key)
            message = f"{places} is no more than the pinned models ({', '.join(pinned)}): others find no place"
            self.warnings.append(str(Problem(dotted(key), message, "" if source == _DEFAULT else source)))

    def stored_aliases(self, aliases: Container[str], models: Container[str]) -> Iterator[tuple[str, AliasConfig]]:
        """What stores add to requests, but where the configuration has an alias of the model's name."""
        for name, (made, origin) in self.layers.items():
            named = replace(created.alias(name, made, name, None), source=origin)
            if name in models and name not in aliases and named.rewrites:
                self.origins["aliases", name] = origin
                yield name, named

    def created_aliases(
        self, aliases: Mapping[str, AliasConfig], models: Container[str]
    ) -> Iterator[tuple[str, AliasConfig]]:
        for name, made in self.created.items():
            base = aliases.get(made.base)
            model = self.engines.get(name) or (made.base if base is None else base.uses)
            if model not in models:
                self.warnings.append(
                    f"{name!r}, which was created, is not served: there is no {made.base!r} any more"
                )
                self.lost[name] = made.base
                continue
            named = created.alias(name, made, model, base)
            if name != model or named.rewrites:
                self.origins["aliases", name] = created.SOURCE
                yield name, named

    def section(self, kind: type[_S], path: KeyPath, **stand_in: Any) -> _S | None:
        """Validate the values at `path`. Where some are wrong, go on without them, to find what else is."""
        values: Any = self.values
        for part in path:
            values = values.get(part, {})
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        wrong: set[str | int] = set()
        for each in errors:
            where = (*path, *each["loc"])
            self.problem(where, explain(each, where))
            wrong.update(each["loc"][:1])
        if not isinstance(values, dict) or not wrong:
            return None
        return kind.model_validate({**stand_in, **{key: values[key] for key in values if key not in wrong}})

    def system(self) -> System:
        system = self.section(System, ("system",)) or System()
        if system.queue_processor_idle_sec is not None:
            self.warn(("system", "queue_processor_idle_sec"), "is obsolete and ignored: nothing polls the queue")
        changes: dict[str, Any] = {}
        if system.parallel_requests is not None:
            path = ("system", "parallel_requests")
            self.warn(path, "is the older name of default_parallel")
            if "default_parallel" not in system.model_fields_set:
                changes["default_parallel"] = system.parallel_requests
                self.origins["system", "default_parallel"] = self.origin_of(path)
        for alias, text in (system.allowed_models or {}).items():
            allowed = ("system", "allowed_models", alias)
            if not hub.is_alias(alias):
                self.problem(allowed, "an alias is up to 256 printable characters without spaces")
            try:
                repository.parse(text, self.environ)
            except repository.BadReference as error:
                self.problem(allowed, str(error))
        path = ("system", "llama_server_path")
        if system.llama_server_path and os.sep in system.llama_server_path:
            binary = self.resolve(system.llama_server_path, self.base_of(path))
            changes["llama_server_path"] = str(binary)
            self.check_file(path, binary, _wrong_with_program)
        changes["base_models_path"] = str(self.models_folder())
        for key in ("state_dir", "log_dir"):
            if folder := getattr(system, key):
                changes[key] = str(self.resolve(folder, self.base_of(("system", key))))
        return system.model_copy(update=changes)

    def model(self, alias: str, system: System) -> ModelConfig | None:
        path = ("models", alias)
        if not hub.is_alias(alias):
            self.problem(path, "an alias is up to 256 printable characters without spaces")
        given = self.values["models"][alias]
        if isinstance(given, dict) and "model_path" not in given:
            message = "is required, as no model was found that is called so"
            if self.check_files:
                self.problem((*path, "model_path"), message)
            else:
                self.warnings.append(str(Problem(dotted((*path, "model_path")), message, self.file_name)))
        entry = self.section(ModelEntry, path, model_path=_UNKNOWN)
        if entry is None:
            return None
        if entry.model_path is None:
            return None
        folder = Path(system.base_models_path)
        model_path = self.resolve(entry.model_path, folder)
        if entry.model_path != _UNKNOWN:
            for part in self.parts((*path, "model_path"), model_path):
                self.check_file((*path, "model_path"), part, _wrong_with_model)
        mmproj = self.resolve(entry.mmproj, folder) if entry.mmproj else None
        if mmproj is not None:
            self.check_file((*path, "mmproj"), mmproj, _wrong_with_model)
        flags, slots = self.final_flags(path, entry, system, mmproj, self.header(model_path))
        purposes, most_tokens = _told_by(flags, entry.env)
        return ModelConfig(
            alias=alias,
            model_path=model_path,
            flags=flags,
            slots=slots,
            env=entry.env,
            files=self.identity(model_path, flags, entry.env),
            pinned=entry.pinned,
            idle_timeout_sec=math.inf if entry.idle_timeout_sec == 0 else entry.idle_timeout_sec,
            footprint_mb=entry.footprint_mb,
            priority=entry.priority or "normal",
            description=entry.description,
            source=self.origin_of((*path, "model_path")),
            projector_was_found=mmproj is not None
            and self.origin_of((*path, "mmproj")) in _FOUND
            and str(mmproj) in flags,
            purposes=purposes,
            most_tokens=most_tokens,
        )

    def header(self, file: Path) -> GGUF | None:
        """What the file of a model says of it; None if it can't be read, which is said to whoever asks for it."""
        if not self.is_for_here:
            return None
        try:
            return self.headers.of(file)
        except FileNotFoundError:
            return self.headers.last(file)
        except (hub.Unfit, hub.Unfinished, GGUFError, OSError):
            return None

    def identity(
        self, model_path: Path, flags: Sequence[str], env: Mapping[str, str]
    ) -> tuple[tuple[str, int, int], ...]:
        """Of all files that an engine is started with."""
        if not self.is_for_here:
            return ()
        try:
            named = _files_of(Flags(flags, {**self.environ, **env}))
            return tuple(stamp for file in (model_path, *named) for stamp in self.headers.identity(file))
        except (FlagError, OSError):
            return ()

    def aliases(self, models: Mapping[str, Any]) -> dict[str, AliasConfig]:
        entries = self.values.get("aliases", {})
        if not isinstance(entries, dict):
            self.problem(("aliases",), "should be names, each with the model that it stands for")
            return {}
        for name, entry in list(entries.items()):
            if isinstance(entry, str):
                self.put(("aliases", name), {"uses": entry}, self.origin_of(("aliases", name)))
        aliases = {name: self.alias(name, models, entries) for name in entries}
        return {name: alias for name, alias in aliases.items() if alias}

    def alias(self, name: str, models: Mapping[str, Any], aliases: Mapping[str, Any]) -> AliasConfig | None:
        path = ("aliases", name)
        if not hub.is_alias(name):
            self.problem(path, "an alias is up to 256 printable characters without spaces")
        entry = self.section(AliasEntry, path, uses=_UNKNOWN)
        if entry is None:
            return None
        if name in models and entry.uses != name:
            self.problem(path, "there is a model of this name")
        uses = (*path, "uses")
        if entry.uses in aliases and entry.uses not in models:
            self.problem(uses, f"{entry.uses!r} is an alias itself; name the model")
        elif entry.uses not in (_UNKNOWN, *models):
            self.no_model(uses, entry.uses, models)
        if entry.system_prompt_replaces and entry.system_prompt_yields:
            self.problem(path, "system_prompt_replaces and system_prompt_yields cannot both be true")
        named = [*entry.defaults, *entry.forced, *entry.removed]
        for parameter in sorted({parameter for parameter in named if named.count(parameter) > 1}):
            self.problem(path, f"{parameter!r} may stand in one of defaults, forced and removed, and once")
        messages = tuple(turn.model_dump() for turn in entry.messages)
        source = self.origin_of((*path, "uses"))
        return AliasConfig(**{**dict(entry), "alias": name, "messages": messages, "source": source})

    def no_model(self, path: KeyPath, alias: str, models: Iterable[str]) -> None:
        message = f"there is no model {alias!r}" + did_you_mean(alias, models)
        if self.check_files:
            self.problem(path, message)
        else:  # on this machine, or any more
            self.warn(path, message)

    def parts(self, path: KeyPath, file: Path) -> list[Path]:
        """The files of a model: one, unless it is split."""
        split = SPLIT_NAME.fullmatch(file.name)
        if split is None:
            return [file]
        first, count = f"{split['stem']}-00001-of-{split['parts']}.gguf", int(split["parts"])
        if int(split["part"]) != 1:
            self.problem(path, f"{file.name} is one part of a split model; name the first one, {first}")
            return []
        return [
            file.with_name(f"{split['stem']}-{part:05}-of-{split['parts']}.gguf") for part in range(1, count + 1)
        ]

    def check_file(self, path: KeyPath, file: Path, wrong_with: Callable[[Path], str]) -> None:
        if not self.check_files:
            return
        try:
            problem = wrong_with(file)
        except OSError as error:  # a folder above it may not be looked into, or its name is too long
            problem = f"{file} cannot be looked at: {error.strerror or error}"
        if problem:
            self.problem(path, problem)

    def final_flags(
        self, path: KeyPath, entry: ModelEntry, system: System, mmproj: Path | None, header: GGUF | None
    ) -> tuple[tuple[str, ...], int]:
        """The entry's own flags, then those that other keys stand for, then those that its file asks for; and the
        slots that they make."""
        where = (*path, "flags")
        for variable in sorted(OWNED_VARIABLES.intersection(entry.env)):
            self.problem((*path, "env", variable), "cannot be set: the router sets it itself")
        slots = 0
        try:
            own = parse(entry.flags)
            given = (*from_environment(entry.env), *own)
            named = {flag.name: flag.spelling for flag in given}
            if self.origin_of((*path, "mmproj")) != self.file_name and any(map(_is_of_a_projector, given)):
                mmproj = None  # it was only found beside the model
            if "parallel" in named:
                slots = Flags(entry.flags, entry.env).slots
        except FlagError as error:
            by_variable = error.index < 0
            self.problem((*path, "env") if by_variable else (*where, error.index), error.message)
            own, named = parse(entry.flags if by_variable else entry.flags[: error.index]), {}
        for flag in own:
            if flag.name in OWNED:
                self.problem((*where, flag.index), f"{flag.spelling} cannot be set: {OWNED[flag.name]}")
            elif flag.name not in FORMS:
                message = f"{flag.spelling} is not a flag of any llama-server known here"
                self.warn((*where, flag.index), message + did_you_mean(flag.spelling, SPELLINGS))
        flags = argv(own)
        origins = [self.origin_of(where)] if flags else []
        for key, name, *value in _derived_flags(path, entry, system, mmproj):
            rival = next((named[other] for other in _SAME.get(name, (name,)) if other in named), None)
            own_key = key[: len(path)] == path
            if rival is None:
                named[name] = f"--{name}"
                flags += [f"--{name}", *value]
                origins.append(f"--{name} from {dotted(key[len(path) :] if own_key else key)}")
                if name == "parallel":
                    slots = int(value[0])
            elif name == "mmproj":
                self.problem(key, f"is given a second time by {rival}")
            elif key == (*path, "device"):
                self.problem(key, f"cpu means -ngl 0, but {rival} is set, too: keep one of them")
            elif own_key and key in self.origins:
                self.warn(key, f"does not count beside {rival}")
        for name, *value in self.flags_of_file(header, flags, entry.env):
            flags += [f"--{name}", *value]
            origins.append(f"--{name} from its file")
        self.origins[where] = ", ".join(origins)
        return tuple(flags), slots

    def flags_of_file(
        self, header: GGUF | None, flags: Sequence[str], env: Mapping[str, str]
    ) -> tuple[tuple[str, ...], ...]:
        inherited = {**self.environ, **env}
        if header is None or not SAYS_IF_IT_EMBEDS.isdisjoint(inherited):
            return ()
        try:
            return tuple(flags_for(header, Flags(flags, inherited)))
        except FlagError:  # which is said to whoever asks for it
            return ()


def _told_by(flags: tuple[str, ...], environ: Mapping[str, str]) -> tuple[frozenset[Purpose], int | None]:
    """Purposes and most tokens; neither of flags that are no good, which is said elsewhere."""
    try:
        started = as_started(flags, environ)
        return started.purposes, started.most_tokens
    except FlagError:
        return frozenset(), None


def _derived_flags(
    path: KeyPath, entry: ModelEntry, system: System, mmproj: Path | None
) -> Iterator[tuple[KeyPath, str] | tuple[KeyPath, str, str]]:
    """Flags that other keys stand for: the key, the flag's name, its value. Of one name the first counts."""
    if mmproj is not None:
        yield (*path, "mmproj"), "mmproj", str(mmproj)
    if entry.device == "cpu":
        yield (*path, "device"), "n-gpu-layers", "0"
    if entry.params is not None:
        for param, name in _PARAMS.items():
            value = getattr(entry.params, param)
            if value is True:
                yield (*path, "params", param), name
            elif value is not None and value is not False:
                yield (*path, "params", param), name, str(value)
    if system.cpu_threads is not None:
        yield ("system", "cpu_threads"), "threads", str(system.cpu_threads)
    if system.use_mmap is False:
        yield ("system", "use_mmap"), "load-mode", "none"
    if system.flash_attention is not None:
        yield ("system", "flash_attention"), "flash-attn", system.flash_attention
    yield ("system", "default_parallel"), "parallel", str(system.default_parallel)


_PARAMS = {
    "n_gpu_layers": "n-gpu-layers",
    "n_ctx": "ctx-size",
    "batch_override": "batch-size",
    "n_batch": "batch-size",
    "parallel_override": "parallel",
    "rope_freq_base": "rope-freq-base",
    "type_k": "cache-type-k",
    "type_v": "cache-type-v",
    "chat_template": "chat-template",
    "embedding": "embedding",
}


_FILES = ("mmproj", "spec-draft-model", "chat-template-file", "grammar-file", "json-schema-file", "control-vector")


def _files_of(flags: Flags) -> Iterator[Path]:
    """What an engine reads besides its model when it starts."""
    yield from (Path(flag.text) for flag in flags.given if flag.name in _FILES)
    yield from map(Path, adapters.files(flags))


def _is_of_a_projector(flag: Flag) -> bool:
    """Whether it says which one the model has, or that it has none."""
    return flag.name in ("mmproj", "mmproj-url") or (flag.name == "mmproj-auto" and flag.negated)


_SAME = {"load-mode": ("load-mode", "mmap", "mlock", "direct-io")}
"""Flags that say the same thing: older engines know `--no-mmap`, newer ones `--load-mode`."""


def _wrong_with_model(file: Path) -> str:
    """Why it cannot be read; empty if it can. Raises OSError."""
    if file.is_dir():
        return f"{file} is a folder; name the GGUF file in it"
    if not file.parent.is_dir():
        return f"there is no file {file}: " + (_not_a_path(file) or "not even its folder")
    if not file.is_file():
        return f"there is no file {file}" + did_you_mean(
            file.name, [each.name for each in file.parent.glob("*.gguf")]
        )
    return "" if os.access(file, os.R_OK) else f"{file} cannot be read: permission denied"


def _wrong_with_program(file: Path) -> str:
    """Why it cannot be run; empty if it can. Raises OSError."""
    if not file.is_file():
        return f"there is no file {file}"
    return "" if os.access(file, os.X_OK) else f"{file} is not executable"


def _not_a_path(file: Path) -> str:
    """Why what somebody wrote as a path leads nowhere, if it was never meant as one; else empty."""
    text = str(file)
    if "/hf.co/" in text or "/https:/" in text or "/http:/" in text:
        return "what has to be downloaded is got by `llama-router pull hf.co/USER/REPO:QUANT`"
    return "variables are not replaced in paths" if "$" in text else ""


def _speaks_of_models(file: Path) -> bool:
    """Whether a file with a name that many programs use is the router's: one that cannot be read may be."""
    try:
        return not (tree := read_file(file, file.name)) or any(key in ConfigFile.model_fields for key in tree)
    except ConfigError:
        pass
    try:
        return _SECTION.search(file.read_text("utf-8-sig")) is not None
    except (OSError, UnicodeDecodeError):
        return True


def _not_one_of_ours(key: KeyPath, field: FieldInfo | None, text: str) -> str:
    """Why a variable's value cannot be one for this key; empty if it can."""
    if field is None:
        try:
            TypeAdapter[Any](Key).validate_python(text)
        except ValidationError:
            return "is no API key: that is one or more printable ASCII characters without spaces"
    elif not isinstance(_from_text(field, text), bool):
        return f"is neither true nor false, which {dotted(key)} is"
    return ""


def _model_named(aliases: Mapping[str, Any], name: str) -> object:
    """What an alias stands for, as it is written; None if there is none of this name."""
    entry = aliases.get(name)
    return entry.get("uses") if isinstance(entry, dict) else entry


def _from_text(field: FieldInfo, text: str) -> Any:
    """The text of a variable as the type of its key; text that does not fit is reported with all the rest."""
    annotation: Any = field.annotation
    if any(get_origin(kind) is dict for kind in get_args(annotation)):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
        return text
    try:
        return TypeAdapter[Any](annotation).validate_python(text)
    except ValidationError:
        return text
