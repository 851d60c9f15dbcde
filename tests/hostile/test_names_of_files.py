"""Hostile file names: at a terminal, in a shell, and on an engine's command line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import Start, eventually, run


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """Of files whose names try something."""
    folder = tmp_path / "mo\x1b[2Jdels"
    folder.mkdir()
    for name in ("it's $(touch owned).gguf", "--help.gguf", "-x.gguf", 'a"b.gguf', "$(touch${IFS}owned)'.gguf"):
        shutil.copy(tiny, folder / name)
    for name in ("\x1b[31mred.gguf", "a\nWARNING all is well.gguf", "\u202egpj.gguf", "\x9b2J.gguf"):
        shutil.copy(tiny, folder / name)
    return folder


SERVED = ["$(touch${IFS}owned)'", "--help", "-x", "a-WARNING-all-is-well", 'a"b', "it's-$(touch-owned)"]


def test_names_of_files_print_nothing_but_themselves(start: Start, folder: Path, tmp_path: Path) -> None:
    arguments = ["--models-dir", str(folder)]
    router = start(arguments=arguments)
    reloaded = router.http.post("/v1/config/reload")
    checked = run("check", *arguments, cwd=tmp_path)
    broken = run("check", "--models-dir", str(folder / "no\x1b[2Jne"), cwd=tmp_path)
    assert (reloaded.status_code, checked.returncode, broken.returncode) == (200, 0, 2)
    assert [model["id"] for model in router.http.get("/v1/models").json()["data"]] == SERVED
    for text in (router.log, checked.stdout, checked.stderr, broken.stderr):
        unprintable = {character for character in text if not character.isprintable()} - {"\n"}
        assert unprintable == set(), text
        assert not any(line.startswith("WARNING all is well") for line in text.splitlines())
    assert checked.stderr.count("is not a valid name") == 3
    missing = run("estimate", str(folder / "no\x1b[2Jne.gguf"), cwd=tmp_path)
    assert (missing.returncode, "\x1b" in missing.stderr) == (1, False)


def test_the_line_to_paste_says_what_it_shows_to_every_shell(start: Start, folder: Path, tmp_path: Path) -> None:
    router = start(arguments=["--models-dir", str(folder)])
    eventually(lambda: router.output[-1].startswith("  curl "))
    line = router.output[-1].strip()
    curl, url, option, document = shlex.split(line)
    assert (curl, option, json.loads(document)["model"]) == ("curl", "-d", SERVED[0])
    assert router.http.post(url, json={**json.loads(document), "max_tokens": 1}).status_code == 200
    os.system(f"cd {shlex.quote(str(tmp_path))} && {line.replace('curl', 'echo', 1)} > said")
    assert not (tmp_path / "owned").exists()
    assert (tmp_path / "said").read_text() == f"{url} -d {document}\n"


def test_models_that_are_called_like_flags_are_models(start: Start, folder: Path, tmp_path: Path) -> None:
    router = start(arguments=["--models-dir", str(folder)])
    for name in SERVED:
        assert router.chat(name).status_code == 200, name
    said = run("logs", "--url", router.url, "--", "--help", cwd=tmp_path)
    assert (said.returncode, "usage" in said.stdout) == (0, False), said.stderr
    for command, told in (("rm", "no model was pulled as '-x'"), ("pull", "'-x' is not a repository")):
        failed = run(command, "--", "-x", cwd=tmp_path)
        assert failed.returncode == 1
        assert told in failed.stderr
