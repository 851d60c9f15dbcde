"""The calls and variables of earlier hosts of models, for programs that were written for those."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, models, starting
from fake_hub import Hub, serving
from tiny_models import write_llama

REPO = "org/tiny-GGUF"
ALLOWED = {"small": f"{REPO}:Q8_0", "any": REPO, "large": "org/large-GGUF", "gone": "org/gone-GGUF"}
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub(home: Path) -> Iterator[Hub]:
    content = write_llama(home / "tiny.gguf").read_bytes()
    more = write_llama(home / "large.gguf", n_layer=6).read_bytes()
    tiny = {f"tiny-{label}.gguf": content for label in ("Q4_K_M", "Q8_0", "F16")}
    large = {"large-Q4_0.gguf": content, "large-BF16.gguf": more}
    with serving(Hub({REPO: tiny, "org/large-GGUF": large})) as hub:
        yield hub


@pytest.fixture(scope="module")
def router(hub: Hub, home: Path, tiny: Path) -> Iterator[Router]:
    api = {"api_keys": ["full"], "inference_keys": ["some"]}
    threshold = len(hub.repositories["org/large-GGUF"]["large-BF16.gguf"]) - 1
    with starting(home) as start:
        router = start(
            {"api": api, "models": models(tiny, "org/a"), "aliases": {"b": "org/a"}},
            HF_HOME=str(home / "hf"),
            HF_ENDPOINT=hub.url,
            HF_HUB_DISABLE_TELEMETRY="1",
            NO_PROXY="*",
            ALLOWED_MODELS_JSON=json.dumps(ALLOWED),
            MODEL_Q4_THRESHOLD_BYTES=str(threshold),
            MAX_CACHE_MODELS="7",
            MODEL_LOAD_COOLDOWN="60",
        )
        router.http.headers["Authorization"] = "Bearer full"
        yield router


def pull(router: Router, model: str, **more: Any) -> dict[str, Any]:
    answer = router.http.post("/pull", json={"model": model, **more})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_model_is_pulled_loaded_and_talked_to(router: Router, hub: Hub, home: Path) -> None:
    pulled = pull(router, "small", init=True)
    path = Path(pulled["backend"].pop("local_path"))
    assert pulled == {
        "status": "ok",
        "model": "small",
        "cached": False,
        "backend": {"preferred_quantized": True, "size_bytes": len(hub.repositories[REPO]["tiny-Q8_0.gguf"])},
    }
    assert path.is_relative_to(home / "hf" / "hub")
    assert (path.name, path.is_file()) == ("tiny-Q8_0.gguf", True)
    assert router.status("small")["status"] == "ready"
    assert pull(router, "small")["cached"] is True
    answer = router.http.post("/chat", json={"model": "small", "messages": HELLO, "options": {"num_predict": 2}})
    said = answer.json()
    assert answer.headers["content-type"].startswith("application/json")
    assert (said["model"], said["message"]["role"], said["done"], said["eval_count"]) == (
        "small",
        "assistant",
        True,
        2,
    )
    assert 0 < said["prompt_eval_duration"] + said["eval_duration"] <= said["total_duration"] < 60e9
    body = {"model": "small", "messages": HELLO, "stream": True, "options": {"num_predict": 2}}
    *_, last = map(json.loads, router.http.post("/chat", json=body).text.splitlines())
    assert (last["done"], last["eval_count"]) == (True, 2)


@pytest.mark.parametrize(
    ("model", "quantize", "file"),
    [
        (REPO, "q4", "tiny-Q4_K_M.gguf"),
        (REPO, "auto", "tiny-F16.gguf"),
        ("org/large-GGUF", "auto", "large-Q4_0.gguf"),
        ("org/large-GGUF", "no", "large-BF16.gguf"),
    ],
)
def test_quantize_chooses_the_file(router: Router, model: str, quantize: str, file: str) -> None:
    pulled = pull(router, model, quantize=quantize)
    assert Path(pulled["backend"]["local_path"]).name == file
    assert pulled["backend"]["preferred_quantized"] is ("16" not in file)
    assert pulled["model"] == f"{model}:{file.rpartition('-')[2].removesuffix('.gguf')}"
    assert router.http.get(f"/v1/models/{pulled['model']}").json()["source"] == "pulled"


def test_what_was_pulled_answers_to_the_name_it_was_asked_for_by(router: Router) -> None:
    for quantize in ("q4", "fp16"):
        pull(router, REPO, quantize=quantize)
    for path in ("/chat", "/v1/chat/completions"):
        answer = router.http.post(path, json={"model": REPO, "messages": HELLO, "max_tokens": 1})
        assert (answer.status_code, answer.headers["x-model-alias"]) == (200, f"{REPO}:Q4_K_M")
    which = router.http.delete(f"/v1/models/pulled/{REPO}")
    assert (which.status_code, f"'{REPO}:Q4_K_M', '{REPO}:F16'" in which.json()["error"]["message"]) == (409, True)


def test_what_was_not_pulled_is_not_downloaded_by_a_chat(router: Router, hub: Hub) -> None:
    asked = len(hub.asked)
    answer = router.http.post("/chat", json={"model": "gone", "messages": HELLO})
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("model 'gone' not found. ")
    assert "POST /pull" in answer.json()["error"]
    assert len(hub.asked) == asked


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({"model": "gone"}, 404, "not_found", "org/gone-GGUF"),
        ({"model": REPO, "quantize": "fp32"}, 404, "no_such_file", "it has F16, Q4_K_M, Q8_0"),
        ({"model": "small", "quantize": "q4"}, 400, "invalid_reference", "omit `quantize`"),
        ({"model": REPO, "quantize": "four bits"}, 400, "invalid_reference", "four bits"),
        ({"model": "org/other-GGUF"}, 403, "model_not_allowed", "small, any, large, gone"),
        ({"quantize": "q4"}, 400, "invalid_request", "model"),
    ],
)
def test_what_cannot_be_pulled_is_said(
    router: Router, body: dict[str, Any], status: int, code: str, words: str
) -> None:
    answer = router.http.post("/pull", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert words in answer.json()["error"]["message"]


def test_the_list_of_what_may_be_pulled_holds_for_every_way_to_pull(router: Router) -> None:
    assert router.http.post("/v1/models/pull", json={"model": "org/other-GGUF"}).status_code == 403
    refused = router.http.post("/api/pull", json={"model": "hf.co/org/other-GGUF"})
    assert (refused.status_code, "may not be pulled here" in refused.json()["error"]) == (403, True)
    assert router.http.post("/api/pull", json={"model": "any", "stream": False}).json() == {"status": "success"}
    assert "any" in router.http.get("/status").json()["models"]


def test_who_may_only_infer_chats_and_pulls_nothing(router: Router) -> None:
    some = {"Authorization": "Bearer some"}
    assert router.http.post("/pull", json={"model": "small"}, headers=some).status_code == 403
    body = {"model": "org/a", "messages": HELLO, "options": {"num_predict": 1}}
    assert router.http.post("/chat", json=body, headers=some).status_code == 200
    assert router.http.post("/chat", json=body, headers={"Authorization": ""}).status_code == 401


def test_models_are_loaded_listed_and_unloaded(router: Router, hub: Hub, tiny: Path) -> None:
    loaded = router.http.post("/v1/models", json={"model": "b", "device": "cpu"}).json()
    assert (loaded["id"], loaded["uses"], loaded["state"]) == ("b", "org/a", "ready")
    assert loaded["devices"] == ["host"]
    status = router.http.get("/status").json()
    assert (status["models"]["org/a"]["status"], status["engine"]) == ("ready", "embedded")
    assert (status["cache"]["limit"], "org/a" in status["cache"]["models"]) == (7, True)
    threshold = len(hub.repositories["org/large-GGUF"]["large-BF16.gguf"]) - 1
    assert status["variables"] == {
        "MAX_CACHE_MODELS": 7,
        "MODEL_LOAD_COOLDOWN": 60,
        "MODEL_Q4_THRESHOLD_BYTES": threshold,
        "ALLOWED_MODELS_JSON": ALLOWED,
    }
    assert status["failed_models"] == []
    assert status["models"]["org/a"]["vram_mb"] == status["models"]["org/a"]["vram_used_mb"] > 0
    assert router.http.delete("/v1/models/org/a").json()["model_ejected"] == "org/a"
    assert tiny.exists()
    assert router.http.delete("/v1/models/b").status_code == 404
    assert router.http.delete("/v1/models/nobody").json()["error"]["code"] == "model_not_found"
    assert router.http.post("/v1/models", json={"model": "nobody"}).status_code == 404
    assert "router_models_limit 7" in router.http.get("/metrics").text


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "'org/a' cannot be loaded on 'cuda': the router uses no GPU here."),
        ("tpu", "There is no device 'tpu': name `cpu` or `cuda`, or leave it out."),
    ],
)
def test_a_device_that_the_model_will_not_compute_on_is_refused(router: Router, device: str, words: str) -> None:
    answer = router.http.post("/v1/models", json={"model": "org/a", "device": device})
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": words,
        "type": "invalid_request_error",
        "param": "device",
        "code": "not_supported",
    }


def test_what_shapes_an_answer_may_stand_beside_the_messages(router: Router) -> None:
    asked = {"model": "org/a", "messages": HELLO, "seed": 7, "top_p": 0.9, "stop": ["\0"]}
    said = router.http.post("/chat", json={**asked, "max_tokens": 3, "temperature": 1.5}).json()
    assert (said["eval_count"], said["done_reason"]) == (3, "length")
    assert said["response"] == said["message"]["content"]
    again = router.http.post(
        "/chat", json={**asked, "options": {"num_predict": 9, "temperature": 1.5}, "max_tokens": 3}
    )
    assert again.json()["response"] == said["response"]
    settled = router.http.post("/chat", json={**asked, "max_tokens": 3, "temperature": 0}).json()
    as_ollama = {**asked, "stream": False, "options": {"num_predict": 3, "temperature": 0, "seed": 7}}
    del as_ollama["seed"], as_ollama["top_p"], as_ollama["stop"]
    assert router.http.post("/api/chat", json=as_ollama).json()["message"]["content"] == settled["response"]
    assert "response" not in router.http.post("/api/chat", json=as_ollama).json()


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 3), ("max_tokens", "three"), ("temperature", "warm")]
)
def test_what_is_not_understood_of_a_chat_is_refused(router: Router, name: str, value: Any) -> None:
    answer = router.http.post("/chat", json={"model": "org/a", "messages": HELLO, name: value})
    assert answer.status_code == 400
    assert name in answer.json()["error"]
