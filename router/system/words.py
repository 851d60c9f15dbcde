"""Base class of string enumerations."""

from __future__ import annotations

from enum import Enum


class Word(str, Enum):
    """An enumeration whose members are strings: in texts, as labels, as keys and in JSON.

    Like `enum.StrEnum`, which Python 3.10 does not have.
    """

    def __str__(self) -> str:
        return str.__str__(self)

    def __format__(self, spec: str) -> str:
        return str.__format__(self, spec)
