"""Merges the sources of configured values: the file, then `.env` and the environment, then the command line."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from router.config import gateway
from router.config.draft import Draft
from router.config.errors import section_at, single_value, unknown_key
from router.config.file import read_file
from router.config.problems import ConfigError, KeyPath, dotted
from router.config.schema import ConfigFile, Key

_VARIABLES: dict[str, KeyPath] = {
    "LLAMA_SERVER_PATH": ("system", "llama_server_path"),
    "TRANSFORMERS_PATH": ("system", "transformers_path"),
    "VLLM_PATH": ("system", "vllm_path"),
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
"""Prefix of variables such as `LLAMA_ROUTER__SYSTEM__BASE_PORT`, which sets `system.base_port`; not for lists."""

_OWN_FILE_NAMES = ("llama-router.yaml", "llama-router.yml", "llama-router.json")
_FILE_NAMES = (*_OWN_FILE_NAMES, "config.json", "config.yaml", "config.yml")
_MISSPELT_NAME = "konfig.json"
"""File name that the documentation of an earlier router uses in one place."""
_SECTION = re.compile(rf"""(?:^|[\s{{,])["']?(?:{"|".join(ConfigFile.model_fields)})["']?\s*:""")
_ANYBODYS = frozenset({"API_KEY", "DEBUG", "STRUCTURED_LOGS"})
"""Variables that other programs use as well, with other values."""

_DOTENV = re.compile(r"""(?:export\s+)?(\w+)\s*=(?:\s+#.*|\s*(?:"(.*?)"|'(.*?)'|(.*?))(?:\s+#.*)?)""")
_Variables = Mapping[str, tuple[str, str]]
"""Variables: the value of each, and where it was set."""


def read_values(draft: Draft, path: Path | None, overrides: Mapping[str, tuple[str, Any]]) -> Path | None:
    """Fill a draft from all sources; later ones take precedence. Returns the file that was read, if any.

    `path` is the file named on the command line; `overrides` are those of `load`.
    """
    variables = {name: (value, f".env {name}") for name, value in _dotenv(draft)}
    # An empty variable counts as unset: container definitions pass on variables that are not set.
    variables |= {name: (value, f"env {name}") for name, value in draft.environ.items() if value}
    source, tree = _find_file(draft, variables, path)
    if source is not None:
        _read(draft, source, tree)
    _apply_environment(draft, variables)
    gateway.add_models(draft, variables)
    for key, (option, value) in overrides.items():
        parts = key.split(".", 1) if key.startswith("models.") else key.split(".")
        draft.put(tuple(parts), value, option)
    return source


def _dotenv(draft: Draft) -> Iterator[tuple[str, str]]:
    try:
        lines = (draft.cwd / ".env").read_text("utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return
    except (OSError, UnicodeDecodeError) as error:
        # It may hold the API key; without it, the router might serve without one.
        draft.problem((), f"cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}", ".env")
        return
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if "\0" in line:
            draft.problem((), "contains a NUL character, which variables cannot have", f".env:{number}")
            continue
        match = _DOTENV.fullmatch(line)
        if match is None:
            draft.warnings.append(f".env:{number}: is not NAME=VALUE; ignored")
        else:
            yield match[1], match[2] or match[3] or match[4] or ""


def _find_file(
    draft: Draft, variables: _Variables, path: Path | None
) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the configuration file, if there is one, with its content if that had to be read to find out."""
    named, _ = variables.get("CONFIG_PATH", ("", ""))
    if path is not None or named:
        return draft.resolve(str(path or named), draft.cwd), None
    there = [name for name in _FILE_NAMES if (draft.cwd / name).is_file()]
    trees = {name: _parsed(draft.cwd / name) for name in there if name not in _OWN_FILE_NAMES}
    ours = [name for name in there if name not in trees or _speaks_of_models(draft.cwd / name, trees[name])]
    for name in there:
        if name not in ours:
            draft.warnings.append(
                f"{name} has none of the keys {', '.join(ConfigFile.model_fields)}: it is assumed to "
                "belong to another program; if it is meant for this router, pass it with --config"
            )
    if len(ours) > 1:
        draft.warnings.append(f"{ours[0]} is used, {' and '.join(ours[1:])} ignored")
    if not ours and (draft.cwd / _MISSPELT_NAME).is_file():
        draft.warnings.append(
            f"{_MISSPELT_NAME} is not read: rename it to config.json, or pass it with --config or CONFIG_PATH"
        )
    return (draft.cwd / ours[0], trees.get(ours[0])) if ours else (None, None)


def _read(draft: Draft, source: Path, tree: dict[str, Any] | None) -> None:
    """Put the file into the draft; `tree` is its content if that is known. Raises ConfigError."""
    inside = source.is_relative_to(draft.cwd)
    draft.file_name = str(source.relative_to(draft.cwd) if inside else source)
    draft.folder = source.parent
    if tree is None:
        tree = read_file(source, draft.file_name)
    for key, value in tree.items():
        if key in ConfigFile.model_fields:
            draft.put((key,), {} if value is None else value, draft.file_name)
        elif key != "$schema":
            draft.problem((key,), unknown_key(ConfigFile, key), draft.file_name)


def _apply_environment(draft: Draft, variables: _Variables) -> None:
    for name, key in _VARIABLES.items():
        value, origin = variables.get(name, ("", ""))
        if not value:
            continue
        field = single_value(key)  # None for API_KEY: one key of a list
        if name in _ANYBODYS and (problem := _not_one_of_ours(key, field, value)):
            draft.foreign[name] = f"{origin} {problem}"
        else:
            draft.put(key, [value] if field is None else _from_text(field, value), origin)
    for name, (value, origin) in variables.items():
        if not name.startswith(_PREFIX):
            continue
        path: tuple[str, ...] = tuple(name.removeprefix(_PREFIX).lower().split("__"))
        named = path[0] in ("models", "aliases")
        field = None if named else single_value(path)
        section = section_at(path[:-1])
        if field is not None:
            draft.put(path, _from_text(field, value), origin)
        elif named or (section and path[-1] in section.model_fields):
            draft.problem((), "variables can set single values only; set this key in a file", origin)
        else:
            draft.problem((), unknown_key(section, path[-1]), origin)


def _parsed(file: Path) -> dict[str, Any] | None:
    """Return the content of a file; None if it cannot be read."""
    try:
        return read_file(file, file.name)
    except ConfigError:
        return None


def _speaks_of_models(file: Path, tree: dict[str, Any] | None) -> bool:
    """Whether a file whose name many programs use is the router's; one that cannot be read is assumed to be."""
    if tree is not None:
        return not tree or any(key in ConfigFile.model_fields for key in tree)
    try:
        return _SECTION.search(file.read_text("utf-8-sig")) is not None
    except (OSError, UnicodeDecodeError):
        return True


def _not_one_of_ours(key: KeyPath, field: FieldInfo | None, text: str) -> str:
    """Say why a variable's value is invalid for its key; empty if it is valid."""
    if field is None:
        try:
            TypeAdapter[Any](Key).validate_python(text)
        except ValidationError:
            return "is not a valid API key: a key is one or more printable ASCII characters without spaces"
    elif not isinstance(_from_text(field, text), bool):
        return f"is neither true nor false, as {dotted(key)} requires"
    return ""


def _from_text(field: FieldInfo, text: str) -> Any:
    """Convert a variable's text to the type of its key; invalid text is returned, and reported by validation."""
    annotation: Any = field.annotation
    if any(get_origin(kind) is dict for kind in get_args(annotation)):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
        return text
    try:
        return TypeAdapter[Any](annotation).validate_python(text)
    except ValidationError:
        return text
