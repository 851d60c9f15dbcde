"""Changes of an alias to a request: parameters set, replaced or removed, a system prompt, and examples.

Only top-level keys and the list of messages are parsed; all other values are copied as bytes. This module depends
on a route only by where its conversation is. Multipart bodies are not rewritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from router.config.resolved import AliasConfig
from router.dataplane.shortening import Text
from router.engines.llamacpp.adapters import PARAMETER as ADAPTERS
from router.formats.unreadable import UNREADABLE
from router.http.errors import ApiError
from router.http.routes import Conversation

_SAME = (
    frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"}),
    frozenset({"n", "n_cmpl"}),
)
"""llama-server's synonyms: setting one of these replaces the others."""
_SYSTEM_ROLES = ("system", "developer")


class _Role(msgspec.Struct):
    role: Any = None


_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_items_of = msgspec.json.Decoder(list[msgspec.Raw]).decode
_value_of = msgspec.json.Decoder().decode
_role_of = msgspec.json.Decoder(_Role).decode
_encode = msgspec.json.encode


def depth_of(conversation: Conversation | None, alias: AliasConfig) -> int:
    """Return the depth to which an alias changes a body: 1 for parameters, 3 for the fields of messages."""
    return 3 if alias.speaks and conversation is not None else 1


def rewritten(body: Text, conversation: Conversation | None, alias: AliasConfig) -> bytes:
    """Return the body, a JSON object, as the alias changes it. Of a repeated key, the last one counts.

    Parameters are changed before the messages. Values that do not have the shape that the route demands stay as
    they are, for the engine to refuse. Raises ApiError for a body that cannot be parsed.
    """
    try:
        fields: dict[str, Any] = dict(_fields_of(body))
        for key in (*alias.removed, *alias.forced):
            for name in _names_of(key):
                fields.pop(name, None)
        fields.update(alias.forced)
        for key, value in alias.defaults.items():
            if not any(_is_set(fields.get(name)) for name in _names_of(key)) or _names_none(key, fields):
                fields[key] = value
        if alias.speaks and conversation is not None:
            _instruct(fields, conversation, alias)
        return _encode(fields)
    except UNREADABLE as error:
        raise ApiError(400, "invalid_json", f"The body cannot be read: {error}") from None


def _names_of(key: str) -> Iterable[str]:
    return next((names for names in _SAME if key in names), (key,))


def _names_none(key: str, fields: Mapping[str, Any]) -> bool:
    """Whether the client sends an empty list of adapters, which means the same as none."""
    return key == ADAPTERS and _value(fields[key]) == []


def _is_set(value: Any) -> bool:
    return value is not None and not (isinstance(value, msgspec.Raw) and bytes(value) == b"null")


def _instruct(fields: dict[str, Any], conversation: Conversation, alias: AliasConfig) -> None:
    messages, own = conversation
    if own is None:
        turns = _turns(fields.get(messages))
        if turns is not None:
            fields[messages] = _with_examples(_with_prompt(turns, alias), alias.messages)
    else:
        turns, examples = _turns(fields.get(messages)), alias.messages
        if examples and messages == "input":
            examples = tuple({"type": "message", **turn} for turn in examples)
            if isinstance(_value(fields.get(messages)), str):  # one message of the user
                turns = [{"role": "user", "content": fields[messages]}]
        said = _value(fields.get(own))
        if alias.system_prompt and alias.system_prompt_replaces:
            said = None
            turns = turns and _without_prompts(turns)
        if alias.system_prompt and not (alias.system_prompt_yields and (said or _begins_with_prompt(turns))):
            fields[own] = joined(alias.system_prompt, said)
        if turns is not None:
            fields[messages] = _with_examples(turns, examples)


def _with_prompt(turns: list[Any], alias: AliasConfig) -> list[Any]:
    """Put the system prompt first, and merge it with the client's: many chat templates accept no other."""
    prompt = alias.system_prompt
    if not prompt:
        return turns
    if alias.system_prompt_replaces:
        return [{"role": "system", "content": prompt}, *_without_prompts(turns)]
    if not _begins_with_prompt(turns):
        return [{"role": "system", "content": prompt}, *turns]
    if alias.system_prompt_yields:
        return turns
    first = _fields_of(turns[0])
    return [{**first, "content": joined(prompt, _value(first.get("content")))}, *turns[1:]]


def _with_examples(turns: list[Any], examples: Iterable[Mapping[str, str]]) -> list[Any]:
    prompts = 1 if _begins_with_prompt(turns) else 0
    return [*turns[:prompts], *examples, *turns[prompts:]]


def _begins_with_prompt(turns: list[Any] | None) -> bool:
    return turns is not None and turns != [] and _is_prompt(turns[0])


def _without_prompts(turns: list[Any]) -> list[Any]:
    return [turn for turn in turns if not _is_prompt(turn)]


def _is_prompt(turn: msgspec.Raw | dict[str, Any]) -> bool:
    if isinstance(turn, dict):
        return turn["role"] in _SYSTEM_ROLES
    try:
        return _role_of(turn).role in _SYSTEM_ROLES
    except msgspec.ValidationError:  # not an object
        return False


def joined(prompt: str, said: Any) -> Any:
    """Return `prompt` followed by `said`, which is text, or a list of parts that are objects with a type."""
    if said is None or said == "":
        return prompt
    if isinstance(said, str):
        return f"{prompt}\n\n{said}"
    return [{"type": "text", "text": f"{prompt}\n\n"}, *said] if isinstance(said, list) else said


def _turns(raw: Any) -> list[Any] | None:
    try:
        return list(_items_of(raw)) if isinstance(raw, msgspec.Raw) else None
    except msgspec.ValidationError:  # not a list
        return None


def _value(raw: Any) -> Any:
    return _value_of(raw) if isinstance(raw, msgspec.Raw) else raw  # else the configuration has set it
