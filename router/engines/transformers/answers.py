"""Answers of `transformers serve` as OpenAI's API has them.

Measured with transformers 5.24.0: its streams have no last event, and errors in them are no JSON; the first chunk
comes before anything is computed; a text that stops the answer stays in it. So nothing is passed on before there
is text, stops are cut, `[DONE]` is added, and documents are put together here, as the engine is always asked for a
stream.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from router.formats.unreadable import UNREADABLE

if TYPE_CHECKING:
    from router.engines.upstream import Connection, Head, Receiver

_LONGEST = 16 << 20
"""Bytes of a line of a stream, or of a document."""
_DOCUMENT = b"content-type: application/json\r\n"
_ERROR = re.compile(rb'\{"error": ?"(.*?)(?:"\})?', re.DOTALL)
"""An error in a stream: the text is not escaped, so it is no JSON, and ends early if it has several lines."""
_BEYOND_CONTEXT = re.compile(
    r"it has \d+ tokens|index out of range in self|device-side assert|maximum sequence length"
)
"""What is said of a prompt that was counted, and what torch says of a position that a model has no embedding for,
on CPU and on CUDA."""
_FULL = "index out of range in self"
"""What torch says on the CPU of a position beyond the last one; after text, the answer has filled the context."""
_POISONED = re.compile(r"(?:CUDA|HIP) error|device-side assert|CUBLAS_STATUS_|CUDNN_STATUS_")
"""What torch says of a GPU after which the process cannot use it any more; memory that ran out is none of it."""
_BROKEN = "its stream ended before its last event"
_TOO_LONG = "its answer is too long"
_NO_REASON = "Internal Server Error"
_SERVER_ERROR = "server_error"
_MISTAKE = "The model vocabulary size is"
"""What it says of a bias for a token that does not exist."""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class _Choice(msgspec.Struct):
    delta: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    id: str = ""
    created: int = 0
    choices: list[_Choice] = []
    usage: _Usage | None = None


class _Detail(msgspec.Struct):
    detail: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_detail = msgspec.json.Decoder(_Detail).decode
_encode = msgspec.json.encode


class Cut:
    """A text up to the first of some stops, as it comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        """The end of what has come, which may be the beginning of a stop."""
        self.stop: str | None = None
        """The stop that has come."""

    @property
    def is_over(self) -> bool:
        return self.stop is not None

    def add(self, piece: str) -> str:
        """Return what of the text is known to be part of the answer by now."""
        if not self._stops or self.is_over:
            return "" if self.is_over else piece
        text = self._held + piece
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            (end, self.stop), self._held = min(found), ""
            return text[:end]
        most = min(len(text), max(map(len, self._stops)) - 1)
        kept = next((n for n in range(most, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held


class Understood:
    """A receiver of one answer of the engine, which passes it on to another as OpenAI's API has it."""

    def __init__(
        self,
        receiver: Receiver,
        *,
        model: str,
        context: int | None,
        as_chat: bool,
        streams: bool,
        tells_usage: bool,
        stops: Sequence[str],
    ) -> None:
        self._receiver = receiver
        self._model = model
        self._context = context
        self._as_chat = as_chat
        self._streams = streams
        self._tells_usage = tells_usage
        self._cut = Cut(stops)
        self._line = bytearray()
        """Of a stream, what is not a whole line yet."""
        self._document = bytearray()
        """Of an answer that is no stream."""
        self._connection: Connection | None = None
        self._id = ""
        self._created = 0
        self._has_begun = False
        """True once the client has been sent a part of a stream."""
        self._finish_reason: str | None = None
        self._usage = _Usage()
        self._texts: dict[str, list[str]] = {}
        """Of an answer that is to be a document, by the field of its message."""
        self._calls: list[Any] = []
        self._size = 0

    # --- Receiver --------------------------------------------------------------------------------------------

    def connected(self, connection: Connection) -> None:
        self._connection = connection
        self._receiver.connected(connection)

    def lost(self, reason: str) -> None:
        self._receiver.lost(reason)

    def failed(self, error: Exception) -> None:
        self._receiver.failed(error)

    def received(self, head: Head, part: bytes, last: bool) -> None:
        if head.status != 200 or not head.streams:
            self._add_to_document(head, part, last)
            return
        try:
            told, error = self._read(part)
        except UNREADABLE as unreadable:
            self._hang_up(last)
            self._receiver.lost(f"its stream cannot be read: {unreadable}")
            return
        if error is None and last and self._is_beyond_context():
            error = f"it has {self._usage.prompt_tokens} tokens"
        if error is not None and _FULL in error and (self._has_begun or self._texts):
            self._hang_up(last)
            last, error, self._finish_reason = True, None, "length"
        if error is not None:
            self._hang_up(last)
            if self._connection is not None and _POISONED.search(error):
                self._connection.condemn(f"its GPU failed: {error.splitlines()[0]}")
            if self._has_begun and self._streams:
                event = b"data: %b\n\ndata: [DONE]\n\n" % _encode(_error(500, error, self._context))
                self._receiver.received(head, told + event, True)
            else:
                self._tell_error(head, 500, error)
        elif last and self._finish_reason is None:
            self._receiver.lost(_BROKEN)
        elif last and not self._streams:
            self._tell_document(head, 200, self._whole())
        elif last:
            self._receiver.received(head, told + self._end(), True)
        elif told:
            self._receiver.received(head, told, False)

    def _is_beyond_context(self) -> bool:
        """Whether the prompt was longer than the context: most models answer all the same, without any sense."""
        return self._context is not None and self._usage.prompt_tokens > self._context

    def _hang_up(self, last: bool) -> None:
        """Close the connection, unless the answer has ended and the connection is back in its pool."""
        if self._connection is not None and not last:
            self._connection.close()

    # --- what is no stream -----------------------------------------------------------------------------------

    def _add_to_document(self, head: Head, part: bytes, last: bool) -> None:
        self._document += part
        if len(self._document) > _LONGEST:
            self._hang_up(last)
            self._receiver.lost(_TOO_LONG)
        elif last:
            said = bytes(self._document)
            try:
                detail = _decode_detail(said).detail
            except UNREADABLE:
                detail = None
            self._tell_error(head, max(400, head.status), _in_words(detail) or said.decode("utf-8", "replace"))

    def _tell_error(self, head: Head, status: int, words: str) -> None:
        if words.strip() == _NO_REASON:
            words = "The engine failed (Internal Server Error); its log says why."
        error = _error(status, words, self._context)
        status = 400 if error["error"]["type"] != _SERVER_ERROR and status in (422, 500) else status
        self._tell_document(head, status, _encode(error))

    def _tell_document(self, head: Head, status: int, document: bytes) -> None:
        lines = b"".join(line for line in head.lines.splitlines(True) if not line.startswith(b"content-type:"))
        told = msgspec.structs.replace(
            head,
            status=status,
            lines=_DOCUMENT + lines,
            content_length=len(document),
            is_chunked=False,
            streams=False,
        )
        self._receiver.received(told, document, True)

    # --- a stream --------------------------------------------------------------------------------------------

    def _read(self, part: bytes) -> tuple[bytes, str | None]:
        """Take the next bytes of a stream. Returns the client's events, and the error if one has come."""
        *lines, rest = part.split(b"\n")
        if lines and self._line:
            lines[0] = bytes(self._line) + lines[0]
            self._line.clear()
        self._line += rest
        if len(self._line) > _LONGEST:
            return b"", _TOO_LONG
        told: list[bytes] = []
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if (error := _ERROR.fullmatch(data)) is not None:
                return b"".join(told), error[1].decode("utf-8", "replace")
            told.append(self._event(data))
        return b"".join(told), None

    def _event(self, data: bytes) -> bytes:
        """Take an event. Returns what it comes to for a client that wants a stream."""
        if data == b"[DONE]":
            return b""
        chunk = _decode_chunk(data)
        self._created = chunk.created or self._created
        self._id = chunk.id or self._id
        self._usage = chunk.usage or self._usage
        told = b""
        for choice in chunk.choices:
            told += self._piece(choice)
            if choice.finish_reason is not None:
                self._finish_reason = "stop" if self._cut.is_over else choice.finish_reason
        return told

    def _piece(self, choice: _Choice) -> bytes:
        delta = choice.delta or {}
        told: dict[str, Any] = {}
        if (text := delta.get("content") or choice.text) and (text := self._cut.add(text)):
            told["content"] = text
        for name in ("reasoning_content", "tool_calls"):
            if delta.get(name):
                told[name] = delta[name]
        return self._passed_on(told) if told else b""

    def _passed_on(self, told: dict[str, Any]) -> bytes:
        if self._streams:
            return self._chunk(told)
        self._calls += told.pop("tool_calls", ())
        for name, text in told.items():
            self._texts.setdefault(name, []).append(text)
            self._size += len(text)
        if self._size > _LONGEST:
            raise msgspec.ValidationError(_TOO_LONG)
        return b""

    def _chunk(self, told: dict[str, Any], *, finish_reason: str | None = None) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        if self._as_chat:
            choice["delta"] = told if self._has_begun else {"role": "assistant", **told}
        else:
            choice |= {"text": told.get("content", ""), "logprobs": None}
        self._has_begun = True
        choice["finish_reason"] = finish_reason
        if finish_reason is not None:
            choice |= self._stopped_by()
        chunk = {**self._envelope("chat.completion.chunk"), "choices": [choice]}
        if finish_reason is not None:
            chunk["usage"] = self._usage
        return b"data: %b\n\n" % _encode(chunk)

    def _end(self) -> bytes:
        """Return the last events of a stream."""
        rest = self._cut.rest()
        events = self._chunk({"content": rest}) if rest else b""
        events += self._chunk({} if self._has_begun else {"content": ""}, finish_reason=self._finish_reason)
        if self._tells_usage:
            of_all = {**self._envelope("chat.completion.chunk"), "choices": [], "usage": self._usage}
            events += b"data: %b\n\n" % _encode(of_all)
        return events + b"data: [DONE]\n\n"

    def _whole(self) -> bytes:
        """Return the document that a stream comes to."""
        if rest := self._cut.rest():
            self._passed_on({"content": rest})
        texts = {name: "".join(pieces) for name, pieces in self._texts.items()}
        choice: dict[str, Any] = {"index": 0}
        if self._as_chat:
            choice["message"] = {"role": "assistant", "content": None if self._calls else "", **texts}
            if self._calls:
                choice["message"]["tool_calls"] = [
                    {**call, "type": "function"} for call in map(_call, self._calls)
                ]
        else:
            choice |= {"text": texts.get("content", ""), "logprobs": None}
        choice["finish_reason"] = self._finish_reason
        choice |= self._stopped_by()
        return _encode({**self._envelope("chat.completion"), "choices": [choice], "usage": self._usage})

    def _stopped_by(self) -> dict[str, str]:
        """Return the stop that has ended the answer, as vLLM names it."""
        return {} if self._cut.stop is None else {"stop_reason": self._cut.stop}

    def _envelope(self, of_chats: str) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", of_chats) if self._as_chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self._id}", "object": kind, "created": self._created, "model": self._model}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call of a document, which has no number as those of a stream."""
    return {name: value for name, value in call.items() if name != "index"}


def _error(status: int, words: str, context: int | None) -> dict[str, Any]:
    """Return an error in OpenAI's envelope."""
    is_mistake = status < 500 or _MISTAKE in words
    kind = "invalid_request_error" if is_mistake else _SERVER_ERROR
    if _BEYOND_CONTEXT.search(words):
        kind = "context_length_exceeded"
        limit = " is unknown" if context is None else f" is {context} tokens"
        words = f"This model's maximum context length{limit}, and the conversation exceeds it ({words})."
    return {"error": {"message": words, "type": kind, "param": None, "code": None}}


def _in_words(detail: Any) -> str:
    """Return what FastAPI says is wrong with a request."""
    if isinstance(detail, list):
        told = (f"{'.'.join(map(str, each.get('loc', ())))}: {each.get('msg', '')}" for each in detail)
        return "; ".join(told)
    return detail if isinstance(detail, str) else ""
