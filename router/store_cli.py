"""`llama-router pull` and `llama-router rm`: models from the Hugging Face hub, and away again.

Both work on the cache themselves, whether a router runs or not; one that does notices by the files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time

import msgspec

from router import pulled
from router.progress import MemoryNote, Progress

_LINE_EVERY_SEC = 10.0
"""Where the line can't be drawn again: in a log."""


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pull = commands.add_parser(
        "pull",
        help="download a model from the Hugging Face hub",
        description="Download a model into the Hugging Face cache (HF_HOME), to be served from now on. A download "
        "that was broken off goes on where it was. HF_TOKEN opens gated and private repositories.",
    )
    pull.add_argument(
        "model",
        metavar="MODEL",
        help="hf.co/USER/REPO[:QUANT], or hf.co/USER/REPO/FILE.gguf; without QUANT Q4_K_M, or what comes closest",
    )
    pull.add_argument("--alias", metavar="NAME", help="serve it under this name instead of USER/REPO:QUANT")
    pull.add_argument("--json", action="store_true", help="print progress as JSON, a line each")
    pull.set_defaults(run=_pull)

    remove = commands.add_parser(
        "rm",
        help="remove a pulled model",
        description="Remove a pulled model, also one of which only a part has come. Files that were in the cache "
        "before, or that another pulled model needs, stay.",
    )
    remove.add_argument("alias", metavar="ALIAS")
    remove.set_defaults(run=_remove)


def _pull(options: argparse.Namespace) -> None:
    """Exits with 1 if it failed, with 130 if it was broken off from the keyboard."""
    from router.pull import pull  # here, because it takes 0.3 s that other commands need not wait for

    say = _Json() if options.json else _Lines()
    try:
        ended = pull(options.model, say, environ=os.environ, alias=options.alias)
    except KeyboardInterrupt:
        print("\nllama-router: what has arrived is kept; pull again to go on", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # a connection may be waiting for its next byte
    if ended.error is not None:
        print(f"llama-router: {ended.error.message}", file=sys.stderr)
        sys.exit(1)


def _remove(options: argparse.Namespace) -> None:
    """Exits with 1 if there is no such model."""
    cache = pulled.cache_folder(os.environ)
    try:
        if cache is None:
            raise pulled.NotPulled("there is no home for the Hugging Face cache: set HF_HOME")
        freed = pulled.remove(cache, options.alias)
    except (pulled.NotPulled, OSError) as error:
        print(f"llama-router: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{options.alias} is removed, {size_text(freed)} are free again")


class _Json:
    def __call__(self, progress: Progress) -> None:
        print(msgspec.json.encode(progress).decode(), flush=True)


class _Lines:
    """What is found first, then one line that is drawn again and again."""

    def __init__(self) -> None:
        self._drawn = False
        self._told = False
        self._last_sec = 0.0
        self._terminal = sys.stdout.isatty()

    def __call__(self, progress: Progress) -> None:
        if progress.status == "resolving":
            return
        if not self._told and progress.alias and progress.total_bytes:
            self._told = True
            self._tell(progress)
        if progress.status == "downloading":
            if self._drawn or progress.completed_bytes < progress.total_bytes:
                self._draw(progress)
            return
        if self._drawn and progress.status == "success":
            self._draw(progress, at_once=True)
        if self._drawn and self._terminal:
            print()
        if progress.status == "success":
            print(f"{progress.alias} is there: {progress.path}")

    def _tell(self, progress: Progress) -> None:
        left = progress.total_bytes - progress.completed_bytes
        files = f"{len(progress.files)} files" if len(progress.files) > 1 else progress.files[0].path
        there = f", {size_text(left)} to go" if progress.completed_bytes else ""
        print(f"{progress.alias}: {files}, {size_text(progress.total_bytes)}{there}")
        print(memory_text(progress.memory) if progress.memory else f"memory: unknown ({progress.memory_unknown})")

    def _draw(self, progress: Progress, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if not self._terminal and not at_once and now - self._last_sec < _LINE_EVERY_SEC:
            return
        self._last_sec, self._drawn = now, True
        line = progress_line(progress, shutil.get_terminal_size().columns)
        print(f"\r{line}\x1b[K" if self._terminal else line, end="" if self._terminal else "\n", flush=True)


def progress_line(progress: Progress, columns: int) -> str:
    """` 42 % ████░░░░  1.2 of 2.9 GB  83.1 MB/s  0:20`"""
    share = progress.completed_bytes / progress.total_bytes if progress.total_bytes else 1.0
    left = "" if progress.eta_sec is None else f"  {_clock(progress.eta_sec)} left"
    figures = f"{size_text(progress.completed_bytes)} of {size_text(progress.total_bytes)}"
    text = f"  {figures}  {size_text(progress.bytes_per_sec)}/s{left}"
    width = max(0, min(40, columns - len(text) - 7))
    full = int(share * width)
    return f"{int(share * 100):>3} % {'█' * full}{'░' * (width - full)}{text}"


def memory_text(note: MemoryNote) -> str:
    need = ", ".join(
        f"{mib:,} MiB on {device} ({note.free_mib[device]:,} free)" for device, mib in note.need_mib.items()
    )
    if note.fits:
        verdict = "fits now"
    elif note.largest_context:
        verdict = f"does not fit now, but does with a context of up to {note.largest_context:,} (-c)"
    else:
        verdict = "does not fit now, with no context"
    return f"memory: {need} for a context of {note.context:,}: {verdict}"


def size_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _clock(sec: float) -> str:
    minutes, seconds = divmod(round(sec), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
