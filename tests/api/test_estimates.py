"""What is told before a model is pulled or loaded, what was found but is not served, and models that are kept."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, eventually, models, starting
from fake_hub import Hub, serving
from tiny_models import write_llama

REPO = "org/tiny-GGUF"
FULL = {"authorization": "Bearer operator"}
CLIENT = {"authorization": "Bearer client"}


@pytest.fixture(scope="module")
def hub(tiny: Path) -> Iterator[Hub]:
    content = {"tiny-Q4_K_M.gguf": tiny.read_bytes(), "README.md": b"# A model card"}
    with serving(Hub({REPO: content, "org/other-GGUF": {"broken-Q4_K_M.gguf": b"GGUF"}})) as hub:
        yield hub


@pytest.fixture(scope="module")
def router(hub: Hub, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """Room for one of `a` and `b`, and for `small` beside it."""
    folder = tmp_path_factory.mktemp("router")
    found = folder / "found"
    found.mkdir()
    (found / "broken.gguf").write_bytes(b"no model")
    write_llama(found / "a.gguf", seed=3)
    entries = {
        **models(tiny, "a", "b", footprint_mb=600),
        **models(tiny, "small", footprint_mb=100),
        **models(tiny, "huge", footprint_mb=2000),
    }
    entries["small"]["flags"] += ["--hf-token", "hf_secret"]
    config = {
        "api": {"api_keys": ["operator"], "inference_keys": ["client"]},
        "system": {"memory_budget_mb": 1000, "models_dirs": [str(found)]},
        "models": entries,
    }
    environ = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "NO_PROXY": "*"}
    with starting(folder) as start:
        router = start(config, **environ)
        router.http.headers.update(FULL)
        yield router


def estimate(router: Router, model: str) -> dict[str, Any]:
    answer = router.http.post("/v1/models/estimate", json={"model": model})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_a_model_is_estimated_before_it_is_pulled(router: Router, hub: Hub, tiny: Path) -> None:
    told = estimate(router, f"hf.co/{REPO}")
    assert told["alias"] == f"{REPO}:Q4_K_M"
    assert told["download_bytes"] == told["total_bytes"] == tiny.stat().st_size
    assert 0 < told["need_mib"]["host"] < 400
    assert told["budget_mib"] == {"host": 1000}
    assert told["fits"] == "now"
    assert told["message"].endswith("on host, fits")
    assert told["largest_context"] > 0
    router.http.post("/v1/models/load", json={"model": "a"})
    told = estimate(router, f"hf.co/{REPO}")
    assert (told["fits"], told["beside"], told["unloads"]) == ("now", ["a"], [])
    assert told["message"].endswith("on host, fits beside a")
    assert not any(file for file, first in hub.fetched if first > 0)
    assert router.http.get("/v1/models/pull").json() == {"pulls": []}


def test_an_estimate_says_what_would_be_unloaded(router: Router) -> None:
    router.http.post("/v1/models/load", json={"model": "a"})
    told = estimate(router, "b")
    assert (told["fits"], told["unloads"], told["need_mib"]) == ("after_unloading", ["a"], {"host": 600})
    assert (told["source"], told["is_loaded"], told["free_mib"]) == ("footprint_mb", False, {"host": 400})
    assert told["message"].startswith("needs 0.6 GiB of ")
    assert told["message"].endswith(" on host, fits once a is unloaded")
    assert estimate(router, "small")["message"].endswith("fits beside a")
    told = estimate(router, "huge")
    assert (told["fits"], told["need_mib"]) == ("never", {"host": 2000})
    assert "does not fit: 'huge' needs 2000 MiB on host (footprint_mb); the budget is 1000 MiB" in told["message"]
    told = estimate(router, "a")
    assert (told["is_loaded"], told["fits"], told["unloads"]) == (True, "now", [])


def test_what_cannot_be_estimated_says_why(router: Router, hub: Hub) -> None:
    for model, status, code in (
        ("hf.co/org/absent", 404, "not_found"),
        ("nonsense", 400, "invalid_reference"),
    ):
        answer = router.http.post("/v1/models/estimate", json={"model": model})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    told = estimate(router, "hf.co/org/other-GGUF")
    assert (told["fits"], told["need_mib"]) == (None, {})
    assert "what it needs is unknown: " in told["message"]
    assert router.http.post("/v1/models/estimate", json={"model": "a"}, headers=CLIENT).status_code == 403


def test_what_was_found_and_is_not_served_is_listed_with_the_reason(router: Router, tiny: Path) -> None:
    found = router.http.get("/v1/models/found").json()
    folder = {each["source"]: each["path"] for each in found["folders"]}["models_dirs"]
    reasons = {each["what"]: each["reason"] for each in found["not_served"]}
    assert reasons.keys() == {f"{folder}/broken.gguf", f"{folder}/a.gguf"}
    assert reasons[f"{folder}/a.gguf"] == f"{tiny} has the same name"
    assert "GGUF" in reasons[f"{folder}/broken.gguf"]
    assert {each["source"] for each in found["not_served"]} == {"models_dirs"}
    assert router.http.get("/v1/models/found", headers=CLIENT).status_code == 403
    Path(folder, "later.gguf").write_bytes(b"nor this")
    eventually(lambda: "later.gguf" in router.http.get("/v1/models/found").text)


def test_a_model_is_kept_for_a_while(router: Router) -> None:
    router.http.post("/v1/models/load", json={"model": "a"})
    kept = router.http.post("/v1/models/a/keep", json={"for_sec": 3600}).json()
    left = datetime.datetime.fromisoformat(kept["pinned_until"]) - datetime.datetime.now(datetime.timezone.utc)
    assert 3500 < left.total_seconds() <= 3600
    status = router.status("a")
    assert (status["pinned"], status["pinned_until"][:16], status["unload_at"]) == (
        True,
        kept["pinned_until"][:16],
        None,
    )
    refused = router.chat("b", headers=FULL)
    assert refused.status_code == 507
    assert "a (pinned) cannot be unloaded" in refused.text
    assert estimate(router, "b")["fits"] == "never"
    ended = router.http.post("/v1/models/a/keep", json={}).json()
    assert (ended["pinned"], ended["pinned_until"]) == (False, None)
    assert router.chat("b", headers=FULL).status_code == 200
    until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=2)
    kept = router.http.post("/v1/models/b/keep", json={"until": until.isoformat()}).json()
    assert kept["pinned_until"][:16] == until.isoformat()[:16]
    router.http.post("/v1/models/eject", json={"model": "b"})
    assert not router.status("b")["pinned"]


@pytest.mark.parametrize(
    "body",
    [{"for_sec": 0}, {"for_sec": 1, "until": "2126-01-01T00:00:00Z"}, {"until": "2020-01-01T00:00:00Z"}],
)
def test_a_time_to_keep_a_model_must_make_sense(router: Router, body: dict[str, Any]) -> None:
    answer = router.http.post("/v1/models/a/keep", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert router.http.post("/v1/models/a/keep", json={}, headers=CLIENT).status_code == 403


def test_the_command_line_of_an_engine_is_shown_before_and_while_it_runs(router: Router, tiny: Path) -> None:
    router.unload()
    before = router.status("small")["command"]
    assert before[before.index("-m") + 1] == str(tiny)
    assert before[before.index("--hf-token") + 1] == "…"
    router.http.post("/v1/models/load", json={"model": "a"})
    running = router.status("a")["command"]
    assert running[running.index("--alias") + 1] == "a"
    assert ("-c", "1024") in itertools.pairwise(running)
    assert "--port" in running
    assert "command" not in router.http.get("/v1/models/a/status", headers=CLIENT).json()
