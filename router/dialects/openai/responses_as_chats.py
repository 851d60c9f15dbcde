"""Requests for OpenAI's responses translated to chats, for engines that have chats only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from router.dataplane.rewriting import joined
from router.dataplane.shortening import Text
from router.dialects.own_routes import has_own
from router.engines.parameters import OF_LLAMA_SERVER
from router.http.errors import ApiError, Unable
from router.http.tools import OF_RESPONSES, unreadable

_KEPT = OF_LLAMA_SERVER | {
    "frequency_penalty",
    "logit_bias",
    "model",
    "parallel_tool_calls",
    "presence_penalty",
    "response_format",
    "seed",
    "stop",
    "stream",
    "temperature",
    "top_p",
    "user",
}
_STORED = ("previous_response_id", "conversation", "prompt")
"""Fields that refer to objects stored at OpenAI."""

_NOTHING = msgspec.Raw(b"null")

_encode = msgspec.json.encode
_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class _Part(msgspec.Struct):
    type: str = ""
    text: str = ""
    refusal: str = ""
    image_url: str | None = None
    detail: str | None = None
    input_audio: msgspec.Raw = _NOTHING


_Parts = str | list[_Part]


class _Item(msgspec.Struct):
    """An input item: a turn of the conversation, or a part of one."""

    type: str = "message"
    role: str = ""
    content: _Parts | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: _Parts = ""
    summary: list[_Part] = []


class _Tool(msgspec.Struct):
    type: str = ""
    name: str = ""
    description: str | None = None
    parameters: msgspec.Raw = _NOTHING
    strict: bool | None = None


class _Reasoning(msgspec.Struct):
    effort: str | None = None


class _Request(msgspec.Struct):
    input: str | list[_Item]
    instructions: str | list[_Item] | None = None
    tools: list[_Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning: _Reasoning | None = None
    max_output_tokens: int | None = None
    background: bool | None = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None


_decode_request = msgspec.json.Decoder(_Request).decode


def as_chat(body: Text) -> bytes:
    """Translate a request to one for a chat. Raises ApiError 400, and `UNREADABLE`."""
    request = _decode_request(body)
    for name in _STORED:
        if getattr(request, name):
            message = f"`{name}` is not supported: nothing is stored here. Send the whole conversation in `input`."
            raise ApiError(400, "not_supported", message, name)
    if request.background:
        message = "`background` is not supported: nothing is stored here. Wait for the answer, or stream it."
        raise ApiError(400, "not_supported", message, "background")
    fields = _fields_of(body)
    chat: dict[str, Any] = {name: raw for name, raw in fields.items() if name in _KEPT and bytes(raw) != b"null"}
    if request.max_output_tokens is not None:
        chat["max_tokens"] = request.max_output_tokens
    if request.reasoning is not None and request.reasoning.effort is not None:
        chat["reasoning_effort"] = request.reasoning.effort
    for index, tool in enumerate(request.tools or ()):
        if not tool.type or (tool.type == "function" and not tool.name):
            raise unreadable(index, OF_RESPONSES)
    if tools := [_tool(tool) for tool in request.tools or () if tool.type == "function"]:
        chat["tools"] = tools
        if request.tool_choice is not None:
            chat["tool_choice"] = _choice(request.tool_choice)
    chat["messages"] = _turns(request)
    return _encode(chat)


def _tool(tool: _Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if bytes(tool.parameters) != bytes(_NOTHING):
        function["parameters"] = tool.parameters
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: str | Mapping[str, Any]) -> Any:
    if isinstance(choice, str):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice.get("mode", "auto")  # of `allowed_tools`; other choices are of tools that are not offered


def _turns(request: _Request) -> list[dict[str, Any]]:
    """Return the messages of a chat. Reasoning, text and calls of the assistant become one message, and so do
    instructions at the beginning.
    """
    turns: list[dict[str, Any]] = []
    if isinstance(request.instructions, str):
        turns.append({"role": "system", "content": request.instructions})
    given = [_Item(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    for item in (*(request.instructions if isinstance(request.instructions, list) else ()), *given):
        match item.type:
            case "message" if item.role == "assistant":
                turn, text = _assistants(turns), _text(item.content)
                turn["content"] = joined(turn["content"], text) if turn["content"] else text
            case "message":
                role = "system" if item.role == "developer" else item.role
                content = _content(item.content or "")
                if role == "system" and turns and turns[-1]["role"] == "system":
                    turns[-1]["content"] = joined(turns[-1]["content"], content)
                else:
                    turns.append({"role": role, "content": content})
            case "reasoning":
                if thoughts := _text(item.content) or "\n".join(part.text for part in item.summary):
                    _assistants(turns)["reasoning_content"] = thoughts
            case "function_call":
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                _assistants(turns).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
            case _:
                message = (
                    f"This model's engine takes no {item.type!r} items: send messages and calls of functions."
                )
                raise Unable.to(message, "input", has_own("/v1/responses"))
    return turns


def _assistants(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant's message at the end, or append one."""
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _text(content: _Parts | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text or part.refusal for part in content)


def _content(content: _Parts) -> str | list[dict[str, Any]]:
    """Return text, or a list of parts if there is more than one text. Raises ApiError 400."""
    if isinstance(content, str):
        return content
    parts = [_part(part) for part in content]
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _part(part: _Part) -> dict[str, Any]:
    if part.type in ("input_text", "output_text", "text"):
        return {"type": "text", "text": part.text}
    if part.type == "input_image" and part.image_url is not None:
        detail = {} if part.detail is None else {"detail": part.detail}
        return {"type": "image_url", "image_url": {"url": part.image_url, **detail}}
    if part.type == "input_audio":
        return {"type": "input_audio", "input_audio": part.input_audio}
    message = f"This model's engine takes no {part.type!r} parts: send text, and images by their `image_url`."
    raise Unable.to(message, "input", has_own("/v1/responses"))
