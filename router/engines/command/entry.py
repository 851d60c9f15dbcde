"""Models of commands: an entry of the configuration, and the model that it becomes."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from router.config.draft import Draft
from router.config.errors import did_you_mean
from router.config.paths import wrong_with_anything
from router.config.resolved import ModelConfig, idle_timeout
from router.config.schema import CommandEntry, Container, System
from router.engines import MARK_VARIABLE
from router.engines.container_entry import resolved_container
from router.engines.kind import EntryReader
from router.engines.parameters import WIDESPREAD
from router.http.routes import SERVED
from router.memory.measurements import files_of

_UNKNOWN = "?"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandModel(ModelConfig):
    """Resolved configuration of a model that another server serves; see `CommandEntry`.

    `model_path` is its file or folder; if it has none, the program, or the image of its container.
    """

    engine: ClassVar[str] = "command"
    derived: ClassVar[frozenset[str]] = frozenset(
        {"alias", "source", "chosen_because", "files", "model_path", "flags", "purposes", "most_tokens"}
    )
    written_as: ClassVar[Mapping[str, str]] = {
        "file": "model_path",
        "known_as": "model_name",
        "footprint": "footprint_mb",
    }
    cmd: tuple[str, ...]
    container: Container | None = None
    stop_cmd: tuple[str, ...] = ()
    cwd: Path | None = None
    file: Path | None = None
    """Value of `{model}`."""
    ready_path: str | None = "/health"
    footprint: Mapping[str, int] | None = field(default=None, hash=False)
    """MiB by device, where `gpu` is any GPU."""

    @property
    def revision(self) -> Hashable:
        how = (self.cmd, self.container, self.stop_cmd, self.cwd, self.file, self.ready_path, self.known_as)
        footprint = frozenset((self.footprint or {}).items())
        return (*how, frozenset(self.env.items()), self.files, footprint)

    @property
    def parameters(self) -> Mapping[str, str] | None:
        """Those of llama-server itself if the routes show that the command starts one."""
        return None if self.routes is None or "/completion" in self.routes else WIDESPREAD


def _read(draft: Draft, alias: str, entry: CommandEntry, system: System) -> CommandModel:
    path = ("models", alias)
    file = None
    if entry.model_path is not None:
        file = draft.resolve(entry.model_path, Path(system.base_models_path))
        draft.check_file((*path, "model_path"), file, wrong_with_anything)
    if entry.container is None:
        if not entry.cmd:
            draft.problem((*path, "cmd"), "is required, unless there is a container")
        elif entry.cmd != (_UNKNOWN,) and not any("{port}" in text for text in (*entry.cmd, *entry.env.values())):
            draft.problem((*path, "cmd"), "holds no {port}, by which it is told where to listen")
    container = None
    if entry.container is not None:
        container = resolved_container(draft, path, entry.container)
        for key, instead in (("stop_cmd", "Docker stops it"), ("cwd", "its image has a working directory")):
            if getattr(entry, key):
                draft.problem((*path, key), f"is of no use with a container: {instead}")
    for variable in sorted({MARK_VARIABLE}.intersection(entry.env)):
        draft.problem((*path, "env", variable), "cannot be set: the router sets it itself")
    for index, route in enumerate(entry.routes):
        if route not in SERVED:
            draft.problem((*path, "routes", index), f"is no route of models{did_you_mean(route, SERVED)}")
    cmd = entry.cmd or (() if container is not None else (_UNKNOWN,))
    if container is None and os.sep in cmd[0] and "{" not in cmd[0]:
        cmd = (str(draft.resolve(cmd[0], draft.base_of((*path, "cmd")))), *cmd[1:])
    cwd = None if entry.cwd is None else draft.resolve(entry.cwd, draft.base_of((*path, "cwd")))
    return CommandModel(
        alias=alias,
        model_path=file or Path(cmd[0] if container is None else container.image),
        slots=entry.slots,
        env=entry.env,
        files=_stamps(file) if draft.is_for_here else (),
        pinned=entry.pinned,
        idle_timeout_sec=idle_timeout(entry.idle_timeout_sec),
        priority=entry.priority or "normal",
        description=entry.description,
        source=draft.origin_of((*path, "engine")),
        routes=frozenset(entry.routes),
        known_as=entry.model_name or alias,
        cmd=cmd,
        container=container,
        stop_cmd=entry.stop_cmd,
        cwd=cwd,
        file=file,
        ready_path=entry.ready_path,
        footprint=entry.footprint_mb,
    )


def _stamps(file: Path | None) -> tuple[tuple[str, int, int], ...]:
    """Stamps of the file that the server is started with, whatever its format."""
    if file is None:
        return ()
    try:
        return files_of(file)
    except OSError:
        return ()


ENTRIES = EntryReader(CommandEntry, {"cmd": (_UNKNOWN,), "engine": CommandModel.engine}, _read)
