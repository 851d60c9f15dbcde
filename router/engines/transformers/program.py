"""Search for the program `transformers`, and for what is installed beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from router.engines import installed

_MISSING = (
    "the program `transformers` was not found: pip install 'llama-router[transformers]', put it on PATH, or set "
    "TRANSFORMERS_PATH"
)


@dataclass(frozen=True, slots=True)
class Program:
    """Installed `transformers`."""

    path: Path
    origin: str
    """Where it was found, for display."""

    @property
    def version(self) -> str:
        """Version of the library; empty if it cannot be determined. Blocking."""
        return next((self._version_of(folder) for folder in self._packages("transformers-*.dist-info")), "")

    @property
    def has_bitsandbytes(self) -> bool:
        """Whether the library that quantizes to 4 bits is installed. Blocking."""
        return any(True for _ in self._packages("bitsandbytes"))

    def _packages(self, pattern: str) -> list[Path]:
        environment = self.path.resolve().parent.parent
        return sorted(environment.glob(f"lib/python*/site-packages/{pattern}"))

    @staticmethod
    def _version_of(folder: Path) -> str:
        return folder.name.removeprefix("transformers-").removesuffix(".dist-info")


def find_program(configured: str | None) -> Program:
    """Return the program to run. Raises Unusable if the configured one is missing or none is found."""
    return Program(*installed.find("transformers", configured, _MISSING))
