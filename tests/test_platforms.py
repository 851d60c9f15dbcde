"""Children and what they start: nobody outlives them, and no signal goes to a number that is free again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from conftest import eventually

from router import platforms


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
