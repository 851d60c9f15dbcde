"""Checks of the files and folders that a configuration names."""

from __future__ import annotations

import os
from pathlib import Path


def wrong_with_anything(file: Path) -> str:
    """Return why a file or folder cannot be read; empty if it can. Raises OSError."""
    if not file.exists():
        return f"there is no {file}" + (f": {why}" if (why := not_a_path(file)) else "")
    return "" if os.access(file, os.R_OK) else f"{file} cannot be read: permission denied"


def wrong_with_program(file: Path) -> str:
    """Return why a program cannot be run; empty if it can. Raises OSError."""
    if not file.is_file():
        return f"there is no file {file}"
    return "" if os.access(file, os.X_OK) else f"{file} is not executable"


def not_a_path(file: Path) -> str:
    """Return why a path leads nowhere if it seems to be a URL or to need expansion; else empty."""
    text = str(file)
    if "/hf.co/" in text or "/https:/" in text or "/http:/" in text:
        return "to download a model, use `llama-router pull hf.co/USER/REPO:QUANT`"
    return "variables are not expanded in paths" if "$" in text else ""
