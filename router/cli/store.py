"""`llama-router pull` and `llama-router rm`: pull models from the Hugging Face hub; remove pulled or created ones.

Both work on the cache directly, whether a router is running or not; a running router notices the changed files.
Created models are kept in the state directory of one router: if it is running, it is asked to remove them. With
the URL of a router, that router pulls and removes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import msgspec

from router.catalog.load import load
from router.cli import remote
from router.cli.client import CannotAsk, RouterClient
from router.cli.columns import print_json, size_text
from router.config.names import same_name, some_of
from router.config.problems import ConfigError
from router.config.resolved import Config
from router.config.source import Source
from router.formats import hf_cache
from router.kv.store import KvStore, folder_of
from router.store import created, pulled
from router.store.created import Created
from router.store.creations import Creations
from router.store.progress import MemoryNote, Progress
from router.system.printable import line, printable
from router.system.state import State, StateHeld, configured_path

_LINE_EVERY_SEC = 10.0
"""Interval of progress lines if the output is not a terminal."""


def pull(options: argparse.Namespace) -> None:
    """Pull a model. Exits with 1 if it failed, with 130 if it was interrupted. Raises CannotAsk, ConfigError."""
    if remote.url_given(options):
        _pull_there(remote.connect(options), options)
        return
    from router.store import pull as pulling  # imported here because it takes 0.3 s, which `rm` does not need

    say = _Json() if options.json else _Lines()
    taken = _configured_names(options.config)
    try:
        ended = pulling.pull(options.model, say, environ=os.environ, alias=options.alias, taken=taken)
    except KeyboardInterrupt:
        print("\nllama-router: the partial download is kept; pull again to resume", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # a connection may be waiting for its next byte
    _exit_with(ended)


def _pull_there(router: RouterClient, options: argparse.Namespace) -> None:
    """Have a router pull the model, and follow that. An interruption cancels the pull unless others began it."""
    say, path = _Json() if options.json else _Lines(), "/v1/models/pull"
    running = {pull["id"] for pull in router.get(path)["pulls"]}
    pull = f"{path}/{(begun := router.post(path, {'model': options.model, 'alias': options.alias}))['id']}"
    progress: Progress | None = None
    try:
        for event in router.events(f"{pull}/stream"):
            progress = msgspec.json.decode(event.text, type=Progress)
            say(progress)
    except KeyboardInterrupt:
        if begun["id"] in running:
            print("\nllama-router: the router goes on pulling, as it did before", file=sys.stderr)
        else:
            router.delete(pull)
            print("\nllama-router: cancelled; pull again to resume", file=sys.stderr)
        raise
    if progress is None or progress.status in ("resolving", "downloading"):
        raise CannotAsk(f"The router at {router.url} has closed the stream.")
    if progress.status == "cancelled":
        raise CannotAsk("The pull was cancelled; the next pull resumes it.")
    _exit_with(progress)


def _exit_with(ended: Progress) -> None:
    """Exit with 1 if a pull failed."""
    if ended.error is not None:
        print(printable(f"llama-router: {ended.error.message}"), file=sys.stderr)
        sys.exit(1)


def _configured_names(path: Path | None) -> dict[str, str]:
    """Return the names that are already in use, each with the source of its model."""
    try:
        config = load(path, environ=os.environ, cwd=Path.cwd(), check_files=False).config
    except ConfigError:
        if path is not None:
            raise
        return {}  # the config.json here may belong to a model
    sources = config.sources
    state = configured_path(config.system.state_dir, config.api.port, os.environ)
    with contextlib.suppress(OSError):
        there = created.read(state) if state is not None else {}
        sources = {**dict.fromkeys(there, Source.CREATED), **sources}
    return sources


def remove(options: argparse.Namespace) -> None:
    """Remove a model. Exits with 1 if it is missing or needed by another. Raises CannotAsk, ConfigError."""
    if remote.url_given(options) and options.port is None:
        answer = remote.connect(options).delete(f"/v1/models/pulled/{quote(options.alias, safe='')}")
        _print_removed(options, answer["model"], answer["freed_bytes"])
        return
    port = {} if options.port is None else {"api.port": ("--port", options.port)}
    loaded = load(options.config, environ=os.environ, cwd=Path.cwd(), overrides=port, check_files=False)
    config = loaded.config
    state = configured_path(config.system.state_dir, config.api.port, os.environ)
    try:
        records = {} if state is None else created.read(state)
        name = same_name(options.alias, records) or options.alias
        if state is not None and name in records:
            freed = _remove_created(name, state, config)
        else:
            freed = _remove_pulled(name, records, config)
        if state is not None:
            _forget_conversations(name, state, config)
    except (pulled.NotPulled, pulled.BeingPulled, StateHeld, OSError) as error:
        print(printable(f"llama-router: {error}"), file=sys.stderr)
        sys.exit(1)
    _print_removed(options, name, freed)


def _print_removed(options: argparse.Namespace, name: str, freed: int) -> None:
    if options.json:
        print_json({"status": "success", "model": name, "freed_bytes": freed})
    else:
        print(line(f"{name} was removed, {size_text(freed)} freed"))


def _remove_created(name: str, folder: Path, config: Config) -> int:
    """Remove a created model, through the router that uses the folder if one is running; return the bytes freed.

    Raises CannotAsk, StateHeld, OSError.
    """
    if (holder := State.holder(folder)) is not None:
        router = remote.connect_here(config.api.model_copy(update={"port": holder.port}))
        return int(router.delete(f"/v1/models/pulled/{quote(name, safe='')}")["freed_bytes"])
    with contextlib.closing(State.open(folder, config.api.port)) as state:
        return asyncio.run(Creations(state, _nobody_looks).remove(name)) or 0


def _forget_conversations(name: str, state: Path, config: Config) -> None:
    """Delete what is saved of a removed model's conversations, unless a running router does."""
    folder = folder_of(config.kv_store, state)
    if folder is not None and folder.is_dir() and State.holder(state) is None:
        with contextlib.closing(KvStore.open(folder, config.kv_store)) as conversations:
            asyncio.run(conversations.clear(name))


async def _nobody_looks() -> None:
    """Do nothing: no router is running that would have to apply the change."""


def _remove_pulled(name: str, records: Mapping[str, Created], config: Config) -> int:
    """Remove a pulled model; return the bytes freed. Raises NotPulled, BeingPulled, OSError."""
    cache = hf_cache.folder(os.environ)
    if cache is None:
        raise pulled.NotPulled("the location of the Hugging Face cache is unknown: set HF_HOME")
    known = pulled.read(cache)
    if name not in known:
        name = hf_cache.NEW_NAMES.get(name, name)
    if name not in config.names and name in known and (needed := created.made_from(records, name)):
        raise pulled.NotPulled(f"{some_of(needed)} was created from {name!r}: remove that first")
    try:
        return pulled.remove(cache, name)
    except pulled.NotPulled as error:
        raise pulled.NotPulled(f"{error}; created models: {', '.join(sorted(records)) or 'none'}") from None


class _Json:
    def __call__(self, progress: Progress) -> None:
        print(msgspec.json.encode(progress).decode(), flush=True)


class _Lines:
    """Prints the files and the estimate, then a progress line that is redrawn."""

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
            print(line(f"{progress.alias} is available: {progress.path}"))

    def _tell(self, progress: Progress) -> None:
        left = progress.total_bytes - progress.completed_bytes
        files = f"{len(progress.files)} files" if len(progress.files) > 1 else progress.files[0].path
        there = f", {size_text(left)} to go" if progress.completed_bytes else ""
        print(line(f"{progress.alias}: {files}, {size_text(progress.total_bytes)}{there}"))
        print(memory_text(progress.memory) if progress.memory else f"memory: unknown ({progress.memory_unknown})")

    def _draw(self, progress: Progress, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if not self._terminal and not at_once and now - self._last_sec < _LINE_EVERY_SEC:
            return
        self._last_sec, self._drawn = now, True
        line = progress_line(progress, shutil.get_terminal_size().columns)
        print(f"\r{line}\x1b[K" if self._terminal else line, end="" if self._terminal else "\n", flush=True)


def progress_line(progress: Progress, columns: int) -> str:
    """Format the progress, as in ` 42 % ████░░░░  1.2 of 2.9 GB  83.1 MB/s  0:20`."""
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
        verdict = (
            f"does not fit now, but does with a context of up to {note.largest_context:,} ({note.context_key})"
        )
    else:
        verdict = "does not fit now with any context size"
    engine = f" on {note.engine}" if note.engine else ""
    return f"memory: {need} for a context of {note.context:,}{engine}: {verdict}"


def _clock(sec: float) -> str:
    minutes, seconds = divmod(round(sec), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
