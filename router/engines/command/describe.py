"""What is known of a command's model without loading it: what its routes are for, and how large its file is."""

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
"""Those that clients know from other models, and what else there is."""


def described(model: ModelConfig) -> dict[str, Any]:
    """Raises OSError."""
    asks = {ROUTES[route].asks for route in model.routes or ()}
    capabilities = list(dict.fromkeys(each for ask, each in _CAPABILITIES.items() if ask in asks))
    size = {"size": model.model_path.stat().st_size} if model.files else {}
    return {"capabilities": capabilities, **size}
