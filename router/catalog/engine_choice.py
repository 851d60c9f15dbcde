"""Choice of the kind of engine for entries that leave it open (`engine: auto`).

A GGUF file runs on llama.cpp. A model in Hugging Face's format runs on the first of the installed kinds that load
such models, in the order of `registry.KINDS`, but first on those that can chat with it. If it does not load there,
the next one is tried.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from router.config.draft import Draft
from router.config.names import some_of
from router.config.problems import KeyPath
from router.config.resolved import ModelConfig
from router.config.schema import HfEntry, Section, System
from router.engines.hf_choice import SAFETENSORS, order
from router.engines.hf_entry import opened
from router.engines.kind import EntryReader
from router.engines.registry import KINDS, is_for_hf_model
from router.formats import hf_model


def is_hf_model(draft: Draft, entry: Mapping[str, Any], base: Path) -> bool:
    """Whether an entry that names no kind of engine is for a model in Hugging Face's format. Reads the disk."""
    if is_for_hf_model(entry):
        return True
    named = entry.get("model_path")
    if not draft.is_for_here or not isinstance(named, str):
        return False
    try:
        return (draft.resolve(named, base) / hf_model.CONFIG).is_file()
    except OSError:
        return False


def missing(draft: Draft, purpose: hf_model.Purpose) -> str:
    """Say what to install to run models in Hugging Face's format for a purpose; empty if something is. Reads the
    disk.
    """
    given = draft.values.get("system")
    paths: dict[str, str] = {}
    for key, value in (given if isinstance(given, dict) else {}).items():
        if key in System.model_fields and key.endswith("_path") and isinstance(value, str):
            is_file = os.sep in value
            paths[key] = str(draft.resolve(value, draft.base_of(("system", key)))) if is_file else value
    system = System.model_construct(None, **paths)
    kinds = [name for name, kind in KINDS.items() if kind.file_format == SAFETENSORS and purpose in kind.purposes]
    return "" if any(_can_run(name, system) for name in kinds) else _to_install(kinds)


def _to_install(kinds: Iterable[str]) -> str:
    return "no engine for it is installed: pip install " + " or ".join(f"'llama-router[{name}]'" for name in kinds)


def hf_models(draft: Draft, alias: str, system: System) -> list[ModelConfig]:
    """Return the model of an entry on each kind of engine that can run it, best first; none if it is not valid."""
    path: KeyPath = ("models", alias)
    given = draft.values["models"][alias]
    kinds = {
        name: kind.entries
        for name, kind in KINDS.items()
        if kind.file_format == SAFETENSORS and kind.entries is not None
    }
    if "flags" in given:
        draft.problem((*path, "flags"), f"are those of one kind of engine: name it (engine: {' or '.join(kinds)})")
        given = draft.values["models"][alias] = {key: value for key, value in given.items() if key != "flags"}
    entry = draft.section(HfEntry, path)
    if entry is None:
        return []
    values = {key: given[key] for key in entry.model_fields_set if key != "engine"}
    able = [name for name, own in kinds.items() if values.keys() <= own.schema.model_fields.keys()]
    if not able:
        draft.problem(path, f"has keys that no kind of engine has together: {some_of(sorted(values))}")
        return []
    files = opened(kinds[able[0]].read(_muted(draft), alias, _entry(kinds, able[0], values), system).model_path)
    purpose = "completion" if files is None else files.purpose
    has_chat_template = files is None or files.has_chat_template
    chosen, problems = order(able, purpose, system, has_chat_template=has_chat_template)
    if not chosen:
        draft.warn(path, f"will not load, as {_to_install(problems)}")
        chosen = [*problems][-1:]
    models: list[ModelConfig] = []
    for name in chosen:
        own = kinds[name]
        read = _entry(kinds, name, values)
        models.append(own.read(_muted(draft) if models else draft, alias, read, system))
    first = next((name for name, problem in problems.items() if not problem), chosen[0])
    if chosen[0] == first:
        why = _why(kinds, problems, purpose)
    else:
        why = f"the model has no chat template, without which {first} answers no chats"
    chosen_model, *others = models
    return [replace(chosen_model, chosen_because=why), *others]


def _can_run(name: str, system: System) -> bool:
    return not KINDS[name].installed(system).problem


def _why(kinds: Iterable[str], problems: Mapping[str, str], purpose: hf_model.Purpose | None) -> str:
    """Say why the first kind without a problem was chosen. Kinds that `problems` lacks do not have all keys."""
    passed: list[str] = []
    for name in kinds:
        does = purpose in KINDS[name].purposes
        problem = problems.get(name, "it lacks keys of the entry" if does else f"it has no {purpose}")
        if not problem:
            break
        passed.append(f"{name}: {problem}")
    return "; ".join(passed) or "the first that can run here"


def _entry(kinds: Mapping[str, EntryReader], name: str, values: Mapping[str, Any]) -> Section:
    return kinds[name].schema.model_validate({**values, "engine": name})


def _muted(draft: Draft) -> Draft:
    """Return a draft that notes elsewhere: what is wrong with an entry is told once."""
    muted = copy.copy(draft)
    muted.problems, muted.warnings = [], []
    return muted
