"""Tools as the APIs offer them, whose forms are alike, and the errors for those in the form of another API.

Engines take a tool of another API for their own mistake, for a tool without a name, or for none.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from router.formats.unreadable import UNREADABLE
from router.http.errors import ApiError
from router.http.routes import ROUTES, Ask, Dialect

_SCHEMA = '{"type": "object", "properties": {…}}'
OF_CHATS = f'{{"type": "function", "function": {{"name": "…", "description": "…", "parameters": {_SCHEMA}}}}}'
OF_RESPONSES = f'{{"type": "function", "name": "…", "description": "…", "parameters": {_SCHEMA}}}'
OF_MESSAGES = f'{{"name": "…", "description": "…", "input_schema": {_SCHEMA}}}'

FUNCTION, INPUT_SCHEMA = b'"function"', b'"input_schema"'
"""Texts without which no tool is in the form of chats or responses, or in that of messages."""
DEPTH = 3
"""How deep the fields of tools are in a body."""

_FORMS: Mapping[tuple[Dialect, Ask], str] = {
    (Dialect.OPENAI, "response"): OF_RESPONSES,
    (Dialect.ANTHROPIC, "chat"): OF_MESSAGES,
    (Dialect.ANTHROPIC, "count"): OF_MESSAGES,
}


_NOTHING = msgspec.Raw(b"")


class _Tool(msgspec.Struct):
    """The fields that tell the forms apart."""

    type: str = ""
    function: msgspec.Raw = _NOTHING
    input_schema: msgspec.Raw = _NOTHING


_decode = msgspec.json.Decoder(list[_Tool]).decode


def form_of(path: str) -> str:
    """Return how requests at a path offer a tool."""
    route = ROUTES.get(path)
    if route is None:
        return OF_CHATS
    if route.asks == "count" and route.conversation is not None and route.conversation.messages == "input":
        return OF_RESPONSES
    return _FORMS.get((route.dialect, route.asks), OF_CHATS)


def unreadable(index: int, form: str) -> ApiError:
    """Return the error for a tool that is not in the form of its API."""
    return ApiError(
        400, "invalid_request", f"`tools[{index}]` is not a tool of this API. Write it as {form}.", "tools"
    )


def check_response_tools(tools: msgspec.Raw) -> None:
    """Raise ApiError 400 for tools of chats or messages. What cannot be read is left for the engine to refuse."""
    for index, tool in enumerate(_read(tools)):
        if tool.function is not _NOTHING or (tool.input_schema is not _NOTHING and tool.type in ("", "custom")):
            raise unreadable(index, OF_RESPONSES)


def check_message_tools(tools: msgspec.Raw) -> None:
    """Raise ApiError 400 for tools of chats or responses. What cannot be read is left for the engine to refuse."""
    for index, tool in enumerate(_read(tools)):
        if tool.type == "function" or tool.function is not _NOTHING:
            raise unreadable(index, OF_MESSAGES)


def _read(tools: msgspec.Raw) -> list[_Tool]:
    try:
        return _decode(tools)
    except UNREADABLE:
        return []
