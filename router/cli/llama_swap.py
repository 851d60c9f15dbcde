"""Convert a configuration of llama-swap and report settings without a counterpart; `importing` reads and writes.

The input is a configuration of August 2026 (llama-swap's `config-schema.json`); macros are replaced as llama-swap
does. A model whose command is llama-server becomes an entry with a file and flags, any other keeps its command.
It is one module because each of llama-swap's keys takes a few lines, and all of them write into one document.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from router.cli.docker_run import DockerRun, NotConverted, is_run, is_stop
from router.config.llama_swap import DROPPED
from router.config.names import ALLOWED, is_alias
from router.config.problems import ConfigError, KeyPath, Problem, dotted
from router.config.schema import UNTOUCHABLE, CommandEntry, ConfigFile, ModelEntry
from router.engines.llamacpp.flags import OWNED, OWNED_VARIABLES, Flag, FlagError, parse
from router.scheduling.policy import DEFAULTS

_MACRO = re.compile(r"\$\{([a-zA-Z0-9_-]+)\}")
_OF_ENVIRONMENT = re.compile(r"\$\{env\.([a-zA-Z_][a-zA-Z0-9_]*)\}")
_AT_START = ("PORT", "PID")
"""Macros that llama-swap replaces when it starts or stops a model."""
_NAME_RULE = f"a name is {ALLOWED} and does not begin with _"
_ENGINE = re.compile(r"llama-server([-_.].*)?")
_HERE = re.compile(r"http://(?:localhost|127\.0\.0\.1|\[::1\])(?::(\$\{PORT\}|[0-9]+))?/?")
_PLACE = re.compile(r"http://([^:/]+)(?::(\$\{PORT\}|[0-9]+))?/?")
_SHORTEST_LOAD_SEC = 15
"""llama-swap's lower bound for healthCheckTimeout."""
_MOST_REQUESTS = 10_000
"""The most that system.requests_kept may be."""
_USUAL_SLOTS = 10
"""Default number of requests that llama-swap sends to a model concurrently."""
_ROUTES = (
    (re.compile("whisper|parakeet|transcri"), ["/v1/audio/transcriptions"]),
    (re.compile("tts|kokoro|piper|speech"), ["/v1/audio/speech"]),
    (re.compile("sd-server|diffusion|comfy|flux"), ["/v1/images/generations"]),
    (re.compile("rerank"), ["/v1/rerank"]),
)
"""Routes that a server is likely to support, by a word of its command; llama-swap forwards every route."""


_OF_COMMANDS = ("capabilities", "checkEndpoint", "cmdStop", "concurrencyLimit", "proxy", "useModelName")
"""Keys that matter for models of other servers than llama-server."""


class Remark(NamedTuple):
    """A setting that could not be converted, or only with a difference."""

    line: int
    path: KeyPath
    message: str


class Words(list[Any]):
    """A list that is written on one line."""


def imported(
    tree: Mapping[str, Any], lines: Mapping[KeyPath, int], folder: Path, environ: Mapping[str, str]
) -> tuple[dict[str, Any], list[Remark]]:
    """Return the converted configuration and the remarks on it, ordered by line.

    Relative paths are resolved against `folder`. Raises ConfigError if an environment variable is not set that
    llama-swap would require as well: it may hold a key.
    """
    work = _Import(tree, lines, folder, environ)
    document = work.document()
    if work.unset:
        raise ConfigError(
            Problem(dotted(path), f"the variable {name} is not set", f"line {work.line_of(path)}")
            for path, name in work.unset
        )
    return document, sorted(work.remarks)


class _Import:
    def __init__(
        self, tree: Mapping[str, Any], lines: Mapping[KeyPath, int], folder: Path, environ: Mapping[str, str]
    ) -> None:
        self._tree = tree
        self._lines = lines
        self._folder = folder
        self._environ = environ
        self.remarks: list[Remark] = []
        self.unset: list[tuple[KeyPath, str]] = []
        """Environment variables that are used but not set, each with the place that uses it."""
        self._api: dict[str, Any] = {}
        self._system: dict[str, Any] = {}
        self._models: dict[str, dict[str, Any]] = {}
        self._aliases: dict[str, Any] = {}
        self._binaries: dict[str, list[KeyPath]] = {}

    def document(self) -> dict[str, Any]:
        self._macros = self._list_of_macros(self._tree.get("macros"), ("macros",))
        top = {key: self._filled(value, self._macros, (key,)) for key, value in self._apart("macros", "models")}
        self._read_models(_mapping(self._tree.get("models")))
        self._read_all(top)
        self._choose_binary()
        sections = {"api": self._api, "system": self._system, "models": self._models, "aliases": self._aliases}
        return {name: section for name, section in sections.items() if section}

    def _apart(self, *keys: str) -> Iterator[tuple[str, Any]]:
        return ((key, value) for key, value in self._tree.items() if key not in keys)

    def _note(self, path: KeyPath, message: str) -> None:
        self.remarks.append(Remark(self.line_of(path), path, message))

    def line_of(self, path: KeyPath) -> int:
        """Return the line of a key, or that of its parent if the key was merged from an anchor."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def _drop(self, path: KeyPath, reason: str) -> None:
        self._note(path, f"has no counterpart: {reason}")

    # --- macros -----------------------------------------------------------------------------------------

    def _list_of_macros(self, written: Any, path: KeyPath) -> list[tuple[str, Any]]:
        return [(name, self._with_environment(value, (*path, name))) for name, value in _mapping(written).items()]

    def _filled(self, value: Any, macros: Sequence[tuple[str, Any]], path: KeyPath) -> Any:
        """Replace the macros in a value: first those of the environment, then the others, the last one first."""
        value = self._with_environment(value, path)
        for name, replacement in reversed(macros):
            value = _replaced(value, f"${{{name}}}", replacement)
        for left in _left_in(value):
            if left not in _AT_START:
                self._note(path, f"there is no macro {left!r}; it is left unchanged")
        return value

    def _with_environment(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, str):
            return _OF_ENVIRONMENT.sub(lambda found: self._variable(found, path), value)
        if isinstance(value, list):
            return [self._with_environment(item, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, dict):
            return {key: self._with_environment(item, (*path, key)) for key, item in value.items()}
        return value

    def _variable(self, found: re.Match[str], path: KeyPath) -> str:
        name = found[1]
        if name in self._environ:
            return self._environ[name]
        self.unset.append((path, name))
        return found[0]

    # --- global settings --------------------------------------------------------------------------------

    def _read_all(self, top: Mapping[str, Any]) -> None:
        routing = _mapping(top.get("routing"))
        settings = _mapping(_mapping(routing.get("router")).get("settings"))
        for key, value in top.items():
            path = (key,)
            if key in DROPPED[ConfigFile]:
                self._drop(path, DROPPED[ConfigFile][key])
            elif key == "apiKeys":
                self._api["api_keys"] = _texts(value)
                if _OF_ENVIRONMENT.search(str(self._tree[key])):
                    self._note(path, "the new file contains the value of an environment variable")
            elif key == "healthCheckTimeout" and _is_number(value):
                self._system["wait_ready_sec"] = max(value, _SHORTEST_LOAD_SEC)
            elif key == "metricsMaxInMemory" and _is_number(value):
                self._system["requests_kept"] = min(max(int(value), 0), _MOST_REQUESTS)
            elif key == "startPort" and _is_number(value):
                self._system["base_port"] = value
            elif key == "unloadTimeout" and _is_number(value):
                self._system["stop_grace_sec"] = value
            elif key == "logLevel":
                if value == "debug":
                    self._system["debug"] = True
            elif key == "groups":
                self._read_groups(_mapping(value), path)
            elif key == "hooks":
                self._read_hooks(_mapping(value), path)
            elif key == "selectors":
                self._read_selectors(_mapping(value), path)
            elif key == "routing":
                self._read_groups(_mapping(settings.get("groups")), ("routing", "router", "settings", "groups"))
                if settings.get("matrix"):
                    self._drop(("routing", "router", "settings", "matrix"), DROPPED[ConfigFile]["matrix"])
                self._read_priorities(_mapping(routing.get("scheduler")))
            elif key != "globalTTL":
                self._note(path, "is not a key of llama-swap, or its value has the wrong type")
        self._read_idle_time(top.get("globalTTL", 0))

    def _read_idle_time(self, ttl: Any) -> None:
        """Convert the idle timeout: without one, llama-swap never unloads a model; with one, it exempts none."""
        if self._models:
            self._system["idle_timeout_sec"] = ttl if _is_number(ttl) else 0
        if ttl or any(entry.get("idle_timeout_sec") for entry in self._models.values()):
            self._system["keep_warm_models"] = 0

    def _read_groups(self, groups: Mapping[str, Any], path: KeyPath) -> None:
        together = 0
        for name, written in groups.items():
            group = _mapping(written)
            members = [member for member in _texts(group.get("members")) if member in self._models]
            stay = group.get("swap") is False
            together += len(members) if stay else min(1, len(members))
            if group.get("persistent") is True:
                for member in members:
                    self._models[member]["pinned"] = True
            elif not stay:
                reason = "its models stay loaded together as far as memory allows"
                self._drop((*path, name), f"{reason} (system.max_concurrent_models: 1 keeps one at a time)")
        if together > DEFAULTS.max_concurrent_models:
            self._system["max_concurrent_models"] = together

    def _read_hooks(self, hooks: Mapping[str, Any], path: KeyPath) -> None:
        for name, written in hooks.items():
            if name != "on_startup":
                self._drop((*path, name), "preloading models is the only supported action")
                continue
            wanted = [name.strip() for name in _texts(_mapping(written).get("preload"))]
            for missing in (name for name in wanted if name not in self._models and name not in self._aliases):
                self._note((*path, name, "preload"), f"{missing!r} is not preloaded: there is no such model")
            there = [name for name in wanted if name in self._models or name in self._aliases]
            if there:
                self._system["preload_models"] = there

    def _read_selectors(self, selectors: Mapping[str, Any], path: KeyPath) -> None:
        for name, written in selectors.items():
            selector = _mapping(written)
            target = next(iter(_texts(selector.get("targets"))), None)
            if selector.get("strategy") == "pin" and target is not None:
                meant = self._aliases.get(target, target)  # with its changes to requests, if it has any
                changes = {key: value for key, value in _mapping(meant).items() if key != "uses"}
                self._alias(name, meant["uses"] if changes else meant, (*path, name), changes)
            else:
                self._drop((*path, name), "an alias always means the same model, whichever are loaded")

    def _read_priorities(self, scheduler: Mapping[str, Any]) -> None:
        path = ("routing", "scheduler", "settings", "fifo", "priority")
        fifo = _mapping(_mapping(scheduler.get("settings")).get("fifo"))
        for name, number in _mapping(fifo.get("priority")).items():
            if name not in self._models or not _is_number(number):
                self._note((*path, name), "is not a model with a numeric priority")
            elif number:
                self._models[name]["priority"] = "high" if number > 0 else "low"

    def _choose_binary(self) -> None:
        """Choose the binary that most models use: the router runs all models with one."""
        if not self._binaries:
            return
        chosen = max(self._binaries, key=lambda binary: len(self._binaries[binary]))
        if "/" in chosen:
            self._system["llama_server_path"] = chosen
        for other, places in self._binaries.items():
            for path in places if other != chosen else ():
                self._note(path, f"will run with {chosen} instead of {other}: all models share one binary")

    # --- models -----------------------------------------------------------------------------------------

    def _read_models(self, models: Mapping[str, Any]) -> None:
        for name, written in models.items():
            path = ("models", name)
            if not isinstance(written, dict):
                self._note(path, "is not a model: it has no keys")
                continue
            own = dict(self._list_of_macros(written.get("macros"), (*path, "macros")))
            macros = dict([("MODEL_ID", name), *self._macros]) | own
            model = {key: value for key, value in written.items() if key != "macros"}
            for key in ("cmd", "cmdStop"):
                if isinstance(model.get(key), str):
                    model[key] = _without_comments(model[key])
            filled = {key: self._filled(value, list(macros.items()), (*path, key)) for key, value in model.items()}
            self._read_model(name, filled, path)

    def _read_model(self, name: str, model: Mapping[str, Any], path: KeyPath) -> None:
        if not _is_name(name):
            self._note(path, f"is left out: {_NAME_RULE}")
            return
        entry = self._entry(model, path)
        if entry is None:
            return
        self._models[name] = entry
        dropped = DROPPED[CommandEntry if "engine" in entry else ModelEntry]
        for key, value in model.items():
            at = (*path, key)
            if key == "ttl":
                if _is_number(value) and value >= 0:
                    entry["idle_timeout_sec"] = value
            elif key == "env" and "container" not in entry:
                entry["env"] = {**entry.get("env", {}), **self._environment(_texts(value), at)}
            elif "engine" in entry and key in (*_OF_COMMANDS, "env"):
                continue
            elif key in ("proxy", "checkEndpoint", "cmdStop", "useModelName"):
                self._check_address(key, value, at)
            elif key in dropped:
                if value not in (0, False, None):
                    self._drop(at, dropped[key])
            elif key not in ("cmd", "name", "description", "aliases", "filters"):
                self._note(at, "is not a key of llama-swap either")
        told = ": ".join(str(model[key]) for key in ("name", "description") if model.get(key))
        if told:
            entry["description"] = told
        self._read_names(name, model, path)

    def _check_address(self, key: str, value: Any, path: KeyPath) -> None:
        """Report a setting of the engine's address, unless it has the usual value, which needs no counterpart."""
        usual = {"proxy": bool(_HERE.fullmatch(str(value))), "checkEndpoint": value in ("/health", "none", "")}
        if value and not usual.get(key, False):
            self._drop(path, DROPPED[ModelEntry][key])

    def _entry(self, model: Mapping[str, Any], path: KeyPath) -> dict[str, Any] | None:
        """Convert the command of a model to an entry; None, with a remark, if it cannot be run here."""
        at = (*path, "cmd")
        try:
            words = shlex.split(str(model.get("cmd") or "").replace("\\\n", " "))
        except ValueError as error:
            self._note(at, f"cannot be read: {error}; the model is left out")
            return None
        set_before: list[str] = []
        if words and PurePath(words[0]).name == "env":
            words = words[1:]
            while words and "=" in words[0] and not words[0].startswith("-"):
                set_before.append(words.pop(0))
        if is_run(words):
            return self._container(words, set_before, model, path)
        if not words or not _ENGINE.fullmatch(PurePath(words[0]).name):
            entry = self._command(words, model, path)
            if entry is not None and set_before:
                entry["env"] = self._environment(set_before, at)
            return entry
        try:
            flags = parse(words[1:])
        except FlagError as error:
            self._note(at, f"the model is left out: {error.message}")
            return None
        entry = self._file_and_flags(flags, at)
        if entry is not None:
            self._binaries.setdefault(words[0], []).append(at)
            if set_before:
                entry["env"] = self._environment(set_before, at)
        return entry

    def _command(self, words: Sequence[str], model: Mapping[str, Any], path: KeyPath) -> dict[str, Any] | None:
        """Convert a model of another server than llama-server; None, with a remark, if it could not be reached."""
        at = (*path, "cmd")
        if not words:
            self._note(at, "the model is left out: its command is empty")
            return None
        here = _HERE.fullmatch(str(model.get("proxy") or "http://localhost:${PORT}"))
        if here is None:
            self._note((*path, "proxy"), "the model is left out: its proxy is on another host or has a path")
            return None
        port = here[1] or "80"
        if port != "${PORT}":  # the command names the same number
            words = [re.sub(rf"(?<![0-9]){port}(?![0-9])", "${PORT}", word) for word in words]
        if not any("${PORT}" in word for word in words):
            program = PurePath(words[0]).name
            self._note(at, f"the model is left out: {program} is not told which port to listen on ({port})")
            return None
        program = self._path(words[0], at) if "/" in words[0] else words[0]
        entry = {
            "engine": "command",
            "cmd": Words(_as_number(_in_our_words(word)) for word in (program, *words[1:])),
        }
        self._complete(entry, words, model, path)
        if model.get("cmdStop"):
            entry["stop_cmd"] = _in_our_words(str(model["cmdStop"]).strip())
        return entry

    def _container(
        self, words: Sequence[str], set_before: Sequence[str], model: Mapping[str, Any], path: KeyPath
    ) -> dict[str, Any] | None:
        """Convert a model whose server runs in a container; None, with a remark, if it could not be reached."""
        at = (*path, "cmd")
        asked = _PLACE.fullmatch(str(model.get("proxy") or "http://localhost:${PORT}"))
        if asked is None:
            self._note((*path, "proxy"), "the model is left out: its proxy has a path")
            return None
        of_command = dict(each.partition("=")[::2] for each in (*set_before, *_texts(model.get("env"))))
        try:
            run = DockerRun(words, asked[2] or "80", asked[1], of_command, lambda each: self._path(each, at))
        except NotConverted as error:
            self._note(at, f"the model is left out: {error}")
            return None
        entry: dict[str, Any] = {"engine": "command", "container": run.container}
        if run.arguments:
            entry["cmd"] = Words(map(_as_number, run.arguments))
        if run.env:
            entry["env"] = run.env
        for reason in run.dropped:
            self._drop(at, reason)
        if unused := sorted(of_command.keys() - run.env.keys()):
            self._drop((*path, "env"), f"a container gets the variables of -e only, and not {', '.join(unused)}")
        stop = str(model.get("cmdStop") or "")
        if stop and not is_stop(stop.split()):
            self._drop((*path, "cmdStop"), "Docker stops the container")
        if "vllm" in run.container["image"]:
            self._note(
                at, "as `engine: vllm` with this `container` its memory would be planned: see docs/engines.md"
            )
        self._complete(entry, [run.container["image"], *run.arguments], model, path)
        return entry

    def _complete(
        self, entry: dict[str, Any], words: Sequence[str], model: Mapping[str, Any], path: KeyPath
    ) -> None:
        """Add what is known of a server apart from its command line."""
        at = (*path, "cmd")
        limit, ready = model.get("concurrencyLimit", 0), model.get("checkEndpoint")
        entry["slots"] = limit if isinstance(limit, int) and limit > 0 else _USUAL_SLOTS
        if routes := _routes_of(words, _mapping(model.get("capabilities"))):
            entry["routes"] = Words(routes)
        if ready not in ("", None, "/health"):
            entry["ready_path"] = None if ready == "none" else str(ready)
        if model.get("useModelName"):
            entry["model_name"] = str(model["useModelName"])
        served = ", ".join(routes) or "chats, completions and embeddings"
        self._note(at, f"is assumed to serve {served}: check `routes` and `footprint_mb` in its entry")

    def _file_and_flags(self, flags: Sequence[Flag], path: KeyPath) -> dict[str, Any] | None:
        entry: dict[str, Any] = {}
        kept: list[Flag] = []
        downloaded = None
        for flag in flags:
            if flag.name == "model":  # the last one counts
                entry["model_path"] = self._path(flag.text, path)
            elif flag.name == "mmproj":
                entry["mmproj"] = self._path(flag.text, path)
            elif flag.name == "hf-repo":
                downloaded = flag.text
            elif flag.name not in OWNED:
                kept.append(flag)
            elif flag.name not in ("host", "port"):
                self._drop(path, f"{flag.spelling}: {OWNED[flag.name]}")
        words = [word for flag in kept for word in flag.words]
        if "model_path" in entry and downloaded is not None:
            self._drop(path, f"-hf {downloaded}: {OWNED['hf-repo']}")
        if "model_path" not in entry:
            how = "its command names no file (-m)"
            if downloaded is not None:
                pull = f"llama-router pull hf.co/{downloaded} --alias {shlex.quote(str(path[1]))}"
                how = f"pull it with `{pull}`; its flags are {shlex.join(words)}"
            self._note(path, f"the model is left out: {how}")
            return None
        if words:
            entry["flags"] = Words(_as_number(word) for word in words)
        return entry

    def _path(self, text: str, path: KeyPath) -> str:
        if PurePath(text).is_absolute():
            return text
        where = f"{self._folder}, not against the directory in which llama-swap was started"
        self._note(path, f"{text!r} is resolved against {where}")
        return str(self._folder / text)

    def _environment(self, settings: Sequence[str], path: KeyPath) -> dict[str, str]:
        environment = {}
        for setting in settings:
            name, equals, value = setting.partition("=")
            if name in OWNED_VARIABLES:
                self._drop(path, f"the router sets {name} itself")
            elif not equals or not name.isidentifier():
                self._note(path, f"{name!r} is not of the form NAME=VALUE")
            else:
                environment[name] = value
        return environment

    # --- names and filters ------------------------------------------------------------------------------

    def _read_names(self, name: str, model: Mapping[str, Any], path: KeyPath) -> None:
        filters, at = _mapping(model.get("filters")), (*path, "filters")
        strip = str(filters.get("stripParams") or filters.get("strip_params") or "")
        removed = sorted({word.strip() for word in strip.split(",") if word.strip()})
        removed = [word for word in removed if self._may_change(word, (*at, "stripParams"))]
        for_all = self._parameters(filters.get("setParams"), (*at, "setParams"))
        by_name = _mapping(filters.get("setParamsByID"))
        names = [name, *_texts(model.get("aliases")), *by_name]
        for alias in dict.fromkeys(names):
            forced = {**for_all, **self._parameters(by_name.get(alias), (*at, "setParamsByID", alias))}
            changes = {"removed": removed, "forced": forced}
            changes = {key: value for key, value in changes.items() if value}
            if alias != name or changes:
                self._alias(alias, name, path, changes)

    def _alias(self, alias: str, uses: str, path: KeyPath, changes: Mapping[str, Any] | None = None) -> None:
        if not _is_name(alias):
            self._note(path, f"the alias {alias!r} is left out: {_NAME_RULE}")
        elif alias in self._aliases or (alias != uses and alias in self._models):
            self._note(path, f"the alias {alias!r} is left out: the name is already taken")
        else:
            self._aliases[alias] = {"uses": uses, **changes} if changes else uses

    def _parameters(self, written: Any, path: KeyPath) -> dict[str, Any]:
        parameters = _mapping(written)
        return {name: value for name, value in parameters.items() if self._may_change(name, (*path, name))}

    def _may_change(self, name: str, path: KeyPath) -> bool:
        if name in UNTOUCHABLE:
            if name != "model":  # llama-swap does not change it either
                self._drop(path, f"{name!r} cannot be changed: clients and the router depend on it")
            return False
        if "." in name:
            self._drop(path, "only top-level parameters can be changed")
            return False
        return True


def _routes_of(words: Sequence[str], capabilities: Mapping[str, Any]) -> list[str]:
    """Guess the routes of another server; an empty list stands for those of a language model."""
    takes, gives = _texts(capabilities.get("in")), _texts(capabilities.get("out"))
    if capabilities.get("reranker") is True:
        return ["/v1/rerank"]
    if gives and "text" not in gives:
        return ["/v1/images/generations"] if "image" in gives else ["/v1/audio/speech"]
    if takes == ["audio"]:
        return ["/v1/audio/transcriptions"]
    said = " ".join(words).lower()
    return next((routes for pattern, routes in _ROUTES if pattern.search(said)), [])


def _in_our_words(word: str) -> str:
    return word.replace("${PORT}", "{port}").replace("${PID}", "{pid}")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_name(text: str) -> bool:
    return is_alias(text) and not text.startswith("_")


def _as_number(word: str) -> str | int:
    return int(word) if re.fullmatch(r"0|[1-9][0-9]{0,9}", word) else word


def _without_comments(command: str) -> str:
    return "\n".join(line for line in command.split("\n") if not line.strip().startswith("#"))


def _replaced(value: Any, macro: str, replacement: Any) -> Any:
    if isinstance(value, str):
        if value == macro:
            return replacement
        said = str(replacement).lower() if isinstance(replacement, bool) else str(replacement)
        return value.replace(macro, said)
    if isinstance(value, list):
        return [_replaced(item, macro, replacement) for item in value]
    if isinstance(value, dict):  # the keys of setParamsByID contain macros as well
        keys = {key: str(_replaced(key, macro, replacement)) for key in value}
        return {keys[key]: _replaced(item, macro, replacement) for key, item in value.items()}
    return value


def _left_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from _MACRO.findall(value)
    elif isinstance(value, list):
        for item in value:
            yield from _left_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _left_in(item)
