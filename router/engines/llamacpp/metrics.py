"""llama-server's own metrics, exported under their own names, for engines started with `--metrics`.

Lines that are not samples of llama.cpp are left out, so that no engine can spoil a scrape.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Iterable
from functools import lru_cache

from router.config.resolved import ModelConfig
from router.engines.llamacpp.flags import Flags
from router.observe.prometheus import Gauges, label_text

_HEAD = re.compile(r'# (HELP|TYPE) (llamacpp:\w+) ([^"\\]+)')
_NO_SUM = re.compile("_max$|_ratio$|_per_")
_SAMPLE = re.compile(r'(llamacpp:\w+)(?:\{((?:(?!model=)\w+="[^"\\]*",?)+)\})? ([-+.\w]+)')


def are_told(model: ModelConfig) -> bool:
    """Return whether a model's engine is started with `--metrics`."""
    return _wants_metrics(tuple(model.flags), tuple(sorted(model.env.items())))


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
