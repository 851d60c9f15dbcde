"""Completion in the shells themselves, as far as they are installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Router, Start, models, run
from terminal import Terminal

SHELLS = {
    "bash": (["bash", "--norc", "-i"], "PS1='> '; source <(llama-router completion bash)"),
    "zsh": (
        ["zsh", "-f", "-i"],
        "PS1='> '; autoload -U compinit; compinit -u; source <(llama-router completion zsh)",
    ),
    "fish": (
        ["fish", "--no-config", "-i"],
        "function fish_prompt; echo '> '; end; llama-router completion fish | source",
    ),
}


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    return start_shared({"models": models(tiny, "plain", "org/model-7:Q4_K_M", "org/model-8:Q4_K_M")})


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, router: Router, tmp_path: Path) -> Iterator[Terminal]:
    """A shell in which completion is set up as the documentation says."""
    command, prepare = SHELLS[request.param]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    program = tmp_path / "bin" / "llama-router"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "run.py"} "$@"\n')
    program.chmod(0o755)
    (tmp_path / "conversation.json").touch()
    terminal = Terminal(command, tmp_path, 120, 40)
    terminal.type(f"export PATH={program.parent}:/usr/bin:/bin LLAMA_ROUTER_URL={router.url}; clear\r".encode())
    terminal.type(f"{prepare}; echo pre''pared\r".encode())
    terminal.until("^prepared|\nprepared")
    yield terminal
    terminal.close()


def test_commands_options_models_and_files_are_completed(shell: Terminal) -> None:
    for steps in (
        [("llama-router compl", "llama-router completion")],
        [
            ("llama-router run pl", "llama-router run plain"),
            ("--prio", ".*plain --priority"),
            ("lo", ".*--priority low"),
        ],
        [("llama-router logs -f org/model-7", r"llama-router logs -f org/model-7\\?:Q4_K_M")],
        [("llama-router run org", r"llama-router run org/model-(\n.*model-8.*)?")],  # fish shows both at once
        [("llama-router --models", "llama-router --models-dir")],
        [("llama-router requests can", "llama-router requests cancel")],
        [("llama-router check --config conv", "llama-router check --config conversation.json")],
    ):
        for typed, completed in steps:
            shell.type(f"{typed}\t".encode())
            shell.until(rf"> {completed}\s*\Z")
        shell.type(b"\x15")  # Ctrl-U
        shell.until(r">\s*\Z")


def candidates(line: str, cwd: Path, **environ: str) -> tuple[list[str], float]:
    """What a shell gets for a line, and after how long."""
    reading, writing = os.pipe()
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": str(ROOT), **asked, **environ}
    since = time.monotonic()
    command = f"exec {sys.executable} {ROOT / 'run.py'} 8>&{writing} 9>/dev/null"
    done = subprocess.run(["bash", "-c", command], env=clean, cwd=cwd, pass_fds=[writing], capture_output=True)
    took_sec = time.monotonic() - since
    os.close(writing)
    with os.fdopen(reading) as answer:
        found = answer.read().split("\n")
    assert done.stdout + done.stderr == b""
    return [each.strip() for each in found if each], took_sec


def test_a_router_that_is_not_there_or_silent_is_no_news(tmp_path: Path, free_port: int) -> None:
    assert candidates("llama-router run ", tmp_path, LLAMA_ROUTER_URL=f"127.0.0.1:{free_port}")[0] == []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        found, took_sec = candidates("llama-router run ", tmp_path, LLAMA_ROUTER_URL=address)
    assert found == []
    assert took_sec < 5
    (tmp_path / "config.json").write_text("{nonsense")
    assert candidates("llama-router run ", tmp_path)[0] == []


def test_another_shell_is_a_wrong_command_line(tmp_path: Path) -> None:
    asked = run("completion", "csh", cwd=tmp_path)
    assert asked.returncode == 2
    assert "bash" in asked.stderr
