"""Child processes and their descendants: none outlives its parent, and no signal goes to a reused pid."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from conftest import eventually

from router.system import processes as platforms


def test_what_a_child_has_started_dies_with_it_and_its_exit_code_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaders: list[str] = []
    signal_group = platforms.signal_group

    def look_and_signal(pid: int, number: int) -> None:
        leaders.append(psutil.Process(pid).status())
        signal_group(pid, number)

    monkeypatch.setattr(platforms, "signal_group", look_and_signal)
    script = f"sleep 60 & echo $! > {tmp_path}/pid; exit 3"
    child = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    assert asyncio.run(platforms.exit_code(child)) == 3
    if hasattr(os, "waitid"):
        assert leaders == [psutil.STATUS_ZOMBIE]  # not reaped yet, so that the number of the group was its own
    grandchild = int((tmp_path / "pid").read_text())
    eventually(lambda: platforms.birth(grandchild) is None)


def test_the_signal_that_ended_a_child_is_told() -> None:
    child = subprocess.Popen(["sh", "-c", "kill -KILL $$"], start_new_session=True)
    assert asyncio.run(platforms.exit_code(child)) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="who is dead is known by reaping it")
def test_a_child_that_takes_long_to_reap_holds_nobody_up_and_is_known_as_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a large one does: its memory is torn down meanwhile. Nobody may signal it then."""
    reaping, torn_down = threading.Event(), threading.Event()
    waitpid = os.waitpid

    def reap(pid: int, options: int) -> tuple[int, int]:
        reaping.set()
        assert torn_down.wait(5), "the event loop waits for it"
        return waitpid(pid, options)

    child = subprocess.Popen(["sh", "-c", "exit 3"], start_new_session=True)
    monkeypatch.setattr(os, "waitpid", reap)

    async def reaped() -> None:
        code = asyncio.create_task(platforms.exit_code(child))
        await asyncio.to_thread(reaping.wait, 5)
        assert (child.returncode, code.done()) == (3, False)
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
        torn_down.set()
        assert await code == 3
        assert not psutil.pid_exists(child.pid)

    asyncio.run(reaped())


@pytest.mark.skipif(sys.platform != "linux", reason="nobody else has a setpriv")
def test_a_setpriv_that_knows_no_death_signal_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Alpine and RHEL 8."""
    setpriv = tmp_path / "setpriv"
    setpriv.write_text("#!/bin/sh\necho 'setpriv: unrecognized option: pdeathsig' >&2; exit 1\n")
    setpriv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with platforms.spawn(["sh", "-c", "echo it runs"], os.environ, subprocess.DEVNULL) as child:
        assert child.communicate() == (b"it runs\n", None)


STARTS_FROM_A_THREAD = """
import subprocess, sys, threading
starts = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); input()"
def start():
    child = subprocess.Popen([sys.executable, "-c", starts], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    print(child.pid, int(child.stdout.readline()), flush=True)
    sys.stdin.read()
threading.Thread(target=start).start()
"""


@pytest.mark.parametrize("tells_children", [True, False])
def test_all_that_a_process_has_started_is_found(monkeypatch: pytest.MonkeyPatch, tells_children: bool) -> None:
    if not tells_children:
        monkeypatch.setattr(platforms, "_TELLS_CHILDREN", False)
    argv = [sys.executable, "-c", STARTS_FROM_A_THREAD]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            child, grandchild = map(int, process.stdout.readline().split())
            assert platforms.descendants(process.pid) == [child, grandchild]
            assert platforms.descendants(child) == [grandchild]
            assert platforms.descendants(grandchild) == []
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert platforms.descendants(process.pid) == []
