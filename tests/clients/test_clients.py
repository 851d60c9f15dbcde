"""People's client libraries against a running router: each test is a cell of the matrix in docs/clients.md.

The router is as it comes, with its demo models on the embedded engine, whose grammar makes them keep to a schema.
The demo model calls no tools: there a fake engine does, in llama-server's words.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest
from apart import UNREACHABLE, Apart, asking
from clients_apart import MESSAGES, SCHEMA, TOOL
from conftest import ROOT, Router, fake, models, starting

GREETING = "Hello! I am a tiny demo model"
CITIES = ({"city": "Oslo"}, {"city": "Rome"})
CALL = {"id": "one", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with starting(tmp_path_factory.mktemp("router")) as start:
        yield start()


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Router]:
    """A router whose model calls a tool, whatever it is asked."""
    directory = tmp_path_factory.mktemp("caller")
    shared = {"id": "chatcmpl-1", "created": 1, "model": "demo"}
    ended = {"index": 0, "finish_reason": "tool_calls"}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    answer = {**shared, "object": "chat.completion", "choices": [{**ended, "message": CALLED}], "usage": usage}
    delta = {**CALLED, "tool_calls": [{"index": 0, **CALL}]}
    chunk = {**shared, "object": "chat.completion.chunk"}
    chunks = [
        {**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        {**chunk, "choices": [{**ended, "delta": {}}]},
    ]
    events = directory / "events"
    events.write_text("\n".join(map(json.dumps, chunks)))
    engine = fake(directory, answer=json.dumps(answer), events=str(events))
    with starting(directory) as start:
        own = models(tiny, "demo", flags=["--chat-template", "{{ tools }}"])
        yield start({"system": {"llama_server_path": engine}, "models": own})


class TestOpenai:
    @pytest.fixture
    def client(self, router: Router) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client

    def test_chat(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0)
        assert answer.choices[0].message.content.startswith(GREETING)

    def test_stream(self, client: openai.OpenAI) -> None:
        stream = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert len(pieces) > 5
        assert "".join(pieces).startswith(GREETING)

    def test_tools(self, client: openai.OpenAI, caller: Router) -> None:
        answer = client.with_options(base_url=f"{caller.url}/v1").chat.completions.create(
            model="demo", messages=MESSAGES, tools=[TOOL], tool_choice="required", temperature=0
        )
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) in CITIES

    def test_structured_output(self, client: openai.OpenAI) -> None:
        form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
        answer = client.chat.completions.create(
            model="demo", messages=MESSAGES, response_format=form, temperature=0
        )
        assert json.loads(answer.choices[0].message.content) in CITIES

    def test_embeddings(self, client: openai.OpenAI) -> None:
        one, other = client.embeddings.create(model="demo-embed", input=["Hello", "Good bye"]).data
        assert len(one.embedding) == len(other.embedding) > 0
        assert one.embedding != other.embedding

    def test_responses(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(model="demo", input="Hello", temperature=0)
        assert answer.output_text.startswith(GREETING)
        events = list(client.responses.create(model="demo", input="Hello", temperature=0, stream=True))
        assert events[-1].type == "response.completed"
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(pieces) == answer.output_text


class TestOllama:
    @pytest.fixture
    def client(self, router: Router) -> Iterator[ollama.Client]:
        with ollama.Client(router.url, timeout=60) as client:
            yield client

    def test_chat(self, client: ollama.Client) -> None:
        answer = client.chat("demo", MESSAGES, options={"temperature": 0})
        assert answer.message.content.startswith(GREETING)

    def test_stream(self, client: ollama.Client) -> None:
        parts = list(client.chat("demo", MESSAGES, options={"temperature": 0}, stream=True))
        assert len(parts) > 5
        assert "".join(part.message.content for part in parts).startswith(GREETING)

    def test_tools(self, caller: Router) -> None:
        with ollama.Client(caller.url, timeout=60) as client:
            (call,) = client.chat("demo", MESSAGES, tools=[TOOL]).message.tool_calls
        assert (call.function.name, call.function.arguments in CITIES) == ("weather", True)

    def test_structured_output(self, client: ollama.Client) -> None:
        answer = client.chat("demo", MESSAGES, format=SCHEMA, options={"temperature": 0})
        assert json.loads(answer.message.content) in CITIES

    def test_embeddings(self, client: ollama.Client) -> None:
        one, other = client.embed("demo-embed", ["Hello", "Good bye"]).embeddings
        assert len(one) == len(other) > 0
        assert one != other


class TestAnthropic:
    @pytest.fixture
    def client(self, router: Router) -> Iterator[Any]:
        anthropic = pytest.importorskip("anthropic", reason="the package anthropic is not installed")
        with anthropic.Anthropic(base_url=router.url, api_key="none", max_retries=0, timeout=60) as client:
            yield client

    def test_chat(self, client: Any) -> None:
        answer = client.messages.create(
            model="demo", messages=MESSAGES, max_tokens=100, extra_body={"temperature": 0}
        )
        assert answer.content[0].text.startswith(GREETING)
        assert answer.stop_reason == "end_turn"
        assert answer.usage.output_tokens > 5
        counted = client.messages.count_tokens(model="demo", messages=MESSAGES)
        assert counted.input_tokens > 0

    def test_stream(self, client: Any) -> None:
        with client.messages.stream(
            model="demo", messages=MESSAGES, max_tokens=100, extra_body={"temperature": 0}
        ) as stream:
            pieces = list(stream.text_stream)
            final = stream.get_final_message()
        assert len(pieces) > 5
        assert "".join(pieces) == final.content[0].text
        assert final.content[0].text.startswith(GREETING)

    def test_errors_are_its_exceptions(self, client: Any) -> None:
        import anthropic

        with pytest.raises(anthropic.NotFoundError, match="Did you mean 'demo'"):
            client.messages.create(model="demmo", messages=MESSAGES, max_tokens=1)


def with_index(environ: Mapping[str, str]) -> dict[str, str]:
    """With the package index that the rest came from."""
    index = environ.get("PIP_INDEX_URL")
    return {**({"UV_DEFAULT_INDEX": index} if index else {}), **environ}


@pytest.fixture(scope="module")
def apart(router: Router, caller: Router) -> Iterator[Apart]:
    """Asks `clients_apart.py` for what a client makes of a cell."""
    others = ("VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")  # what is compiled once is there the next time
    environ = with_index({name: value for name, value in os.environ.items() if name not in others})
    uv = [sys.executable, "-m", "uv", "--quiet", "--no-config", "--system-certs"]
    script = ["--python", sys.executable, "--script", str(ROOT / "tests" / "clients_apart.py")]
    made = subprocess.run([*uv, "sync", *script], env=environ, stderr=subprocess.PIPE, text=True)
    if re.search(UNREACHABLE, made.stderr):
        pytest.skip(f"no package index can be reached: {made.stderr}")
    assert made.returncode == 0, made.stderr
    command = [*uv, "run", "--offline", *script, router.url, caller.url]
    with asking(command, environ) as ask:
        yield ask


LANGCHAIN = ["langchain-openai", "langchain-ollama"]


@pytest.mark.timeout(600)  # the first one waits for the installation
class TestClientsApart:
    @pytest.mark.parametrize("client", [*LANGCHAIN, "langchain-llama-cpp", "litellm", "litellm-ollama"])
    def test_chat(self, apart: Apart, client: str) -> None:
        assert apart(client, "chat").startswith(GREETING)

    @pytest.mark.parametrize("client", [*LANGCHAIN, "langchain-llama-cpp", "litellm"])
    def test_stream(self, apart: Apart, client: str) -> None:
        pieces = apart(client, "stream")
        assert len(pieces) > 5
        assert "".join(pieces).startswith(GREETING)

    @pytest.mark.parametrize("client", [*LANGCHAIN, "langchain-llama-cpp", "litellm"])
    def test_tools(self, apart: Apart, client: str) -> None:
        ((name, arguments),) = apart(client, "tools")
        assert (name, arguments in CITIES) == ("weather", True)

    @pytest.mark.parametrize("client", [*LANGCHAIN, "litellm"])
    def test_structured_output(self, apart: Apart, client: str) -> None:
        assert apart(client, "structured_output") in CITIES

    @pytest.mark.parametrize("client", [*LANGCHAIN, "litellm"])
    def test_embeddings(self, apart: Apart, client: str) -> None:
        one, other = apart(client, "embeddings")
        assert len(one) == len(other) > 0
        assert one != other

    @pytest.mark.parametrize("client", ["langchain-openai", "litellm"])
    def test_responses(self, apart: Apart, client: str) -> None:
        assert apart(client, "responses").startswith(GREETING)

    def test_what_an_engine_goes_by(self, apart: Apart) -> None:
        """Which langchain-llama-cpp asks for as of llama-swap."""
        defaults = apart("langchain-llama-cpp", "server_defaults")
        assert (defaults["top_k"], defaults["n_ctx"] > 0) == (40, True)

    def test_a_monitor_of_one_llama_server(self, apart: Apart, router: Router) -> None:
        router.unload()
        router.chat("demo")
        seen = apart("llamastat", "snapshot")
        assert (seen["health"], seen["model_alias"], seen["slots_endpoint"]) == ("ok", "demo", True)
        assert seen["n_params"] > 10_000
        assert seen["total_slots"] == len(seen["slots"])


def test_open_webui_over_openais_api(router: Router) -> None:
    """Its connection check, a chat as it sends it, and the embeddings with which it searches documents."""
    names = [model["id"] for model in router.http.get("/v1/models").json()["data"]]
    assert names == ["demo", "demo-embed"]
    body = {
        "model": "demo",
        "messages": MESSAGES,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "metadata": {"user_id": "u", "chat_id": "c", "message_id": "m", "variables": {"{{USER_NAME}}": "Ann"}},
        "chat_id": "c",
        "session_id": "s",
        "id": "m",
        "features": {"web_search": False},
        "background_tasks": {"title_generation": True},
    }
    answer = router.http.post("/v1/chat/completions", json=body)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    said = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    assert "".join(said).startswith(GREETING)
    assert events[-1]["usage"]["completion_tokens"] > 5
    found = router.http.post("/v1/embeddings", json={"model": "demo-embed", "input": ["a", "b"]}).json()
    assert [text["index"] for text in found["data"]] == [0, 1]
    by_ollama = router.http.post("/api/embed", json={"model": "demo-embed:latest", "input": ["a", "b"]}).json()
    assert len(by_ollama["embeddings"]) == 2
