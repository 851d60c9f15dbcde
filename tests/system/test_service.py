"""The router as a service: notifications to systemd, duties of process 1 in a container, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from conftest import ROOT, Start, eventually, fake, models

from router.system.processes import birth

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


class Systemd:
    """The manager's end of the notification socket. Like the real one, it reads all the time: there is room for
    ten messages only."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._heard: Queue[list[str]] = Queue()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(name.replace("@", "\0"))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            self._heard.put(self._socket.recv(4096).decode().split("\n"))

    def hears(self, line: str, timeout_sec: float = 20) -> list[str]:
        """Up to the message that has a line that begins so; returns its lines. Raises Empty in a long silence."""
        while True:
            lines = self._heard.get(timeout=timeout_sec)
            if any(each.startswith(line) for each in lines):
                return lines


@linux_only
@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_hears_of_every_turn(start: Start, tiny: Path, tmp_path: Path, kind: str) -> None:
    systemd = Systemd(str(tmp_path / "notify") if kind == "path" else f"@llama-router-test-{os.getpid()}")
    config = {"system": {"shutdown_grace_sec": 200}, "models": models(tiny, "a", "b")}
    router = start(config, NOTIFY_SOCKET=systemd.name, WATCHDOG_USEC="200000")
    systemd.hears("STATUS=0 of 2 models ready")
    systemd.hears("READY=1")
    assert router.http.get("/ready").status_code == 200
    assert router.chat("a").status_code == 200
    systemd.hears("STATUS=1 of 2 models ready, 0 requests waiting")
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & router.engines[0].environ().keys()

    before = time.monotonic_ns() // 1000
    router.process.send_signal(signal.SIGHUP)
    reloading = systemd.hears("RELOADING=1")
    assert before <= int(reloading[1].removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    systemd.hears("READY=1")
    (tmp_path / "config.json").write_text("{")
    router.process.send_signal(signal.SIGHUP)
    systemd.hears("RELOADING=1")
    systemd.hears("READY=1")  # nothing was reloaded, but it serves

    systemd.hears("WATCHDOG=1")
    router.process.send_signal(signal.SIGSTOP)  # as if the event loop were stuck
    with pytest.raises(Empty):
        systemd.hears("ANYTHING", timeout_sec=1)
    router.process.send_signal(signal.SIGCONT)
    systemd.hears("WATCHDOG=1")

    router.process.send_signal(signal.SIGTERM)
    stopping = systemd.hears("STOPPING=1")
    assert int(stopping[1].removeprefix("EXTEND_TIMEOUT_USEC=")) > 200_000_000
    assert router.process.wait(20) == 0


@linux_only
def test_a_watchdog_for_another_process_is_not_ours(start: Start, tmp_path: Path) -> None:
    systemd = Systemd(str(tmp_path / "notify"))
    router = start(NOTIFY_SOCKET=systemd.name, WATCHDOG_USEC="20000", WATCHDOG_PID="1")
    systemd.hears("READY=1")
    with pytest.raises(Empty):
        systemd.hears("WATCHDOG=1", timeout_sec=0.5)
    assert router.stop() == 0


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


@dataclass
class Terminal:
    """A router in the foreground of a terminal of its own."""

    router: subprocess.Popen[bytes]
    url: str
    _keys: int

    def press(self, key: bytes) -> None:
        os.write(self._keys, key)

    def close(self) -> None:
        """As when its window is closed, or the line to it breaks."""
        if self._keys >= 0:
            os.close(self._keys)
            self._keys = -1


@contextmanager
def in_a_terminal(config: dict[str, Any], folder: Path, *prefix: str) -> Iterator[Terminal]:
    if sys.platform != "linux" or shutil.which("setsid") is None:
        pytest.skip("needs util-linux")
    (folder / "config.json").write_text(json.dumps(config))
    ours, theirs = os.openpty()
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    command = ["setsid", "--ctty", *prefix, sys.executable, str(ROOT / "run.py"), "--port", "0"]
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen([*command, "--config", "config.json"], cwd=folder, env=environ, **ends) as router:
        os.close(theirs)
        terminal = Terminal(router, "", ours)
        try:
            shown = b""
            while (found := re.search(rb"listens on (http://[\d.:]+)\s", shown)) is None:
                shown += os.read(ours, 4096)
            terminal.url = found[1].decode()
            yield terminal
        finally:
            router.kill()
            terminal.close()


def test_ctrl_c_in_a_terminal_reaches_no_engine_before_its_stream_has_ended(tiny: Path, tmp_path: Path) -> None:
    engine = fake(tmp_path, chunks="10", chunk_sec="0.1")
    config = {"system": {"llama_server_path": engine}, "models": models(tiny, "a")}
    with in_a_terminal(config, tmp_path) as terminal:
        body = {"model": "a", "messages": [], "stream": True}
        with httpx.stream("POST", f"{terminal.url}/v1/chat/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            terminal.press(b"\x03")
            rest = [line for line in lines if line]
        assert len(rest) == 10
        assert rest[-1] == "data: [DONE]"
        assert terminal.router.wait(20) == 0


def test_a_terminal_that_is_closed_takes_its_router_with_it(tiny: Path, tmp_path: Path) -> None:
    config = {"system": {"llama_server_path": fake(tmp_path)}, "models": models(tiny, "a")}
    with in_a_terminal(config, tmp_path) as terminal:
        body = {"model": "a", "messages": []}
        assert httpx.post(f"{terminal.url}/v1/chat/completions", json=body, timeout=30).status_code == 200
        (engine,) = psutil.Process(terminal.router.pid).children()
        terminal.close()
        assert terminal.router.wait(20) == 0
        assert birth(engine.pid) is None


def test_what_ignores_hang_ups_outlives_its_terminal_and_still_reloads(tiny: Path, tmp_path: Path) -> None:
    nohup = ("sh", "-c", 'trap "" HUP; exec "$@"', "nohup")
    with in_a_terminal({"models": models(tiny, "a")}, tmp_path, *nohup) as terminal:
        terminal.close()
        (tmp_path / "config.json").write_text(json.dumps({"models": models(tiny, "a", "b")}))
        terminal.router.send_signal(signal.SIGHUP)
        eventually(lambda: len(httpx.get(f"{terminal.url}/v1/models").json()["data"]) == 2)


@linux_only
def test_a_hang_up_while_it_starts_is_a_reload_as_soon_as_it_can(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    os.mkfifo(config)  # so that the start waits for us
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "run.py"), "--port", "0", "--config", str(config)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=pipe, text=True) as router:
        try:
            status = Path(f"/proc/{router.pid}/status")
            eventually(lambda: "SigBlk:\t0000000000000001\n" in status.read_text())
            router.send_signal(signal.SIGHUP)
            for aliases, heard in ((["a"], "listens on"), (["a", "b"], "configuration reloaded: added b")):
                text = json.dumps({"models": models(tiny, *aliases)})
                threading.Thread(target=config.write_text, args=[text], daemon=True).start()  # until it is read
                assert router.stderr is not None
                assert any(heard in line for line in router.stderr), router.wait(5)
        finally:
            router.kill()


def test_a_storm_of_hang_ups_is_a_few_reloads(start: Start, tiny: Path, tmp_path: Path) -> None:
    many = models(tiny, *(f"model-{number}" for number in range(100)))  # takes a while to read
    router = start({"models": many})
    for _ in range(300):
        router.process.send_signal(signal.SIGHUP)
        time.sleep(0.001)  # signals that come at once are one
    (tmp_path / "config.json").write_text(json.dumps({"models": models(tiny, "a")}))
    router.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(router.http.get("/v1/models").json()["data"]) == 1)
    assert router.stop() == 0
    assert 1 <= router.log.count("configuration reloaded") < 100
    assert "configuration reloaded: added a; removed model-0, model-1, " in router.log


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
        lines = stream.iter_lines()  # held on to, or the connection would be closed with it
        next(lines)
        engines = router.engines
        router.process.send_signal(signal.SIGTERM)
        eventually(lambda: router.http.get("/ready").status_code == 503)
        assert router.stop() == 1
    eventually(lambda: not any(birth(engine.pid) for engine in engines))


@pytest.mark.parametrize("configured", [False, True])
def test_a_container_reads_the_configuration_beside_its_models_or_an_earlier_routers(
    tmp_path: Path, configured: bool
) -> None:
    for name in ("app", "models"):
        (tmp_path / name).mkdir()
    if configured:
        (tmp_path / "app/config.json").write_text("{}")
    (router := tmp_path / "llama-router").write_text('#!/bin/sh\necho "$$ $(pwd)" "$@"\n')
    router.chmod(0o755)
    lines = dict(line.split(" ", 1) for line in (ROOT / "Dockerfile").read_text().splitlines() if " [" in line)
    entry = json.loads(lines["ENTRYPOINT"]) + json.loads(lines["CMD"])
    command = [
        word.replace("/opt/llama-router/bin/llama-router", str(router)).replace(
            "/app/config.json ] || cd /app", f"{tmp_path}/app/config.json ] || cd {tmp_path}/app"
        )
        for word in entry
    ]
    started = subprocess.Popen(command, cwd=tmp_path / "models", stdout=subprocess.PIPE, text=True)
    said, _ = started.communicate(timeout=20)
    pid, folder, *arguments = said.split()
    assert int(pid) == started.pid  # it takes the shell's place, and with it the signals
    assert folder == str(tmp_path / ("app" if configured else "models"))
    assert arguments == ["--models-dir", "/models", "--models-dir", "/app/models"]
