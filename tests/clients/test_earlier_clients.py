"""Clients of the five hosts that this router succeeds: each request as they send it, and what they read of it.

Their variables, pulls and refusals are in `test_earlier_hosts.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import Router, Start, models
from hf_models import played_transformers, write_model
from tiny_models import write_embedding

TESTS = Path(__file__).parent.parent
JSON = {"Content-Type": "application/json"}
QWEN = "Qwen/Qwen2-72B-Chat"


@pytest.fixture(scope="module")
def router(start_shared: Start, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Router:
    """Models of every format: in safetensors with and without a chat template, of another server, and in GGUF."""
    folder = tmp_path_factory.mktemp("models")
    transformers = played_transformers(folder)
    in_safetensors = {
        name: {"engine": "transformers", "model_path": str(write_model(folder / str(number), **more))}
        for number, (name, more) in enumerate({QWEN: {}, "gpt2": {"chat_template": None}}.items())
    }
    gateway = {
        "engine": "command",
        "cmd": [sys.executable, str(TESTS / "openai_server.py"), "--port", "{port}", "--name", "{alias}"],
    }
    embedding = write_embedding(folder / "embedding.gguf")
    return start_shared(
        {
            "system": {"transformers_path": str(transformers), "stop_grace_sec": 3, "max_concurrent_models": 9},
            "models": {
                **in_safetensors,
                **models(tiny, "my/model", "qwen-7b"),
                "embedding-model": {"model_path": str(embedding)},
                "gemma3-4B": gateway,
            },
        }
    )


def asked(content: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}


class TestOneFile:
    """A server in one file, with one model of vLLM at a time."""

    def test_chat(self, router: Router) -> None:
        answer = router.http.post("/chat", json={"model": QWEN, **asked("Hello!", max_tokens=100)})
        assert (answer.status_code, answer.json()["model"]) == (200, QWEN)
        assert isinstance(answer.json()["response"], str)
        assert answer.json()["response"]

    def test_models(self, router: Router) -> None:
        assert QWEN in [entry["model"] for entry in router.http.get("/models").json()["models"]]


class TestOllamaLike:
    """A server with Ollama's answers, on vLLM or Transformers."""

    @pytest.mark.parametrize("model", ["my/model", QWEN, "gpt2", "gemma3-4B"])
    def test_chat(self, router: Router, model: str) -> None:
        answer = router.http.post("/chat", json={"model": model, **asked("Who are you?", max_tokens=256)})
        said = answer.json()
        assert (said["model"], said["message"]["role"], said["done"]) == (model, "assistant", True)
        assert said["done_reason"] in ("stop", "length")
        assert "T" in said["created_at"]
        for figure in ("total_duration", "load_duration", "prompt_eval_count", "eval_count", "eval_duration"):
            assert isinstance(said[figure], int)
        assert said["eval_count"] > 0

    def test_models(self, router: Router) -> None:
        router.http.post("/chat", json={"model": QWEN, **asked("Hello")})
        listed = {entry["model"]: entry for entry in router.http.get("/models").json()["models"]}
        wanted = {"model", "description", "loaded", "backend", "size_bytes", "load_duration"}
        assert all(wanted <= entry.keys() for entry in listed.values())
        assert (listed[QWEN]["loaded"], listed[QWEN]["backend"]) == (True, "transformers")
        assert listed[QWEN]["load_duration"] > 0
        backends = {name: listed[name]["backend"] for name in ("my/model", "gemma3-4B")}
        assert backends == {"my/model": "llama.cpp", "gemma3-4B": "command"}

    def test_status(self, router: Router) -> None:
        told = router.http.get("/status").json()
        assert {"models", "cache", "failed_models", "variables"} <= told.keys()
        assert told["failed_models"] == []


class TestSimpleHost:
    """A host of OpenAI's API on Transformers, with models that are loaded and unloaded by calls."""

    def test_a_model_is_loaded_asked_and_unloaded(self, router: Router) -> None:
        loaded = router.http.post("/v1/models", content='{"model": "gpt2", "device": "cpu"}', headers=JSON)
        assert (loaded.status_code, loaded.json()["id"], loaded.json()["state"]) == (200, "gpt2", "ready")
        assert "gpt2" in [card["id"] for card in router.http.get("/v1/models").json()["data"]]
        system = {"role": "system", "content": "You are a helpful assistant."}
        body = {"model": "gpt2", "messages": [system, {"role": "user", "content": "What is AI?"}]}
        answer = router.http.post("/v1/chat/completions", json={**body, "max_tokens": 100, "temperature": 0.7})
        assert answer.json()["choices"][0]["message"]["content"]
        assert answer.json()["usage"]["completion_tokens"] > 0
        answer = router.http.post("/v1/chat/completions", json={"model": "gpt2", **asked("Hello!", max_tokens=50)})
        assert answer.json()["choices"][0]["message"]["content"]
        unloaded = router.http.delete("/v1/models/gpt2")
        assert (unloaded.status_code, router.status("gpt2")["status"]) == (200, "off")

    def test_openais_library(self, router: Router) -> None:
        with openai.OpenAI(base_url=f"{router.url}/v1", api_key="not-needed") as client:
            response = client.chat.completions.create(
                model="gpt2", messages=[{"role": "user", "content": "Hello!"}]
            )
        assert response.choices[0].message.content

    def test_its_pages(self, router: Router) -> None:
        assert [router.http.get(path).status_code for path in ("/docs", "/redoc")] == [200, 200]

    def test_a_call_that_manages_has_to_say_that_it_is_json(self, router: Router) -> None:
        """`curl -d` alone says that it is a form, which any web page may send without being asked."""
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = router.http.post("/v1/models", content='{"model": "gpt2", "device": "cpu"}', headers=form)
        assert answer.status_code == 400
        assert "application/json" in answer.json()["error"]["message"]

    def test_a_gpu_that_is_not_there_is_refused(self, router: Router) -> None:
        answer = router.http.post("/v1/models", json={"model": "gpt2", "device": "cuda"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_supported")


class TestEarlierRouter:
    """A router in front of llama-server."""

    def test_chats_and_embeddings(self, router: Router) -> None:
        system = {"role": "system", "content": "You are a helpful assistant."}
        body = {"model": "qwen-7b", "messages": [system, {"role": "user", "content": "Hello!"}], "max_tokens": 4}
        answer = router.http.post("/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["message"]["content"]
        answer = router.http.post("/v1/chat/completions", json=body, headers={"X-Request-Priority": "high"})
        assert answer.status_code == 200
        words = {"model": "embedding-model", "input": "The quick brown fox"}
        assert len(router.http.post("/v1/embeddings", json=words).json()["data"][0]["embedding"]) > 1

    def test_a_stream(self, router: Router) -> None:
        body = {"model": "qwen-7b", **asked("Tell me a story", stream=True, max_tokens=4)}
        with router.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            *chunks, last = [line for line in answer.iter_lines() if line.startswith("data: ")]
        assert last == "data: [DONE]"
        assert "".join(json.loads(c[6:])["choices"][0]["delta"].get("content") or "" for c in chunks)

    def test_models_are_listed_watched_and_unloaded(self, router: Router) -> None:
        router.chat("qwen-7b")
        assert "qwen-7b" in [card["id"] for card in router.http.get("/v1/models").json()["data"]]
        told = router.http.get("/v1/models/status").json()
        assert told["server"]["status"] == "ready"
        model = told["models"]["qwen-7b"]
        assert (model["status"], model["port"] > 0, "vram_mb" in model) == ("ready", True, True)
        assert {"ready", "off"} <= told["summary"].keys()
        assert router.http.get("/v1/models/qwen-7b/status").json()["status"] == "ready"
        with router.http.stream("GET", "/v1/models/status/stream") as stream:
            lines = stream.iter_lines()
            assert next(line for line in lines if line.startswith("event:")) == "event: full_status"
            assert "qwen-7b" in json.loads(next(line for line in lines if line.startswith("data:"))[5:])["models"]
            ejected = router.http.post("/v1/models/eject", json={"model": "qwen-7b"}).json()
            assert (ejected["status"], ejected["model_ejected"]) == ("success", "qwen-7b")
            update = next(line for line in lines if line == "event: model_update")
            told = json.loads(next(lines)[5:])
            assert (update, told["alias"], "status" in told) == ("event: model_update", "qwen-7b", True)
        assert router.http.post("/v1/models/qwen-7b/reset").json()["status"] == "success"
        assert router.http.get("/v1/models/failed").json() == {"failed_models": []}

    @pytest.mark.parametrize(
        ("path", "keys"),
        [
            ("/health", {"status", "checks"}),
            ("/vram", {"gpu_info", "models", "loaded_models_count", "status"}),
            ("/v1/queue/stats", {"summary", "per_model"}),
            ("/v1/telemetry/summary", {"total_requests", "successful", "success_rate", "by_model"}),
        ],
    )
    def test_monitoring(self, router: Router, path: str, keys: set[str]) -> None:
        answer = router.http.get(path)
        assert answer.status_code == 200
        assert keys <= answer.json().keys()

    def test_metrics(self, router: Router) -> None:
        router.chat("qwen-7b")
        assert router.http.get("/v1/health/models").status_code == 200
        text = router.http.get("/metrics").text
        for name in ("router_requests_total", "router_model_vram_bytes", "router_queue_depth"):
            assert f'{name}{{model="qwen-7b"' in text
        with router.http.stream("GET", "/metrics/stream") as stream:
            lines = stream.iter_lines()
            assert next(line for line in lines if line.startswith("event:")) == "event: metrics"
            assert {"timestamp", "server", "gpu", "models", "totals"} <= json.loads(next(lines)[5:]).keys()


class TestGateway:
    """A gateway in front of one container of vLLM."""

    @pytest.mark.parametrize("content", ["What are the top 3 benefits of using Docker?"])
    def test_a_chat(self, router: Router, content: str) -> None:
        body = json.dumps({"model": "gemma3-4B", **asked(content)})
        answer = router.http.post("/v1/chat/completions", content=body, headers=JSON)
        assert answer.json()["choices"][0]["message"]["content"] == content
        assert answer.json()["model"] == "gemma3-4B"
