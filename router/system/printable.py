"""Makes external text, such as file names, safe to print: without control sequences for terminals."""

from __future__ import annotations

LINE_SEPARATORS = (0x2028, 0x2029)
TURNS_OF_DIRECTION = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Characters that change the direction of text, so that it reads differently from what it is."""
_CONTROLS = (*range(9), *range(11, 32), *range(127, 160), *LINE_SEPARATORS, *TURNS_OF_DIRECTION)
_OF_TEXTS = dict.fromkeys(_CONTROLS, "·")
_OF_LINES = dict.fromkeys((*_CONTROLS, 9, 10), "·")


def printable(text: str) -> str:
    """Replace control characters that a terminal would interpret; line breaks and tabs are kept."""
    return text if text.isprintable() else text.translate(_OF_TEXTS)


def line(text: object) -> str:
    """Return text as one printable line; line breaks and tabs are replaced as well."""
    shown = str(text)
    return shown if shown.isprintable() else shown.translate(_OF_LINES)
