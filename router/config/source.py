"""Sources of models and aliases that are not written in a configuration file."""

from __future__ import annotations

from router.system.words import Word


class Source(Word):
    """Where a model or an alias comes from."""

    PULLED = "pulled"
    CREATED = "created"
    """Created by a client, as Ollama's clients do."""
    ON_COMMAND_LINE = "--models-dir"
    MODELS_DIRS = "models_dirs"
    HF_CACHE = "hf_cache"
    OLLAMA_STORE = "ollama_store"


FOUND = frozenset(Source) - {Source.CREATED}
"""Sources whose models are discovered files, together with their projectors."""
