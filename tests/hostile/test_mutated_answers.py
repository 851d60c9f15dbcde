"""Mutated answers of engines: each ends its client's request, and counts once, as no mistake of the router."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import Counter

import httptools
import pytest
from mutations import LONG, SEED, mutated
from played_router import PlayedRouter
from test_garbage_engines import ROUTES, Route

_COUNT = 50_000 if LONG else 1000
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_TIMINGS = {"cache_n": 1, "prompt_n": 3, "prompt_ms": 1.5, "predicted_n": 7, "predicted_ms": 9.25}
_CALL = {
    "index": 0,
    "id": "c",
    "type": "function",
    "function": {"name": "add", "arguments": '{"x": [1, {"y": 2}]}'},
}
_CHAT = {
    "id": "x", "object": "chat.completion", "created": 1, "model": "a", "system_fingerprint": "b1",
    "choices": [{"index": 0, "finish_reason": "stop", "logprobs": {"content": [{"token": "a", "logprob": -0.5,
     "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -1.0, "bytes": [98]}]}]}, "message":
     {"role": "assistant", "content": "é\n", "reasoning_content": "hm", "tool_calls": [_CALL]}}],
    "usage": {"prompt_tokens": 4, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 1}},
    "timings": _TIMINGS,
}  # fmt: skip
_EVENTS = [
    {"id": "x", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"role": "assistant"}}]},
    {"choices": [{"index": 1, "delta": {"reasoning_content": "hm"}, "logprobs": {"content": []}}]},
    {"choices": [{"index": 0, "delta": {"content": "é\n"}, "text": "a"}], "content": "a", "stop": False},
    {"choices": [{"index": 0, "delta": {"tool_calls": [_CALL]}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    {"choices": [], "usage": _CHAT["usage"], "timings": _TIMINGS, "stop": True, "stop_type": "limit"},
]
_RESPONSE = {
    "id": "r", "status": "completed", "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5},
    "output": [{"type": "message", "id": "m", "content": [{"type": "output_text", "text": "hi"}]}],
}  # fmt: skip
_RESPONSES = [
    {"type": "response.created", "response": {"id": "r", "object": "response", "status": "in_progress"}},
    {"type": "response.in_progress", "response": {"id": "r"}},
    {"type": "response.output_item.added", "item": {"type": "message", "id": "m", "content": []}},
    {"type": "response.content_part.added", "item_id": "m", "part": {"type": "output_text", "text": ""}},
    {"type": "response.output_text.delta", "item_id": "m", "delta": "hi"},
    {"type": "response.output_item.done", "item": {"type": "reasoning", "id": "t", "content": [{"text": "hm"}]}},
    {"type": "response.output_item.done", "item": {"type": "function_call", "call_id": "c", "arguments": "{}"}},
    {"type": "response.completed", "response": _RESPONSE},
]
_ERROR = {
    "error": {"code": 400, "message": "no", "type": "exceed_context_size_error", "n_ctx": 8, "n_prompt_tokens": 9}
}


def document(body: object, status: bytes = b"200 OK") -> bytes:
    told = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(told)) + told


def stream(events: list[dict[str, object]]) -> bytes:
    parts = []
    for event in events:
        name = b"event: %b\n" % str(event["type"]).encode() if "type" in event else b""
        parts.append(name + b"data: %b\n\n" % json.dumps(event, separators=(",", ":")).encode())
    parts.append(b"data: [DONE]\n\n")
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n"
        % chunks
    )


def told_on(route: Route) -> list[bytes]:
    """What an engine says there when all is well, or it refuses."""
    errors = [document(_ERROR, b"400 Bad"), document({"error": "no"}, b"500 Bad"), stream([*_EVENTS[:2], _ERROR])]
    if route.path == "/v1/responses":
        return [document(_RESPONSE), stream(_RESPONSES), *errors]
    return [document(_CHAT), stream(_EVENTS), *errors]


def recalculated(chance: random.Random, told: bytes) -> bytes:
    """The body alone made wrong, with a head and chunks that are right: so it gets to who reads it."""
    head, _, body = told.partition(b"\r\n\r\n")
    if b"chunked" not in head:
        body = mutated(chance, body)
        line = b"HTTP/1.1 200 OK" if head.startswith(b"HTTP/1.1 200") else b"HTTP/1.1 500 Bad"
        return b"%b\r\nContent-Length: %d\r\n\r\n%b" % (line, len(body), body)
    told_events = [part for part in body.split(b"\r\n") if part.startswith((b"data:", b"event:"))]
    events = mutated(chance, b"".join(told_events))
    return b"%b\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (head, len(events), events)


class Seen:
    """A client's answers."""

    def __init__(self) -> None:
        self.whole = 0
        self.status = 0
        self.body = b""
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole += 1


async def play(router: PlayedRouter, route: Route, streams: bool, answer: list[bytes]) -> str:
    """Ask, and have the engine say that, in these pieces. Returns how it ended."""
    client, seen = router.client()
    body = json.dumps(route.body("hi", streams=streams)).encode()
    router.engines.clear()
    router.done_requests.clear()
    await asyncio.sleep(0)  # a turn of the event loop reads from a few clients only
    client.data_received(
        b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b"
        % (route.path.encode(), len(body), body)
    )
    for number in range(3):
        if len(router.engines) <= number or router.done_requests:
            break
        engine = router.engines[number]
        for piece in answer:
            if engine.is_open:
                engine.data_received(piece)
        engine.connection_lost(None)
    assert len(router.done_requests) == 1, "it is over once"
    (done,) = router.done_requests
    assert done.outcome != "internal_error"
    said = Seen()
    said.feed(bytes(seen.written))
    if seen.aborted:
        assert done.outcome != "served"
        assert said.whole == 0
    elif said.whole != 1:
        assert seen.closed, "neither whole nor at an end"
    if said.whole and said.status == 200 and route.reads_documents:
        check_words(route, streams, said.body)
    client.connection_lost(None)
    assert len(router.done_requests) == 1
    return done.outcome


def check_words(route: Route, streams: bool, body: bytes) -> None:
    """What is told by the router itself can be read."""
    if route.path.startswith("/api/"):
        for line in body.splitlines():
            json.loads(line)


def test_every_answer_ends(caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(SEED)
    routes = list(ROUTES.values())
    ends: Counter[str] = Counter()

    async def run() -> None:
        router = PlayedRouter()
        for number in range(_COUNT):
            route, streams = chance.choice(routes), chance.random() < 0.5
            told = chance.choice(told_on(route))
            wrong = (recalculated if chance.random() < 0.7 else mutated)(chance, told)
            size = chance.choice((1, 7, 100, 70_000, 70_000)) if len(wrong) < 5000 else 70_000
            pieces = [wrong[at : at + size] for at in range(0, len(wrong), size)]
            try:
                ends[await play(router, route, streams, pieces)] += 1
            except Exception as error:
                raise AssertionError(f"answer {number} to {route}, streams {streams}: {wrong[:2000]!r}") from error
        router.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert not [record for record in caplog.records if record.exc_info], caplog.text
    assert ends["served"] > _COUNT / 20
    assert ends["engine_error"] > _COUNT / 20


@pytest.mark.parametrize("streams", [False, True])
def test_what_is_not_wrong_is_served(streams: bool) -> None:
    async def run() -> None:
        router = PlayedRouter()
        for route in ROUTES.values():
            answers = told_on(route)
            assert await play(router, route, streams, [answers[streams]]) == "served", route
        router.close()

    asyncio.run(run())
