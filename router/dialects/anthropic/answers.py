"""Answers of engines in Anthropic's API: chats are translated, and stop reasons of messages corrected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from router.dataplane.answer import BrokenAnswer, Translator
from router.dialects.chats import NO_ERROR, Said, Usage
from router.engines.llamacpp.capability import error_of_engine
from router.engines.llamacpp.usage import Timings
from router.formats.unreadable import UNREADABLE
from router.http.errors import ApiError

_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_NOTHING = msgspec.Raw(b"null")

_encode = msgspec.json.encode
_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class _Answer(msgspec.Struct):
    finish_reason: str | None = None
    stop_reason: Any = None
    """With vLLM, the stop sequence or token that ended the answer."""
    message: Said | None = None
    delta: Said | None = None


class _Verbose(msgspec.Struct):
    stopping_word: str | None = None


class _Part(msgspec.Struct):
    """A complete answer, or an event of a stream."""

    id: str = ""
    model: str = ""
    choices: list[_Answer] = []
    timings: Timings | None = None
    usage: Usage | None = None
    verbose: _Verbose = msgspec.field(default_factory=_Verbose, name="__verbose")
    """Present if requested, and with newer builds of llama-server: not with 9294."""
    error: msgspec.Raw = NO_ERROR


_decode_part = msgspec.json.Decoder(_Part).decode


class Translation(Translator):
    """Translates the answer of a chat to Anthropic's API."""

    def __init__(self, stops: Sequence[str], model: str = "") -> None:
        """`model`: the model's name in the answer, if it differs from the engine's."""
        super().__init__()
        self._stops = stops
        self._model = model
        self._begun = False
        self._block = ""
        """The kind of block that is open."""
        self._call = -1
        """Index of the call to which the open block belongs."""
        self._blocks = 0
        self._reason = "end_turn"
        self._word: str | None = None
        self._ended = False
        """True once the engine has sent the reason for the end."""
        self._part = _Part()
        """The last event with usage or timings."""

    def document(self, body: bytes) -> bytes:
        part = _decode_part(body)
        choice = part.choices[0] if part.choices else _Answer()
        said = choice.message or Said()
        content: list[dict[str, Any]] = []
        if thoughts := said.thoughts:
            content.append({"type": "thinking", "thinking": thoughts, "signature": ""})
        if said.content:
            content.append({"type": "text", "text": said.content})
        for call in said.tool_calls or ():
            named = {"type": "tool_use", "id": call.id or "", "name": call.function.name or ""}
            content.append({**named, "input": _input(call.function.arguments)})
        ended = _REASONS.get(choice.finish_reason or "", "end_turn")
        reason, stop = _told(ended, part.verbose.stopping_word or choice.stop_reason, self._stops)
        usage = _usage(part)
        return _encode(
            {
                **self._message(part),
                "content": content,
                "stop_reason": reason,
                "stop_sequence": stop,
                "usage": usage,
            }
        )

    def last_events(self) -> bytes:
        if not self._ended:
            raise BrokenAnswer(ApiError(502, "engine_lost", "The engine ended the stream before its last event."))
        reason, stop = _told(self._reason, self._word, self._stops)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        usage = _usage(self._part)
        return b"".join(
            (
                b"" if self._begun else self._begin(_Part()),
                self._close(),
                _written("message_delta", {"delta": delta, "usage": usage}),
                _written("message_stop", {}),
            )
        )

    def _event(self, data: bytes) -> bytes:
        if data == b"[DONE]":
            return b""
        part = _decode_part(data)
        if part.error is not NO_ERROR:
            raise BrokenAnswer(error_of_engine(500, data))
        if part.timings is not None or part.usage is not None:
            self._part = part
        self._word = part.verbose.stopping_word or self._word
        events = b"" if self._begun else self._begin(part)
        for choice in part.choices:
            if choice.finish_reason is not None:
                self._ended = True
                self._word = self._word or choice.stop_reason
                self._reason = _REASONS.get(choice.finish_reason, "end_turn")
            if choice.delta is not None:
                events += self._said(choice.delta)
        return events

    def _begin(self, part: _Part) -> bytes:
        self._begun = True
        begun = {**self._message(part), "content": [], "stop_reason": None, "usage": _usage(_Part())}
        return _written("message_start", {"message": begun})

    def _message(self, part: _Part) -> dict[str, Any]:
        named = {"id": part.id, "type": "message", "role": "assistant", "model": self._model or part.model}
        return {**named, "stop_sequence": None}

    def _said(self, said: Said) -> bytes:
        events = b""
        if thoughts := said.thoughts:
            events += self._piece("thinking", "thinking_delta", "thinking", thoughts)
        if said.content:
            events += self._piece("text", "text_delta", "text", said.content)
        for number, call in enumerate(said.tool_calls or ()):
            index = number if call.index is None else call.index
            if index != self._call:
                self._call = index
                named = {"id": call.id or "", "name": call.function.name or "", "input": {}}
                events += self._close() + self._open("tool_use", named)
            if call.function.arguments:
                events += self._delta("input_json_delta", "partial_json", call.function.arguments)
        return events

    def _piece(self, block: str, kind: str, name: str, text: str) -> bytes:
        begin = b"" if self._block == block else self._close() + self._open(block, {name: ""})
        return begin + self._delta(kind, name, text)

    def _open(self, block: str, fields: dict[str, Any]) -> bytes:
        self._block = block
        if block == "thinking":
            fields = {**fields, "signature": ""}
        opened = {"index": self._blocks, "content_block": {"type": block, **fields}}
        return _written("content_block_start", opened)

    def _delta(self, kind: str, name: str, text: str) -> bytes:
        return _written("content_block_delta", {"index": self._blocks, "delta": {"type": kind, name: text}})

    def _close(self) -> bytes:
        if not self._block:
            return b""
        self._block = ""
        self._blocks += 1
        return _written("content_block_stop", {"index": self._blocks - 1})


class StopReasons(Translator):
    """Corrects the stop reason of the engine's own answer to a request with stop sequences."""

    def __init__(self, stops: Sequence[str]) -> None:
        super().__init__()
        self._stops = stops

    def document(self, body: bytes) -> bytes:
        fields = _fields_of(body)
        try:
            return _encode(self._told(fields))
        except (msgspec.MsgspecError, UnicodeDecodeError):  # a newer format of the engine: passed on
            return body

    def last_events(self) -> bytes:
        return b"".join(self._rest)

    def _line(self, line: bytes) -> bytes:
        if line.startswith(b"data:") and b'"stop_reason"' in line:
            return self._event(line[5:].strip())
        return line + b"\n"

    def _event(self, data: bytes) -> bytes:
        try:
            fields = _fields_of(data)
            if "delta" in fields:
                data = _encode({**fields, "delta": self._told(_fields_of(fields["delta"]))})
        except UNREADABLE:
            pass
        return b"data: %b\n" % data

    def _told(self, fields: dict[str, msgspec.Raw]) -> dict[str, Any]:
        if bytes(fields.get("stop_sequence", _NOTHING)) == bytes(_NOTHING):
            return fields
        ended = _decode_ended(_encode(fields))
        reason, stop = _told(ended.stop_reason, ended.stop_sequence, self._stops)
        return {**fields, "stop_reason": reason, "stop_sequence": stop}


class _Ended(msgspec.Struct):
    stop_reason: str = ""
    stop_sequence: str | None = None


_decode_ended = msgspec.json.Decoder(_Ended).decode


def _told(reason: str, word: Any, stops: Sequence[str]) -> tuple[str, str | None]:
    """Return the stop reason and the client's stop sequence. Chat templates have stop sequences of their own."""
    return ("stop_sequence", word) if reason == "end_turn" and word in stops else (reason, None)


def _input(arguments: str | None) -> dict[str, msgspec.Raw]:
    """Return the input of a call; empty if it was cut off in the middle, as on the engine's own route."""
    try:
        return _fields_of(arguments or "{}")
    except UNREADABLE:
        return {}


def _usage(part: _Part) -> dict[str, int]:
    """Return the engine's counts in Anthropic's format, which has cached tokens apart."""
    timings, usage = part.timings, part.usage
    if timings is None:
        usage = usage or Usage()
        timings = Timings(
            cache_n=usage.cached_tokens,
            prompt_n=usage.prompt_tokens - usage.cached_tokens,
            predicted_n=usage.output_tokens,
        )
    return {
        "input_tokens": timings.prompt_n,
        "cache_read_input_tokens": timings.cache_n,
        "output_tokens": timings.predicted_n,
    }


def _written(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **fields}))
