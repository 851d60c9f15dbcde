"""What the machine takes away while the router runs: each loss has its own clear error, and costs nothing else."""

from __future__ import annotations

import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Router, Start, fake, models


def remove(path: Path) -> None:
    path.unlink()


def forbid(path: Path) -> None:
    path.chmod(0o644)


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


@pytest.mark.parametrize(
    ("befall", "words"),
    [
        (remove, "No such file"),
        (forbid, "Permission denied"),
        (of_another_machine, "Exec format error"),
        (a_folder, "Permission denied"),
    ],
)
def test_an_engine_binary_that_can_no_longer_be_run(
    start: Start, tiny: Path, tmp_path: Path, befall: Callable[[Path], None], words: str
) -> None:
    binary = Path(fake(tmp_path))
    system = {"llama_server_path": str(binary), "model_load_max_retries": 0}
    router = start({"system": system, "models": models(tiny, "a", "b")})
    assert router.chat("a").status_code == 200
    befall(binary)
    answer = router.chat("b")
    assert answer.status_code == 503
    assert words in answer.json()["error"]["message"]
    assert str(binary) in answer.json()["error"]["message"]
    assert_only_b_suffers(router)


def assert_only_b_suffers(router: Router) -> None:
    pid = router.status("a")["pid"]
    assert router.chat("a").status_code == 200
    assert router.status("a")["pid"] == pid
    assert len(router.engines) == 1
    assert "Traceback" not in router.log


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
    start: Start, tiny: Path, tmp_path: Path, befall: Callable[[Path], None], words: str, looked_at: bool
) -> None:
    path = Path(shutil.copy(tiny, tmp_path / "fragile.gguf"))
    config = {"system": {"model_load_max_retries": 0}, "models": {**models(tiny, "a"), **models(path, "b")}}
    router = start(config)
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
