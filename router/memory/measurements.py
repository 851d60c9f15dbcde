"""What engines were measured to take, and how long they load, remembered for the next start of the router, too.

An entry belongs to a model's files, its flags, the engine's build and the number of GPUs: while none of these
changes, what was measured counts. Other flags of the same files profit from its ratio to what was estimated.

On the GPU a measurement is the truth: llama.cpp takes everything when it loads. Of RAM it may say too little, as
buffers that no long prompt has come by yet were never touched, and as pages that two engines share count half in
each. So there it can only raise an estimate that knows the buffers, never lower it. Nor does what an engine held
once keep out the next one, if the estimate lets it in (`engines/llamacpp/plan.py`).

How long a load takes is up to the files more than to flags or build, and most of all to whether the system still
has them in memory: so what was measured before the machine was started is forgotten.
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
"""Of how RAM is measured: entries by an earlier one are forgotten, as they count twice what engines copy."""
_RAISED_BY = 1.1
_MOST_RAISED = 2.0
_RATIO_BOUNDS = (0.5, 2.0)
_Mib = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1 << 31)]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a measurement holds for."""

    files: tuple[tuple[str, int, int], ...]
    """Path, size and modification time (ns) of each file."""
    build: str
    """The engine."""
    flags: tuple[str, ...]
    gpus: int


def files_of(*paths: Path) -> tuple[tuple[str, int, int], ...]:
    """Raises OSError."""
    return tuple((str(path), status.st_size, status.st_mtime_ns) for path in paths for status in (path.stat(),))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Measured to estimated."""

    gpus: float = 1.0
    """All of them together."""
    host: float = 1.0


class Entry(msgspec.Struct, frozen=True):
    """MiB by the name of the device, as a file has it. `gpu0` is the first GPU that the engine was shown."""

    files: tuple[tuple[str, int, int], ...]
    build: str
    flags: tuple[str, ...]
    gpus: int
    estimated: Mapping[str, _Mib] = {}
    measured: Mapping[str, _Mib] = {}
    raised: Mapping[str, _Mib] = {}
    """What it wants at least: it ran out of memory with less."""
    load_sec: _Seconds = 0.0
    """What loading it takes; 0 while that is not known."""
    at: float = 0.0
    """Seconds since the epoch."""
    rule: int = 0

    @property
    def identity(self) -> Identity:
        return Identity(self.files, self.build, self.flags, self.gpus)


class Store(Protocol):
    """Where entries survive the router."""

    def read(self) -> list[Entry] | None: ...
    def write(self, value: list[Entry]) -> None: ...


class Learned:
    """Entries, the latest last. Reading and writing the store block; `save` belongs in a thread.

    Threads read while the event loop learns. So nothing that they may have is changed: what is learnt takes the
    place of all that was known, in one assignment.
    """

    def __init__(self, store: Store | None = None, machine_since: float = 0.0) -> None:
        """`machine_since`: when the machine was started, in seconds since the epoch."""
        self._store = store
        read = (store.read() if store is not None else None) or []
        known = [
            entry if entry.at >= machine_since else replace(entry, load_sec=0.0)
            for entry in read
            if entry.rule == _RULE and _is_readable(entry)
        ]
        self._entries: dict[Identity, Entry] = {entry.identity: entry for entry in known[-MOST_ENTRIES:]}

    def measured(self, identity: Identity) -> Mapping[Device, int] | None:
        """What an engine of this kind was measured to take, per device; None if none ever was."""
        return _by_device(self._entry(identity).measured) or None

    def raised(self, identity: Identity) -> Mapping[Device, int]:
        """What it wants at least since it ran out of memory."""
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
        """Measured to estimated, of the same files with whatever flags; the latest counts."""
        for entry in reversed(self._entries.values()):
            if (entry.files, entry.build) == (identity.files, identity.build) and entry.measured:
                return _ratio(entry)
        return Ratio()

    def load_sec(self, identity: Identity) -> float | None:
        """What loading takes; with these files at least, if with these flags and this build nothing was loaded."""
        if load_sec := self._entry(identity).load_sec:
            return load_sec
        of_files = (entry.load_sec for entry in reversed(self._entries.values()) if entry.files == identity.files)
        return next(filter(None, of_files), None)

    def learn(self, identity: Identity, estimated: Mapping[Device, int], measured: Mapping[Device, int]) -> None:
        """An engine is there and takes this. Of several measurements the largest counts."""
        entry = self._entry(identity)
        most = {name: max(mib, entry.measured.get(name, 0)) for name, mib in by_name(measured).items()}
        self._know(replace(entry, estimated=by_name(estimated), measured={**entry.measured, **most}, raised={}))

    def loaded(self, identity: Identity, load_sec: float) -> None:
        """An engine is there, and this is what loading one takes."""
        self._know(replace(self._entry(identity), load_sec=load_sec))

    def ran_out(self, identity: Identity, booked: Mapping[Device, int], wanted: Mapping[Device, int]) -> None:
        """It did not get by with `booked`; `wanted` is what it asked for last, as far as it has said.

        Raises by a tenth at least, where it was short, and to no more than twice what was thought at first,
        however often it happens: it may be others who take the memory. GPUs that are not booked, such as Apple's,
        have their memory from the host.
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
        """All of them as they are now; what is learnt later does not change them."""
        return list(self._entries.values())

    def save(self, entries: list[Entry]) -> None:
        if self._store is not None:
            self._store.write(entries)


def _is_readable(entry: Entry) -> bool:
    """Whether all its devices have names that we give."""
    try:
        for figures in (entry.estimated, entry.measured, entry.raised):
            _by_device(figures)
    except ValueError:
        return False
    return True


def _by_device(figures: Mapping[str, int]) -> dict[Device, int]:
    """Raises ValueError."""
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
