"""GPUs that are not there: NVIDIA's library, played by `fake_nvml/nvml.c`, for routers and those who ask it.

    def test_it(gpus, start):
        gpus.set(Gpu(total_mib=2000), Gpu(total_mib=1000))
        router = start(config, **gpus.environ, LLAMA_SERVER_PATH=llama_server(tmp_path))
        gpus.set(gpus.gpus[0], fault=[Fault("nvmlDeviceGetMemoryInfo", gpu=0, code=GPU_IS_LOST)])

With `engines=True` real engines on the CPU hold of the GPUs that they are shown what they hold of RAM.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("fake_nvml") / "nvml.c"

NO_PERMISSION, NOT_SUPPORTED, FUNCTION_NOT_FOUND, DRIVER_NOT_LOADED, GPU_IS_LOST, UNKNOWN = 4, 3, 13, 9, 15, 999


@dataclass(frozen=True)
class Part:
    """A MIG device."""

    total_mib: int
    used_mib: int = 0
    name: str = "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    uuid: str = field(default_factory=lambda: f"MIG-{uuid.uuid4()}")


@dataclass(frozen=True)
class Held:
    """Memory that a process holds; None where the driver does not tell."""

    pid: int
    mib: int | None
    kind: str = "compute"


@dataclass(frozen=True)
class Gpu:
    total_mib: int = 24576
    used_mib: int = 0
    """By others; besides what the driver reserves."""
    reserved_mib: int = 0
    name: str = "NVIDIA GeForce RTX 3090"
    uuid: str = field(default_factory=lambda: f"GPU-{uuid.uuid4()}")
    utilization: int = 0
    temperature: int = 40
    power: int = 30
    power_limit: int = 350
    is_mig: bool = False
    parts: tuple[Part, ...] = ()
    processes: tuple[Held, ...] = ()


@dataclass(frozen=True)
class Fault:
    """What a function (`*`: every one) returns for a GPU (None: for every one), instead of what it should."""

    function: str = "*"
    gpu: int | None = None
    code: int | None = UNKNOWN
    """None: it hangs, until this fault is gone."""


class PlayedGpus:
    def __init__(self, library: Path, folder: Path) -> None:
        self.gpus: tuple[Gpu, ...] = ()
        self._world = folder / "gpus.txt"
        self.environ = {"LD_LIBRARY_PATH": str(library.parent), "PLAYED_NVML": str(self._world)}
        self.set()

    def set(self, *gpus: Gpu, faults: Sequence[Fault] = (), driver: int = 0, engines: bool = False) -> None:
        """From now on these are the machine's GPUs. Another `driver` is one that was reloaded."""
        lines: list[tuple[object, ...]] = [("driver", driver)]
        if engines:
            lines.append(("engines",))
        self._others = {"driver": driver, "engines": engines}
        for index, gpu in enumerate(gpus):
            lines.append(
                (
                    *("gpu", gpu.uuid, gpu.name, gpu.total_mib, gpu.used_mib, gpu.reserved_mib),
                    *(gpu.utilization, gpu.temperature, gpu.power, gpu.power_limit, int(gpu.is_mig)),
                )
            )
            lines += [("part", index, part.uuid, part.name, part.total_mib, part.used_mib) for part in gpu.parts]
            lines += [
                ("process", index, held.pid, -1 if held.mib is None else held.mib, held.kind)
                for held in gpu.processes
            ]
        for fault in faults:
            which = (fault.function, "*" if fault.gpu is None else fault.gpu)
            lines.append(("hang", *which) if fault.code is None else ("fault", *which, fault.code))
        self.gpus = gpus
        draft = self._world.with_suffix(".new")
        text = "".join("\t".join(map(str, line)) + "\n" for line in lines)
        draft.write_bytes(os.fsencode(text))
        draft.replace(self._world)

    def change(self, index: int, **figures: object) -> None:
        """Other figures of one GPU; without faults."""
        changed = replace(self.gpus[index], **figures)  # type: ignore[arg-type]
        self.set(*self.gpus[:index], changed, *self.gpus[index + 1 :], **self._others)  # type: ignore[arg-type]


def build(folder: Path) -> Path:
    """Compile the library. Skips the test without a C compiler or where NVIDIA has no such library."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("a C compiler and Linux are needed to play NVIDIA's library")
    library = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return library


def llama_server(folder: Path, *, behind_a_shell: bool = False) -> str:
    """Path of the embedded engine, dressed as a llama-server, which the router believes able to use GPUs."""
    script = folder / "llama-server"
    command = f'{sys.executable} -m router.engines.llamacpp.embedded "$@"'
    script.write_text(f"#!/bin/sh\n{f'{command}; exit $?' if behind_a_shell else f'exec {command}'}\n")
    script.chmod(0o755)
    return str(script)
