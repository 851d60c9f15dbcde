"""Transformers as a kind of engine; implements `EngineBackend`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from router.config.resolved import ModelConfig
from router.config.schema import System
from router.engines.base import EngineFailed, Fallback, Launch
from router.engines.launcher import LocalLauncher
from router.engines.log_ring import LogRing
from router.engines.transformers import plan
from router.engines.transformers.model import TransformersModel
from router.engines.transformers.program import Program, find_program
from router.engines.transformers.server import TransformersServer
from router.hardware.devices import shown
from router.memory.measurements import Learned
from router.memory.plan import Ground, Inspection, Unusable
from router.scheduling.messages import Placement
from router.system.readings import apart


class Transformers:
    """Backend that looks for its program when a model is asked for, so that it may be installed meanwhile."""

    name = "transformers"
    uses_gpus = True

    def __init__(self, system: System, launcher: LocalLauncher, learned: Learned) -> None:
        self._configured = system.transformers_path
        self._launcher = launcher
        self._learned = learned

    @property
    def origin(self) -> str:
        try:
            return self._program().origin
        except Unusable:
            return ""

    def gpu_list(self, asked: Collection[int]) -> None:
        return None

    def check_runs(self) -> None:
        self._program()

    def command(self, model: ModelConfig) -> tuple[str, ...]:
        return (self._configured or "transformers", "serve", str(model.model_path), *model.flags)

    def validate(self, model: ModelConfig) -> Iterator[str]:
        try:
            plan.opened(_of_this_kind(model))
        except Unusable as error:
            yield str(error)

    def warnings(self, models: Mapping[str, ModelConfig]) -> Iterator[str]:
        return iter(())

    def plan(self, model: ModelConfig, system: System, ground: Ground, *, beside_others: bool) -> Inspection:
        return plan.inspect(_of_this_kind(model), self._program(), system, ground, self._learned)

    def advise(self, model: ModelConfig, system: System, ground: Ground, too_much: Placement) -> str:
        return "a smaller `context`, or `quantize` in its entry, makes it take less"

    async def launch(self, order: Launch, log: LogRing) -> TransformersServer:
        model = _of_this_kind(order.model)
        env = shown(order.shows, model.env)
        try:
            program = await apart(self._program)
        except Unusable as error:
            raise EngineFailed(str(error), error.reason.told) from error
        argv = (str(program.path), "serve", str(model.model_path), *order.chosen.flags, *model.flags)

        def start(port: int) -> TransformersServer:
            return TransformersServer.start(replace(order, shows=env), model, argv, port, log)

        return self._launcher.launch(start)

    def fallback(self, model: ModelConfig) -> Fallback | None:
        return None

    def _program(self) -> Program:
        return find_program(self._configured)


def _of_this_kind(model: ModelConfig) -> TransformersModel:
    assert isinstance(model, TransformersModel)
    return model
