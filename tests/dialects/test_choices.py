"""Stories of answers with several choices: what the client gets, and what is counted."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import Router, Start, eventually, fake, models

from router.dataplane.routing import ONE, Shape, shape_of
from router.dialects.openai.choices import Several

HELLO = [{"role": "user", "content": "hi"}]
FORCED = {"uses": "a", "forced": {"n": 2}}
LONG = 12 << 20
"""Bytes; more than the system takes from a router for a client that does not read."""


def piece(index: int, **delta: Any) -> dict[str, Any]:
    return {"id": "x", "object": "chat.completion.chunk", "choices": [{"index": index, "delta": delta}]}


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    flags = ["-np", "2", "-c", "1024", "--ignore-eos"]
    cramped = models(tiny, "cramped", flags=["-np", "1", "-c", "256"])
    return start_shared({"models": {**models(tiny, "a", flags=flags), **cramped}, "aliases": {"twice": FORCED}})


@pytest.fixture(scope="module")
def player(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    """Engines that play: one has died once in the middle, one says more than a connection holds, and one dies when
    one of two choices has ended."""
    directory = tmp_path_factory.mktemp("player")
    (directory / "long").write_text(json.dumps(piece(0, content="x" * LONG)))
    half = [{"index": 0, "content": "a", "stop": True}, *[{"index": 1, "content": "b", "stop": False}] * 2]
    (directory / "half").write_text("\n".join(json.dumps(event, separators=(",", ":")) for event in half))
    ways = {
        "half": {"FAKE_EVENTS": str(directory / "half"), "FAKE_DIE": "after"},
        "mortal": {"FAKE_DIE": f"once-after {directory / 'witness'}"},
        "talker": {"FAKE_EVENTS": str(directory / "long")},
    }
    entries = {alias: models(tiny, alias, flags=["-np", "2"], env=env)[alias] for alias, env in ways.items()}
    return start_shared({"system": {"llama_server_path": fake(directory)}, "models": entries})


def events(answer: Any) -> list[dict[str, Any]]:
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(event) for event in data]


def test_a_document_counts_all_its_choices(router: Router) -> None:
    answer = router.chat("a", n=2, max_tokens=4).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["object"] == "chat.completion"
    for choice in answer["choices"]:
        assert (choice["finish_reason"], choice["message"]["role"]) == ("length", "assistant")
        assert choice["message"]["content"]
    one = router.chat("a", max_tokens=4).json()
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert answer["usage"]["total_tokens"] == one["usage"]["prompt_tokens"] + 8
    assert answer.keys() == one.keys()


@pytest.mark.parametrize("told", [True, False])
def test_a_stream_ends_with_the_usage_of_all_choices_or_with_none(router: Router, told: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if told else {}
    said = events(router.chat("a", n=2, max_tokens=3, stream=True, **options))
    *chunks, last = said
    assert {chunk["choices"][0]["index"] for chunk in said if chunk["choices"]} == {0, 1}
    assert [c["choices"][0]["finish_reason"] for c in said if c["choices"]].count("length") == 2
    assert [chunk for chunk in chunks if "usage" in chunk or "timings" in chunk] == []
    if told:
        assert (last["choices"], last["usage"]["completion_tokens"], last["object"]) == (
            [],
            6,
            "chat.completion.chunk",
        )
    else:
        assert last["choices"]


def test_every_choice_of_every_prompt_is_counted(router: Router) -> None:
    asked = {"model": "a", "prompt": ["one", "two and more"], "n": 2, "max_tokens": 3, "temperature": 0}
    alone = [
        router.http.post("/v1/completions", json={**asked, "prompt": prompt, "n": 1}).json()
        for prompt in asked["prompt"]
    ]
    texts = [document["choices"][0]["text"].rstrip("\ufffd") for document in alone]  # streams hold halves back
    prompt_tokens = sum(document["usage"]["prompt_tokens"] for document in alone)
    answer = router.http.post("/v1/completions", json=asked).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == [texts[0], texts[0], texts[1], texts[1]]
    assert (answer["usage"]["completion_tokens"], answer["usage"]["prompt_tokens"]) == (12, prompt_tokens)
    streamed = events(router.http.post("/v1/completions", json={**asked, "stream": True, "logprobs": 1}))
    assert {chunk["choices"][0]["index"] for chunk in streamed} == {0, 1, 2, 3}


def test_the_metrics_count_all_choices(router: Router) -> None:
    def counted() -> int:
        lines = router.http.get("/metrics").text.splitlines()
        return sum(
            int(line.split()[-1]) for line in lines if line.startswith('router_output_tokens_total{model="a"}')
        )

    before = counted()
    router.chat("a", n=2, max_tokens=5)
    router.chat("a", n=2, max_tokens=5, stream=True)
    router.chat("twice", max_tokens=5)
    eventually(lambda: counted() == before + 30)


@pytest.mark.parametrize("path", ["/completion", "/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_choices_on_the_engines_own_route_are_counted_and_pass_as_they_are(
    router: Router, path: str, stream: bool
) -> None:
    def counted(kind: str) -> int:
        lines = router.http.get("/metrics").text.splitlines()
        metric = f'router_{kind}_tokens_total{{model="a"}}'
        return sum(int(line.split()[-1]) for line in lines if line.startswith(metric))

    before = counted("output"), counted("input")
    asked = {"model": "a", "prompt": ["one", "two and more"], "n_cmpl": 2, "n_predict": 5, "stream": stream}
    answer = router.http.post(path, json=asked)
    if stream:
        said = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        ended = [event for event in said if event["stop"]]
    else:
        ended = answer.json()
    assert sorted(choice["index"] for choice in ended) == [0, 1, 2, 3]
    prompts = sum(choice["tokens_evaluated"] for choice in ended if choice["index"] % 2 == 0)
    eventually(lambda: (counted("output") - before[0], counted("input") - before[1]) == (20, prompts))
    assert router.http.post(path, json={**asked, "n_cmpl": 3}).status_code == 400


def test_more_choices_than_slots_are_refused_with_what_to_do(router: Router) -> None:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="-", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match=r"`n` is 3, and 'a' computes 2 at once .*--parallel"):
            client.chat.completions.create(model="a", messages=HELLO, n=3)  # type: ignore[arg-type]
        both = client.chat.completions.create(model="a", messages=HELLO, n=2, max_tokens=2)  # type: ignore[arg-type]
        assert len(both.choices) == 2
        chunks = client.chat.completions.create(
            model="a",
            messages=HELLO,
            n=2,
            max_tokens=2,
            stream=True,  # type: ignore[arg-type]
        )
        assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def test_an_error_of_the_engine_is_passed_on(router: Router) -> None:
    answer = router.chat("a", n=2, temperature="hot")
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_an_error_in_the_middle_is_the_answer_to_who_wants_a_document(router: Router) -> None:
    asked = {"model": "cramped", "prompt": ["hi", "word " * 300], "max_tokens": 2}
    answer = router.http.post("/v1/completions", json=asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.headers["x-should-retry"] == "false"
    assert '"error"' in router.http.post("/v1/completions", json={**asked, "stream": True}).text


def test_a_document_that_nobody_has_seen_any_of_is_asked_for_again(player: Router) -> None:
    answer = player.chat("mortal", n=2)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "012"


def test_a_stream_that_breaks_before_all_choices_have_ended_says_so(player: Router) -> None:
    asked = {"model": "half", "prompt": "hi", "n_cmpl": 2, "stream": True}
    *_, error, end = player.http.post("/completion", json=asked).text.split("\n\n")[:-1]
    assert "engine_lost" in error
    assert end == "data: [DONE]"


def test_who_does_not_read_the_end_leaves_the_engine_to_others(player: Router) -> None:
    body = json.dumps({"model": "talker", "messages": HELLO, "n": 2, "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.create_connection(player.address) as deaf:
        deaf.sendall(head + body)
        eventually(lambda: player.status("talker")["in_flight"] == 0 and served(player, "talker") == 1)
        assert len(player.chat("talker").text) < LONG


def served(router: Router, alias: str) -> int:
    stats = router.http.get("/v1/queue/stats").json()["per_model"][alias]
    return int(stats["total_processed"])


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({}, ONE),
        ({"n": 1}, ONE),
        ({"n": 3}, Shape(3, 1)),
        ({"n": 3, "n_cmpl": 2}, Shape(2, 1)),
        ({"n": "3"}, ONE),
        ({"n": True}, ONE),
        ({"n": -2}, ONE),
        ({"prompt": "a"}, ONE),
        ({"prompt": ["a"]}, ONE),
        ({"prompt": ["a", "b"]}, Shape(1, 2)),
        ({"prompt": [[1, 2], [3]], "n": 2}, Shape(2, 2)),
        ({"prompt": [1, 2, 3]}, ONE),
        ({"prompt": [1, "two"]}, ONE),
        ({"prompt": []}, ONE),
    ],
)
def test_how_many_answers_a_request_asks_for(asked: dict[str, Any], shape: Shape) -> None:
    assert shape_of(json.dumps(asked).encode()) == shape


def test_calls_and_thoughts_of_two_choices_are_put_together() -> None:
    def call(arguments: str, **more: Any) -> list[dict[str, Any]]:
        return [{"index": 0, **more, "function": {**({"name": "add"} if more else {}), "arguments": arguments}}]

    def end(index: int, tokens: int) -> list[dict[str, Any]]:
        usage = {
            "prompt_tokens": 5,
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": index},
        }
        return [
            {"choices": [{"index": index, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": usage},
        ]

    chunks = [
        piece(1, role="assistant", content=None),
        piece(0, role="assistant", content=None),
        piece(1, content="b"),
        piece(0, reasoning_content="hm"),
        piece(0, tool_calls=call('{"x"', id="c", type="function")),
        piece(1, content="c"),
        piece(0, tool_calls=call(": 1}")),
        *end(1, 2),
        *end(0, 7),
    ]
    raw = b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n"
    for size in (1, 7, 10_000):
        several = Several(b'{"n": 2}', Shape(2, 1))
        for at in range(0, len(raw), size):
            assert several.events(raw[at : at + size]) == b""
        document = json.loads(several.last_events())
        first, second = document["choices"]
        assert (second["message"]["content"], second["finish_reason"]) == ("bc", "stop")
        assert first["message"]["reasoning_content"] == "hm"
        assert first["message"]["content"] is None
        assert first["message"]["tool_calls"] == [
            {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
        ]
        assert document["usage"]["completion_tokens"] == 9
        assert document["usage"]["prompt_tokens"] == 5
        assert several.usage().output_tokens == 9


def test_signs_of_life_are_no_part_of_a_document() -> None:
    several = Several(b'{"n": 2}', Shape(2, 1))
    assert several.events(b": still here\n\n") == b""
    assert Several(b'{"n": 2, "stream": true}', Shape(2, 1)).events(b": still here\n\n") == b": still here\n\n"
