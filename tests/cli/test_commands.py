"""The help of the program, and what wrong command lines are answered."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from conftest import ROOT

from router.__main__ import main
from router.cli.commands import _ELSEWHERE
from router.cli.main import Program


def parsers() -> dict[str, argparse.ArgumentParser]:
    return dict(Program().commands._parsers.choices)


def test_help_shows_every_command_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    first, *groups = re.split(r"\n\n(?=[A-Z][a-z ]+:\n)", printed.partition("\n\n`")[0])
    assert "usage: llama-router" in first
    shown = [line.split("  ")[1].split(", ") for group in groups for line in group.splitlines()[1:]]
    assert sorted(name for names in shown for name in names) == sorted(parsers())
    assert [group.partition(":")[0] for group in groups] == ["Run and look", "Models", "Configuration"]


@pytest.mark.parametrize("name", parsers())
def test_every_command_has_an_example_and_can_be_run(name: str) -> None:
    parser = parsers()[name]
    printed = parser.format_help()
    examples = re.findall(r"^  llama-router(?: (.+))?$", printed, re.MULTILINE)
    assert examples, printed
    for example in examples:
        words = (example or "serve").partition(" | ")[0].partition(" > ")[0].split()
        Program().parsed(words)
    run = parser.get_default("run")
    if run is not None:
        assert callable(run.function)


def test_every_command_is_in_the_documents() -> None:
    text = (ROOT / "docs/cli.md").read_text()
    assert not [name for name in parsers() if not re.search(rf"`{name}`|`{name} ", text)]


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("status", "use `llama-router ps`"),
        ("Remove", "use `llama-router rm MODEL`"),
        ("chat", "use `llama-router run MODEL`"),
        ("liste", "did you mean list"),
        ("xyzzy", "`llama-router --help` lists the commands"),
    ],
)
def test_a_wrong_command_names_the_right_one(word: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([word])
    assert f"there is no command {word!r}: {advice}" in capsys.readouterr().err


def test_what_is_advised_exists() -> None:
    program = Program()
    advised = {word for advice in _ELSEWHERE.values() for word in re.findall(r"`llama-router ([a-z]+)", advice)}
    assert advised <= set(program.commands.names)


def test_a_folder_and_a_file_are_told_from_a_wrong_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    for path, advice in ((tmp_path, "--models-dir"), (tmp_path / "config.yaml", "--config")):
        with pytest.raises(SystemExit, match="2"):
            main([str(path)])
        assert f"llama-router {advice} {path}`" in capsys.readouterr().err


def test_options_of_a_command_come_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--url", "gpu-box:8000", "ps"])
    assert "the command comes first: llama-router ps --url" in capsys.readouterr().err


def test_a_wrong_option_names_the_command_and_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, advice in (
        (["requests", "--modle", "a"], "requests: error: unrecognized: --modle; did you mean --model?"),
        (["ps", "--port", "1"], "ps: error: unrecognized: --port; name the router by --url HOST:PORT"),
        (["ps", "extra"], "ps: error: unrecognized: extra\n"),
        (["run", "qwen", "--sed", "3", "Hi"], "run: error: unrecognized: --sed; did you mean --seed?"),
        (["run"], "run: error: the following arguments are required: MODEL\n"),
        (["--prot", "1"], "serve: error: unrecognized: --prot; did you mean --port?"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert f"llama-router {advice}" in capsys.readouterr().err


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["help", "ps"])
    assert capsys.readouterr().out.startswith("usage: llama-router ps ")
    with pytest.raises(SystemExit, match="2"):
        main(["help", "status"])
    assert "there is no command 'status': use `llama-router ps`" in capsys.readouterr().err
