"""Resolved configuration: what the rest of the router works with.

The same sections as in the file, and for each model a `ModelConfig` with absolute paths and the final list of
engine flags.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from router.config.schema import ENGINES, Api, KvStore, Scheduling, System
from router.scheduling.queue import PriorityName

DEFAULT_ENGINE = ENGINES[0]
"""Kind of engine of models whose entry names none, and of those that are found or pulled."""
Purpose = Literal["embedding", "rerank", "mmproj"]
"""Purposes other than text for which an engine can be started; `mmproj` is that of images, and of audio."""


def idle_timeout(configured: float | None) -> float | None:
    """Return a configured idle timeout in seconds, where 0 means never: `math.inf`. None: not configured."""
    return math.inf if configured == 0 else configured


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Resolved configuration of one model; each kind of engine has a subclass with the fields of its own.

    Equal instances need no change at a reload.
    """

    engine: ClassVar[str]
    """The kind of engine, as named in the entry."""
    derived: ClassVar[frozenset[str]]
    """Fields that are not keys of the entry: they follow from its name, its files or its flags."""
    written_as: ClassVar[Mapping[str, str]] = {}
    """Keys of the entry whose fields have another name, by field."""

    alias: str
    model_path: Path
    flags: tuple[str, ...] = ()
    """Arguments of its engine in addition to those that the router sets."""
    slots: int = 1
    env: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    files: tuple[tuple[str, int, int], ...] = field(default=(), repr=False)
    """Path, size and modification time (ns) of each file that the engine is started with."""
    pinned: bool = False
    idle_timeout_sec: float | None = None
    """None: the value of `System`; `math.inf`: never unloaded when idle."""
    priority: PriorityName = "normal"
    description: str = ""
    source: str = field(default="", compare=False)
    """Origin of the model: the name of a file, or a `Source`."""
    purposes: frozenset[Purpose] = field(default=frozenset(), compare=False)
    """Purposes according to the flags, cached because parsing flags for each request takes too long."""
    most_tokens: int | None = field(default=None, compare=False)
    """Default limit on output tokens according to the flags, cached for the same reason."""
    routes: frozenset[str] | None = None
    """Routes that its engine serves. None: those of llama-server."""
    known_as: str | None = None
    """Name by which its engine knows the model. None: any."""

    chosen_because: str = field(default="", compare=False)
    """Why it runs on this kind of engine, where its entry leaves that open and there is a choice."""

    def takes_images(self) -> bool:
        return "mmproj" in self.purposes

    @property
    def revision(self) -> Hashable:
        """Everything an engine is started with. While it is unchanged, other changes need no restart."""
        return (self.model_path, self.flags, frozenset(self.env.items()), self.files)

    @property
    def parameters(self) -> Mapping[str, str] | None:
        """Parameters of llama-server that its engine has as well, with their names there. None: all of them."""
        return None


@dataclass(frozen=True, slots=True)
class AliasConfig:
    """Resolved configuration of an alias; see `AliasEntry`."""

    alias: str
    uses: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    forced: Mapping[str, Any] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    system_prompt: str = ""
    system_prompt_replaces: bool = False
    system_prompt_yields: bool = False
    messages: tuple[Mapping[str, str], ...] = ()
    priority: PriorityName | None = None
    description: str = ""
    source: str = field(default="", compare=False)
    """Origin of the alias: the name of a file, or `created`."""

    @property
    def rewrites(self) -> bool:
        """Whether requests under this alias have their bodies changed."""
        return bool(self.defaults or self.forced or self.removed or self.speaks)

    @property
    def speaks(self) -> bool:
        """Whether messages are inserted before the client's."""
        return bool(self.system_prompt or self.messages)


@dataclass(frozen=True, slots=True)
class Unserved:
    """A model that was found but is not served."""

    what: str
    """Its file or folder; the name of a created model."""
    reason: str
    source: str
    """Where it was found: a `Source`."""


@dataclass(frozen=True, slots=True)
class Config:
    api: Api = field(default_factory=Api)
    system: System = field(default_factory=System)
    scheduling: Scheduling = field(default_factory=Scheduling)
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    aliases: Mapping[str, AliasConfig] = field(default_factory=dict)
    otherwise: Mapping[str, ModelConfig] = field(default_factory=dict)
    """By alias, the same model on another kind of engine, to be tried if it does not load on its own."""
    kv_store: KvStore = field(default_factory=KvStore)
    lost: Mapping[str, str] = field(default_factory=dict)
    """Names whose model is missing, with the file or model they refer to."""
    scanned: tuple[tuple[str, str], ...] = ()
    """Folders that were scanned for models, each with its `Source`."""
    unserved: tuple[Unserved, ...] = ()

    @property
    def engines(self) -> list[str]:
        """Kinds of engine of the models. The default kind is always one: its models may be found or pulled."""
        return list(dict.fromkeys((DEFAULT_ENGINE, *(model.engine for model in self.models.values()))))

    @property
    def names(self) -> list[str]:
        """All names that a client may request."""
        return list(dict.fromkeys((*self.models, *self.aliases)))

    def __contains__(self, name: object) -> bool:
        """Whether `name` is one of `names`."""
        return name in self.aliases or name in self.models

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def model_of(self, name: str) -> ModelConfig:
        """Model that one of the `names` refers to."""
        alias = self.aliases.get(name)
        return self.models[name if alias is None else alias.uses]

    @property
    def default_model(self) -> str | None:
        """Name used for requests that do not specify a model."""
        return self.api.default_model or (next(iter(self.models)) if len(self.models) == 1 else None)

    @property
    def sources(self) -> dict[str, str]:
        """Origin of each name: of the model, or of the alias unless it has the name of its model."""
        models = {name: model.source for name, model in self.models.items()}
        aliases = {name: alias.source for name, alias in self.aliases.items() if alias.uses != name}
        return {**models, **aliases}
