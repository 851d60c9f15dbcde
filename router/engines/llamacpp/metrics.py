"""llama-server's own metrics, exported at `/metrics` with the model's alias, for engines started with `--metrics`.

Ready engines are asked concurrently, with a short timeout. An engine that is computing a batch answers after it;
if that is too late, its previous values are used while it runs. Lines that are not samples of llama.cpp
are left out, so that no engine can spoil a scrape.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from router.config.resolved import Config
from router.engines.llamacpp.flags import Flags
from router.engines.questions import document
from router.engines.running import RunningEngine
from router.observe.prometheus import Gauges, label_text

_HEAD = re.compile(r'# (HELP|TYPE) (llamacpp:\w+) ([^"\\]+)')
_NO_SUM = re.compile("_max$|_ratio$|_per_")
_SAMPLE = re.compile(r'(llamacpp:\w+)(?:\{((?:(?!model=)\w+="[^"\\]*",?)+)\})? ([-+.\w]+)')


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
        running = self._running()
        return relayed((running[number].alias, text) for number, text in self._said.items() if number in running)

    def _tells(self, running: RunningEngine) -> bool:
        model = self._config().models.get(running.alias)
        if model is None or running.ready_sec is None:
            return False
        return _wants_metrics(tuple(model.flags), tuple(sorted(model.env.items())))

    async def _ask(self, running: RunningEngine, limit_sec: float) -> None:
        answer = await document(running.handle.endpoint, "/metrics", limit_sec)
        if answer is not None and answer.status == 200:
            self._said[running.id] = answer.body.decode(errors="replace")


@lru_cache(maxsize=1024)
def _wants_metrics(flags: tuple[str, ...], env: tuple[tuple[str, str], ...]) -> bool:
    return Flags(flags, dict(env)).switch("metrics", False)


def relayed(texts: Iterable[tuple[str, str]]) -> list[Gauges]:
    """Combine the texts of engines, each with its alias, into families with the alias as first label. Values of
    several engines of a model are added; of means, shares and maxima the largest is used."""
    families: dict[str, Gauges] = {}
    figures: dict[str, dict[str, float]] = {}
    for alias, text in texts:
        label = label_text(("model",), (alias,))
        own: dict[tuple[str, str], float] = {}
        for line in text.splitlines():
            if (told := _HEAD.fullmatch(line)) is not None:
                what, name, words = told.groups()
                family = families.setdefault(name, Gauges(name, "", "model"))
                if what == "HELP":
                    family.help = words
                elif words == "counter" and name.endswith("_total"):  # `n_tokens_max` is none, by any format
                    family.kind = words
            elif (sample := _SAMPLE.fullmatch(line)) is not None and sample[1] in families:
                labels = f"{label},{sample[2]}" if sample[2] else label
                with contextlib.suppress(ValueError):
                    own[sample[1], labels] = float(sample[3])
        for (name, labels), figure in own.items():
            known, add = figures.setdefault(name, {}), max if _NO_SUM.search(name) else operator.add
            known[labels] = add(known[labels], figure) if labels in known else figure
    for name, known in figures.items():
        families[name].lines(known.items())
    return list(families.values())
