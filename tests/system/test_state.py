"""Persistent state: saved, locked, and optional."""

from __future__ import annotations

import logging
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Start, eventually, models

from router.system.state import State, StateHeld, default_path


def test_what_is_written_is_read_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "some" / "where"
    state = State.open(path, 8000)
    file = state.file("footprints", dict[str, int], "it would be forgotten.")
    assert file.read() is None
    file.write({"a": 1})
    file.write({"a": 2})
    state.close()
    again = State.open(path, 8000)
    assert again.file("footprints", dict[str, int], "").read() == {"a": 2}
    again.close()
    assert sorted(each.name for each in path.iterdir()) == ["footprints.json", "lock"]


def test_nobody_else_can_look_into_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        state = State.open(tmp_path / "state", 8000)
        state.file("engines", list[int], "").write([1])
        state.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in (tmp_path / "state").iterdir()} == {0o600}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"a": "no number"}', b"[1, 2]"])
def test_what_cannot_be_read_is_set_aside_and_told_once(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    state = State.open(tmp_path, 8000)
    (tmp_path / "footprints.json").write_bytes(content)
    file = state.file("footprints", dict[str, int], "")
    assert file.read() is None
    assert file.read() is None
    assert (tmp_path / "footprints.json.broken").read_bytes() == content
    assert [record.getMessage().count("cannot be read") for record in caplog.records] == [1]
    file.write({"a": 3})
    assert file.read() == {"a": 3}
    state.close()


def test_a_full_disk_keeps_the_old_content_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    state = State.open(tmp_path, 8000)
    file = state.file("footprints", dict[str, str], "they are measured again.")
    file.write({"a": "small"})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))  # Python ignores SIGXFSZ and gets EFBIG
    try:
        file.write({"a": "x" * 100})
        file.write({"a": "x" * 200})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read() == {"a": "small"}
    file.write({"a": "y" * 100})
    assert file.read() == {"a": "y" * 100}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "File too large. Without it, they are measured again." in said[0]
    assert "can be written again" in said[1]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["footprints.json", "lock"]
    state.close()


def test_without_a_directory_nothing_is_remembered(tmp_path: Path) -> None:
    state = State()
    file = state.file("footprints", dict[str, int], "")
    file.write({"a": 1})
    assert file.read() is None
    state.close()


def test_a_lock_ends_with_its_holder_however_it_ends(tmp_path: Path) -> None:
    hold = "from pathlib import Path; from router.system.state import State; state = State.open(Path('.'), 4711)"
    command = [sys.executable, "-c", f"{hold}; print(flush=True); input()"]
    environ = {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(StateHeld, match=rf"the llama-router with pid {holder.pid}, .* port 4711 since 20"):
            State.open(tmp_path, 8000)
        holder.kill()
    State.open(tmp_path, 8000).close()
    assert State.holder(tmp_path) is None


def test_it_is_where_programs_keep_such_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.system.state._HOME_FOLDERS", (".local", "state"))
    home = {"HOME": "/home/ann"}
    assert default_path(8000, home) == Path("/home/ann/.local/state/llama-router/8000")
    assert default_path(8000, home | {"XDG_STATE_HOME": "/var/x"}) == Path("/var/x/llama-router/8000")
    assert default_path(8000, home | {"XDG_STATE_HOME": "x"}) == default_path(8000, home)
    assert default_path(8000, {}) is None


# --- a router that starts ---------------------------------------------------------------------------------------


def test_a_second_router_on_the_directory_says_who_holds_it(start: Start, tmp_path: Path) -> None:
    router = start(LLAMA_ROUTER_STATE_DIR=str(tmp_path / "mine"))
    with pytest.raises(AssertionError) as refused:
        start(LLAMA_ROUTER_STATE_DIR=str(tmp_path / "mine"))
    port = router.url.rpartition(":")[2]
    said = str(refused.value)
    assert f"{tmp_path / 'mine'} is held by the llama-router with pid {router.process.pid}" in said
    assert f"listens on port {port} since 20" in said
    assert "state_dir" in said
    assert router.chat("demo").status_code == 200


def test_a_second_router_on_the_port_says_who_holds_it(start: Start) -> None:
    router = start()
    port = router.url.rpartition(":")[2]
    with pytest.raises(AssertionError) as refused:
        start(arguments=["--port", port])
    assert f"Port {port} on 127.0.0.1 is in use" in str(refused.value)
    assert f"with pid {router.process.pid}" in str(refused.value)
    assert router.chat("demo").status_code == 200


def a_file_in_the_way(folder: Path) -> str:
    (folder / "home").write_text("not a folder")
    return str(folder / "home")


def test_a_home_that_takes_nothing_costs_only_the_memory(start: Start, tmp_path: Path, free_port: int) -> None:
    """A file where the home should be: permissions would not keep root out."""
    environ = {"HOME": a_file_in_the_way(tmp_path), "LLAMA_ROUTER_STATE_DIR": ""}
    router = start(arguments=["--port", str(free_port)], **environ)
    assert router.chat("demo").status_code == 200
    warnings = [line for line in router.output if "Measurements will not be saved" in line]
    assert len(warnings) == 1
    assert "Not a directory" in warnings[0]
    assert router.stop() == 0


def test_no_home_at_all_either(start: Start, free_port: int) -> None:
    router = start(arguments=["--port", str(free_port)], HOME="", LLAMA_ROUTER_STATE_DIR="")
    assert router.chat("demo").status_code == 200
    eventually(lambda: "HOME is not set" in router.log)


def test_a_directory_that_was_asked_for_must_be_there(start: Start, tiny: Path, tmp_path: Path) -> None:
    wanted = a_file_in_the_way(tmp_path) + "/state"
    with pytest.raises(AssertionError, match=f"system.state_dir: {wanted} cannot be used: Not a directory"):
        start({"system": {"state_dir": wanted}, "models": models(tiny, "a")}, LLAMA_ROUTER_STATE_DIR="")


def test_a_router_on_any_port_keeps_nothing(start: Start, tmp_path: Path) -> None:
    router = start(HOME=str(tmp_path / "home"), LLAMA_ROUTER_STATE_DIR="")
    eventually(lambda: "Try:" in router.log)
    assert not (tmp_path / "home").exists()
