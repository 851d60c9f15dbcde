"""The translation between Ollama's API and llama-server's, by itself."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pytest

from router.dataplane.answer import BrokenAnswer
from router.dialects.ollama.answers import Translation
from router.dialects.ollama.requests import Asked, duration_sec, translate
from router.http.errors import ApiError


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [
        (None, None),
        ("", None),
        (0, 0),
        (90, 90),
        (1.5, 1.5),
        (-1, math.inf),
        ("-1", math.inf),
        ("0", 0),
        ("300", 300),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("250ms", 0.25),
        ("-1m", math.inf),
        ("0s", 0),
    ],
)
def test_durations(keep_alive: float | str | None, seconds: float | None) -> None:
    assert duration_sec(keep_alive) == seconds


@pytest.mark.parametrize("keep_alive", ["5 m", "m", "5x", "1h-5m", "for ever", "1" * 5000 + "x"])
def test_what_is_no_duration(keep_alive: str) -> None:
    with pytest.raises(ApiError, match="keep_alive"):
        duration_sec(keep_alive)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n", "data:image/png"),
        (b"\xff\xd8\xff\xe0", "data:image/jpeg"),
        (b"GIF89a", "data:image/gif"),
        (b"RIFF\x10\0\0\0WEBP", "data:image/webp"),
        (b"RIFF\x10\0\0\0WAVE", "wav"),
    ],
)
def test_what_an_image_is_its_first_bytes_tell(head: bytes, kind: str) -> None:
    encoded = base64.b64encode(head + bytes(30)).decode()
    message = {"role": "user", "content": "what?", "images": [encoded]}
    body = json.dumps({"model": "m", "messages": [message]}).replace("/", "\\/")  # as some write it
    asked = json.loads(translate("/api/chat", body.encode()).body("m"))
    _, medium = asked["messages"][0]["content"]
    if kind == "wav":
        assert medium["input_audio"] == {"data": encoded, "format": "wav"}
    else:
        assert medium["image_url"]["url"] == f"{kind};base64,{encoded}"


@pytest.mark.parametrize(("wanted", "asked_for"), [(7, 7), (0, -1), (-1, -1), (-2, -1)])
def test_no_number_of_tokens_is_below_one(wanted: int, asked_for: int) -> None:
    body = {"model": "m", "prompt": "hi", "options": {"num_predict": wanted}}
    assert json.loads(translate("/api/generate", json.dumps(body).encode()).body("m"))["n_predict"] == asked_for


def asked(kind: Any = "chat", **more: Any) -> Asked:
    return Asked(kind, "m", True, None, "/v1/chat/completions", {}, **more)


def test_a_stream_may_come_in_any_pieces() -> None:
    events = [
        {"choices": [{"delta": {"content": "é", "role": "assistant"}}]},
        {"choices": [{"delta": {"reasoning_content": "\n\ndata: "}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 1}, "timings": {"prompt_ms": 1.5}},
    ]
    stream = ": a comment\n\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    for size in (1, 2, 7, 10_000):
        translation = Translation(asked())
        translation.waited_sec = 2.0
        raw = stream.encode()
        lines = b"".join(translation.events(raw[at : at + size]) for at in range(0, len(raw), size))
        *said, last = map(json.loads, (lines + translation.last_events()).splitlines())
        assert [line["message"] for line in said] == [
            {"role": "assistant", "content": "é"},
            {"role": "assistant", "content": "", "thinking": "\n\ndata: "},
        ]
        assert (last["done"], last["done_reason"], last["load_duration"]) == (True, "stop", 2_000_000_000)
        assert (last["prompt_eval_count"], last["eval_count"], last["prompt_eval_duration"]) == (2, 1, 1_500_000)


def test_a_completion_ends_by_its_limit() -> None:
    translation = Translation(asked("raw"))
    said = json.loads(translation.events(b'data: {"content": "a", "stop": false}\n\n'))
    assert said["response"] == "a"
    assert translation.events(b'data: {"content": "", "stop": true, "stop_type": "limit"}\n\n') == b""
    assert json.loads(translation.last_events())["done_reason"] == "length"


def test_a_stream_that_ends_without_its_last_event_is_not_whole() -> None:
    translation = Translation(asked())
    translation.events(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
    with pytest.raises(BrokenAnswer, match="before its last event"):
        translation.last_events()


def test_what_came_before_an_event_that_cannot_be_read_is_told() -> None:
    translation = Translation(asked())
    with pytest.raises(BrokenAnswer, match="cannot be read") as broken:
        translation.events(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {"choices": [\n\n')
    assert json.loads(broken.value.before)["message"]["content"] == "a"


@pytest.mark.parametrize("image", [3, "a", "é" * 40, None])
def test_what_is_no_image(image: object) -> None:
    body = {"model": "m", "prompt": "what?", "images": [image]}
    with pytest.raises(ApiError, match="image"):
        translate("/api/generate", json.dumps(body, ensure_ascii=False).encode())


def test_calls_of_a_whole_answer_are_as_many_as_there_are() -> None:
    said = (("a", "{}"), ("b", '{"x": 1}'), ("c", "{"))
    calls = [{"id": "", "type": "function", "function": {"name": name, "arguments": text}} for name, text in said]
    message = {"role": "assistant", "content": "So: ", "tool_calls": calls}
    translation = Translation(asked())
    answer = json.loads(translation.document(json.dumps({"choices": [{"message": message}]}).encode()))
    called = [
        (call["function"]["name"], call["function"]["arguments"]) for call in answer["message"]["tool_calls"]
    ]
    assert called == [("a", {}), ("b", {"x": 1})]
    assert answer["message"]["content"] == "So: {"


def test_errors_of_any_shape_are_a_text() -> None:
    shown = {b'"\xff"': '{"error": "\ufffd"}', b'{"message":"\xff"}': '{"error": {"message":"\ufffd"}}'}
    for error, text in ((b'{"message": "no"}', "no"), (b'"no"', "no"), (b"3", '{"error": 3}'), *shown.items()):
        with pytest.raises(BrokenAnswer) as broken:
            Translation(asked()).events(b'data: {"error": %b}\n' % error)
        said = broken.value.error.message
        assert said == text or "cannot be read" in said
