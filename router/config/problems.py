"""`ConfigError`, and what it holds: the problems of a configuration, with their places; and `CannotServe`.

The words for most of them are in `errors.py`. Here nothing is imported, so that a command which may meet one
need not know what a configuration is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where it was written, which key it is, and what to do about it."""

    path: str
    message: str
    source: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.path, self.message) if part)


class ConfigError(Exception):
    """The configuration can't be used. Holds every problem found, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class CannotServe(Exception):
    """The configuration is right, but the router can't serve it here. The message is one clear sentence."""


def dotted(path: Sequence[str | int]) -> str:
    """`("models", "qwen", "flags", 3)` as people write it: `models.qwen.flags[3]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
