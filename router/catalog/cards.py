"""Model cards: descriptions of models that are not loaded, from file headers and engine flags.

A disk that hangs delays no list for long: its models keep their previous cards, or get cards with only what is
configured.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from router.config.resolved import ModelConfig
from router.engines.base import Facts
from router.engines.registry import kind_of
from router.system.readings import begun

Card = dict[str, Any]

_MOST_KNOWN = 10_000
_FRESH_SEC = 1.0
"""Age up to which a card is not read again: each read starts a thread, and its list takes several turns of the
event loop."""


class Cards:
    """Read and cache model cards. A folder whose disk hangs is not read again until the pending read has ended."""

    def __init__(self, look_sec: float = 2, silent_sec: float = 10) -> None:
        """Set the time limits: a list waits `look_sec` for one disk and twice as long for several.

        A disk that does not respond for `silent_sec` is considered hanging, not spinning up.
        """
        self._look_sec = look_sec
        self._silent_sec = silent_sec
        self._known: dict[ModelConfig, tuple[float, Card]] = {}
        """The last card of each model, and when it was read."""
        self._waiting: dict[Path, _Look] = {}

    async def of(self, models: Iterable[ModelConfig], within_sec: float = _FRESH_SEC) -> dict[str, Card]:
        """Return the cards of the models by alias, within the time limits. Cards may be `within_sec` old."""
        models = list({model.alias: model for model in models}.values())
        now = time.monotonic()
        known = {model.alias: self._known.get(model) or (-math.inf, _configured(model)) for model in models}
        left = [model for model in models if now - known[model.alias][0] > within_sec]
        until_sec = now + 2 * self._look_sec
        while left := [model for model in left if self._look_at(model.model_path.parent) is None]:
            look = _Look(left, known)
            left_sec = until_sec - time.monotonic()
            await asyncio.wait({look.outcome}, timeout=max(0.0, min(self._look_sec, left_sec)))
            if look.outcome.done():
                look.outcome.result()
                break
            at = look.at
            self._waiting[at.model_path.parent] = look
            left = left[left.index(at) :]
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        self._known.update((model, known[model.alias]) for model in models)
        return {alias: dict(card) for alias, (_, card) in known.items()}

    async def answers(self, model: ModelConfig) -> bool:
        """Whether the disk of the model's file responds. Waits for a disk that has to spin up."""
        await self.of([model], within_sec=0)
        folder = model.model_path.parent
        while (look := self._look_at(folder)) is not None:
            silent_sec = time.monotonic() - look.since_sec
            if silent_sec < self._look_sec / 2 or look.at.model_path.parent != folder:
                return True  # the read has moved on to other models
            if silent_sec >= self._silent_sec:
                return False
            await asyncio.wait({look.outcome}, timeout=self._silent_sec - silent_sec)
        return True

    def _look_at(self, folder: Path) -> _Look | None:
        """Return the pending read that this folder blocks, if there is one."""
        look = self._waiting.get(folder)
        if look is not None and look.outcome.done():
            del self._waiting[folder]
            return None
        return look


class _Look:
    """A read of several models' files in a thread, one after the other; `at` is the current one."""

    def __init__(self, models: list[ModelConfig], known: dict[str, tuple[float, Card]]) -> None:
        self.at = models[0]
        self.since_sec = time.monotonic()
        self._models = models
        self._known = known
        self.outcome = begun(self._take)

    def _take(self) -> None:
        for model in self._models:
            self.at, self.since_sec = model, time.monotonic()
            self._known[model.alias] = self.since_sec, card_of(model)


def card_of(model: ModelConfig) -> Card:
    """Return the card of a model. Reads the header of its file, so it may block."""
    card = _configured(model)
    try:
        card["created"] = int(model.model_path.stat().st_mtime)
        card |= kind_of(model).described(model)
        card["architecture"] = _modalities(card["capabilities"])
    except Exception:  # what is wrong with its file or flags is reported when it is loaded
        return card
    return card


def as_it_runs(card: Card, facts: Facts | None) -> Card:
    """Return the card completed with what the model's running engine reports, if there is one."""
    if facts is None:
        return card
    card = dict(card)
    if context := facts.context:
        card["n_ctx"] = card["context_length"] = context
        card["meta"] = {**card.get("meta", {}), "n_ctx": context}
    if "capabilities" in card:
        card["capabilities"] = [each for each in card["capabilities"] if facts.modalities.get(each, True)]
        card["architecture"] = _modalities(card["capabilities"])
    return card


def _configured(model: ModelConfig) -> Card:
    card: Card = {"id": model.alias, "object": "model", "created": 0, "owned_by": "llama-router"}
    card["source"] = model.source
    card["architecture"] = _modalities(())
    if model.description:
        card["description"] = model.description
    return card


def _modalities(capabilities: Collection[str]) -> dict[str, list[str]]:
    """Return input and output modalities in the format of llama-server's model list."""
    senses = {"vision": "image", "audio": "audio", "transcription": "audio"}
    inputs = ["text", *(kind for sense, kind in senses.items() if sense in capabilities)]
    makes = {"speech": "audio", "image": "image"}
    outputs = [kind for made, kind in makes.items() if made in capabilities]
    return {"input_modalities": inputs, "output_modalities": outputs or ["text"]}
