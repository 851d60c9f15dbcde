"""Models of llama-server and the embedded engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from router.config.resolved import DEFAULT_ENGINE, ModelConfig


@dataclass(frozen=True, slots=True)
class LlamaCppModel(ModelConfig):
    """Resolved configuration of a GGUF model; see `ModelEntry`."""

    engine: ClassVar[str] = DEFAULT_ENGINE
    derived: ClassVar[frozenset[str]] = frozenset(
        {"alias", "source", "chosen_because", "files", "slots", "routes", "known_as"}
        | {"projector_was_found", "purposes", "most_tokens"}
    )
    footprint_mb: int | None = None
    """MiB of its GPUs together, or of RAM on a machine without GPUs. None: estimated."""
    projector_was_found: bool = False
    """True if the projector was found beside the model, not named in its flags; it may prove unusable."""
