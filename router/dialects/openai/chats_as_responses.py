"""Answers of chats translated to OpenAI's responses, for engines that have chats only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from router.dataplane.answer import LONGEST_EVENT, BrokenAnswer
from router.dialects.chats import NO_ERROR, Call, Said, Usage
from router.dialects.openai.responses import Asked, Completion
from router.engines.llamacpp.capability import error_of_engine
from router.http.errors import ApiError

_MOST_CALLS = 1 << 10
"""Maximum number of tool calls in one answer."""

_encode = msgspec.json.encode


class _Choice(msgspec.Struct):
    delta: Said | None = None
    message: Said | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    """An event of a chat's stream, or a complete answer."""

    model: str = ""
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = NO_ERROR


_decode = msgspec.json.Decoder(_Chunk).decode

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Reasons for an incomplete response, by the chat's finish reason."""


class _Item:
    """An output item, as far as it has arrived: reasoning, a message or a call."""

    def __init__(self, kind: str, number: int, fields: dict[str, Any]) -> None:
        """`number`: the item's index in the response."""
        self.kind = kind
        self.number = number
        self.identity = f"{_PREFIXES[kind]}_{time.time_ns():x}{number:02x}"
        self.pieces: list[str] = []
        self._fields = fields

    @property
    def place(self) -> dict[str, Any]:
        content = {} if self.kind == "function_call" else {"content_index": 0}
        return {"item_id": self.identity, "output_index": self.number, **content}

    def part(self) -> dict[str, Any]:
        """Return the content part of the item."""
        text = "".join(self.pieces)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def told(self, status: str) -> dict[str, Any]:
        """Return the item, as far as it has arrived."""
        named = {"id": self.identity, "type": self.kind, "status": status, **self._fields}
        if self.kind == "function_call":
            return {**named, "arguments": "".join(self.pieces)}
        return {**named, "content": [self.part()] if self.pieces else []}


_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_FIELDS: dict[str, dict[str, Any]] = {"reasoning": {"summary": []}, "message": {"role": "assistant"}}
_DELTAS = {
    "reasoning": "response.reasoning_text.delta",
    "message": "response.output_text.delta",
    "function_call": "response.function_call_arguments.delta",
}


class ChatAsResponse(Completion):
    """Translates a chat's answer to the response to one request."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._finish: str | None = None
        """The chat's finish reason, once it has arrived."""
        self._usage: Usage | None = None
        self._model = ""
        """The engine's name of the model, for clients that named none."""
        self._output: list[_Item] = []
        self._current: _Item | None = None
        """The open item, reasoning or message."""
        self._calls: dict[int, _Item] = {}
        self._collected = 0
        """Characters and pieces of all items."""

    # --- the engine's answer ------------------------------------------------------------------------------

    def document(self, body: bytes) -> bytes:
        chunk = _decode(body)
        self._model, self._usage = chunk.model, chunk.usage
        for choice in chunk.choices[:1]:
            self._finish = choice.finish_reason
            self._say(choice.message or Said())
        return _encode(self._whole())

    def last_events(self) -> bytes:
        if self._ended:
            return b""
        if self._finish is None:
            raise BrokenAnswer(
                ApiError(502, "engine_lost", "The engine ended the stream before the response was complete.")
            )
        events = self._close(self._current) if self._current is not None else b""
        events += b"".join(map(self._close, self._calls.values()))
        self._ended = True
        response = self._whole()
        return events + self._written(f"response.{response['status']}", {"response": response})

    def _event(self, data: bytes) -> bytes:
        if self._ended or data == b"[DONE]":
            return b""
        chunk = _decode(data)
        if chunk.error is not NO_ERROR:
            raise BrokenAnswer(error_of_engine(500, data))
        self._model, self._usage = chunk.model, chunk.usage or self._usage
        events = b"" if self._begun else self._begin({})
        for choice in chunk.choices[:1]:
            self._finish = choice.finish_reason or self._finish
            if choice.delta is not None:
                events += self._say(choice.delta)
        return events

    # --- its items ----------------------------------------------------------------------------------------

    def _say(self, said: Said) -> bytes:
        events = b""
        if thoughts := said.thoughts:
            events += self._piece("reasoning", thoughts)
        if said.content:
            events += self._piece("message", said.content)
        for number, call in enumerate(said.tool_calls or ()):
            events += self._called(number if call.index is None else call.index, call)
        return events

    def _piece(self, kind: str, text: str) -> bytes:
        events = b""
        item = self._current
        if item is None or item.kind != kind:
            if item is not None:
                events += self._close(item)
            item, begin = self._add(kind, _FIELDS[kind])
            self._current = item
            events += begin + self._written("response.content_part.added", {**item.place, "part": item.part()})
        return events + self._grow(item, text)

    def _called(self, index: int, call: Call) -> bytes:
        events = b""
        item = self._calls.get(index)
        if item is None:
            if len(self._calls) == _MOST_CALLS:
                raise BrokenAnswer.unreadable("its calls of tools do not end")
            fields = {"call_id": call.id or f"call_{index}", "name": call.function.name or ""}
            item, events = self._add("function_call", fields)
            self._calls[index] = item
        return events + (self._grow(item, call.function.arguments) if call.function.arguments else b"")

    def _add(self, kind: str, fields: dict[str, Any]) -> tuple[_Item, bytes]:
        item = _Item(kind, len(self._output), fields)
        self._output.append(item)
        added = {"output_index": item.number, "item": item.told("in_progress")}
        return item, self._written("response.output_item.added", added)

    def _grow(self, item: _Item, text: str) -> bytes:
        item.pieces.append(text)
        self._collected += len(text) + 1
        if self._collected > LONGEST_EVENT:
            raise BrokenAnswer.unreadable("it is too long")
        logprobs: dict[str, Any] = {"logprobs": []} if item.kind == "message" else {}
        return self._written(_DELTAS[item.kind], {**item.place, "delta": text, **logprobs})

    def _close(self, item: _Item) -> bytes:
        text = "".join(item.pieces)
        if item.kind == "function_call":
            events = self._written("response.function_call_arguments.done", {**item.place, "arguments": text})
        else:
            said = {**item.place, "text": text}
            if item.kind == "message":
                events = self._written("response.output_text.done", {**said, "logprobs": []})
            else:
                events = self._written("response.reasoning_text.done", said)
            events += self._written("response.content_part.done", {**item.place, "part": item.part()})
        ended = {"output_index": item.number, "item": item.told("completed")}
        return events + self._written("response.output_item.done", ended)

    # --- the response -------------------------------------------------------------------------------------

    def _base(self) -> dict[str, Any]:
        return {"model": self._model, **super()._base()}

    def _begin(self, response: Mapping[str, Any]) -> bytes:
        begin = super()._begin(response)
        shown = {**self._base(), "status": "in_progress"}
        return begin + self._written("response.in_progress", {"response": shown})

    def _whole(self) -> dict[str, Any]:
        """Return the complete response after the engine's last event."""
        cut = _INCOMPLETE.get(self._finish or "")
        if cut is None:
            ended: dict[str, Any] = {"status": "completed", "completed_at": int(time.time())}
        else:
            ended = {"status": "incomplete", "incomplete_details": {"reason": cut}}
        output = [item.told("completed") for item in self._output]
        return {**self._base(), **ended, "output": output, "usage": _told(self._usage or Usage())}


def _told(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }
