"""What the machine takes away while the router runs: each loss has its own clear error, and costs nothing else."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
from conftest import ROOT, Router, Start, eventually, fake, models, starting


def remove(path: Path) -> None:
    path.unlink()


def forbid(path: Path) -> None:
    path.chmod(0o644)


@pytest.fixture(scope="module")
def router_on_a_binary(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Router, Path]]:
    folder = tmp_path_factory.mktemp("binary")
    binary = fake(folder)
    system = {"llama_server_path": binary, "max_concurrent_models": 1, "model_load_max_retries": 0}
    with starting(folder) as start:
        yield start({"system": system, "models": models(tiny, "a", "b")}), Path(binary)


@pytest.fixture
def with_room_for_one(router_on_a_binary: tuple[Router, Path]) -> Iterator[tuple[Router, Path]]:
    """A router for two models, and the engine's binary, which is whole again afterwards."""
    router, binary = router_on_a_binary
    yield router, binary
    if binary.is_dir():
        binary.rmdir()
    fake(binary.parent)
    for alias in ("a", "b"):
        router.http.post(f"/v1/models/{alias}/reset")


def of_another_machine(path: Path) -> None:
    """An ELF header for IBM's S/390, and no program behind it."""
    header = b"\x7fELF\x02\x02\x01" + bytes(9)
    header += struct.pack(">HHIQQQIHHHHHH", 2, 22, 1, 0x400000, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    path.unlink()
    path.write_bytes(header + bytes(56))
    path.chmod(0o755)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without_a_library(path: Path) -> None:
    """A real program that needs a library which is not there."""
    program = Path("/usr/bin/env").read_bytes()
    assert program.count(b"\0libc.so.6\0") == 1
    path.unlink()
    path.write_bytes(program.replace(b"\0libc.so.6\0", b"\0libq.so.6\0"))
    path.chmod(0o755)


elf = pytest.mark.skipif(sys.platform != "linux", reason="an ELF program")


@pytest.mark.parametrize(
    ("befall", "words"),
    [
        (remove, "No such file"),
        (forbid, "Permission denied"),
        (a_folder, "Permission denied"),
        pytest.param(of_another_machine, "Exec format error", marks=elf),
        pytest.param(without_a_library, "error while loading shared libraries: libq.so.6", marks=elf),
    ],
)
def test_an_engine_binary_that_can_no_longer_be_run(
    with_room_for_one: tuple[Router, Path], befall: Callable[[Path], None], words: str
) -> None:
    router, binary = with_room_for_one
    assert router.chat("a").status_code == 200
    befall(binary)

    def assert_refused(alias: str) -> None:
        answer = router.chat(alias)
        assert answer.status_code == 503
        assert words in answer.json()["error"]["message"]
        assert str(binary) in answer.json()["error"]["message"]

    assert_refused("b")
    assert_only_b_suffers(router)  # the engine that still runs is not stopped for one that can't
    router.http.post("/v1/models/eject", json={"model": "a"})
    assert_refused("a")


def assert_only_b_suffers(router: Router) -> None:
    pid = router.status("a")["pid"]
    assert router.chat("a").status_code == 200
    assert router.status("a")["pid"] == pid
    assert len(router.engines) == 1
    assert "Traceback" not in router.log


@pytest.fixture(scope="module")
def router_on_a_file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Router, Path]]:
    folder = tmp_path_factory.mktemp("file")
    path = Path(shutil.copy(tiny, folder / "fragile.gguf"))
    entries = {**models(tiny, "a"), **models(path, "b")}
    with starting(folder) as start:
        yield start({"system": {"model_load_max_retries": 0}, "models": entries}), path


@pytest.fixture
def with_a_file(router_on_a_file: tuple[Router, Path], tiny: Path) -> Iterator[tuple[Router, Path]]:
    """A router and the file of its model `b`, which is whole again afterwards."""
    router, path = router_on_a_file
    yield router, path
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    shutil.copy(tiny, path)
    router.http.post("/v1/models/b/reset")


def cut(path: Path) -> None:
    os.truncate(path, 1000)


def scramble(path: Path) -> None:
    path.write_bytes(b"GGUF" + b"\xff" * 5000)


@pytest.mark.parametrize(
    ("befall", "words"),
    [
        (remove, "No such file"),
        (a_folder, "not a regular file"),
        (cut, ""),
        (scramble, ""),
        pytest.param(
            lambda path: path.chmod(0),
            "Permission denied",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything"),
        ),
    ],
    ids=["removed", "a folder", "cut off", "scrambled", "unreadable"],
)
@pytest.mark.parametrize("looked_at", [False, True], ids=["never looked at", "looked at before"])
def test_a_model_file_that_is_no_longer_good(
    with_a_file: tuple[Router, Path], befall: Callable[[Path], None], words: str, looked_at: bool
) -> None:
    router, path = with_a_file
    assert router.chat("a").status_code == 200
    if looked_at:
        assert router.chat("b").status_code == 200
        router.http.post("/v1/models/eject", json={"model": "b"})
    befall(path)
    answer = router.chat("b")
    assert answer.status_code == 503
    assert words in answer.json()["error"]["message"]
    assert "fragile.gguf" in answer.json()["error"]["message"]
    assert_only_b_suffers(router)
    assert router.http.get("/v1/models").status_code == 200


def test_the_last_port_is_taken(start: Start, tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 65535))
        taken.listen()
        system = {"base_port": 65534, "model_load_max_retries": 0}
        router = start({"system": system, "models": models(tiny, "a", "b")})
        assert router.chat("a").status_code == 200
        answer = router.chat("b")
        assert answer.status_code == 503
        assert "no port is free from 65534 on" in answer.json()["error"]["message"]
        assert_only_b_suffers(router)


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit")
def test_a_full_disk_costs_the_files_only(start: Start, tiny: Path, tmp_path: Path) -> None:
    state, logs = tmp_path / "state", tmp_path / "logs"
    system = {"llama_server_path": fake(tmp_path), "log_dir": str(logs)}
    router = start({"system": system, "models": models(tiny, "a", "b")}, LLAMA_ROUTER_STATE_DIR=str(state))
    assert router.chat("a").status_code == 200
    before = eventually_recorded(state, 1)
    unlimited = resource.prlimit(router.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(router.process.pid, resource.RLIMIT_FSIZE, (0, unlimited[1]))  # files can't grow any more
    assert router.chat("b").status_code == 200
    router.http.post("/v1/models/eject", json={"model": "a"})
    assert router.chat("a").status_code == 200
    for words in ("engines.json cannot be written: File too large. Without it, an engine", "a.log cannot be"):
        eventually(lambda words=words: words in router.log)  # type: ignore[misc]
    assert (state / "engines.json").read_bytes() == before  # the old content, not half of the new
    resource.prlimit(router.process.pid, resource.RLIMIT_FSIZE, unlimited)
    router.http.post("/v1/models/eject", json={"model": "b"})
    eventually_recorded(state, 1)
    assert router.log.count("engines.json cannot be written") == 1
    assert router.log.count("a.log cannot be written: File too large") == 1
    assert router.stop() == 0
    assert "Traceback" not in router.log


def eventually_recorded(state: Path, engines: int) -> bytes:
    def recorded() -> bool:
        path = state / "engines.json"
        return path.exists() and len(json.loads(path.read_text())["engines"]) == engines

    eventually(recorded)
    return (state / "engines.json").read_bytes()


def test_too_few_open_files_are_told_at_the_start(tmp_path: Path) -> None:
    script = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (700, 700)); "
    script += "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", script, str(ROOT / "run.py"), "--port", "0"]
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True) as router:
        assert router.stderr is not None
        said = ""
        for line in router.stderr:
            said += line
            if "listens on" in said and "only 188 client connections are possible" in said:
                break
        assert "limit of open files is 700" in said
        router.terminate()
        router.stderr.read()
        assert router.wait(20) == 0


@pytest.fixture
def confine() -> Iterator[Callable[[int, int], None]]:
    """`confine(pid, bytes)`: a process in a cgroup whose members may not take more together."""
    mount = Path("/sys/fs/cgroup")
    group = next(iter(mount.glob("memory")), mount) / f"llama-router-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no right to make a cgroup: {error}")
    limits = [group / name for name in ("memory.max", "memory.limit_in_bytes")]
    limit = next((path for path in limits if path.exists()), None)
    members = group / "cgroup.procs"

    def confine(pid: int, most: int) -> None:
        assert limit is not None
        limit.write_text(str(most))
        members.write_text(str(pid))

    if limit is not None:
        yield confine
        for pid in members.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        eventually(lambda: not members.read_text())
    group.rmdir()
    if limit is None:
        pytest.skip("cgroups have no limit of memory here")


def test_an_engine_that_the_kernel_kills_for_want_of_memory(
    start: Start, tiny: Path, tmp_path: Path, confine: Callable[[int, int], None]
) -> None:
    system = {"llama_server_path": fake(tmp_path, die="memory"), "max_request_retries": 0}
    router = start({"system": system, "models": models(tiny, "a")})
    router.http.post("/v1/models/load", json={"model": "a"})
    for pid in (router.process.pid, router.status("a")["pid"]):
        confine(pid, 256 << 20)
    assert router.chat("a").status_code == 503
    router.until("a", "off")
    words = "killed by the kernel: out of memory"
    health = router.http.get("/v1/health/models").json()["models"]["a"]
    assert health["last_error"].startswith(f"'a' crashed: {words}")
    assert health["last_exit"]["reason"].startswith(words)
    assert (health["last_exit"]["signal"], health["last_exit"]["out_of_memory"]) == ("SIGKILL", True)


FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime")
def test_a_clock_that_is_set_changes_nothing(start: Start, tiny: Path, tmp_path: Path) -> None:
    """Under libfaketime 0.9.10 `time.sleep` raises EINVAL, which no clock that is really set makes it do."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    system = {"llama_server_path": fake(tmp_path), "idle_timeout_sec": 60, "keep_warm_models": 0}
    environ = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    router = start({"system": system, "models": models(tiny, "a")}, **environ, FAKETIME_DONT_FAKE_MONOTONIC="1")
    assert router.chat("a").status_code == 200
    pid = router.status("a")["pid"]
    for jump in ("+8h", "-8h"):
        clock.write_text(jump)
        shown = datetime.fromisoformat(router.status("a")["updated_at"])
        assert 7 < abs((shown - datetime.now(timezone.utc)).total_seconds()) / 3600 < 9  # it sees the new time
        assert router.chat("a").status_code == 200
        assert router.status("a")["pid"] == pid
    body = {"model": "a", "messages": [], "stream": True}
    with router.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        clock.write_text("+900h")
        assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
    assert router.status("a")["pid"] == pid
    assert router.stop() == 0, router.log
