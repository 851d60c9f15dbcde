"""Reasons for failures, in two forms: complete for operators, and safe to show to every client.

Engine output and errors of the operating system quote paths, addresses and other clients' requests. Decisions,
queues and responses use the safe form; the complete one is inserted for readers with full access.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from router.system.printable import printable

_MOST_KEPT = 16
_UNTOLD = "it cannot be loaded; the operator of the router can see why"


class Reason(NamedTuple):
    """A reason in both forms."""

    full: str
    told: str
    """The form that every client may see."""


class Problem(Exception):
    """Raised for a problem of a model or its engine. Its text is the complete reason."""

    def __init__(self, full: str, told: str = _UNTOLD) -> None:
        super().__init__(full)
        self.reason = Reason(full, told)


class Reasons:
    """The latest reasons of each model."""

    def __init__(self) -> None:
        self._of_model: defaultdict[str, dict[str, str]] = defaultdict(dict)

    def note(self, alias: str, reason: Reason) -> None:
        kept = self._of_model[alias]
        kept.pop(reason.told, None)
        kept[reason.told] = printable(reason.full)
        if len(kept) > _MOST_KEPT:
            del kept[next(iter(kept))]

    def in_full(self, alias: str, text: str) -> str:
        """Return a text about a model, with the safe reason in it, if any, replaced by the complete one.

        A text that has the complete one already stays as it is.
        """
        kept = self._of_model.get(alias, {})
        told = max((told for told in kept if told in text), key=len, default="")  # code 11 is not code 1
        return text.replace(told, kept[told], 1) if told and kept[told] not in text else text
