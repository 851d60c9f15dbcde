"""Backend for servers that are started by their command lines: see `EngineBackend`.

Nothing is known of such a program except its entry. Its memory is given there, or estimated from the size of its
file until it has answered a request and been measured.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from router.config.resolved import ModelConfig
from router.config.schema import System
from router.engines.base import EngineHandle, Fallback, Launch
from router.engines.command.container import CommandContainer
from router.engines.command.entry import CommandModel
from router.engines.command.server import CommandServer
from router.engines.docker import problem_of
from router.engines.launcher import LocalLauncher
from router.engines.log_ring import LogRing
from router.hardware.devices import shown
from router.memory.measurements import Identity, Learned, files_of
from router.memory.plan import Alternative, Ground, Inspection, Site, Size, Unusable
from router.scheduling.messages import Placement
from router.system.devices import HOST, Device

_MIB = 1 << 20
_FIRST_GUESS_MIB = 512
"""Estimate for a program without footprint and file, until its first response."""
_FIRST_GUESS_SEC = 10.0
ANY_GPU = "gpu"
"""Key of `footprint_mb` for any one GPU."""


class Command:
    """Backend of models that each name their own program."""

    name = "command"
    origin = ""
    uses_gpus = True

    def __init__(self, launcher: LocalLauncher, learned: Learned) -> None:
        self._launcher = launcher
        self._learned = learned

    def gpu_list(self, asked: Collection[int]) -> None:
        return None

    def check_runs(self) -> None:
        """Check nothing: each model has a program of its own."""

    def command(self, model: ModelConfig) -> tuple[str, ...]:
        configured = _of_this_kind(model)
        image = () if configured.container is None else (configured.container.image,)
        return (*image, *configured.cmd)

    def validate(self, model: ModelConfig) -> Iterator[str]:
        command = _of_this_kind(model)
        if command.container is not None:
            problem = asyncio.run(problem_of(command.container))
            if problem is not None:
                yield problem
            return
        try:
            _program(command)
        except Unusable as error:
            yield str(error)

    def warnings(self, models: Mapping[str, ModelConfig]) -> Iterator[str]:
        return iter(())

    def plan(self, model: ModelConfig, system: System, ground: Ground, *, beside_others: bool) -> Inspection:
        return _Places(_of_this_kind(model), system, ground, self._learned).inspection()

    def advise(self, model: ModelConfig, system: System, ground: Ground, too_much: Placement) -> str:
        return "its footprint_mb may be too small"

    async def launch(self, order: Launch, log: LogRing) -> EngineHandle:
        model = _of_this_kind(order.model)
        env = shown(order.shows, model.env)
        if model.container is not None:
            return await CommandContainer.start(order, model, env, self._launcher.containers, log)
        program = str(_program(model))

        def start(port: int) -> CommandServer:
            return CommandServer.start(replace(order, shows=env), model, program, port, log)

        return self._launcher.launch(start)

    def fallback(self, model: ModelConfig) -> Fallback | None:
        return None


def _of_this_kind(model: ModelConfig) -> CommandModel:
    assert isinstance(model, CommandModel)
    return model


def _program(model: CommandModel) -> Path:
    """Return the file that is run. Raises Unusable."""
    name = model.cmd[0]
    path = shutil.which(name, path=model.env.get("PATH", os.environ.get("PATH", os.defpath)))
    if path is None:
        reason = f"there is no program {name}, or it is not executable"
        raise Unusable(reason, "its program is not there, or not executable")
    return Path(path).absolute()


class _Places:
    """Alternatives of one model on this machine: on one GPU, on the GPUs that its entry names, or in RAM."""

    def __init__(self, model: CommandModel, system: System, ground: Ground, learned: Learned) -> None:
        self._model = model
        self._ground = ground
        self._learned = learned
        self._program = None if model.container is not None else _program(model)
        self._multiplier = system.vram_multiplier

    def inspection(self) -> Inspection:
        found = sorted(self._alternatives(), key=self._rank)
        advice = "footprint_mb in its entry says what it takes"
        return Inspection.of(found, self._ground, self._learned, _FIRST_GUESS_SEC, lambda: advice)

    def _alternatives(self) -> list[Alternative]:
        given = self._model.footprint
        gpus = self._ground.gpus
        if given is None:
            return [self._by_guess(site) for site in gpus] or [self._by_guess(None)]
        if ANY_GPU in given and not gpus:  # it then computes in RAM
            return [self._given((), {HOST: given[ANY_GPU] + given.get(str(HOST), 0)})]
        in_ram = {HOST: given[str(HOST)]} if str(HOST) in given else {}
        if ANY_GPU in given:
            return [self._given((site.device,), {**in_ram, site.device: given[ANY_GPU]}) for site in gpus]
        named = {Device.named(name): mib for name, mib in given.items()}
        there = {site.device for site in gpus} | {HOST}
        if gone := [str(device) for device in named if device not in there]:
            ours = ", ".join(map(str, sorted(there)))
            reason = f"its footprint_mb names {', '.join(gone)}, and there are {ours}"
            raise Unusable(reason, reason)
        return [self._given(tuple(sorted(device for device in named if device.is_gpu)), named)]

    def _given(self, gpus: tuple[Device, ...], placement: Placement) -> Alternative:
        one = Alternative(gpus, Size({}, "footprint_mb", {}), placement, is_given=True)
        counted = one.as_counted(placement)
        return replace(one, size=Size(counted, "footprint_mb", counted, self._identity(len(gpus))))

    def _by_guess(self, site: Site | None) -> Alternative:
        """Return the alternative by measurement, or else by the size of its file."""
        identity = self._identity(0 if site is None else 1)
        nbytes = self._file_bytes()
        guess = round(nbytes * self._multiplier / _MIB) if nbytes else _FIRST_GUESS_MIB
        source = f"file size × {self._multiplier:g}" if nbytes else "a guess, until it has answered"
        place = HOST if site is None else Device.shown(0)
        guessed = {place: max(1, guess)}
        measured = self._learned.measured(identity)
        wanted, source = (guessed, source) if measured is None else (measured, "measured")
        wanted, source = self._learned.with_raised(wanted, source, identity)
        gpus = () if site is None else (site.device,)
        one = Alternative(gpus, Size(wanted, source, guessed, identity), {})
        return replace(one, placement=one.as_driven(wanted))

    def _rank(self, one: Alternative) -> tuple[bool, bool, int]:
        """Sort key: alternatives that fit come first; of these, those that fit now, with least memory left
        over."""
        left = self._ground.left_mib(one)
        return not self._ground.holds(one.placement), left < 0, left

    def _file_bytes(self) -> int:
        file = self._model.file
        if file is None:
            return 0
        try:
            if file.is_dir():
                return sum(part.stat().st_size for part in file.rglob("*") if part.is_file())
            return file.stat().st_size
        except OSError as error:
            reason = f"{file} cannot be read: {error.strerror or error}"
            raise Unusable(reason, "its file cannot be read") from error

    def _identity(self, gpus: int) -> Identity:
        model = self._model
        files = files_of(*(path for path in (self._program, model.file) if path is not None))
        flags = model.cmd if model.container is None else (model.container.image, *model.cmd)
        return Identity(files, "command", flags, gpus)
