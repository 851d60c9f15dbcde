"""AMD GPUs through the files of the amdgpu driver in /sys and /proc.

The `amdsmi` package is not used: it belongs to ROCm, must match the installed driver, has no self-contained wheel,
and reads the same files. https://docs.kernel.org/gpu/amdgpu/driver-misc.html
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from router.system.devices import Device
from router.system.readings import Reading

_MIB = 1 << 20
_AMD = "0x1002"
_CARD = re.compile(r"card(\d+)$")
_WORTH_PLACING_MIB = 8192


@dataclass(frozen=True, slots=True)
class _Card:
    number: int
    """Index in ROCm's order."""
    folder: Path
    label: str
    kfd_id: str
    """Id of the compute driver; empty if it has none."""


class Amd:
    """Reader of AMD GPUs. `asked` are numbers of GPUs to offer even if they are integrated graphics.

    Integrated graphics own only the carve-out, often 512 MB; the rest of their memory is RAM, and their models are
    counted there.
    """

    def __init__(self, asked: Collection[int] = (), root: Path = Path("/")) -> None:
        self.count = 0
        """Number of GPUs that ROCm counted at the last reading, including those left out."""
        self._asked = asked
        self._root = root

    def read(self, pids: Callable[[], Iterable[int]]) -> tuple[list[Reading], list[str]]:
        """Return all usable GPUs with their use by `pids`, and remarks about those left out.

        `pids` takes milliseconds and is called only if there is a GPU.
        """
        devices: list[Reading] = []
        left_out: list[str] = []
        cards = self._by_compute_driver() or self._by_display_driver()
        self.count = len(cards)
        clients = [client for pid in pids() for client in self._clients(pid)] if cards else []
        for card in cards:
            total = _number(card.folder / "mem_info_vram_total")
            used = _number(card.folder / "mem_info_vram_used")
            if total is None or used is None:
                left_out.append(
                    f"GPU {card.number} ({card.label}) is left out: its driver tells nothing of memory"
                )
            elif _is_apu(card) and total // _MIB < _WORTH_PLACING_MIB and card.number not in self._asked:
                left_out.append(
                    f"GPU {card.number} ({card.label}) shares the processor's memory: its models count as in RAM"
                )
            else:
                devices.append(self._device(card, total, used, clients))
        return devices, left_out

    def _device(self, card: _Card, total: int, used: int, clients: list[_Client]) -> Reading:
        slot = _slot(card)
        unique = _text(card.folder / "unique_id")
        held: dict[int, int] = {}
        for pid, pci, vram in clients:
            if pci == slot:
                held[pid] = held.get(pid, 0) + vram
        for pid in {pid for pid, _, _ in clients} if card.kfd_id else ():
            by_compute = _number(self._root / f"sys/class/kfd/kfd/proc/{pid}/vram_{card.kfd_id}")
            held[pid] = max(held.get(pid, 0), by_compute or 0)  # one process may appear in both
        busy = _number(card.folder / "gpu_busy_percent")
        sensors = next(iter(sorted(card.folder.glob("hwmon/hwmon*"))), card.folder)
        temperature = _number(sensors / "temp1_input")
        power = _number(sensors / "power1_average") or _number(sensors / "power1_input")
        limit = _number(sensors / "power1_cap")
        return Reading(
            Device.gpu(card.number),
            kind="rocm",
            label=card.label,
            uuid=f"GPU-{unique}" if unique else slot,
            total_mib=total // _MIB,
            free_mib=max(0, total - used) // _MIB,
            used_by={pid: -(-vram // _MIB) for pid, vram in held.items() if vram} or None,
            utilization=None if busy is None else busy / 100,
            temperature_c=None if temperature is None else temperature / 1000,
            power_w=None if power is None else power / 1e6,
            power_limit_w=None if limit is None else limit / 1e6,
        )

    def _by_compute_driver(self) -> list[_Card]:
        """Return the cards in ROCm's order: its nodes that are GPUs and may be opened."""
        cards: list[_Card] = []
        nodes = self._root / "sys/class/kfd/kfd/topology/nodes"
        for node in sorted(
            nodes.glob("*"), key=lambda folder: int(folder.name) if folder.name.isdecimal() else -1
        ):
            kfd_id = _text(node / "gpu_id")
            words = (_text(node / "properties") or "").split()
            properties = dict(zip(words[::2], words[1::2], strict=False))
            folder = self._root / f"sys/class/drm/renderD{properties.get('drm_render_minor', '')}/device"
            if kfd_id and kfd_id != "0" and folder.is_dir():
                target = properties.get("gfx_target_version", "")
                cards.append(_Card(len(cards), folder, _label(folder, target), kfd_id))
        return cards

    def _by_display_driver(self) -> list[_Card]:
        """Return the cards in the order of their numbers, for machines without the compute driver (with
        Vulkan)."""
        found = [
            (int(name[1]), path / "device")
            for path in (self._root / "sys/class/drm").glob("card*")
            if (name := _CARD.match(path.name)) and _text(path / "device/vendor") == _AMD
        ]
        return [_Card(number, folder, _label(folder, ""), "") for number, (_, folder) in enumerate(sorted(found))]

    def _clients(self, pid: int) -> Iterator[_Client]:
        """Yield pid, PCI address and bytes of VRAM for each DRM client of a process."""
        seen: set[tuple[str, str]] = set()
        with contextlib.suppress(OSError):
            for path in (self._root / f"proc/{pid}/fdinfo").iterdir():
                fields = _drm_fields(path)
                slot, client = fields.get("drm-pdev", ""), fields.get("drm-client-id", "")
                if fields.get("drm-driver") != "amdgpu" or (slot, client) in seen:
                    continue
                seen.add((slot, client))  # several descriptors of one client
                amount, _, unit = fields.get("drm-memory-vram", "0").partition(" ")
                scale = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}.get(unit, 0)
                yield pid, slot, int(amount) * scale if amount.isdecimal() else 0


_Client = tuple[int, str, int]


def _is_apu(card: _Card) -> bool:
    """Return whether a card is integrated graphics, whose metrics have a format of their own.

    `metrics_table_header` in the kernel's kgd_pp_interface.h: size (2 bytes), format (1), content (1).
    """
    with contextlib.suppress(OSError):
        header = (card.folder / "gpu_metrics").read_bytes()[:4]
        return len(header) == 4 and header[2] in (2, 3)
    return False


def _label(folder: Path, target: str) -> str:
    if name := _text(folder / "product_name"):
        return name
    if target.isdecimal() and (version := int(target)):
        return f"AMD gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    return "AMD GPU"


def _slot(card: _Card) -> str:
    lines = (_text(card.folder / "uevent") or "").splitlines()
    return next((line.partition("=")[2] for line in lines if line.startswith("PCI_SLOT_NAME=")), "")


def _drm_fields(path: Path) -> Mapping[str, str]:
    pairs = (line.partition(":") for line in (_text(path) or "").splitlines())
    return {key: value.strip() for key, _, value in pairs if key.startswith("drm-")}


def _number(path: Path) -> int | None:
    with contextlib.suppress(ValueError):
        return int(_text(path) or "")
    return None


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError):  # absent, forbidden, or the GPU sleeps
        return path.read_bytes().decode(errors="replace").strip()
    return None
