"""Model names in requests: one rule for all routes, unknown names, and requests without a name."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, models, run, starting

from router.config.names import candidates, listed_name, meant

NAMES = ["demo", "llama3:8b", "other/llama3:latest", "USER/Repo-GGUF:Q4_K_M"]
NAMES += ["two/of-them:Q4_0", "two/of-them:Q8_0"]
OF_THE_STORE = "hf.co/org/Stored-GGUF:Q4_0"
"""As Ollama calls what it has pulled from there."""


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("demo", "demo"),
        ("demo:latest", "demo"),
        ("demo:7b", None),
        ("llama3", None),
        ("llama3:8b", "llama3:8b"),
        ("other/llama3", "other/llama3:latest"),
        ("hf.co/USER/Repo-GGUF:Q4_K_M", "USER/Repo-GGUF:Q4_K_M"),
        ("hf.co/user/repo-gguf", "USER/Repo-GGUF:Q4_K_M"),
        ("user/repo-gguf:q4_k_m", "USER/Repo-GGUF:Q4_K_M"),
        ("huggingface.co/USER/Repo-GGUF:latest", "USER/Repo-GGUF:Q4_K_M"),
        ("USER/Repo-GGUF", "USER/Repo-GGUF:Q4_K_M"),
        ("USER/Repo-GGUF:Q8_0", None),
        ("hf.co/two/of-them", "two/of-them:Q4_0"),
        ("two/of-them", "two/of-them:Q4_0"),
        ("two/of-them:q8_0", "two/of-them:Q8_0"),
        ("org/Stored-GGUF", OF_THE_STORE),
        ("Demo", None),
        ("", None),
        ("/", None),
    ],
)
def test_what_is_meant_by_a_name(name: str, alias: str | None) -> None:
    assert meant(name, [*NAMES, OF_THE_STORE]) == alias


def test_what_leaves_the_quantization_open_may_be_several() -> None:
    assert candidates("hf.co/two/of-them", NAMES) == ["two/of-them:Q4_0", "two/of-them:Q8_0"]
    assert candidates("two/of-them:Q8_0", NAMES) == ["two/of-them:Q8_0"]


def test_what_ollamas_list_calls_a_model_means_it() -> None:
    assert [meant(listed_name(name), NAMES) for name in NAMES] == NAMES
    assert all(":" in listed_name(name) for name in NAMES)


def test_a_name_is_looked_for_among_thousands_at_once() -> None:
    many = {f"user{number}/Some-Model-{number}B-GGUF:Q4_K_M": number for number in range(5000)}
    assert meant("user77/other", many) is None
    began = time.thread_time()
    for number in range(100):
        name = f"hf.co/USER{number}/some-model-{number}b-gguf"
        assert meant(name, many) == f"user{number}/Some-Model-{number}B-GGUF:Q4_K_M"
    assert time.thread_time() - began < 0.2  # 20 ms; to go through all of them each time takes 500


REPO = "org/Tiny-GGUF"


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Router]:
    with starting(tmp_path_factory.mktemp("router")) as start:
        yield start(
            {
                "models": models(tiny, "tiny", f"{REPO}:Q8_0"),
                "aliases": {"nick": {"uses": "tiny", "forced": {"max_tokens": 2}}},
            }
        )


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("tiny:latest", "tiny"),
        ("nick:latest", "tiny"),
        (f"hf.co/{REPO}", f"{REPO}:Q8_0"),
        (f"hf.co/{REPO}:q8_0", f"{REPO}:Q8_0"),
        (f"{REPO}:latest", f"{REPO}:Q8_0"),
    ],
)
def test_every_route_knows_a_model_by_the_same_names(router: Router, name: str, alias: str) -> None:
    def get(path: str) -> Any:
        answer = router.http.get(path)
        assert answer.status_code == 200, (path, answer.text)
        return answer.json() if "json" in answer.headers["content-type"] else answer.text

    def post(path: str, **body: Any) -> Any:
        answer = router.http.post(path, json=body)
        assert answer.status_code == 200, (path, answer.text)
        return answer.json()

    messages = [{"role": "user", "content": "hi"}]
    assert post("/v1/models/load", model=name)["model"] == alias
    assert get(f"/v1/models/{name}").get("uses", alias) == alias
    assert get(f"/v1/models/{name}/status")["model"] == alias
    assert get(f"/status/{name}")["status"] == "ready"
    assert get(f"/vram/models/{name}")["model_alias"] == alias
    get(f"/v1/logs/{name}")
    for path in ("/v1/chat/completions", "/v1/messages"):
        answer = router.http.post(path, json={"model": name, "messages": messages, "max_tokens": 1})
        assert (answer.status_code, answer.headers["x-model-alias"]) == (200, alias)
    assert post("/api/chat", model=name, messages=messages, stream=False, options={"num_predict": 1})["done"]
    assert post("/api/show", model=name)["details"]["family"] == "llama"
    assert post(f"/v1/models/{name}/reset")["model"] == alias
    assert post("/v1/models/eject", model=name)["model_ejected"] == alias
    assert post("/v1/models", model=name).get("uses", alias) == alias
    assert router.http.delete(f"/v1/models/{name}").json()["model_ejected"] == alias
    removed = router.http.delete(f"/v1/models/pulled/{name}")
    assert (removed.status_code, "neither pulled nor created" in removed.text) == (404, True)


def test_an_alias_counts_whatever_tag_it_has(router: Router) -> None:
    usage = router.chat("nick:latest", max_tokens=5).json()["usage"]
    assert usage["completion_tokens"] == 2


ASKED = [
    ("POST", "/v1/chat/completions", {"messages": []}),
    ("POST", "/v1/models/load", {}),
    ("POST", "/v1/models/eject", {}),
    ("GET", "/v1/models/{name}", {}),
    ("GET", "/v1/models/{name}/status", {}),
    ("POST", "/v1/models/{name}/reset", {}),
    ("GET", "/v1/logs/{name}", {}),
    ("POST", "/api/chat", {"messages": []}),
    ("POST", "/api/show", {}),
    ("POST", "/chat", {"messages": []}),
]


@pytest.mark.parametrize(("method", "path", "body"), ASKED)
def test_what_is_not_there_is_said_with_what_may_be_meant_and_how_to_pull_it(
    router: Router, method: str, path: str, body: dict[str, Any]
) -> None:
    def error(name: str) -> str:
        more = {} if method == "GET" else {"json": {"model": name, **body}}
        answer = router.http.request(method, path.format(name=name), **more)
        assert answer.status_code == 404
        said = answer.json()["error"]
        return str(said if isinstance(said, str) else said["message"])

    assert error("tinny") == "model 'tinny' not found. Did you mean 'tiny'?"
    pull = "To pull it from the Hugging Face hub: POST /pull, or `llama-router pull {}`."
    repository = "hf.co/somebody/Else-GGUF:Q4_K_M"
    said = error(repository)
    assert said.startswith(f"model '{repository}' not found. ")
    assert said.endswith(pull.format(repository))


LONG = "é" * 257
NAMED_BY: list[tuple[str, str, dict[str, Any]]] = [
    *((method, path, {**body, **({} if method == "GET" else {"model": LONG})}) for method, path, body in ASKED),
    ("POST", "/v1/completions", {"model": LONG, "prompt": "a"}),
    ("POST", "/v1/embeddings", {"model": LONG, "input": "a"}),
    ("POST", "/v1/responses", {"model": LONG, "input": "a"}),
    ("POST", "/v1/messages", {"model": LONG, "messages": []}),
    ("POST", "/api/generate", {"model": LONG}),
    ("POST", "/api/embed", {"name": LONG}),
    ("POST", "/api/pull", {"name": LONG}),
    ("POST", "/api/copy", {"source": LONG, "destination": "b"}),
    ("POST", "/api/create", {"model": LONG, "from": "tiny"}),
    ("POST", "/api/create", {"model": "b", "from": LONG}),
    ("DELETE", "/api/delete", {"model": LONG}),
    ("POST", "/v1/models", {"model": LONG}),
    ("POST", "/models/unload", {"model": LONG}),
    ("POST", "/pull", {"model": f"hf.co/a/{LONG}"}),
    ("POST", "/v1/models/pull", {"model": "hf.co/a/b", "alias": LONG}),
    ("DELETE", "/v1/models/pulled/{name}", {}),
    ("DELETE", "/v1/models/{name}", {}),
    ("GET", "/status/{name}", {}),
    ("GET", "/vram/models/{name}", {}),
    ("GET", "/props?model={name}", {}),
    ("GET", "/upstream/{name}/props", {}),
    ("POST", "/upstream/{name}/v1/chat/completions", {}),
]


@pytest.mark.parametrize(("method", "path", "body"), NAMED_BY)
def test_a_name_that_is_too_long_is_refused_before_it_is_looked_for(
    router: Router, method: str, path: str, body: dict[str, Any]
) -> None:
    """And what is like it, which took seconds."""
    answer = router.http.request(method, path.format(name=LONG), json=None if method == "GET" else body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    if isinstance(error, dict) and "code" in error:
        assert error["code"] == "invalid_model"
    assert "256 characters" in answer.text or "invalid model name" in answer.text
    assert len(answer.text) < 1000


@pytest.mark.parametrize("character", ["a", "é", "\\u0041"])
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat", "/api/embed"]
)
def test_so_is_one_of_megabytes(router: Router, path: str, character: str) -> None:
    body = f'{{"messages": [], "model": "{character * 400_000}"}}'
    answer = router.http.post(path, content=body.encode())
    assert (answer.status_code, "256 characters" in answer.text) == (400, True), answer.text
    assert len(answer.text) < 1000


def test_a_form_may_not_name_one_either(router: Router) -> None:
    for name in (LONG, "x" * 2_000_000):
        files = {"file": ("a.wav", b"RIFF")}
        answer = router.http.post("/v1/audio/transcriptions", files=files, data={"model": name})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_model")


NO_NAME: tuple[dict[str, Any], ...] = ({}, {"model": ""}, {"model": None})


def test_who_names_no_model_of_several_is_told_what_there_is(router: Router) -> None:
    for name in NO_NAME:
        answer = router.http.post("/v1/chat/completions", json={"messages": [], **name})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_required")
        assert "'nick'" in answer.json()["error"]["message"]


def test_who_names_no_model_gets_the_only_one_or_the_default(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"models": models(tiny, "only"), "aliases": {"nick": "only"}})
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    for name in NO_NAME:
        assert router.http.post("/v1/chat/completions", json={**chat, **name}).headers["x-model-alias"] == "only"
        ollamas = router.http.post("/api/chat", json={**chat, **name, "stream": False}).json()
        assert (ollamas["model"], ollamas["done"]) == ("only", True)
        for path in ("/v1/models/eject", "/v1/models/load", "/api/show", "/api/pull"):  # it is requests that may
            assert router.http.post(path, json=name).status_code in (400, 404), path
        assert router.http.request("DELETE", "/api/delete", json=name).status_code == 400
    form = router.http.post("/v1/audio/transcriptions", files={"file": ("a.wav", b"RIFF" + b"\0" * 1000)})
    assert form.headers["x-model-alias"] == "only"
    config = {
        "api": {"default_model": "nick:latest"},
        "models": models(tiny, "a", "b"),
        "aliases": {"nick": {"uses": "b", "forced": {"max_tokens": 2}}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    router.http.post("/v1/config/reload", json={}).raise_for_status()
    for name in NO_NAME:
        answer = router.http.post("/v1/chat/completions", json={**chat, **name})
        assert (answer.headers["x-model-alias"], answer.json()["usage"]["completion_tokens"]) == ("b", 2)
    config["api"] = {"default_model": "gone"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "there is currently no model 'gone'" in run("check", cwd=tmp_path).stderr
    router.http.post("/v1/config/reload", json={}).raise_for_status()
    answer = router.http.post("/v1/chat/completions", json=chat)
    assert (answer.status_code, "'gone' not found" in answer.text) == (404, True)
