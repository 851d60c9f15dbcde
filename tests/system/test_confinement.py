"""The router under the restrictions of its systemd unit and of its container: it serves within both.

What is tried is what is shipped: a systemd in namespaces of its own runs `config/llama-router.service`, and the
restrictions of `config/docker-compose.yml` are laid on a process without Docker, which no test can have.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest
import yaml
from conftest import ROOT, eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")

UNIT = ROOT / "config" / "llama-router.service"
COMPOSE = ROOT / "config" / "docker-compose.yml"
SYSTEMD = Path("/lib/systemd/systemd")
APART = [
    "unshare",
    "--mount",
    "--pid",
    "--ipc",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--propagation",
    "private",
]


def chat(port: int, model: str) -> str:
    body = {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
    return answer.json()["choices"][0]["finish_reason"] if answer.status_code == 200 else answer.text


def serves(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def apart(script: str) -> Iterator[psutil.Process]:
    """A shell script as process 1 of its namespaces, and all that it starts; gone with all of it at the end."""
    if os.geteuid() or subprocess.run([*APART, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no right to make namespaces")
    with subprocess.Popen([*APART, "sh", "-euc", script], start_new_session=True) as outer:
        try:
            eventually(lambda: len(psutil.Process(outer.pid).children()) == 1)
            yield psutil.Process(outer.pid).children()[0]
        finally:
            outer.kill()


def inside(process: psutil.Process, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["nsenter", "-t", str(process.pid), "-m", "-p", *command], capture_output=True, text=True, check=False
    )


def seen_at(place: str, model: Path) -> str:
    """Commands that show an ordinary user the interpreter, the package, and a model, wherever they lie."""
    python = Path(sys.executable).resolve()
    folders = {"python": python.parent.parent, "site": Path(sysconfig.get_path("purelib")), "source": ROOT}
    mounts = "".join(
        f"mkdir -p {place}/{name}; mount --bind '{at}' {place}/{name}\n" for name, at in folders.items()
    )
    paths = f"PYTHONPATH={place}/source:{place}/site LD_LIBRARY_PATH={place}/python/lib"
    launcher = f"export {paths}; exec {place}/python/bin/{python.name}"
    return f"""
        {mounts}
        mkdir -p {place}/models; cp '{model}' {place}/models/tiny.gguf; chmod -R a+rX {place}/models
        printf '%s\\n' '#!/bin/sh' '{launcher} {place}/source/run.py "$@"' > {place}/llama-router
        chmod 755 {place}/llama-router
    """


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not there")
def test_the_unit_leaves_little_open() -> None:
    """In tenths of systemd's measure, of 100. Most of what is left are GPUs, the network and model files."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(UNIT)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout[-300:]


@pytest.mark.skipif(not SYSTEMD.exists(), reason="systemd is not there")
def test_a_systemd_that_confines_it_by_its_unit_serves_reloads_and_stops(
    tiny: Path, tmp_path: Path, free_port: int
) -> None:
    port = free_port
    unit = (
        UNIT.read_text()
        .replace("/opt/llama-router/bin/", "/run/trial/")
        .replace("/etc/llama-router/", "/run/trial/")
        .replace("[Service]", "[Service]\nStandardError=append:/run/trial/log")
    )
    assert unit != UNIT.read_text()
    (tmp_path / "llama-router.service").write_text(unit)
    (tmp_path / "go.target").write_text("[Unit]\nWants=llama-router.service\n")
    for name in ("shutdown", "basic", "sysinit", "network-online"):
        (tmp_path / f"{name}.target").write_text("[Unit]\n")
    config = {
        "api": {"port": port},
        "models": {"locked": {"model_path": "/run/trial/models/tiny.gguf", "flags": ["--mlock"]}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    boot = f"""
        mount -t tmpfs tmpfs /run; mkdir -p /run/systemd/system /run/trial; cp -r '{tmp_path}' /run/units
        {seen_at("/run/trial", tiny)}
        cp '{tmp_path}/config.yaml' /run/trial/; chmod -R a+rX /run/trial/config.yaml
        mount -t tmpfs tmpfs /var/lib
        exec env SYSTEMD_UNIT_PATH=/run/units container=trial {SYSTEMD} --system --unit=go.target --log-target=null
    """
    with apart(boot) as systemd:
        eventually(lambda: serves(port), 40)
        assert chat(port, "locked") == "length"
        router = next(each for each in systemd.children() if "run.py" in " ".join(each.cmdline()))
        assert router.uids().real != 0
        (engine,) = router.children()
        engine.send_signal(signal.SIGKILL)
        eventually(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
        assert chat(port, "locked") == "length"
        assert inside(systemd, "systemctl", "reload", "llama-router").returncode == 0
        assert chat(port, "locked") == "length"
        stopped = inside(systemd, "systemctl", "stop", "llama-router")
        assert (stopped.returncode, stopped.stderr) == (0, "")
        state = inside(systemd, "systemctl", "show", "llama-router", "-p", "Result", "-p", "NRestarts").stdout
        assert sorted(state.split()) == ["NRestarts=0", "Result=success"]


def test_a_container_without_rights_and_with_a_read_only_root_serves(tiny: Path, free_port: int) -> None:
    service = yaml.safe_load(COMPOSE.read_text())["services"]["llama-router"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    (state,) = (volume.partition(":")[2] for volume in service["volumes"] if not volume.endswith(":ro"))
    user = next(
        line.split()[1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("USER ")
    )
    port = free_port
    run = f"""
        mount -t tmpfs tmpfs /run; mkdir /run/trial
        {seen_at("/run/trial", tiny)}
        mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /var/lib; mkdir -p {state}; chown {user} {state}
        for at in $(awk '$2 !~ "^(/tmp|/proc|/dev|/sys|/var/lib)" {{print $2}}' /proc/mounts); do
            mount -o remount,bind,ro "$at" || true
        done
        ! touch /run/trial/written 2>/dev/null
        export LLAMA_ROUTER_STATE_DIR={state} HF_HOME={state}/huggingface PATH=/usr/bin:/bin
        unset HOME
        cd /run/trial/models
        exec setpriv --reuid={user} --regid={user} --clear-groups --no-new-privs --bounding-set=-all \\
            /run/trial/llama-router --models-dir . --port {port}
    """
    with apart(run) as router:
        eventually(lambda: serves(port), 40)
        assert (router.uids().real, router.uids().effective) == (int(user), int(user))
        assert chat(port, "tiny") == "length"
        router.send_signal(signal.SIGTERM)
        assert router.wait(20) in (0, None)
