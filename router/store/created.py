"""Records of models created by clients: names with modified requests, models of uploaded files, and copies.

They are stored in the state directory: `created.json`, with the files in `blobs/`. This module defines the records
and translates them to entries of the configuration; `creations.py` adds and removes them.

Each record is self-contained: if it was made from another created model, that record is copied into it. Only a
model or alias that was not created is kept by name; if it disappears, the models made from it are not served.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from router.config.resolved import AliasConfig
from router.config.source import Source
from router.formats.ollama_options import BadOption, request_parameters
from router.store.blobs import Blobs

FILE = "created"
"""Name of the file of records, for `State.file`."""


class Example(msgspec.Struct, frozen=True):
    """A message of an example conversation."""

    role: Literal["user", "assistant"]
    content: str


class Created(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model created by a client."""

    created_at: float
    """Seconds since the epoch."""
    base: str = ""
    """The model or alias that it was made from; empty if it was made from files."""
    model: str = ""
    projector: str = ""
    template: str = ""
    """Digests of files, as 64 hexadecimal digits; the template is llama-server's, in Jinja."""
    flags: dict[str, str] = {}
    """Flags of its engine in addition to those of its base."""
    system: str = ""
    parameters: dict[str, Any] = {}
    """Request parameters by Ollama's names."""
    messages: tuple[Example, ...] = ()
    license: tuple[str, ...] = ()

    @property
    def files(self) -> frozenset[str]:
        return frozenset(filter(None, (self.model, self.projector, self.template)))

    @property
    def engine(self) -> tuple[object, ...] | None:
        """Everything that its engine is started with; None if it uses the engine of its base."""
        if self.model or self.template or self.flags:
            return (self.base, self.model, self.projector, self.template, *sorted(self.flags.items()))
        return None


def read(folder: Path) -> dict[str, Created]:
    """Return the records by name; none if the folder does not exist. Raises OSError if they cannot be read."""
    try:
        records = msgspec.json.decode((folder / f"{FILE}.json").read_bytes(), type=dict[str, Created])
        for made in records.values():
            request_parameters(made.parameters)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (msgspec.MsgspecError, UnicodeDecodeError, BadOption) as error:
        raise OSError(f"{folder / FILE}.json is damaged: {error}") from error
    return records


def set_aside(folder: Path) -> bool:
    """Whether records were set aside because they could not be read."""
    return (folder / f"{FILE}.json.broken").exists()


def blobs(folder: Path) -> Blobs:
    return Blobs(folder / "blobs")


def missing_file(made: Created, folder: Path) -> Path | None:
    store = blobs(folder)
    return next((store.path(digest) for digest in sorted(made.files) if not store.has(digest)), None)


def made_from(records: Mapping[str, Created], name: str) -> list[str]:
    """Return the created models that are not served without the model or alias of that name."""
    return [other for other, made in records.items() if made.base == name]


def engines(records: Mapping[str, Created], apart: Container[str]) -> dict[str, str]:
    """Map names that need an engine of their own to the model that provides it: the first with the same engine.

    Names in `apart` share no engine, because the configuration gives them flags.
    """
    first: dict[tuple[object, ...], str] = {}
    return {
        name: name if name in apart else first.setdefault(made.engine or (), name)
        for name, made in records.items()
        if made.engine is not None or name in apart
    }


def model_entries(
    records: Mapping[str, Created],
    own: Mapping[str, str],
    folder: Path,
    models: Mapping[str, Any],
    model_of: Callable[[str], str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names that are models in `own`, each with its entry for the section `models`.

    `model_of` returns the model that a name refers to. Models whose base is missing are left out. Models made from
    files come first, and the caller adds them to `models` before it asks for the others.
    """
    for name, made in sorted(records.items(), key=lambda item: bool(item[1].base)):
        base = models.get(model_of(made.base)) if made.base else {}
        if own.get(name) == name and isinstance(base, dict) and (made.model or "model_path" in base):
            yield name, _model_entry(made, folder, base)


_OF_THE_BASE = ("model_path", "mmproj", "params", "env", "priority", "description")


def _model_entry(made: Created, folder: Path, base: Mapping[str, Any]) -> dict[str, Any]:
    store = blobs(folder)
    entry = {key: base[key] for key in _OF_THE_BASE if key in base}
    if made.model:
        entry["model_path"] = str(store.path(made.model))
    if made.projector:
        entry["mmproj"] = str(store.path(made.projector))
    given = base.get("flags")
    flags = [
        *(given if isinstance(given, list | tuple) else ()),
        *(word for flag in made.flags.items() for word in flag),
    ]
    if made.template:
        flags += ["--chat-template-file", str(store.path(made.template))]
    return {**entry, "flags": flags} if flags else entry


def alias(name: str, made: Created, model: str, base: AliasConfig | None) -> AliasConfig:
    """Return the alias that modifies requests for a created model; `base` is the alias that it was made from."""
    named = replace(base or AliasConfig(name, model), alias=name, uses=model, source=Source.CREATED)
    settled = {*named.forced, *named.removed}
    own = request_parameters(made.parameters)
    defaults = {key: value for key, value in {**named.defaults, **own}.items() if key not in settled}
    named = replace(named, defaults=defaults)
    if made.system:
        named = replace(named, system_prompt=made.system, system_prompt_replaces=False, system_prompt_yields=True)
    if made.messages:
        messages = tuple({"role": turn.role, "content": turn.content} for turn in made.messages)
        named = replace(named, messages=messages)
    return named
