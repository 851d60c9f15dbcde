"""What an alias changes in a request: parameters set, replaced or removed, and a system prompt.

Only top-level keys and the list of messages are looked at; all other values are copied as the bytes that they are.
Knows no routes but by where they keep a system prompt, and nothing of multipart bodies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from router.api.errors import ApiError
from router.config import AliasConfig

_MESSAGES = frozenset({"/chat/completions", "/chat/completions/input_tokens", "/apply-template"})
"""Where a system prompt is the first of the messages. (Paths without /v1.)"""
_FIELDS = {
    "/messages": ("system", "messages"),
    "/messages/count_tokens": ("system", "messages"),
    "/responses": ("instructions", "input"),
    "/responses/input_tokens": ("instructions", "input"),
}
"""Where it has a field of its own: that, and the field of the messages."""
_SAME = (
    frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"}),
    frozenset({"n", "n_cmpl"}),
)
"""The engine's names for one thing, of which none may get past another."""
_SYSTEM_ROLES = ("system", "developer")


class _Role(msgspec.Struct):
    role: Any = None


_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_items_of = msgspec.json.Decoder(list[msgspec.Raw]).decode
_value_of = msgspec.json.Decoder().decode
_role_of = msgspec.json.Decoder(_Role).decode
_encode = msgspec.json.encode


def rewritten(body: bytes, path: str, alias: AliasConfig) -> bytes:
    """The body, a JSON object, as the engine is to get it. Of a key that is there twice, the last one counts.

    Parameters go before the system prompt. What is not of the shape that its route demands stays as it is, for
    the engine to refuse. Raises ApiError for a body that cannot be read.
    """
    try:
        fields: dict[str, Any] = dict(_fields_of(body))
        for key in (*alias.removed, *alias.forced):
            for name in _names_of(key):
                fields.pop(name, None)
        fields.update(alias.forced)
        for key, value in alias.defaults.items():
            if not any(_is_set(fields.get(name)) for name in _names_of(key)):
                fields[key] = value
        if alias.system_prompt:
            _instruct(fields, path.removeprefix("/v1"), alias)
        return _encode(fields)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"The body cannot be read: {error}") from None


def _names_of(key: str) -> Iterable[str]:
    return next((names for names in _SAME if key in names), (key,))


def _is_set(value: Any) -> bool:
    return value is not None and not (isinstance(value, msgspec.Raw) and bytes(value) == b"null")


def _instruct(fields: dict[str, Any], path: str, alias: AliasConfig) -> None:
    if path in _MESSAGES:
        turns = _items(fields.get("messages"))
        if turns is not None:
            fields["messages"] = _with_prompt(turns, alias)
    elif path in _FIELDS:
        own, messages = _FIELDS[path]
        said = _value(fields.get(own))
        if not alias.system_prompt_replaces:
            fields[own] = _joined(alias.system_prompt, said)
            return
        fields[own] = alias.system_prompt
        turns = _items(fields.get(messages))
        if turns is not None:
            fields[messages] = _without_prompts(turns)


def _with_prompt(turns: list[msgspec.Raw], alias: AliasConfig) -> list[Any]:
    """One system prompt, and first: many chat templates take no other."""
    prompt = alias.system_prompt
    if alias.system_prompt_replaces:
        return [{"role": "system", "content": prompt}, *_without_prompts(turns)]
    if turns and _is_prompt(turns[0]):
        first = _fields_of(turns[0])
        return [{**first, "content": _joined(prompt, _value(first.get("content")))}, *turns[1:]]
    return [{"role": "system", "content": prompt}, *turns]


def _without_prompts(turns: list[msgspec.Raw]) -> list[msgspec.Raw]:
    return [turn for turn in turns if not _is_prompt(turn)]


def _is_prompt(turn: msgspec.Raw) -> bool:
    try:
        return _role_of(turn).role in _SYSTEM_ROLES
    except msgspec.ValidationError:  # not an object
        return False


def _joined(prompt: str, said: Any) -> Any:
    """Text, or a list of parts of which each is an object with a type."""
    if said is None or said == "":
        return prompt
    if isinstance(said, str):
        return f"{prompt}\n\n{said}"
    return [{"type": "text", "text": f"{prompt}\n\n"}, *said] if isinstance(said, list) else said


def _items(raw: Any) -> list[msgspec.Raw] | None:
    try:
        return _items_of(raw) if isinstance(raw, msgspec.Raw) else None
    except msgspec.ValidationError:  # not a list
        return None


def _value(raw: Any) -> Any:
    return _value_of(raw) if isinstance(raw, msgspec.Raw) else raw  # else the configuration has set it
