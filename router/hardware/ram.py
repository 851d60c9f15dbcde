"""RAM of the machine or of the router's cgroup, and RAM held by processes."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from router.system.devices import HOST
from router.system.processes import descendants
from router.system.readings import Reading

_MIB = 1 << 20
_ROOT = Path("/")

# Limit files of cgroup v2 and v1, their usage file, and the fields of memory.stat that are page cache.
_Files = tuple[tuple[str, ...], str, tuple[str, ...]]
_V2: _Files = ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")
_V1: _Files = ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """RAM held by a process and its descendants; pages shared among them count once."""

    anonymous_mib: int
    """Memory that only its exit releases: buffers, and locked pages of mapped files (`--mlock`)."""
    file_mib: int
    """Mapped files, such as weights, whose pages the kernel can drop and read again."""
    family: tuple[int, ...] = ()
    """Pids of the process and its descendants: an engine behind a wrapper holds GPU memory under its own pid."""


def reading(root: Path = _ROOT) -> Reading:
    """Read RAM as a device. Page cache counts as free. `root` contains `/proc` and `/sys`."""
    total, available = memory(root)
    return Reading(HOST, "host", platform.machine(), "", total, available)


def memory(root: Path = _ROOT) -> tuple[int, int]:
    """Return total and available RAM in MiB: the machine's, or the tightest limit of the router's cgroups."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for group, (limits, usage_name, caches) in _cgroups(root):
        limit = min((bound for name in limits if (bound := _number(group / name)) is not None), default=None)
        usage = _number(group / usage_name)
        if limit is None or usage is None or limit >= machine.total:
            continue
        stat = fields(group / "memory.stat")
        usage -= sum(stat.get(name, 0) for name in caches)  # the kernel reclaims it when needed
        total, available = min(total, limit), min(available, max(0, limit - usage))
    return total // _MIB, available // _MIB


def process_memory(
    pids: Iterable[int], proc: Path = Path("/proc"), *, mapped: bool = True
) -> dict[int, ProcessMemory]:
    """Return the RAM held by each of `pids` that runs and may be inspected, with its descendants.

    Blocking, and slow for large mappings, whose page tables the kernel walks. `mapped=False` only reads counters,
    which count shared pages once for each process.
    """
    found: dict[int, ProcessMemory] = {}
    for pid in pids:
        family = (pid, *descendants(pid))
        shares = [share for member in family if (share := _held(member, proc, mapped)) is not None]
        if shares:
            anonymous, of_files = (sum(parts) for parts in zip(*shares, strict=True))
            found[pid] = ProcessMemory(-(-anonymous // _MIB), -(-of_files // _MIB), family)
    return found


def resident_bytes(pid: int) -> int:
    """Return the resident bytes of a process and its descendants by counters, which count shared pages
    repeatedly."""
    found = 0
    for member in (pid, *descendants(pid)):
        with contextlib.suppress(psutil.Error):
            found += psutil.Process(member).memory_info().rss
    return found


def _held(pid: int, proc: Path, mapped: bool) -> tuple[int, int] | None:
    """Return bytes that stay and bytes that can be dropped; None if the process is gone or not accessible."""
    if sys.platform != "linux":
        with contextlib.suppress(psutil.Error):
            figures = psutil.Process(pid).memory_full_info()
            return figures.uss, max(0, figures.rss - figures.uss)
        return None
    # A page that n processes share counts 1/n in each: the parts of a family add up.
    rollup = fields(proc / str(pid) / "smaps_rollup") if mapped else {}
    if "Pss_Anon" in rollup:
        return _sorted(rollup, "Pss_Anon", "Pss_Shmem", "Pss_File", "Locked")
    status = fields(proc / str(pid) / "status")  # also for older kernels, and processes of others
    if "RssAnon" in status:
        return _sorted(status, "RssAnon", "RssShmem", "RssFile", "VmLck")
    return None


def _sorted(fields: Mapping[str, int], *names: str) -> tuple[int, int]:
    """Count locked pages of files as staying: unlike other pages of files, they are not available."""
    anonymous, shared, of_files, locked = (fields.get(name, 0) for name in names)
    stays = min(of_files, locked)
    return anonymous + shared + stays, of_files - stays


def _cgroups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """Yield the visible cgroups of the router, from its own up to the root."""
    with contextlib.suppress(OSError, ValueError):  # no such file, or not what it should be
        for line in os.fsdecode((root / "proc/self/cgroup").read_bytes()).splitlines():
            _, controllers, own = line.split(":", 2)
            if not controllers:
                mount, kind = root / "sys/fs/cgroup", _V2
            elif "memory" in controllers.split(","):
                mount, kind = root / "sys/fs/cgroup/memory", _V1
            else:
                continue
            # In a container the path may be that of the host; the mount itself is then the router's group.
            path = PurePosixPath(own.lstrip("/"))
            for folder in (path, *path.parents):
                if ".." not in folder.parts and (mount / folder).is_dir():
                    yield mount / folder, kind


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # absent, or "max"
        return int(path.read_text())
    return None


def fields(path: Path) -> dict[str, int]:
    """Parse lines such as `anon 4096` or `Rss:  4 kB`; values in bytes."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in path.read_bytes().decode(errors="replace").splitlines():
            words = line.split()
            if len(words) >= 2 and words[1].isdecimal():
                scale = 1024 if words[2:] == ["kB"] else 1
                found[words[0].rstrip(":")] = int(words[1]) * scale
    return found


def oom_kills(root: Path = _ROOT) -> int | None:
    """Return how many processes of the router's cgroup, or else of the machine, the kernel has killed because
    memory ran out; None if it does not count them."""
    counted = (group / name for group, _ in _cgroups(root) for name in ("memory.events", "memory.oom_control"))
    for path in (*counted, root / "proc/vmstat"):
        kills = fields(path).get("oom_kill")
        if kills is not None:
            return kills
    return None
