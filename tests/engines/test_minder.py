"""What stands beside an engine of several processes, on a program that makes its end hard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from router.engines import minder

PROGRAM = """
import os, signal, time
from multiprocessing.shared_memory import SharedMemory

signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(SharedMemory(create=True, size=100).name, flush=True)
born = []
while True:
    if not (pid := os.fork()):
        time.sleep(60)
        os._exit(0)
    born.append(pid)
    if len(born) > 5:
        os.kill(born[0], signal.SIGKILL)
        os.waitpid(born.pop(0), 0)
"""
"""Starts processes all the time, each of which keeps Python's tracker of shared memory waiting."""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /dev/shm and /proc")
def test_what_is_started_while_an_engine_is_killed_is_killed_too(tmp_path: Path) -> None:
    """So nothing is left in shared memory either."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    command = [sys.executable, str(minder.__file__), "0", str(folder), sys.executable, "-c", PROGRAM]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as minded:
        assert minded.stdout is not None
        name = minded.stdout.readline().strip()
        assert Path("/dev/shm", name).exists()
        minded.send_signal(signal.SIGTERM)
        minded.wait(30)
    assert minded.returncode == -signal.SIGKILL
    assert not Path("/dev/shm", name).exists()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(minded.pid, 0)
