"""`/v1/messages` where the engine's own route would lose something: asked as a chat, answered as Anthropic does.

llama-server translates Anthropic's requests itself, and drops what that translation does not know: the schema of
an answer, a seed, a grammar. Requests with any of these are translated here, to the route that knows all of them,
and so are their answers; all other requests go as they are, but for two things. It puts what is said beside the
results of tools before them, where it parts them from their calls. And it tells of an answer that one of the
client's stop sequences has ended which that was, but not that it was one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from router.answer import NotUnderstood, Translator
from router.api.errors import ApiError
from router.capability import error_of_engine
from router.meter import Timings
from router.responses import told
from router.rewriting import joined

_PATH = "/v1/messages"
_KEPT = ("model", "stream", "temperature", "top_p", "top_k", "chat_template_kwargs")
_DROPPED = (
    "dry_multiplier",
    "frequency_penalty",
    "grammar",
    "ignore_eos",
    "json_schema",
    "logit_bias",
    "lora",
    "min_p",
    "presence_penalty",
    "repeat_last_n",
    "repeat_penalty",
    "response_format",
    "samplers",
    "seed",
    "typical_p",
    "xtc_probability",
)
"""Parameters of chats that the engine does not take over from Anthropic's requests."""
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}

_NOTHING = msgspec.Raw(b"null")

_encode = msgspec.json.encode


class _Format(msgspec.Struct):
    type: str = ""
    schema: msgspec.Raw = msgspec.Raw(b"{}")


class _Config(msgspec.Struct):
    format: _Format | None = None


class _Source(msgspec.Struct):
    type: str = ""
    media_type: str = "image/jpeg"
    data: str = ""
    url: str = ""


class _Block(msgspec.Struct):
    type: str = ""
    text: str = ""
    thinking: str = ""
    source: _Source | None = None
    id: str = ""
    name: str = ""
    input: msgspec.Raw = msgspec.Raw(b"{}")
    tool_use_id: str = ""
    content: str | list[_Block] | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Block]


class _Tool(msgspec.Struct):
    name: str = ""
    description: str = ""
    input_schema: msgspec.Raw = msgspec.Raw(b"{}")


class _Choice(msgspec.Struct):
    type: str = "auto"
    disable_parallel_tool_use: bool = False


class _Thinking(msgspec.Struct):
    type: str = ""
    budget_tokens: int = 10_000


class _Request(msgspec.Struct):
    messages: list[_Message]
    system: str | list[_Block] | None = None
    max_tokens: int = 4096
    stop_sequences: list[str] | None = None
    tools: list[_Tool] | None = None
    tool_choice: _Choice | None = None
    thinking: _Thinking | None = None


_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_request = msgspec.json.Decoder(_Request).decode
_decode_config = msgspec.json.Decoder(_Config | None).decode
_decode_format = msgspec.json.Decoder(_Format | None).decode
_decode_tools = msgspec.json.Decoder(list[_Tool] | None).decode
_decode_choice = msgspec.json.Decoder(_Choice | None).decode
_decode_stops = msgspec.json.Decoder(list[str] | None).decode
_value_of = msgspec.json.Decoder().decode


class Asked(msgspec.Struct):
    """What the engine is asked for."""

    body: bytes | bytearray
    translator: Translator | None = None
    """Of its answer; None: that goes to the client as it is."""
    is_chat: bool = False
    """On the route of chats; else on its own."""


def read(body: bytes | bytearray) -> Asked:
    """What is not of the API's shape is left for the engine to refuse."""
    try:
        fields = _fields_of(body)
        if b'"tool_result"' in body and (messages := _in_order(fields)) is not None:
            fields = {**fields, "messages": msgspec.Raw(_encode(messages))}
            body = _encode(fields)
        stops: list[str] = _decode_stops(fields.get("stop_sequences", _NOTHING)) or []
        kept: dict[str, Any] = {name: fields[name] for name in _DROPPED if name in fields}
        form = _form_of(fields)
        if form is not None and form.type == "json_schema" and not kept.keys() & {"grammar", "json_schema"}:
            if _may_call(fields):  # an engine that is held to a schema calls nothing: there it is only told
                system = joined(told(form.schema), _value_of(fields.get("system", _NOTHING)))
                fields = {**fields, "system": msgspec.Raw(_encode(system))}
                body = _encode(fields)
            else:
                kept["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.schema}}
        if not kept:
            return Asked(body, StopReasons(stops) if stops else None)
        chat = {**_chat(fields, _decode_request(body)), **kept}
        if stops:
            chat |= {"verbose": True, "response_fields": ["stopping_word"]}
        return Asked(_encode(chat), Translation(stops), is_chat=True)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Asked(body)


def _form_of(fields: dict[str, msgspec.Raw]) -> _Format | None:
    config: _Config | None = _decode_config(fields.get("output_config", _NOTHING))
    if config is not None and config.format is not None:
        return config.format
    form: _Format | None = _decode_format(fields.get("output_format", _NOTHING))  # its name in the API's beta
    return form


def _may_call(fields: dict[str, msgspec.Raw]) -> bool:
    choice: _Choice | None = _decode_choice(fields.get("tool_choice", _NOTHING))
    return bool(_decode_tools(fields.get("tools", _NOTHING))) and (choice is None or choice.type != "none")


class _Shown(msgspec.Struct):
    """What decides about the place of a block."""

    type: str = ""


_decode_messages = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_decode_blocks = msgspec.json.Decoder(str | list[msgspec.Raw]).decode
_decode_shown = msgspec.json.Decoder(_Shown).decode


def _in_order(fields: dict[str, msgspec.Raw]) -> list[dict[str, Any]] | None:
    """The messages, so that results of tools come right after their calls, and what else their message says in one
    of its own after them: Anthropic's API wants it so within a message. None if that is how they are."""
    ordered: list[dict[str, Any]] = []
    messages = _decode_messages(fields.get("messages", _NOTHING))
    for message in messages:
        results, others = _parted(message.get("content", _NOTHING))
        if results and others:
            ordered += [{**message, "content": results}, {**message, "content": others}]
        else:
            ordered.append(message)
    return ordered if len(ordered) > len(messages) else None


def _parted(content: msgspec.Raw) -> tuple[list[msgspec.Raw], list[msgspec.Raw]]:
    """The results of tools, and what else there is."""
    results: list[msgspec.Raw] = []
    others: list[msgspec.Raw] = []
    if b'"tool_result"' in bytes(content):
        blocks = _decode_blocks(content)
        for block in () if isinstance(blocks, str) else blocks:
            (results if _decode_shown(block).type == "tool_result" else others).append(block)
    return results, others


def _chat(fields: dict[str, msgspec.Raw], request: _Request) -> dict[str, Any]:
    chat: dict[str, Any] = {name: fields[name] for name in _KEPT if name in fields}
    chat["max_tokens"] = request.max_tokens
    messages = [] if request.system is None else [{"role": "system", "content": _text(request.system)}]
    for message in request.messages:
        messages += _turns(message)
    chat["messages"] = messages
    if request.stop_sequences:
        chat["stop"] = request.stop_sequences
    if request.tools:
        chat["tools"] = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
            }
            for tool in request.tools
        ]
    if request.tool_choice is not None:
        choice = request.tool_choice
        chat["tool_choice"] = {"any": "required", "tool": "required"}.get(choice.type, choice.type)
        if choice.disable_parallel_tool_use:
            chat["parallel_tool_calls"] = False
    if request.thinking is not None and request.thinking.type == "enabled":
        chat["thinking_budget_tokens"] = request.thinking.budget_tokens
    return chat


def _text(said: str | Iterable[_Block]) -> str:
    return said if isinstance(said, str) else "".join(block.text for block in said if block.type == "text")


def _turns(message: _Message) -> Iterable[dict[str, Any]]:
    """One of Anthropic's messages is several of a chat's when it has several results of tools."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    parts, calls, results = [], [], []
    thoughts = ""
    for block in message.content:
        match block.type:
            case "text" | "image":
                parts.append(_part(block))
            case "thinking":
                thoughts += block.thinking
            case "tool_use":
                function = {"name": block.name, "arguments": bytes(block.input).decode()}
                calls.append({"id": block.id, "type": "function", "function": function})
            case "tool_result":
                content = block.content or ""
                has_images = not isinstance(content, str) and any(inner.type == "image" for inner in content)
                said: Any = [_part(inner) for inner in content] if has_images else _text(content)
                results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": said})
    if parts or calls or thoughts:
        turn: dict[str, Any] = {"role": message.role, "content": parts or ""}
        if calls:
            turn["tool_calls"] = calls
        if thoughts:
            turn["reasoning_content"] = thoughts
        yield turn
    yield from results


def _part(block: Any) -> dict[str, Any]:
    if block.type != "image" or block.source is None:
        return {"type": "text", "text": block.text}
    source = block.source
    url = source.url if source.type == "url" else f"data:{source.media_type};base64,{source.data}"
    return {"type": "image_url", "image_url": {"url": url}}


# --- answers --------------------------------------------------------------------------------------------


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    function: _Function
    index: int = 0
    id: str | None = None


class _Said(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Answer(msgspec.Struct):
    finish_reason: str | None = None
    message: _Said | None = None
    delta: _Said | None = None


_NO_ERROR = msgspec.Raw(b"")


class _Verbose(msgspec.Struct):
    stopping_word: str | None = None


class _Part(msgspec.Struct):
    """A whole answer, or an event of a stream."""

    id: str = ""
    model: str = ""
    choices: list[_Answer] = []
    timings: Timings | None = None
    verbose: _Verbose = msgspec.field(default_factory=_Verbose, name="__verbose")
    """Of who asks for it; not from older builds, such as 9294."""
    error: msgspec.Raw = _NO_ERROR


_decode_part = msgspec.json.Decoder(_Part).decode


class Translation(Translator):
    """A chat's answer as Anthropic's."""

    def __init__(self, stops: Sequence[str]) -> None:
        super().__init__()
        self._stops = stops
        self._begun = False
        self._ended = False
        self._block = ""
        """The kind of block that is open."""
        self._call = -1
        """Of the calls, the one whose block that is."""
        self._blocks = 0
        self._reason = "end_turn"
        self._word: str | None = None
        self._timings = Timings()

    def document(self, body: bytes) -> bytes:
        """Raises NotUnderstood."""
        try:
            part = _decode_part(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise NotUnderstood(_unreadable(error).body(_PATH)) from None
        choice = part.choices[0] if part.choices else _Answer()
        said = choice.message or _Said()
        content: list[dict[str, Any]] = []
        if said.reasoning_content:
            content.append({"type": "thinking", "thinking": said.reasoning_content, "signature": ""})
        if said.content:
            content.append({"type": "text", "text": said.content})
        for call in said.tool_calls or ():
            named = {"type": "tool_use", "id": call.id or "", "name": call.function.name or ""}
            content.append({**named, "input": _input(call.function.arguments)})
        ended = _REASONS.get(choice.finish_reason or "", "end_turn")
        reason, stop = _told(ended, part.verbose.stopping_word, self._stops)
        usage = _usage(part.timings or Timings())
        return _encode(
            {**_message(part), "content": content, "stop_reason": reason, "stop_sequence": stop, "usage": usage}
        )

    def last_events(self) -> bytes:
        if self._ended:
            return b""
        self._ended = True
        reason, stop = _told(self._reason, self._word, self._stops)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        usage = _usage(self._timings)
        return b"".join(
            (
                b"" if self._begun else self._begin(_Part()),
                self._close(),
                _written("message_delta", {"delta": delta, "usage": usage}),
                _written("message_stop", {}),
            )
        )

    def _event(self, data: bytes) -> bytes:
        if self._ended or data == b"[DONE]":
            return b""
        try:
            part = _decode_part(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return self._fail(_unreadable(error))
        if part.error is not _NO_ERROR:
            return self._fail(error_of_engine(500, data))
        if part.timings is not None:
            self._timings = part.timings
        self._word = part.verbose.stopping_word or self._word
        events = b"" if self._begun else self._begin(part)
        for choice in part.choices:
            if choice.finish_reason is not None:
                self._reason = _REASONS.get(choice.finish_reason, "end_turn")
            if choice.delta is not None:
                events += self._said(choice.delta)
        return events

    def _fail(self, error: ApiError) -> bytes:
        self._ended = True
        return error.event(_PATH).lstrip()

    def _begin(self, part: _Part) -> bytes:
        self._begun = True
        begun = {**_message(part), "content": [], "stop_reason": None, "usage": _usage(Timings())}
        return _written("message_start", {"message": begun})

    def _said(self, said: _Said) -> bytes:
        events = b""
        if said.reasoning_content:
            events += self._piece("thinking", "thinking_delta", "thinking", said.reasoning_content)
        if said.content:
            events += self._piece("text", "text_delta", "text", said.content)
        for call in said.tool_calls or ():
            if call.index != self._call:
                self._call = call.index
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
    """An engine's own answer to a request with stop sequences."""

    def __init__(self, stops: Sequence[str]) -> None:
        super().__init__()
        self._stops = stops

    def document(self, body: bytes) -> bytes:
        try:
            return _encode(self._told(_fields_of(body)))
        except (msgspec.MsgspecError, UnicodeDecodeError):  # the engine's new ways, and its client's to understand
            return body

    def last_events(self) -> bytes:
        return self._rest

    def events(self, part: bytes) -> bytes:
        return b"".join(map(self._passed, self._lines(part)))

    def _passed(self, line: bytes) -> bytes:
        if line.startswith(b"data:") and b'"stop_reason"' in line:
            return self._event(line[5:].strip())
        return line + b"\n"

    def _event(self, data: bytes) -> bytes:
        try:
            fields = _fields_of(data)
            if "delta" in fields:
                data = _encode({**fields, "delta": self._told(_fields_of(fields["delta"]))})
        except (msgspec.MsgspecError, UnicodeDecodeError):
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


def _told(reason: str, word: str | None, stops: Sequence[str]) -> tuple[str, str | None]:
    """Why an answer has ended, and at which sequence of the client's. Templates have others."""
    return ("stop_sequence", word) if reason == "end_turn" and word in stops else (reason, None)


def _unreadable(error: Exception) -> ApiError:
    return ApiError(502, "engine_lost", f"The engine's answer cannot be read: {error}.")


def _input(arguments: str | None) -> dict[str, msgspec.Raw]:
    """Of a call; empty for one that was cut off in the middle, as on the engine's own route."""
    try:
        return _fields_of(arguments or "{}")
    except (msgspec.MsgspecError, UnicodeError):
        return {}


def _message(part: _Part) -> dict[str, Any]:
    named = {"id": part.id, "type": "message", "role": "assistant", "model": part.model}
    return {**named, "stop_sequence": None}


def _usage(timings: Timings) -> dict[str, int]:
    return {
        "input_tokens": timings.prompt_n,
        "cache_read_input_tokens": timings.cache_n,
        "output_tokens": timings.predicted_n,
    }


def _written(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **fields}))
