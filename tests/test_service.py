"""The router as a service: what systemd hears, what process 1 owes its container, what Ctrl-C does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest
from conftest import ROOT, Start, eventually, fake, models

from router.platforms import birth

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The manager's end of the notification socket, and its name."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@llama-router-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0"))
        receiver.settimeout(20)
        yield receiver, name


def until(receiver: socket.socket, line: str) -> list[str]:
    """Read datagrams up to the one that has a line that begins so; returns its lines."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lines = receiver.recv(4096).decode().split("\n")
        if any(each.startswith(line) for each in lines):
            return lines
    raise AssertionError(f"systemd did not hear {line}")


@linux_only
def test_systemd_hears_of_every_turn(
    start: Start, tiny: Path, tmp_path: Path, systemd: tuple[socket.socket, str]
) -> None:
    receiver, name = systemd
    config = {"system": {"shutdown_grace_sec": 200}, "models": models(tiny, "a", "b")}
    router = start(config, NOTIFY_SOCKET=name, WATCHDOG_USEC="200000")
    until(receiver, "STATUS=0 of 2 models ready")
    until(receiver, "READY=1")
    assert router.http.get("/ready").status_code == 200
    assert router.chat("a").status_code == 200
    until(receiver, "STATUS=1 of 2 models ready, 0 requests waiting")
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & router.engines[0].environ().keys()

    before = time.monotonic_ns() // 1000
    router.process.send_signal(signal.SIGHUP)
    reloading = until(receiver, "RELOADING=1")
    assert before <= int(reloading[1].removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    until(receiver, "READY=1")
    (tmp_path / "config.json").write_text("{")
    router.process.send_signal(signal.SIGHUP)
    until(receiver, "RELOADING=1")
    until(receiver, "READY=1")  # nothing was reloaded, but it serves

    until(receiver, "WATCHDOG=1")
    router.process.send_signal(signal.SIGSTOP)  # as if the event loop were stuck
    receiver.settimeout(1)
    with pytest.raises(TimeoutError):
        until(receiver, "ANYTHING")
    router.process.send_signal(signal.SIGCONT)
    receiver.settimeout(20)
    until(receiver, "WATCHDOG=1")

    router.process.send_signal(signal.SIGTERM)
    stopping = until(receiver, "STOPPING=1")
    assert int(stopping[1].removeprefix("EXTEND_TIMEOUT_USEC=")) > 200_000_000
    assert router.process.wait(20) == 0


@linux_only
def test_a_watchdog_for_another_process_is_not_ours(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(20)
        router = start(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="20000", WATCHDOG_PID="1")
        until(receiver, "READY=1")
        router.process.send_signal(signal.SIGTERM)
        heard = []
        while "STOPPING=1" not in heard:
            heard += receiver.recv(4096).decode().split("\n")
        assert "WATCHDOG=1" not in heard


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not there")
def test_the_unit_file_is_what_systemd_understands(tmp_path: Path) -> None:
    unit = (ROOT / "config" / "llama-router.service").read_text()
    installed = unit.replace("/opt/llama-router/bin/llama-router", sys.executable)
    assert installed != unit
    (tmp_path / "llama-router.service").write_text(installed)
    command = ["systemd-analyze", "verify", str(tmp_path / "llama-router.service")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture
def may_unshare() -> None:
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], check=False).returncode:
        pytest.skip("no right to make a PID namespace")


@linux_only
@pytest.mark.usefixtures("may_unshare")
def test_as_process_1_it_reaps_orphans_and_knows_how_its_own_ended(tiny: Path, tmp_path: Path) -> None:
    """The engine leaves a process behind that has moved to a session of its own, as daemons do."""
    real = Path(fake(tmp_path)).rename(tmp_path / "real-engine")
    script = tmp_path / "engine"
    script.write_text(f'#!/bin/sh\n(setsid sleep 0.1 &)\nexec {real} "$@"\n')
    script.chmod(0o755)
    config = {"system": {"llama_server_path": str(script)}, "models": models(tiny, "a")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    command = [*UNSHARE, sys.executable, str(ROOT / "run.py"), "--port", "0", "--config", "config.json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=pipe, text=True) as outer:
        try:
            assert outer.stderr is not None
            url = next(found[1] for line in outer.stderr if (found := re.search(r"listens on (\S+)", line)))
            (router,) = psutil.Process(outer.pid).children()
            body = {"model": "a", "messages": []}
            assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code == 200
            eventually(lambda: any(not birth(child.pid) for child in router.children()))  # the orphan has ended
            eventually(lambda: all(birth(child.pid) for child in router.children()))
            (engine,) = router.children()
            engine.send_signal(signal.SIGUSR1)
            eventually(lambda: exit_reason(url).startswith("killed by SIGUSR1"))
            router.send_signal(signal.SIGTERM)
            assert outer.wait(20) == 0
        finally:
            outer.kill()


def exit_reason(url: str) -> str:
    last = httpx.get(f"{url}/v1/health/models").json()["models"]["a"]["last_exit"]
    return last["reason"] if last else ""


@linux_only
@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs util-linux")
def test_ctrl_c_in_a_terminal_reaches_no_engine_before_its_stream_has_ended(tiny: Path, tmp_path: Path) -> None:
    engine = fake(tmp_path, chunks="10", chunk_sec="0.1")
    (tmp_path / "config.json").write_text(
        json.dumps({"system": {"llama_server_path": engine}, "models": models(tiny, "a")})
    )
    ours, theirs = os.openpty()
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    command = ["setsid", "--ctty", sys.executable, str(ROOT / "run.py"), "--port", "0", "--config", "config.json"]
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, cwd=tmp_path, env=environ, **terminal) as router:
        os.close(theirs)
        try:
            shown = b""
            while (found := re.search(rb"listens on (http://[\d.:]+)\s", shown)) is None:
                shown += os.read(ours, 4096)
            body = {"model": "a", "messages": [], "stream": True}
            url = f"{found[1].decode()}/v1/chat/completions"
            with httpx.stream("POST", url, json=body, timeout=30) as stream:
                lines = stream.iter_lines()
                next(lines)
                os.write(ours, b"\x03")
                rest = [line for line in lines if line]
            assert len(rest) == 10
            assert rest[-1] == "data: [DONE]"
            assert router.wait(20) == 0
        finally:
            router.kill()
            os.close(ours)


def test_what_is_longer_than_the_grace_is_cut_off_and_told_so(start: Start, tiny: Path, tmp_path: Path) -> None:
    system = {"llama_server_path": fake(tmp_path, chunks="1000", chunk_sec="0.1"), "shutdown_grace_sec": 0.5}
    router = start({"system": system, "models": models(tiny, "a")})
    body = {"model": "a", "messages": [], "stream": True}
    with router.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        router.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert "error" in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert router.process.wait(20) == 0


def test_a_second_signal_cuts_it_short(start: Start, tiny: Path, tmp_path: Path) -> None:
    system = {"llama_server_path": fake(tmp_path, chunks="1000", chunk_sec="0.1")}
    router = start({"system": system, "models": models(tiny, "a")})
    body = {"model": "a", "messages": [], "stream": True}
    with router.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        next(stream.iter_lines())
        engines = router.engines
        router.process.send_signal(signal.SIGTERM)
        eventually(lambda: router.http.get("/ready").status_code == 503)
        assert router.stop() == 1
    eventually(lambda: not any(birth(engine.pid) for engine in engines))
