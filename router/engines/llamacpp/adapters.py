"""LoRA adapters of a model: which its flags name, and at which scales its requests are computed.

llama-server (tools/server/server-context.cpp, build 11434) computes a request that names no scales at those of its
command line, but on the KV cache that the slot's request before it has left, at whatever scales that was computed:
one alias of a model would answer with the other's voice. A request that names scales gets a cache of its own. So
every request is made to name them.
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
    """The files of `--lora FILE,…` and `--lora-scaled FILE:SCALE,…`, which add up."""
    return [item if name == "lora" else item.partition(":")[0] for name, item in _items(flags)]


def scales(flags: Flags) -> list[dict[str, float]]:
    """The parameter of a request that is to be computed as the flags say. Raises ValueError."""
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
    """All aliases, and one for each model with adapters, of which each makes requests name the scales."""
    completed = dict(aliases)
    for model in models.values():
        with contextlib.suppress(FlagError, ValueError):  # the engine will say what is wrong
            if base := scales(Flags(model.flags, model.env)):
                own = AliasConfig(model.alias, model.alias, source=model.source)
                names = [name for name, alias in aliases.items() if alias.uses == model.alias]
                for name in dict.fromkeys((model.alias, *names)):
                    alias = aliases.get(name, own)
                    if not alias.forced.get(PARAMETER):
                        completed[name] = replace(alias, defaults={PARAMETER: base, **alias.defaults})
    return completed
