"""`/v1/messages` keeps what llama-server's own route would drop, and answers as Anthropic's API does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, fake, models

from router.dialects.anthropic.answers import Translation
from router.dialects.anthropic.requests import read
from router.store.demo import MODEL_PATH

anthropic = pytest.importorskip("anthropic", reason="the package anthropic is not installed")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FORM = {"format": {"type": "json_schema", "schema": SCHEMA}}
CITIES = ({"city": "Oslo"}, {"city": "Rome"})
ASKED: dict[str, Any] = {"model": "demo", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"name": "weather", "description": "The weather of a city", "input_schema": SCHEMA}
CALL = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Hello,"}, {"type": "text", "text": " you."}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, CALL]},
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "It rains."}]},
            {"type": "text", "text": "And now?"},
        ],
    },
]
TEMPLATE = (
    "{{ reasoning_effort or '' }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}\n"
    "{% endfor %}"
)
"""Of a model that sees everything."""
STRICT = (
    "{% for m in messages %}{% if loop.index0 and messages[loop.index0 - 1].tool_calls and m.role != 'tool' %}"
    "{{ raise_exception('no result') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
"""Of a model that takes nothing but results after its calls."""


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "delta": delta}
    return {"id": "chatcmpl-1", "model": "caller", "object": "chat.completion.chunk", "choices": [choice]}


def piece(index: int, arguments: str, **named: str) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": named["name"]} if named else {})}
    return {"index": index, "function": function, **({"id": named["id"], "type": "function"} if named else {})}


def said(finish: str, **message: Any) -> str:
    return json.dumps({"id": "chatcmpl-1", "choices": [{"finish_reason": finish, "message": message}]})


NAMED = {"id": "call_1", "name": "weather"}
PLAYED = [
    chunk(role="assistant", content=None),
    chunk(reasoning_content="Where?"),
    chunk(content="Let me"),
    chunk(content=" see."),
    chunk(tool_calls=[piece(0, '{"city": ', id="call_1", name="weather")]),
    chunk(tool_calls=[piece(0, '"Oslo"}')]),
    chunk(tool_calls=[piece(1, '{"city": "Rome"}', id="call_2", name="weather")]),
    {**chunk("tool_calls"), "timings": {"cache_n": 3, "prompt_n": 4, "predicted_n": 12}},
]


@pytest.fixture(scope="module")
def router(start_shared: Start) -> Router:
    flags = ["-c", "2048", "-t", "1", "-np", "1"]
    return start_shared(
        {
            "models": {
                **models(MODEL_PATH, "demo", flags=flags),
                **models(MODEL_PATH, "seer", flags=[*flags, "--chat-template", TEMPLATE]),
                **models(MODEL_PATH, "strict", flags=[*flags, "--chat-template", STRICT]),
            }
        }
    )


@pytest.fixture(scope="module")
def player(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    directory = tmp_path_factory.mktemp("player")
    mistake = {"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}
    (directory / "caller").write_text("\n".join(map(json.dumps, PLAYED)))
    (directory / "fails").write_text("\n".join(map(json.dumps, [*PLAYED[:3], mistake])))
    ways = {
        "caller": {"FAKE_EVENTS": str(directory / "caller")},
        "fails": {"FAKE_EVENTS": str(directory / "fails")},
        "cut": {"FAKE_ANSWER": said("length", content=None, tool_calls=[piece(0, '{"city": "O', **NAMED)])},
        "odd": {"FAKE_ANSWER": said("stop", content=[1])},
        "dies": {"FAKE_EVENTS": str(directory / "caller"), "FAKE_DIE": "torn"},
    }
    entries = {alias: models(tiny, alias, env=env)[alias] for alias, env in ways.items()}
    return start_shared({"system": {"llama_server_path": fake(directory)}, "models": entries})


@pytest.fixture
def client(router: Router) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=router.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_an_answer_keeps_to_its_schema(client: Any, name: str) -> None:
    form = FORM if name == "output_config" else FORM["format"]
    asked = {**ASKED, "extra_body": {name: form, "temperature": 0}}
    whole = client.messages.create(**asked)
    assert json.loads(whole.content[0].text) in CITIES
    assert (whole.stop_reason, whole.type, whole.role, whole.model) == ("end_turn", "message", "assistant", "demo")
    with client.messages.stream(**asked) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == final.content[0].text == whole.content[0].text
    assert len(pieces) > 5
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens > 5
    prompts = {usage.input_tokens + usage.cache_read_input_tokens for usage in (whole.usage, final.usage)}
    plain = client.messages.create(**ASKED).usage
    assert prompts == {plain.input_tokens + plain.cache_read_input_tokens}


def test_a_seed_counts(client: Any) -> None:
    def said(seed: int, **more: Any) -> str:
        body = {"seed": seed, "temperature": 9.0, "samplers": ["temperature"], "ignore_eos": True, **more}
        return client.messages.create(**{**ASKED, "max_tokens": 12}, extra_body=body).content[0].text

    assert said(1) == said(1) != said(2)
    assert set(said(1, grammar='root ::= "a"+')) == {"a"}
    cut = client.messages.create(**{**ASKED, "max_tokens": 3}, extra_body={"seed": 1, "ignore_eos": True})
    assert cut.stop_reason == "max_tokens"


def test_what_only_llama_server_has_counts(client: Any) -> None:
    def said(**more: Any) -> str:
        return client.messages.create(**{**ASKED, "max_tokens": 6}, extra_body=more).content[0].text

    assert said(temperature=9.0, mirostat=2, mirostat_tau=9.0) != said(temperature=9.0) == said(temperature=0.0)


def test_a_model_is_asked_the_same_on_both_ways(router: Router) -> None:
    def prompt_tokens(**more: Any) -> int:
        body = {
            "model": "seer",
            "max_tokens": 1,
            "messages": TALK,
            "system": [{"type": "text", "text": "Be brief."}],
        }
        usage = router.http.post("/v1/messages", json={**body, "tools": [TOOL], **more}).json()["usage"]
        return int(usage["input_tokens"] + usage["cache_read_input_tokens"])

    assert prompt_tokens() == prompt_tokens(seed=1) > 100
    assert prompt_tokens(reasoning_effort="a word of many bytes") > prompt_tokens()


@pytest.mark.parametrize("more", [{}, {"seed": 1}])
def test_results_of_tools_come_right_after_their_calls(router: Router, more: dict[str, int]) -> None:
    """And what their message says besides after them, as Claude Code says much there."""
    body = {"model": "strict", "max_tokens": 1, "messages": TALK, "tools": [TOOL], **more}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = router.http.post(path, json=body)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("more", [{}, {"seed": 1}])
def test_an_answer_tells_which_stop_sequence_has_ended_it(client: Any, more: dict[str, int]) -> None:
    asked = {**ASKED, "extra_body": {"temperature": 0, **more}}
    for stops, told in (["I am", "zebra"], ("stop_sequence", "I am")), (["zebra"], ("end_turn", None)):
        whole = client.messages.create(**asked, stop_sequences=stops)
        with client.messages.stream(**asked, stop_sequences=stops) as stream:
            final = stream.get_final_message()
        assert (whole.stop_reason, whole.stop_sequence) == (final.stop_reason, final.stop_sequence) == told
        assert whole.content[0].text == final.content[0].text
        assert "I am" not in whole.content[0].text or stops == ["zebra"]


def test_thoughts_and_calls_are_blocks(player: Router) -> None:
    with (
        anthropic.Anthropic(base_url=player.url, api_key="none", max_retries=0) as client,
        client.messages.stream(**{**ASKED, "model": "caller"}, extra_body={"seed": 1}) as stream,
    ):
        final = stream.get_final_message()
    thought, text, *calls = final.content
    assert (thought.thinking, text.text) == ("Where?", "Let me see.")
    assert [(call.id, call.name, call.input) for call in calls] == [
        ("call_1", "weather", {"city": "Oslo"}),
        ("call_2", "weather", {"city": "Rome"}),
    ]
    assert final.stop_reason == "tool_use"
    usage = final.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 3, 12)


@pytest.mark.parametrize(("alias", "message"), [("fails", "Compute error"), ("dies", "was interrupted")])
def test_what_goes_wrong_in_the_middle_is_thrown(player: Router, alias: str, message: str) -> None:
    with (
        anthropic.Anthropic(base_url=player.url, api_key="none", max_retries=0) as client,
        pytest.raises(anthropic.APIError, match=message),
        client.messages.stream(**{**ASKED, "model": alias}, extra_body={"seed": 1}) as stream,
    ):
        stream.get_final_message()


def test_a_call_that_was_cut_off_has_no_input(player: Router) -> None:
    answer = player.http.post("/v1/messages", json={**ASKED, "model": "cut", "seed": 1}).json()
    assert answer["stop_reason"] == "max_tokens"
    assert answer["content"] == [{"type": "tool_use", **NAMED, "input": {}}]


def test_an_answer_that_is_none_is_an_error(player: Router) -> None:
    answer = player.http.post("/v1/messages", json={**ASKED, "model": "odd", "seed": 1}, timeout=20)
    assert answer.status_code == 502
    assert "cannot be read" in answer.json()["error"]["message"]


def test_a_schema_is_only_told_where_tools_may_be_called() -> None:
    body = {**ASKED, "output_config": FORM, "tools": [TOOL], "system": "Be brief."}
    asked = read(json.dumps(body).encode())
    assert not asked.is_chat
    system = json.loads(asked.body)["system"]
    assert '"enum": ["Oslo", "Rome"]' in system
    assert system.endswith("Be brief.")
    assert read(json.dumps({**body, "tool_choice": {"type": "none"}}).encode()).is_chat


def test_what_the_engine_does_not_drop_goes_to_it_byte_for_byte() -> None:
    for body in (
        b'{"model": "demo",  "messages": [], "temperature": 0.5}',
        b'{"model": "demo", "messages": [], "output_config": {"effort": "low"}}',
        b'{"model": "demo", "messages": 7, "seed": 1}',
        b'{"model": "demo", "seed": 1}',
        b'{"model": "demo", "messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}',
        b'{"model": "demo", "messages": [{"role": "user", "content": [{"type": "tool_result"}, 7]}]}',
        b'{"model": "demo", "messages": [{"role": "user", "text": "tool_result"}, "tool_result"]}',
        b"--form\r\n",
    ):
        assert read(body).body == body


def test_calls_without_a_number_are_told_apart_by_their_place() -> None:
    """Some servers send each call in one piece, and no `index` with it."""
    calls = [{"id": f"call_{city}", "function": {"name": "weather", "arguments": f'"{city}"'}} for city in "ab"]
    translation = Translation([])
    said = translation.events(f"data: {json.dumps(chunk('tool_calls', tool_calls=calls))}\n\n".encode())
    begun = [
        json.loads(line[6:])
        for line in said.splitlines()
        if line.startswith(b'data: {"type":"content_block_start"')
    ]
    assert [each["content_block"]["id"] for each in begun] == ["call_a", "call_b"]
