"""Answers of engines translated to Ollama's API: server-sent events to lines of JSON, documents to documents.

Every event of a stream passes here, so there is little work for each: it is decoded into a struct and written as
one line. The engine's figures come with its last event; events without content (a role, an empty text) make no
line. Tool calls arrive in pieces, and are sent complete, in a line of their own before the last one.
"""

from __future__ import annotations

import math
import time
from datetime import datetime, timezone
from typing import Any

import msgspec

from router.dataplane.answer import LONGEST_EVENT, BrokenAnswer, Translator
from router.dialects.chats import NO_ERROR, Call, Said, Usage
from router.dialects.ollama.requests import Asked
from router.engines.llamacpp.capability import error_of_engine
from router.engines.llamacpp.usage import AnswerMeter, Timings
from router.http.errors import ApiError

_encode = msgspec.json.encode
_NS = 1e9


class _Token(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[_Token] = []


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


class _Call(msgspec.Struct):
    """A call, as far as it has arrived."""

    id: str = ""
    name: str = ""
    arguments: list[str] = []


class _Choice(msgspec.Struct):
    delta: Said | None = None
    message: Said | None = None
    text: str | None = None
    """The text of `/v1/completions`."""
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Embedding(msgspec.Struct):
    embedding: msgspec.Raw
    index: int = 0


class _Part(msgspec.Struct):
    """An event of a stream, or a complete answer, of any of the engine's routes that are used."""

    choices: list[_Choice] = []
    timings: Timings | None = None
    usage: Usage | None = None
    error: msgspec.Raw = NO_ERROR
    # `/completion` and `/infill`
    content: str | None = None
    stop: bool = False
    stop_type: str | None = None
    completion_probabilities: list[_Token] | None = None
    # `/v1/embeddings`
    data: list[_Embedding] | None = None


_decode = msgspec.json.Decoder(_Part).decode
_decode_vector = msgspec.json.Decoder(list[float]).decode


class Translation(Translator):
    """Translates the answer to one request."""

    stream_type = b"content-type: application/x-ndjson\r\n"

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.waited_sec = 0.0
        """Time for which the request waited for its model."""
        self.meter: AnswerMeter | None = None
        """The meter with the time of a stream's first part, for engines that report no times."""
        self._asked = asked
        self._chats = asked.kind in ("chat", "earlier_chat")
        self._begun_sec = time.monotonic()
        self._calls: dict[int, _Call] = {}
        self._collected = 0
        """Characters and pieces of the arguments of all calls."""
        self._reason = "stop"
        self._timings: Timings | None = None
        self._usage: Usage | None = None
        self._ended = False
        """True once the engine has sent the end of its answer."""

    # --- streams ----------------------------------------------------------------------------------------

    def last_events(self) -> bytes:
        if not self._ended:
            raise BrokenAnswer(ApiError(502, "engine_lost", "The engine ended the stream before its last event."))
        calls = self._tool_calls()
        return (self._written(calls) if calls else b"") + self._written({}, done=True)

    def _event(self, data: bytes) -> bytes:
        if data == b"[DONE]":
            self._ended = True
            return b""
        part = _decode(data)
        if part.error is not NO_ERROR:
            raise BrokenAnswer(error_of_engine(500, data))
        self._ended |= part.stop
        said = self._take_in(part)
        return self._written(said) if said else b""

    def _comment(self, line: bytes) -> bytes:
        """Return nothing: lines of JSON have no comments."""
        return b""

    # --- documents --------------------------------------------------------------------------------------

    def document(self, body: bytes) -> bytes:
        part = _decode(body)
        if part.data is not None:
            return self._embedded(part.data, part.usage)
        said, calls = self._take_in(part), self._tool_calls()
        text = said.get("content", "") + calls.get("content", "")
        return self._written({**said, **calls, "content": text}, done=True)

    def loaded(self, reason: str) -> bytes:
        """Return the answer to a request without a prompt. `reason` is `load` or `unload`."""
        model = self._asked.model
        match self._asked.kind:
            case "embed":
                return _encode({"model": model, "embeddings": []})
            case "embeddings":
                return _encode({"embedding": []})
        shown = {"model": model, "created_at": datetime.now(timezone.utc), **self._content({})}
        return _encode({**shown, "done": True, "done_reason": reason})

    def _embedded(self, vectors: list[_Embedding], usage: Usage | None) -> bytes:
        raw = [vector.embedding for vector in sorted(vectors, key=lambda vector: vector.index)]
        if (dimensions := self._asked.dimensions or 0) > 0:
            raw = [msgspec.Raw(_encode(_cut(_decode_vector(vector), dimensions))) for vector in raw]
        if self._asked.kind == "embeddings":
            return _encode({"embedding": raw[0] if raw else []})
        return _encode(
            {
                "model": self._asked.model,
                "embeddings": raw,
                "total_duration": round((time.monotonic() - self._begun_sec) * _NS),
                "load_duration": round(self.waited_sec * _NS),
                "prompt_eval_count": usage.prompt_tokens if usage is not None else 0,
            }
        )

    # --- both -------------------------------------------------------------------------------------------

    def _take_in(self, part: _Part) -> dict[str, Any]:
        """Return the content of an event, which is passed on at once, and keep the figures for the end."""
        if part.timings is not None:
            self._timings = part.timings
        if part.usage is not None:
            self._usage = part.usage
        if not part.choices:
            if part.stop_type == "limit":
                self._reason = "length"
            return self._said(part.content, None, part.completion_probabilities)
        choice = part.choices[0]
        if choice.finish_reason is not None:
            self._ended = True  # some engines end streams without [DONE]
            if choice.finish_reason == "length":
                self._reason = "length"
        message = choice.delta or choice.message
        if message is None:
            return self._said(choice.text, None, None)
        for number, piece in enumerate(message.tool_calls or ()):
            self._collect(number if piece.index is None else piece.index, piece)
        tokens = choice.logprobs.content if choice.logprobs is not None else None
        return self._said(message.content, message.thoughts, tokens)

    def _said(self, text: str | None, thinking: str | None, tokens: list[_Token] | None) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if text:
            said["content"] = text
        if thinking:
            said["thinking"] = thinking
        if tokens:
            said["logprobs"] = [_shown(token, self._asked.most_alternatives) for token in tokens]
        return said

    def _collect(self, index: int, piece: Call) -> None:
        call = self._calls.setdefault(index, _Call())
        call.id = call.id or piece.id or ""
        call.name = call.name or piece.function.name or ""
        arguments = piece.function.arguments or ""
        call.arguments.append(arguments)
        self._collected += len(arguments) + 1
        if self._collected > LONGEST_EVENT:
            raise BrokenAnswer.unreadable("its calls of tools do not end")

    def _tool_calls(self) -> dict[str, Any]:
        """Return the complete calls. Calls that were cut off become content, as with Ollama."""
        whole: list[dict[str, Any]] = []
        torn = ""
        for index, call in self._calls.items():
            text = "".join(call.arguments) or "{}"
            try:
                arguments = msgspec.json.decode(text)
            except (msgspec.DecodeError, RecursionError):
                torn += text
                continue
            function = {"index": index, "name": call.name, "arguments": arguments}
            whole.append({"id": call.id or f"call_{index}", "function": function})
        said: dict[str, Any] = {"content": torn} if torn else {}
        return {**said, "tool_calls": whole} if whole else said

    def _written(self, said: dict[str, Any], *, done: bool = False) -> bytes:
        line = {
            "model": self._asked.model,
            "created_at": datetime.now(timezone.utc),
            **self._content(said),
            "done": done,
        }
        if done:
            line |= self._figures()
        return _encode(line) + (b"\n" if self._asked.streams else b"")

    def _content(self, said: dict[str, Any]) -> dict[str, Any]:
        logprobs = {"logprobs": said.pop("logprobs")} if "logprobs" in said else {}
        if self._chats:
            message = {"role": "assistant", "content": "", **said}
            further = {"response": message["content"]} if self._asked.kind == "earlier_chat" else {}
            return {"message": message, **further, **logprobs}
        return {"response": said.pop("content", ""), **said, **logprobs}

    def _figures(self) -> dict[str, Any]:
        timings, usage = self._timings or self._times(), self._usage or Usage()
        return {
            "done_reason": self._reason,
            "total_duration": round((time.monotonic() - self._begun_sec) * _NS),
            "load_duration": round(self.waited_sec * _NS),
            "prompt_eval_count": timings.cache_n + timings.prompt_n or usage.prompt_tokens,
            "prompt_eval_duration": round(timings.prompt_ms * 1e6),
            "eval_count": timings.predicted_n or usage.output_tokens,
            "eval_duration": round(timings.predicted_ms * 1e6),
        }

    def _times(self) -> Timings:
        """Return the times that the router has measured. For a document, all of it counts as generation."""
        granted_sec, now = self._begun_sec + self.waited_sec, time.monotonic()
        first_sec = self.meter.first_sec if self.meter is not None and self._asked.streams else None
        if first_sec is None:
            return Timings(predicted_ms=(now - granted_sec) * 1000)
        return Timings(prompt_ms=max(0.0, first_sec - granted_sec) * 1000, predicted_ms=(now - first_sec) * 1000)


def _shown(token: _Token, alternatives: int) -> dict[str, Any]:
    shown: dict[str, Any] = {"token": token.token, "logprob": token.logprob}
    if token.bytes is not None:
        shown["bytes"] = token.bytes
    if alternatives:
        shown["top_logprobs"] = [_shown(other, 0) for other in token.top_logprobs[:alternatives]]
    return shown


def _cut(vector: list[float], dimensions: int) -> list[float]:
    """Return the first components of a vector, normalized to length 1."""
    cut = vector[:dimensions]
    length = math.sqrt(sum(x * x for x in cut))
    return [x / length for x in cut] if length else cut
