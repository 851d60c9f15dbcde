"""`/v1/responses` as OpenAI's own clients expect it: an engine's answer, completed with fields that it leaves out.

llama-server has the events of that API, but without indices and sequence numbers, with few fields of the response
before its end, and with `completed` for answers that were cut. OpenAI's libraries and others check all of that,
and throw. So each event is parsed on its way, one at a time, and written again with the missing fields. Fields
that the engine sets itself are kept, so that newer builds are not contradicted. Only ids of items are stored.

The format that a request demands of the text is translated to the engine's parameters.
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
from router.formats.unreadable import UNREADABLE
from router.http.errors import ApiError
from router.http.tools import check_response_tools

_Fields = dict[str, Any]
"""Fields of an object; values that are not needed stay encoded."""

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
"""Fields of a response if neither engine nor request sets them. Responses are not stored here."""
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
"""Fields that a response repeats of its request. Not the instructions, which may be an alias's secret."""
_LIMITS = ("max_output_tokens", "max_tokens", "max_completion_tokens", "n_predict")
"""llama-server's names of the limit on an answer's tokens, in order of precedence."""
_OWN_FORMS = frozenset({"response_format", "json_schema", "grammar"})
"""llama-server's own parameters for the format of a text, which take precedence."""
_MOST_ITEMS = 1 << 16
"""Maximum number of items of one response, whose ids are stored."""
_NO_DETAILS = {"reasoning_tokens": 0}


class _Text(msgspec.Struct):
    format: Format | None = None


class _Tool(msgspec.Struct):
    type: str = ""


class _Wanted(msgspec.Struct):
    """The fields of a request that decide about the format of its answer."""

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
    """Limits on an engine's answers, as far as they are known."""

    context_tokens: int | None = None
    output_tokens: int | None = None
    """Default of `max_output_tokens`."""


class Asked(msgspec.Struct):
    """A request: its body for the engine, and the fields that its answer depends on."""

    body: Text
    """The engine's body."""
    repeated: _Fields
    most_tokens: int | None = None
    has_form: bool = False
    """True if the request has the field `text`."""


def read(body: Text) -> Asked:
    """Parse a request. Bodies that do not have the API's format are left for the engine to refuse.

    Raises ApiError 400 for tools in the form of another API, which it would leave out.
    """
    try:
        fields: _Fields = dict(_fields_of(body))
    except UNREADABLE:
        return Asked(body, {})
    if (tools := fields.get("tools")) is not None:
        check_response_tools(tools)
    repeated = {key: raw for key, raw in fields.items() if key in _REPEATED and bytes(raw) != b"null"}
    return Asked(_with_form(body, fields), repeated, _most_tokens(fields), "text" in fields)


def _most_tokens(fields: _Fields) -> int | None:
    try:
        limits = (_decode_count(fields[key]) for key in _LIMITS if key in fields)
        return next((limit for limit in limits if limit is not None and limit > 0), None)
    except msgspec.MsgspecError:
        return None


def _with_form(body: Text, fields: _Fields) -> Text:
    """Return the body with the format of its text in the engine's parameters.

    Under a schema, engines call no tools: if the request has tools, the schema goes into the instructions instead.
    """
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
        schema: dict[str, Any] = {"schema": {"type": "object"}}  # without it, older builds let any text through
        if form.type == "json_schema":
            schema = {"json_schema": {"name": "format", "schema": form.schema}}
        return _encode({**fields, "response_format": {"type": form.type, **schema}})
    return _encode({**fields, "instructions": joined(told(form.schema), wanted.instructions)})


class Completion(Translator):
    """Completes the answer to one request."""

    def __init__(self, asked: Asked, bounds: Callable[[], Bounds] = Bounds) -> None:
        """`bounds` returns the limits of the engine that answers."""
        super().__init__()
        self._asked = asked
        self._bounds = bounds
        self._created_at = int(time.time())
        self._number = 0
        """The sequence number of the next event."""
        self._id: Any = f"resp_{time.time_ns():x}"
        """The id of the response: the engine's, once it has arrived."""
        self._begun = False
        self._ended = False
        self._items: dict[str, int] = {}

    # --- documents --------------------------------------------------------------------------------------

    def document(self, body: bytes) -> bytes:
        """Complete a document."""
        said = _fields_of(body)
        try:
            return _encode(self._response(said)[0])
        except (msgspec.MsgspecError, UnicodeDecodeError):  # a newer format of the engine: passed on
            return body

    # --- streams ----------------------------------------------------------------------------------------

    def last_events(self) -> bytes:
        """Raise BrokenAnswer for a stream that ended before its last event."""
        if self._ended:
            return b""
        raise BrokenAnswer(
            ApiError(502, "engine_lost", "The engine ended the stream before the response was complete.")
        )

    def failed(self, error: ApiError) -> bytes:
        """Return an error wherever clients of this API look for one: Codex in the response, versions of the AI SDK
        in an event or in its `error`, which OpenAI's libraries throw.
        """
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
        if self._ended or data == b"[DONE]":  # the end of streams in another API
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
        """Return the response with all its fields, and whether it was cut."""
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
        """Whether an answer was cut, which the engine does not report. With context shift, it may be longer."""
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
        if identity not in self._items:  # the item arrived complete, without pieces
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
        """Add an event's place in the response. False for a part of an item not begun: all of it will follow."""
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
    """Return an item's id. Older builds give calls none, and refer to them by their `call_id`."""
    return item.id or item.call_id


def _at(identity: str, index: int) -> _Fields:
    return {"item_id": identity, "output_index": index, "content_index": 0}
