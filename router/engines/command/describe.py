"""Description of a command's model without loading it: its capabilities, by its routes, and the size of its
file."""

from __future__ import annotations

from typing import Any

from router.config.resolved import ModelConfig
from router.http.routes import ROUTES, Ask

_CAPABILITIES: dict[Ask, str] = {
    "chat": "completion",
    "completion": "completion",
    "response": "completion",
    "embedding": "embedding",
    "ranking": "rerank",
    "transcription": "transcription",
    "speech": "speech",
    "image": "image",
}
"""Capabilities by kind of request: those that other models have, and further ones."""


def described(model: ModelConfig) -> dict[str, Any]:
    """Return capabilities and size. Raises OSError."""
    asks = {ROUTES[route].asks for route in model.routes or ()}
    capabilities = list(dict.fromkeys(each for ask, each in _CAPABILITIES.items() if ask in asks))
    size = {"size": model.model_path.stat().st_size} if model.files else {}
    return {"capabilities": capabilities, **size}
