"""What can be learnt of an answer while it passes: its first byte, its size, and what it says of its tokens.

Per chunk this keeps a reference and adds a number, nothing more; no chunk is looked into on its way. When all has
passed, `usage` finds the engine's own figures in the first bytes and the last 4 KiB. Where llama-server puts them
(tools/server/server-task.cpp, build 11434; the embedded engine is the same code):

- chats, completions and `/completion`, whole or as a stream: `timings` at the very end, also when the client has
  not asked for `usage`; `[DONE]` may follow.
- `/v1/responses`: `usage`, and in a stream `timings`, at the end.
- `/v1/messages`: `usage` at the end; in a stream the prompt's part of it in the first event.
- embeddings and reranking: `usage` at the beginning, before the vectors.

A stream whose client has left has no end, and so no figures: there the pieces of text that passed are counted.

Nothing that a model or a client wrote can pass for them: inside a JSON string a quote has a backslash before it.
"""

from __future__ import annotations

import re
import time
from collections import deque

import msgspec

from router.observe.usage import NO_USAGE, Usage

_TAIL_BYTES = 4096
_TAIL_PARTS = 4
"""The figures, `[DONE]`, and two more in case that the network has torn them."""
_CRUMB = 32
"""Bytes of a part that is no event: the network has torn it, perhaps into many. No token has as few."""
_FIGURES_BYTES = 512
_MOST = 1 << 40
"""Tokens, or milliseconds, of one answer."""
_FIGURE = re.compile(
    rb'"(prompt_tokens|completion_tokens|cached_tokens|input_tokens|output_tokens|cache_read_input_tokens)"'
    rb": ?(\d{1,12})\b"
)
_ENDS = (
    b"data: [DONE]\n",
    b"event: message_stop\n",
    b"event: response.completed\n",
    b"event: response.incomplete\n",
    b"event: response.failed\n",
    b'"stop":true',
)
"""In the last event of a stream: of OpenAI's chats and completions, Anthropic's, responses, and `/completion`."""
_PIECE = re.compile(rb'"(?:arguments|content|delta|partial_json|reasoning_content|text|thinking)": ?"(?!")')
"""Text in an event of a stream; hardly ever is one not a token."""


class Timings(msgspec.Struct):
    """As llama-server has them in the end of an answer: tokens, and milliseconds of its own time."""

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0

    def usage(self) -> Usage:
        """The same, as all answers are counted; figures that cannot be true count as nothing."""
        figures = (self.prompt_n, self.cache_n, self.predicted_n, self.prompt_ms, self.predicted_ms)
        if min(figures) < 0 or max(figures) > _MOST:
            return NO_USAGE
        return Usage(
            self.prompt_n + self.cache_n,
            self.cache_n,
            self.predicted_n,
            self.prompt_ms / 1000,
            self.predicted_ms / 1000,
        )


_decode_timings = msgspec.json.Decoder(Timings).decode


class AnswerMeter(msgspec.Struct, eq=False):
    """Every part of an answer's body that is sent to the client goes through `note`, in order.

    Not the router's own bytes: heartbeats and errors are no answer.
    """

    first_sec: float | None = None
    """When the first of it was sent (monotonic)."""
    size: int = 0
    """Bytes."""
    _first: bytes = b""
    _tail: deque[bytes] | None = None
    """None while there is but one part."""

    def note(self, part: bytes) -> None:
        size = len(part)
        self.size += size
        if self._tail is not None:
            if size < _CRUMB and len(self._tail[-1]) < _TAIL_BYTES:
                self._tail[-1] += part
            else:
                self._tail.append(part)
        elif self.first_sec is None:
            self.first_sec = time.monotonic()
            self._first = part
        else:
            self._tail = deque((self._first, part), _TAIL_PARTS)

    @property
    def ends_in_error(self) -> bool:
        """Whether a stream that began well ends with an engine's error event, OpenAI's or Anthropic's."""
        parts = (self._first,) if self._tail is None else self._tail
        return any(b'data: {"error":' in part or b"event: error\n" in part for part in parts)

    @property
    def has_ended(self) -> bool:
        """Whether a stream's last event has passed. Many clients wait for no more, and leave."""
        tail = self._first if self._tail is None else b"".join(self._tail)
        return tail.endswith(b"\n") and any(end in tail for end in _ENDS)

    def usage(self) -> Usage:
        """What the answer says of itself. Call it once, when all of it has passed."""
        if not self.size:
            return NO_USAGE
        tail = (self._first if self._tail is None else b"".join(self._tail))[-_TAIL_BYTES:]
        usage = _of_timings(tail) or _of_usage(self._first[:_TAIL_BYTES], tail)
        if not usage.output_tokens and self._first.startswith((b"data: ", b"event: ")) and not self.has_ended:
            return msgspec.structs.replace(usage, output_tokens=self._pieces())
        return usage

    def _pieces(self) -> int:
        """Of text, in all that has passed: in what is not here any more, as many as in as much of what is."""
        pieces = len(_PIECE.findall(self._first))
        later = [part for part in self._tail or () if part is not self._first]
        size = sum(map(len, later))
        if not size:
            return pieces
        return pieces + round(len(_PIECE.findall(b"".join(later))) * (self.size - len(self._first)) / size)


def _of_timings(tail: bytes) -> Usage | None:
    begin = tail.rfind(b'"timings":')
    if begin < 0:
        return None
    try:
        return _decode_timings(tail[begin + 10 : tail.find(b"}", begin) + 1]).usage()
    except (msgspec.MsgspecError, RecursionError):
        return None


def _of_usage(head: bytes, tail: bytes) -> Usage:
    """Of a stream whose beginning tells of the prompt, and whose end of the answer, each has its part."""
    figures = {**_figures(head, head.find(b'"usage":')), **_figures(tail, tail.rfind(b'"usage":'))}
    cached = figures.get(b"cached_tokens", 0)
    prompt = figures.get(b"prompt_tokens", 0) or figures.get(b"input_tokens", 0)
    if b"cache_read_input_tokens" in figures:  # Anthropic counts what was cached apart
        cached = figures[b"cache_read_input_tokens"]
        prompt += cached
    return Usage(prompt, cached, figures.get(b"completion_tokens", 0) or figures.get(b"output_tokens", 0))


def _figures(text: bytes, begin: int) -> dict[bytes, int]:
    if begin < 0:
        return {}
    return {name: int(figure) for name, figure in _FIGURE.findall(text, begin, begin + _FIGURES_BYTES)}
