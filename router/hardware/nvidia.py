"""NVIDIA GPUs through NVML, which creates no CUDA context. Blocking, and may hang on a broken driver.

https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import psutil
import pynvml

from router.system.devices import Device
from router.system.readings import Reading

T = TypeVar("T")

_MIB = 1 << 20
_REOPEN_SEC = 30.0
"""Minimum time between reopening the driver for a failed GPU, or searching for a missing driver."""
_UNSEEN_MIB = 256  # more than a driver itself uses, so a process must hold it

_Error = pynvml.NVMLError
# Errors of one unavailable value; any other error means that the GPU has failed.
_NOT_TOLD = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_NotFound,
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_InvalidArgument,
    pynvml.NVMLError_ArgumentVersionMismatch,
    pynvml.NVMLError_NoData,
    pynvml.NVMLError_NotReady,
)


class Nvidia:
    """Driver, opened once, which is slow, and again after it failed."""

    def __init__(self) -> None:
        self._is_open = False
        self._reopened_sec = -math.inf
        self._missed_sec = -math.inf
        self._numbers: dict[str, int] = {}

    def read(self) -> tuple[list[Reading], list[str]]:
        """Return all usable GPUs in the driver's order, and remarks about those left out."""
        if time.monotonic() - self._missed_sec < _REOPEN_SEC:
            return [], []
        try:
            return self._read()
        except pynvml.NVMLError_Uninitialized:  # the driver was reloaded meanwhile
            self._close()
        except pynvml.NVMLError_LibraryNotFound as error:
            if pynvml.nvmlLib is not None:  # the driver is missing another library
                self._close()
                return [], [_driver_trouble(error)]
            self._missed_sec = time.monotonic()  # each search leaks a ctypes type
            return [], []
        except _Error as error:
            self._close()
            return [], [_driver_trouble(error)]
        try:
            return self._read()
        except _Error as error:
            self._close()
            return [], [_driver_trouble(error)]

    def _read(self) -> tuple[list[Reading], list[str]]:
        if not self._is_open:
            pynvml.nvmlInit()
            self._is_open = True
        devices: list[Reading] = []
        left_out: list[str] = []
        is_troubled = False
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                for found in self._devices(index):
                    if isinstance(found, Reading):
                        devices.append(found)
                    else:
                        left_out.append(found)
            except pynvml.NVMLError_Uninitialized:
                raise
            except _Error as error:
                is_troubled = is_troubled or not isinstance(error, _NOT_TOLD)
                left_out.append(f"GPU {index} is left out: {error}")
        if is_troubled and time.monotonic() - self._reopened_sec > _REOPEN_SEC:
            self._close()  # a GPU that fell off the bus reappears only after reopening
            self._reopened_sec = time.monotonic()
        return devices, left_out

    def _devices(self, index: int) -> Iterator[Reading | str]:
        """Yield one GPU, or its parts if it is partitioned; a remark for what cannot be used."""
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        number = self._number(pynvml.nvmlDeviceGetUUID(gpu), index)
        if not _told(lambda: pynvml.nvmlDeviceGetMigMode(gpu)[0]):
            yield _device(gpu, gpu, number, None)
            return
        parts = 0
        for place in range(_told(lambda: pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)) or 0):
            try:
                part = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, place)
                yield _device(part, gpu, number, place)
                parts += 1
            except pynvml.NVMLError_NotFound:
                continue
            except _NOT_TOLD as error:
                yield f"part {place} of GPU {number} is left out: {error}"
        if not parts:
            yield f"GPU {number} is left out: it is in MIG mode, and no MIG device of it can be used"

    def _number(self, uuid: str, index: int) -> int:
        """Return a stable index: the driver renumbers GPUs when one falls off the bus."""
        if uuid not in self._numbers:
            taken = self._numbers.values()
            self._numbers[uuid] = index if index not in taken else max(taken) + 1
        return self._numbers[uuid]

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            _told(pynvml.nvmlShutdown, _Error)


def _device(handle: Any, gpu: Any, number: int, place: int | None) -> Reading | str:
    device = Device.gpu(number, place)
    label = pynvml.nvmlDeviceGetName(handle)
    memory = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2))
    reserved = memory.reserved if memory is not None else 0
    if memory is None:
        memory = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    if memory is None:  # such as GB10 and Jetson
        return f"{device} ({label}) has no memory of its own that the driver tells of: its models count as in RAM"
    used_by = _used_by(handle)
    if not used_by and memory.total - memory.free - reserved > _UNSEEN_MIB * _MIB:
        used_by = None
    busy = _told(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    power_mw = _told(lambda: pynvml.nvmlDeviceGetPowerUsage(gpu))
    limit_mw = _told(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu))
    return Reading(
        device,
        kind="cuda",
        label=label,
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        total_mib=memory.total // _MIB,
        free_mib=memory.free // _MIB,
        used_by=used_by,
        utilization=None if busy is None else busy / 100,
        temperature_c=_told(lambda: float(pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU))),
        power_w=None if power_mw is None else power_mw / 1000,
        power_limit_w=None if limit_mw is None else limit_mw / 1000,
    )


def _used_by(handle: Any) -> Mapping[int, int] | None:
    """Return MiB by process; None if the driver reports no process that exists here.

    In a container, the driver reports the pids outside it, or the right pids without memory.
    """
    told = False
    found: dict[int, int] = {}
    for name in ("Compute", "Graphics"):  # a process that does both is in both lists, with its whole memory
        for version in ("_v3", "_v2"):
            listing = getattr(pynvml, f"nvmlDeviceGet{name}RunningProcesses{version}")
            processes = _told(lambda listing=listing: listing(handle))  # type: ignore[misc]
            if processes is None:
                continue
            told = told or not processes
            for process in processes:
                if process.usedGpuMemory and psutil.pid_exists(process.pid):
                    told = True
                    found[process.pid] = max(found.get(process.pid, 0), -(-process.usedGpuMemory // _MIB))
            break
    return found if told else None


def _told(ask: Callable[[], T], silence: Any = _NOT_TOLD) -> T | None:
    try:
        return ask()
    except silence:
        return None


def _driver_trouble(error: Exception) -> str:
    advice = ""
    if isinstance(error, pynvml.NVMLError_LibRmVersionMismatch):
        advice = " (the driver has been updated: restart the machine or reload its modules, then the router)"
    return f"NVIDIA's driver can't be asked: {error}{advice}"
