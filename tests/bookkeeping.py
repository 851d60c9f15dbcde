"""Counts of the objects that a running router holds, taken by `observer/`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
from conftest import ROOT, Router, eventually

OBSERVER = Path(__file__).parent / "observer"


def observed(folder: Path) -> dict[str, str]:
    """Return the environment of a router whose objects `books` can count."""
    return {"PYTHONPATH": f"{OBSERVER}{os.pathsep}{ROOT}", "OBSERVATION": str(folder / "observation.json")}


def books(router: Router, folder: Path) -> dict[str, int]:
    """Return how many descriptors, processes, tasks, and objects of requests and connections the router holds."""
    observation = folder / "observation.json"
    observation.unlink(missing_ok=True)
    router.process.send_signal(signal.SIGUSR1)
    eventually(observation.exists)
    counts: dict[str, int] = json.loads(observation.read_text())
    process = psutil.Process(router.process.pid)
    return {**counts, "descriptors": process.num_fds(), "processes": len(process.children(recursive=True))}
