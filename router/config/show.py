"""Renders the resolved configuration as text, one line per key with its origin. Secrets are not shown."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from router.config.problems import KeyPath, dotted
from router.config.resolved import DEFAULT_ENGINE, Config
from router.config.schema import Section

_SECRET_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_SECRET_FLAG = re.compile(r"-hft|--?(hf[-_]token|.*(api[-_]?key|secret|passw|credential).*)", re.IGNORECASE)
"""Flags whose values are secrets."""


def render(config: Config, origins: Mapping[str, str]) -> list[str]:
    """Return a line for each key, with its value and origin."""
    lines = ((dotted(path), text) for path, text in leaves(config))
    return [f"{key} = {text}   ({origins[key]})" for key, text in lines]


def leaves(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """Yield every key of the configuration with its value as text."""
    yield from settings(config)
    for alias, model in config.models.items():
        if model.engine != DEFAULT_ENGINE:
            yield ("models", alias, "engine"), model.engine
        for field in fields(model):
            name = model.written_as.get(field.name, field.name)
            path, value = ("models", alias, name), getattr(model, field.name)
            if field.name in model.derived:
                continue
            if field.name == "env":
                for name, text in value.items():
                    yield (*path, name), "(not shown)" if _SECRET_NAME.search(name) else _text(text)
            elif field.name in ("flags", "cmd", "stop_cmd"):
                yield path, _command_line(value)
            elif isinstance(value, Section):
                yield from _section_leaves(path, value)
            elif isinstance(value, frozenset):
                yield path, json.dumps(sorted(value))
            else:
                yield path, _text(value)
    for name, named in config.aliases.items():
        for field in fields(named):
            value = getattr(named, field.name)
            if field.name not in ("alias", "source") and value:  # most aliases are only a name
                yield from _parameters(("aliases", name, field.name), value)


def fingerprint(config: Config) -> int:
    """Return a number of 48 bits that two configurations share if they differ in secrets at most."""
    digest = blake2b(digest_size=6)
    for path, text in leaves(config):
        digest.update(f"{dotted(path)}={text}\n".encode(errors="surrogateescape"))
    for name, named in config.aliases.items():
        digest.update(f"{name} stands for {named.alias}\n".encode())
    return int.from_bytes(digest.digest(), "big")


def settings(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """Yield every key that is not of a model or an alias, with its value as text."""
    for name in ("api", "system", "scheduling", "kv_store"):
        section: Section = getattr(config, name)
        yield from _section_leaves((name,), section)


def _parameters(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _parameters((*path, name), item)
    else:
        yield path, value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _section_leaves(path: KeyPath, section: Section) -> Iterator[tuple[KeyPath, str]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _section_leaves((*path, name), value)
        elif isinstance(value, Mapping) and value:
            for key, item in value.items():
                if isinstance(item, Section):
                    yield from _section_leaves((*path, name, key), item)
                else:
                    yield from _parameters((*path, name, key), item)
        elif value is not None or not field.json_schema_extra:  # deprecated keys are shown only if they are set
            yield (*path, name), _text(value)


def _command_line(words: Sequence[str]) -> str:
    shown = []
    for before, word in zip(("", *words), words, strict=False):
        flag, is_one_word, _ = word.partition("=")
        if _SECRET_FLAG.fullmatch(before) and not word.startswith("-"):
            word = "(not-shown)"
        elif is_one_word and _SECRET_FLAG.fullmatch(flag):
            word = f"{flag}=(not-shown)"
        shown.append(word)
    return shlex.join(shown)


def _text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return "(not shown)"
    if isinstance(value, tuple) and any(isinstance(item, SecretStr) for item in value):
        return f"({len(value)} not shown)"
    if isinstance(value, float):
        return "never" if math.isinf(value) else str(value).removesuffix(".0")
    if isinstance(value, Path) or (isinstance(value, str) and value):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
