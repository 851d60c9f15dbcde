"""Requests for `/v1/messages` as chats, where the engine's own route would lose some of them.

llama-server translates Anthropic's requests itself, and drops what its translation does not know: an answer's
schema, a seed, a grammar. Requests with any of these are translated here, to chats, which know all of them, and so
are their answers. All other requests are passed on, except for two corrections. llama-server moves text beside
results of tools before these, where it separates them from their calls. And for an answer that ended at one of the
client's stop sequences, it reports the sequence, but not that as the stop reason.

For engines without the route, all requests are translated, and those that chats cannot express are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from router.dataplane.rewriting import joined
from router.dataplane.shortening import ALL_DEPTHS, Text
from router.dialects.counting import question
from router.dialects.own_routes import has_own
from router.dialects.schemas import Format, told
from router.formats.unreadable import UNREADABLE
from router.http.errors import Unable
from router.http.tools import OF_MESSAGES, check_message_tools, unreadable

_KEPT = ("model", "stream", "temperature", "top_p", "top_k", "chat_template_kwargs")
_DROPPED = (
    "adaptive_decay",
    "adaptive_target",
    "cache_prompt",
    "dry_allowed_length",
    "dry_base",
    "dry_multiplier",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "dynatemp_exponent",
    "dynatemp_range",
    "frequency_penalty",
    "grammar",
    "ignore_eos",
    "json_schema",
    "logit_bias",
    "lora",
    "min_keep",
    "min_p",
    "mirostat",
    "mirostat_eta",
    "mirostat_tau",
    "n_keep",
    "presence_penalty",
    "reasoning_budget_message",
    "reasoning_budget_tokens",
    "reasoning_effort",
    "reasoning_format",
    "repeat_last_n",
    "repeat_penalty",
    "response_format",
    "samplers",
    "seed",
    "t_max_predict_ms",
    "top_n_sigma",
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
)
"""Parameters of chats that llama-server drops from Anthropic's requests."""
_FORMS = ("output_config", "output_format")
"""Fields with the format of an answer; the second is its name in the API's beta."""
TOOL_RESULT = b'"tool_result"'
"""Requests that contain this may need their messages reordered."""
DOCUMENT = b'"document"'
"""Requests that contain this may have a file beside their texts."""
_NOTHING = msgspec.Raw(b"null")

_encode = msgspec.json.encode


class _Config(msgspec.Struct):
    format: Format | None = None


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


class _Shown(msgspec.Struct):
    """The field of a block that decides about its place."""

    type: str = ""


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Block]


class _Tool(msgspec.Struct):
    type: str | None = None
    name: str = ""
    description: str = ""
    input_schema: msgspec.Raw = msgspec.Raw(b"{}")


class _Choice(msgspec.Struct):
    type: str = "auto"
    name: str = ""
    disable_parallel_tool_use: bool = False


class _Thinking(msgspec.Struct):
    type: str = ""
    budget_tokens: int = 10_000


class _Request(msgspec.Struct):
    messages: list[_Message]
    model: str | None = None
    system: str | list[_Block] | None = None
    max_tokens: int = 4096
    stop_sequences: list[str] | None = None
    tools: list[_Tool] | None = None
    tool_choice: _Choice | None = None
    thinking: _Thinking | None = None


_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_request = msgspec.json.Decoder(_Request).decode
_decode_config = msgspec.json.Decoder(_Config | None).decode
_decode_format = msgspec.json.Decoder(Format | None).decode
_decode_tools = msgspec.json.Decoder(list[_Tool] | None).decode
_decode_choice = msgspec.json.Decoder(_Choice | None).decode
_decode_turns = msgspec.json.Decoder(list[_Message]).decode
_decode_messages = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_decode_blocks = msgspec.json.Decoder(str | list[msgspec.Raw]).decode
_decode_shown = msgspec.json.Decoder(_Shown).decode
_decode_stops = msgspec.json.Decoder(list[str] | None).decode
_value_of = msgspec.json.Decoder().decode


class Asked(NamedTuple):
    """A request for the engine."""

    body: Text
    is_chat: bool = False
    """True for the route of chats."""
    stops: Sequence[str] = ()
    """The client's stop sequences."""
    depth: int = 1
    """The depth to which a body with these parameters has to be parsed."""
    model: str = ""
    """The client's name of the model, if the engine's may differ."""
    mistake: Exception | None = None
    """Why the request could not be translated, if the engine has no route for it."""


def read(body: Text) -> Asked:
    """Return a request for llama-server. Bodies that do not have the API's format are left for it to refuse.

    Raises ApiError 400 for what it would lose without a word: documents, and the names of tools in the form of
    another API.
    """
    depth = 1
    try:
        fields = _fields_of(body)
        _check_tools(fields)
        if DOCUMENT in body:
            _check_blocks(_decode_turns(fields.get("messages", _NOTHING)))
        depth = 2 if "stop_sequences" in fields else 1
        depth = depth if fields.keys().isdisjoint((*_DROPPED, *_FORMS)) else ALL_DEPTHS
        if TOOL_RESULT in body and (ordered := _ordered(fields)) is not None:
            fields = ordered
            body = _encode(fields)
        stops: list[str] = _decode_stops(fields.get("stop_sequences", _NOTHING)) or []
        system, kept = _beside(fields)
        if system is not None:
            fields = {**fields, "system": system}
            body = _encode(fields)
        if not kept:
            return Asked(body, stops=stops, depth=depth)
        chat = {**_chat(fields, _decode_request(body)), **kept, **_telling(stops)}
        return Asked(_encode(chat), is_chat=True, stops=stops, depth=depth)
    except UNREADABLE:
        return Asked(body, depth=depth)


def is_for_chats(body: Text) -> bool:
    """Return whether a request has parameters that only chats have: vLLM, too, drops them from messages."""
    return not _fields_of(body).keys().isdisjoint((*_DROPPED, _FORMS[1]))


def for_others(body: Text) -> Asked:
    """Return a request as a chat, for an engine without a route for messages. Raises ApiError 400."""
    try:
        fields = _fields_of(body)
        _check_tools(fields)
        if TOOL_RESULT in body:
            fields = _ordered(fields) or fields
        system, kept = _beside(fields)
        if system is not None:
            fields = {**fields, "system": system}
        request = _decode_request(_encode(fields))
        stops = request.stop_sequences or []
        _check(request)
        chat = {**_chat(fields, request), **kept, **_telling(stops)}
        if request.tool_choice is not None and request.tool_choice.type == "tool":
            chat["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice.name}}
        return Asked(_encode(chat), is_chat=True, stops=stops, depth=ALL_DEPTHS, model=request.model or "")
    except UNREADABLE as error:
        return Asked(body, is_chat=True, depth=ALL_DEPTHS, mistake=error)


def counted_by_others(body: Text) -> Asked:
    """Return a request to count tokens as a chat of one token. Raises ApiError 400."""
    asked = for_others(body)
    if asked.mistake is not None:
        return asked
    return asked._replace(body=question(asked.body))


def _check_tools(fields: Mapping[str, msgspec.Raw]) -> None:
    if (tools := fields.get("tools")) is not None:
        check_message_tools(tools)


def _check(request: _Request) -> None:
    """Raise ApiError 400 for a request that chats cannot express."""
    for index, tool in enumerate(request.tools or ()):
        if not tool.name and tool.type in (None, "custom"):
            raise unreadable(index, OF_MESSAGES)
        if tool.type not in (None, "custom"):
            message = f"This model's engine has no tool of type {tool.type!r}: offer tools with an `input_schema`."
            raise Unable.to(message, "tools", has_own("/v1/messages"))
    _check_blocks(request.messages)


def _check_blocks(messages: Iterable[_Message]) -> None:
    """Raise Unable for content that neither chats nor llama-server's own route have a place for."""
    for turn in messages:
        blocks = () if isinstance(turn.content, str) else turn.content
        inner = (block.content for block in blocks if isinstance(block.content, list))
        for block in itertools.chain(blocks, *inner):
            if block.type not in _BLOCKS:
                message = f"This model's engine takes no {block.type!r} blocks: send text and images."
                raise Unable.to(message, "messages", has_own("/v1/messages"))


_BLOCKS = ("text", "image", "thinking", "redacted_thinking", "tool_use", "tool_result")


def _beside(fields: dict[str, msgspec.Raw]) -> tuple[Any, dict[str, Any]]:
    """Return the system prompt if it has to be extended, and the parameters of chats that messages do not have."""
    kept: dict[str, Any] = {name: fields[name] for name in _DROPPED if name in fields}
    form = _form_of(fields)
    if form is None or form.type != "json_schema" or kept.keys() & {"grammar", "json_schema"}:
        return None, kept
    if _may_call(fields):  # under a schema, engines call no tools: it goes into the prompt instead
        system = joined(told(form.schema), _value_of(fields.get("system", _NOTHING)))
        return msgspec.Raw(_encode(system)), kept
    return None, {**kept, "response_format": {"type": "json_schema", "json_schema": _named(form.schema)}}


def _named(schema: msgspec.Raw) -> dict[str, Any]:
    return {"name": "format", "schema": schema}


def _telling(stops: Sequence[str]) -> dict[str, Any]:
    """Return parameters with which llama-server reports the stop sequence that ended a chat."""
    return {"verbose": True, "response_fields": ["stopping_word"]} if stops else {}


def in_order(body: Text) -> Text:
    """Return the body with messages in the order that llama-server needs. Raises ApiError 400."""
    try:
        fields = _fields_of(body)
        _check_tools(fields)
        ordered = _ordered(fields) if TOOL_RESULT in body else None
    except UNREADABLE:
        return body
    return body if ordered is None else _encode(ordered)


def _ordered(fields: dict[str, msgspec.Raw]) -> dict[str, msgspec.Raw] | None:
    """Put results of tools right after their calls, and other content of their message into a message after them:
    the order that Anthropic's API demands within a message. None if nothing changes.
    """
    ordered: list[dict[str, Any]] = []
    messages = _decode_messages(fields.get("messages", _NOTHING))
    for message in messages:
        results, others = _parted(message.get("content", _NOTHING))
        if results and others:
            ordered += [{**message, "content": results}, {**message, "content": others}]
        else:
            ordered.append(message)
    return {**fields, "messages": msgspec.Raw(_encode(ordered))} if len(ordered) > len(messages) else None


def _parted(content: msgspec.Raw) -> tuple[list[msgspec.Raw], list[msgspec.Raw]]:
    """Split content into results of tools and other blocks."""
    results: list[msgspec.Raw] = []
    others: list[msgspec.Raw] = []
    if TOOL_RESULT in bytes(content):
        blocks = _decode_blocks(content)
        for block in () if isinstance(blocks, str) else blocks:
            (results if _decode_shown(block).type == "tool_result" else others).append(block)
    return results, others


def _form_of(fields: dict[str, msgspec.Raw]) -> Format | None:
    config: _Config | None = _decode_config(fields.get(_FORMS[0], _NOTHING))
    if config is not None and config.format is not None:
        return config.format
    form: Format | None = _decode_format(fields.get(_FORMS[1], _NOTHING))
    return form


def _may_call(fields: dict[str, msgspec.Raw]) -> bool:
    choice: _Choice | None = _decode_choice(fields.get("tool_choice", _NOTHING))
    return bool(_decode_tools(fields.get("tools", _NOTHING))) and (choice is None or choice.type != "none")


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
    """Yield the messages of a chat for one of Anthropic's: each result of a tool is a message of its own."""
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
                result: Any = [_part(inner) for inner in content] if has_images else _text(content)
                results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
    if parts or calls or thoughts:
        said = parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts
        turn: dict[str, Any] = {"role": message.role, "content": said or ""}
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
