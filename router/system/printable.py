"""Text from outside, such as names of files, so that whoever prints it prints no command to a terminal."""

from __future__ import annotations

LINE_SEPARATORS = (0x2028, 0x2029)
TURNS_OF_DIRECTION = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""After these, what is read is not what is there."""
_CONTROLS = (*range(9), *range(11, 32), *range(127, 160), *LINE_SEPARATORS, *TURNS_OF_DIRECTION)
_OF_TEXTS = dict.fromkeys(_CONTROLS, "·")
_OF_LINES = dict.fromkeys((*_CONTROLS, 9, 10), "·")


def printable(text: str) -> str:
    """Without what a terminal takes as a command; ends of lines stay."""
    return text if text.isprintable() else text.translate(_OF_TEXTS)


def line(text: object) -> str:
    """The same as one line."""
    shown = str(text)
    return shown if shown.isprintable() else shown.translate(_OF_LINES)
