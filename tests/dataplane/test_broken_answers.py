"""Answers of engines that cannot be understood leave nothing in memory once their client has its error."""

from __future__ import annotations

import gc

import pytest

from router.dataplane.answer import Answer, BrokenAnswer, TranslatedAnswer
from router.dialects.anthropic.answers import Translation
from router.http.errors import ApiError


class Wire:
    """Of a client that takes whatever comes."""

    peer = "nobody"
    default_lines = b""

    def write(self, data: bytes) -> None: ...

    def answered(self, *, keep_alive: bool) -> None: ...

    def abort(self) -> None: ...

    def invite_body(self) -> None: ...


class Unfinished(Translation):
    def last_events(self) -> bytes:
        raise BrokenAnswer(ApiError(502, "engine_lost", "There should have been more."))


def told(part: bytes) -> None:
    answer = TranslatedAnswer(Answer(Wire(), keep_alive=True, http_1_0=False), Unfinished(()), streams=True)
    answer.start(200, b"content-type: text/event-stream\r\n")
    with pytest.raises(BrokenAnswer):
        answer.rest(part)


@pytest.mark.parametrize("part", [b"data: nonsense\n", b'data: {"error": {"message": "no"}}\n', b"data: [DONE]\n"])
def test_a_broken_stream_waits_for_no_garbage_collector(part: bytes) -> None:
    told(part)  # pytest keeps something of the first
    gc.collect()
    gc.disable()
    try:
        told(part)
        broken = [thing for thing in gc.get_objects() if isinstance(thing, BrokenAnswer)]
    finally:
        gc.enable()
    assert broken == []
