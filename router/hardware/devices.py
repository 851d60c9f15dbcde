"""The memory that engines may live in: the GPUs that are ours to use, and RAM.

Reads what is there now; what of it is reserved, and for whom, is the ledger's business. Of a machine with NVIDIA's
and AMD's GPUs, NVIDIA's are used; those that only the engine knows, where there are none of either. GPUs without
memory of their own (Apple's, a processor's graphics) are not devices: what they use is RAM.
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
"""Variables that show GPUs to a program, some of all."""
SHOWS = "GGML_VK_VISIBLE_DEVICES"
"""Which of its GPUs Vulkan's backend of ggml uses, as Vulkan's loader counts them."""
DEADLINE_SEC = 2.0
"""For a reading; NVML takes a few ms."""
FIRST_DEADLINE_SEC = 15.0
"""For the first: a driver that is not kept loaded (persistence mode) takes seconds to wake its GPUs."""

_log = logging.getLogger("router")


_Held = tuple[frozenset[int], Mapping[int, ProcessMemory]]  # of which processes, and what


@dataclass(frozen=True, slots=True)
class Readings:
    """What is known of each device, of RAM last, as they were `age_sec` ago (the oldest of them)."""

    devices: Mapping[Device, Reading]
    age_sec: float

    @property
    def is_stale(self) -> bool:
        """Whether something hangs, and what it said before is all there is."""
        return self.age_sec > DEADLINE_SEC

    @property
    def gpus(self) -> tuple[Reading, ...]:
        return tuple(reading for device, reading in self.devices.items() if device.is_gpu)

    @property
    def host(self) -> Reading:
        return self.devices[HOST]


class ListedGpus(Protocol):
    """GPUs that no driver tells of, as whoever knows them lists them. Blocking; raises TimeoutExpired."""

    def read(self, within_sec: float, *, amd_shares: bool) -> tuple[list[Reading], list[str]]:
        """Those that can be used, and for people what is left out; an answer so old will do. `amd_shares`: AMD's
        GPUs here are processors' own graphics."""

    def numbers_of(self, gpus: Sequence[Reading]) -> Mapping[Device, str]:
        """How the same list counts GPUs that a driver tells of; empty where one is not found."""


class Devices:
    """`gpu_devices`: numbers of the GPUs that may be used, None for all that have memory of their own.

    As in any CUDA or ROCm program, GPUs that `environ` hides (CUDA_VISIBLE_DEVICES and the like) are not there.
    `root` is where `/proc` and `/sys` are. `listed` is asked for GPUs that no driver tells of.
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
        """What is there now, or was when it could last be asked. Never raises.

        What is dear to ask, the engine's list of GPUs, may be `within_sec` old.
        """
        self._within_sec = within_sec
        await asyncio.gather(*(watch.read(deadline_sec) for watch in self._watches))
        return self.last

    def read_blocking(self, deadline_sec: float = FIRST_DEADLINE_SEC) -> Readings:
        """As `read`, for the start, where there is no event loop yet."""
        for watch in self._watches:
            watch.read_blocking(deadline_sec)
        return self.last

    @property
    def last(self) -> Readings:
        """The last readings, without asking again."""
        devices = {reading.device: reading for reading in (*self._gpus.last, *self._host.last)}
        oldest_sec = min(-math.inf if w.taken_sec is None else w.taken_sec for w in self._watches)
        return Readings(devices, time.monotonic() - oldest_sec)

    async def held_by(
        self, pids: Iterable[int], deadline_sec: float = DEADLINE_SEC, *, mapped: bool = True
    ) -> Mapping[int, ProcessMemory]:
        """RAM of processes with their descendants; those that are gone, or not known in time, are missing.

        `mapped=False` spares the kernel the walk through large mappings: pages that are shared count whole.
        """
        return await (self._walk if mapped else self._counters).held_by(frozenset(pids), deadline_sec)

    def environment(self, chosen: Iterable[Reading]) -> dict[str, str]:
        """Variables with which an engine sees the chosen GPUs, in this order, and no others; none for RAM alone.

        Builds for Vulkan count GPUs in an order of their own.
        """
        gpus = [reading for reading in chosen if reading.device.is_gpu]
        if not gpus:
            if self._uses_no_gpus or self._seen:
                return {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1", SHOWS: ""}
            return {}  # what uses GPUs we don't know of shall go on doing so
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
            "HIP_VISIBLE_DEVICES": ",".join(str(place) for place in range(len(gpus))),  # of those
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
            from router.hardware.nvidia import Nvidia  # 20 ms that nobody pays who wants no GPUs

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
        # HIP takes an empty variable for none, and then CUDA's, likewise.
        spelled = environ.get("HIP_VISIBLE_DEVICES") or environ.get("CUDA_VISIBLE_DEVICES") or None
        ours = visible({n: [gpu] for n, gpu in enumerate(shown)}, spelled)
        return [gpu for gpu in ours if gpu.device.index in usable]

    def _tell(self, ours: Sequence[Reading], remarks: list[str]) -> None:
        """One line for each remark that is new, and for each GPU that goes or comes back."""
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
    """One way to look at processes. They do not wait for each other: a walk takes as long as engines are large."""

    def __init__(self, name: str, *, mapped: bool) -> None:
        self._mapped = mapped
        self._pids: frozenset[int] = frozenset()
        self._watch = Watch[_Held](self._take, (self._pids, {}), name)

    async def held_by(self, wanted: frozenset[int], deadline_sec: float) -> Mapping[int, ProcessMemory]:
        before = self._watch.last
        self._pids = wanted
        answer = await self._watch.read(deadline_sec)
        if not wanted <= answer[0]:  # it had begun before, for others
            self._pids |= wanted
            answer = await self._watch.read(deadline_sec)
        if answer is before:  # none came in time, and what they held at the last look may be long ago
            return {}
        return {pid: memory for pid, memory in answer[1].items() if pid in wanted}

    def _take(self) -> _Held:
        pids = self._pids
        return pids, ram.process_memory(pids, mapped=self._mapped)


def shown(ours: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Variables of an engine: those of its entry win, and one that names GPUs leaves no say to its kin of ours."""
    if any(name in own for name in VISIBLE):
        ours = {name: value for name, value in ours.items() if name not in VISIBLE}
    return {**ours, **own}


class HasUuid(Protocol):
    @property
    def uuid(self) -> str: ...


G = TypeVar("G", bound=HasUuid)


def visible(by_number: Mapping[int, Sequence[G]], spelled: str | None) -> list[G]:
    """What CUDA_VISIBLE_DEVICES and its kin leave: numbers or beginnings of UUIDs, up to the first that is wrong.

    Numbers are taken as the driver's, which is CUDA_DEVICE_ORDER=PCI_BUS_ID.
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
