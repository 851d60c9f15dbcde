"""Messages for problems in a configuration: pydantic's errors in plain words, and suggestions for unknown keys.

No message contains a value that may be a secret.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from router.config import llama_swap
from router.config.problems import KeyPath
from router.config.schema import ENGINES, Api, ConfigFile, KvStore, Scheduling, Section, System


def explain(error: ErrorDetails, path: KeyPath, section: type[Section]) -> str:
    """Return the message for one of pydantic's errors at `path`; `section` is the section that was validated."""
    match error["type"]:
        case "extra_forbidden":
            is_its_own = len(error["loc"]) == 1
            return unknown_key(section if is_its_own else section_at(path[:-1]), str(path[-1]))
        case "missing":
            return "is required"
        case "value_error":
            return str(error["ctx"]["error"])
        case "model_type" | "dict_type":
            shape = _SHAPES.get(str(path[-1] if path[2:] else path[0]), "")
            return f"should be a mapping of keys to values{shape}"
        case "tuple_type":
            return "should be a list" + _SHAPES.get(str(path[-1]), "")
        case "string_type" if isinstance(error["input"], int | float):
            return "should be text: enclose it in quotes"
        case "literal_error" if path[0] == "models" and path[2:] == ("engine",):
            return f"should be auto, which is the default, or one of: {', '.join(ENGINES)}"
        case "string_pattern_mismatch" if path[0] == "models" and path[2:3] == ("footprint_mb",):
            return "should be host, gpu (any one) or the name of a GPU, such as gpu0"
        case "literal_error" if path[0] == "models" and path[2:] == ("device",):
            return "should be cpu or auto: the GPU is chosen by available memory, or set by --device in flags"
        case "string_pattern_mismatch" if "cors_origins" in path:
            return "should be *, or like http://localhost:3000 or https://*.example.com, without a path"
        case "string_pattern_mismatch" if "allowed_hosts" in path:
            return "should be a name like gpubox.lan or *.example.com, without scheme and port"
    message = (
        error["msg"]
        .replace("Input should", "should")
        .replace("String should", "should")
        .replace("a valid string", "text")
    )
    value = error["input"]
    if error["type"] in ("int_type", "float_type", "int_parsing", "float_parsing") and isinstance(value, str):
        message += _unit(path)
    shown = isinstance(value, str | int | float) and not _is_secret(path)
    return f"{message}, not {_short(json.dumps(value, ensure_ascii=False))}" if shown else message


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


_LONGEST_SHOWN = 80
_SHAPES = {
    "flags": ": [-c, 8192, --jinja], not one line of text",
    "env": ", such as {CUDA_VISIBLE_DEVICES: 0}",
    "routes": ": [/v1/audio/speech]",
    "footprint_mb": ", such as {gpu: 6000, host: 500}, or one number",
    "models": ", such as {model_path: FILE.gguf}",
}


def _unit(path: KeyPath) -> str:
    """Return the unit of a number, from the name of its key: people write `5m` or `24GiB` there."""
    for name in map(str, path[-2:]):  # of patience_sec.high, too
        if name.endswith(("_sec", "_mb")):
            return " (seconds)" if name.endswith("_sec") else " (MiB)"
    return ""


def unknown_key(section: type[Section] | None, key: str) -> str:
    """Return the message for a key that a section does not have."""
    for name, other in (("api", Api), ("system", System), ("scheduling", Scheduling), ("kv_store", KvStore)):
        if key in other.model_fields:
            return f"unknown key here; it belongs to {name}"
    if explained := llama_swap.hint(section, key):
        return f"unknown key; {explained} (docs/llama-swap.md; `llama-router import` converts a whole file)"
    known = list(section.model_fields) if section else []
    if close := did_you_mean(key, known):
        return f"unknown key{close}"
    return f"unknown key; known keys: {', '.join(known)}" if 0 < len(known) <= 12 else "unknown key"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a suggestion to append to a message; empty if no known word is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _is_secret(path: KeyPath) -> bool:
    if path[0] == "api":
        return path[1:2] in (("api_keys",), ("inference_keys",), ("clients",))
    return path[0] == "models" and "env" in path[2:]


def section_at(path: KeyPath) -> type[Section] | None:
    """Return the section of the schema at `path`; None if there is none."""
    here: type[Section] | None = ConfigFile
    for part in _without_name(path):
        field = here.model_fields.get(str(part)) if here else None
        here = _nested_section(field.annotation) if field else None
    return here


def _without_name(path: KeyPath) -> KeyPath:
    """Return a path without the part that is a name chosen by the user."""
    for named in (("models",), ("aliases",), ("api", "clients")):
        if path[: len(named)] == named:
            return named + path[len(named) + 1 :]
    return path


def _nested_section(annotation: Any) -> type[Section] | None:
    if args := get_args(annotation):  # dict[Alias, ModelEntry], Params | None
        return next(filter(None, map(_nested_section, args)), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def single_value(path: KeyPath) -> FieldInfo | None:
    """Return the field at `path` if it holds a single value, rather than a list or keys of its own."""
    section = section_at(path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    if field is None or _nested_section(field.annotation):
        return None
    kinds = (field.annotation, *get_args(field.annotation))
    return None if any(get_origin(kind) is tuple for kind in kinds) else field
