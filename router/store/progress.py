"""How far a pull is: what its process tells the router, and the router its clients. All sizes in bytes."""

from __future__ import annotations

from typing import Literal

import msgspec


class FileProgress(msgspec.Struct):
    path: str
    total_bytes: int
    completed_bytes: int = 0


class MemoryNote(msgspec.Struct):
    """Whether the model will fit here, before it is there."""

    need_mib: dict[str, int]
    """By device, with the model's whole context in one slot."""
    free_mib: dict[str, int]
    context: int
    fits: bool
    largest_context: int
    """With which it fits now; 0 if with none."""


class Problem(msgspec.Struct):
    code: str
    message: str


class Progress(msgspec.Struct):
    """Bytes of all files together."""

    reference: str
    alias: str | None = None
    status: Literal["resolving", "downloading", "success", "failed", "cancelled"] = "resolving"
    revision: str | None = None
    files: list[FileProgress] = msgspec.field(default_factory=list)
    total_bytes: int = 0
    completed_bytes: int = 0
    cached: bool = False
    """All of it was there before."""
    bytes_per_sec: float = 0.0
    eta_sec: float | None = None
    memory: MemoryNote | None = None
    memory_unknown: str | None = None
    """Why there is no estimate."""
    path: str | None = None
    error: Problem | None = None
