"""What a router tells the process of a pull, and the progress that this reports and clients see.

All sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from router.memory.plan import Site


class Order(msgspec.Struct):
    """What a router wants of a pull; see `pull` in `pull.py`."""

    reference: str
    alias: str | None
    taken: Mapping[str, str]
    sites: tuple[Site, ...]
    only_estimate: bool = False


class FileProgress(msgspec.Struct):
    path: str
    total_bytes: int
    completed_bytes: int = 0


class MemoryNote(msgspec.Struct):
    """Estimate, made before the download, of whether the model fits on this machine."""

    need_mib: dict[str, int]
    """Memory needed by device: on vLLM, for all requests at once; else for one."""
    free_mib: dict[str, int]
    """What a running router's engines may use of each device together, or what is free now."""
    context: int
    """Tokens of a request; all that the model was made for, if so many fit."""
    fits: bool
    largest_context: int
    """Largest context with which the model fits now; 0 if none does."""
    context_key: str = "-c"
    """What sets the context: a flag, or a key of the model's entry."""
    engine: str = ""
    """Name of the engine that would run it; empty for GGUF files, which have only one."""
    need: str = ""
    """The need in words, with its source."""
    placements: list[dict[str, int]] = msgspec.field(default_factory=list)
    """MiB by device of each way to run it that is possible here, best first."""


class Problem(msgspec.Struct):
    code: str
    message: str


class Progress(msgspec.Struct):
    """Progress of a pull; sizes are totals of all files."""

    reference: str
    alias: str | None = None
    status: Literal["resolving", "estimated", "downloading", "success", "failed", "cancelled"] = "resolving"
    revision: str | None = None
    files: list[FileProgress] = msgspec.field(default_factory=list)
    total_bytes: int = 0
    completed_bytes: int = 0
    cached: bool = False
    """Whether all files were in the cache before."""
    bytes_per_sec: float = 0.0
    eta_sec: float | None = None
    memory: MemoryNote | None = None
    memory_unknown: str | None = None
    """Why there is no estimate."""
    path: str | None = None
    error: Problem | None = None
