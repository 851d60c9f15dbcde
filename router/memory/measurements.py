"""Measured memory and load times of engines, kept across restarts of the router.

An entry belongs to a model's files, its flags, the engine's build and the number of GPUs, and is valid while none
of these changes. For other flags of the same files, the ratio of measured to estimated memory is used.

On GPUs a measurement is exact, as llama.cpp allocates everything when it loads. In RAM it may be too low: buffers
for long prompts are untouched until one arrives, and pages shared by two engines count half in each. There it can
only raise an estimate of known parts, never lower it. Nor does an earlier measurement exclude a model that fits by
estimate (`engines/llamacpp/plan.py`).

Load time depends on the files more than on flags or build, and most on whether the page cache still holds them.
Load times measured before the machine was started are therefore discarded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
from msgspec.structs import replace

from router.system.devices import HOST, Device, by_name

MOST_ENTRIES = 500

_RULE = 1
"""Version of how RAM is measured; entries of earlier versions are discarded, as they count copied weights
twice."""
_RAISED_BY = 1.1
_MOST_RAISED = 2.0
_RATIO_BOUNDS = (0.5, 2.0)
_Mib = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1 << 31)]


@dataclass(frozen=True, slots=True)
class Identity:
    """Key of a measurement."""

    files: tuple[tuple[str, int, int], ...]
    """Path, size and modification time (ns) of each file."""
    build: str
    """Build of the engine."""
    flags: tuple[str, ...]
    gpus: int


def files_of(*paths: Path) -> tuple[tuple[str, int, int], ...]:
    """Return path, size and modification time (ns) of files. Raises OSError."""
    return tuple((str(path), status.st_size, status.st_mtime_ns) for path in paths for status in (path.stat(),))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratio of measured to estimated memory."""

    gpus: float = 1.0
    """All GPUs together."""
    host: float = 1.0


class Entry(msgspec.Struct, frozen=True):
    """Entry as stored in a file, with MiB by device name. `gpu0` is the first GPU visible to the engine."""

    files: tuple[tuple[str, int, int], ...]
    build: str
    flags: tuple[str, ...]
    gpus: int
    estimated: Mapping[str, _Mib] = {}
    measured: Mapping[str, _Mib] = {}
    raised: Mapping[str, _Mib] = {}
    """Minimum after it ran out of memory with less."""
    load_sec: _Seconds = 0.0
    """Load time; 0 if unknown."""
    asleep: Mapping[str, _Mib] = {}
    """What it held asleep."""
    wake_sec: _Seconds = 0.0
    """Time to wake it up; 0 if unknown."""
    at: float = 0.0
    """Time of the last change in seconds since the epoch."""
    rule: int = 0

    @property
    def identity(self) -> Identity:
        return Identity(self.files, self.build, self.flags, self.gpus)


class Store(Protocol):
    """Persistent storage of entries."""

    def read(self) -> list[Entry] | None: ...
    def write(self, value: list[Entry]) -> None: ...


class Learned:
    """Entries, the latest last. Reading and writing the store block; call `save` in a thread.

    Threads read while the event loop writes. Shared objects are therefore never changed: each change replaces all
    entries in one assignment.
    """

    def __init__(self, store: Store | None = None, machine_since: float = 0.0) -> None:
        """`machine_since` is the boot time of the machine in seconds since the epoch."""
        self._store = store
        read = (store.read() if store is not None else None) or []
        known = [
            entry if entry.at >= machine_since else replace(entry, load_sec=0.0)
            for entry in read
            if entry.rule == _RULE and _is_readable(entry)
        ]
        self._entries: dict[Identity, Entry] = {entry.identity: entry for entry in known[-MOST_ENTRIES:]}

    def measured(self, identity: Identity) -> Mapping[Device, int] | None:
        """Return the measured MiB by device; None if never measured."""
        return _by_device(self._entry(identity).measured) or None

    def raised(self, identity: Identity) -> Mapping[Device, int]:
        """Return the minimum MiB by device since it ran out of memory."""
        return _by_device(self._entry(identity).raised)

    def with_raised(
        self, figures: Mapping[Device, int], source: str, identity: Identity
    ) -> tuple[Mapping[Device, int], str]:
        """Return the figures, at least as large as `raised`, and their source, which says if they were raised."""
        raised = self.raised(identity)
        if all(mib <= figures.get(device, 0) for device, mib in raised.items()):
            return figures, source
        more = {device: max(mib, raised.get(device, 0)) for device, mib in figures.items()}
        return more, f"{source}, raised since it ran out of memory"

    def ratio(self, identity: Identity) -> Ratio:
        """Return the latest ratio of measured to estimated memory of the same files with any flags."""
        for entry in reversed(self._entries.values()):
            if (entry.files, entry.build) == (identity.files, identity.build) and entry.measured:
                return _ratio(entry)
        return Ratio()

    def load_sec(self, identity: Identity) -> float | None:
        """Return the load time with these flags and build, or else the latest with these files; None if
        unknown."""
        if load_sec := self._entry(identity).load_sec:
            return load_sec
        of_files = (entry.load_sec for entry in reversed(self._entries.values()) if entry.files == identity.files)
        return next(filter(None, of_files), None)

    def learn(self, identity: Identity, estimated: Mapping[Device, int], measured: Mapping[Device, int]) -> None:
        """Store the measured memory of an engine. Of several measurements the largest counts."""
        entry = self._entry(identity)
        most = {name: max(mib, entry.measured.get(name, 0)) for name, mib in by_name(measured).items()}
        self._know(replace(entry, estimated=by_name(estimated), measured={**entry.measured, **most}, raised={}))

    def loaded(self, identity: Identity, load_sec: float) -> None:
        """Store a load time."""
        self._know(replace(self._entry(identity), load_sec=load_sec))

    def asleep(self, identity: Identity) -> Mapping[Device, int] | None:
        """Return the MiB by device that such an engine held asleep; None if it never slept."""
        return _by_device(self._entry(identity).asleep) or None

    def wake_sec(self, identity: Identity) -> float | None:
        """Return the time to wake such an engine up; None if unknown."""
        return self._entry(identity).wake_sec or None

    def slept(self, identity: Identity, held: Mapping[Device, int]) -> None:
        """Store what an engine held asleep."""
        self._know(replace(self._entry(identity), asleep=by_name(held)))

    def woke(self, identity: Identity, wake_sec: float) -> None:
        """Store the time in which an engine woke up."""
        self._know(replace(self._entry(identity), wake_sec=wake_sec))

    def ran_out(self, identity: Identity, booked: Mapping[Device, int], wanted: Mapping[Device, int]) -> None:
        """Raise the minimum after `booked` did not suffice; `wanted` are the last failed allocations, as far as
        known.

        Each short device is raised by at least a tenth, but never beyond twice the first estimate, since other
        programs may have taken the memory. GPUs without a reservation, such as Apple's, count as the host.
        """
        entry = self._entry(identity)
        estimated = _by_device(entry.estimated) or booked
        raised = _by_device(entry.raised)
        short: dict[Device, int] = {}
        for device, mib in wanted.items():
            place = device if device in booked else HOST
            short[place] = max(mib, short.get(place, 0))
        for device, mib in booked.items():
            if not short or device in short:
                least = max(round(mib * _RAISED_BY), short.get(device, 0), mib + 1)
                most = round(max(1, estimated.get(device, mib)) * _MOST_RAISED)
                raised[device] = max(mib, min(least, most))
        self._know(replace(entry, estimated=by_name(estimated), measured={}, raised=by_name(raised)))

    def _entry(self, identity: Identity) -> Entry:
        known = self._entries.get(identity)
        return known or Entry(identity.files, identity.build, identity.flags, identity.gpus)

    def _know(self, changed: Entry) -> None:
        latest = replace(changed, at=time.time(), rule=_RULE)
        others = (entry for entry in self._entries.values() if entry.identity != latest.identity)
        self._entries = {entry.identity: entry for entry in [*others, latest][-MOST_ENTRIES:]}

    def entries(self) -> list[Entry]:
        """Return a snapshot of all entries."""
        return list(self._entries.values())

    def save(self, entries: list[Entry]) -> None:
        if self._store is not None:
            self._store.write(entries)


def _is_readable(entry: Entry) -> bool:
    """Return whether all its device names are valid."""
    try:
        for figures in (entry.estimated, entry.measured, entry.raised, entry.asleep):
            _by_device(figures)
    except ValueError:
        return False
    return True


def _by_device(figures: Mapping[str, int]) -> dict[Device, int]:
    """Convert names to devices. Raises ValueError."""
    return {Device.named(name, counted_by="engine"): mib for name, mib in figures.items()}


def _ratio(entry: Entry) -> Ratio:
    estimated, measured = _by_device(entry.estimated), _by_device(entry.measured)

    def ratio(of_gpus: bool) -> float:
        before, after = (
            sum(mib for device, mib in figures.items() if device.is_gpu is of_gpus)
            for figures in (estimated, measured)
        )
        low, high = _RATIO_BOUNDS
        return min(high, max(low, after / before)) if before and after else 1.0

    return Ratio(gpus=ratio(True), host=max(1.0, ratio(False)))
