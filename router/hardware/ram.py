"""RAM: what the machine, or the cgroup that we are in, has of it, and what processes hold."""

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

# The limit files of cgroup v2 and v1, their usage file, and what of memory.stat is page cache.
_Files = tuple[tuple[str, ...], str, tuple[str, ...]]
_V2: _Files = ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")
_V1: _Files = ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """What a process and all that it started hold of RAM; what they share among each other counts once."""

    anonymous_mib: int
    """Gone only with the process: its buffers, and of mapped files what it has locked (`--mlock`)."""
    file_mib: int
    """Mapped files, such as weights: the kernel can drop these pages and read them again."""
    family: tuple[int, ...] = ()
    """The process and all that it started: an engine behind a wrapper holds GPU memory under another number."""


def reading(root: Path = _ROOT) -> Reading:
    """RAM as a device. Page cache counts as free. `root` is where `/proc` and `/sys` are."""
    total, available = memory(root)
    return Reading(HOST, "host", platform.machine(), "", total, available)


def memory(root: Path = _ROOT) -> tuple[int, int]:
    """Total and available RAM in MiB: the machine's, or the least that one of our cgroups leaves us."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for group, (limits, usage_name, caches) in _cgroups(root):
        limit = min((bound for name in limits if (bound := _number(group / name)) is not None), default=None)
        usage = _number(group / usage_name)
        if limit is None or usage is None or limit >= machine.total:
            continue
        stat = _fields(group / "memory.stat")
        usage -= sum(stat.get(name, 0) for name in caches)  # the kernel takes that back at need
        total, available = min(total, limit), min(available, max(0, limit - usage))
    return total // _MIB, available // _MIB


def process_memory(
    pids: Iterable[int], proc: Path = Path("/proc"), *, mapped: bool = True
) -> dict[int, ProcessMemory]:
    """For each of `pids` that lives and may be looked at, what it and its descendants hold.

    Blocking, and long for large mappings: the kernel walks their page tables. With `mapped=False` it only reads
    counters, by which pages that processes share belong to each of them.
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
    """What a process and all that it started have in RAM, with what they share counted for each: a quick look."""
    found = 0
    for member in (pid, *descendants(pid)):
        with contextlib.suppress(psutil.Error):
            found += psutil.Process(member).memory_info().rss
    return found


def _held(pid: int, proc: Path, mapped: bool) -> tuple[int, int] | None:
    """Bytes that stay and bytes that can be dropped; None if the process is gone or not ours to look at."""
    if sys.platform != "linux":
        with contextlib.suppress(psutil.Error):
            figures = psutil.Process(pid).memory_full_info()
            return figures.uss, max(0, figures.rss - figures.uss)
        return None
    # A page that n processes share counts 1/n in each: the parts of a family add up.
    rollup = _fields(proc / str(pid) / "smaps_rollup") if mapped else {}
    if "Pss_Anon" in rollup:
        return _sorted(rollup, "Pss_Anon", "Pss_Shmem", "Pss_File", "Locked")
    status = _fields(proc / str(pid) / "status")  # also for older kernels, and processes of others
    if "RssAnon" in status:
        return _sorted(status, "RssAnon", "RssShmem", "RssFile", "VmLck")
    return None


def _sorted(fields: Mapping[str, int], *names: str) -> tuple[int, int]:
    """What is locked of files stays, too: to the kernel it is not free, as other pages of files are."""
    anonymous, shared, of_files, locked = (fields.get(name, 0) for name in names)
    stays = min(of_files, locked)
    return anonymous + shared + stays, of_files - stays


def _cgroups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """Every cgroup that we are in and whose folder we can see, from our own up to the root."""
    with contextlib.suppress(OSError, ValueError):  # no such file, or not what it should be
        for line in os.fsdecode((root / "proc/self/cgroup").read_bytes()).splitlines():
            _, controllers, own = line.split(":", 2)
            if not controllers:
                mount, kind = root / "sys/fs/cgroup", _V2
            elif "memory" in controllers.split(","):
                mount, kind = root / "sys/fs/cgroup/memory", _V1
            else:
                continue
            # In a container the path may be one of outside; then the mount itself is our group.
            path = PurePosixPath(own.lstrip("/"))
            for folder in (path, *path.parents):
                if ".." not in folder.parts and (mount / folder).is_dir():
                    yield mount / folder, kind


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # absent, or "max"
        return int(path.read_text())
    return None


def _fields(path: Path) -> dict[str, int]:
    """Lines such as `anon 4096` or `Rss:  4 kB`, in bytes."""
    fields: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in path.read_bytes().decode(errors="replace").splitlines():
            words = line.split()
            if len(words) >= 2 and words[1].isdecimal():
                scale = 1024 if words[2:] == ["kB"] else 1
                fields[words[0].rstrip(":")] = int(words[1]) * scale
    return fields


def oom_kills(root: Path = _ROOT) -> int | None:
    """How many processes of our cgroup (where it does not say: of this machine) the kernel has killed for want
    of memory so far; None where it does not count them."""
    counted = (group / name for group, _ in _cgroups(root) for name in ("memory.events", "memory.oom_control"))
    for path in (*counted, root / "proc/vmstat"):
        kills = _fields(path).get("oom_kill")
        if kills is not None:
            return kills
    return None
