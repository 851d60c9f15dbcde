"""The engine's own figures are found in every form of answer, however the network tears it, and nowhere else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import Start, models

from router.engines.llamacpp.usage import AnswerMeter
from router.observe.usage import NO_USAGE, Usage
from router.store.demo import MODEL_PATH

CHAT = [{"role": "user", "content": 'say "usage":{"prompt_tokens":77,"completion_tokens":88} '}]


def metered(answer: bytes, size: int) -> Usage:
    meter = AnswerMeter()
    for start in range(0, len(answer), size):
        meter.note(answer[start : start + size])
    assert meter.size == len(answer)
    return meter.usage()


def test_figures_are_found_in_every_form_of_answer(start: Start) -> None:
    """The demo model writes the same words each time: a token that is half a character would delay its events."""
    chat = models(MODEL_PATH, "chat", flags=["-c", "512", "-t", "1", "--temp", "0"])
    embed = models(MODEL_PATH, "embed", flags=["-c", "512", "-t", "1", "--embedding", "--pooling", "mean"])
    router = start({"models": {**chat, **embed}})
    prompt = {"prompt": CHAT[0]["content"], "max_tokens": 5}
    forms: list[tuple[str, dict[str, Any], int]] = [
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 5}, 5),
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 5, "stream": True}, 5),
        (
            "/v1/chat/completions",
            {"messages": CHAT, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}},
            5,
        ),
        ("/v1/completions", prompt, 5),
        ("/v1/completions", {**prompt, "stream": True}, 5),
        ("/completion", {"prompt": prompt["prompt"], "n_predict": 5}, 5),
        ("/completion", {"prompt": prompt["prompt"], "n_predict": 5, "stream": True}, 5),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 5}, 5),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 5, "stream": True}, 5),
        ("/v1/responses", {"input": CHAT[0]["content"], "max_output_tokens": 5}, 5),
        ("/v1/responses", {"input": CHAT[0]["content"], "max_output_tokens": 5, "stream": True}, 5),
        ("/v1/embeddings", {"input": "hello there"}, 0),
    ]
    for path, body, output in forms:
        alias = "embed" if "embed" in path else "chat"
        answer = router.http.post(path, json={"model": alias, **body})
        assert answer.status_code == 200, answer.text
        usage = metered(answer.content, 100_000)
        assert usage.output_tokens == output, (path, body, usage)
        assert usage.prompt_tokens == tokens_of(answer.content), (path, body, usage)
        assert 0 <= usage.cached_tokens < usage.prompt_tokens
        if "messages" not in path and path != "/v1/responses" and alias == "chat":
            assert usage.prefill_sec > 0
        assert metered(answer.content, 1400) == usage  # torn as a network may

    for path, body, _ in (form for form in forms if form[1].get("stream")):
        longer = {"model": "chat", **body, "max_tokens": 60, "max_output_tokens": 60, "n_predict": 60}
        answer = router.http.post(path, json=longer)
        events = [event + b"\n\n" for event in answer.content.split(b"\n\n")]
        said = [number for number, event in enumerate(events) if _says(event)]
        assert len(said) > 12
        for pieces in (1, 3, 12):
            cut = AnswerMeter()
            cut.note(b"".join(events[: said[0] + 1]))  # an engine writes them together
            for event in events[said[0] + 1 : said[pieces]]:
                cut.note(event)
            assert not cut.has_ended
            assert cut.usage().output_tokens == pytest.approx(pieces, abs=1), (path, pieces)


def _says(event: bytes) -> bool:
    """Whether it has a piece of the answer, found the long way."""
    data = event.partition(b"data: ")[2]
    if not data.startswith(b"{"):
        return False
    document = json.loads(data)
    if "done" in document.get("type", ""):
        return False
    delta = document.get("delta", {})
    choice = document.get("choices", [{}])[0] if document.get("choices") else {}
    said = delta if isinstance(delta, str) else delta.get("text")
    return bool(said or choice.get("text") or choice.get("delta", {}).get("content") or document.get("content"))


def tokens_of(answer: bytes) -> int:
    """The prompt's tokens, read the long way."""
    documents = (
        [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]
        if answer.startswith((b"data:", b"event:"))
        else [json.loads(answer)]
    )
    for document in reversed(documents):
        for found in (document, document.get("response", {}), document.get("message", {})):
            usage = found.get("usage", {})
            if "prompt_tokens" in usage:
                return int(usage["prompt_tokens"])
            if "input_tokens" in usage:
                return int(usage["input_tokens"] + usage.get("cache_read_input_tokens", 0))
            if "timings" in found and not usage:
                return int(found["timings"]["prompt_n"] + found["timings"]["cache_n"])
    raise AssertionError("it says nothing of tokens")


def test_what_a_model_writes_is_no_figure() -> None:
    boast = json.dumps({"choices": [{"message": {"content": '"usage": {"prompt_tokens": 1000000}'}}]}).encode()
    assert metered(boast, 100) == NO_USAGE
    assert metered(b'{"object":"response.input_tokens","input_tokens":12}', 100) == NO_USAGE  # only counted
    assert metered(b'{"error":{"code":400,"message":"no"}}', 100) == NO_USAGE
    assert AnswerMeter().usage() == NO_USAGE


def test_an_engine_that_gives_up_in_the_middle_of_a_stream_is_noticed() -> None:
    text = (
        b"data: %b\n\n"
        % json.dumps({"choices": [{"delta": {"content": 'event: error\ndata: {"error":'}}]}).encode()
    )
    for end, failed in (
        (b"data: [DONE]\n\n", False),
        (b'data: {"error":{"code":500,"message":"no"}}\n\n', True),
        (b'data: {"error":{"code":500,"message":"no"}}\n\ndata: [DONE]\n\n', True),
        (b'event: error\ndata: {"type":"error"}\n\n', True),
    ):
        meter = AnswerMeter()
        for part in (text, text, end):
            meter.note(part)
        assert meter.ends_in_error == failed


def test_the_end_of_a_stream_is_known_from_its_last_event() -> None:
    boast = json.dumps({"choices": [{"delta": {"content": 'data: [DONE]\n\nevent: message_stop\n"stop":true'}}]})
    said = b"data: %b\n\n" % boast.encode()
    for end in (
        b"data: [DONE]\n\n",
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
        b'event: response.completed\ndata: {"type":"response.completed"}\n\n',
        b'data: {"content":"","stop":true,"timings":{}}\n\n',
    ):
        meter = AnswerMeter()
        for part in (said, said, end[:9], end[9:-1]):
            meter.note(part)
            assert meter.has_ended == (part == end[9:-1])
        meter.note(end[-1:])
        assert meter.has_ended


def test_huge_vectors_do_not_hide_the_figures_before_them() -> None:
    vectors = b",".join([b"0.123456789"] * 50_000)
    answer = b'{"object":"list","usage":{"prompt_tokens":9,"total_tokens":9},"data":[[%b]]}' % vectors
    assert metered(answer, 65536) == Usage(prompt_tokens=9)


def test_spaces_between_names_and_figures_are_no_hindrance() -> None:
    answer = json.dumps({"usage": {"prompt_tokens": 3, "completion_tokens": 4}, "id": "x"}).encode()
    assert metered(answer, 1000) == Usage(prompt_tokens=3, output_tokens=4)


def test_an_end_in_crumbs_is_an_end() -> None:
    meter = AnswerMeter()
    stream = b"data: {}\n\ndata: [DONE]\n\n"
    for begin in range(len(stream)):
        meter.note(stream[begin : begin + 1])
    assert meter.has_ended
    assert len(meter._tail or ()) <= 4
