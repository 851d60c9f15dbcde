"""A router is killed and its engines live on: the next one ends them, and nobody else."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Start, eventually, fake, models

from router.system.processes import birth

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="the fake engine outlives its router by Linux's prctl"
)
SLEEPS = [sys.executable, "-c", "print(flush=True); input()"]


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """Somebody's process that has nothing to do with us, but has a key of the same name."""
    environ = {"LLAMA_API_KEY": "another"}
    with subprocess.Popen(SLEEPS, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def recorded(folder: Path) -> list[dict[str, Any]]:
    path = folder / "engines.json"
    return json.loads(path.read_text())["engines"] if path.exists() else []


def write_record(
    folder: Path, pid: int, born: str | None, *, router: tuple[int, str | None] = (1, "gone")
) -> None:
    engine = {"alias": "a", "pid": pid, "born": born, "port": 9, "key_sha256": hashlib.sha256(b"k").hexdigest()}
    folder.mkdir(exist_ok=True)
    record = {"router_pid": router[0], "router_born": router[1], "engines": [engine]}
    (folder / "engines.json").write_text(json.dumps(record))


def test_the_record_follows_the_engines(start: Start, tiny: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    router = start({"models": models(tiny, "a", "b")}, LLAMA_ROUTER_STATE_DIR=str(state))
    assert router.chat("a").status_code == router.chat("b").status_code == 200
    eventually(lambda: {each["pid"] for each in recorded(state)} == {each.pid for each in router.engines})
    assert {each["born"] for each in recorded(state)} == {birth(each.pid) for each in router.engines}
    key = router.engines[0].environ()["LLAMA_API_KEY"]
    assert key not in (state / "engines.json").read_text()
    router.http.post("/v1/models/eject", json={"model": "a"})
    eventually(lambda: [each["alias"] for each in recorded(state)] == ["b"])
    assert router.stop() == 0
    assert recorded(state) == []


@linux_only
@pytest.mark.parametrize("outlives", ["yes", "stubborn"])
def test_the_next_router_ends_what_a_killed_one_has_left(
    start: Start, tiny: Path, tmp_path: Path, outlives: str
) -> None:
    state = tmp_path / "state"
    system = {"llama_server_path": fake(tmp_path, outlives=outlives), "stop_grace_sec": 0.2}
    config = {"system": system, "models": models(tiny, "a", "b")}
    router = start(config, LLAMA_ROUTER_STATE_DIR=str(state))
    assert router.chat("a").status_code == router.chat("b").status_code == 200
    orphans = router.engines
    eventually(lambda: len(recorded(state)) == 2)
    router.process.kill()
    router.process.wait()
    try:
        assert all(orphan.is_running() for orphan in orphans)  # the first line of defence is down
        successor = start(config, LLAMA_ROUTER_STATE_DIR=str(state))
        assert not any(birth(orphan.pid) for orphan in orphans)
        eventually(lambda: all(f"pid {orphan.pid} " in successor.log for orphan in orphans))
        assert successor.chat("a").status_code == 200
        assert successor.stop() == 0
    finally:
        for orphan in orphans:
            if orphan.is_running():
                orphan.kill()


@linux_only
def test_what_a_dead_engine_had_started_is_ended_too(start: Start, tiny: Path, tmp_path: Path) -> None:
    """The engine is a script that starts the real one; only the script was killed with the router."""
    state = tmp_path / "state"
    real = Path(fake(tmp_path, outlives="yes")).rename(tmp_path / "real-engine")
    script = tmp_path / "wrapper"
    script.write_text(f'#!/bin/sh\n{real} "$@" <&0 &\necho $! > {tmp_path}/pid\nwait\n')
    script.chmod(0o755)
    config = {"system": {"llama_server_path": str(script)}, "models": models(tiny, "a")}
    router = start(config, LLAMA_ROUTER_STATE_DIR=str(state))
    assert router.chat("a").status_code == 200
    inner = psutil.Process(int((tmp_path / "pid").read_text()))
    eventually(lambda: len(recorded(state)) == 1)
    router.process.kill()
    router.process.wait()
    eventually(lambda: birth(recorded(state)[0]["pid"]) is None)
    try:
        assert inner.is_running()
        start(config, LLAMA_ROUTER_STATE_DIR=str(state))
        assert birth(inner.pid) is None
    finally:
        if inner.is_running():
            inner.kill()


def test_a_number_that_is_somebody_elses_by_now_is_spared(
    start: Start, tiny: Path, tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    state = tmp_path / "state"
    write_record(state, stranger.pid, "another boot 1")
    router = start({"models": models(tiny, "a")}, LLAMA_ROUTER_STATE_DIR=str(state))
    assert router.chat("a").status_code == 200
    assert stranger.poll() is None
    assert "ending" not in router.log


def test_even_with_the_right_birth_another_key_is_another_engine(
    start: Start, tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    write_record(tmp_path / "state", stranger.pid, birth(stranger.pid))
    start(LLAMA_ROUTER_STATE_DIR=str(tmp_path / "state"))
    assert stranger.poll() is None


def test_engines_of_a_router_that_lives_are_left_alone(
    start: Start, tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    """Somebody has copied the state directory of a running router."""
    alive = (os.getpid(), birth(os.getpid()))
    process = subprocess.Popen(SLEEPS, env={"LLAMA_API_KEY": "k"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        write_record(tmp_path / "state", process.pid, birth(process.pid), router=alive)
        router = start(LLAMA_ROUTER_STATE_DIR=str(tmp_path / "state"))
        eventually(lambda: "left alone" in router.log)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="recycles a number by root's means")
def test_a_number_that_is_really_recycled_has_another_birth() -> None:
    with subprocess.Popen(["sleep", "60"]) as first:
        born = birth(first.pid)
        assert born is not None
        first.kill()
        first.wait()
        assert birth(first.pid) is None
    script = (  # the clock of births ticks every 10 ms, and tens of thousands of processes take longer than that
        f"sleep 0.05; for i in $(seq 200); do echo {first.pid - 1} > /proc/sys/kernel/ns_last_pid;"
        f" sleep 60 & [ $! = {first.pid} ] && break; kill $!; done; echo $!; wait"
    )
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True) as shell:
        assert shell.stdout is not None
        recycled = int(shell.stdout.readline())
        try:
            if recycled != first.pid:
                pytest.skip("the kernel does not give the number out again")
            assert birth(recycled) not in (None, born)
        finally:
            os.killpg(shell.pid, signal.SIGKILL)


def test_a_dead_child_that_nobody_has_reaped_is_no_live_process() -> None:
    child = subprocess.Popen(["true"])
    eventually(lambda: birth(child.pid) is None)
    child.wait()


def test_the_name_of_a_process_does_not_matter(tmp_path: Path) -> None:
    program = tmp_path / ") Z 1 2 ("
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        eventually(lambda: psutil.Process(process.pid).name() != "python")
        assert birth(process.pid) == birth(process.pid) is not None
        process.kill()
