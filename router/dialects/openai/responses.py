"""`/v1/responses` as OpenAI's own clients take it: an engine's answer, completed by what it leaves out.

llama-server has the events of that API, but numbers nothing in them, tells hardly anything of the response before
its end, and says `completed` of what was cut. OpenAI's libraries and others check all of that, and throw. So each
event is read on its way, one at a time, and written again with what belongs there. What an engine says itself
stays: builds that say more one day are not contradicted. Nothing is kept but the names of items that have begun.

What the request wants of the text's form, an engine gets in the words that it understands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from router.dataplane.answer import BrokenAnswer, Translator
from router.dataplane.rewriting import joined
from router.dataplane.shortening import Text
from router.dialects.schemas import Format, told
from router.engines.llamacpp.capability import error_of_engine
from router.http.documents import UNREADABLE
from router.http.errors import ApiError

_Fields = dict[str, Any]
"""Of an object; what is of no interest here stays the bytes that it is."""

_encode = msgspec.json.encode
_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

_DEFAULTS: Mapping[str, Any] = {
    "background": False,
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "output": [],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": False,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "truncation": "disabled",
    "usage": None,
}
"""What a response has, whoever says nothing of it. None is stored here."""
_REPEATED = frozenset(
    {
        "max_output_tokens",
        "metadata",
        "model",
        "parallel_tool_calls",
        "reasoning",
        "temperature",
        "text",
        "tool_choice",
        "tools",
        "top_p",
    }
)
"""What a response repeats of its request. Not the instructions: those of an alias are its operator's business."""
_LIMITS = ("max_output_tokens", "max_tokens", "max_completion_tokens", "n_predict")
"""The engine's names for the most tokens of an answer, the one that counts first."""
_OWN_FORMS = frozenset({"response_format", "json_schema", "grammar"})
"""The engine's own names for the form of a text: who uses them is taken at their word."""
_MOST_ITEMS = 1 << 16
"""Of one response, whose names are kept."""
_NO_DETAILS = {"reasoning_tokens": 0}


class _Text(msgspec.Struct):
    format: Format | None = None


class _Tool(msgspec.Struct):
    type: str = ""


class _Wanted(msgspec.Struct):
    """What of a request decides about its form."""

    text: _Text | None = None
    tools: list[_Tool] | None = None
    tool_choice: msgspec.Raw = msgspec.Raw(b"null")
    instructions: str | list[msgspec.Raw] | None = None


class _Part(msgspec.Struct):
    text: str = ""


class _Item(msgspec.Struct):
    type: str = ""
    id: str = ""
    call_id: str = ""
    arguments: str = ""
    content: list[_Part] = []


class _Usage(msgspec.Struct):
    input_tokens: int = 0
    output_tokens: int = 0


_decode_wanted = msgspec.json.Decoder(_Wanted).decode
_decode_item = msgspec.json.Decoder(_Item).decode
_decode_usage = msgspec.json.Decoder(_Usage).decode
_decode_count = msgspec.json.Decoder(int | None).decode
_decode_text = msgspec.json.Decoder(str).decode


class Bounds(NamedTuple):
    """Of the answers of an engine, as far as it tells them."""

    context_tokens: int | None = None
    output_tokens: int | None = None
    """Of who asks for no other number."""


class Asked(msgspec.Struct):
    """A request, as far as its answer has to do with it."""

    body: Text
    """For the engine."""
    repeated: _Fields
    most_tokens: int | None = None
    has_form: bool = False
    """It says something of the form of the answer's text."""


def read(body: Text) -> Asked:
    """What is not of the API's shape is left for the engine to refuse."""
    try:
        fields: _Fields = dict(_fields_of(body))
    except UNREADABLE:
        return Asked(body, {})
    repeated = {key: raw for key, raw in fields.items() if key in _REPEATED and bytes(raw) != b"null"}
    return Asked(_with_form(body, fields), repeated, _most_tokens(fields), "text" in fields)


def _most_tokens(fields: _Fields) -> int | None:
    try:
        limits = (_decode_count(fields[key]) for key in _LIMITS if key in fields)
        return next((limit for limit in limits if limit is not None and limit > 0), None)
    except msgspec.MsgspecError:
        return None


def _with_form(body: Text, fields: _Fields) -> Text:
    """An engine that may call tools and has a schema calls none of them: there the schema is only told."""
    if "text" not in fields or not _OWN_FORMS.isdisjoint(fields):
        return body
    try:
        wanted = _decode_wanted(body)
    except UNREADABLE:
        return body
    form = wanted.text.format if wanted.text is not None else None
    if form is None or form.type not in ("json_schema", "json_object"):
        return body
    has_tools = any(tool.type == "function" for tool in wanted.tools or ())
    if not has_tools or bytes(wanted.tool_choice) == b'"none"':
        schema = {"json_schema": {"name": "format", "schema": form.schema}} if form.type == "json_schema" else {}
        return _encode({**fields, "response_format": {"type": form.type, **schema}})
    return _encode({**fields, "instructions": joined(told(form.schema), wanted.instructions)})


class Completion(Translator):
    """The answer to one request."""

    def __init__(self, asked: Asked, bounds: Callable[[], Bounds] = Bounds) -> None:
        """`bounds`: those of the engine that answers."""
        super().__init__()
        self._asked = asked
        self._bounds = bounds
        self._created_at = int(time.time())
        self._number = 0
        """Of events, so far."""
        self._id: Any = f"resp_{time.time_ns():x}"
        """Of the response: the engine's, once that has told it."""
        self._begun = False
        self._ended = False
        self._items: dict[str, int] = {}

    # --- documents --------------------------------------------------------------------------------------

    def document(self, body: bytes) -> bytes:
        """A whole answer."""
        said = _fields_of(body)
        try:
            return _encode(self._response(said)[0])
        except (msgspec.MsgspecError, UnicodeDecodeError):  # the engine's new ways, and its client's to understand
            return body

    # --- streams ----------------------------------------------------------------------------------------

    def last_events(self) -> bytes:
        """What is still to be said when the engine has said its last."""
        if self._ended:
            return b""
        raise BrokenAnswer(
            ApiError(502, "engine_lost", "The engine ended the stream before the response was complete.")
        )

    def failed(self, error: ApiError) -> bytes:
        """An end in the API's own way, and wherever its clients look for one: Codex in the response, versions of
        the AI SDK in an event or in its `error`, which OpenAI's libraries throw."""
        said = {"type": error.type, "code": error.code, "message": error.message, "param": error.param}
        begin = b"" if self._begun else self._begin({})
        self._ended = True
        response = {
            **self._base(),
            "status": "failed",
            "error": {"code": error.code, "message": error.message},
        }
        return b"".join(
            (
                begin,
                self._written("error", {**said, "type": "error", "error": said}),
                self._written("response.failed", {"response": response}),
            )
        )

    def _event(self, data: bytes) -> bytes:
        if self._ended or data == b"[DONE]":  # which is another API's end
            return b""
        try:
            fields: _Fields = dict(_fields_of(data))
            if "type" not in fields and "error" in fields:
                raise BrokenAnswer(error_of_engine(500, data))
            return self._completed(_decode_text(fields["type"]), fields)
        except (msgspec.ValidationError, KeyError):  # no event of this API
            return b"data: %b\n\n" % data

    def _completed(self, kind: str, fields: _Fields) -> bytes:
        match kind:
            case "response.created":
                return self._begin(_fields_of(fields["response"]))
            case "response.in_progress":
                response = _fields_of(fields["response"])
                begin = b"" if self._begun else self._begin(response)
                return begin + self._written(kind, {**fields, "response": {**self._base(), **response}})
            case "response.completed" | "response.incomplete" | "response.failed":
                return self._end(kind, fields)
            case "response.output_item.added":
                return self._begin_item(fields)
            case "response.output_item.done":
                return self._end_item(fields)
            case _:
                return self._written(kind, fields) if self._place(kind, fields) else b""

    # --- the response -----------------------------------------------------------------------------------

    def _begin(self, response: Mapping[str, Any]) -> bytes:
        self._begun = True
        self._id = response.get("id", self._id)
        shown = {**self._base(), "status": "in_progress", **response}
        return self._written("response.created", {"response": shown})

    def _end(self, kind: str, fields: _Fields) -> bytes:
        response = _fields_of(fields["response"])
        begin = b"" if self._begun else self._begin({"id": response["id"]} if "id" in response else {})
        self._ended = True
        fields["response"], is_cut = self._response(response)
        return begin + self._written("response.incomplete" if is_cut else kind, fields)

    def _base(self) -> _Fields:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            **_DEFAULTS,
            **self._asked.repeated,
        }

    def _response(self, said: Mapping[str, Any]) -> tuple[_Fields, bool]:
        """With all that a response has, and whether it was cut."""
        response = {**self._base(), **said, "created_at": self._created_at}
        if "usage" not in said:
            return response, False
        response["usage"] = {"output_tokens_details": _NO_DETAILS, **_fields_of(said["usage"])}
        is_cut = self._is_cut(_decode_usage(said["usage"]))
        if is_cut:
            response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        else:
            response.setdefault("completed_at", int(time.time()))
        return response, is_cut

    def _is_cut(self, usage: _Usage) -> bool:
        """The engine does not say so. Who shifts its context can get beyond that."""
        bounds = self._bounds()
        most = self._asked.most_tokens or bounds.output_tokens
        if most is not None and usage.output_tokens >= most:
            return True
        return usage.input_tokens + usage.output_tokens == bounds.context_tokens

    # --- its items --------------------------------------------------------------------------------------

    def _begin_item(self, fields: _Fields) -> bytes:
        begin = b"" if self._begun else self._begin({})
        item = _decode_item(fields["item"])
        identity = _identity(item)
        if len(self._items) == _MOST_ITEMS:
            raise BrokenAnswer.unreadable("its items do not end")
        index = self._items[identity] = len(self._items)
        fields["item"] = {"id": identity, **_fields_of(fields["item"])}
        begin += self._written("response.output_item.added", {"output_index": index, **fields})
        if item.type == "reasoning" and not item.content:
            part = {"part": {"type": "reasoning_text", "text": ""}, **_at(identity, index)}
            begin += self._written("response.content_part.added", part)
        return begin

    def _end_item(self, fields: _Fields) -> bytes:
        item = _decode_item(fields["item"])
        identity = _identity(item)
        begin = b""
        if identity not in self._items:  # it was there at once, without pieces
            added = {**_fields_of(fields["item"]), "status": "in_progress"}
            begin = self._begin_item({"item": msgspec.Raw(_encode(added))})
        index = self._items[identity]
        fields["item"] = {"id": identity, "status": "completed", **_fields_of(fields["item"])}
        if item.type == "function_call":
            said = {"item_id": identity, "output_index": index, "arguments": item.arguments}
            begin += self._written("response.function_call_arguments.done", said)
        elif item.type == "reasoning" and item.content:
            text = item.content[0].text
            place = _at(identity, index)
            begin += self._written("response.reasoning_text.done", {"text": text, **place})
            part = {"type": "reasoning_text", "text": text}
            begin += self._written("response.content_part.done", {"part": part, **place})
        return begin + self._written("response.output_item.done", {"output_index": index, **fields})

    def _place(self, kind: str, fields: _Fields) -> bool:
        """Say where in the response it belongs. False for a part of what has not begun: the whole will follow."""
        if "item_id" not in fields:
            return True
        index = self._items.get(_decode_text(fields["item_id"]))
        if index is None:
            return False
        fields.setdefault("output_index", index)
        if not kind.startswith("response.function_call"):
            fields.setdefault("content_index", 0)
        if kind.startswith("response.output_text."):
            fields.setdefault("logprobs", [])
        elif kind == "response.content_part.added":
            fields["part"] = {"annotations": [], "logprobs": [], **_fields_of(fields["part"])}
        return True

    def _written(self, kind: str, fields: _Fields) -> bytes:
        said = {**fields, "type": kind, "sequence_number": self._number}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode(said))


def _identity(item: _Item) -> str:
    """Older builds give a call no name of its own, but refer to it by this one."""
    return item.id or item.call_id


def _at(identity: str, index: int) -> _Fields:
    return {"item_id": identity, "output_index": index, "content_index": 0}
