"""Models on `transformers serve`: its peculiarities do not reach clients, and what it cannot do is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import anthropic
import httpx2 as httpx
import ollama
import openai
import pytest
from conftest import Router, Start, eventually, run
from hf_models import LLAMA, played_transformers, write_model
from hypothesis import given
from hypothesis import strategies as st

from router.engines.transformers.answers import Cut

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def model(folder: Path, **entry: Any) -> dict[str, Any]:
    return {"engine": "transformers", "model_path": str(folder), **entry}


@pytest.fixture(scope="module")
def router(start_shared: Start, tmp_path_factory: pytest.TempPathFactory) -> Router:
    folder = tmp_path_factory.mktemp("hf")
    chatty = write_model(folder / "chatty")
    plain = write_model(folder / "plain", chat_template=None)
    bert = write_model(folder / "bert", {**LLAMA, "architectures": ["BertForMaskedLM"]})
    config = {
        "system": {"transformers_path": str(played_transformers(folder)), "stop_grace_sec": 3},
        "models": {"chatty": model(chatty), "plain": model(plain), "bert": model(bert)},
        "aliases": {"calm": {"uses": "chatty", "defaults": {"temperature": 0}, "system_prompt": "Be calm."}},
    }
    return start_shared(config)


def chat(router: Router, content: str, model: str = "chatty", **more: Any) -> httpx.Response:
    return router.chat(model, content=content, **{"max_tokens": 100, **more})


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def last_seen(router: Router, model: str = "chatty") -> dict[str, Any]:
    seen: dict[str, Any] = router.http.get(f"/upstream/{model}/seen").json()["requests"][-1]
    return seen


def refusal(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


# --- answers -----------------------------------------------------------------------------------------------------


def test_a_document_is_put_together_of_a_stream(router: Router) -> None:
    answer = chat(router, "one two three")
    assert answer.status_code == 200, answer.text + router.log
    document = answer.json()
    assert document.pop("id").startswith("chatcmpl-")
    assert document == {
        "object": "chat.completion",
        "created": 1,
        "model": "chatty",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "one two three"},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }
    assert answer.headers["content-type"].startswith("application/json")


def test_a_stream_is_one_that_openais_client_knows(router: Router) -> None:
    client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="-", max_retries=0)
    messages: Any = [{"role": "user", "content": "one two three"}]
    with client.chat.completions.create(
        model="chatty", messages=messages, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = stream
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["one", " two", " three", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage and last.usage.total_tokens) == ([], 10)


def test_a_stream_ends_with_done_and_completions_are_no_chats(router: Router) -> None:
    asked = {"model": "plain", "prompt": "one two", "stream": True, "max_tokens": 1}
    *events, end = router.http.post(COMPLETION, json=asked).text.strip().split("\n\n")
    assert end == "data: [DONE]"
    choices = [choice for event in events for choice in json.loads(event[6:])["choices"]]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [("one", None), ("", "length")]
    whole = router.http.post(COMPLETION, json={**asked, "stream": False, "max_tokens": 2}).json()
    assert (whole["object"], whole["choices"][0]["text"]) == ("text_completion", "one two")


def test_requests_are_counted_with_their_tokens(router: Router) -> None:
    def output() -> float:
        lines = router.http.get("/metrics").text.splitlines()
        name = 'router_output_tokens_total{model="chatty"}'
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    chat(router, "one")
    before = output()
    chat(router, "one two three four")
    chat(router, "one two three", stream=True)
    eventually(lambda: output() == before + 7)


@pytest.mark.parametrize("streams", [False, True])
def test_a_text_that_stops_the_answer_is_no_part_of_it(router: Router, streams: bool) -> None:
    answer = chat(router, "one two three", stop=["wo th", "zzz"], stream=streams)
    if streams:
        events = [json.loads(event[6:]) for event in answer.text.strip().split("\n\n")[:-1]]
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
    else:
        text = text_of(answer)
    assert text == "one t"
    assert '"finish_reason":"stop"' in answer.text


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_text_is_cut_at_a_stop_however_it_comes(text: str, stops: list[str], data: st.DataObject) -> None:
    cut, told, rest = Cut(stops), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        told += cut.add(rest[:size])
        rest = rest[size:]
    ends = [at for end in range(len(text) + 1) for stop in stops if (at := text[:end].find(stop)) >= 0]
    assert told + cut.rest() == text[: ends[0] if ends else None] or (ends and told == text[: min(ends)])


# --- questions ---------------------------------------------------------------------------------------------------


def test_only_what_the_engine_understands_is_sent(router: Router) -> None:
    """It refuses fields of llama-server, and heeds a temperature only if it is told to sample."""
    extras = {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1, "cache_prompt": True, "user": "me", "id_slot": 0}
    client_id = "1" * 30
    more: dict[str, Any] = {**extras, "temperature": 1, "seed": 3, "n": 1, "response_format": {"type": "text"}}
    assert text_of(chat(router, "one", headers={"x-request-id": client_id}, **more)) == "one"
    seen = last_seen(router)
    sampling = json.loads(seen["body"].pop("generation_config"))
    assert sampling == {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "do_sample": True}
    messages = [{"role": "user", "content": "one"}]
    sent = {"messages": messages, "stream": True, "max_tokens": 100, "temperature": 1.0, "seed": 3}
    assert (seen["id"], seen["body"]) == (client_id, sent)


def test_a_temperature_of_zero_is_no_sampling(router: Router) -> None:
    chat(router, "one", model="calm", max_tokens=-1)
    body = last_seen(router)["body"]
    assert body["messages"][0] == {"role": "system", "content": "Be calm."}
    assert "generation_config" not in body
    assert (body["temperature"], body["max_tokens"]) == (0, 1024)


def test_tools_may_be_forbidden_but_not_forced(router: Router) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    chat(router, "one", tools=tools)
    assert last_seen(router)["body"]["tools"] == tools
    chat(router, "one", tools=tools, tool_choice="none")
    assert "tools" not in last_seen(router)["body"]
    answer = chat(router, "one", tools=tools, tool_choice="required")
    assert refusal(answer) == (400, "not_supported", "tool_choice")


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("n", 2, "not_supported"),
        ("logprobs", True, "not_supported"),
        ("response_format", {"type": "json_object"}, "not_supported"),
        ("presence_penalty", 0.5, "not_supported"),
        ("grammar", 'root ::= "a"', "not_supported"),
        ("stop", 7, "invalid_request"),
        ("max_tokens", 0, "invalid_request"),
        ("temperature", "hot", "invalid_request"),
        ("messages", [], "invalid_request"),
        ("messages", [{"content": "no role"}], "invalid_request"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
            "not_supported",
        ),
    ],
)
def test_what_would_be_ignored_or_fail_is_refused(router: Router, field: str, value: Any, code: str) -> None:
    answer = router.http.post(
        CHAT, json={"model": "chatty", "messages": [{"role": "user", "content": "one"}], field: value}
    )
    assert refusal(answer) == (400, code, field)


@pytest.mark.parametrize("prompt", [["one", "two"], [1, 2], None])
def test_a_completion_has_one_prompt_and_it_is_text(router: Router, prompt: Any) -> None:
    answer = router.http.post(COMPLETION, json={"model": "plain", "prompt": prompt})
    assert refusal(answer) == (400, "invalid_request", "prompt")


def test_a_prompt_that_cannot_be_within_the_context_is_not_computed(router: Router) -> None:
    answer = chat(router, "x" * 2_000_000)
    assert refusal(answer)[:2] == (400, "context_length_exceeded")
    assert "maximum context length is 2048 tokens" in answer.text


@pytest.mark.parametrize("name", ["chatty", "plain"])
def test_a_large_body_is_translated_like_a_small_one(router: Router, name: str) -> None:
    """Read on a thread, by its short form."""
    content = ("é" * 50 + " ") * 700
    assert len(text_of(chat(router, content, model=name, temperature=1)).split()) in (100, 101)
    body = last_seen(router, name)["body"]
    assert content in (body["prompt"] if name == "plain" else body["messages"][0]["content"])
    assert json.loads(body["generation_config"]) == {"do_sample": True}


# --- models without a chat template ------------------------------------------------------------------------------


def test_a_model_without_a_template_gets_a_plain_one(router: Router) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "How are you?"},
    ]
    answer = router.http.post(CHAT, json={"model": "plain", "messages": messages})
    seen = last_seen(router, "plain")
    prompt = "System: Be brief.\nUser: Hi.\nAssistant: Hello.\nUser: How are you?\nAssistant:"
    assert (seen["path"], seen["body"]["prompt"]) == (COMPLETION, prompt)
    # The engine repeats the prompt, and is stopped where somebody else would speak.
    assert text_of(answer) == "System: Be brief."
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


def test_it_takes_no_tools(router: Router) -> None:
    answer = chat(router, "one", model="plain", tools=[{"type": "function", "function": {"name": "f"}}])
    assert refusal(answer) == (400, "not_supported", "tools")


# --- errors ------------------------------------------------------------------------------------------------------


def test_an_error_before_any_text_has_a_status_and_openais_shape(router: Router) -> None:
    for streams in (False, True):
        failed = chat(router, "fails", stream=streams)
        assert failed.status_code == 500
        assert failed.json()["error"]["message"] == 'it says "no", and \\o/'
        beyond = chat(router, "overflows", stream=streams)
        assert refusal(beyond)[:2] == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("path", "asked", "words"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "endless"}]}, '"n_prompt_tokens":4000,"n_ctx":2048'),
        (COMPLETION, {"prompt": "endless"}, '"code":"context_length_exceeded"'),
        ("/v1/responses", {"input": "endless"}, '"code":"context_length_exceeded"'),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "endless"}], "max_tokens": 9},
            "prompt is too long: 4000 tokens > 2048 maximum",
        ),
        (
            "/api/chat",
            {"messages": [{"role": "user", "content": "endless"}], "stream": False},
            "it has 4000 tokens",
        ),
    ],
)
def test_a_prompt_beyond_the_context_is_no_answer(
    router: Router, path: str, asked: dict[str, Any], words: str
) -> None:
    """The engine computes whatever it gets, and counts the tokens afterwards."""
    answer = router.http.post(path, json={"model": "chatty", **asked})
    assert (answer.status_code, words in answer.text) == (400, True), answer.text
    if path == CHAT:
        *_, error, end = router.http.post(path, json={"model": "chatty", **asked, "stream": True}).text.split(
            "\n\n"
        )[:-1]
        assert ("it has 4000 tokens" in error, end) == (True, "data: [DONE]")


def test_an_answer_that_fills_the_context_is_as_long_as_it_can_be(router: Router) -> None:
    """GPT-2 has so many positions; it rarely ends by itself, and many clients name no limit."""
    whole = chat(router, "one two overflows")
    assert (text_of(whole), whole.json()["choices"][0]["finish_reason"]) == ("one two", "length")
    events = [event for event in chat(router, "one two overflows", stream=True).text.split("\n\n") if event]
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert events[-1] == "data: [DONE]"
    messages = [{"role": "user", "content": "x " * 600}]
    router.http.post(CHAT, json={"model": "chatty", "messages": messages})
    assert 512 <= last_seen(router)["body"]["max_tokens"] < 2048 - 1200


def test_an_error_after_text_ends_the_stream(router: Router) -> None:
    first, error, end = chat(router, "one fails", stream=True).text.strip().split("\n\n")
    assert '"content":"one"' in first
    assert json.loads(error[6:])["error"]["message"] == 'it says "no", and \\o/'
    assert end == "data: [DONE]"
    assert chat(router, "one fails").status_code == 500


def test_a_stream_that_breaks_off_is_no_answer(router: Router) -> None:
    assert '"code":"engine_lost"' in chat(router, "one breaks", stream=True).text
    assert chat(router, "breaks").status_code == 503


def test_an_engine_whose_gpu_has_failed_is_replaced(router: Router) -> None:
    """It lives, and its health is fine, but it answers nothing any more."""
    chat(router, "one")
    pid = router.status("chatty")["pid"]
    failed = chat(router, "poisons")
    assert (failed.status_code, "illegal memory access" in failed.text) == (500, True)
    assert text_of(chat(router, "one")) == "one"
    assert router.status("chatty")["pid"] != pid


def test_a_client_that_leaves_frees_the_engine(router: Router) -> None:
    """Also one that wants a document: the engine would compute that to its end, and everybody else would wait."""
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            f"{router.url}{CHAT}",
            json={"model": "chatty", "messages": [{"role": "user", "content": "waits"}]},
            timeout=1,
        )
    eventually(lambda: last_seen(router)["left"])
    assert text_of(chat(router, "one")) == "one"


# --- other APIs --------------------------------------------------------------------------------------------------


def test_ollamas_client_talks_to_it(router: Router) -> None:
    client = ollama.Client(host=router.url)
    messages = [{"role": "user", "content": "one two"}]
    said = client.chat("chatty", messages, options={"temperature": 0.5, "top_k": 3, "num_ctx": 100})
    assert (said.message.content, said.eval_count) == ("one two", 2)
    assert json.loads(last_seen(router)["body"]["generation_config"]) == {"top_k": 3, "do_sample": True}
    assert (
        "".join(part.message.content or "" for part in client.chat("chatty", messages, stream=True)) == "one two"
    )
    with pytest.raises(ollama.ResponseError, match="does not support this `response_format`"):
        client.chat("chatty", messages, format="json")


def test_anthropics_client_talks_to_it(router: Router) -> None:
    client = anthropic.Anthropic(base_url=router.url, api_key="-", max_retries=0)
    said = client.messages.create(model="chatty", max_tokens=9, messages=[{"role": "user", "content": "one two"}])
    assert [block.text for block in said.content if block.type == "text"] == ["one two"]
    assert (said.stop_reason, said.usage.output_tokens) == ("end_turn", 2)


def test_anthropics_client_is_told_which_stop_sequence_has_come(router: Router) -> None:
    client = anthropic.Anthropic(base_url=router.url, api_key="-", max_retries=0)
    asked: Any = {"max_tokens": 9, "messages": [{"role": "user", "content": "one two three"}]}
    asked |= {"model": "chatty", "stop_sequences": ["zebra", " two"]}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    for said in (whole, final):
        assert [block.text for block in said.content if block.type == "text"] == ["one"]
        assert (said.stop_reason, said.stop_sequence) == ("stop_sequence", " two")


# --- engines -----------------------------------------------------------------------------------------------------


def test_it_is_started_offline_with_the_model_and_the_device(router: Router) -> None:
    chat(router, "one")
    started = router.http.get("/upstream/chatty/seen").json()
    (verb, folder, *flags) = started["argv"]
    assert (verb, Path(folder).name) == ("serve", "chatty")
    assert flags[:6] == ["--device", "cpu", "--dtype", "auto", "--host", "127.0.0.1"]
    assert {started["env"][name] for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")} == {"1"}


@pytest.mark.parametrize("path", ["/reset", "/load_model"])
def test_nobody_loads_models_behind_the_routers_back(router: Router, path: str) -> None:
    answer = router.http.post(f"/upstream/chatty{path}", json={"model": "other"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_allowed")


def test_lists_say_what_the_files_say(router: Router) -> None:
    cards = {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}
    known = {key: cards["chatty"][key] for key in ("n_ctx", "quantization", "family", "capabilities")}
    assert known == {"n_ctx": 2048, "quantization": "bfloat16", "family": "llama", "capabilities": ["completion"]}
    shown = router.http.post("/api/show", json={"model": "chatty"}).json()
    info = {key: shown["model_info"][key] for key in ("general.architecture", "llama.context_length")}
    assert (info["general.architecture"], info["llama.context_length"]) == ("llama", 2048)
    assert (shown["template"], shown["details"]["context_length"]) == ("{{ messages }}", 2048)


def test_a_model_that_writes_no_text_is_refused(router: Router) -> None:
    answer = chat(router, "one", model="bert")
    assert answer.status_code == 503
    assert "BertForMaskedLM writes no text" in answer.json()["error"]["message"]


def test_what_is_not_there_is_said_with_what_to_do(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    models = {
        "gone": {"engine": "transformers", "repo": "openai-community/gpt2"},
        "none": {"engine": "transformers"},
        "file": {"engine": "transformers", "model_path": str(folder / "config.json")},
        "flagged": model(folder, flags=["--port", "1", "--continuous-batching"], env={"HF_HUB_OFFLINE": "0"}),
    }
    (tmp_path / "config.json").write_text(json.dumps({"models": models}))
    checked = run("check", "--config", "config.json", cwd=tmp_path)
    assert checked.returncode == 2
    for problem in (
        "models.gone.repo: openai-community/gpt2 is not in the Hugging Face cache: `llama-router pull",
        "models.none: needs either model_path (a folder) or repo (USER/REPO in the Hugging Face cache)",
        "models.flagged.flags[0]: cannot be set: the router sets it itself",
        "models.flagged.flags[2]: is not supported: Transformers then ignores stop texts",
        "models.flagged.env.HF_HUB_OFFLINE: cannot be set: the router sets it itself",
        "models.file.model_path: ",
    ):
        assert problem in checked.stderr, checked.stderr


def test_models_in_folders_are_found_if_they_can_run(tmp_path: Path, start: Start) -> None:
    models = tmp_path / "models"
    write_model(models / "chatty")
    write_model(models / "bert", {**LLAMA, "architectures": ["BertForMaskedLM"]})
    config: dict[str, Any] = {"models": {"chatty": {"description": "Talks."}}}
    arguments = ["--models-dir", str(models)]
    found = {**config, "system": {"transformers_path": str(played_transformers(tmp_path))}}
    router = start(found, arguments=arguments)
    (listed,) = router.http.get("/v1/models").json()["data"]
    assert (listed["id"], listed["description"], listed["source"]) == ("chatty", "Talks.", "--models-dir")
    assert text_of(chat(router, "one")) == "one"
    assert f"{models / 'bert'} is not served: BertForMaskedLM neither writes text" in router.log
    router.stop()

    router = start({"system": {}}, arguments=arguments, PATH="/usr/bin:/bin")
    assert router.http.get("/v1/models").json()["data"] == []
    assert f"{models / 'chatty'}: not served, as no engine for it is installed: pip install" in router.log


def test_without_the_program_the_extra_is_named(tmp_path: Path, start: Start) -> None:
    router = start({"models": {"m": model(write_model(tmp_path / "m"))}})
    answer = router.chat("m")
    assert answer.status_code == 503
    assert "pip install 'llama-router[transformers]'" in answer.json()["error"]["message"]
    checked = run("check", "--config", "config.json", cwd=tmp_path)
    assert "no model of engine transformers will load: the program `transformers` was not found" in checked.stderr


def test_four_bits_need_a_gpu_and_bitsandbytes(tmp_path: Path, start: Start) -> None:
    system = {"transformers_path": str(played_transformers(tmp_path))}
    router = start({"system": system, "models": {"m": model(write_model(tmp_path / "m"), quantize="q4")}})
    answer = router.chat("m")
    assert answer.status_code == 503
    assert "quantize: q4 needs bitsandbytes (pip install bitsandbytes) and a GPU" in answer.text


# --- engine: auto ------------------------------------------------------------------------------------------------


def test_an_entry_for_a_hugging_face_model_needs_no_engine(tmp_path: Path, start: Start, tiny: Path) -> None:
    """In the cache or in a folder; a GGUF file is one of llama.cpp's as ever."""
    snapshot = tmp_path / "cache/models--org--name/snapshots/abc"
    write_model(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("abc")
    models = {
        "cached": {"repo": "org/name"},
        "folder": {"engine": "auto", "model_path": str(write_model(tmp_path / "m")), "quantize": "fp32"},
        "gguf": {"engine": "auto", "model_path": str(tiny)},
    }
    system = {"transformers_path": str(played_transformers(tmp_path))}
    router = start({"system": system, "models": models}, HF_HUB_CACHE=str(tmp_path / "cache"))
    assert text_of(chat(router, "one", "cached")) == "one"
    assert text_of(chat(router, "one", "folder")) == "one"
    flags = router.http.get("/upstream/folder/seen").json()["argv"]
    assert flags[flags.index("--dtype") + 1] == "float32"
    assert router.chat("gguf").status_code == 200
    engines = {name: router.status(name)["engine"] for name in models}
    assert engines == {"cached": "transformers", "folder": "transformers", "gguf": "embedded"}


def test_what_is_wrong_with_such_an_entry_is_said(tmp_path: Path) -> None:
    folder = str(write_model(tmp_path / "m"))
    models = {
        "flagged": {"model_path": folder, "flags": ["--dtype", "auto"]},
        "typo": {"model_path": folder, "contxt": 100},
        "both": {"model_path": "m.gguf", "context": 100},
    }
    (tmp_path / "config.json").write_text(json.dumps({"models": models}))
    checked = run("check", "--config", "config.json", cwd=tmp_path)
    for problem in (
        "models.flagged.flags: are those of one kind of engine: name it (engine: ",
        "models.typo.contxt: unknown key; did you mean context?",
        "models.both.context: unknown key",
    ):
        assert problem in checked.stderr, checked.stderr


def test_without_any_engine_for_it_the_extras_are_named(tmp_path: Path) -> None:
    models = {"m": {"model_path": str(write_model(tmp_path / "m"))}}
    (tmp_path / "config.json").write_text(json.dumps({"models": models}))
    checked = run("check", "--config", "config.json", cwd=tmp_path)
    assert checked.returncode == 0
    assert (
        "models.m: will not load, as no engine for it is installed: pip install 'llama-router[" in checked.stderr
    )


# --- the real one ------------------------------------------------------------------------------------------------

REAL = os.environ.get("TRANSFORMERS")
"""Program `transformers` of an environment with torch, named to run these: they take a minute."""
needs_the_real_one = pytest.mark.skipif(REAL is None, reason="TRANSFORMERS names no program")
MAKE_MODELS = Path(__file__).parent.parent / "make_hf_models.py"


@pytest.fixture(scope="module")
def real(start_shared: Start, tmp_path_factory: pytest.TempPathFactory) -> Router:
    assert REAL is not None
    folder = tmp_path_factory.mktemp("real")
    python = Path(REAL).resolve().with_name("python")
    subprocess.run([python, MAKE_MODELS, folder], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    models = {name: model(folder / name) for name in ("llama", "gpt2")}
    return start_shared({"system": {"transformers_path": REAL}, "models": models})


@needs_the_real_one
def test_a_real_one_chats_and_completes(real: Router) -> None:
    document = real.chat("llama", max_tokens=8).json()
    assert document["usage"]["completion_tokens"] == 8
    assert document["choices"][0]["finish_reason"] == "length"
    events = real.chat("llama", max_tokens=8, stream=True).text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["usage"]["completion_tokens"] == 8
    asked = {"model": "gpt2", "prompt": "hi", "max_tokens": 8}
    assert real.http.post(COMPLETION, json=asked).json()["usage"]["completion_tokens"] == 8
    assert real.chat("gpt2", max_tokens=8).status_code == 200


@needs_the_real_one
def test_a_real_one_samples_when_it_is_told_to(real: Router) -> None:
    greedy = {text_of(chat(real, "hi", "llama", max_tokens=20, temperature=0)) for _ in range(3)}
    sampled = {text_of(chat(real, "hi", "llama", max_tokens=20, temperature=2, top_k=0)) for _ in range(3)}
    assert (len(greedy), len(sampled)) == (1, 3)
    seeded = {text_of(chat(real, "hi", "llama", max_tokens=20, temperature=2, seed=1)) for _ in range(2)}
    assert len(seeded) == 1


@needs_the_real_one
def test_a_real_one_knows_every_field_that_is_sent(real: Router) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    fields: dict[str, Any] = {"top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.1, "frequency_penalty": 0.5}
    fields |= {"logit_bias": {"5": 1}, "stop": ["zz"], "tools": tools, "reasoning_effort": "low"}
    assert chat(real, "hi", "llama", max_tokens=4, **fields).status_code == 200
    stopped = chat(real, "hi", "llama", logit_bias={"5": 100}, stop="##", max_tokens=9).json()["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("", "stop")


@needs_the_real_one
def test_a_real_one_says_that_its_context_is_full(real: Router) -> None:
    answer = chat(real, "x" * 300, "gpt2")
    assert refusal(answer)[:2] == (400, "context_length_exceeded")
    assert chat(real, "hi", "gpt2", max_tokens=2).status_code == 200


@needs_the_real_one
def test_a_real_one_is_free_once_its_client_has_left(real: Router) -> None:
    asked = {"model": "llama", "messages": [{"role": "user", "content": "hi"}], "logit_bias": {"5": 100}}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{real.url}{CHAT}", json=asked, timeout=0.5)
    since = time.monotonic()
    assert chat(real, "hi", "llama", max_tokens=2).status_code == 200
    assert time.monotonic() - since < 2


@needs_the_real_one
def test_a_real_one_that_is_killed_loses_no_request(real: Router) -> None:
    chat(real, "hi", "llama", max_tokens=2)
    os.kill(real.status("llama")["pid"], signal.SIGKILL)
    assert chat(real, "hi", "llama", max_tokens=2).status_code == 200
    since = time.monotonic()
    real.unload()
    assert time.monotonic() - since < 5
