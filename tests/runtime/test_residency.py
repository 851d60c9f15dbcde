"""Models that share memory: swaps, priorities, preload, idle unload, pins, and a configuration that changes."""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, eventually, fake, models


def test_three_models_with_room_for_one_are_all_served(start: Start, tiny: Path) -> None:
    router = start({"system": {"max_concurrent_models": 1}, "models": models(tiny, "a", "b", "c")})
    most = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, len(router.engines))

    watcher = threading.Thread(target=watch)
    watcher.start()

    def ask(number: int) -> int:
        priority = ("high", "normal", "low")[number % 3]
        return router.chat("abc"[number % 7 % 3], headers={"X-Request-Priority": priority}).status_code

    with ThreadPoolExecutor(12) as clients:
        statuses = list(clients.map(ask, range(60)))
    done.set()
    watcher.join()
    assert statuses == [200] * 60
    assert most == 1


def test_requests_for_one_model_are_batched(start: Start, tiny: Path, tmp_path: Path) -> None:
    """A B A A C A B C on one model's memory: three loads."""
    system = {"max_concurrent_models": 1, "llama_server_path": fake(tmp_path, load_sec="0.5", answer_sec="0.05")}
    router = start({"system": system, "models": models(tiny, "a", "b", "c")})
    with ThreadPoolExecutor(8) as clients:
        asked = []
        for count, alias in enumerate("abaacabc", 1):
            asked.append(clients.submit(router.chat, alias))
            eventually(lambda count=count: _known(router) >= count)  # in this order
        pids = [request.result().json()["pid"] for request in asked]
    assert len(set(pids)) == 3


def _known(router: Router) -> int:
    stats = router.http.get("/v1/queue/stats").json()["per_model"].values()
    return sum(model["total_requests"] for model in stats)


def test_a_model_too_big_is_refused_with_the_figures(start: Start, tiny: Path) -> None:
    config = {"system": {"memory_budget_mb": 100}, "models": models(tiny, "big", footprint_mb=200)}
    answer = start(config).chat("big")
    assert answer.status_code == 507
    error = answer.json()["error"]
    assert error["code"] == "insufficient_memory"
    assert "200 MiB" in error["message"]
    assert "100 MiB" in error["message"]


def test_memory_decides_who_is_resident_together(start: Start, tiny: Path) -> None:
    sizes = {"a": 60, "b": 40, "c": 50}
    entries: dict[str, Any] = {}
    for alias, size in sizes.items():
        entries |= models(tiny, alias, footprint_mb=size)
    router = start({"system": {"memory_budget_mb": 100}, "models": entries})
    router.chat("a")
    router.chat("b")
    assert len(router.engines) == 2
    router.chat("c")  # 50 do not fit beside 60
    assert router.status("a")["status"] == "off"
    assert router.status("b")["status"] == "ready"


def test_preload_idle_unload_and_pins(start: Start, tiny: Path) -> None:
    system = {"preload_models": ["*"], "preload_delay_sec": 0, "idle_timeout_sec": 1, "keep_warm_models": 0}
    entries = {**models(tiny, "a", "b"), **models(tiny, "pinned", pinned=True)}
    router = start({"system": system, "models": entries})
    router.until("pinned", "ready")
    router.until("a", "off")
    router.until("b", "off")
    assert router.status("pinned")["status"] == "ready"


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    return start_shared({"models": models(tiny, "a")})


def test_load_and_eject_by_hand(router: Router) -> None:
    assert router.http.post("/v1/models/load", json={"model": "a"}).json()["status"] == "success"
    assert router.status("a")["status"] == "ready"
    assert router.http.post("/v1/models/eject", json={"model": "a"}).json()["model_ejected"] == "a"
    assert router.engines == []
    again = router.http.post("/v1/models/eject", json={"model": "a"})
    assert again.json()["status"] == "not_found"
    assert router.http.post("/v1/models/load", json={"model": "z"}).status_code == 404
    assert router.http.post("/v1/models/load", json={"mdel": "z"}).status_code == 400


def test_eject_lets_a_stream_finish(start: Start, tiny: Path, tmp_path: Path) -> None:
    engine = fake(tmp_path, chunks="6", chunk_sec="0.1")
    router = start({"system": {"llama_server_path": engine}, "models": models(tiny, "a")})
    body = {"model": "a", "messages": [], "stream": True}
    with router.http.stream("POST", "/v1/chat/completions", json=body) as stream, ThreadPoolExecutor(1) as other:
        lines = stream.iter_lines()
        next(lines)
        ejected = other.submit(router.http.post, "/v1/models/eject", json={"model": "a"})
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert ejected.result().status_code == 200


def test_the_status_stream_tells_the_story_of_a_load(router: Router) -> None:
    router.unload()
    events: list[tuple[str, str]] = []
    with router.http.stream("GET", "/v1/models/status/stream") as stream, ThreadPoolExecutor(1) as other:
        name = ""
        asked = None
        for line in stream.iter_lines():
            if line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:"):
                data = json.loads(line[5:])
                if events[-1:] != [(name, data.get("status", ""))]:  # a load tells how far it is
                    events.append((name, data.get("status", "")))
                asked = asked or other.submit(router.chat, "a")
                if data.get("status") == "ready":
                    break
        assert asked is not None
        assert asked.result().status_code == 200
    assert events == [("full_status", ""), ("model_update", "loading"), ("model_update", "ready")]


def test_a_changed_file_is_applied_without_losing_a_request(start: Start, tiny: Path, tmp_path: Path) -> None:
    entries = {**models(tiny, "kept"), **models(tiny, "changed"), **models(tiny, "removed")}
    router = start({"models": entries})
    for alias in entries:
        router.chat(alias)
    pids = {alias: router.status(alias)["pid"] for alias in entries}
    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            statuses.append(router.chat("changed").status_code)
            statuses.append(router.chat("kept").status_code)

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    entries["changed"]["flags"] = ["-c", "512", "-t", "1"]
    del entries["removed"]
    entries |= models(tiny, "added")
    (tmp_path / "config.json").write_text(json.dumps({"models": entries}))
    reloaded = router.http.post("/v1/config/reload").json()
    assert (reloaded["added"], reloaded["removed"], reloaded["changed"]) == (["added"], ["removed"], ["changed"])
    eventually(lambda: router.status("changed")["pid"] not in (None, pids["changed"]))
    assert router.chat("added").status_code == 200
    done.set()
    for client in clients:
        client.join()
    assert set(statuses) == {200}
    assert router.status("kept")["pid"] == pids["kept"]
    assert router.chat("removed").status_code == 404


def test_what_goes_while_it_waits_to_be_loaded_holds_nobody_up(start: Start, tiny: Path, tmp_path: Path) -> None:
    bad, good = models(tiny, "bad", env={"FAKE_READY": "fails"}), models(tiny, "good")
    system = {"preload_models": ["bad", "good"], "preload_delay_sec": 0, "model_load_max_retries": 9}
    system["llama_server_path"] = fake(tmp_path)
    router = start({"system": system, "models": {**bad, **good}})
    eventually(lambda: router.status("bad")["error_message"] is not None)
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(router.http.post, "/v1/models/load", json={"model": "bad"})
        system["preload_models"] = []
        (tmp_path / "config.json").write_text(json.dumps({"system": system, "models": good}))
        router.http.post("/v1/config/reload").raise_for_status()
        router.until("good", "ready")
        assert asked.result().status_code == 404


def test_a_broken_file_changes_nothing_and_says_why(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"models": models(tiny, "a")})
    (tmp_path / "config.json").write_text('{"models": {"a": {"model_path": "gone.gguf"}}}')
    answer = router.http.post("/v1/config/reload")
    assert answer.status_code == 400
    assert "models.a.model_path" in answer.json()["error"]["message"]
    router.process.send_signal(signal.SIGHUP)
    eventually(lambda: "nothing was changed" in router.log)
    assert router.chat("a").status_code == 200
    _what_needs_a_restart_is_said_until_it_is_undone(router, tiny, tmp_path)


def _what_needs_a_restart_is_said_until_it_is_undone(router: Router, tiny: Path, tmp_path: Path) -> None:
    for ring_lines, needs_restart in ((7, ["system.log_ring_lines"]), (7, ["system.log_ring_lines"]), (None, [])):
        system = {"log_ring_lines": ring_lines} if ring_lines else {"parallel_requests": 1}
        (tmp_path / "config.json").write_text(json.dumps({"system": system, "models": models(tiny, "a")}))
        assert router.http.post("/v1/config/reload").json()["needs_restart"] == needs_restart
    eventually(lambda: "is the former name of default_parallel" in router.log)


def test_what_an_engine_says_can_be_read(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"api": {"api_keys": ["full"], "inference_keys": ["infer"]}, "models": models(tiny, "a/b")})
    full, infer = {"authorization": "Bearer full"}, {"authorization": "Bearer infer"}
    router.chat("a/b", headers=full)
    eventually(lambda: "llama" in router.http.get("/v1/logs/a/b", headers=full).text)
    assert len(router.http.get("/v1/logs/a/b?lines=3", headers=full).text.splitlines()) == 3
    assert router.http.get("/v1/logs/a/b", headers=infer).status_code == 403
    assert router.http.get("/v1/logs/../a", headers=full).status_code == 404
    (engine,) = router.http.get("/v1/models/a/b/status", headers=full).json()["engines"]
    assert (engine["name"], engine["status"], engine["in_flight"]) == ("a/b#1", "ready", 0)
    assert "llama" in router.http.get("/v1/logs/a/b%231", headers=full).text
    assert router.http.get("/v1/logs/a/b%232", headers=full).status_code == 404, "there is none of that name"
    with router.http.stream("GET", "/v1/logs/a/b/stream", headers=full) as stream:
        router.http.post("/v1/models/eject", json={"model": "a/b"}, headers=full)
        router.chat("a/b", headers=full)
        assert next(line for line in stream.iter_lines() if line.startswith("data:"))
    assert "llama" in router.http.get("/v1/logs/a/b%232", headers=full).text
    assert router.http.get("/v1/logs/a/b%231", headers=full).status_code == 404, "it is gone"
    both, latest = (
        router.http.get(f"/v1/logs/{name}?lines=1000", headers=full).text for name in ("a/b", "a/b%232")
    )
    assert len(both) > len(latest) > 0, "of the model there is what its earlier engine said, too"
