"""vLLM as a kind of engine: see `EngineBackend`."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from router.config.resolved import ModelConfig
from router.config.schema import System
from router.engines.base import EngineFailed, Fallback, Launch
from router.engines.docker import problem_of
from router.engines.hf_entry import usable
from router.engines.launcher import LocalLauncher
from router.engines.log_ring import LogRing
from router.engines.vllm.container import VllmContainer
from router.engines.vllm.engine import VllmEngine
from router.engines.vllm.model import VllmModel
from router.engines.vllm.plan import VllmPlan
from router.engines.vllm.program import Program, find_program, in_image
from router.engines.vllm.server import VllmServer
from router.formats import hf_cache
from router.formats.hf_model import HfModel
from router.hardware.devices import shown
from router.memory.measurements import Learned
from router.memory.plan import Ground, Inspection, Unusable
from router.scheduling.messages import Placement
from router.system.readings import apart


class Vllm:
    """One program for all its models; it need not be there as long as nobody asks for one."""

    name = "vllm"
    uses_gpus = True

    def __init__(self, configured: str | None, launcher: LocalLauncher, learned: Learned) -> None:
        self._configured = configured
        self._launcher = launcher
        self._learned = learned

    @property
    def origin(self) -> str:
        try:
            program = self._program()
        except Unusable as error:
            return str(error)
        return f"{program.version} {program.origin}".strip()

    def _program(self, model: VllmModel | None = None) -> Program:
        """Return the program, on this machine or in the image of a model's container. Raises Unusable."""
        if model is not None and model.container is not None:
            return in_image(model.container)
        return find_program(self._configured)

    def gpu_list(self, asked: Collection[int]) -> None:
        return None

    def check_runs(self) -> None:
        """Check nothing: a model may be in a container, which has a program of its own."""

    def command(self, model: ModelConfig) -> tuple[str, ...]:
        container = _of_this_kind(model).container
        program = (self._configured or "vllm", "serve") if container is None else (container.image,)
        return (*program, str(model.model_path), *model.flags)

    def validate(self, model: ModelConfig) -> Iterator[str]:
        configured = _of_this_kind(model)
        try:
            self._program(configured)
            _opened(configured)
        except Unusable as error:
            yield str(error)
        if configured.container is not None:
            problem = asyncio.run(problem_of(configured.container))
            if problem is not None:
                yield problem

    def warnings(self, models: Mapping[str, ModelConfig]) -> Iterator[str]:
        sleepers = [alias for alias, model in models.items() if _of_this_kind(model).sleep]
        if not sleepers:
            return
        try:
            program = self._program()
        except Unusable:
            return
        if program.is_for_cpu:
            for alias in sleepers:
                yield f"{alias!r}: `sleep` needs a GPU, and {program.build} computes on the CPU: it exits instead"

    def plan(self, model: ModelConfig, system: System, ground: Ground, *, beside_others: bool) -> Inspection:
        return self._plan(_of_this_kind(model), ground).inspection()

    def advise(self, model: ModelConfig, system: System, ground: Ground, too_much: Placement) -> str:
        def smaller(mib: int, placed: int | None) -> int:
            return mib if placed is None else int(0.9 * placed)

        gpus = tuple(
            replace(site, budget_mib=smaller(site.budget_mib, too_much.get(site.device))) for site in ground.gpus
        )
        host = ground.host
        if not any(device.is_gpu for device in too_much):
            host = replace(host, budget_mib=smaller(host.budget_mib, too_much.get(host.device)))
        return self._plan(_of_this_kind(model), Ground(gpus, host, ground.environment)).advice()

    def _plan(self, model: VllmModel, ground: Ground) -> VllmPlan:
        """Return the plan of a model. Blocking. Raises Unusable."""
        return VllmPlan(model, _opened(model), self._program(model), ground, self._learned)

    async def launch(self, order: Launch, log: LogRing) -> VllmEngine:
        model = _of_this_kind(order.model)
        try:
            program = await apart(lambda: self._program(model))
        except Unusable as error:
            raise EngineFailed(error.reason.full, error.reason.told) from error
        own = replace(order, shows=shown(order.shows, model.env))
        if model.container is not None:
            return await VllmContainer.start(own, model, program, self._launcher.containers, log)

        def start(port: int) -> VllmServer:
            return VllmServer.start(own, model, program, port, log)

        return self._launcher.launch(start, binds_early=True)

    def fallback(self, model: ModelConfig) -> Fallback | None:
        return None


def _of_this_kind(model: ModelConfig) -> VllmModel:
    assert isinstance(model, VllmModel)
    return model


def _opened(model: VllmModel) -> HfModel | None:
    """Return what the model's files say; None if they are still to be downloaded. Raises Unusable."""
    try:
        return usable(hf_cache.held(model.model_path))
    except Unusable:
        if model.is_downloaded:
            return None
        raise
