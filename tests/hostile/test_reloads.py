"""Endless reloads, invalid Accept headers, and pulls with invalid names."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from conftest import Router, Start, eventually, http_client, models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configuration")


def configure(folder: Path, path: Path, *aliases: str) -> str:
    entries = models(path, *aliases, flags=["-c", "256", "-t", "1"])
    (folder / "config.json").write_text(json.dumps({"models": entries}))
    return str(folder / "config.json")


@pytest.fixture(scope="module")
def router(start_shared: Start, folder: Path, middling: Path) -> Router:
    """With no hub within reach."""
    path = configure(folder, middling, "a", "b")
    return start_shared(arguments=["--config", path], HF_ENDPOINT="http://127.0.0.1:9")


def test_reloads_without_end_keep_no_model_from_loading(router: Router) -> None:
    over = threading.Event()
    reloads = 0

    def reload() -> None:
        nonlocal reloads
        with http_client(router.url, timeout=20) as http:
            while not over.wait(0.05):
                assert http.post("/v1/config/reload", json={}).status_code == 200
                reloads += 1

    thread = threading.Thread(target=reload)
    thread.start()
    try:
        assert router.chat("a").status_code == 200
    finally:
        over.set()
        thread.join()
    assert reloads > 1


def test_what_was_counted_of_a_model_goes_with_it(router: Router, folder: Path, middling: Path) -> None:
    router.chat("b")
    assert 'router_requests_total{model="b"' in router.http.get("/metrics").text
    configure(folder, middling, "a")
    assert router.http.post("/v1/config/reload", json={}).json()["removed"] == ["b"]
    eventually(lambda: 'model="b"' not in router.http.get("/metrics").text)  # once its engine is gone
    assert 'router_requests_total{model="a"' in router.http.get("/metrics").text
    configure(folder, middling, "a", "b")
    router.http.post("/v1/config/reload", json={})
    assert 'router_output_tokens_total{model="b"} 0' in router.http.get("/metrics").text


def test_what_nobody_can_accept_is_refused(router: Router) -> None:
    for accept in ("application/openmetrics-text; version=abc", "application/openmetrics-text; version=1.x"):
        answer = router.http.get("/metrics", headers={"accept": accept})
        assert answer.status_code in (200, 400)
        assert answer.status_code == 200 or answer.json()["error"]["param"] == "accept"
    refused = router.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=abc"})
    assert refused.status_code == 400


@pytest.mark.parametrize("name", ["a/b\0", "a/b:Q\n4", "a/b/resolve/m\0in/c.gguf", "a/b/c\x1b.gguf", "a/\ud800"])
def test_no_pull_of_junk_begins(router: Router, name: str) -> None:
    body = json.dumps({"model": name}).encode()
    headers = {"content-type": "application/json"}
    answer = router.http.post("/v1/models/pull", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert router.http.get("/v1/models/pull").json()["pulls"] == []


def test_no_pull_is_called_junk(router: Router) -> None:
    for alias in ("a\0b", "a\x1bb"):
        answer = router.http.post("/v1/models/pull", json={"model": "a/b", "alias": alias})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_alias")
    assert router.http.get("/v1/models/pull").json()["pulls"] == []
