"""Translation of an engine's errors to the router's own, which follow the API of the client.

The engine decides what it supports: the router neither searches bodies for images nor knows which routes a build
serves. It only improves the message, as it knows the other models and how clients treat an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, NamedTuple

import msgspec

from router.config.names import some_of
from router.config.resolved import ModelConfig
from router.engines.llamacpp.flags import Purpose
from router.formats.unreadable import UNREADABLE
from router.http.errors import ApiError, ContextExceeded
from router.http.routes import Ask
from router.http.tools import OF_CHATS

_LONGEST_REFUSAL = 1000
_LONGEST_WORDS = 4000
"""Longest excerpt of an error body that is not a document of the engine's API."""

_CODES = {
    400: "invalid_request",
    404: "not_found",
    422: "invalid_request",
    501: "not_supported",
    503: "unavailable",
}
"""Codes of errors without a type, by status."""
_MISTAKES = (
    "'messages' is required",
    '"prompt" is required',
    "Cannot use both json_schema and grammar",
    "Failed to parse messages",
    "Failed to tokenize prompt",
    "Invalid base64 value",
    "Only no echo is supported",
    "Unsupported param: ",
    "is too large to process",
)
"""Errors of requests that an engine answers with 500, as its own error, which makes clients retry."""
_TOOLS = re.compile(r"Failed to parse tools: (?:\[json\.exception\.[^\]]*\] )?(.*?)(?:; tools = |\Z)", re.DOTALL)
"""What it says of a tool that it cannot read, with all tools after it."""
_LARGER_THAN_A_BATCH = re.compile(
    r"input \((\d{1,12}) tokens\) is too large to process\. increase [^(]*\(current batch size: (\d{1,12})\)"
)
"""Embedding and reranking models have a batch as long as the context unless flags set another."""
_TOO_LONG_FOR_OTHERS = re.compile(
    r"maximum context length is (\d{1,12}) tokens(?:.{1,200}?\b(\d{1,12}) (?:input )?tokens)?", re.DOTALL
)
"""What OpenAI says of a prompt that is too long, and vLLM after it."""


_Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class _Error(msgspec.Struct):
    message: str = ""
    type: str = ""
    param: Any = None
    n_prompt_tokens: _Tokens | None = None
    n_ctx: _Tokens | None = None


class _Answer(msgspec.Struct):
    error: _Error | str | None = None
    detail: Any = None


_decode = msgspec.json.Decoder(_Answer).decode


def error_of_engine(status: int, body: bytes, tool_form: str = OF_CHATS) -> ApiError:
    """Return the error for a response of an engine with an error status. `tool_form`: how clients offer a tool."""
    try:
        said = _decode(body)
        error = said.error or _of_detail(said.detail)
    except UNREADABLE:  # some errors have no body
        error = ""
    if isinstance(error, str):
        text = error or body[:_LONGEST_WORDS].decode("utf-8", "replace").strip()
        error = _Error(text or f"The engine answers {status}, without a reason.")
    if error.type == "exceed_context_size_error" and error.n_ctx is not None:
        return ContextExceeded.of(error.n_prompt_tokens or 0, error.n_ctx)
    if (told := _LARGER_THAN_A_BATCH.search(error.message)) is not None:
        return ContextExceeded.of(int(told[1]), int(told[2]), flags="-c, and -b and -ub if they are there,")
    if (told := _TOOLS.match(error.message)) is not None:
        message = f"`tools` cannot be read: {told[1][:_LONGEST_WORDS]}. Write each as {tool_form}."
        return ApiError(400, "invalid_request", message, "tools")
    if status >= 500 and any(mistake in error.message for mistake in _MISTAKES):
        return ApiError(400, "invalid_request", error.message)
    if status == 400 and (told := _TOO_LONG_FOR_OTHERS.search(error.message)) is not None:
        return ContextExceeded.by_others(error.message, int(told[2] or 0), int(told[1]))
    kind = error.type.removesuffix("_error")
    code = kind if kind and kind != "server" and kind.islower() else _CODES.get(status, "engine_error")
    param = error.param if isinstance(error.param, str) else None
    return ApiError(status, code, error.message, param, is_final=status == 501)


def _of_detail(detail: Any) -> str:
    """Return what FastAPI, on which many engines are built, says is wrong."""
    if isinstance(detail, list):
        faults = [each for each in detail if isinstance(each, dict)]
        return "; ".join(f"{'.'.join(map(str, each.get('loc') or ()))}: {each.get('msg', '')}" for each in faults)
    return detail if isinstance(detail, str) else ""


class _Need(NamedTuple):
    said: bytes
    """Messages of the engine (tools/server/server-context.cpp and server-common.cpp, build 11434)."""
    what: str
    flag: Purpose


_NEEDS = (
    _Need(b"does not support embeddings", "embeddings", "embedding"),
    _Need(b"does not support reranking", "reranking", "rerank"),
    _Need(b"image input is not supported", "images", "mmproj"),
    _Need(b"audio input is not supported", "audio", "mmproj"),
)

_PURPOSES: Mapping[Ask, Purpose] = {"embedding": "embedding", "ranking": "rerank", "transcription": "mmproj"}
"""What llama-server is started for to answer requests other than for text."""

_WRITES_NOTHING = re.compile(rb"does not (support )?logits computation")
"""Message of the engine if an encoder such as BERT is asked for text; builds as old as 10434 omit a word."""


_TAKES_TEXT_ONLY = re.compile(rb'"message": ?"[^"]{1,200} is not a multimodal model"')
"""Message of vLLM 0.32 if a model is given an image or the like."""


def refused_by_engine(status: int, body: bytes, alias: str, models: Mapping[str, ModelConfig]) -> ApiError | None:
    """Return a more helpful error for an unsupported request; None if the engine's error is another."""
    if len(body) > _LONGEST_REFUSAL:
        return None
    able: Callable[[ModelConfig], bool]
    if status < 500:
        if _TAKES_TEXT_ONLY.search(body) is None:
            return None
        reason, nobody, able = f"{alias!r} takes text only", "No model here takes more", ModelConfig.takes_images
    elif _WRITES_NOTHING.search(body) is not None:
        reason, nobody, able = (
            f"{alias!r} is made for embeddings and writes no text",
            "No model here does",
            _writes,
        )
    else:
        need = next((need for need in _NEEDS if need.said in body), None)
        if need is None:
            return None
        reason = f"{alias!r} was not started for {need.what} (--{need.flag} in its flags)"
        nobody, able = "No model here is", partial(_is_for, purpose=need.flag)
    others = [other for other, model in models.items() if other != alias and able(model)]
    advice = f"Ask {some_of(others)} instead" if others else nobody
    return ApiError(400, "not_supported", f"{reason}. {advice}.", "model")


def _writes(model: ModelConfig) -> bool:
    return purpose_of(model) == "completion"


def purpose_of(model: ModelConfig) -> str:
    """Return the purpose that its engine is started for: `completion`, `embedding` or `rerank`."""
    return next((purpose for purpose in ("embedding", "rerank") if purpose in model.purposes), "completion")


def answers(model: ModelConfig, asks: Ask) -> bool:
    """Return whether a model's llama-server is started for a kind of request. True for other engines: what they
    answer is told by their routes."""
    if model.routes is not None:
        return True
    if asks in ("chat", "completion", "response", "count"):
        return _writes(model)
    purpose = _PURPOSES.get(asks)
    return purpose is None or _is_for(model, purpose)


def _is_for(model: ModelConfig, purpose: Purpose) -> bool:
    return purpose in model.purposes
