"""Files are read before they are needed, as far as memory is free."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import eventually

from router.hardware.page_cache import read_ahead, room

MIB = 1 << 20

needs_fincore = pytest.mark.skipif(shutil.which("fincore") is None, reason="fincore is not installed")


def cold(path: Path, size: int) -> Path:
    """Write a file that is not in the page cache."""
    path.write_bytes(os.urandom(size))
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    return path


def cached(path: Path) -> int:
    """Return how many bytes of a file are in the page cache."""
    told = subprocess.run(["fincore", "-nrb", "-o", "RES", path], capture_output=True, text=True, check=True)
    return int(told.stdout)


@needs_fincore
def test_files_are_read_in_their_order_up_to_a_limit(tmp_path: Path) -> None:
    first, second = cold(tmp_path / "first", 4 * MIB), cold(tmp_path / "second", 32 * MIB)
    if cached(first):
        pytest.skip("this file system keeps all of its files in memory")
    assert read_ahead([tmp_path / "missing", first, second], 8 * MIB) == 8 * MIB
    eventually(lambda: cached(first) == 4 * MIB and cached(second) >= 4 * MIB)
    assert cached(second) < 8 * MIB


@needs_fincore
def test_all_of_a_file_is_read_however_little_the_kernel_reads_at_once(tmp_path: Path) -> None:
    file = cold(tmp_path / "file", 40 * MIB)
    if cached(file):
        pytest.skip("this file system keeps all of its files in memory")
    assert read_ahead([file], 64 * MIB) == 40 * MIB
    eventually(lambda: cached(file) == 40 * MIB)


def test_nothing_is_read_without_room(tmp_path: Path) -> None:
    assert read_ahead([cold(tmp_path / "file", MIB)], 0) == 0


def meminfo(root: Path, **mib: int) -> None:
    (root / "proc").mkdir(exist_ok=True)
    lines = {"MemFree": 1000, "Cached": 8000, "Mapped": 5000, "Shmem": 1000, "Dirty": 100} | mib
    (root / "proc/meminfo").write_text("".join(f"{name}: {figure << 10} kB\n" for name, figure in lines.items()))


def test_what_engines_have_mapped_is_no_room(tmp_path: Path) -> None:
    meminfo(tmp_path)
    assert room(tmp_path) == (1000 + 8000 - 5000 - 1000 - 100 - 512) * MIB
    meminfo(tmp_path, Mapped=7000)
    assert room(tmp_path) == (1000 - 512) * MIB
    meminfo(tmp_path, Mapped=7000, MemFree=100)
    assert room(tmp_path) == 0


def test_there_is_no_room_where_the_kernel_does_not_tell(tmp_path: Path) -> None:
    assert room(tmp_path) == 0
