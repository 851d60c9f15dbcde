"""Definition of a kind of engine; `registry.py` lists the kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from router.config.draft import Draft
from router.config.resolved import ModelConfig
from router.config.schema import Section, System
from router.engines.documents import Documents
from router.formats import hf_model
from router.observe.prometheus import Gauges

if TYPE_CHECKING:
    from router.engines.base import EngineBackend
    from router.engines.launcher import LocalLauncher
    from router.engines.manner import Manner
    from router.memory.measurements import Learned


class EntryReader(NamedTuple):
    """Conversion of a kind's entries to models."""

    schema: type[Section]
    stand_ins: Mapping[str, Any]
    """Values for required keys that are missing or wrong, so that the rest of an entry can still be checked."""
    read: Callable[[Draft, str, Any, System], ModelConfig]
    """Returns the model of an entry with the given alias. Notes problems in the draft."""


class FileInfo(NamedTuple):
    """Contents of a model's files, for those who ask for all of them."""

    template: str = ""
    """Chat template that the engine uses."""
    license: str = ""
    metadata: Mapping[str, Any] = {}
    projector: Mapping[str, Any] | None = None
    """Metadata of the projector; None if the model has none."""


class EngineTexts(NamedTuple):
    """Metrics that engines of a kind have at `/metrics` themselves."""

    are_told: Callable[[ModelConfig], bool]
    """Returns whether the engines of a model have them."""
    families: Callable[[Iterable[tuple[str, str]]], list[Gauges]]
    """Returns families for the texts of engines, each given with the alias of its model."""


class Installed(NamedTuple):
    """What is installed of a kind of engine, for the choice of a kind and for display."""

    program: str = ""
    """Path or name of the program; empty if none was found."""
    version: str = ""
    """Empty if only running it would tell."""
    origin: str = ""
    """Where it was found."""
    problem: str = ""
    """Why it cannot run here; empty if it can."""

    def __str__(self) -> str:
        named = " ".join(filter(None, (self.program or "none", self.version)))
        return f"{named}   ({'; '.join(filter(None, (self.origin, self.problem)))})"


class Kind(NamedTuple):
    """A kind of engine, as named by `engine` in the entry of a model."""

    backend: Callable[[System, LocalLauncher, Learned], EngineBackend]
    """Creates the backend. Raises NoEngine. Its modules are imported only then: most commands read just the
    configuration, and `ps` must be fast."""
    described: Callable[[ModelConfig], dict[str, Any]]
    """Returns what lists show of a model without loading it. Blocking; raises whatever is wrong with its files."""
    documents: Documents
    installed: Callable[[System], Installed]
    """Returns what is installed of it. Blocking."""
    file_format: str = ""
    purposes: frozenset[hf_model.Purpose] = frozenset({"completion"})
    """What models in safetensors may be for that its engines serve."""
    file_info: Callable[[ModelConfig], FileInfo] = lambda _: FileInfo()
    """Blocking. Raises OSError, GGUFError and FlagError."""
    manner: Manner | None = None
    """How its engines are asked; None: as llama-server is."""
    needs_chat_template: bool = False
    """Whether only models that have a chat template can chat."""
    metrics: EngineTexts | None = None
    """None: its engines have none that are known."""
    entries: EntryReader | None = None
    """None: the catalog reads them together with the models that it finds in folders."""
