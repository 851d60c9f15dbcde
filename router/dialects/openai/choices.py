"""Answers with several choices in the format of OpenAI's API, with usage for all of them.

llama-server (tools/server/server-context.cpp, build 11434) reports usage per choice: its document has the usage of
the first one, its stream a usage chunk for each, and the event `null` between two prompts. So it is always asked
for a stream with usage. The client gets either that stream, with one usage chunk at its end, or a document.

On the engine's own routes, each choice is an answer of its own, with its timings. Those are passed on unchanged,
and counted on the way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from router.dataplane.answer import BrokenAnswer, Translator
from router.dataplane.routing import Shape
from router.dataplane.shortening import Text
from router.engines.llamacpp.capability import error_of_engine
from router.engines.llamacpp.usage import AnswerMeter, Timings
from router.formats.unreadable import UNREADABLE
from router.observe.usage import Usage

_MOST_COUNTED = 1 << 16
"""Maximum number of choices in one answer. No engine has as many slots, or accepts as many prompts."""
_MOST_COLLECTED = 64 << 20
"""Maximum size of the events that make a document: 20,000 tokens with 20 alternatives, or many more without."""


class _Wanted(msgspec.Struct):
    stream: Any = None
    stream_options: Any = None


class _Counted(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: dict[str, int] = {}


class _Figures(msgspec.Struct):
    """The index and usage of the choice that an event ends."""

    choices: list[_Numbered] = []
    usage: _Counted | None = None
    timings: Timings | None = None


class _Numbered(msgspec.Struct):
    index: int = 0


class _CallPiece(msgspec.Struct, omit_defaults=True):
    index: int = 0
    id: str | None = None
    type: str | None = None
    function: dict[str, str | None] = {}


class _Logprobs(msgspec.Struct):
    content: list[Any] | None = None


class _Piece(msgspec.Struct):
    """A piece of a choice."""

    index: int = 0
    finish_reason: str | None = None
    text: str | None = None
    delta: dict[str, Any] | None = None
    logprobs: _Logprobs | None = None


class _Event(msgspec.Struct):
    """An event that becomes part of a document."""

    choices: list[_Piece] = []
    error: msgspec.Raw = msgspec.Raw(b"")


_decode_wanted = msgspec.json.Decoder(_Wanted).decode
_decode_figures = msgspec.json.Decoder(_Figures).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_kind = msgspec.json.Decoder(str).decode
_decode_event = msgspec.json.Decoder(_Event).decode
_encode = msgspec.json.encode


class Several(Translator):
    """Translates the choices of one answer."""

    def __init__(self, body: Text, shape: Shape) -> None:
        """`body` is the engine's request, a JSON object."""
        super().__init__()
        fields: dict[str, Any] = dict(_decode_fields(body))
        wanted = _decode_wanted(body)
        options = wanted.stream_options if isinstance(wanted.stream_options, dict) else {}
        self.streams = wanted.stream is True
        self._tells_usage = not self.streams or options.get("include_usage") is True
        fields |= {"stream": True, "stream_options": {**options, "include_usage": True}}
        self.body = _encode(fields)
        """The changed request for the engine."""
        self._per_prompt = shape.per_prompt
        self.forget()

    def forget(self) -> None:
        """Discard all that has arrived, as the request is sent again."""
        self._rest, self._rest_size = [], 0
        self._collected = 0
        """Bytes of the events that make a document."""
        self._ended = 0
        """The choice that ended last: its usage follows."""
        self._counted: dict[int, _Figures] = {}
        self._envelope: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def document(self, body: bytes) -> bytes:
        """Return a document unchanged: it has all choices."""
        return body

    def last_events(self) -> bytes:
        return b"" if self.streams else self._document()

    def _event(self, data: bytes) -> bytes:
        if not self.streams:
            self._collected += len(data)
            if self._collected > _MOST_COLLECTED:
                raise BrokenAnswer.unreadable("it is too long")
            self._take(data)
            return b""
        if data == b"[DONE]":
            return (self._usage_chunk() if self._tells_usage else b"") + b"data: [DONE]\n\n"
        if data != b"null" and (kept := self._without_figures(data)):
            return b"data: %b\n\n" % kept
        return b""

    # --- a stream -----------------------------------------------------------------------------------------

    def _without_figures(self, data: bytes) -> bytes:
        """Return an event without the figures of a single choice; empty if it has nothing else."""
        if b'"usage":' not in data and b'"timings":' not in data and b'"finish_reason":"' not in data:
            return data
        figures = self._count(data)
        if figures is None or (figures.usage is None and figures.timings is None):
            return data
        fields = _decode_fields(data)
        self._envelope = {key: fields[key] for key in _ENVELOPE if key in fields}
        if not figures.choices:
            return b""
        return _encode({key: value for key, value in fields.items() if key not in ("usage", "timings")})

    def _count(self, data: bytes) -> _Figures | None:
        try:
            figures = _decode_figures(data)
        except UNREADABLE:
            return None
        if figures.choices:
            self._ended = figures.choices[0].index
        if (figures.usage or figures.timings) and 0 <= self._ended < _MOST_COUNTED:
            self._counted[self._ended] = figures
        return figures

    def _usage_chunk(self) -> bytes:
        chunk = {**self._envelope, "choices": [], "usage": self._told(), "timings": self._timings()}
        return b"data: %b\n\n" % _encode(chunk)

    # --- a document ---------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        if data in (b"[DONE]", b"null"):
            return
        event = _decode_event(data)
        if event.error:
            raise BrokenAnswer(error_of_engine(500, data))
        self._count(data)
        fields = _decode_fields(data)
        self._envelope |= {key: fields[key] for key in _ENVELOPE if key in fields}
        for piece in event.choices:
            if not 0 <= piece.index < _MOST_COUNTED:
                raise BrokenAnswer.unreadable(f"it has a choice with index {piece.index}")
            _add(self._choices.setdefault(piece.index, {}), piece)

    def _document(self) -> bytes:
        """Return the document: all choices in order, with the usage of all."""
        choices = [{"index": index, **_finished(self._choices[index])} for index in sorted(self._choices)]
        kind = _decode_kind(self._envelope.get("object", msgspec.Raw(b'""'))).removesuffix(".chunk")
        envelope = {**self._envelope, "object": kind}
        return _encode({"choices": choices, **envelope, "usage": self._told(), "timings": self._timings()})

    # --- figures ------------------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """Return the usage of all choices. A prompt with several choices counts once."""
        timings = self._timings()
        if timings.predicted_n:
            return timings.usage()
        told = self._told()
        return Usage(
            told["prompt_tokens"], told["prompt_tokens_details"]["cached_tokens"], told["completion_tokens"]
        )

    def _firsts(self) -> list[_Figures]:
        """Return the figures of the first choice of each prompt, which computed the prompt."""
        return [figures for index, figures in self._counted.items() if index % self._per_prompt == 0]

    def _told(self) -> dict[str, Any]:
        firsts = [figures.usage for figures in self._firsts() if figures.usage is not None]
        prompt = sum(usage.prompt_tokens for usage in firsts)
        cached = sum(usage.prompt_tokens_details.get("cached_tokens", 0) for usage in firsts)
        completion = sum(
            figures.usage.completion_tokens for figures in self._counted.values() if figures.usage is not None
        )
        return {
            "completion_tokens": completion,
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _timings(self) -> Timings:
        told = {index: figures.timings for index, figures in self._counted.items() if figures.timings is not None}
        return _together(told, self._per_prompt)


def _together(told: Mapping[int, Timings], per_prompt: int) -> Timings:
    """Add up the timings of choices by index. A prompt counts for its first choice, which computes it."""
    firsts = [timings for index, timings in told.items() if index % per_prompt == 0]
    return Timings(
        cache_n=sum(timings.cache_n for timings in firsts),
        prompt_n=sum(timings.prompt_n for timings in firsts),
        prompt_ms=sum(timings.prompt_ms for timings in firsts),
        predicted_n=sum(timings.predicted_n for timings in told.values()),
        predicted_ms=sum(timings.predicted_ms for timings in told.values()),
    )


_ENVELOPE = ("id", "object", "created", "model", "system_fingerprint")


class _Text(list[str]):
    """The pieces of a text."""

    def whole(self) -> str:
        return "".join(self)


def _add(choice: dict[str, Any], piece: _Piece) -> None:
    """Append a piece to its choice."""
    if piece.finish_reason is not None:
        choice["finish_reason"] = piece.finish_reason
    if piece.logprobs is not None:
        tokens = choice.setdefault("logprobs", {"content": []})["content"]
        tokens += piece.logprobs.content or ()
    if piece.text is not None:
        choice.setdefault("text", _Text()).append(piece.text)
    if piece.delta is None:
        return
    message = choice.setdefault("message", {"role": "assistant", "content": None})
    for key, value in piece.delta.items():
        if key == "tool_calls":
            calls = message.setdefault(key, {})
            for call in msgspec.convert(value, list[_CallPiece]):
                _add_call(calls.setdefault(call.index, {"function": {}}), call)
        elif isinstance(value, str) and key != "role":
            if not isinstance(message.get(key), _Text):
                message[key] = _Text()
            message[key].append(value)
        elif value is not None:
            message[key] = value


def _add_call(call: dict[str, Any], piece: _CallPiece) -> None:
    for name, text in piece.function.items():
        call["function"].setdefault(name, _Text()).append(text or "")
    call |= {key: value for key, value in (("id", piece.id), ("type", piece.type)) if value is not None}


def _finished(choice: dict[str, Any]) -> dict[str, Any]:
    if "text" in choice:
        return {"logprobs": None, **choice, "text": choice["text"].whole()}
    message = choice.get("message")
    if message is None:
        return choice
    whole = {key: value.whole() if isinstance(value, _Text) else value for key, value in message.items()}
    if "tool_calls" in message:
        whole["tool_calls"] = [_finished_call(call) for _, call in sorted(message["tool_calls"].items())]
    return {**choice, "message": whole}


def _finished_call(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "function": {name: text.whole() for name, text in call["function"].items()}}


# --- the engine's own routes --------------------------------------------------------------------------------

_SAID_OF_EACH = re.compile(rb'"(?:index": ?(\d{1,5})\b|stop": ?(true)|timings": ?(\{[^{}]*\}))')
_LONGEST_SAID = 1024
"""Maximum length of a match."""
_decode_timings = msgspec.json.Decoder(Timings).decode


class ChoicesMeter(AnswerMeter, kw_only=True):
    """Counts an answer in which every choice has its index, its text and its timings, in this order."""

    shape: Shape
    _seen: bytes = b""
    """The end of the searched text, which may hold the beginning of a match."""
    _index: int = 0
    _ended: set[int] = msgspec.field(default_factory=set)
    _timings: dict[int, Timings] = msgspec.field(default_factory=dict)

    def note(self, part: bytes) -> None:
        super().note(part)
        text = self._seen + part
        looked_at = 0
        for said in _SAID_OF_EACH.finditer(text):
            looked_at = said.end()
            if said[1] is not None:
                self._index = int(said[1])
            elif said[2] is not None:
                self._ended.add(self._index)
            else:
                with suppress(msgspec.MsgspecError, RecursionError):
                    self._timings[self._index] = _decode_timings(said[3])
        self._seen = text[max(looked_at, len(text) - _LONGEST_SAID) :]

    @property
    def has_ended(self) -> bool:
        return len(self._ended) >= self.shape.per_prompt * self.shape.prompts

    def usage(self) -> Usage:
        usage = _together(self._timings, self.shape.per_prompt).usage()
        return usage if usage.output_tokens else super().usage()
