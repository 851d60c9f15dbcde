"""Which of thousands of names somebody may have meant, in a millisecond or two: other requests wait meanwhile.

A name that was mistyped in one place is right before and after that. So the one that was meant is near the wrong
one in the order of the names or of the names read backwards, and has most in common with it at both ends. Only
a few such are compared in earnest (`difflib`), at 100 µs each.
"""

from __future__ import annotations

import difflib
import heapq
from bisect import bisect
from collections.abc import Iterable
from functools import lru_cache

_NEIGHBOURS = 50
"""In each direction of each order."""
_COMPARED = 6

_Order = list[tuple[str, str]]


def near(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """The closest first; none that is not close."""
    forwards, backwards = _orders(tuple(names))
    folded = name.casefold()
    candidates = {*_neighbours(folded, forwards), *_neighbours(folded[::-1], backwards)}
    best = heapq.nlargest(
        _COMPARED, sorted(candidates), key=lambda candidate: _in_common(folded, candidate.casefold())
    )
    return difflib.get_close_matches(name, best, most)


@lru_cache(maxsize=2)
def _orders(names: tuple[str, ...]) -> tuple[_Order, _Order]:
    folded = [(name.casefold(), name) for name in names]
    return sorted(folded), sorted((key[::-1], name) for key, name in folded)


def _neighbours(key: str, order: _Order) -> list[str]:
    place = bisect(order, (key,))
    return [name for _, name in order[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS]]


def _in_common(one: str, other: str) -> int:
    """Characters at both ends."""
    return _same(one, other) + _same(one[::-1], other[::-1])


def _same(one: str, other: str) -> int:
    """Characters until they differ. By halves: to go through them one by one takes ten times as long."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[:middle] == other[:middle]:
            least = middle
        else:
            most = middle - 1
    return least
