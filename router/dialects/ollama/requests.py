"""Ollama's requests translated to llama-server's: `/api/chat`, `/api/generate`, `/api/embed`, `/api/embeddings`,
and `/chat` of earlier hosts, which streams only on request, and refuses unknown fields.

Pure functions. Only fields that the client has set are passed on, so that the model's own defaults hold for the
others. Options that Ollama applies when it loads a model (`num_ctx`, `num_gpu`, …) are ignored, as the
configuration decides about them; an engine refuses prompts that exceed its context instead of cutting them.

Fields are those of Ollama's api/types.go and docs/api.md, and of build 11434 of llama-server.
"""

from __future__ import annotations

import base64
import math
import re
from typing import Any, Literal, NamedTuple

import msgspec

from router.dataplane.shortening import Text
from router.formats.ollama_options import BadOption, request_parameters
from router.formats.unreadable import UNREADABLE
from router.http.errors import ApiError

Kind = Literal["chat", "earlier_chat", "generate", "raw", "embed", "embeddings"]
"""`earlier_chat` is `/chat` of earlier hosts."""


class Asked(NamedTuple):
    """One request, translated."""

    kind: Kind
    model: str
    """The client's name of the model."""
    streams: bool
    keep_alive_sec: float | None
    """None: not in the request."""
    target: str
    """The engine's route; empty for a request that only loads or unloads the model."""
    question: dict[str, Any]
    """The engine's body without `model`."""
    dimensions: int | None = None
    """The number of components to which embeddings are cut."""
    most_alternatives: int = 0
    """`top_logprobs`"""

    @property
    def needs(self) -> tuple[str, ...]:
        """The capabilities that the model must have. Not to think needs none."""
        thinks = self.question.get("chat_template_kwargs", {}).get("enable_thinking")
        return (*(("tools",) if self.question.get("tools") else ()), *(("thinking",) if thinks else ()))

    @property
    def unloads(self) -> bool:
        return not self.target and self.keep_alive_sec == 0

    def body(self, alias: str) -> bytes:
        """Return the engine's body; empty if there is no request for it."""
        return msgspec.json.encode({"model": alias, **self.question}) if self.target else b""


class _Common(msgspec.Struct):
    model: str | None = None
    name: str | None = None
    """Older name of `model`."""
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


class _Generating(_Common):
    stream: bool | None = None
    format: Any = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class _Function(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class _Call(msgspec.Struct):
    function: _Function
    id: str | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[_Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class _Chat(_Generating):
    messages: list[_Message] | None = None
    tools: list[Any] | None = None


class _EarlierChat(_Chat, forbid_unknown_fields=True):
    """A request for `/chat`, whose sampling parameters are beside the messages."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    def with_options(self) -> _Chat:
        """Return the same request in Ollama's format."""
        beside = {
            "num_predict": self.max_tokens,
            **{name: getattr(self, name) for name in ("temperature", "top_p", "seed", "stop")},
        }
        given = {name: value for name, value in beside.items() if value is not None}
        self.options = {**(self.options or {}), **given}
        self.stream = self.stream is True  # here, the default is a document
        return self


class _Generate(_Generating):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None


class _Embed(_Common):
    input: str | list[str] | None = None
    dimensions: int | None = None


class _Embeddings(_Common):
    prompt: str | None = None


_chat = msgspec.json.Decoder(_Chat).decode
_earlier_chat = msgspec.json.Decoder(_EarlierChat).decode
_generate = msgspec.json.Decoder(_Generate).decode
_embed = msgspec.json.Decoder(_Embed).decode
_embeddings = msgspec.json.Decoder(_Embeddings).decode


def translate(path: str, body: Text) -> Asked:
    """Translate a request. Raises ApiError 400 for one that cannot be parsed or is not supported."""
    try:
        if path == "/api/chat":
            return _asked_chat(_chat(body), "chat")
        if path == "/chat":
            return _asked_chat(_earlier_chat(body).with_options(), "earlier_chat")
        if path == "/api/generate":
            return _asked_generate(_generate(body))
        if path == "/api/embed":
            embed = _embed(body)
            return _asked_embeddings(embed, "embed", embed.input, embed.dimensions)
        legacy = _embeddings(body)
        return _asked_embeddings(legacy, "embeddings", legacy.prompt or None)
    except UNREADABLE as error:
        raise ApiError(
            400, "invalid_json", f"invalid request: {error}" if body else "missing request body"
        ) from None


def for_others(asked: Asked) -> Asked:
    """Return the request for an engine that has OpenAI's routes only. Raises ApiError 400."""
    question = dict(asked.question)
    if "messages" in question:
        question["messages"] = _with_ids(question["messages"])
    if asked.target != "/completion":
        return asked._replace(question=question)
    if question.pop("n_probs", None):
        message = "`logprobs` of a `raw` prompt are not supported by this model's engine: leave them out."
        raise ApiError(400, "not_supported", message, "logprobs")
    return asked._replace(target="/v1/completions", question=question)


def _with_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the ids that OpenAI's API demands to calls and results. Ollama's clients may go by their order."""
    unanswered: list[str] = []
    told: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            calls = [{"id": f"call_{number}_{index}", **call} for index, call in enumerate(calls)]
            unanswered = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            wanted = message.get("tool_call_id") or (unanswered[0] if unanswered else f"call_{number}")
            unanswered = [one for one in unanswered if one != wanted]
            message = {**message, "tool_call_id": wanted}
        told.append(message)
    return told


# --- chat and generate ----------------------------------------------------------------------------------


def _asked_chat(asked: _Chat, kind: Kind) -> Asked:
    if not asked.messages:
        return _to_load(asked, kind)
    question = {
        "messages": [_message(message) for message in asked.messages],
        **_thinking(asked.think),
        **_response_format(asked.format),
    }
    if asked.tools:
        question["tools"] = asked.tools
    return _to_generate(asked, kind, "/v1/chat/completions", question, _logprobs(asked))


def _asked_generate(asked: _Generate) -> Asked:
    for name in ("template", "context"):
        if getattr(asked, name):
            raise ApiError(400, "invalid_request", f"`{name}` is not supported: {_INSTEAD[name]}.", name)
    if not asked.prompt and not asked.suffix and not asked.images:
        return _to_load(asked, "generate")
    prompt = asked.prompt or ""
    most = asked.top_logprobs or 0
    if asked.raw or asked.suffix:
        if asked.images:
            raise ApiError(400, "invalid_request", "`images` need a chat template: leave out `raw` and `suffix`.")
        question = {"prompt": prompt, **_schema(asked.format)}
        target = "/completion"
        if asked.suffix:
            target = "/infill"
            question = {"input_prefix": prompt, "input_suffix": asked.suffix, "prompt": ""}
        probabilities = {"n_probs": max(1, most)} if asked.logprobs else {}
        return _to_generate(asked, "raw", target, question, probabilities)
    messages = [] if not asked.system else [{"role": "system", "content": asked.system}]
    messages.append(_message(_Message("user", prompt, images=asked.images)))
    question = {"messages": messages, **_thinking(asked.think), **_response_format(asked.format)}
    return _to_generate(asked, "generate", "/v1/chat/completions", question, _logprobs(asked))


_INSTEAD = {
    "template": "a model's chat template is set in the router's configuration (flags: --chat-template-file), or "
    "send a prompt that is laid out already, with `raw`",
    "context": "send the conversation to /api/chat",
}


def _to_generate(
    asked: _Generating, kind: Kind, target: str, question: dict[str, Any], probabilities: dict[str, Any]
) -> Asked:
    streams = asked.stream is not False
    try:
        parameters = request_parameters(asked.options)
    except BadOption as error:
        raise ApiError(400, "invalid_request", str(error), error.param) from None
    question |= {**parameters, **probabilities, "stream": streams, "cache_prompt": True}
    keep_alive_sec = duration_sec(asked.keep_alive)
    most = asked.top_logprobs or 0
    if not 0 <= most <= _MOST_ALTERNATIVES:
        message = f"`top_logprobs` must be between 0 and {_MOST_ALTERNATIVES}."
        raise ApiError(400, "invalid_request", message, "top_logprobs")
    return Asked(kind, _name(asked), streams, keep_alive_sec, target, question, most_alternatives=most)


_MOST_ALTERNATIVES = 20


def _to_load(asked: _Generating, kind: Kind) -> Asked:
    keep_alive_sec = duration_sec(asked.keep_alive)
    return Asked(kind, _name(asked), asked.stream is not False, keep_alive_sec, "", {})


def _name(asked: _Common) -> str:
    return asked.model or asked.name or ""


def _message(message: _Message) -> dict[str, Any]:
    translated: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.images:
        text = [{"type": "text", "text": message.content}] if message.content else []
        translated["content"] = [*text, *map(_medium, message.images)]
    if message.thinking:
        translated["reasoning_content"] = message.thinking
    if message.tool_calls:
        translated["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if message.tool_name:
        translated["name"] = message.tool_name
    if message.tool_call_id:
        translated["tool_call_id"] = message.tool_call_id
    return translated


def _tool_call(call: _Call) -> dict[str, Any]:
    """Translate a call: Ollama has the arguments as an object, OpenAI as that object encoded in a string."""
    arguments = bytes(call.function.arguments)
    text = msgspec.json.decode(arguments) if arguments.startswith(b'"') else arguments.decode()
    translated = {"type": "function", "function": {"name": call.function.name, "arguments": text}}
    return {**translated, "id": call.id} if call.id else translated


_MAGIC = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"ID3", "audio/mp3"),
    (b"\xff\xfb", "audio/mp3"),
    (b"fLaC", "audio/flac"),
)


def _medium(encoded: str) -> dict[str, Any]:
    """Return the content part of a medium in base64, whose type is recognized by its first bytes."""
    if encoded.startswith("data:"):
        return {"type": "image_url", "image_url": {"url": encoded}}
    try:
        head = base64.b64decode(encoded[:24], validate=True)
    except ValueError as error:
        raise ApiError(400, "invalid_request", f"an image is not base64: {error}", "images") from None
    if head.startswith(b"RIFF"):
        kind = "audio/wav" if head[8:12] == b"WAVE" else "image/webp"
    else:
        kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), "image/png")
    medium, _, subtype = kind.partition("/")
    if medium == "audio":
        return {"type": "input_audio", "input_audio": {"data": encoded, "format": subtype}}
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{encoded}"}}


def _thinking(think: bool | str | None) -> dict[str, Any]:
    if think is None or think == "":
        return {}
    if isinstance(think, bool):
        return {"chat_template_kwargs": {"enable_thinking": think}}
    if think not in _EFFORTS:
        raise ApiError(400, "invalid_request", f"`think` must be true, false or one of {', '.join(_EFFORTS)}.")
    return {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": think}}


_EFFORTS = ("low", "medium", "high", "max")


def _response_format(wanted: Any) -> dict[str, Any]:
    if schema := _schema(wanted):
        wrapped = {"name": "format", "schema": schema["json_schema"]}
        return {"response_format": {"type": "json_schema", "json_schema": wrapped}}
    return {}


def _schema(wanted: Any) -> dict[str, Any]:
    if wanted is None or wanted == "":
        return {}
    if wanted == "json":
        return {"json_schema": {"type": "object"}}
    if isinstance(wanted, dict):
        return {"json_schema": wanted}
    raise ApiError(400, "invalid_request", '`format` must be "json" or a JSON schema.', "format")


def _logprobs(asked: _Generating) -> dict[str, Any]:
    if not asked.logprobs:
        return {}
    return {"logprobs": True, "top_logprobs": max(1, asked.top_logprobs or 0)}  # with 0, it sends none at all


# --- embeddings -----------------------------------------------------------------------------------------


def _asked_embeddings(
    asked: _Common, kind: Kind, texts: str | list[str] | None, dimensions: int | None = None
) -> Asked:
    keep_alive_sec = duration_sec(asked.keep_alive)
    given = ([texts] if texts else []) if isinstance(texts, str) else texts
    target = "/v1/embeddings" if given else ""
    question = {"input": given, "encoding_format": "float"} if given else {}
    return Asked(kind, _name(asked), False, keep_alive_sec, target, question, dimensions)


# --- keep_alive -----------------------------------------------------------------------------------------

_UNITS_SEC = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_QUANTITY = r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)"
_DURATION = re.compile(rf"(?P<sign>[+-]?)(?P<quantities>(?:{_QUANTITY})+|0)")
_PLAIN_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def duration_sec(keep_alive: float | str | None) -> float | None:
    """Return the seconds of a number, or of a duration in Go's format (`1h30m`); `math.inf` if negative.

    Raises ApiError 400.
    """
    if keep_alive is None or keep_alive == "":
        return None
    if isinstance(keep_alive, str):
        if _PLAIN_NUMBER.fullmatch(keep_alive):
            seconds = float(keep_alive)
        elif found := _DURATION.fullmatch(keep_alive):
            seconds = sum(float(n) * _UNITS_SEC[unit] for n, unit in re.findall(_QUANTITY, found["quantities"]))
            seconds = -seconds if found["sign"] == "-" else seconds
        else:
            message = f'keep_alive: invalid duration {keep_alive[:40]!r}: use seconds, or a text such as "5m"'
            raise ApiError(400, "invalid_request", message, "keep_alive")
    else:
        seconds = keep_alive
    return math.inf if seconds < 0 else seconds
