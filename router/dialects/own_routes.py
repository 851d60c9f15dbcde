"""Models whose engines have a route themselves, for requests that a translation has no place for."""

from __future__ import annotations

from collections.abc import Callable

from router.config.resolved import ModelConfig
from router.engines.registry import kind_of


def has_own(path: str) -> Callable[[ModelConfig], bool]:
    """Return a function that tells whether a model's server has a route at this path, and may take more there.

    llama-server, vLLM and Transformers, which load files of a known format, take no more than translations do.
    """
    return lambda model: not kind_of(model).file_format and path in (model.routes or ())
