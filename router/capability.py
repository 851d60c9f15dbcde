"""What an engine refuses because its model was not started for it, and which models are.

The engine decides: the router neither looks into bodies for images nor knows better which routes a build serves.
It only answers better, as it knows the other models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from router.api.errors import ApiError
from router.config import ModelConfig
from router.flags import Flags
from router.routing import some_of

_LONGEST_REFUSAL = 1000


class _Need(NamedTuple):
    said: bytes
    """The engine's words (tools/server/server-context.cpp and server-common.cpp, build 11434)."""
    what: str
    flag: str


_NEEDS = (
    _Need(b"does not support embeddings", "embeddings", "embedding"),
    _Need(b"does not support reranking", "reranking", "rerank"),
    _Need(b"image input is not supported", "images", "mmproj"),
    _Need(b"audio input is not supported", "audio", "mmproj"),
)

_WRITES_NOTHING = b"does not support logits computation"
"""What the engine says when an encoder such as BERT is asked for text."""


def refused_by_engine(body: bytes, alias: str, models: Mapping[str, ModelConfig]) -> ApiError | None:
    """An engine's error as one that says what helps; None if it is about something else."""
    if len(body) > _LONGEST_REFUSAL:
        return None
    able: Callable[[ModelConfig], bool]
    if _WRITES_NOTHING in body:
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
        nobody, able = "No model here is", partial(_has, flag=need.flag)
    others = [other for other, model in models.items() if other != alias and able(model)]
    advice = f"Ask {some_of(others)} instead" if others else nobody
    return ApiError(400, "not_supported", f"{reason}. {advice}.", "model")


def _writes(model: ModelConfig) -> bool:
    return not _has(model, "embedding") and not _has(model, "rerank")


def _has(model: ModelConfig, flag: str) -> bool:
    flags = Flags(model.flags, model.env)
    if flag == "mmproj":
        return flags.last(flag) is not None
    if flag == "embedding" and flags.switch("rerank", False):
        return False
    return flags.switch(flag, False)
