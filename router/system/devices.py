"""Names of the devices whose memory models use: RAM, GPUs and parts of GPUs.

Nothing is measured here; the measured state of a device is a `Reading` (`readings.py`).
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
    """A device, as numbered by the driver or by an engine.

    The driver numbers the GPUs of the machine. An engine numbers only the GPUs visible to it, from 0: its first
    may be the driver's third. Devices of the two numberings are never equal, so that their values cannot be
    confused. RAM is the same for both.

    The text form, used in status pages, metrics, logs and files, is `gpu0`, `gpu0:1` (a part of it) or `host`.
    """

    node: str = ""
    """Name of the machine; empty for this one."""
    kind: Literal["engine", "gpu", "host"] = "host"
    """`engine` is not memory, but a slot for an engine, which is counted in the same way (see `ENGINES`)."""
    counted_by: Literal["driver", "engine"] = "driver"
    index: int = 0
    part: int = _WHOLE
    """Number of the part of a partitioned GPU (MIG); -1 for the whole GPU."""

    @classmethod
    def gpu(cls, index: int, part: int | None = None, *, node: str = "") -> Device:
        """Return a GPU by the driver's number."""
        return cls(node, "gpu", "driver", index, _WHOLE if part is None else part)

    @classmethod
    def shown(cls, index: int) -> Device:
        """Return a GPU by its number among those that are visible to an engine."""
        return cls("", "gpu", "engine", index)

    @classmethod
    def named(cls, text: str, *, counted_by: Literal["driver", "engine"] = "driver") -> Device:
        """Parse the text form of a device. Raises ValueError."""
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
        """Whether it is a part of a GPU: a process can use only one part, so no model is split over several."""
        return self.part != _WHOLE

    def __str__(self) -> str:
        node = f"{self.node}/" if self.node else ""
        index = self.index if self.kind == "gpu" else ""
        part = f":{self.part}" if self.is_part else ""
        return f"{node}{self.kind}{index}{part}"


HOST = Device()
"""RAM, for the driver and for every engine."""


def by_name(figures: Mapping[Device, T]) -> dict[str, T]:
    """Return values by the text form of their devices."""
    return {str(device): figure for device, figure in figures.items()}
