"""LoRA adapters of a model: the files named in its flags, and the scales of its requests.

llama-server (tools/server/server-context.cpp, build 11434) computes a request without scales at those of its
command line, but reuses the KV cache of the slot's previous request, whatever its scales: one alias of a model
would answer in the style of another. A request with scales does not share the cache of other scales. The router
therefore adds scales to every request.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Mapping
from dataclasses import replace

from router.config.resolved import AliasConfig, ModelConfig
from router.engines.llamacpp.flags import FlagError, Flags

PARAMETER = "lora"
_FLAGS = ("lora", "lora-scaled")


def files(flags: Flags) -> list[str]:
    """Return the files of `--lora FILE,…` and `--lora-scaled FILE:SCALE,…`, which add up."""
    return [item if name == "lora" else item.partition(":")[0] for name, item in _items(flags)]


def scales(flags: Flags) -> list[dict[str, float]]:
    """Return the request parameter with the scales of the flags. Raises ValueError."""
    unapplied = flags.switch("lora-init-without-apply", False)
    return [
        {"id": number, "scale": 0.0 if unapplied else 1.0 if name == "lora" else float(item.partition(":")[2])}
        for number, (name, item) in enumerate(_items(flags))
    ]


def _items(flags: Flags) -> Iterator[tuple[str, str]]:
    for flag in flags.given:
        if flag.name in _FLAGS:
            for item in next(csv.reader([flag.text]), []):
                yield flag.name, item


def named(aliases: Mapping[str, AliasConfig], models: Mapping[str, ModelConfig]) -> dict[str, AliasConfig]:
    """Return the aliases, plus one for each model with adapters, with the scales as defaults of their requests."""
    completed = dict(aliases)
    for model in models.values():
        with contextlib.suppress(FlagError, ValueError):  # the engine will report it
            if base := scales(Flags(model.flags, model.env)):
                own = AliasConfig(model.alias, model.alias, source=model.source)
                names = [name for name, alias in aliases.items() if alias.uses == model.alias]
                for name in dict.fromkeys((model.alias, *names)):
                    alias = aliases.get(name, own)
                    if not alias.forced.get(PARAMETER):
                        completed[name] = replace(alias, defaults={PARAMETER: base, **alias.defaults})
    return completed
