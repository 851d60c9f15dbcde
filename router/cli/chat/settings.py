"""Settings of a chat, as people write them: on the command line, and after `/set`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from router.cli.client import JSON_OBJECT, CannotAsk

_SYNONYMS = {
    "num_predict": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temp": "temperature",
    "response_format": "format",
}
"""Other programs' names of settings."""
_ON = ("on", "true", "yes")
_OFF = ("off", "false", "no")


def _number(text: str) -> float:
    number = float(text)
    if number - number != 0:  # infinite, or not a number
        raise ValueError
    return number


def _stops(text: str) -> list[str]:
    """Return texts at which an answer ends: one, in which `\\n` is a line break, or several as a list in JSON."""
    if text.startswith("["):
        stops = json.loads(text)
        if not all(isinstance(each, str) for each in stops):
            raise ValueError
        return list(stops)
    return [text.replace("\\n", "\n").replace("\\t", "\t")]


def _thinking(text: str) -> dict[str, Any]:
    if text in (*_ON, *_OFF):
        return {"enable_thinking": text in _ON}
    if text in ("low", "medium", "high"):
        return {"enable_thinking": True, "reasoning_effort": text}
    raise ValueError


def response_format(text: str) -> dict[str, Any]:
    """Return the `response_format` for `json`, a JSON Schema, or the file of one. Raises CannotAsk."""
    if text == "json":
        return JSON_OBJECT
    try:
        schema = json.loads(text if text.lstrip().startswith("{") else Path(text).expanduser().read_text())
    except OSError as error:
        raise CannotAsk(f"A format is json, a JSON Schema, or its file: {text}: {error.strerror}.") from None
    except ValueError as error:
        raise CannotAsk(f"{text} is not a JSON Schema: {error}.") from None
    if not isinstance(schema, dict):
        raise CannotAsk(f"{text} is not a JSON Schema: that would be an object.")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


_SETTINGS: Mapping[str, tuple[str, Callable[[str], Any], str]] = {
    "temperature": ("temperature", _number, "a number; 0 always takes the likeliest token"),
    "top_p": ("top_p", _number, "a number from 0 to 1"),
    "top_k": ("top_k", int, "a whole number"),
    "min_p": ("min_p", _number, "a number from 0 to 1"),
    "max_tokens": ("max_tokens", int, "a whole number"),
    "seed": ("seed", int, "a whole number"),
    "stop": ("stop", _stops, "a text, or a list of texts in JSON"),
    "repeat_penalty": ("repeat_penalty", _number, "a number"),
    "frequency_penalty": ("frequency_penalty", _number, "a number from -2 to 2"),
    "presence_penalty": ("presence_penalty", _number, "a number from -2 to 2"),
    "format": ("response_format", response_format, "json, a JSON Schema, or a file with one"),
    "think": ("chat_template_kwargs", _thinking, "on, off, low, medium or high"),
}
"""By name: the field of the request, how its value is read, and which values there are."""

NAMES = tuple(_SETTINGS)


def field_of(name: str) -> str:
    """Return the request's field for a setting, also by another program's name. Raises CannotAsk."""
    return _SETTINGS[_known(name)][0]


def value_of(name: str, text: str) -> Any:
    """Return the value of a setting. Raises CannotAsk."""
    _, read, values = _SETTINGS[_known(name)]
    try:
        return read(text)
    except (ValueError, TypeError):
        raise CannotAsk(f"{name} is {values}, not {text!r}.") from None


def shown(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the settings among a request's fields, in words."""
    return [(name, _in_words(fields[field])) for name, (field, _, _) in _SETTINGS.items() if field in fields]


def _in_words(value: Any) -> str:
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if "enable_thinking" in value:
        return str(value.get("reasoning_effort") or ("on" if value["enable_thinking"] else "off"))
    if value.get("type") == "json_object":
        return "json"
    return json.dumps(value.get("json_schema", {}).get("schema", value), ensure_ascii=False)


def _known(name: str) -> str:
    known = _SYNONYMS.get(name, name)
    if known in _SETTINGS:
        return known
    near = difflib.get_close_matches(name, _SETTINGS, 1)
    hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(_SETTINGS)}."
    raise CannotAsk(f"There is no setting {name!r}. {hint}")
