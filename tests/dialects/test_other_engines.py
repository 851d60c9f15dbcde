"""Every API on engines that have OpenAI's chats, completions and embeddings only.

`strict` is a small server in vLLM's shapes, which refuses what it does not know; `real` is llama.cpp, of which the
router is told nothing but these routes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest
from conftest import Router, Start, eventually, models
from hf_models import played_transformers, write_model
from tiny_models import write_embedding

from router.dataplane.answer import Answer
from router.dialects.openai.hidden_usage import AnswerWithoutUsage
from router.engines.llamacpp.capability import error_of_engine
from router.http.tools import OF_CHATS, OF_MESSAGES, OF_RESPONSES
from router.store.demo import MODEL_PATH

SERVER = Path(__file__).parent.parent / "openai_server.py"
CHAT = [{"role": "user", "content": "one two three"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}}
LARGE = [{"type": "text", "text": "large"}, {"type": "text", "text": "and small"}]


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    folder = tmp_path_factory.mktemp("transformers")
    program = played_transformers(folder)
    transformers = {"engine": "transformers", "model_path": str(write_model(folder / "model"))}
    strict = {
        "engine": "command",
        "cmd": [sys.executable, str(SERVER), "--port", "{port}", "--name", "served"],
        "model_name": "served",
        "slots": 4,
    }
    real = {
        "engine": "command",
        "cmd": [sys.executable, "-m", "router.engines.llamacpp.embedded", "-m", "{model}", "--port", "{port}"],
        "model_path": str(MODEL_PATH),
    }
    own = {**strict, "routes": ["/v1/chat/completions", "/v1/messages"]}
    seeing = write_model(folder / "sees")
    (seeing / "preprocessor_config.json").write_text("{}")
    sees = {**transformers, "model_path": str(seeing)}
    entries = {"own": own, "strict": strict, "real": real, "transformers": transformers, "sees": sees}
    entries |= {**models(tiny, "tiny"), "embeds": {"model_path": str(write_embedding(folder / "embeds.gguf"))}}
    system = {"transformers_path": str(program), "max_concurrent_models": 9, "stop_grace_sec": 3}
    return start_shared({"system": system, "models": entries})


def seen(router: Router) -> dict[str, Any]:
    """What the strict server was asked last."""
    asked: list[dict[str, Any]] = router.http.get("/upstream/strict/seen").json()
    return asked[-1]


def tokens_counted(router: Router, name: str, model: str = "strict") -> float:
    lines = router.http.get("/metrics").text.splitlines()
    of_model = [line for line in lines if line.startswith(f"{name}{{") and f'model="{model}"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in of_model)


class TestOpenai:
    @pytest.fixture
    def client(self, router: Router) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client

    def test_tokens_of_a_stream_are_counted_and_shown_to_who_asks(
        self, router: Router, client: openai.OpenAI
    ) -> None:
        def usages(**more: Any) -> list[Any]:
            stream = client.chat.completions.create(model="strict", messages=CHAT, stream=True, **more)
            chunks = list(stream)
            said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
            assert said == "one two three"
            return [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]

        before = tokens_counted(router, "router_output_tokens_total")
        assert usages() == []
        assert usages(stream_options={"include_usage": True}) == [3]
        assert usages(stream_options={"include_usage": False}) == []
        assert seen(router)["stream_options"] == {"include_usage": True}
        eventually(lambda: tokens_counted(router, "router_output_tokens_total") == before + 9)
        assert tokens_counted(router, "router_input_tokens_total") >= 9

    def test_parameters_of_llama_server_are_left_out_or_called_by_the_engines_names(
        self, router: Router, client: openai.OpenAI
    ) -> None:
        only_llama_servers = {"cache_prompt": True, "id_slot": 1, "timings_per_token": True, "mirostat": 2}
        answer = client.chat.completions.create(
            model="strict",
            messages=CHAT,
            extra_body={**only_llama_servers, "n_predict": 2, "top_k": 7, "repeat_penalty": 1.5, "min_p": None},
        )
        assert answer.choices[0].message.content == "one two"
        asked = seen(router)
        assert {key: asked[key] for key in sorted(asked) if key not in ("path", "messages")} == {
            "max_tokens": 2,
            "model": "served",
            "repetition_penalty": 1.5,
            "top_k": 7,
        }

    def test_a_grammar_is_refused_as_the_engine_has_none(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="strict", messages=CHAT, extra_body={"grammar": "root ::= [a]"})
        assert "'strict' does not take `grammar`. Ask 'tiny' instead." in str(refused.value)

    @pytest.mark.parametrize(
        ("path", "more"),
        [
            ("/v1/chat/completions/input_tokens", {"messages": CHAT, "max_tokens": 9, "stream": True}),
            ("/v1/responses/input_tokens", {"input": "one two", "instructions": "three"}),
        ],
    )
    def test_tokens_are_counted(self, router: Router, path: str, more: dict[str, Any]) -> None:
        answer = router.http.post(path, json={"model": "strict", **more})
        assert answer.json() == {"object": "response.input_tokens", "input_tokens": 3}
        assert (seen(router)["max_tokens"], seen(router)["stream"]) == (1, False)

    def test_several_choices_are_the_engines_business(self, router: Router, client: openai.OpenAI) -> None:
        client.chat.completions.create(model="strict", messages=CHAT, n=9)
        assert seen(router)["n"] == 9

    def test_an_engine_is_asked_at_the_path_that_it_has(self, router: Router) -> None:
        body = {"model": "strict", "messages": CHAT}
        answer = router.http.post("/chat/completions?a=b", json=body)
        assert answer.json()["choices"][0]["message"]["content"] == "one two three"
        assert (
            router.http.post("/responses", json={"model": "strict", "input": "hi"}).json()["object"] == "response"
        )

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/upstream/strict/v1/chat/completions", "/api/chat"])
    def test_json_is_called_that_whatever_its_client_calls_it(self, router: Router, path: str) -> None:
        """`curl -d` says that it is a form."""
        body = json.dumps({"model": "strict", "messages": CHAT})
        for headers in ({"content-type": "application/x-www-form-urlencoded"}, {}):
            assert router.http.post(path, content=body, headers=headers).status_code == 200

    def test_mistakes_have_codes(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="strict", messages=[{"role": "user", "content": "a " * 101}])
        assert refused.value.code == "context_length_exceeded"
        assert "maximum context length is 100 tokens" in str(refused.value)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="strict", messages=CHAT, extra_body={"nonsense": 1})
        assert (refused.value.code, refused.value.param) == ("invalid_request", "nonsense")


class TestOllama:
    @pytest.fixture
    def client(self, router: Router) -> Iterator[ollama.Client]:
        with ollama.Client(router.url, timeout=60) as client:
            yield client

    def test_chat(self, router: Router, client: ollama.Client) -> None:
        options = {"num_predict": 2, "top_k": 5, "mirostat": 1, "num_ctx": 99, "repeat_penalty": 1.2}
        for stream in (False, True):
            said = client.chat("strict", CHAT, options=options, stream=stream)
            *_, last = parts = list(said) if stream else [said]
            assert "".join(part.message.content for part in parts) == "one two"
            assert (last.done_reason, last.prompt_eval_count, last.eval_count) == ("length", 3, 2)
            assert 0 < last.eval_duration <= last.total_duration
        assert {"max_tokens": 2, "top_k": 5, "repetition_penalty": 1.2}.items() <= seen(router).items()

    def test_tools_and_their_results(self, router: Router, client: ollama.Client) -> None:
        ask = [{"role": "user", "content": "call"}]
        for stream in (False, True):
            said = client.chat("strict", ask, tools=[WEATHER], stream=stream)
            parts = list(said) if stream else [said]
            calls = [call for part in parts for call in part.message.tool_calls or ()]
            assert [call.function.arguments for call in calls] == [{"city": "Oslo"}, {"city": "Rome"}]
        called = {"role": "assistant", "tool_calls": [call.model_dump() for call in calls]}
        results = [{"role": "tool", "content": text, "tool_name": "weather"} for text in ("rain", "sun")]
        assert client.chat("strict", [*ask, called, *results], tools=[WEATHER]).message.content == "sun"
        _, turn, rain, sun = seen(router)["messages"]
        assert [call["id"] for call in turn["tool_calls"]] == [rain["tool_call_id"], sun["tool_call_id"]]
        assert json.loads(turn["tool_calls"][1]["function"]["arguments"]) == {"city": "Rome"}

    def test_thoughts(self, router: Router, client: ollama.Client) -> None:
        said = client.chat("strict", [{"role": "user", "content": "think"}], think=True)
        assert (said.message.thinking, said.message.content) == ("Well...", "so")
        assert seen(router)["chat_template_kwargs"] == {"enable_thinking": True}

    def test_a_schema(self, router: Router, client: ollama.Client) -> None:
        schema = WEATHER["function"]["parameters"]
        assert json.loads(client.chat("strict", CHAT, format=schema).message.content) == {"city": "Oslo"}
        assert seen(router)["response_format"]["json_schema"]["schema"] == schema

    def test_generate(self, router: Router, client: ollama.Client) -> None:
        assert client.generate("strict", "a b c", system="You").response == "a b c"
        for stream in (False, True):
            said = client.generate("strict", "a b c", raw=True, options={"num_predict": 2}, stream=stream)
            *_, last = parts = list(said) if stream else [said]
            assert "".join(part.response for part in parts) == "a b"
            assert (last.done_reason, last.prompt_eval_count, last.eval_count) == ("length", 3, 2)
        assert {"path": "/v1/completions", "prompt": "a b c", "max_tokens": 2}.items() <= seen(router).items()

    def test_what_completions_lack_is_refused(self, client: ollama.Client) -> None:
        with pytest.raises(ollama.ResponseError, match=r"'strict' does not serve /infill\. Ask 'tiny' instead"):
            client.generate("strict", "a", suffix="b")
        with pytest.raises(ollama.ResponseError, match="`logprobs` of a `raw` prompt are not supported"):
            client.generate("strict", "a", raw=True, logprobs=True)

    def test_embed(self, client: ollama.Client) -> None:
        answer = client.embed("strict", ["ab", "abc"])
        assert (answer.embeddings, answer.prompt_eval_count) == ([[2.0, 1.0], [3.0, 1.0]], 2)

    def test_a_stream_without_its_mark_is_whole_once_the_engine_has_said_why_it_ended(
        self, client: ollama.Client
    ) -> None:
        *_, last = client.chat("strict", [{"role": "user", "content": "abrupt"}], stream=True)
        assert (last.done, last.done_reason) == (True, "stop")

    def test_mistakes_are_in_its_words(self, client: ollama.Client) -> None:
        with pytest.raises(ollama.ResponseError, match="maximum context length is 100 tokens") as refused:
            client.chat("strict", [{"role": "user", "content": "a " * 101}])
        assert refused.value.status_code == 400

    def test_on_a_real_engine(self, client: ollama.Client) -> None:
        parts = list(
            client.chat("real", [{"role": "user", "content": "Hello"}], options={"temperature": 0}, stream=True)
        )
        assert "".join(part.message.content for part in parts).startswith("Hello! I am a tiny demo model")
        assert parts[-1].eval_count > 5
        assert parts[-1].eval_duration > 0


class TestAnthropic:
    @pytest.fixture
    def client(self, router: Router) -> Iterator[Any]:
        anthropic = pytest.importorskip("anthropic", reason="the package anthropic is not installed")
        with anthropic.Anthropic(base_url=router.url, api_key="none", max_retries=0, timeout=60) as client:
            yield client

    def said(self, client: Any, content: Any, model: str = "strict", **more: Any) -> list[Any]:
        """As a document, and as a stream."""
        asked = {"model": model, "max_tokens": 50, "messages": [{"role": "user", "content": content}], **more}
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
        for one in (whole, streamed):
            assert (one.type, one.role, one.model) == ("message", "assistant", model)
        return [whole, streamed]

    def test_chat(self, router: Router, client: Any) -> None:
        for answer in self.said(
            client, "one two three", system="Be brief.", max_tokens=2, extra_body={"temperature": 0.5, "top_k": 3}
        ):
            assert [block.text for block in answer.content] == ["one two"]
            assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens) == (
                "max_tokens",
                5,
                2,
            )
        asked = seen(router)
        assert asked["messages"] == [{"role": "system", "content": "Be brief."}, CHAT[0]]
        assert {"max_tokens": 2, "top_k": 3, "temperature": 0.5, "model": "served"}.items() <= asked.items()

    def test_stop_sequences_are_told(self, client: Any) -> None:
        for answer in self.said(client, "one two three", stop_sequences=["two"]):
            assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "two")
            assert answer.content[0].text == "one"
        for answer in self.said(client, "one two", stop_sequences=["three"]):
            assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)

    def test_tools_and_their_results(self, router: Router, client: Any) -> None:
        tool = {"name": "weather", "description": "of a city", "input_schema": WEATHER["function"]["parameters"]}
        choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
        for answer in self.said(client, "call", tools=[tool], tool_choice=choice):
            assert [block.input for block in answer.content] == [{"city": "Oslo"}, {"city": "Rome"}]
            assert answer.stop_reason == "tool_use"
        asked = seen(router)
        assert asked["tools"] == [WEATHER]
        assert asked["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
        assert asked["parallel_tool_calls"] is False
        results: list[Any] = [
            {"type": "text", "text": "So?"},
            *[{"type": "tool_result", "tool_use_id": block.id, "content": "sun"} for block in answer.content],
        ]
        called = {"role": "assistant", "content": answer.content}
        talk = [{"role": "user", "content": "call"}, called, {"role": "user", "content": results}]
        answer = client.messages.create(model="strict", max_tokens=5, messages=talk, tools=[tool])
        assert answer.content[0].text == "So?"
        roles = [turn["role"] for turn in seen(router)["messages"]]
        assert roles == ["user", "assistant", "tool", "tool", "user"]

    def test_thoughts(self, client: Any) -> None:
        for answer in self.said(client, "think", thinking={"type": "enabled", "budget_tokens": 1024}):
            thought, text = answer.content
            assert (thought.thinking, text.text) == ("Well...", "so")

    def test_images_and_schemas(self, router: Router, client: Any) -> None:
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
        form = {"format": {"type": "json_schema", "schema": WEATHER["function"]["parameters"]}}
        for answer in self.said(
            client, [image, {"type": "text", "text": "Where?"}], extra_body={"output_config": form}
        ):
            assert json.loads(answer.content[0].text) == {"city": "Oslo"}
        asked = seen(router)
        assert asked["response_format"]["json_schema"]["schema"] == WEATHER["function"]["parameters"]
        assert asked["messages"][0]["content"] == [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
            {"type": "text", "text": "Where?"},
        ]

    def test_tokens_are_counted(self, router: Router, client: Any) -> None:
        count = client.messages.count_tokens(model="strict", messages=CHAT, system="Be brief.")
        assert count.input_tokens == 5
        asked = seen(router)
        assert (asked["path"], asked["max_tokens"]) == ("/v1/chat/completions", 1)

    def test_what_chats_have_no_place_for_is_refused(self, router: Router, client: Any) -> None:
        search = {"type": "web_search_20250305", "name": "web_search"}
        refusals = {
            "blocks: send text and images. Ask 'own' instead.": {
                "messages": [{"role": "user", "content": [DOCUMENT]}]
            },
            "no tool of type 'web_search_20250305'": {"messages": CHAT, "tools": [search]},
            "does not take `grammar`": {"messages": CHAT, "grammar": "root ::= [a]"},
            "at `$.stop_sequences`": {"messages": CHAT, "stop_sequences": "a"},
        }
        for words, body in refusals.items():
            answer = router.http.post("/v1/messages", json={"model": "strict", "max_tokens": 1, **body})
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
            assert words in error["message"]

    def test_an_engines_own_route_is_asked_unless_it_would_drop_something(self, router: Router) -> None:
        body = {"model": "own", "max_tokens": 9, "messages": CHAT}
        said = [
            router.http.post("/v1/messages", json={**body, **more}).json()["content"][0]["text"]
            for more in ({}, {"seed": 7})
        ]
        assert said == ["Hello", "one two three"]
        *_, native, chat = router.http.get("/upstream/own/seen").json()
        assert (native["path"], native["model"]) == ("/v1/messages", "served")
        assert (chat["path"], chat["seed"]) == ("/v1/chat/completions", 7)

    def test_a_prompt_that_is_too_long_is_told_in_its_words(self, router: Router) -> None:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            long = [{"role": "user", "content": "a " * 101}]
            answer = router.http.post(path, json={"model": "strict", "max_tokens": 1, "messages": long})
            assert answer.json()["error"]["message"] == "prompt is too long: 101 tokens > 100 maximum"

    def test_a_large_body(self, router: Router) -> None:
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "a" * 3_000_000}}
        body = {"model": "strict", "max_tokens": 9, "messages": [{"role": "user", "content": [image, *LARGE]}]}
        answer = router.http.post("/v1/messages", json=body).json()
        assert answer["content"] == [{"type": "text", "text": " large and small"}]
        assert len(seen(router)["messages"][0]["content"][0]["image_url"]["url"]) > 3_000_000

    def test_on_a_real_engine(self, client: Any) -> None:
        for answer in self.said(client, "Hello", "real", max_tokens=300, extra_body={"temperature": 0}):
            assert answer.content[0].text.startswith("Hello! I am a tiny demo model")
            assert answer.usage.output_tokens > 5
        assert client.messages.count_tokens(model="real", messages=CHAT).input_tokens > 5


class TestResponses:
    @pytest.fixture
    def client(self, router: Router) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client

    def said(self, client: openai.OpenAI, asked: Any, model: str = "strict", **more: Any) -> list[Any]:
        """As a document, and as a stream whose pieces come to the same."""
        whole = client.responses.create(model=model, input=asked, **more)
        with client.responses.stream(model=model, input=asked, **more) as stream:
            events = list(stream)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
        final = events[-1].response
        assert final.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")
        for answer in (whole, final):
            assert (answer.object, answer.model) == ("response", model)
        return [whole, final]

    def test_text(self, router: Router, client: openai.OpenAI) -> None:
        more: dict[str, Any] = {"instructions": "Be brief.", "temperature": 0.5, "reasoning": {"effort": "low"}}
        for answer in self.said(client, "one two three", **more):
            assert (answer.output_text, answer.status) == ("one two three", "completed")
            usage = answer.usage
            assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (5, 3, 8)
        asked = seen(router)
        assert asked["messages"] == [{"role": "system", "content": "Be brief."}, CHAT[0]]
        assert {"temperature": 0.5, "reasoning_effort": "low", "model": "served"}.items() <= asked.items()
        for answer in self.said(client, "one two three", max_output_tokens=2):
            assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
            assert answer.output_text == "one two"

    def test_a_conversation_with_calls(self, router: Router, client: openai.OpenAI) -> None:
        tools: Any = [{"type": "function", **WEATHER["function"]}, {"type": "web_search"}]
        asked: list[Any] = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "call"}]
        choice: Any = {"type": "function", "name": "weather"}
        for answer in self.said(client, asked, tools=tools, tool_choice=choice):
            cities = [json.loads(call.arguments) for call in answer.output]
            assert (cities, answer.status) == ([{"city": "Oslo"}, {"city": "Rome"}], "completed")
        assert seen(router)["tools"] == [WEATHER]
        assert seen(router)["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
        calls = [call.model_dump() for call in answer.output]
        asked += [
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
            {"type": "message", "role": "assistant", "content": "Let me see."},
            *calls,
            *[{"type": "function_call_output", "call_id": call["call_id"], "output": "sun"} for call in calls],
        ]
        assert client.responses.create(model="strict", input=asked).output_text == "sun"
        system, _, turn, *results = seen(router)["messages"]
        assert system == {"role": "system", "content": "Be brief."}
        assert (turn["content"], turn["reasoning_content"]) == ("Let me see.", "Hm.")
        assert [call["id"] for call in turn["tool_calls"]] == [result["tool_call_id"] for result in results]

    def test_thoughts_forms_and_images(self, router: Router, client: openai.OpenAI) -> None:
        for answer in self.said(client, "think"):
            thought, message = answer.output
            assert (thought.content[0].text, message.content[0].text) == ("Well...", "so")
        image = {"type": "input_image", "image_url": "data:image/png;base64,aGk=", "detail": "low"}
        asked: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Where?"}, image]}]
        schema = WEATHER["function"]["parameters"]
        form: Any = {"format": {"type": "json_schema", "name": "place", "schema": schema}}
        for answer in self.said(client, asked, text=form):
            assert json.loads(answer.output_text) == {"city": "Oslo"}
        assert seen(router)["response_format"]["json_schema"]["schema"] == schema
        assert seen(router)["messages"][0]["content"][1] == {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64,aGk=", "detail": "low"},
        }

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ({"previous_response_id": "resp_1"}, "nothing is stored here"),
            ({"background": True}, "nothing is stored here"),
            ({"input": [{"type": "item_reference", "id": "a"}]}, "takes no 'item_reference' items"),
            ({"input": [{"type": "item_reference"}]}, "No model here does."),
            ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "takes no 'input_file' parts"),
            ({"input": 5}, "is not a valid request for a response"),
        ],
    )
    def test_what_chats_have_no_place_for_is_refused(
        self, router: Router, more: dict[str, Any], words: str
    ) -> None:
        answer = router.http.post("/v1/responses", json={"model": "strict", "input": "hi", **more})
        assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True)

    def test_a_stream_that_ends_too_soon_fails(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.APIError) as broken:
            list(client.responses.create(model="strict", input="torn", stream=True))
        assert broken.value.code == "engine_lost"

    def test_on_a_real_engine(self, client: openai.OpenAI) -> None:
        for answer in self.said(client, "Hello", "real", temperature=0):
            assert answer.output_text.startswith("Hello! I am a tiny demo model")
            assert answer.usage.output_tokens > 5


@pytest.mark.parametrize(
    ("status", "body", "code", "message"),
    [
        (404, b'{"detail":"Not Found"}', "not_found", "Not Found"),
        (
            422,
            b'{"detail":[{"loc":["body","n"],"msg":"is no number"}]}',
            "invalid_request",
            "body.n: is no number",
        ),
        (500, b"Internal Server Error", "engine_error", "Internal Server Error"),
        (400, b'{"object":"error"}', "invalid_request", '{"object":"error"}'),
    ],
)
def test_errors_of_other_frameworks_are_read(status: int, body: bytes, code: str, message: str) -> None:
    error = error_of_engine(status, body)
    assert (error.status, error.code, error.message) == (status, code, message)


IN_RESPONSES = {"type": "function", **WEATHER["function"]}
IN_MESSAGES = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}


@pytest.mark.parametrize("model", ["tiny", "real", "transformers"])
@pytest.mark.parametrize(
    ("path", "asked", "tools", "form"),
    [
        ("/v1/chat/completions", {"messages": CHAT}, [IN_RESPONSES, IN_MESSAGES, "weather"], OF_CHATS),
        ("/v1/responses", {"input": "hi"}, [WEATHER, IN_MESSAGES], OF_RESPONSES),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 1}, [WEATHER, IN_RESPONSES], OF_MESSAGES),
        ("/v1/messages/count_tokens", {"messages": CHAT}, [WEATHER], OF_MESSAGES),
    ],
)
def test_a_tool_in_the_form_of_another_api_is_refused_with_the_right_one(
    router: Router, path: str, asked: dict[str, Any], tools: list[Any], form: str, model: str
) -> None:
    """Engines fail at it, call it nameless, or leave it out without a word."""
    for tool in tools:
        answer = router.http.post(path, json={"model": model, **asked, "tools": [tool]})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
        assert error["message"].startswith("`tools"), error
        assert error["message"].endswith(f"as {form}."), error


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}


@pytest.mark.parametrize(
    ("path", "model", "more", "words"),
    [
        ("/v1/messages", "tiny", {"messages": [{"role": "user", "content": [DOCUMENT]}]}, "blocks: send text"),
        ("/v1/chat/completions", "transformers", {"messages": CHAT, "n": 2}, "this `n`. Leave it out."),
    ],
)
def test_who_can_do_what_an_engine_cannot_is_said(
    router: Router, path: str, model: str, more: dict[str, Any], words: str
) -> None:
    """llama-server itself would leave documents out without a word, and Transformers most parameters."""
    able = "'own'" if model == "tiny" else "'own', 'strict', 'real', 'tiny'"
    answer = router.http.post(path, json={"model": model, "max_tokens": 1, **more})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["message"].endswith(f" Ask {able} instead.")


@pytest.mark.parametrize(
    ("path", "asked", "able"),
    [
        ("/v1/embeddings", {"input": "a"}, "Ask 'strict', 'real', 'embeds' instead."),
        ("/api/embed", {"input": "a"}, "Ask 'strict', 'real', 'embeds' instead."),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "Ask 'tiny' instead."),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, "No model here does."),
    ],
)
def test_who_is_named_was_started_for_it(router: Router, path: str, asked: dict[str, Any], able: str) -> None:
    """llama-server has all of these routes, and refuses those that a model was not started for."""
    answer = router.http.post(path, json={"model": "transformers", **asked})
    assert (answer.status_code, able in answer.text) == (400, True), answer.text


def test_who_takes_images_is_said(router: Router) -> None:
    chat = [{"role": "user", "content": [IMAGE]}]
    answer = router.http.post("/v1/chat/completions", json={"model": "transformers", "messages": chat})
    assert (answer.status_code, "Ask 'sees' instead." in answer.text) == (400, True), answer.text


def test_a_large_request_is_searched_for_tools_of_another_api_too(router: Router) -> None:
    asked = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "a" * (2 << 20)}]}
    answer = router.http.post("/v1/messages", json={**asked, "tools": [IN_MESSAGES, WEATHER]})
    assert (answer.status_code, "`tools[1]`" in answer.text) == (400, True), answer.text


@pytest.mark.parametrize(
    ("path", "asked", "found"),
    [
        ("/v1/chat/completions", {"messages": CHAT}, lambda said: said["choices"][0]["message"]["content"]),
        ("/v1/responses", {"input": CHAT}, lambda said: said["output"][0]["content"][0]["text"]),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 50}, lambda said: said["content"][0]["text"]),
        ("/v1/messages/count_tokens", {"messages": CHAT}, lambda said: said["input_tokens"] and "one two three"),
        ("/api/chat", {"messages": CHAT, "stream": False}, lambda said: said["message"]["content"]),
        (
            "/api/generate",
            {"prompt": "one two three", "stream": False, "raw": True},
            lambda said: said["response"],
        ),
    ],
)
def test_every_api_reaches_an_engine_with_a_manner_of_its_own(
    router: Router, path: str, asked: dict[str, Any], found: Callable[[dict[str, Any]], str]
) -> None:
    answer = router.http.post(path, json={"model": "transformers", **asked})
    assert answer.status_code == 200, answer.text
    assert found(answer.json()).strip().startswith("one two three")


class Recording:
    """A client's connection that keeps what is written to it."""

    peer = ""
    default_lines = b""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def answered(self, *, keep_alive: bool) -> None:
        pass

    def abort(self) -> None:
        raise AssertionError

    def invite_body(self) -> None:
        raise AssertionError


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_usage_is_hidden_however_the_network_tears_the_stream(end: bytes) -> None:
    said = [b'data: {"choices":[{"delta":{"content":"\\"usage\\":{}"}}],"usage":null}', b": a comment"]
    said.append(b'data: {"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"completion_tokens":1}}')
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}'
    stream = b"".join(event + end for event in (*said, usage, b"data: [DONE]"))
    shown = b"".join(event + end for event in (*said, b"data: [DONE]"))
    for size in (1, 7, 50, len(stream)):
        wire = Recording()
        answer = AnswerWithoutUsage(Answer(wire, keep_alive=True, http_1_0=True))
        answer.start(200, b"content-type: text/event-stream\r\n", len(stream))
        for begin in range(0, len(stream), size):
            answer.write(stream[begin : begin + size])
        answer.end(answer.rest(b""))
        assert wire.written.partition(b"\r\n\r\n")[2] == shown
