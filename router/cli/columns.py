"""Formats the status of a router for the terminal: columns, durations, memory, sizes."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from router.system.printable import line


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print left-aligned columns; only cells of the last may contain spaces, so that awk can split lines."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print(row_of(row, widths))


def row_of(row: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line of columns, of which the last has no width."""
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
    return line("  ".join([*cells, row[-1]]).rstrip())


def print_section(heading: str, facts: Sequence[tuple[str, str]]) -> None:
    """Print facts with their names, beneath a heading; nothing if all are empty."""
    known = [(name, text) for name, text in facts if text]
    if not known:
        return
    print(heading)
    width = max(len(name) + 2 if name else 0 for name, _ in known)
    for name, text in known:
        for number, shown in enumerate(text.splitlines()):
            print(line(f"  {'' if number else name:<{width}}{shown}"))
    print()


def print_json(document: Any) -> None:
    """Print a document for programs; characters that a terminal would interpret are escaped."""
    print(json.dumps(document, indent=2))


def _seconds_between(earlier: str, later: str) -> float:
    """Return the seconds between two of the router's timestamps, independent of the local clock."""
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def duration(sec: float) -> str:
    """Format a duration with at most two units: `0.4s`, `12s`, `3m05s`, `2h10m`, `4d03h`."""
    if sec < 9.95:
        return f"{sec:.1f}s"
    whole = round(sec)
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part_size:02d}{part}"
    return f"{whole}s"


def memory(mib: float) -> str:
    """Format an amount of memory."""
    return f"{mib / 1024:.1f}GiB" if mib >= 1024 else f"{mib:.0f}MiB"


def size_text(count: float) -> str:
    """Format a size in bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def model_row(model: dict[str, Any]) -> tuple[str, ...]:
    """Return the columns of one model: alias, state, pid, port, memory, slots, queue, up, unloads in."""
    resident = model["started_at"] is not None
    return (
        model["alias"],
        _state_text(model),
        str(model["pid"] or "-"),
        str(model["port"] or "-"),
        memory(model["vram_used_mb"]) if resident else "-",
        f"{model['in_flight']}/{model['slots']}",
        str(model["waiting"]),
        duration(_seconds_between(model["started_at"], model["updated_at"])) if resident else "-",
        _unload_text(model),
    )


def _state_text(model: dict[str, Any]) -> str:
    """Return the state of a model, with the progress of a load if the engine reports it."""
    percent = model["load_progress"] if model["status"] == "loading" else 0
    return f"loading({percent}%)" if percent else str(model["status"])


def _unload_text(model: dict[str, Any]) -> str:
    """Return the time until an idle model is unloaded, or why it is not."""
    if model["unload_at"] is not None:
        return duration(max(0.0, _seconds_between(model["updated_at"], model["unload_at"])))
    if model["status"] != "ready":
        return "-"
    if model["pinned"]:
        return "pinned"
    return "busy" if model["in_flight"] or model["slotless"] or model["waiting"] else "kept"


class Ticker:
    """Tells on standard error what is going on: on a terminal in one line that is redrawn, else now and then."""

    _FIRST_SEC, _EVERY_SEC = 1.0, 10.0

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._drawn = False
        self._next_sec = time.monotonic() + self._FIRST_SEC

    def __enter__(self) -> Ticker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __call__(self, text: str) -> None:
        if self._terminal:
            shown = line(text)[: shutil.get_terminal_size().columns - 1]
            print(f"\r{shown}\x1b[K", end="", file=sys.stderr, flush=True)
            self._drawn = True
        elif text and time.monotonic() >= self._next_sec:
            self._next_sec = time.monotonic() + self._EVERY_SEC
            print(line(text), file=sys.stderr, flush=True)
