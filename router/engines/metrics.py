"""Metrics of engines themselves, exported at `/metrics` with the model's alias, as far as their kinds have any.

Ready engines are asked concurrently, with a short timeout. An engine that is computing a batch answers after it;
if that is too late, its previous values are used while it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from router.config.resolved import Config, ModelConfig
from router.engines.kind import EngineTexts
from router.engines.questions import document
from router.engines.registry import KINDS
from router.engines.running import RunningEngine
from router.observe.prometheus import Gauges


class EngineMetrics:
    def __init__(self, running: Callable[[], Mapping[int, RunningEngine]], config: Callable[[], Config]) -> None:
        self._running = running
        self._config = config
        self._said: dict[int, str] = {}

    async def read(self, limit_sec: float) -> None:
        """Ask the engines, for at most `limit_sec` seconds."""
        tell = [running for running in self._running().values() if self._tells(running)]
        self._said = {running.id: self._said[running.id] for running in tell if running.id in self._said}
        await asyncio.gather(*(self._ask(running, limit_sec) for running in tell))

    def families(self) -> list[Gauges]:
        """Return the metrics of all engines, each family once."""
        running, models = self._running(), self._config().models
        said = [
            (models.get(running[number].alias), text) for number, text in self._said.items() if number in running
        ]
        return [
            family
            for name, kind in KINDS.items()
            if kind.metrics is not None
            for family in kind.metrics.families(
                (model.alias, text) for model, text in said if model is not None and model.engine == name
            )
        ]

    def _tells(self, running: RunningEngine) -> bool:
        model = self._config().models.get(running.alias)
        if model is None or running.ready_sec is None:
            return False
        texts = _texts_of(model)
        return texts is not None and texts.are_told(model)

    async def _ask(self, running: RunningEngine, limit_sec: float) -> None:
        answer = await document(running.handle.endpoint, "/metrics", limit_sec)
        if answer is not None and answer.status == 200:
            self._said[running.id] = answer.body.decode(errors="replace")


def _texts_of(model: ModelConfig) -> EngineTexts | None:
    return KINDS[model.engine].metrics
