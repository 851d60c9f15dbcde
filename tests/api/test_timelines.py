"""`GET /v1/timeline` of a real router."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, models, starting


@pytest.fixture(scope="module")
def router(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """It has served `a`, then swapped it for `b`."""
    with starting(tmp_path_factory.mktemp("router")) as start:
        api = {"api_keys": ["operator"], "inference_keys": ["client"]}
        config = {"api": api, "system": {"max_concurrent_models": 1}, "models": models(tiny, "a", "b", "idle")}
        config["models"]["broken"] = {"model_path": str(tiny), "flags": ["--no-such-flag"]}
        router = start(config)
        router.http.headers.update({"authorization": "Bearer operator"})
        assert router.chat("a").status_code == 200
        assert router.chat("b").status_code == 200
        assert router.chat("broken").status_code == 503
        yield router


def timeline(router: Router, *, key: str = "operator", **query: float) -> dict[str, Any]:
    answer = router.http.get("/v1/timeline", params=query, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_a_swap_is_seen_where_one_lane_ends_and_another_begins(router: Router) -> None:
    told = timeline(router)
    assert told["models"].keys() == {"a", "b", "broken"}
    a, b = (told["models"][alias]["spans"] for alias in "ab")
    assert [span["state"] for span in a][:2] == ["loading", "ready"]
    assert [span["state"] for span in a][-1] == "off"
    ended = next(span for span in a if span["state"] == "stopping")
    loading = next(span for span in b if span["state"] == "loading")
    assert "makes room for 'b'" in ended["reason"]
    assert ended["from"] <= loading["from"]
    assert all(span["to"] == after["from"] for span, after in itertools.pairwise(a))
    assert told["from"] <= a[0]["from"] < told["to"]
    assert told["models"]["b"]["queued"][0][1] >= 1


def test_inference_keys_are_told_no_more_than_clients_may_see(router: Router) -> None:
    reasons = {
        key: " ".join(span["reason"] for span in timeline(router, key=key)["models"]["broken"]["spans"])
        for key in ("operator", "client")
    }
    assert "--no-such-flag" in reasons["operator"]
    assert "--no-such-flag" not in reasons["client"]
    assert router.http.get("/v1/timeline", headers={"authorization": "Bearer wrong"}).status_code == 401


def test_an_open_page_is_told_only_what_is_new(router: Router) -> None:
    router.http.post("/v1/models/load", json={"model": "b"})
    to = timeline(router)["to"]
    idle = timeline(router, since=to)
    assert (idle["whole"], idle["models"]) == (False, {})
    router.http.post("/v1/models/eject", json={"model": "b"})
    news = timeline(router, since=idle["to"])["models"]
    assert news.keys() == {"b"}
    assert [span["state"] for span in news["b"]["spans"]][-1] == "off"
    assert timeline(router, since=1.0)["whole"]


@pytest.mark.parametrize("query", [{"minutes": 0}, {"minutes": 16}])
def test_no_more_is_told_than_is_kept(router: Router, query: dict[str, float]) -> None:
    answer = router.http.get("/v1/timeline", params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "query.minutes")


def test_an_open_page_can_ask_for_less(router: Router) -> None:
    """Of 200 models, of which a few have requests, it does not want to know all every two seconds."""
    whole, active = (
        router.http.get("/v1/queue/stats", params=params).json() for params in ({}, {"active_within": 3600})
    )
    assert whole["per_model"].keys() - active["per_model"].keys() == {"idle", "broken"}
    assert active["per_model"]["a"] == whole["per_model"]["a"]
    assert active["summary"] == whole["summary"]
    assert whole["summary"]["total_rejected"] == 1
    assert router.http.get("/v1/queue/stats", params={"active_within": 0}).json()["per_model"] == {}
    whole, short = (
        router.http.get("/v1/telemetry/summary", params=params).json() for params in ({}, {"models": False})
    )
    assert whole.pop("by_model").keys() == {"a", "b", "broken"}
    for window in whole["windows"].values():
        del window["by_model"]
    assert short == whole
