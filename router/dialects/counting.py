"""Counting tokens on engines without a route for that: the usage of an answer of one token has the prompt's."""

from __future__ import annotations

from typing import Any

import msgspec

from router.dataplane.answer import BrokenAnswer, Translator

_OF_THE_PROMPT = ("model", "messages", "tools", "tool_choice", "chat_template_kwargs", "reasoning_effort")
"""Fields that determine the prompt."""

_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.encode


class _Usage(msgspec.Struct):
    prompt_tokens: int


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode


def question(chat: bytes | memoryview) -> bytes:
    """Return the shortest request for a chat with the same prompt."""
    fields = _fields_of(chat)
    kept: dict[str, Any] = {name: fields[name] for name in _OF_THE_PROMPT if name in fields}
    return _encode({**kept, "max_tokens": 1, "stream": False})


class Count(Translator):
    """Translates the answer to `question` to a number of tokens."""

    def __init__(self, **beside: str) -> None:
        """`beside`: further fields of the answer."""
        super().__init__()
        self._beside = beside

    def document(self, body: bytes) -> bytes:
        usage = _decode_answer(body).usage
        if usage is None:
            raise BrokenAnswer.unreadable("it tells no usage")
        return _encode({**self._beside, "input_tokens": usage.prompt_tokens})

    def _event(self, data: bytes) -> bytes:
        raise BrokenAnswer.unreadable("it is a stream")
