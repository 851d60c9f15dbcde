"""Search for the program `vllm`, and what is known of its build without running it, which takes seconds."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from router.config.schema import ContainerOfVllm
from router.engines import installed

_MISSING = (
    "the program `vllm` was not found: pip install 'llama-router[vllm]', put it on PATH, or set VLLM_PATH "
    "(system.vllm_path)"
)
_VERSION = re.compile(r"vllm-(\d[\w.]*)(?:\+([\w.]+))?\.dist-info")
_TAG = re.compile(r":v?(\d+(?:\.\d+)+)[^:/]*$")
"""Version in the name of an image, such as vllm/vllm-openai:v0.32.0."""
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
"""Devices of CUDA's driver, in Linux and in Windows' subsystem for it."""
_OF_CUDA = re.compile(r"cu\d+|")


@dataclass(frozen=True, slots=True)
class Program:
    """Installed `vllm`."""

    path: Path
    origin: str
    """Where it was found, for display."""
    version: str = ""
    """Version without its local part; empty if it cannot be determined."""
    variant: str = ""
    """Local part of the version, such as `cpu`; empty for builds for CUDA."""
    image: str = ""
    """Image that it is in; empty: it is on this machine."""

    @property
    def build(self) -> str:
        """Name of the build, by which measurements are remembered."""
        return self.image or f"vllm {self.full_version}"

    @property
    def full_version(self) -> str:
        return f"{self.version}{'+' + self.variant if self.variant else ''}"

    @property
    def is_for_cpu(self) -> bool:
        return self.variant == "cpu"

    @property
    def needs_gpu(self) -> bool:
        """Whether it is known to be a build for GPUs only."""
        return not self.image and bool(self.version) and _OF_CUDA.fullmatch(self.variant) is not None

    def is_since(self, *version: int) -> bool:
        """Return whether it is known to be of this version or a later one."""
        own = tuple(int(part) for part in re.findall(r"\d+", self.version)[: len(version)])
        return len(own) == len(version) and own >= version


def find_program(configured: str | None) -> Program:
    """Return the program to run. Blocking. Raises Unusable if the configured one is missing or none is found."""
    return _found(*installed.find("vllm", configured, _MISSING))


def in_image(container: ContainerOfVllm) -> Program:
    """Return the program of a container. Little is known of it; it is for the CPU if it is given no GPUs."""
    tagged = _TAG.search(container.image)
    sees_gpus = container.gpus is not None or bool(container.devices)
    return Program(
        Path(container.image),
        f"in {container.image}",
        tagged[1] if tagged is not None else "",
        "" if sees_gpus else "cpu",
        container.image,
    )


def lacking(program: Program, *, uses_gpus: bool) -> str:
    """Return what a program lacks to run here; empty if nothing. Blocking."""
    if not program.needs_gpu or (uses_gpus and any(map(os.path.exists, _DRIVERS))):
        return ""
    return "this build needs a GPU, and " + ("there is none" if uses_gpus else "system.gpu_devices allows none")


@lru_cache(maxsize=16)
def _found(path: Path, origin: str) -> Program:
    """Return a program with the version of the package in its environment, as the name of a folder tells it."""
    for folder in sorted(path.resolve().parent.parent.glob("lib/python*/site-packages/vllm-*.dist-info")):
        if (named := _VERSION.fullmatch(folder.name)) is not None:
            return Program(path, origin, named[1], named[2] or "")
    return Program(path, origin)
