"""What is pushed: states as they change, loads as they go on, figures every two seconds; also after a pause."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import Router, Start, fake, models


def events(router: Router, path: str, last_id: str | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, id and content of what comes."""
    headers = {"last-event-id": last_id} if last_id else {}
    name = identity = ""
    with router.http.stream("GET", path, headers=headers) as stream:
        for line in stream.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "id":
                identity = value
            elif field == "data":
                yield name, identity, json.loads(value)


def test_who_comes_back_gets_what_was_missed(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "a")})
    stream = events(router, "/v1/models/status/stream")
    name, seen, _ = next(stream)
    assert name == "full_status"
    stream.close()
    router.http.post("/v1/models/load", json={"model": "a"})
    missed = events(router, "/v1/models/status/stream", seen)
    states = []
    for name, _, data in missed:
        assert name == "model_update"
        states.append(data["status"])
        if data["status"] == "ready":
            break
    assert (states[0], states[-1]) == ("loading", "ready")


def test_who_comes_back_too_late_or_to_another_router_gets_all_anew(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "a")})
    for stranger in ("0-1", "nonsense", "-", "1-" + "9" * 30):
        name, identity, data = next(events(router, "/v1/models/status/stream", stranger))
        assert name == "full_status"
        assert identity
        assert data["models"]["a"]["status"] == "off"


def test_a_load_tells_how_far_it_is(start: Start, tiny: Path, tmp_path: Path) -> None:
    system = {"llama_server_path": fake(tmp_path, load_sec="0.5", progress="1")}
    router = start({"system": system, "models": models(tiny, "a")})
    stream = events(router, "/v1/models/status/stream")
    next(stream)
    loads = []
    with router.http.stream("POST", "/v1/models/load", json={"model": "a"}):
        for name, _, data in stream:
            assert name == "model_update"
            if data["load"] is not None:
                loads.append(data["load"])
            if data["status"] == "ready":
                assert data["load_progress"] == 100
                break
    told = [load for load in loads if load["stage"] == "text_model"]
    assert [load["fraction"] for load in told] == [0.25, 0.5]
    assert all(load["elapsed_sec"] >= 0 and load["expected_sec"] > 0 for load in loads)


def test_figures_come_every_two_seconds_until_the_end(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "a")})
    stream = events(router, "/metrics/stream")
    name, _, data = next(stream)
    assert name == "metrics"
    assert data["server"]["status"] == "ready"
    assert data["models"]["a"] == {"status": "off", "queue_length": 0, "active_requests": 0, "vram_used_mb": 0}
    assert data["gpu"].keys() >= {"vram_total_mb", "vram_used_mb", "vram_free_mb", "vram_used_percent"}
    assert router.chat("a").status_code == 200
    name, _, data = next(stream)
    assert data["models"]["a"]["status"] == "ready"
    assert data["totals"]["processed"] == 1
    router.process.terminate()
    assert [name for name, _, _ in stream][-1] == "shutdown"
    assert router.process.wait(10) == 0


def test_the_report_is_of_the_last_five_minutes(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "a")})
    router.chat("a", max_tokens=3)
    report = router.http.get("/metrics/report").json()
    assert report["requests"] == 1
    assert report["by_model"]["a"]["outcomes"] == {"served": 1}
