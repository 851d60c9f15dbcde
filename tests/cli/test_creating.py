"""`llama-router create` and `cp`, against one router."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import Router, Start, models, run
from tiny_models import write_llama

Ask = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    return start_shared({"models": models(tiny, "tiny")})


@pytest.fixture
def ask(router: Router, tmp_path: Path) -> Iterator[Ask]:
    """What it creates is gone after the test."""
    yield lambda *arguments: run(*arguments, cwd=tmp_path, LLAMA_ROUTER_URL=router.url)
    for card in router.http.get("/v1/models").json()["data"]:
        if card["source"] == "created":
            router.http.delete(f"/v1/models/pulled/{card['id']}")


def test_a_model_is_made_from_a_file_and_again_from_what_is_shown_of_it(
    router: Router, ask: Ask, tmp_path: Path
) -> None:
    write_llama(tmp_path / "other.gguf", seed=7)
    text = 'FROM ./other.gguf\nSYSTEM Be kind.\nPARAMETER num_ctx 512\nPARAMETER stop """say "x\nnow"""\n'
    (tmp_path / "Modelfile").write_text(text)
    made = ask("create", "kind")
    assert (made.returncode, made.stdout) == (0, "kind was created\n"), made.stderr
    assert router.chat("kind").status_code == 200
    shown = ask("show", "kind", "--modelfile").stdout
    assert 'PARAMETER stop """say "x\nnow"""' in shown
    (tmp_path / "again").write_text(shown)
    assert json.loads(ask("create", "kinder", "-f", "again", "--json").stdout) == {
        "status": "success",
        "model": "kinder",
    }
    assert ask("cp", "kinder", "kindest").stdout == "kindest was made from kinder\n"
    parts = [
        [ask("show", name, f"--{part}").stdout for part in ("system", "parameters")]
        for name in ("kind", "kinder", "kindest")
    ]
    assert parts[0] == parts[1] == parts[2]
    assert ask("rm", "kindest").stdout == "kindest was removed, 0 B freed\n"


@pytest.mark.parametrize(
    ("text", "code", "problem"),
    [
        ("FROM ./missing.gguf\n", 2, "wrong: line 1: there is no file"),
        ("FROM tiny\nFROM other\n", 2, "line 2: of several FROM, each must name a file"),
        ("FROM .\n", 2, "is a folder: name the GGUF file in it"),
        ("FROM tinny\n", 1, "Did you mean 'tiny'?"),
        ("FROM tiny\nADAPTER ./a.gguf\n", 1, "--lora FILE"),
        ("FROM tiny\nTEMPLATE {{ .Prompt }}\n", 1, "is a template in Go"),
        ("FROM tiny\nPARAMETER warp 9\n", 1, "no equivalent of the parameter 'warp'"),
    ],
)
def test_what_cannot_be_made_is_explained(ask: Ask, tmp_path: Path, text: str, code: int, problem: str) -> None:
    (tmp_path / "wrong").write_text(text)
    refused = ask("create", "x", "-f", "wrong")
    assert (refused.returncode, refused.stdout) == (code, "")
    assert problem in refused.stderr


def test_a_name_that_is_taken_is_not_replaced(ask: Ask) -> None:
    refused = ask("cp", "tiny", "tiny")
    assert refused.returncode == 1
    assert "is taken by a model of this name" in refused.stderr
    missing = ask("create", "x")
    assert (missing.returncode, missing.stderr) == (
        2,
        "llama-router: Modelfile: No such file or directory (-f names another file)\n",
    )
