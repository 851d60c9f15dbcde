"""Where a model or an alias comes from that nobody has written into a configuration file."""

from __future__ import annotations

from router.system.words import Word


class Source(Word):
    PULLED = "pulled"
    CREATED = "created"
    """By a client, as Ollama's do."""
    ON_COMMAND_LINE = "--models-dir"
    MODELS_DIRS = "models_dirs"
    HF_CACHE = "hf_cache"
    OLLAMA_STORE = "ollama_store"


FOUND = frozenset(Source) - {Source.CREATED}
"""Files, with their projectors."""
