"""vLLM's own metrics under the router's names: requests that it runs, those that wait in it, and its KV cache."""

from __future__ import annotations

import re
from collections.abc import Iterable

from router.observe.prometheus import Gauges

_FAMILIES = {
    "num_requests_running": (
        "router_engine_requests_running",
        "Requests that an engine computes, by its own count",
    ),
    "num_requests_waiting": (
        "router_engine_requests_waiting",
        "Requests that wait in an engine for room in its KV cache, by its own count",
    ),
    "kv_cache_usage_perc": ("router_engine_kv_cache_usage_ratio", "Part of an engine's KV cache that is in use"),
}
_SAMPLE = re.compile(rf"^vllm:({'|'.join(_FAMILIES)})(?:{{[^}}\n]*}})? ([-+.\w]+)$", re.MULTILINE)


def families(texts: Iterable[tuple[str, str]]) -> list[Gauges]:
    """Return the families for the texts of engines, each given with the alias of its model.

    Counts of several engines of a model are added, and those of one with several cores; the fullest cache counts.
    """
    figures: dict[str, dict[str, float]] = {name: {} for name in _FAMILIES}
    for alias, text in texts:
        for name, figure in _SAMPLE.findall(text):
            try:
                value = float(figure)
            except ValueError:
                continue
            known = figures[name]
            both = (known.get(alias, 0.0), value)
            known[alias] = max(both) if name == "kv_cache_usage_perc" else sum(both)
    found = []
    for name, (ours, words) in _FAMILIES.items():
        gauges = Gauges(ours, words, "model")
        for alias, value in figures[name].items():
            gauges.set(value, alias)
        found.append(gauges)
    return found
