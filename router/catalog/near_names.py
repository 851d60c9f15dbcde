"""Finds the closest of thousands of names within a millisecond or two, as other requests wait meanwhile.

A name mistyped in one place is correct before and after it. So the intended name is near the mistyped one in the
sorted names or in the sorted reversed names, and shares the most characters with it at both ends. Only a few such
candidates are compared by `difflib`, which takes 100 µs each.
"""

from __future__ import annotations

import difflib
import heapq
from bisect import bisect
from collections.abc import Iterable
from functools import lru_cache

_NEIGHBOURS = 50
"""Names considered in each direction of each order."""
_COMPARED = 6

_Order = list[tuple[str, str]]


def near(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Return up to `most` close names, the closest first."""
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
    """Count the characters that two names share at both ends."""
    return _same(one, other) + _same(one[::-1], other[::-1])


def _same(one: str, other: str) -> int:
    """Count the leading characters that two names share, by bisection: a loop takes ten times as long."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[:middle] == other[:middle]:
            least = middle
        else:
            most = middle - 1
    return least
