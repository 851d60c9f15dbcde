"""Metering of responses that are passed on: the first byte, the size, and the engine's own token counts.

Per chunk this keeps a reference and adds a number, nothing more; no chunk is inspected on its way. After the last
one, `usage` finds the engine's figures in the first bytes and the last 4 KiB. Where llama-server puts them
(tools/server/server-task.cpp, build 11434; the embedded engine is the same code):

- chats, completions and `/completion`, whole or as a stream: `timings` at the very end, even if the client has
  not requested `usage`; `[DONE]` may follow.
- `/v1/responses`: `usage`, and in a stream `timings`, at the end.
- `/v1/messages`: `usage` at the end; in a stream the prompt's part of it in the first event.
- embeddings and reranking: `usage` at the beginning, before the vectors.

A stream that was aborted has no figures; the pieces of text that were sent are counted instead.

Text written by a model or a client cannot be mistaken for figures: quotes in JSON strings are escaped.
"""

from __future__ import annotations

import re
import time
from collections import deque

import msgspec

from router.observe.usage import NO_USAGE, Usage

_TAIL_BYTES = 4096
_TAIL_PARTS = 4
"""Number of last chunks kept: the figures, `[DONE]`, and two more in case the network has split them."""
_CRUMB = 32
"""Chunks up to this size are fragments of an event split by the network; no token is as short."""
_FIGURES_BYTES = 512
_MOST = 1 << 40
"""Largest plausible number of tokens or milliseconds of one response."""
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
"""Last events of streams: OpenAI's chats and completions, Anthropic's, responses, and `/completion`."""
_PIECE = re.compile(rb'"(?:arguments|content|delta|partial_json|reasoning_content|text|thinking)": ?"(?!")')
"""Text in an event of a stream, nearly always one token."""


class Timings(msgspec.Struct):
    """Figures at the end of a llama-server response: tokens, and milliseconds of its own time."""

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0

    def usage(self) -> Usage:
        """Convert to `Usage`; implausible figures give none."""
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
    """Meter of one response. Pass each part of its body that is sent to the client to `note`, in order.

    The router's own heartbeats and errors are not part of it.
    """

    first_sec: float | None = None
    """Time at which the first part was sent (monotonic)."""
    size: int = 0
    """Size in bytes."""
    _first: bytes = b""
    _tail: deque[bytes] | None = None
    """Last parts; None while there is only one."""

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
    def tail(self) -> bytes:
        """The last parts of the response."""
        return self._first if self._tail is None else b"".join(self._tail)

    @property
    def ends_in_error(self) -> bool:
        """Return whether a stream ends with an error event of the engine, in OpenAI's or Anthropic's form."""
        parts = (self._first,) if self._tail is None else self._tail
        return any(b'data: {"error":' in part or b"event: error\n" in part for part in parts)

    @property
    def has_ended(self) -> bool:
        """Return whether the last event of a stream was sent; many clients then disconnect."""
        tail = self.tail
        return tail.endswith(b"\n") and any(end in tail for end in _ENDS)

    def usage(self) -> Usage:
        """Return the figures of the response. Call it once, after the last part."""
        if not self.size:
            return NO_USAGE
        tail = self.tail[-_TAIL_BYTES:]
        usage = _of_timings(tail) or _of_usage(self._first[:_TAIL_BYTES], tail)
        if not usage.output_tokens and self._first.startswith((b"data: ", b"event: ")) and not self.has_ended:
            return msgspec.structs.replace(usage, output_tokens=self.pieces())
        return usage

    def pieces(self) -> int:
        """Return the number of text pieces sent; for parts no longer kept it is extrapolated by size."""
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
    """Return the usage from the first and last bytes: a stream may report the prompt first and the output last."""
    first, last = head.find(b'"usage":'), tail.rfind(b'"usage":')
    figures = _figures(tail, last)
    if head != tail or first != last:
        figures = {**_figures(head, first), **figures}
    cached = figures.get(b"cached_tokens", 0)
    prompt = figures.get(b"prompt_tokens", 0) or figures.get(b"input_tokens", 0)
    if b"cache_read_input_tokens" in figures:  # Anthropic counts cached tokens separately
        cached = figures[b"cache_read_input_tokens"]
        prompt += cached
    return Usage(prompt, cached, figures.get(b"completion_tokens", 0) or figures.get(b"output_tokens", 0))


def _figures(text: bytes, begin: int) -> dict[bytes, int]:
    if begin < 0:
        return {}
    return {name: int(figure) for name, figure in _FIGURE.findall(text, begin, begin + _FIGURES_BYTES)}
