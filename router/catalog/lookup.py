"""Resolves the model names in requests; the errors for unknown names suggest what to do."""

from __future__ import annotations

import os
import shlex

from router.catalog.near_names import near
from router.config.names import LONGEST, meant, some_of
from router.config.resolved import Config, ModelConfig
from router.http.errors import ApiError
from router.scheduling.messages import Refusal
from router.store.repository import BadReference, NotAllowed, permitted


def check_name(name: str) -> None:
    """Check the length of a model name before it is looked up. Raises ApiError 400."""
    if len(name) > LONGEST:
        message = f"The name of a model has at most {LONGEST} characters; the one given begins with {name[:40]!r}."
        raise ApiError(400, "invalid_model", message, "model")


def named_by_nobody(config: Config) -> str:
    """Return the name to use for a request that specifies no model. Raises ApiError 400."""
    if config.default_model is None:
        raise ApiError(400, "model_required", f"Specify a `model`: {some_of(config.names)}.", "model")
    return config.default_model


def model_of(name: str, config: Config) -> ModelConfig:
    """Return the model that a client's name refers to. Raises ApiError 404, which names the available models."""
    return config.model_of(known_as(name, config))


def known_as(name: str, config: Config) -> str:
    """Return the configured model or alias that a client's name refers to.

    Raises ApiError 404, which names the available models, and 400.
    """
    check_name(name)
    known = meant(name, config)
    if known is None:
        raise ApiError(404, Refusal.MODEL_NOT_FOUND.value, _unknown_model(name, config), "model")
    return known


def _unknown_model(name: str, config: Config) -> str:
    """Describe an unknown model in the words that Ollama's clients look for, with advice."""
    if (lost := meant(name, config.lost)) is not None:
        advice = f"That name refers to {config.lost[lost]!r}, which no longer exists."
    elif not config.names:
        advice = "No models yet: pull one, or add models to a folder that is served."
    elif close := near(name, config.names):
        advice = f"Did you mean {some_of(close)}?"
    else:
        advice = f"Available models: {some_of(config.names)}."
    return f"model {name!r} not found. {advice}{_how_to_pull(name, config)}"


def _how_to_pull(name: str, config: Config) -> str:
    """Say how to pull a name that could be a repository on the hub; the hub is not queried."""
    try:
        permitted(name, config.system.allowed_models, os.environ)
    except (BadReference, NotAllowed):
        return ""
    command = shlex.join(["llama-router", "pull", *(["--"] if name.startswith("-") else []), name])
    return f" To pull it from the Hugging Face hub: POST /pull, or `{command}`."
