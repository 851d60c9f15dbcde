"""`ConfigError` with the problems of a configuration and their places, and `CannotServe`.

Most of the messages come from `errors.py`. This module imports nothing of the router, so that commands can catch
these errors without importing the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in a configuration: its key, what is wrong and what to do about it, and where it was written."""

    path: str
    message: str
    source: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.path, self.message) if part)


class ConfigError(Exception):
    """Raised when the configuration cannot be used. Holds all problems found, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class CannotServe(Exception):
    """Raised when the configuration is valid but cannot be served on this machine; the message is a sentence."""


def dotted(path: Sequence[str | int]) -> str:
    """Format a path for people: `("models", "qwen", "flags", 3)` as `models.qwen.flags[3]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
