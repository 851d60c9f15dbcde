"""Devices whose memory engines may use: the usable GPUs, and RAM.

Reads the current state; the ledger knows the reservations. On a machine with GPUs of NVIDIA and AMD, NVIDIA's are
used; GPUs that only the engine reports are used if there are none of either. GPUs without memory of their own
(Apple's, integrated graphics) are not devices, as they use RAM.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from router.hardware import ram
from router.hardware.amd import Amd
from router.hardware.ram import ProcessMemory
from router.system.devices import HOST, Device
from router.system.processes import descendants
from router.system.readings import Reading, Watch

if TYPE_CHECKING:
    from router.hardware.nvidia import Nvidia

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Environment variables that restrict a program to some GPUs."""
SHOWS = "GGML_VK_VISIBLE_DEVICES"
"""Variable that restricts ggml's Vulkan backend to some GPUs, as numbered by Vulkan's loader."""
DEADLINE_SEC = 2.0
"""Deadline of a reading; NVML takes a few ms."""
FIRST_DEADLINE_SEC = 15.0
"""Deadline of the first reading: without persistence mode, a driver takes seconds to wake its GPUs."""

_log = logging.getLogger("router")


_Held = tuple[frozenset[int], Mapping[int, ProcessMemory]]  # pids asked for, and the results


@dataclass(frozen=True, slots=True)
class Readings:
    """Latest reading of each device, RAM last; the oldest of them is `age_sec` old."""

    devices: Mapping[Device, Reading]
    age_sec: float

    @property
    def is_stale(self) -> bool:
        """Whether a reading hangs, so that an earlier value is returned."""
        return self.age_sec > DEADLINE_SEC

    @property
    def gpus(self) -> tuple[Reading, ...]:
        return tuple(reading for device, reading in self.devices.items() if device.is_gpu)

    @property
    def host(self) -> Reading:
        return self.devices[HOST]


class ListedGpus(Protocol):
    """List of GPUs that no driver reports. Blocking; methods raise TimeoutExpired."""

    def read(self, within_sec: float, *, amd_shares: bool) -> tuple[list[Reading], list[str]]:
        """Return the usable GPUs, and remarks about those left out, at most `within_sec` old. `amd_shares`: the
        AMD GPUs of this machine are integrated graphics."""

    def numbers_of(self, gpus: Sequence[Reading]) -> Mapping[Device, str]:
        """Return the list's numbers for GPUs that a driver reports; empty if one is not found."""


class Devices:
    """Devices of the machine. `gpu_devices` are the numbers of usable GPUs; None: all with memory of their own.

    As in any CUDA or ROCm program, GPUs hidden by `environ` (CUDA_VISIBLE_DEVICES and the like) do not exist.
    `root` contains `/proc` and `/sys`. `listed` reports GPUs that no driver reports.
    """

    def __init__(
        self,
        gpu_devices: Sequence[int] | None = None,
        environ: Mapping[str, str] = os.environ,
        root: Path = Path("/"),
        listed: ListedGpus | None = None,
    ) -> None:
        self._wanted = gpu_devices
        self._environ = environ
        self._root = root
        self._nvidia: Nvidia | None = None
        self._amd = Amd(gpu_devices or (), root)
        self._listed = listed
        self._within_sec = 0.0
        self._numbers_in_vulkan: Mapping[Device, str] = {}
        self._seen: dict[Device, Reading] = {}
        self._present: set[Device] = set()
        self._remarks: list[str] = []
        self._gpus = Watch[Sequence[Reading]](self._take_gpus, (), "GPU driver")
        self._host = Watch[Sequence[Reading]](
            self._take_host, (Reading(HOST, "host", "", "", 0, 0),), "reading of RAM"
        )
        self._counters = _Processes("reading of engines' RAM", mapped=False)
        self._walk = _Processes("walk through engines' RAM", mapped=True)

    async def read(self, deadline_sec: float = DEADLINE_SEC, within_sec: float = 0.0) -> Readings:
        """Read all devices; one that does not answer before the deadline keeps its last reading. Never raises.

        The engine's list of GPUs, which is expensive to obtain, may be `within_sec` old.
        """
        self._within_sec = within_sec
        await asyncio.gather(*(watch.read(deadline_sec) for watch in self._watches))
        return self.last

    def read_blocking(self, deadline_sec: float = FIRST_DEADLINE_SEC) -> Readings:
        """Read all devices before the event loop runs."""
        for watch in self._watches:
            watch.read_blocking(deadline_sec)
        return self.last

    @property
    def last(self) -> Readings:
        """Latest readings, without reading again."""
        devices = {reading.device: reading for reading in (*self._gpus.last, *self._host.last)}
        oldest_sec = min(-math.inf if w.taken_sec is None else w.taken_sec for w in self._watches)
        return Readings(devices, time.monotonic() - oldest_sec)

    async def held_by(
        self, pids: Iterable[int], deadline_sec: float = DEADLINE_SEC, *, mapped: bool = True
    ) -> Mapping[int, ProcessMemory]:
        """Return the RAM of processes with their descendants, without those that are gone or not read in time.

        `mapped=False` avoids the slow walk through large mappings and counts shared pages fully.
        """
        return await (self._walk if mapped else self._counters).held_by(frozenset(pids), deadline_sec)

    def environment(self, chosen: Iterable[Reading]) -> dict[str, str]:
        """Return environment variables that restrict an engine to the chosen GPUs, in this order; to none for RAM
        alone.

        Vulkan builds number GPUs in an order of their own.
        """
        gpus = [reading for reading in chosen if reading.device.is_gpu]
        if not gpus:
            if self._uses_no_gpus or self._seen:
                return {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1", SHOWS: ""}
            return {}  # an engine may use GPUs that are not reported
        if gpus[0].kind == "vulkan":
            return {SHOWS: ",".join(gpu.uuid for gpu in gpus)}
        numbers = [self._numbers_in_vulkan.get(gpu.device, "") for gpu in gpus]
        for_vulkan = {SHOWS: ",".join(numbers)} if all(numbers) else {}
        if gpus[0].kind == "cuda":
            return {
                **for_vulkan,
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in gpus),
            }
        return {
            **for_vulkan,
            "ROCR_VISIBLE_DEVICES": ",".join(str(gpu.device.index) for gpu in gpus),
            "HIP_VISIBLE_DEVICES": ",".join(str(place) for place in range(len(gpus))),  # among those
        }

    @property
    def _uses_no_gpus(self) -> bool:
        return self._wanted is not None and not self._wanted

    @property
    def _watches(self) -> tuple[Watch[Sequence[Reading]], ...]:
        return (self._host,) if self._uses_no_gpus else (self._gpus, self._host)

    def _take_host(self) -> Sequence[Reading]:
        return (ram.reading(self._root),)

    def _take_gpus(self) -> Sequence[Reading]:
        if self._nvidia is None:
            from router.hardware.nvidia import Nvidia  # takes 20 ms

            self._nvidia = Nvidia()
        found, remarks = self._nvidia.read()
        if found or any(gpu.kind == "cuda" for gpu in self._seen.values()):
            ours = self._visible_to_cuda(found, remarks)
        else:
            found, more = self._amd.read(lambda: descendants(os.getpid()))
            remarks += more
            ours = self._visible_to_rocm(found)
            if not found and self._listed is not None:
                found, more = self._listed.read(self._within_sec, amd_shares=self._amd.count > 0)
                remarks += more
                ours = found
        if len(found) > 1 and found[0].kind != "vulkan" and self._listed is not None:
            self._numbers_in_vulkan = self._listed.numbers_of(found)
        if self._wanted is not None:
            ours = [gpu for gpu in ours if gpu.device.index in self._wanted]
        if found and not ours and not self._seen:
            remarks.append(
                f"none of {', '.join(str(gpu.device) for gpu in found)} may be used: "
                "gpu_devices and the environment (CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES) name others"
            )
        self._tell(ours, remarks)
        return ours

    def _visible_to_cuda(self, found: list[Reading], remarks: list[str]) -> list[Reading]:
        spelled = self._environ.get("CUDA_VISIBLE_DEVICES")
        order = self._environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
        are_alike = len({gpu.label for gpu in found}) < 2
        if not are_alike and order != "PCI_BUS_ID" and any(c.isdecimal() for c in (spelled or "").split(",")):
            remarks.append(
                f"CUDA_VISIBLE_DEVICES={spelled} is taken as nvidia-smi counts, where CUDA puts the fastest GPU "
                "first: UUIDs, or CUDA_DEVICE_ORDER=PCI_BUS_ID, leave no doubt"
            )
        by_number: dict[int, list[Reading]] = {}
        for gpu in found:
            by_number.setdefault(gpu.device.index, []).append(gpu)
        return visible(by_number, spelled)

    def _visible_to_rocm(self, found: list[Reading]) -> list[Reading]:
        environ = self._environ
        usable = {gpu.device.index: gpu for gpu in found}
        counted = {
            n: [usable.get(n) or Reading(Device.gpu(n), "rocm", "", "", 0, 0)] for n in range(self._amd.count)
        }
        shown = visible(counted, environ.get("ROCR_VISIBLE_DEVICES"))
        # HIP treats an empty variable as unset and then uses CUDA's, likewise.
        spelled = environ.get("HIP_VISIBLE_DEVICES") or environ.get("CUDA_VISIBLE_DEVICES") or None
        ours = visible({n: [gpu] for n, gpu in enumerate(shown)}, spelled)
        return [gpu for gpu in ours if gpu.device.index in usable]

    def _tell(self, ours: Sequence[Reading], remarks: list[str]) -> None:
        """Log each new remark, and each GPU that disappears or returns."""
        for remark in remarks:
            if remark not in self._remarks:
                _log.log(logging.WARNING if self._seen else logging.INFO, "%s", remark)
        self._remarks = remarks
        present = {gpu.device for gpu in ours}
        for device, gpu in self._seen.items():
            if device in self._present - present:
                _log.warning("%s (%s) is no longer available", device, gpu.label)
            elif device in present - self._present:
                _log.warning("%s (%s) is available again", device, gpu.label)
        self._present = present
        self._seen.update((gpu.device, gpu) for gpu in ours)


class _Processes:
    """One way to read processes. The two ways run independently: a walk takes longer, the larger the engines
    are."""

    def __init__(self, name: str, *, mapped: bool) -> None:
        self._mapped = mapped
        self._pids: frozenset[int] = frozenset()
        self._watch = Watch[_Held](self._take, (self._pids, {}), name)

    async def held_by(self, wanted: frozenset[int], deadline_sec: float) -> Mapping[int, ProcessMemory]:
        before = self._watch.last
        self._pids = wanted
        answer = await self._watch.read(deadline_sec)
        if not wanted <= answer[0]:  # that reading had begun earlier, for other pids
            self._pids |= wanted
            answer = await self._watch.read(deadline_sec)
        if answer is before:  # not read in time, and the last reading may be old
            return {}
        return {pid: memory for pid, memory in answer[1].items() if pid in wanted}

    def _take(self) -> _Held:
        pids = self._pids
        return pids, ram.process_memory(pids, mapped=self._mapped)


def shown(ours: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Merge an engine's variables: its entry's own win, and one that selects GPUs removes the router's
    selection."""
    if any(name in own for name in VISIBLE):
        ours = {name: value for name, value in ours.items() if name not in VISIBLE}
    return {**ours, **own}


class HasUuid(Protocol):
    @property
    def uuid(self) -> str: ...


G = TypeVar("G", bound=HasUuid)


def visible(by_number: Mapping[int, Sequence[G]], spelled: str | None) -> list[G]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES or its like selects: numbers or prefixes of UUIDs, up to the first
    invalid one.

    Numbers are in the driver's order, as with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    everything = [device for devices in by_number.values() for device in devices]
    if spelled is None:
        return everything
    shown: list[G] = []
    for token in spelled.split(","):
        word = token.strip()
        if word.isdecimal():
            found = list(by_number.get(int(word), ()))
        else:
            found = [device for device in everything if word and device.uuid.startswith(word)]
        if not found:
            break
        shown += [device for device in found if device not in shown]
    return shown
