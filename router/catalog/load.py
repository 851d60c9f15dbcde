"""The configuration with all models that there are: read, completed, checked.

`load` is a function of its arguments and of the files they name, so a reload is one more call. It starts
nothing and changes nothing, and it reports all problems at once. Every value's origin is kept, for
`llama-router check`. What keys there are and what they mean is in `config/schema.py`.
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
    """Where models were looked for, beyond those that the configuration names."""
    files: tuple[Path, ...]
    """What engines are started with that lies elsewhere."""
    headers: discovery.Headers
    """What is known of the files of models."""
    look_again: Callable[[], Loaded]
    """The same configuration with the files that are there now. Raises ConfigError."""

    @property
    def origins(self) -> dict[str, str]:
        """The origin of each key's value: `default`, `config.json`, `env API_KEY`, `--port` …"""
        return {dotted(path): self.draft.origin_of(path) for path, _ in leaves(self.config)}

    @property
    def settling(self) -> bool:
        """A file is still being written: look again after `discovery.SETTLE_SEC`."""
        return self.headers.settling


Load = Callable[[Path | None, Loaded | None], Loaded]
"""Gives the configuration, with the state directory that is in use and the configuration that is gone by."""


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
    """Read, merge and check the configuration. Raises `ConfigError` with all that is wrong.

    `path` is the file that the command line names; else the variable `CONFIG_PATH`; else `llama-router.yaml` or
    `.json` in `cwd`, else a `config.json` or `config.yaml` there that is meant for the router. `overrides` maps a
    key to the option that sets it and its value: `{"api.port": ("--port", 9000)}`; `models.ALIAS` takes a whole
    entry. Each GGUF file below `models_dirs` is served under its name, unless the configuration already serves it.
    Without `check_files`, models and engine need not exist, and no models are looked for but in `models_dirs`: for
    reading the configuration of another machine. `state_dir` is the one that a running router works with, whatever
    the file says by now, and `before` what it goes by: a file of a model that is just being replaced is still what
    it was there.

    Blocks for up to `discovery.SETTLE_SEC` when a file to be discovered has only just been written.
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
    draft.check_files = False  # from now on a configured file that is missing is said to whoever asks for it
    return loaded


@dataclass(frozen=True, slots=True)
class _Reading:
    """What was read, to be completed with the models that there are."""

    draft: Draft
    source: Path | None
    models_dirs: Sequence[Path]
    state_dir: Path | None

    def look(self, known: discovery.Headers | None) -> Discovered:
        """Complete a copy of it; `known` is what the last look knew of files."""
        discovered = Discovered(copy.deepcopy(self.draft), self.state_dir, discovery.Headers(known))
        discovered.add(self.models_dirs)
        return discovered

    def loaded(self, look: Discovered) -> Loaded:
        """What that comes to. Raises ConfigError."""
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
