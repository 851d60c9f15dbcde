"""How much memory there is for engines, and how much a model takes of it, in MiB.

A footprint comes from the configuration (`footprint_mb`) or is estimated as file size × `vram_multiplier`.
All GPUs that may be used count as one device, because llama.cpp spreads a model over those it sees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from router import gguf
from router.config import ModelConfig, System
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


def find_device(system: System, *, engine_uses_gpus: bool) -> Device:
    """GPU memory if NVML answers and the engine can use it, else RAM."""
    if engine_uses_gpus and system.gpu_devices:
        gpu = _nvidia(system.gpu_devices)
        if gpu is not None:
            return gpu
    total, available = host_memory()
    return Device("host", total, available)


def budget_mib(device: Device, system: System) -> int:
    """What engines may take together: configured, or what is free now less the reserve.

    Of RAM a fifth stays for the page cache and everybody else.
    """
    if system.memory_budget_mb is not None:
        return system.memory_budget_mb
    free = device.free_mib if device.name == "gpu" else int(device.free_mib * _SHARE_OF_RAM)
    return max(0, free - system.vram_reserve_mb)


def host_memory() -> tuple[int, int]:
    """Total and available RAM in MiB; a cgroup's limit counts (cgroup v2 memory.max, v1 limit_in_bytes)."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for folder, limit_name, usage_name, cache_names in (
        ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
        (
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_inactive_file", "total_active_file"),
        ),
    ):
        group = Path("/sys/fs/cgroup", folder)
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            limit = int((group / limit_name).read_text())
            usage = int((group / usage_name).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            usage -= sum(int(stat.get(name, 0)) for name in cache_names)  # the kernel takes that back at need
            if limit < total:
                total, available = limit, min(available, max(0, limit - usage))
    return total // _MIB, available // _MIB


def inspect(model: ModelConfig, system: System, device: Device, held_mib: int) -> Inspection:
    """Read the header and size the model. Blocking: call it in a thread. Raises Unusable.

    `held_mib` is what our engines hold of the device, and would give back.
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
    now = find_device(system, engine_uses_gpus=device.name == "gpu")
    if now.free_mib + held_mib < system.min_vram_required:
        raise Unusable(f"only {now}; min_vram_required is {system.min_vram_required} MiB")
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


def _nvidia(indices: Sequence[int]) -> Device | None:
    """The listed GPUs through NVML, which makes no CUDA context; None without a driver or such GPUs."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        known = range(pynvml.nvmlDeviceGetCount())
        figures = [
            pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
            for index in indices
            if index in known
        ]
        if not figures:
            return None
        return Device("gpu", sum(f.total for f in figures) // _MIB, sum(f.free for f in figures) // _MIB)
    except pynvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
