"""GPUs that only the engine reports, by `llama-server --list-devices` of a Vulkan build.

The list takes a process of about 0.2 s and wakes sleeping GPUs, so callers state how old it may be. Memory of
these GPUs is not reported by process. If their driver does not report the memory in use either
(VK_EXT_memory_budget), the reading is constant, and memory not reserved for engines counts as
free.

GPUs are numbered as in the list: `gpu1` is Vulkan1. GGML_VK_VISIBLE_DEVICES, which restricts an engine to some of
them, uses the numbers of Vulkan's loader: the list may omit some. Blocking.
"""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from router.hardware.devices import SHOWS
from router.system.devices import Device
from router.system.privacy import without_secrets
from router.system.readings import Reading

if TYPE_CHECKING:
    from router.engines.llamacpp.sizing import EngineKind

TIMEOUT_SEC = 10.0
_PAUSE_SEC = 60.0
"""Pause after a list that hung; doubled each time that it hangs again."""
_LONGEST_PAUSE_SEC = 3600.0
_MOST = 16
_LINE = re.compile(r"\s+([A-Za-z]+)(\d*): (.*) \((\d+) MiB, (\d+) MiB free\)")
_READ_BY_DRIVERS = ("CUDA", "ROCm", "MTL", "BLAS")
"""Backends that drivers report, or that have no memory of their own."""
_INTEL = "0x8086"
_SAME_SIZE = 0.05
"""Tolerance between drivers, which reserve different amounts."""


@dataclass(frozen=True, slots=True)
class _Line:
    backend: str
    label: str
    total_mib: int
    free_mib: int


class Listed:
    """List of an engine's GPUs. `asked` are numbers of GPUs to offer even if they share memory with the processor;
    `root` contains `/sys`."""

    def __init__(
        self, engine: EngineKind, environ: Mapping[str, str], asked: Collection[int] = (), root: Path = Path("/")
    ) -> None:
        self._engine = engine
        self._argv = [str(engine.program), "--list-devices"]
        known = without_secrets(environ)
        self._environ = {name: value for name, value in known.items() if not name.startswith("LLAMA_ARG_")}
        self._asked = asked
        self._root = root
        self._last: tuple[list[Reading], list[str]] = [], []
        self._taken_sec = -math.inf
        self._pause_sec = 0.0
        self._again_sec = -math.inf
        """Time until which it is not run again after it hung; `_pause_sec` is the length of that pause."""
        self._counted: dict[tuple[str, ...], list[int | None]] = {}
        """The loader's numbers of the GPUs, by the labels of a list."""
        self._others: dict[tuple[Device, ...], dict[Device, str]] = {}

    def read(self, within_sec: float, *, amd_shares: bool) -> tuple[list[Reading], list[str]]:
        """Return all usable GPUs, and remarks about those left out, at most `within_sec` seconds old.
        `amd_shares`: the AMD GPUs of this machine are integrated graphics.

        Builds that list none are not asked again, as most are for the CPU. Raises TimeoutExpired, also during the
        pause after a list that hung.
        """
        now = time.monotonic()
        lists_some = bool(self._counted) or math.isinf(self._taken_sec)
        if lists_some and now - self._taken_sec > within_sec:
            if now < self._again_sec:
                raise subprocess.TimeoutExpired(self._argv, TIMEOUT_SEC)
            try:
                self._last = self._read(amd_shares)
            except subprocess.TimeoutExpired:
                self._pause_sec = min(2 * self._pause_sec, _LONGEST_PAUSE_SEC) or _PAUSE_SEC
                self._again_sec = time.monotonic() + self._pause_sec
                raise
            self._pause_sec = 0.0
            self._taken_sec = now
        return self._last

    def numbers_of(self, gpus: Sequence[Reading]) -> dict[Device, str]:
        """Return the numbers that Vulkan's loader gives to GPUs reported by a driver; empty if one is not found.

        GPUs are matched by name and size, else by size, in their order. The engine is asked once.
        """
        devices = tuple(gpu.device for gpu in gpus)
        if devices not in self._others:
            try:
                listed = self.read(0, amd_shares=False)[0]
            except subprocess.TimeoutExpired:
                return {}
            self._others[devices] = {}
            found = dict(_matched(gpus, listed))
            if len(found) == len(devices):
                self._others[devices] = found
        return self._others[devices]

    def _read(self, amd_shares: bool) -> tuple[list[Reading], list[str]]:
        lines = self._list(self._environ)
        left_out = [
            f"{line.backend} device {line.label} is known to the engine alone: its models count as in RAM"
            for line in lines or ()
            if line.backend not in ("Vulkan", *_READ_BY_DRIVERS)
        ]
        found = [line for line in lines or () if line.backend == "Vulkan"]
        labels = tuple(line.label for line in found)
        if labels and labels not in self._counted:
            self._counted[labels] = list(self._numbers(labels))
        sharing = self._sharing(labels, amd_shares)
        gpus = []
        for number, (line, counted) in enumerate(zip(found, self._counted.get(labels, ()), strict=True)):
            if counted is None:
                left_out.append(f"{line.label} cannot be shown to an engine alone: its models count as in RAM")
            elif number in sharing and number not in self._asked:
                left_out.append(f"{line.label} shares the processor's memory: its models count as in RAM")
            else:
                gpus.append(
                    Reading(
                        Device.gpu(number),
                        kind="vulkan",
                        label=line.label,
                        uuid=str(counted),
                        total_mib=line.total_mib,
                        free_mib=min(line.free_mib, line.total_mib),
                    )
                )
        return gpus, left_out

    def _numbers(self, labels: Sequence[str]) -> Iterator[int | None]:
        """Yield the loader's numbers of the listed GPUs in order; None for one that is not found. The loader's
        GPUs are listed one at a time until the next of the list appears."""
        spelled = self._environ.get(SHOWS)
        if spelled is not None:
            named = [int(word) for word in re.findall(r"\d+", spelled)]
            yield from named if len(named) == len(labels) else [None] * len(labels)
            return
        number = -1
        for label in labels:
            while number < _MOST:
                number += 1
                alone = self._list({**self._environ, SHOWS: str(number)})
                if alone is None:  # the loader has no more
                    number = _MOST
                elif [line.label for line in alone if line.backend == "Vulkan"] == [label]:
                    break
            yield number if number < _MOST else None

    def _sharing(self, labels: Sequence[str], amd_shares: bool) -> set[int]:
        """Return the numbers of integrated graphics. Vulkan's loader lists them last, and Intel's always have the
        same PCI address."""
        sharing = {place for place, label in enumerate(labels) if amd_shares and "AMD" in label}
        intel = [place for place, label in enumerate(labels) if "Intel" in label]
        if intel and _text(self._root / "sys/bus/pci/devices/0000:00:02.0/vendor") == _INTEL:
            sharing.add(intel[-1])
        return sharing

    def _list(self, environ: Mapping[str, str]) -> list[_Line] | None:
        """Run the list; None if it fails, also because the environment selects a GPU that does not exist."""
        if not self._engine.lists_devices:
            return None
        try:
            done = subprocess.run(  # noqa: S603
                self._argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SEC,
                env=environ,
                check=False,
            )
        except OSError:  # a load reports why it cannot be run
            return None
        if done.returncode != 0 or "Invalid device index" in done.stderr:
            return None
        found = (_LINE.fullmatch(line) for line in done.stdout.splitlines())
        return [_Line(each[1], each[3], int(each[4]), int(each[5])) for each in found if each is not None]


def _matched(gpus: Sequence[Reading], listed: Sequence[Reading]) -> Iterator[tuple[Device, str]]:
    left = list(listed)
    for gpu in gpus:
        alike = [one for one in left if abs(one.total_mib / max(1, gpu.total_mib) - 1) < _SAME_SIZE]
        if alike:
            one = min(alike, key=lambda one: one.label != gpu.label)
            left.remove(one)
            yield gpu.device, one.uuid


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
