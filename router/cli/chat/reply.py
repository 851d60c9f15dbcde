"""The answer of a model to one chat, as it arrives, and its figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from email.message import Message
from typing import Any

import msgspec

from router.cli.client import CannotAsk, RouterClient, Unreachable
from router.dialects.chats import Said, Usage
from router.engines.llamacpp.usage import Timings

PATH = "/v1/chat/completions"
_LAST = "[DONE]"


class _Choice(msgspec.Struct):
    delta: Said | None = None
    message: Said | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    """An event of a stream, or the whole answer."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    timings: Timings | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer."""

    text: str
    is_thought: bool = False


@dataclass(slots=True)
class Figures:
    """What is known of an answer; None where nobody has said or measured it."""

    first_sec: float | None = None
    """From the request to the first token."""
    total_sec: float = 0.0
    waited_sec: float | None = None
    """Until an engine had a place for the request, by the router; or until it began to compute, by its clock."""
    load_sec: float | None = None
    """The part of that in which its model was loaded."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """The part of the prompt that the engine had computed before."""
    output_tokens: int | None = None
    prefill_per_sec: float | None = None
    """Tokens of the prompt per second; those that were cached are not counted."""
    decode_per_sec: float | None = None
    """Tokens per second after the first."""
    is_prefill_of_engine: bool = False
    """Whether the rate is the engine's own figure, or else was measured here, with all that lies between."""
    is_decode_of_engine: bool = False


class Reply:
    """The answer to the chat `body`. Iterate once; closing it cancels the request."""

    def __init__(self, client: RouterClient, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        self.figures = Figures()
        self.end = ""
        """Why it ended, in OpenAI's words: `stop`, `length` and more; empty until then."""
        self._client = client
        self._since = time.monotonic()
        self._last = self._since
        self._chunks = 0
        self._streams = True
        self._began_waiting = False
        self._events = client.asked(PATH, body, headers, self._begin)

    def __iter__(self) -> Iterator[Piece]:
        """Yield the pieces. Raises CannotAsk if the router refuses, or if the answer breaks off."""
        try:
            with closing(self._events):
                for event in self._events:
                    if event.text == _LAST:
                        self.end = self.end or "stop"
                        break
                    yield from self._pieces(event.text)
        except Unreachable as error:
            raise (CannotAsk(f"The answer broke off: {error}") if self._chunks else error) from None
        finally:
            self._measure()
        if not self.end:
            raise CannotAsk("The answer broke off: the router closed the connection.")

    def close(self) -> None:
        self._events.close()

    def _begin(self, headers: Message) -> None:
        self._streams = headers.get_content_type() == "text/event-stream"
        self.figures.waited_sec = _seconds(headers["x-queue-ms"])
        self.figures.load_sec = _seconds(headers["x-load-ms"])
        self._began_waiting = headers["x-queue-position"] is not None  # so it says nothing of the whole wait

    def _pieces(self, text: str) -> Iterator[Piece]:
        try:
            chunk = _chunk(text)
        except (msgspec.MsgspecError, RecursionError):
            raise CannotAsk(
                f"The server at {self._client.url} sent an unreadable answer: {text[:100]!r}"
            ) from None
        if chunk.error is not None:
            message = chunk.error.get("message") if isinstance(chunk.error, dict) else None
            raise CannotAsk(str(message or chunk.error))
        for choice in chunk.choices:
            said = choice.delta or choice.message or Said()
            if said.content or said.thoughts:
                self._note()
            if said.thoughts:
                yield Piece(said.thoughts, is_thought=True)
            if said.content:
                yield Piece(said.content)
            self.end = choice.finish_reason or self.end
        self._count(chunk)

    def _note(self) -> None:
        self._last = time.monotonic()
        self._chunks += 1
        if self.figures.first_sec is None and self._streams:
            self.figures.first_sec = self._last - self._since

    def _count(self, chunk: _Chunk) -> None:
        figures = self.figures
        if chunk.usage is not None:
            figures.prompt_tokens, figures.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            if chunk.usage.prompt_tokens_details is not None:
                figures.cached_tokens = chunk.usage.cached_tokens
        if chunk.timings is None or (used := chunk.timings.usage()).output_tokens == 0:
            return
        figures.prompt_tokens, figures.output_tokens = used.prompt_tokens, used.output_tokens
        figures.cached_tokens = used.cached_tokens
        if used.prefill_sec > 0:
            figures.prefill_per_sec = (used.prompt_tokens - used.cached_tokens) / used.prefill_sec
            figures.is_prefill_of_engine = True
        if self._began_waiting and figures.first_sec is not None:
            figures.waited_sec = max(0.0, figures.first_sec - used.prefill_sec)
        if used.decode_sec > 0 and used.output_tokens > 1:
            figures.decode_per_sec = (used.output_tokens - 1) / used.decode_sec
            figures.is_decode_of_engine = True

    def _measure(self) -> None:
        """Complete the figures with what can be measured here."""
        figures = self.figures
        figures.total_sec = time.monotonic() - self._since
        if figures.first_sec is None:
            return
        if figures.output_tokens is None:
            figures.output_tokens = self._chunks
        if figures.prefill_per_sec is None and figures.prompt_tokens and not self._began_waiting:
            computing_sec = figures.first_sec - (figures.waited_sec or 0.0)
            fresh = figures.prompt_tokens - (figures.cached_tokens or 0)
            figures.prefill_per_sec = fresh / computing_sec if computing_sec > 0 else None
        decoding_sec = self._last - self._since - figures.first_sec
        if figures.decode_per_sec is None and figures.output_tokens > 1 and decoding_sec > 0:
            figures.decode_per_sec = (figures.output_tokens - 1) / decoding_sec


def _seconds(milliseconds: str | None) -> float | None:
    return float(milliseconds) / 1000 if milliseconds and milliseconds.isdecimal() else None
