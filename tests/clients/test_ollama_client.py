"""Ollama's clients against the running router: the official one, and Open WebUI's calls as it makes them."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx2 as httpx
import ollama
import psutil
import pytest
from conftest import ROOT, Router, Start, eventually, fake, models
from tiny_models import write_embedding

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    embedding = write_embedding(tmp_path_factory.mktemp("models") / "embedding.gguf")
    flags = ["-c", "4096", "-np", "2", "-t", "1", "--ignore-eos"]
    return start_shared(
        {
            "models": {
                **models(tiny, "tiny", "other/tiny:q4", flags=flags),
                **models(embedding, "embed", flags=["--embedding", "-t", "1"]),
            }
        }
    )


@pytest.fixture
def client(router: Router) -> Iterator[ollama.Client]:
    with ollama.Client(router.url, timeout=60) as client:
        yield client


# --- what an engine answers ----------------------------------------------------------------------------


def test_chat_with_its_figures(client: ollama.Client, router: Router) -> None:
    router.unload()
    answer = client.chat("tiny", CHAT, options={"num_predict": 4, "temperature": 0, "seed": 1})
    assert answer.message.role == "assistant"
    assert answer.message.content
    assert (answer.model, answer.done, answer.done_reason) == ("tiny", True, "length")
    assert answer.eval_count == 4
    assert answer.prompt_eval_count > 0
    assert 0 < answer.load_duration < answer.total_duration < 60e9
    assert 0 < answer.prompt_eval_duration + answer.eval_duration <= answer.total_duration
    assert client.chat("tiny", CHAT, options={"num_predict": 1}).load_duration < answer.load_duration


def test_a_stream_says_what_the_engine_says(client: ollama.Client, router: Router) -> None:
    options = {"num_predict": 8, "temperature": 0, "stop": ["never to be seen"]}
    parts = list(client.chat("tiny:latest", CHAT, options=options, stream=True))
    untranslated = router.chat("tiny", max_tokens=8, temperature=0, stream=True).text
    events = [json.loads(line[6:]) for line in untranslated.splitlines() if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content") for event in events]
    assert [part.message.content for part in parts] == [*filter(None, pieces), ""]
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == 8
    assert parts[-1].done_reason == "length"
    assert all(part.model == "tiny:latest" for part in parts)


def test_generate_with_a_system_prompt_raw_and_with_probabilities(router: Router, client: ollama.Client) -> None:
    options = {"num_predict": 3}
    plain = client.generate("other/tiny:q4", "hi", options=options)
    assert (plain.response != "", plain.eval_count) == (True, 3)
    instructed = client.generate(
        "other/tiny:q4", "hi", system="Be brief, and say it in words of one syllable.", options=options
    )
    raw = client.generate("other/tiny:q4", "hi", raw=True, options=options)
    assert raw.prompt_eval_count < plain.prompt_eval_count < instructed.prompt_eval_count
    streamed = list(client.generate("other/tiny:q4", "hi", raw=True, options=options, stream=True))
    assert streamed[-1].eval_count == 3
    for asked in ({}, {"raw": True}):
        some = {"num_predict": 32}  # a token that is no whole character has no probability
        probable = client.generate("tiny", "hi", logprobs=True, top_logprobs=2, options=some, **asked)
        assert 0 < len(probable.logprobs) <= 32
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in probable.logprobs)
        body = {"model": "tiny", "prompt": "hi", "logprobs": True, "stream": False, "options": some, **asked}
        tokens = router.http.post("/api/generate", json=body).json()["logprobs"]
        assert [token["token"] for token in tokens] == [
            bytes(token["bytes"]).decode("utf-8", "replace") for token in tokens
        ]


def test_an_answer_keeps_to_a_format(start: Start) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": ["a", "b"]}}, "required": ["n"]}
    options = {"num_predict": 40}
    with ollama.Client(start().url, timeout=60) as client:
        answer = client.chat("demo", CHAT, format=schema, options=options).message.content
        assert re.match(r'\{\s*"n"\s*:\s*"[ab]', answer)
        answer = client.generate("demo", "hi", raw=True, format=schema, options=options).response
        assert re.match(r'\{\s*"n"\s*:\s*"[ab]', answer)
        assert client.generate("demo", "hi", format="json", options=options).response.startswith("{")


def test_embeddings_of_one_text_of_many_and_cut(client: ollama.Client) -> None:
    one = client.embed("embed", "a")
    many = client.embed("embed", ["a", "b"])
    assert (len(one.embeddings), len(many.embeddings)) == (1, 2)
    assert many.embeddings[0] == pytest.approx(one.embeddings[0], abs=1e-4)
    assert math.hypot(*one.embeddings[0]) == pytest.approx(1, abs=1e-4)
    assert many.prompt_eval_count > 0
    cut = client.embed("embed", "a", dimensions=4).embeddings[0]
    assert math.hypot(*cut) == pytest.approx(1, abs=1e-4)
    assert [x / cut[0] for x in cut] == pytest.approx(
        [x / one.embeddings[0][0] for x in one.embeddings[0][:4]], rel=1e-3
    )
    assert client.embeddings("embed", "a").embedding == pytest.approx(one.embeddings[0], abs=1e-4)
    assert client.embed("embed", "").embeddings == client.embed("embed", []).embeddings == []


# --- what the router knows -----------------------------------------------------------------------------


def test_models_are_listed_and_shown(router: Router, client: ollama.Client) -> None:
    listed = {model.model: model for model in client.list().models}
    assert set(listed) == {"tiny:latest", "other/tiny:q4", "embed:latest"}
    assert listed["tiny:latest"].size > 0
    assert listed["tiny:latest"].details.family == "llama"
    details = {entry["name"]: entry["details"] for entry in router.http.get("/api/tags").json()["models"]}
    assert (details["tiny:latest"]["context_length"], details["tiny:latest"]["embedding_length"]) == (2048, 64)
    assert (details["embed:latest"]["context_length"], details["embed:latest"]["embedding_length"]) == (512, 64)
    shown = client.show("tiny")
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.parameters.split() == ["num_ctx", "2048"]
    assert client.show("embed").capabilities == ["embedding"]
    for name in listed:  # whatever is listed can be asked for
        assert client.show(name).details.format == "gguf"


def test_a_model_stays_as_long_as_its_client_says(client: ollama.Client, router: Router) -> None:
    router.unload()
    assert client.ps().models == []
    assert client.generate("tiny", keep_alive="90m").done_reason == "load"
    client.chat("other/tiny:q4", [], keep_alive=-1)
    stays, expires = client.ps().models  # the one that stays longest comes first
    assert (stays.model, expires.model) == ("other/tiny:q4", "tiny:latest")
    left = expires.expires_at - datetime.now(timezone.utc)
    assert timedelta(minutes=89) < left <= timedelta(minutes=90)
    assert stays.expires_at.year > 2200
    assert expires.size > 0
    assert expires.context_length == 2048
    client.generate("tiny", keep_alive="9999999999h")  # no calendar reaches as far
    assert router.status("tiny")["unload_at"] is None
    assert all(model.expires_at.year > 2200 for model in client.ps().models)
    client.chat("tiny", CHAT, keep_alive=0, options={"num_predict": 1})
    router.until("tiny", "off")
    assert client.generate("other/tiny:q4", keep_alive=0).done_reason == "unload"
    router.until("other/tiny:q4", "off")
    assert client.ps().models == []


def test_a_model_that_is_unloaded_finishes_its_answers_first(client: ollama.Client, router: Router) -> None:
    stream = client.chat("tiny", CHAT, options={"num_predict": 300}, stream=True)
    next(stream)
    assert client.generate("tiny", keep_alive=0).done_reason == "unload"
    assert [part.eval_count for part in stream if part.done] == [300]
    router.until("tiny", "off")


def test_what_is_only_in_ollama_is_refused_with_what_to_do_instead(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="hf upload") as error:
        client.push("tiny")
    assert error.value.status_code == 501
    with pytest.raises(ollama.ResponseError, match="chat-template-file") as error:
        client.generate("tiny", "hi", template="{{ .Prompt }}")
    assert error.value.status_code == 400


# --- errors ----------------------------------------------------------------------------------------------


def test_errors_are_its_exceptions(client: ollama.Client) -> None:
    def error_of(call: Callable[[], object]) -> tuple[int, str]:
        with pytest.raises(ollama.ResponseError) as raised:
            call()
        return raised.value.status_code, raised.value.error

    status, reason = error_of(lambda: client.chat("tinny", CHAT))
    assert (status, reason) == (404, "model 'tinny' not found. Did you mean 'tiny'?")
    assert error_of(lambda: list(client.chat("nix", CHAT, stream=True)))[0] == 404
    assert error_of(lambda: client.show("nix"))[0] == 404
    assert error_of(lambda: client.delete("tiny"))[0] == 404  # it was not pulled
    status, reason = error_of(lambda: client.chat("tiny", CHAT, keep_alive="soon"))
    assert (status, "keep_alive" in reason) == (400, True)
    assert error_of(lambda: client.chat("tiny", CHAT, options={"temperature": "hot"}))[0] == 400
    assert error_of(lambda: client.chat("tiny", CHAT, think="deeply"))[0] == 400
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    assert error_of(lambda: client.chat("tiny", CHAT, tools=[tool])) == (400, "'tiny' does not support tools")
    assert error_of(lambda: client.generate("tiny", "hi", think="low")) == (
        400,
        "'tiny' does not support thinking",
    )
    assert client.chat("tiny", CHAT, think=False, options={"num_predict": 1}).done
    status, reason = error_of(lambda: client.chat("tiny", [{"role": "user", "content": "word " * 9000}]))
    assert status == 400
    assert "num_ctx" in reason  # which cannot be had by asking


JUNK = (b"", b"{", b"[]", b'"x"', b"{}", b'{"model": 3}', b'{"model": "\xff"}', b"[" * 5000, b'{"model": ""}')


def test_junk_is_answered_in_ollamas_words(router: Router) -> None:
    for path in ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/api/show", "/api/pull"):
        for body in (
            b"",
            b"{",
            b"[]",
            b'"x"',
            b"{}",
            b'{"model": 3}',
            b'{"model": "\xff"}',
            b"[" * 5000,
            b'{"model": ""}',
        ):
            answer = router.http.post(path, content=body)
            assert answer.status_code == 400, (path, body)
            assert isinstance(answer.json()["error"], str)
    for body in ('{"model": "tiny", "messages": 3}', '{"model": "tiny", "messages": [{"content": "x"}]}'):
        assert router.http.post("/api/chat", content=body).status_code == 400
    assert router.http.get("/api/chat").status_code == 405
    assert router.http.get("/api/nothing").json() == {"error": "There is no GET /api/nothing."}
    answer = router.http.post("/api/chat", json={"model": "tiny"}, headers={"X-Request-Priority": "9"})
    assert (answer.status_code, "high, normal or low" in answer.json()["error"]) == (400, True)


def test_a_client_that_leaves_frees_its_slot(client: ollama.Client, router: Router) -> None:
    stream = client.chat("tiny", CHAT, options={"num_predict": 3000}, stream=True)
    next(stream)
    assert router.http.get("/v1/queue/stats").json()["per_model"]["tiny"]["current_processing"] == 1
    stream.close()
    eventually(lambda: router.http.get("/v1/queue/stats").json()["summary"]["total_processing"] == 0)
    assert client.chat("tiny", CHAT, options={"num_predict": 2}).eval_count == 2


def test_an_engine_that_is_killed_in_a_stream_gives_an_error_line(client: ollama.Client, router: Router) -> None:
    stream = client.chat("tiny", CHAT, options={"num_predict": 3000}, stream=True)
    next(stream)
    psutil.Process(router.status("tiny")["pid"]).kill()
    with pytest.raises(ollama.ResponseError, match="was interrupted"):
        list(stream)
    assert client.chat("tiny", CHAT, options={"num_predict": 1}).eval_count == 1


def test_an_engine_that_dies_before_its_answer_is_replaced_unseen(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    engine = fake(tmp_path, die=f"once {tmp_path / 'death'}")
    router = start({"system": {"llama_server_path": engine}, "models": models(tiny, "a")})
    with ollama.Client(router.url) as client:
        assert [part.message.content for part in client.chat("a", CHAT, stream=True)] == ["0", "1", "2", ""]
    assert router.status("a")["status"] == "ready"
    assert (tmp_path / "death").exists()


def test_keys_and_what_they_are_for(start: Start, tiny: Path) -> None:
    router = start({"api": {"api_keys": ["full"], "inference_keys": ["some"]}, "models": models(tiny, "tiny")})

    def status_of(call: Callable[[ollama.Client], object], key: str | None) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with ollama.Client(router.url, headers=headers) as client:
            try:
                call(client)
            except ollama.ResponseError as error:
                return error.status_code
        return 200

    calls: dict[Callable[[ollama.Client], object], tuple[int, int, int]] = {
        lambda client: client.chat("tiny", CHAT, options={"num_predict": 1}, keep_alive=0): (401, 200, 200),
        lambda client: client.show("tiny"): (401, 200, 200),
        lambda client: client.list(): (401, 200, 200),
        lambda client: client.generate("tiny", keep_alive=0): (401, 403, 200),
        lambda client: client.pull("not a name"): (401, 403, 400),
        lambda client: client.delete("tiny"): (401, 403, 404),
    }
    for call, expected in calls.items():
        assert tuple(status_of(call, key) for key in (None, "some", "full")) == expected
    # A key for inference does not say how long a model stays.
    with ollama.Client(router.url, headers={"Authorization": "Bearer some"}) as client:
        client.chat("tiny", CHAT, options={"num_predict": 1}, keep_alive=0)
        client.chat("tiny", CHAT, options={"num_predict": 1})
        assert [model.model for model in client.ps().models] == ["tiny:latest"]


def test_a_second_port_for_clients_that_know_one_only(start: Start, free_port: int, tiny: Path) -> None:
    config = {"api": {"ollama_port": free_port}, "models": models(tiny, "tiny")}
    router = start(config)
    with ollama.Client(f"http://127.0.0.1:{free_port}", timeout=60) as client:
        assert client.chat("tiny", CHAT, options={"num_predict": 1}).done
    assert router.chat("tiny").headers["x-load-ms"] == "0"  # it is the same router
    arguments = [sys.executable, str(ROOT / "run.py"), "--port", "0", "--ollama-port", str(free_port)]
    second = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert second.returncode != 0
    assert f"Port {free_port} on 127.0.0.1 is in use" in second.stderr
    assert "--ollama-port" in second.stderr


# --- what no small model does on demand ------------------------------------------------------------------


class Played:
    """A router whose engine streams what it is told to, and what that engine was asked."""

    def __init__(self, start: Start, tiny: Path, folder: Path) -> None:
        self.events = folder / "events"
        self.notes = folder / "notes"
        engine = fake(folder, events=str(self.events), notes=str(self.notes))
        flags = ["--chat-template", "{{ tools }}{{ enable_thinking }}"]
        self.router = start({"system": {"llama_server_path": engine}, "models": models(tiny, "a", flags=flags)})
        self.client = ollama.Client(self.router.url, timeout=20)

    def plays(self, *events: dict[str, Any] | str) -> None:
        lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
        self.events.write_text("\n".join(lines))

    @property
    def asked(self) -> tuple[str, dict[str, Any]]:
        path, _, body = self.notes.read_text().splitlines()[-1].partition(" ")
        return path, json.loads(body)


@pytest.fixture(scope="module")
def played(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    played = Played(start_shared, tiny, tmp_path_factory.mktemp("played"))
    with played.client:
        yield played


def delta(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def end(reason: str = "stop") -> dict[str, Any]:
    timings = {"cache_n": 3, "prompt_n": 4, "prompt_ms": 5.0, "predicted_n": 6, "predicted_ms": 7.0}
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}], "timings": timings}


def call_piece(index: int, name: str | None = None, arguments: str = "", **more: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
    return delta(tool_calls=[{"index": index, "function": function, **more}])


def test_tools_are_called_and_their_results_go_back(played: Played) -> None:
    played.plays(
        delta(role="assistant", content=None),
        call_piece(0, "add", id="one", type="function"),
        call_piece(0, arguments='{"a": 1,'),
        call_piece(0, arguments=' "b": 2}'),
        call_piece(1, "now", id="two", type="function"),
        end("tool_calls"),
        "[DONE]",
    )

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    parts = list(played.client.chat("a", CHAT, tools=[add], stream=True))
    assert [part.done for part in parts] == [False, True]
    calls = parts[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("add", {"a": 1, "b": 2}),
        ("now", {}),
    ]
    last = parts[-1]
    assert (last.done_reason, last.prompt_eval_count, last.eval_count) == ("stop", 7, 6)
    assert (last.prompt_eval_duration, last.eval_duration) == (5_000_000, 7_000_000)
    path, asked = played.asked
    assert path == "/v1/chat/completions"
    assert asked["tools"][0]["function"]["name"] == "add"

    results = [*CHAT, parts[0].message, {"role": "tool", "tool_name": "add", "content": "3"}]
    list(played.client.chat("a", results, stream=True))
    _, assistant, tool = played.asked[1]["messages"]
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": 2}
    assert assistant["tool_calls"][0]["type"] == "function"
    assert tool == {"role": "tool", "name": "add", "content": "3"}


def test_a_call_that_was_cut_off_is_shown_as_it_is(played: Played) -> None:
    played.plays(call_piece(0, "add", '{"a": 1', id="one"), end("length"), "[DONE]")
    torn, last = played.client.chat("a", CHAT, stream=True)
    assert (torn.message.content, torn.message.tool_calls) == ('{"a": 1', None)
    assert last.done_reason == "length"


def test_thoughts_are_apart_from_the_answer(played: Played) -> None:
    played.plays(
        delta(reasoning_content="Hm"), delta(reasoning_content="!"), delta(content="Yes"), end(), "[DONE]"
    )
    parts = list(played.client.chat("a", CHAT, think=True, stream=True))
    assert [part.message.thinking for part in parts] == ["Hm", "!", None, None]
    assert "".join(part.message.content for part in parts) == "Yes"
    assert played.asked[1]["chat_template_kwargs"] == {"enable_thinking": True}
    generated = list(played.client.generate("a", "hi", think="low", stream=True))
    assert [part.thinking for part in generated] == ["Hm", "!", None, None]
    assert played.asked[1]["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "low"}
    thought = {"role": "assistant", "thinking": "Hm!", "content": "Yes"}
    list(played.client.chat("a", [*CHAT, thought, *CHAT], think=False, stream=True))
    assert played.asked[1]["messages"][1] == {"role": "assistant", "content": "Yes", "reasoning_content": "Hm!"}
    assert played.asked[1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_images_and_options_reach_the_engine(played: Played) -> None:
    played.plays(delta(content="A cat."), end(), "[DONE]")
    png = b"\x89PNG\r\n\x1a\n and so on, up to the last byte"
    options = {"num_predict": 5, "top_k": 7, "min_p": 0.1, "stop": ["."], "num_ctx": 8192, "repeat_penalty": 1.1}
    list(played.client.chat("a", [{**CHAT[0], "images": [png]}], options=options, stream=True))
    _, asked = played.asked
    text, image = asked["messages"][0]["content"]
    assert text == {"type": "text", "text": "hi"}
    assert image["image_url"]["url"] == f"data:image/png;base64,{base64.b64encode(png).decode()}"
    asked_for = {"n_predict": 5, "top_k": 7, "min_p": 0.1, "stop": ["."], "repeat_penalty": 1.1}
    assert {name: asked[name] for name in asked_for} == asked_for
    assert not {"num_ctx", "temperature", "top_p"} & set(asked)  # only what was set, and can be
    list(played.client.generate("a", "def f(", suffix="return 1", stream=True))
    path, asked = played.asked
    assert (path, asked["input_prefix"], asked["input_suffix"]) == ("/infill", "def f(", "return 1")


def test_an_error_within_a_stream_is_its_last_line(played: Played) -> None:
    for broken in ({"error": {"code": 500, "message": "out of luck"}}, '{"choices": 3}'):
        played.plays(delta(content="Yes"), broken, delta(content="unheard"), "[DONE]")
        with played.router.http.stream("POST", "/api/chat", json={"model": "a", "messages": CHAT}) as stream:
            first, last = map(json.loads, stream.iter_lines())
        assert stream.status_code == 200
        assert first["message"]["content"] == "Yes"
        assert list(last) == ["error"]
        assert ("out of luck" if isinstance(broken, dict) else "cannot be read") in last["error"]


# --- Open WebUI -------------------------------------------------------------------------------------------


class OpenWebui:
    """Calls as its backend makes them (open_webui/routers/ollama.py), with what it makes of the answers."""

    def __init__(self, router: Router) -> None:
        headers = {
            "Content-Type": "application/json",
            "X-OpenWebUI-User-Name": "Ann",
            "X-OpenWebUI-User-Role": "user",
        }
        self.http = httpx.Client(base_url=router.url, headers=headers, timeout=60)

    def document(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        answer = self.http.request(method, path, content=json.dumps(body) if body else None)
        # aiohttp's `json()`, by which it reads answers and errors, refuses any other type.
        assert re.match(r"application/([\w.+-]+?\+)?json(;|$)", answer.headers["content-type"])
        return {"status": answer.status_code, **answer.json()}

    def lines(self, path: str, **body: Any) -> list[dict[str, Any]]:
        with self.http.stream("POST", path, content=json.dumps(body)) as stream:
            assert (stream.status_code, stream.headers["content-type"]) == (200, "application/x-ndjson")
            return [json.loads(line) for line in stream.iter_lines()]


@pytest.fixture
def webui(router: Router) -> Iterator[OpenWebui]:
    webui = OpenWebui(router)
    with webui.http:
        yield webui


def test_open_webui_connects_lists_the_models_and_shows_what_is_wrong(webui: OpenWebui, router: Router) -> None:
    router.unload()
    assert webui.http.get("/").text == "Ollama is running"
    assert webui.http.head("/").status_code == 200
    version = webui.document("GET", "/api/version")["version"]
    assert [int(number) for number in re.sub(r"^v|-.*", "", version).split(".")] > [0, 5, 0]
    models = {model["model"]: model for model in webui.document("GET", "/api/tags")["models"]}
    assert set(models) == {"tiny:latest", "other/tiny:q4", "embed:latest"}
    for name, model in models.items():
        assert (model["name"], type(model["size"]), len(model["digest"])) == (name, int, 64)
        assert {"parameter_size", "quantization_level"} < set(model["details"])
        assert webui.document("POST", "/api/show", name=name, model=name)["status"] == 200
    assert webui.document("GET", "/api/ps")["models"] == []
    gone = webui.document("POST", "/api/chat", model="gone:latest", messages=CHAT, stream=True)
    assert (gone["status"], "not found" in gone["error"]) == (404, True)
    refused = webui.document("POST", "/api/pull", name="llama3", model="llama3", insecure=True)
    assert (refused["status"], "USER/REPO" in refused["error"]) == (400, True)
    kept = webui.document("DELETE", "/api/delete", name="tiny:latest", model="tiny:latest")
    assert (kept["status"], "pulled" in kept["error"]) == (404, True)


def test_open_webui_chats_and_unloads(webui: OpenWebui, router: Router) -> None:
    router.unload()
    chat = {
        "model": "tiny:latest",
        "messages": CHAT,
        "options": {"num_predict": 2, "stop": ["x"]},
        "keep_alive": "5m",
    }
    last = webui.lines("/api/chat", **chat, stream=True)[-1]
    assert last["done"]
    assert last["eval_count"] / last["eval_duration"] > 0
    titled = webui.document("POST", "/api/chat", **chat, stream=False)
    assert titled["message"]["content"]
    by_openai = webui.document("POST", "/v1/chat/completions", model="tiny:latest", messages=CHAT, max_tokens=2)
    assert by_openai["choices"][0]["message"]["content"]
    (loaded,) = webui.document("GET", "/api/ps")["models"]
    assert loaded["name"] == loaded["model"] == "tiny:latest"
    assert datetime.fromisoformat(loaded["expires_at"]).timestamp() > time.time()
    unloaded = webui.document("POST", "/api/generate", model="tiny:latest", keep_alive=0, prompt="")
    assert (unloaded["status"], unloaded["done_reason"]) == (200, "unload")
    router.until("tiny", "off")
    assert webui.document("GET", "/api/ps")["models"] == []
    again = webui.document("POST", "/api/generate", model="tiny:latest", prompt="")
    assert (again["done"], again["done_reason"]) == (True, "load")


def test_a_person_who_opens_the_root_is_told_where_they_are(router: Router) -> None:
    page = router.http.get("/", headers={"Accept": "text/html,*/*"})
    assert "llama-router" in page.text


def test_ollamas_requests_are_counted_with_their_routes(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "tiny")})
    client = httpx.Client(base_url=router.url, headers={"X-Request-Priority": "low"})
    with client:
        client.post("/api/chat", json={"model": "tiny", "messages": CHAT, "options": {"num_predict": 3}})
        client.post("/api/chat", json={"model": "nobody", "messages": CHAT})
        client.post("/api/generate", json={"model": "tiny", "keep_alive": 0})
    metrics = router.http.get("/metrics").text
    assert re.search(
        r'router_requests_total\{model="tiny",endpoint="/api/chat",priority="low",status="served"\} 1', metrics
    )
    assert re.search(r'router_output_tokens_total\{model="tiny"\} 3', metrics)
    assert 'model="nobody"' not in metrics
