"""Which kinds of engine run a model in Hugging Face's format here, best first: where its entry leaves that open,
and before there is an entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from router.config.schema import System
from router.engines.registry import KINDS
from router.formats import hf_model

SAFETENSORS = "safetensors"


class Order(NamedTuple):
    """Kinds that serve a model, by name."""

    best_first: list[str]
    """Those that can run here."""
    problems: Mapping[str, str]
    """Why each kind cannot run here, in the order of `KINDS`; empty for those that can."""


def order(
    names: Iterable[str], purpose: hf_model.Purpose | None, system: System, *, has_chat_template: bool
) -> Order:
    """Order those of the named kinds that serve models for a purpose; all of them, if none does. Reads the disk.

    A model without a chat template goes first to kinds that can chat with it all the same.
    """
    candidates = list(names)
    able = [name for name in candidates if purpose in KINDS[name].purposes] or candidates
    problems = {name: KINDS[name].installed(system).problem for name in able}
    found = [name for name in able if not problems[name]]
    if not has_chat_template:
        found.sort(key=lambda name: KINDS[name].needs_chat_template)
    return Order(found, problems)
