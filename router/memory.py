"""How much memory there is for engines, and how much a model takes of it, in MiB.

A footprint comes from the configuration (`footprint_mb`) or is estimated as file size × `vram_multiplier`.
All GPUs that may be used count as one device, because llama.cpp spreads a model over those it sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from router import gguf
from router.config import ModelConfig, System
from router.devices import Readings
from router.messages import Placement

_MIB = 1 << 20
_SHARE_OF_RAM = 0.8

# A first guess, from a fast disk; what is measured replaces it.
_START_SEC = 0.1
_LOAD_BYTES_PER_SEC = 1 << 30


class Unusable(Exception):
    """The model cannot be loaded; the message says why."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where engines live: `gpu` (all that may be used, together) or `host`."""

    name: str
    total_mib: int
    free_mib: int

    def __str__(self) -> str:
        where = "GPU memory" if self.name == "gpu" else "RAM"
        return f"{self.free_mib} of {self.total_mib} MiB {where} free"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a look at a model's file says before anything is stopped or started for it."""

    placements: tuple[Placement, ...]
    need: str
    expected_load_sec: float


def find_device(readings: Readings) -> Device:
    """GPU memory, all that may be used together, or RAM where there is none."""
    gpus = readings.gpus
    if gpus:
        return Device("gpu", sum(gpu.total_mib for gpu in gpus), sum(gpu.free_mib for gpu in gpus))
    return Device("host", readings.host.total_mib, readings.host.free_mib)


def budget_mib(device: Device, system: System) -> int:
    """What engines may take together: configured, or what is free now less the reserve.

    Of RAM a fifth stays for the page cache and everybody else.
    """
    if system.memory_budget_mb is not None:
        return system.memory_budget_mb
    free = device.free_mib if device.name == "gpu" else int(device.free_mib * _SHARE_OF_RAM)
    return max(0, free - system.vram_reserve_mb)


def inspect(model: ModelConfig, system: System, device: Device, held_mib: int) -> Inspection:
    """Read the header and size the model. Blocking: call it in a thread. Raises Unusable.

    `device` is as it is now; `held_mib` is what our engines hold of it, and would give back.
    """
    try:
        header = gguf.read(model.model_path)
        size = header.file_bytes
    except gguf.UnsupportedGGUF:  # newer than we are; the engine may know it
        size = model.model_path.stat().st_size
    except gguf.GGUFError as error:
        raise Unusable(str(error)) from error
    except OSError as error:
        raise Unusable(f"{model.model_path} cannot be read: {error.strerror or error}") from error
    if device.free_mib + held_mib < system.min_vram_required:
        raise Unusable(f"only {device}; min_vram_required is {system.min_vram_required} MiB")
    if model.footprint_mb is not None:
        footprint, source = model.footprint_mb, "footprint_mb"
    else:
        footprint = max(1, round(size * system.vram_multiplier / _MIB))
        source = f"file size × {system.vram_multiplier:g}"
    return Inspection(
        placements=({device.name: footprint},),
        need=f"{footprint} MiB ({source})",
        expected_load_sec=_START_SEC + size / _LOAD_BYTES_PER_SEC,
    )
