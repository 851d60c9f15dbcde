"""Files as the Linux kernel shows them in /sys and /proc, laid out in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MIB = 1 << 20


def lay_out(root: Path, files: dict[str, str | bytes | int]) -> None:
    """Write these files below `root`; integers and text get the newline that the kernel adds."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())


def card(number: int, *, vram_mib: int, used_mib: int = 0, apu: bool = False, slot: str) -> dict[str, Any]:
    """Return the files of a card, as amdgpu of Linux 6.8 shows them."""
    folder = f"sys/class/drm/card{number}/device"
    return {
        f"{folder}/vendor": "0x1002",
        f"{folder}/uevent": f"DRIVER=amdgpu\nPCI_CLASS=30000\nPCI_ID=1002:744C\nPCI_SLOT_NAME={slot}",
        f"{folder}/mem_info_vram_total": vram_mib * _MIB,
        f"{folder}/mem_info_vram_used": used_mib * _MIB,
        f"{folder}/gpu_metrics": bytes([120, 0, 2 if apu else 1, 3]) + bytes(116),
        f"{folder}/gpu_busy_percent": 12,
        f"{folder}/hwmon/hwmon4/temp1_input": 48000,
        f"{folder}/hwmon/hwmon4/power1_average": 96000000,
        f"{folder}/hwmon/hwmon4/power1_cap": 303000000,
    }
