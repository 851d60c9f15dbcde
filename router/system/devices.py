"""The names of memory that models live in: RAM, GPUs and parts of GPUs, as values.

Nothing is read here; what a device says of itself is a `Reading` (`readings.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, TypeVar

import msgspec

T = TypeVar("T")

_WHOLE = -1
_NAME = re.compile(r"(?:(?P<node>[^/\s]+)/)?(?:host|gpu(?P<index>\d{1,6})(?::(?P<part>\d{1,6}))?)", re.ASCII)


class Device(msgspec.Struct, frozen=True, order=True, cache_hash=True):
    """A device, by who counts it.

    A driver counts the GPUs of the machine. An engine counts only those that it is shown, from 0: its first may be
    the driver's third. The two are never equal, whatever their numbers, so that no figure of one is taken for the
    other's. RAM is the same for both.

    Written as status pages, metrics, logs and files spell it: `gpu0`, `gpu0:1` (a part of it), `host`.
    """

    node: str = ""
    """The machine; empty: this one."""
    kind: Literal["engine", "gpu", "host"] = "host"
    """`engine` is no memory, but a place among the engines, which is counted in the same way (see `ENGINES`)."""
    counted_by: Literal["driver", "engine"] = "driver"
    index: int = 0
    part: int = _WHOLE
    """Of a partitioned GPU (MIG), the number of the part; -1: the whole GPU."""

    @classmethod
    def gpu(cls, index: int, part: int | None = None, *, node: str = "") -> Device:
        """A GPU by its driver's number."""
        return cls(node, "gpu", "driver", index, _WHOLE if part is None else part)

    @classmethod
    def shown(cls, index: int) -> Device:
        """A GPU by the number that it has for an engine, among those that the engine is shown."""
        return cls("", "gpu", "engine", index)

    @classmethod
    def named(cls, text: str, *, counted_by: Literal["driver", "engine"] = "driver") -> Device:
        """The device that a configuration or a file names. Raises ValueError."""
        found = _NAME.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not a device: use host, or gpu and a number, such as gpu0")
        node = found["node"] or ""
        if found["index"] is None:
            return cls(node)
        part = _WHOLE if found["part"] is None else int(found["part"])
        return cls(node, "gpu", counted_by, int(found["index"]), part)

    @property
    def is_gpu(self) -> bool:
        return self.kind == "gpu"

    @property
    def is_part(self) -> bool:
        """A part of a GPU: one process can use one part only, so a model cannot be split over several."""
        return self.part != _WHOLE

    def __str__(self) -> str:
        node = f"{self.node}/" if self.node else ""
        index = self.index if self.kind == "gpu" else ""
        part = f":{self.part}" if self.is_part else ""
        return f"{node}{self.kind}{index}{part}"


HOST = Device()
"""RAM, for the driver and for every engine."""


def by_name(figures: Mapping[Device, T]) -> dict[str, T]:
    """The figures as documents and files have them."""
    return {str(device): figure for device, figure in figures.items()}
