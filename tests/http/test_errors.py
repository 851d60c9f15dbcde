"""Errors are in the format of their route, and make clients do the right thing next."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from conftest import Router, Start, fake, models
from tiny_models import write_embedding

from router.store.demo import MODEL_PATH

CONTEXT = 256
LONG = "Hello world " * CONTEXT
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat")
BODY = {
    "model": "demo",
    "messages": [{"role": "user", "content": LONG}],
    "prompt": LONG,
    "input": LONG,
    "max_tokens": 5,
}


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    """A demo model with little room, one that embeds, and one whose engine takes no such flag."""
    embeds = write_embedding(tmp_path_factory.mktemp("models") / "embed.gguf", context_length=CONTEXT)
    return start_shared(
        {
            "models": {
                **models(MODEL_PATH, "demo", flags=["-c", str(CONTEXT), "-t", "1", "-np", "1"]),
                **models(embeds, "embed", flags=["-t", "1"]),
                **models(tiny, "misled", flags=["--nonsense"]),
                **models(tiny, "boundless", flags=["-c", "99999999999"]),
                **models(tiny, "giant", flags=["-t", "1"], footprint_mb=10**9),
                **models(tiny, "packed", flags=["-ctk", "q8_0"]),
                **models(tiny, "packed-unseen", flags=["-ctk", "q8_0"], footprint_mb=100),
            }
        }
    )


@pytest.fixture(scope="module")
def played(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    """Engines that refuse after their clients have heard that they wait."""
    error = {"code": 400, "message": "request (9 tokens) exceeds it", "type": "exceed_context_size_error"}
    entry = {"FAKE_LOAD_SEC": "0.4", "FAKE_EVENTS": "/dev/null"}
    answers = {
        "cramped": {"error": {**error, "n_prompt_tokens": 9, "n_ctx": 8}},
        "broken": {"error": {"code": 500, "message": "Compute error.", "type": "server_error"}},
        "silent": "",
    }
    statuses = {"cramped": "400", "broken": "500", "silent": "404"}
    entries = {
        alias: models(
            tiny,
            alias,
            env={**entry, "FAKE_ANSWER": json.dumps(said) if said else "", "FAKE_STATUS": statuses[alias]},
        )[alias]
        for alias, said in answers.items()
    }
    engine = fake(tmp_path_factory.mktemp("engine"))
    system = {"llama_server_path": engine, "max_concurrent_models": 3}
    return start_shared({"api": {"heartbeat_sec": 0.1}, "system": system, "models": entries})


class TestAPromptBeyondTheContext:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        "path", [path for path in ROUTES if path.startswith("/v1/") and "messages" not in path]
    )
    def test_on_openais_routes(self, router: Router, path: str, stream: bool) -> None:
        """litellm and aider go by the first phrase, opencode and pi by the second, Codex by the code."""
        answer = router.http.post(path, json={**BODY, "stream": stream})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (
            400,
            "invalid_request_error",
            "context_length_exceeded",
        )
        assert f"This model's maximum context length is {CONTEXT} tokens" in error["message"]
        assert "exceeds the available context size" in error["message"]
        assert error["n_ctx"] == CONTEXT < error["n_prompt_tokens"]
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["x-model-alias"] == "demo"

    def test_of_a_model_that_embeds(self, router: Router) -> None:
        error = router.http.post("/v1/embeddings", json={"model": "embed", "input": LONG}).json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "context_length_exceeded")
        assert f"This model's maximum context length is {CONTEXT} tokens" in error["message"]
        assert error["n_ctx"] == CONTEXT < error["n_prompt_tokens"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_on_anthropics_route(self, router: Router, stream: bool) -> None:
        """Claude Code reads the figures, and shortens what it has."""
        answer = router.http.post("/v1/messages", json={**BODY, "stream": stream})
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        said = answer.json()["error"]["message"].split()
        assert said[:4] == ["prompt", "is", "too", "long:"]
        assert int(said[4]) > int(said[7]) == CONTEXT

    def test_on_ollamas_route(self, router: Router) -> None:
        said = router.http.post("/api/chat", json={**BODY, "stream": False}).json()["error"]
        assert "exceeds the available context size" in said
        assert "not by num_ctx" in said

    def test_is_an_exception_with_a_code_to_openais_client(self, router: Router) -> None:
        with (
            openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.BadRequestError) as refused,
        ):
            client.chat.completions.create(model="demo", messages=BODY["messages"])
        assert refused.value.code == "context_length_exceeded"

    def test_is_said_in_a_stream_that_has_begun(self, played: Router) -> None:
        played.unload()
        body = {**BODY, "model": "cramped", "stream": True}
        *beats, said, end = played.http.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
        assert beats[0].startswith(": position 1")
        assert json.loads(said.removeprefix("data: "))["error"]["code"] == "context_length_exceeded"
        assert end == "data: [DONE]"
        played.unload()
        *beats, said = played.http.post("/v1/messages", json=body).text.strip().split("\n\n")
        assert beats[0].startswith(": position 1")
        assert said.startswith("event: error\ndata: ")
        assert "prompt is too long: 9 tokens > 8 maximum" in said

    def test_is_the_engines_refusal_for_those_who_count(self, router: Router) -> None:
        router.http.post("/v1/chat/completions", json=BODY)
        metrics = router.http.get("/metrics").text
        assert 'status="engine_refused"' in metrics
        assert 'status="engine_error"' not in metrics


def test_what_is_wrong_with_a_request_is_no_error_of_the_engine(router: Router) -> None:
    """It says 500, and clients would send it again and again."""
    answer = router.http.post("/v1/messages", json={"model": "demo", "max_tokens": 1})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "'messages' is required" in answer.json()["error"]["message"]
    answer = router.http.post("/v1/chat/completions", json={"model": "demo", "messages": [{"content": "hi"}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


def test_a_code_is_a_word_and_never_a_number(router: Router, played: Router) -> None:
    for body in ({"temperature": "hot"}, {"messages": 7}, {"max_tokens": "x"}):
        answer = router.http.post("/v1/chat/completions", json={**BODY, "messages": [], **body})
        assert answer.status_code == 400, answer.text
        assert isinstance(answer.json()["error"]["code"], str)
    infill = router.http.post("/infill", json={"model": "demo", "input_prefix": "a", "input_suffix": "b"})
    assert (infill.status_code, infill.json()["error"]["code"]) == (501, "not_supported")
    assert infill.headers["x-should-retry"] == "false"
    broken = played.chat("broken")
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "engine_error")
    assert "x-should-retry" not in broken.headers
    silent = played.chat("silent").json()["error"]
    assert (silent["code"], silent["message"]) == ("not_found", "The engine answers 404, without a reason.")


def test_who_would_try_in_vain_is_told_not_to(router: Router, start: Start, tiny: Path) -> None:
    misled = router.chat("misled")
    assert (misled.status_code, misled.headers["x-should-retry"]) == (503, "false")
    again = router.chat("misled")  # in its cooldown
    assert (again.status_code, again.headers["x-should-retry"]) == (503, "false")
    boundless = router.chat("boundless")  # is not even started
    assert (boundless.status_code, boundless.headers["x-should-retry"]) == (503, "false")
    for answer in (misled, again, boundless):
        assert "retry-after" not in answer.headers  # which Codex heeds, and not the other
    giant = router.chat("giant")
    assert (giant.status_code, giant.headers["x-should-retry"]) == (507, "false")
    body = {"model": "giant", "max_tokens": 1, "messages": []}
    assert router.http.post("/v1/messages", json=body).json()["error"]["type"] == "api_error"
    assert router.chat("nobody").headers["x-should-retry"] == "false"
    locked = start({"api": {"api_keys": ["secret"]}, "models": models(tiny, "a")})
    for path in ("/v1/messages", "/v1/models"):
        answer = locked.http.request("POST" if "messages" in path else "GET", path)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (401, "false")


def test_a_cache_that_the_engine_would_refuse_is_refused_before_it_starts(router: Router) -> None:
    """The engine itself, where the router was told what it takes and has not looked, shows that it would."""
    told = {alias: router.chat(alias).json()["error"]["message"] for alias in ("packed", "packed-unseen")}
    assert "its flags: -ctk cannot be q8_0: it packs 32 numbers at a time, and a head has 16" in told["packed"]
    assert told["packed-unseen"].startswith("'packed-unseen' did not load: exited with code 1: ")
    assert "block size 32 does not divide n_embd_head_k=16" in told["packed-unseen"]
