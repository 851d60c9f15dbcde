"""A look into a router's bookkeeping, while it runs: see `observer/`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
from conftest import ROOT, Router, eventually

OBSERVER = Path(__file__).parent / "observer"


def observed(folder: Path) -> dict[str, str]:
    """Environment of a router that can be looked into with `books`."""
    return {"PYTHONPATH": f"{OBSERVER}{os.pathsep}{ROOT}", "OBSERVATION": str(folder / "observation.json")}


def books(router: Router, folder: Path) -> dict[str, int]:
    """What the router holds on to now: descriptors, engines, tasks, and its objects per request and connection."""
    observation = folder / "observation.json"
    observation.unlink(missing_ok=True)
    router.process.send_signal(signal.SIGUSR1)
    eventually(observation.exists)
    counts: dict[str, int] = json.loads(observation.read_text())
    process = psutil.Process(router.process.pid)
    return {**counts, "descriptors": process.num_fds(), "processes": len(process.children(recursive=True))}
