"""Loads the configuration: reads it, adds discovered models, and checks everything.

`load` depends only on its arguments and on the files they name, so a reload is another call. It starts and changes
nothing, and it reports all problems at once. The origin of every value is kept for `llama-router check`. Keys and
their meanings are defined in `config/schema.py`.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.catalog.discovered import Discovered
from router.catalog.validation import validated
from router.config.draft import Draft
from router.config.problems import ConfigError, dotted
from router.config.resolved import Config
from router.config.show import leaves
from router.config.sources import read_values
from router.store import discovery


@dataclass(frozen=True, slots=True)
class Loaded:
    config: Config
    draft: Draft
    """The draft that the configuration was made of."""
    warnings: tuple[str, ...]
    source: Path | None
    """The configuration file; None if there is none."""
    folders: tuple[Path, ...]
    """Folders that were scanned for models."""
    files: tuple[Path, ...]
    """Files outside these folders that engines are started with."""
    headers: discovery.Headers
    """The file headers that were read, for the next scan."""
    look_again: Callable[[], Loaded]
    """Scan for models again, without reading the configuration again. Raises ConfigError."""

    @property
    def origins(self) -> dict[str, str]:
        """The origin of each key's value: `default`, `config.json`, `env API_KEY`, `--port` …"""
        origins = {dotted(path): self.draft.origin_of(path) for path, _ in leaves(self.config)}
        for alias, model in self.config.models.items():
            if model.chosen_because:
                origins[dotted(("models", alias, "engine"))] = f"chosen: {model.chosen_because}"
        return origins

    @property
    def settling(self) -> bool:
        """Whether a file is still being written: look again after `discovery.SETTLE_SEC`."""
        return self.headers.settling


Load = Callable[[Path | None, Loaded | None], Loaded]
"""Function that loads the configuration, given the state directory in use and the configuration in effect."""


def load(
    path: Path | None = None,
    *,
    environ: Mapping[str, str],
    cwd: Path,
    overrides: Mapping[str, tuple[str, Any]] | None = None,
    models_dirs: Sequence[Path] = (),
    check_files: bool = True,
    state_dir: Path | None = None,
    before: Loaded | None = None,
) -> Loaded:
    """Read, merge and check the configuration. Raises `ConfigError` with all problems.

    The file is `path` if given, else the one named by the variable `CONFIG_PATH`, else `llama-router.yaml` or
    `.json` in `cwd`, else a `config.json` or `config.yaml` there that is meant for the router. `overrides` maps a
    key to the option that sets it and its value: `{"api.port": ("--port", 9000)}`; `models.ALIAS` takes a whole
    entry. Each GGUF file below `models_dirs` is served under its name, unless the configuration already serves it.
    Without `check_files`, models and engine need not exist, and only `models_dirs` are scanned: this reads the
    configuration of another machine. `state_dir` is the directory that a running router uses, even if the file now
    names another, and `before` the configuration in effect: a model file that is being replaced counts as
    unchanged.

    Blocks for up to `discovery.SETTLE_SEC` if a discovered file was written just before.
    """
    draft = Draft(environ, cwd, check_files)
    source = read_values(draft, path, overrides or {})
    known = before.headers if before is not None else None
    reading = _Reading(draft, source, models_dirs, state_dir)
    look = reading.look(known)
    if look.headers.settling:
        time.sleep(discovery.SETTLE_SEC)
        look = reading.look(known)
    loaded = reading.loaded(look)
    draft.check_files = False  # from now on a missing file is reported when its model is requested
    return loaded


@dataclass(frozen=True, slots=True)
class _Reading:
    """The configuration as read, before discovered models are added."""

    draft: Draft
    source: Path | None
    models_dirs: Sequence[Path]
    state_dir: Path | None

    def look(self, known: discovery.Headers | None) -> Discovered:
        """Add discovered models to a copy of the draft; `known` are the headers that the previous scan read."""
        discovered = Discovered(copy.deepcopy(self.draft), self.state_dir, discovery.Headers(known))
        discovered.add(self.models_dirs)
        return discovered

    def loaded(self, look: Discovered) -> Loaded:
        """Validate a completed draft. Raises ConfigError."""
        draft, headers = look.draft, look.headers
        config = validated(look)
        if draft.problems:
            raise ConfigError(draft.problems)
        return Loaded(
            config,
            draft,
            warnings=tuple(draft.warnings),
            source=self.source,
            folders=tuple(look.folders),
            files=tuple(_elsewhere(config, look.folders)),
            headers=headers,
            look_again=lambda: self.loaded(self.look(headers)),
        )


def _elsewhere(config: Config, folders: Sequence[Path]) -> Iterator[Path]:
    files = {file for model in config.models.values() for file, *_ in model.files}
    above = [f"{folder}{os.sep}" for folder in folders]
    return (Path(file) for file in sorted(files) if not any(map(file.startswith, above)))
