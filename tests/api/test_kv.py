"""What is kept on disk of conversations: seen by metrics, pages, commands and the log, and deleted."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, chromium, eventually, models, run, starting

LONG = "A long conversation goes on and on. " * 30
FLAGS = ["-c", "4096", "-t", "1"]
OPERATOR, ANNA = "operators-key", "annas-key"
AS_ANNA = {"Authorization": f"Bearer {ANNA}"}


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Router]:
    """Two models with room for one, so that each request for the other is a swap; `twin` has the file of `a`."""
    other = tmp_path_factory.mktemp("models") / "other.gguf"
    shutil.copy(tiny, other)
    keys = {"api_keys": [OPERATOR], "clients": {"anna": {"key": ANNA}}}
    config = {
        "api": keys,
        "system": {"max_concurrent_models": 1, "structured_logs": True},
        "kv_store": {"min_tokens": 64},
        "models": {
            **models(tiny, "a", "twin", flags=FLAGS),
            **models(other, "b", flags=["-c", "2048", "-np", "2"]),
        },
        "aliases": {"gpt": "a"},
    }
    with starting(tmp_path_factory.mktemp("router")) as start:
        router = start(config)
        router.http.headers["authorization"] = f"Bearer {OPERATOR}"
        yield router


@pytest.fixture
def saved(router: Router) -> Router:
    """A router whose model `a` has one conversation of Anna on disk, restored once, and no engine."""
    router.unload()
    router.http.delete("/v1/kv")
    for source in ("none", "disk"):
        answer = router.chat("a", content=LONG, headers=AS_ANNA)
        assert (answer.status_code, answer.headers["x-kv"]) == (200, source)
        router.unload()
    return router


def listed(router: Router) -> Any:
    return router.http.get("/v1/kv").json()


def files(document: dict[str, Any]) -> list[Path]:
    return list(Path(document["folder"]).glob("*.kv"))


def metrics(router: Router, prefix: str) -> dict[str, float]:
    lines = re.findall(rf'^{prefix}(\w+)(?:{{model="a"}})? (\S+)$', router.http.get("/metrics").text, re.M)
    return {name: float(value) for name, value in lines}


def test_what_is_saved_is_listed_counted_and_logged(saved: Router, tmp_path: Path) -> None:
    before = metrics(saved, "router_kv_")
    assert saved.chat("a", content=LONG, headers=AS_ANNA).headers["x-kv"] == "disk"
    after = metrics(saved, "router_kv_")

    document = listed(saved)
    (state,) = files(document)
    of_a = document["models"]["a"]
    (conversation,) = of_a["conversations"]
    assert conversation["client"] == "anna"
    assert conversation["uses"] >= 2
    assert conversation["bytes"] == of_a["bytes"] == document["total"]["bytes"] == state.stat().st_size
    assert conversation["tokens"] == document["total"]["tokens"] > 1000
    assert 0 <= conversation["age_sec"] < 60
    assert document["limits"] == {"bytes": 10_000_000_000, "age_sec": 72 * 3600, "min_tokens": 64}
    assert (document["enabled"], document["shared"], document["distrusted"]) == (True, False, [])
    without = saved.http.get("/v1/kv?conversations=false").json()
    assert without["models"]["a"]["count"] == 1
    assert "conversations" not in without["models"]["a"]
    assert saved.http.get("/status").json()["kv_store"] == {"enabled": True, "total": document["total"]}

    grown = {name: after[name] - before[name] for name in after if name.endswith("_total")}
    assert (grown["restores_total"], grown["failures_total"]) == (1, 0)
    assert grown["restored_tokens_total"] > 1000
    assert grown["prefill_saved_seconds_total"] > 0
    assert of_a["since_start"]["restores"] == after["restores_total"]
    assert (after["saved_bytes"], after["saved_conversations"]) == (conversation["bytes"], 1)
    assert metrics(saved, "router_model_kv_") == {"saved_bytes": conversation["bytes"], "saved_conversations": 1}

    eventually(lambda: saved.log.count('"kv":"disk"') == saved.log.count('"kv":"none"') + 1)
    assert "A long conversation" not in saved.log

    told = run("kv", "--url", saved.url, cwd=tmp_path, LLAMA_ROUTER_API_KEY=OPERATOR)
    head, row, last = told.stdout.splitlines()
    assert head.split() == ["MODEL", "TOKENS", "SIZE", "AGE", "USES", "CLIENT"]
    assert row.split()[:2] == ["a", str(conversation["tokens"])]
    assert row.split()[-1] == "anna"
    assert re.fullmatch(r"1 conversation, .+ kB of at most 10\.0 GB, for at most 3d00h, in /.*/kv", last)
    printed = run("kv", "--json", "--url", saved.url, cwd=tmp_path, LLAMA_ROUTER_API_KEY=OPERATOR).stdout
    assert json.loads(printed)["models"].keys() == document["models"].keys()


def test_a_client_sees_nothing_of_it(saved: Router, tmp_path: Path) -> None:
    for method in ("GET", "DELETE"):
        answer = saved.http.request(method, "/v1/kv", headers=AS_ANNA)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")
    assert "kv_store" not in saved.http.get("/status", headers=AS_ANNA).json()
    told = run("kv", "clear", "--url", saved.url, cwd=tmp_path, LLAMA_ROUTER_API_KEY=ANNA)
    assert told.returncode == 1
    assert "LLAMA_ROUTER_API_KEY" in told.stderr
    assert listed(saved)["total"]["count"] == 1


def test_conversations_are_deleted_by_model_or_all(saved: Router, tmp_path: Path) -> None:
    def clear(*arguments: str) -> Any:
        return run("kv", "clear", *arguments, "--url", saved.url, cwd=tmp_path, LLAMA_ROUTER_API_KEY=OPERATOR)

    unknown = saved.http.delete("/v1/kv?model=nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert clear("nobody").stderr == "llama-router: model 'nobody' not found, and nothing is saved of it.\n"
    assert saved.http.delete("/v1/kv?model=b").json()["deleted"] == {"count": 0, "tokens": 0, "bytes": 0}
    before = listed(saved)
    assert len(files(before)) == 1
    assert re.fullmatch(r"1 conversation deleted, .+ kB freed\n", clear("gpt").stdout), "by any of its names"
    assert files(before) == []
    assert listed(saved)["total"]["count"] == 0
    assert saved.chat("a", content=LONG, headers=AS_ANNA).headers["x-kv"] == "none"
    gone = saved.http.delete("/v1/kv").json()
    assert gone["models"].keys() <= {"a"}
    saved.http.post("/v1/models/eject", json={"model": "a"})
    assert files(before) == [], "what its engine held is not saved any more"
    assert clear("--json").stdout == '{\n  "status": "success",\n  "deleted": {\n    "count": 0,\n' + (
        '    "tokens": 0,\n    "bytes": 0\n  },\n  "models": {}\n}\n'
    )


def test_what_a_model_of_the_same_files_has_saved_is_deleted_with_its_own(saved: Router) -> None:
    assert saved.http.delete("/v1/kv?model=b").json()["deleted"]["count"] == 0
    gone = saved.http.delete("/v1/kv?model=twin").json()
    assert (gone["deleted"]["count"], list(gone["models"])) == (1, ["a"])
    assert saved.chat("twin", content=LONG, headers=AS_ANNA).headers["x-kv"] == "none"


def test_nobody_else_writes_among_the_saved_files(saved: Router, tmp_path: Path) -> None:
    before = listed(saved)
    (state,) = files(before)
    content = state.read_bytes()
    saved.chat("a", content="hello")
    for action in ("save", "restore", "erase"):
        answer = saved.http.post(f"/upstream/a/slots/0?action={action}", json={"filename": state.name})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "slots_are_kept"), action
        assert "--slot-save-path" in answer.json()["error"]["message"]
    assert state.read_bytes() == content
    assert saved.http.get("/upstream/a/slots").status_code == 200
    assert saved.http.post("/upstream/b/slots/0?action=save", json={"filename": "mine"}).status_code == 409


def test_the_page_shows_it_to_who_may_see_it(saved: Router) -> None:
    with chromium() as browser:
        for key, shown in ((OPERATOR, True), (ANNA, False)):
            page = browser.new_context().new_page()
            page.set_default_timeout(20_000)
            page.goto(saved.url)
            page.fill("#key", key)
            page.press("#key", "Enter")
            page.wait_for_selector("#figure-rows tr")
            if shown:
                page.wait_for_selector("#kv-rows tr")
                model, count, size, restored, spared = (
                    page.locator("#kv-rows tr").first.locator("td").all_inner_texts()
                )
                assert (model, count) == ("a", "1")
                assert re.match(r"\d+ KiB", size)
                assert int(restored) >= 1
                assert re.fullmatch(r"\d.* (ms|s)", spared)
                assert re.search(r"^1, \d+ KiB of 9.3 GiB$", page.inner_text("#kv-counts"))
            assert page.is_visible("#kv") is shown


def test_what_nobody_can_use_again_leaves(start: Start, tiny: Path, tmp_path: Path) -> None:
    model, path = tmp_path / "model.gguf", tmp_path / "config.json"
    shutil.copy(tiny, model)
    config = {"kv_store": {"min_tokens": 64}, "models": models(model, "a", "b", flags=FLAGS)}
    router = start(config)
    states = []
    for changed in (False, True):
        if changed:
            os.utime(model, (1, 1))  # another file, as far as one can tell
            router.http.post("/v1/config/reload")
        assert router.chat("a", content=LONG).headers["x-kv"] == "none"
        router.unload()
        states += files(listed(router))
    assert len(set(states)) == 2, "the state of the former file was deleted when the new one was loaded"

    assert 'router_kv_saves_total{model="b"} 0' in router.http.get("/metrics").text
    path.write_text(json.dumps({"kv_store": {"enabled": False}, "models": models(model, "a", flags=FLAGS)}))
    router.http.post("/v1/config/reload")
    assert not re.search(r'router_(model_)?kv_\w+{model="b"', router.http.get("/metrics").text)
    assert "x-kv" not in router.chat("a", content=LONG).headers
    printed = run("kv", "--url", router.url, cwd=tmp_path).stdout.splitlines()
    assert printed[-1] == "Conversations are not kept: kv_store.enabled is false. 1 conversation on disk."
