"""Why something went wrong, said twice: in full for who runs the router, and so that everybody may hear it.

What an engine says, and what the system says of files, quotes paths, addresses and what others have asked for. All
that is decided, queued and answered goes by what everybody may hear; the rest is put in for who may read it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from router.system.printable import printable

_MOST_KEPT = 16
_UNTOLD = "it cannot be loaded, and whoever runs the router sees why"


class Reason(NamedTuple):
    full: str
    told: str
    """To everybody."""


class Problem(Exception):
    """One that is a model's, or its engine's. As a text it is the reason in full."""

    def __init__(self, full: str, told: str = _UNTOLD) -> None:
        super().__init__(full)
        self.reason = Reason(full, told)


class Reasons:
    """The last ones of each model."""

    def __init__(self) -> None:
        self._of_model: defaultdict[str, dict[str, str]] = defaultdict(dict)

    def note(self, alias: str, reason: Reason) -> None:
        kept = self._of_model[alias]
        kept.pop(reason.told, None)
        kept[reason.told] = printable(reason.full)
        if len(kept) > _MOST_KEPT:
            del kept[next(iter(kept))]

    def in_full(self, alias: str, text: str) -> str:
        """A text about this model, with the reason in full that it tells, if it tells one."""
        kept = self._of_model.get(alias, {})
        told = max((told for told in kept if told in text), key=len, default="")  # code 11 is not code 1
        return text.replace(told, kept[told], 1) if told else text
