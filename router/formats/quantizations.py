"""Labels of quantizations, such as Q4_K_M: their number of bits, and the order in which they are preferred."""

from __future__ import annotations

import re

DEFAULT = "Q4_K_M"
BITS = (4, 5, 6, 8, 3, 2, 16, 32, 1)
"""Numbers of bits in order of preference."""
_KINDS = ("_K_M", "_K_XL", "_K_L", "_K_S", "_K", "_NL", "_XS", "_1", "_0")


def bits_of(label: str) -> int:
    """Return the number of bits of a label; 0 if it has none."""
    found = re.search(r"\d+", label)
    return int(found[0]) if found else 0


def closeness(label: str) -> tuple[bool, int, int, bool, str]:
    """Return a sort key: the smallest is closest to the default quantization."""
    plain = label.removeprefix("UD-")
    bits = bits_of(label)
    rank = BITS.index(bits) if bits in BITS else len(BITS)
    kind = next((index for index, ending in enumerate(_KINDS) if plain.endswith(ending)), len(_KINDS))
    return plain != DEFAULT, rank, kind, label != plain, plain
