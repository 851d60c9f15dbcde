"""Alternatives for running a model, each with its memory, and the devices on which it can be placed.

Values only. The kind of a model's engine, a `Planner`, finds the alternatives; the scheduler chooses among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol, TypeVar

from router.config.resolved import ModelConfig
from router.config.schema import System
from router.memory.measurements import Identity, Learned
from router.observe.reasons import Problem
from router.scheduling.messages import Placement
from router.system.devices import HOST, Device

T = TypeVar("T")


class Unusable(Problem):
    """Raised if a model cannot be loaded."""

    for_good = False
    """True if that remains so until its entry or its file changes."""


@dataclass(frozen=True, slots=True)
class Share:
    """Memory of a model on one device in MiB. Each value includes the draft model."""

    weights: float = 0.0
    kv: float = 0.0
    recurrent: float = 0.0
    compute: float = 0.0
    work: float = 0.0
    """Working memory of the CPU backend for long prompts."""
    projector: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.kv + self.recurrent + self.compute + self.work + self.projector

    def __add__(self, other: Share) -> Share:
        return Share(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Share)))


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of a model by device, with GPUs as the engine counts them."""

    devices: Mapping[Device, Share]
    provenance: str
    """Source of the values, in one line."""
    context: int
    """Cells of the KV cache, all slots together."""
    host_cache_mib: int | None = 0
    """What the engine's cache of past prompts may grow to on the host, beyond the above; None: unlimited."""

    def mib(self) -> dict[Device, int]:
        """MiB by device, rounded up, without devices that are not used."""
        return {device: math.ceil(share.total) for device, share in self.devices.items() if share.total > 0}


@dataclass(frozen=True, slots=True)
class Size:
    """Memory in MiB by device, with the source of the values."""

    mib: Mapping[Device, int]
    source: str
    estimated: Mapping[Device, int]
    """Estimate of the tool or the formulas, before measurements are applied."""
    identity: Identity | None = None
    """Identity under which measurements of an engine with these flags are stored."""
    details: Footprint | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """Device available to engines; values in MiB."""

    device: Device
    budget_mib: int
    """Memory that all engines together may use."""
    free_mib: int
    """Part of the budget that is not reserved."""
    total_mib: int = 0
    """Size of the device."""
    uuid: str = ""
    kind: str = "cuda"


@dataclass(frozen=True, slots=True)
class Ground:
    """Devices on which a model can be placed."""

    gpus: tuple[Site, ...]
    host: Site
    environment: Callable[[Sequence[Device]], Mapping[str, str]] = field(default=lambda _: {})
    """Returns environment variables that restrict an engine to the given GPUs."""

    def holds(self, placement: Placement) -> bool:
        """Whether the placement fits if all engines are unloaded."""
        budgets = {site.device: site.budget_mib for site in (*self.gpus, self.host)}
        return all(mib <= budgets[device] for device, mib in placement.items())

    def left_mib(self, one: Alternative) -> int:
        """Return how much of its GPUs' free memory an alternative would leave; negative if it does not fit now."""
        free = {site.device: site.free_mib for site in self.gpus}
        return sum(free[gpu] - one.placement.get(gpu, 0) for gpu in one.gpus)


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to run a model."""

    gpus: tuple[Device, ...]
    """GPUs visible to the engine, in its order; empty: it runs on the host."""
    size: Size
    placement: Placement
    flags: tuple[str, ...] = ()
    """Flags added to the model's own."""
    context: int | None = None
    """Context of all slots together, if it was chosen here."""
    remark: str = ""
    """Reductions made to fit the model, in words."""
    is_given: bool = False
    """True if the footprint is configured; measurements then do not replace it."""
    asleep: Placement | None = None
    """Memory that the engine holds asleep; None: it cannot sleep."""

    @property
    def identity(self) -> Identity | None:
        return self.size.identity

    @property
    def need(self) -> str:
        """Need in words: `5000 MiB on gpu0 and 300 MiB on host (llama-fit-params)`."""
        parts = [f"{mib} MiB on {device}" for device, mib in sorted(self.placement.items())]
        return f"{' and '.join(parts)} ({self.size.source})"

    def as_driven(self, counted: Mapping[Device, T]) -> dict[Device, T]:
        """Convert from the engine's numbering of devices to the driver's."""
        return {self.gpus[device.index] if device.is_gpu else device: each for device, each in counted.items()}

    def as_counted(self, driven: Mapping[Device, T]) -> dict[Device, T]:
        """Convert from the driver's numbering to the engine's, omitting devices that it does not use."""
        counted = {gpu: Device.shown(place) for place, gpu in enumerate(self.gpus)} | {HOST: HOST}
        return {counted[device]: each for device, each in driven.items() if device in counted}


@dataclass(frozen=True, slots=True)
class Inspection:
    """Result of an inspection of a model before engines are stopped or started for it."""

    alternatives: tuple[Alternative, ...]
    """Alternatives that fit if other engines are unloaded; otherwise the best that never fits."""
    expected_load_sec: float
    load_is_known: bool
    """True if the load time was measured, false if it is a guess from the size of the files."""
    advice: str = ""
    """Advice on what would fit, if no alternative does."""

    @classmethod
    def of(
        cls,
        found: Sequence[Alternative],
        ground: Ground,
        learned: Learned,
        guessed_load_sec: float,
        advice: Callable[[], str],
    ) -> Inspection:
        """Result for the alternatives found, best first; at least one. `advice` is called if none of them fits."""
        fitting = tuple(one for one in found if ground.holds(one.placement))
        best = (fitting or found)[0].identity
        load_sec = learned.load_sec(best) if best is not None else None
        return cls(
            alternatives=fitting or tuple(found[:1]),
            expected_load_sec=load_sec or guessed_load_sec,
            load_is_known=load_sec is not None,
            advice="" if fitting else advice(),
        )


def possible(found: Sequence[Alternative], ground: Ground) -> tuple[Placement, ...]:
    """Return the placements that fit if all engines are unloaded; if none does, that of the best alternative."""
    fitting = tuple(one.placement for one in found if ground.holds(one.placement))
    return fitting or (found[0].placement,)


class Planner(Protocol):
    """Knowledge of a kind of engine about the memory of its models. Blocking."""

    def plan(self, model: ModelConfig, system: System, ground: Ground, *, beside_others: bool) -> Inspection:
        """Return the alternatives of a model on this machine. `beside_others`: an engine may be evicted for it, so
        first check that its own engine runs. Raises Unusable."""

    def advise(self, model: ModelConfig, system: System, ground: Ground, too_much: Placement) -> str:
        """Return advice on what fits where a placement proved too large; empty if unknown."""
