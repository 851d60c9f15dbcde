"""The API of llama-server's own router mode, and llama-swap's way to an engine, as their clients use them.

Expected answers of llama-server were recorded from build 10434 in router mode.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, eventually, fake, models, starting
from tiny_models import write_projector

REPO = "org/Tiny-GGUF:Q8_0"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Router]:
    folder = tmp_path_factory.mktemp("router")
    flags = ["-c", "1024", "-np", "2", "--metrics", "--no-kv-unified", "-t", "1", "--ignore-eos"]
    entries = {
        **models(tiny, "a", flags=flags),
        **models(tiny, REPO),
        **models(tiny, "broken", flags=["--nonsense"]),
    }
    aliases = {"nick": {"uses": "a", "forced": {"max_tokens": 2}}}
    api = {"api_keys": ["full"], "inference_keys": ["some"]}
    with starting(folder) as start:
        router = start({"api": api, "models": entries, "aliases": aliases})
        router.http.headers["Authorization"] = "Bearer full"
        yield router


def cards(router: Router) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}


def values(router: Router) -> dict[str, str]:
    """As clients of llama-server read them."""
    return {name: card["status"]["value"] for name, card in cards(router).items()}


def ask(router: Router, path: str, **body: Any) -> Any:
    answer = router.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(router: Router, method: str, path: str, **body: Any) -> tuple[int, str]:
    answer = router.http.request(method, path, json=body or None)
    return answer.status_code, answer.json()["error"]["code"]


# --- lists ------------------------------------------------------------------------------------------------


def test_a_card_is_what_llama_servers_clients_read(router: Router) -> None:
    router.unload()
    card = cards(router)["a"]
    assert card["status"] == {"value": "unloaded"}
    assert card["state"] == "off"
    assert card["architecture"] == {"input_modalities": ["text"], "output_modalities": ["text"]}
    assert card["family"] == "llama"
    assert card["aliases"] == ["nick"]
    assert card["can_remove"] is False
    loaded_there = {
        "n_ctx": 512,
        "n_ctx_train": 2048,
        "n_embd": 64,
        "n_params": 115392,
        "n_vocab": 259,
        "ftype": "F16",
    }
    assert card["meta"].items() >= loaded_there.items()
    assert card["meta"]["size"] > 200_000
    ask(router, "/v1/models/load", model="a")
    assert values(router) == {"a": "loaded", REPO: "unloaded", "broken": "unloaded", "nick": "loaded"}
    assert router.http.get("/v1/models/nick").json()["status"] == {"value": "loaded"}


def test_a_model_with_eyes_says_so(start: Start, tiny: Path, tmp_path: Path) -> None:
    projector = write_projector(tmp_path / "mmproj-a.gguf")
    router = start({"models": models(tiny, "a", mmproj=str(projector))})
    assert cards(router)["a"]["architecture"]["input_modalities"] == ["text", "image"]


def test_a_model_that_failed_says_so_with_its_exit_code(router: Router) -> None:
    assert router.chat("broken").status_code == 503
    card = cards(router)["broken"]
    assert (card["state"], card["status"]) == ("failed", {"value": "failed", "failed": True, "exit_code": 2})
    router.http.post("/v1/models/broken/reset")


def test_the_other_list_has_what_an_earlier_hosts_clients_read(router: Router) -> None:
    router.unload()
    ask(router, "/v1/models/load", model=REPO)
    listed = router.http.get("/models").json()
    assert {**listed, "models": []} == {**router.http.get("/v1/models").json(), "models": []}
    known = {model["model"]: model for model in listed["models"]}
    assert [model["model"] for model in listed["models"]] == [card["id"] for card in listed["data"]]
    assert known[REPO].keys() == {"model", "description", "loaded", "backend", "size_bytes", "load_duration"}
    assert (known[REPO]["loaded"], known["broken"]["loaded"], known["broken"]["load_duration"]) == (
        True,
        False,
        None,
    )
    assert known[REPO]["size_bytes"] > 200_000
    assert 1e6 < known[REPO]["load_duration"] < 60e9


# --- loading, as its web page and Open WebUI's llama.cpp provider do it ------------------------------------------


def test_models_are_loaded_and_unloaded_and_the_stream_tells(router: Router) -> None:
    router.unload()
    told: list[tuple[str, str, Any]] = []
    with router.http.stream("GET", "/models/sse") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()

        def until(model: str, status: str) -> None:
            for line in lines:
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    data = event.get("data", {})
                    told.append((event["model"], event["event"], data))
                    if (event["model"], data.get("status")) == (model, status):
                        return
                assert not line.startswith(("event:", "id:"))  # its web page takes all for data

        assert next(lines) == 'data: {"model":"*","event":"models_reload"}'
        assert ask(router, "/models/load", model="nick") == {"success": True}
        until("nick", "loaded")
        assert refused(router, "POST", "/models/load", model="a") == (400, "invalid_request")
        assert ask(router, "/models/unload", model="nick:latest") == {"success": True}
        until("nick", "unloaded")
        assert refused(router, "POST", "/models/unload", model="a") == (400, "invalid_request")
    of_a = [(event, data["status"], data.get("exit_code")) for model, event, data in told if model == "a"]
    assert of_a[0] == ("status_change", "loading", None)
    assert of_a[-2:] == [("status_change", "loaded", None), ("status_change", "unloaded", 0)]
    assert [data for model, _, data in told if model == "nick"] == [
        data for model, _, data in told if model == "a"
    ]
    progress = [data["progress"] for _, _, data in told if "progress" in data]
    assert progress[-1] == {"stages": ["text_model"], "current": "text_model", "value": 1.0}


def test_a_load_that_fails_is_told_and_unknown_models_are_not_there(router: Router) -> None:
    assert ask(router, "/models/load", model="broken") == {"success": True}
    eventually(lambda: values(router)["broken"] == "failed")
    router.http.post("/v1/models/broken/reset")
    for path in ("/models/load", "/models/unload"):
        assert refused(router, "POST", path, model="nix") == (404, "model_not_found")
        assert refused(router, "POST", path, name="a") == (400, "invalid_json")
        some = router.http.post(path, json={"model": "a"}, headers={"Authorization": "Bearer some"})
        assert some.status_code == 403


def test_the_stream_says_when_the_list_is_another(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"models": models(tiny, "a")})
    with router.http.stream("GET", "/models/sse") as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        (tmp_path / "config.json").write_text(json.dumps({"models": models(tiny, "a", "b")}))
        router.http.post("/v1/config/reload", json={}).raise_for_status()
        assert next(lines) == 'data: {"model":"*","event":"models_reload"}'
        router.stop()
        assert list(lines) == []


# --- questions to engines ----------------------------------------------------------------------------------------


def test_engines_are_asked_at_their_own_paths_and_nothing_is_loaded_for_it(router: Router) -> None:
    router.unload()
    paths = ("/props", "/slots", "/lora-adapters", "/metrics")
    for path in paths:
        assert refused(router, "GET", f"{path}?model=a") == (400, "model_not_loaded")
        assert refused(router, "GET", f"{path}?model=nix") == (404, "model_not_found")
    assert router.engines == []
    ask(router, "/v1/models/load", model="a")
    props, slots, adapters, metrics = (
        router.http.get(f"{path}?model=nick:latest&autoload=false") for path in paths
    )
    assert (props.json()["total_slots"], props.json()["default_generation_settings"]["n_ctx"]) == (2, 512)
    assert [slot["id"] for slot in slots.json()] == [0, 1]
    assert adapters.json() == []
    assert metrics.headers["content-type"].startswith("text/plain")
    assert re.search(r"^llamacpp:requests_processing 0$", metrics.text, re.M)
    assert "router_uptime" not in metrics.text
    assert router.http.get("/props?model=a", headers={"Authorization": "Bearer some"}).status_code == 200
    ask(router, "/v1/models/load", model=REPO)
    answer = router.http.get(f"/metrics?model={REPO}")  # started without --metrics
    assert (answer.status_code, answer.json()["error"]["code"]) == (501, "not_supported")


def test_who_watches_waits_for_no_slot(start: Start, tiny: Path, tmp_path: Path) -> None:
    system = {"llama_server_path": fake(tmp_path, answer_sec="5")}
    router = start({"system": system, "models": models(tiny, "busy")})
    with ThreadPoolExecutor(1) as client:
        chat = client.submit(router.chat, "busy")
        eventually(lambda: router.status("busy")["in_flight"] == 1)
        for path in ("/slots", "/slots?model=busy", "/upstream/busy/slots"):
            assert router.http.get(path).json() == {}
        assert router.http.get("/props").json()["model_path"] == "none"
        assert not chat.done()


def test_an_engine_that_loads_or_says_nothing_is_no_mystery(start: Start, tiny: Path, tmp_path: Path) -> None:
    system = {"llama_server_path": fake(tmp_path, load_sec="30")}
    router = start({"system": system, "models": models(tiny, "slow")})
    ask(router, "/models/load", model="slow")
    eventually(lambda: router.status("slow")["status"] == "loading")
    assert values(router) == {"slow": "loading"}
    answer = router.http.get("/slots")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_monitors_that_name_no_model_see_the_one_that_is_there(router: Router) -> None:
    """mtop and llamastat, which know llama-servers with one model, read these."""
    router.unload()
    nobodys = router.http.get("/props").json()
    assert (nobodys["role"], nobodys["model_path"]) == ("router", "none")
    assert nobodys["default_generation_settings"] == {"params": {}, "n_ctx": 0}
    assert refused(router, "GET", "/slots") == (400, "model_required")
    ask(router, "/v1/models/load", model="a")
    props = router.http.get("/props?autoload=false").json()
    assert (props["role"], props["model_alias"], Path(props["model_path"]).name) == ("router", "a", "tiny.gguf")
    assert props["default_generation_settings"]["n_ctx"] == 512
    assert len(router.http.get("/slots").json()) == 2
    named = dict(re.findall(r"^(llamacpp:\w+){.*} (\S+)$", router.http.get("/metrics").text, re.M))
    assert float(named["llamacpp:requests_processing"]) == 0
    ask(router, "/v1/models/load", model=REPO)
    assert refused(router, "GET", "/slots") == (400, "model_required")
    assert router.http.get("/v1/health", headers={"Authorization": ""}).json()["status"] == "ok"


# --- /upstream/MODEL/… as llama-swap has it -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "nick", "nick:latest", REPO, "hf.co/org/tiny-gguf", "org%2FTiny-GGUF"])
def test_an_engine_is_reached_under_its_models_name(router: Router, name: str) -> None:
    router.unload()
    props = router.http.get(f"/upstream/{name}/props")  # which loads it, as there
    alias = "a" if name[0] in "an" else REPO
    assert (props.status_code, props.headers["x-model-alias"], props.json()["total_slots"]) == (
        200,
        alias,
        2 if alias == "a" else 1,
    )
    body = {"model": "somebody else", "messages": HELLO, "max_tokens": 4}
    answer = router.http.post(f"/upstream/{name}/v1/chat/completions", json=body)
    assert answer.headers["x-model-alias"] == alias
    assert answer.json()["usage"]["completion_tokens"] == (2 if "nick" in name else 4)
    with router.http.stream(
        "POST", f"/upstream/{name}/v1/chat/completions", json={**body, "stream": True}
    ) as stream:
        assert list(stream.iter_lines())[-2] == "data: [DONE]"


def test_what_an_engine_has_not_is_its_own_answer(router: Router) -> None:
    def get(path: str) -> tuple[int, str]:
        return refused(router, "GET", path)

    assert get("/upstream/a/nowhere") == (404, "not_found")
    assert get("/upstream/a/%0d%0aX-Evil:%201") == (404, "not_found")
    assert get("/upstream/nix/props") == (404, "model_not_found")
    assert get("/upstream/a/" + "x" * 3_000) == (404, "not_found")
    assert get("/upstream/a/" + "x" * 30_000) == (404, "not_found")
    assert get("/upstream/a/" + "x" * 33_000) == (414, "target_too_long")  # engines hang up on it
    assert get("/upstream/" + "x/" * 10_000) == (400, "invalid_model")
    assert get("/upstream/") == (400, "model_required")
    page = router.http.get("/upstream/a/", headers={"Accept-Encoding": "gzip"})
    assert (page.status_code, "<html" in page.text) == (200, True)
    assert router.http.request("PATCH", "/upstream/a/props").status_code in (404, 405)
    counted = re.findall(r'router_requests_total{.*endpoint="(/upstream.*?)"', router.http.get("/metrics").text)
    assert set(counted) == {"/upstream"}  # no client makes labels


def test_who_may_only_use_models_changes_nothing_for_all(router: Router) -> None:
    some = {"Authorization": "Bearer some"}
    assert router.http.get("/upstream/a/slots", headers=some).status_code == 200
    chat = {"messages": HELLO, "max_tokens": 1}
    assert router.http.post("/upstream/a/v1/chat/completions", json=chat, headers=some).status_code == 200
    for path in ("lora-adapters", "slots/0?action=erase", "props", "nowhere"):
        assert router.http.post(f"/upstream/a/{path}", json=[], headers=some).status_code == 403, path
    assert router.http.get("/upstream/a/cors-proxy?url=x", headers=some).status_code == 403
    assert router.http.get("/upstream/a/slots", headers={"Authorization": ""}).status_code == 401
    assert router.http.post("/upstream/a/lora-adapters", json=[]).status_code == 200


# --- what else llama-swap has -------------------------------------------------------------------------------


def test_llama_swaps_clients_see_what_runs_and_unload_it(router: Router) -> None:
    router.unload()
    states: list[str] = []
    with router.http.stream("GET", "/api/events") as stream:
        lines = stream.iter_lines()

        def until(state: str) -> dict[str, Any]:
            for line in lines:
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    assert event["type"] == "modelStatus"
                    known = {model["id"]: model for model in json.loads(event["data"])}
                    states.append(known["a"]["state"])
                    if states[-1] == state:
                        return known
            raise AssertionError(states)

        known = until("stopped")
        assert known.keys() == {"a", REPO, "broken"}
        assert known["a"]["aliases"] == ["nick"]
        assert router.http.get("/running").json() == {"running": []}
        ask(router, "/v1/models/load", model="a")
        until("ready")
        (running,) = router.http.get("/running").json()["running"]
        assert running == {
            "model": "a",
            "state": "ready",
            "cmd": "",
            "proxy": "",
            "ttl": 300,
            "name": "",
            "description": "",
        }
        assert router.http.get("/unload").text == "OK"
        assert router.engines == []
        until("stopped")
    for path, answer in ("/api/models/unload/nick", "OK"), ("/api/models/unload", '{"msg":"ok"}'):
        ask(router, "/v1/models/load", model="a")
        assert router.http.post(path).text == answer
        assert router.engines == []
    assert router.http.post("/api/models/unload/nix").status_code == 404


def test_llama_swaps_clients_read_what_engines_say(router: Router) -> None:
    ask(router, "/v1/models/load", model="a")
    assert "llama" in router.http.get("/logs").text
    to_the_page = router.http.get("/logs", headers={"Accept": "text/html"})
    assert (to_the_page.status_code, to_the_page.headers["location"]) == (302, "./")
    for path in ("/logs/stream", "/logs/stream/upstream", "/logs/stream/nick"):
        with router.http.stream("GET", path) as stream:
            assert stream.headers["content-type"].startswith("text/plain")
            assert "llama" in next(stream.iter_text())
    with router.http.stream("GET", "/logs/stream/a?no-history") as stream:
        router.chat("a")
        assert "slot" in next(stream.iter_text())
    assert refused(router, "GET", "/logs/stream/nix") == (404, "model_not_found")
    assert refused(router, "GET", "/logs/stream/proxy") == (404, "not_found")


def test_reading_llama_swaps_way_takes_a_key_and_unloading_a_full_one(router: Router) -> None:
    ask(router, "/v1/models/load", model="a")
    some = {"Authorization": "Bearer some"}
    assert router.http.get("/running", headers=some).status_code == 200
    assert router.http.get("/running", headers={"Authorization": ""}).status_code == 401
    for path in ("/unload", "/logs", "/logs/stream", "/logs/stream/a"):
        assert router.http.get(path, headers=some).status_code == 403, path
    for path in ("/api/models/unload", "/api/models/unload/a"):
        assert router.http.post(path, headers=some).status_code == 403, path
    assert router.http.head("/unload").status_code == 405  # who only looks unloads nothing
    assert router.status("a")["status"] == "ready"
