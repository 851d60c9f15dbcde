"""Search for the program of an engine that is a Python package: configured, on PATH, or beside the router."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from router.memory.plan import Unusable


def find(name: str, configured: str | None, missing: str) -> tuple[Path, str]:
    """Return the absolute path of a program and where it was found, for display. Blocking.

    `configured` is the value of `system.NAME_path`. Raises Unusable if that program is missing, or, with
    `missing`, if there is none anywhere.
    """
    if configured is not None:
        path = shutil.which(configured)
        if path is None:
            reason = f"{name}_path: there is no program {configured}, or it is not executable"
            raise Unusable(reason, f"the program `{name}` is missing")
        return Path(path).absolute(), "configured"
    if on_path := shutil.which(name):
        return Path(on_path).absolute(), "on PATH"
    beside = Path(sys.executable).with_name(name)
    if shutil.which(beside):
        return beside, "from the router's environment"
    raise Unusable(missing, missing)
