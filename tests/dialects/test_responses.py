"""`/v1/responses` is OpenAI's API, also where the engine's answer lacks a part of it.

Streams are checked by OpenAI's own library. The engine is a real one, except for what a demo model never does:
calls and reasoning are played, in the format of llama-server (tools/server/server-task.cpp, build 11434).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from conftest import Router, Start, fake, models
from played_responses import played, stories, stream_of
from pydantic import BaseModel

from router.dialects.openai.responses import Completion, read
from router.http.errors import ApiError
from router.store.demo import MODEL_PATH

GREETING = "Hello! I am a tiny demo model"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}


class Place(BaseModel):
    city: Literal["Oslo", "Rome"]


def events_of(stream: bytes | str) -> list[dict[str, Any]]:
    """Each is whole, and named like its type."""
    text = stream.decode() if isinstance(stream, bytes) else stream
    assert text.endswith("\n\n")
    blocks = [block for block in text[:-2].split("\n\n") if not block.startswith(":")]
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


@pytest.fixture(scope="module")
def router(start_shared: Start) -> Router:
    flags = ["-c", "512", "-t", "1", "-np", "1", "--ignore-eos"]
    entries = {
        **models(MODEL_PATH, "demo", flags=flags[:-1]),
        **models(MODEL_PATH, "endless", flags=flags),
        **models(MODEL_PATH, "brief", flags=[*flags, "-n", "5", "-np", "2"]),
    }
    return start_shared({"models": entries, "aliases": {"twice": {"uses": "brief", "forced": {"n": 2}}}})


@pytest.fixture(scope="module")
def player(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    """Engines that play: one thinks, speaks and calls, the others come to grief in the middle of that."""
    directory = tmp_path_factory.mktemp("player")
    entries = {
        alias: models(tiny, alias, env={**env, "FAKE_LOAD_SEC": "0.3"})[alias]
        for alias, env in stories(directory).items()
    }
    system = {"llama_server_path": fake(directory), "max_concurrent_models": len(entries)}
    return start_shared({"api": {"heartbeat_sec": 0.1}, "system": system, "models": entries})


@pytest.fixture
def client(router: Router) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


class TestOpenaisLibrary:
    def test_streams(self, client: openai.OpenAI) -> None:
        with client.responses.stream(model="demo", input="Hello", temperature=0) as stream:
            events = list(stream)
            final = stream.get_final_response()
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
        assert final.output_text.startswith(GREETING)
        assert final.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")
        created = events[0].response
        assert (created.model, created.output, created.status) == ("demo", [], "in_progress")
        assert created.created_at == final.created_at > 1e9
        assert (final.tool_choice, final.tools, final.parallel_tool_calls) == ("auto", [], True)
        assert final.temperature == 0
        assert final.usage.output_tokens_details.reasoning_tokens == 0
        whole = client.responses.create(model="demo", input="Hello", temperature=0)
        assert (whole.output_text, whole.status) == (final.output_text, "completed")
        assert whole.usage.output_tokens_details.reasoning_tokens == 0

    @pytest.mark.parametrize(
        ("model", "asked"), [("demo", {"max_output_tokens": 3}), ("endless", {}), ("brief", {})]
    )
    def test_is_told_of_an_answer_that_was_cut(
        self, client: openai.OpenAI, model: str, asked: dict[str, Any]
    ) -> None:
        """By the client, by a full context, by the model's flags."""
        whole = client.responses.create(model=model, input="Hello", **asked)
        *_, last = client.responses.create(model=model, input="Hello", **asked, stream=True)
        assert last.type == "response.incomplete"
        for cut in (whole, last.response):
            assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert client.responses.create(model="demo", input="Hello", max_output_tokens=90).status == "completed"

    def test_gets_the_form_of_text_that_it_asks_for(self, client: openai.OpenAI) -> None:
        asked: dict[str, Any] = {"model": "demo", "input": "Hello", "temperature": 0}
        assert client.responses.parse(**asked, text_format=Place).output_parsed in (
            Place(city="Oslo"),
            Place(city="Rome"),
        )
        with client.responses.stream(**asked, text_format=Place) as stream:
            assert isinstance(stream.get_final_response().output_parsed, Place)
        form: Any = {"format": {"type": "json_object"}}
        text = client.responses.create(**asked, text=form, max_output_tokens=20).output_text
        assert text.strip()[:1] in ("", "{")  # it likes to begin with space

    def test_takes_thoughts_and_calls(self, player: Router) -> None:
        with (
            openai.OpenAI(base_url=f"{player.url}/v1", api_key="none", max_retries=0) as client,
            client.responses.stream(model="caller", input="Hello", tools=[TOOL]) as stream,
        ):
            types = [event.type for event in stream]
            final = stream.get_final_response()
        thought, message, call = final.output
        assert (thought.content[0].text, message.content[0].text) == ("Where?", "Let me see.")
        assert (call.name, call.parsed_arguments) == ("weather", {"city": "Oslo"})
        assert "response.function_call_arguments.done" in types
        assert types.count("response.content_part.added") == types.count("response.content_part.done") == 2
        assert final.tools[0].name == "weather"

    @pytest.mark.parametrize(
        ("alias", "code"), [("fails", "engine_error"), ("dies", "engine_lost"), ("torn", "engine_lost")]
    )
    def test_throws_what_goes_wrong_in_the_middle(self, player: Router, alias: str, code: str) -> None:
        with (
            openai.OpenAI(base_url=f"{player.url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.APIError) as broken,
        ):
            list(client.responses.create(model=alias, input="Hello", stream=True))
        assert broken.value.code == code


@pytest.mark.parametrize(
    ("alias", "code"),
    [("fails", "engine_error"), ("dies", "engine_lost"), ("torn", "engine_lost"), ("stops", "engine_lost")],
)
def test_a_stream_that_breaks_ends_as_its_api_ends(player: Router, alias: str, code: str) -> None:
    """Codex reads the response that failed, the AI SDK the error before it."""
    player.unload()
    text = player.http.post("/v1/responses", json={"model": alias, "input": "Hello", "stream": True}).text
    assert text.startswith(": position 1")
    events = events_of(text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    error, failed = events[-2:]
    assert (error["type"], error["code"], error["error"]["code"]) == ("error", code, code)
    assert failed["type"] == "response.failed"
    response = failed["response"]
    assert (response["status"], response["error"]["code"], response["id"]) == ("failed", code, "resp_1")
    assert response["error"]["message"] == error["message"]
    if alias != "stops":
        assert f'status="{code}"' in player.http.get("/metrics").text


def test_a_schema_is_only_told_where_tools_may_be_called(player: Router, router: Router, tmp_path: Path) -> None:
    """An engine that is held to a schema calls nothing."""
    form = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}}
    body = {"model": "caller", "input": "Hello", "instructions": "Be brief.", "text": form, "tools": [TOOL]}
    asked = json.loads(read(json.dumps(body).encode()).body)
    assert "response_format" not in asked
    assert json.dumps(SCHEMA, separators=(",", ":")) in asked["instructions"].replace(" ", "").replace("\n", "")
    assert asked["instructions"].endswith("Be brief.")
    mute = json.loads(read(json.dumps({**body, "tool_choice": "none"}).encode()).body)
    assert mute["response_format"]["json_schema"]["schema"] == SCHEMA
    assert mute["instructions"] == "Be brief."


def test_json_of_any_form_is_asked_for_with_a_schema() -> None:
    """Without one, builds as old as 10434 answer in any text."""
    body = {"model": "demo", "input": "hi", "text": {"format": {"type": "json_object"}}}
    asked = json.loads(read(json.dumps(body).encode()).body)
    assert asked["response_format"] == {"type": "json_object", "schema": {"type": "object"}}


@pytest.mark.parametrize("asked", [{"model": "brief", "n": 2}, {"model": "twice"}])
def test_several_choices_are_refused_as_no_response_has_them(router: Router, asked: dict[str, Any]) -> None:
    answer = router.http.post("/v1/responses", json={"input": "Hello", **asked})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    assert answer.json()["error"]["message"] == "`n` is 2, but a response has one answer. Send several requests."


def test_what_asks_for_no_form_goes_to_the_engine_byte_for_byte() -> None:
    for body in (
        b'{"model": "demo",  "input": "hi", "input": "hello"}',
        b'{"model": "demo", "input": "hi", "text": {"format": {"type": "text"}, "verbosity": "low"}}',
        b'{"model": "demo", "input": "hi", "text": {"format": {"type": "json_object"}}, "json_schema": {}}',
        b'{"model": "demo", "text": 7}',
        b'{"model": "demo", "text": {"format": 7}, "max_output_tokens": "many"}',
        b"--form\r\n",
    ):
        assert read(body).body == body


def test_events_are_the_same_however_the_network_tears_them() -> None:
    stream = b": 1\n\n" + stream_of(played())
    asked = read(b'{"model": "caller", "input": "hi"}')

    def completed(size: int) -> list[dict[str, Any]]:
        completion = Completion(asked)
        parts = (stream[begin : begin + size] for begin in range(0, len(stream), size))
        events = events_of(b"".join(map(completion.events, parts)) + completion.last_events())
        for event in events:
            for key in ("created_at", "completed_at"):
                event.get("response", {}).pop(key, None)
        return events

    whole = completed(len(stream))
    for size in (1, 7, 100, 1000):
        assert completed(size) == whole
    indices = {event["item_id"]: event["output_index"] for event in whole if "item_id" in event}
    assert indices == {"rs_1": 0, "msg_1": 1, "fc_1": 2}
    assert [event["output_index"] for event in whole if event["type"].endswith("item.done")] == [0, 1, 2]
    assert all(event["content_index"] == 0 for event in whole if "text" in event["type"])


def test_what_an_engine_says_itself_is_not_contradicted() -> None:
    """Builds that say more one day."""
    completion = Completion(read(b'{"model": "caller", "input": "hi"}'))
    events = played()
    events[0]["response"] |= {"created_at": 7, "model": "other", "tools": [TOOL]}
    events[2] |= {"output_index": 3, "sequence_number": 40}
    said = events_of(completion.events(stream_of(events[:4])))
    assert (said[0]["response"]["created_at"], said[0]["response"]["model"]) == (7, "other")
    assert (said[2]["output_index"], said[2]["sequence_number"]) == (3, 2)


def test_an_answer_without_pieces_is_begun_all_the_same() -> None:
    """Whose first token is its last, for example."""
    completion = Completion(read(b'{"model": "caller", "input": "hi"}'))
    done = [event for event in played() if event["type"].endswith(("item.done", "completed", "text.done"))]
    said = [event["type"] for event in events_of(completion.events(stream_of(done)))]
    assert said[0] == "response.created"
    assert said.count("response.output_item.added") == said.count("response.output_item.done") == 3
    assert said[-1] == "response.completed"
    assert "response.output_text.done" not in said  # of what was not begun
    assert completion.last_events() == b""
    empty = Completion(read(b'{"model": "caller", "input": "hi"}'))
    first, error, failed = events_of(empty.failed(ApiError(503, "model_failed", "It failed.")))
    assert (first["type"], error["type"], failed["type"]) == ("response.created", "error", "response.failed")
    assert first["response"]["id"] == failed["response"]["id"]
