"""Commands about models, against one router: a small and a broken model, and a further name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, models, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cwd")


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    entries = {
        **models(tiny, "org/Gemma-3-4B:Q4", "qwen"),
        **models(tiny, "broken", flags=["-c", "1024", "--no-such-flag", "1"]),
    }
    coder = {"uses": "qwen", "defaults": {"temperature": 0.5}, "system_prompt": "You write Python."}
    return start_shared({"models": entries, "aliases": {"coder": coder}})


class Asked:
    def __init__(self, router: Router, folder: Path, *arguments: str) -> None:
        ended = run(*arguments, cwd=folder, LLAMA_ROUTER_URL=router.url.removeprefix("http://"))
        self.code, self.out, self.err = ended.returncode, ended.stdout, ended.stderr

    @property
    def document(self) -> Any:
        return json.loads(self.out)


def test_a_list_shows_size_context_and_source_and_is_filtered_by_words(router: Router, folder: Path) -> None:
    listed = Asked(router, folder, "list")
    assert listed.code == 0
    head, *lines = listed.out.splitlines()
    assert head.split() == ["MODEL", "STATE", "SIZE", "QUANT", "CONTEXT", "SOURCE"]
    assert [line.split()[0] for line in lines] == ["org/Gemma-3-4B:Q4", "qwen", "broken", "coder"]
    assert lines[0].split()[2:5] == ["239.4kB", "F16", "1024"]
    assert lines[3].endswith("another name of qwen")
    assert [line.split()[0] for line in Asked(router, folder, "ls", "gemma", "4b").out.splitlines()] == [
        "MODEL",
        "org/Gemma-3-4B:Q4",
    ]
    assert [card["id"] for card in Asked(router, folder, "list", "--json", "4b").document["data"]] == [
        "org/Gemma-3-4B:Q4"
    ]
    none = Asked(router, folder, "list", "llama-70b")
    assert (none.code, none.out, none.err) == (0, "", "None of 4 models has 'llama-70b'.\n")


def test_a_model_is_loaded_shown_and_unloaded(router: Router, folder: Path) -> None:
    Asked(router, folder, "unload", "qwen")
    before = Asked(router, folder, "show", "coder").out
    assert "Memory, once it is loaded\n  estimated  20MiB on host (formulas)\n" in before
    loaded = Asked(router, folder, "load", "coder", "--keep", "1h30m")
    ready, pinned = loaded.out.splitlines()
    assert (loaded.code, ready.partition(",")[0]) == (0, "qwen is ready")
    assert pinned.startswith("qwen is pinned until 2")
    shown = Asked(router, folder, "show", "coder")
    assert shown.code == 0
    facts = {line.strip().partition("  ")[0]: line.strip().partition("  ")[2] for line in shown.out.splitlines()}
    assert facts["another name of"].strip() == "qwen"
    assert facts["state"].strip() == "ready"
    assert facts["temperature"].strip() == "0.5"
    assert "on host (formulas)" in facts["estimated"]
    assert facts["engines"].strip().startswith("qwen#")
    assert facts["pinned"].strip().startswith("until 2")
    assert facts["command line"].strip().endswith(f"--port {router.status('qwen')['port']}")
    assert "You write Python." in shown.out
    assert Asked(router, folder, "load", "coder", "--keep", "0", "--json").document["pinned_until"] is None
    wrong = Asked(router, folder, "load", "coder", "--keep", "soon")
    assert (wrong.code, "'soon' is not a duration such as 90s, 30m or 1h30m" in wrong.err) == (2, True)
    document = Asked(router, folder, "show", "--json", "coder").document
    assert (document["model"]["uses"], document["status"]["status"]) == ("qwen", "ready")
    assert document["show"]["system"] == "You write Python."
    unloaded = Asked(router, folder, "stop", "coder")
    assert (unloaded.code, unloaded.out) == (0, "qwen was unloaded\n")
    again = Asked(router, folder, "unload", "qwen")
    assert (again.code, again.out) == (0, "qwen is not loaded\n")


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("template", "{% for message in messages %}"),
        ("system", "You write Python.\n"),
        ("parameters", "num_ctx  "),
        ("modelfile", "# Served by llama-router.\nFROM qwen\n"),
        ("license", "\n"),
    ],
)
def test_one_part_of_a_model_is_printed_alone(router: Router, folder: Path, part: str, text: str) -> None:
    assert Asked(router, folder, "show", "coder", f"--{part}").out.startswith(text)


def test_all_models_are_unloaded_at_once(router: Router, folder: Path) -> None:
    assert Asked(router, folder, "load", "qwen", "--json").document["status"] == "success"
    waits = Asked(router, folder, "load", "org/Gemma-3-4B:Q4", "--no-wait")
    assert (waits.code, waits.out.partition(" is ")[0]) == (0, "org/Gemma-3-4B:Q4")
    assert Asked(router, folder, "unload", "--all").out == "org/Gemma-3-4B:Q4 was unloaded\nqwen was unloaded\n"
    assert Asked(router, folder, "unload", "--all").out == "nothing is loaded\n"
    assert Asked(router, folder, "unload", "--all", "--json").document == []


def test_why_a_model_failed_is_said_until_it_is_reset(router: Router, folder: Path) -> None:
    failed = Asked(router, folder, "load", "broken")
    assert (failed.code, failed.out) == (1, "")
    assert "--no-such-flag" in failed.err
    assert "--no-such-flag" in Asked(router, folder, "ps").out
    shown = Asked(router, folder, "show", "broken").out
    assert "failed because" in shown
    assert "or at once after `llama-router reset`" in shown
    assert Asked(router, folder, "reset", "--all").out == "broken may be loaded again\n"
    assert Asked(router, folder, "reset", "--all").out == "no model has failed\n"
    assert Asked(router, folder, "reset", "broken", "--json").document["previous_error"] is None


@pytest.mark.parametrize("command", ["show", "load", "unload", "reset", "logs"])
def test_an_unknown_model_is_answered_with_close_ones(router: Router, folder: Path, command: str) -> None:
    asked = Asked(router, folder, command, "qwne")
    assert (asked.code, asked.out) == (1, "")
    assert "Did you mean 'qwen'?" in asked.err


def test_a_reload_says_what_has_changed_or_what_is_wrong(start: Start, tiny: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"models": models(tiny, "a", "b")}
    router = start(config)
    assert Asked(router, tmp_path, "reload").out == "nothing has changed\n"
    config = {"models": models(tiny, "a", "c"), "api": {"max_connections": 7}, "system": {"keep_warm_models": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    changed = Asked(router, tmp_path, "reload", "--json").document
    assert (changed["added"], changed["removed"]) == (["c"], ["b"])
    assert (changed["settings"], changed["needs_restart"]) == (
        ["system.keep_warm_models"],
        ["api.max_connections"],
    )
    assert Asked(router, tmp_path, "reload").out == "takes a restart: api.max_connections\n"
    (tmp_path / "config.json").write_text('{"modles": {}}')
    wrong = Asked(router, tmp_path, "reload")
    assert (wrong.code, wrong.out) == (2, "")
    assert "Nothing was changed" in wrong.err
    assert "modles" in wrong.err
    document = run("check", "--json", "--config", str(tmp_path / "config.json"), cwd=tmp_path)
    assert document.returncode == 2
    assert json.loads(document.stdout)["problems"][0]["path"] == "modles"


def test_a_check_is_printed_as_one_document(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"models": models(tiny, "a")}))
    document = json.loads(run("check", "--json", cwd=tmp_path).stdout)
    assert document["valid"] is True
    assert document["values"]["models.a.model_path"] == {"value": str(tiny), "origin": "config.json"}
    assert document["engines"]["llamacpp"]["program"] == "embedded"
