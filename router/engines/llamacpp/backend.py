"""Backend for llama-server and the embedded engine: see `EngineBackend`."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from router.config.resolved import ModelConfig
from router.config.schema import System
from router.engines.base import EngineFailed, Fallback, Launch, NoEngine
from router.engines.launcher import LocalLauncher
from router.engines.llamacpp import footprint, plan, server, slot_states
from router.engines.llamacpp.binary import Binary
from router.engines.llamacpp.embedded_flags import UsageError, parameters
from router.engines.llamacpp.flags import FORMS, FlagError, Flags, argv, as_started, parse, replaced
from router.engines.llamacpp.listed_devices import Listed
from router.engines.llamacpp.model import LlamaCppModel
from router.engines.llamacpp.sizing import EngineKind, read_files
from router.engines.log_ring import LogRing
from router.engines.process import EngineOrder
from router.hardware.devices import shown
from router.kv.keeper import Keeper
from router.memory.measurements import Learned
from router.memory.plan import Ground, Inspection, Unusable
from router.scheduling.messages import Placement
from router.system.readings import apart


class LlamaCpp:
    """Backend that runs all its models with one binary."""

    def __init__(self, binary: Binary, launcher: LocalLauncher, learned: Learned) -> None:
        self.build = EngineKind(binary)
        self._binary = binary
        self._launcher = launcher
        self._learned = learned

    @property
    def name(self) -> str:
        return self._binary.kind

    @property
    def origin(self) -> str:
        return self._binary.origin

    @property
    def uses_gpus(self) -> bool:
        return self.build.uses_gpus

    def gpu_list(self, asked: Collection[int]) -> Listed:
        return Listed(self.build, os.environ, asked)

    def check_runs(self) -> None:
        self.build.check_runs()

    def command(self, model: ModelConfig) -> tuple[str, ...]:
        return self._argv(model, model.flags)

    def _argv(self, model: ModelConfig, flags: Sequence[str]) -> tuple[str, ...]:
        return (*self._binary.argv, "-m", str(model.model_path), "--alias", model.alias, *flags)

    def validate(self, model: ModelConfig) -> Iterator[str]:
        flags = as_started(model.flags, model.env)
        try:
            files = read_files(model.model_path, flags)
            if files.model is not None:
                footprint.estimate(files.model, flags, projector=files.projector, draft=files.draft)
            if self.name == "embedded":
                parameters(Flags(("-m", str(model.model_path), *model.flags), model.env))
        except (Unusable, FlagError, UsageError, OSError) as error:
            yield str(error)
        except ImportError as error:
            raise NoEngine(f"xllamacpp can't be imported: {error}") from error

    def warnings(self, models: Mapping[str, ModelConfig]) -> Iterator[str]:
        return self.build.unknown_flags(models, os.environ)

    def plan(self, model: ModelConfig, system: System, ground: Ground, *, beside_others: bool) -> Inspection:
        assert isinstance(model, LlamaCppModel)
        if beside_others:  # no engine is evicted for one that cannot run
            self.check_runs()
        return plan.inspect(model, system, self.build, ground, self._learned)

    def advise(self, model: ModelConfig, system: System, ground: Ground, too_much: Placement) -> str:
        assert isinstance(model, LlamaCppModel)
        return plan.advise(model, system, self.build, ground, self._learned, too_much)

    async def launch(self, order: Launch, log: LogRing) -> server.LlamaServer:
        model, env = order.model, _environment(order)
        written = replaced(model.flags, order.chosen.flags)
        try:
            flags = await apart(lambda: self.build.in_its_words(written, {**os.environ, **env}))
        except FlagError as error:
            raise EngineFailed(f"its flags: {error.message}", "its flags are wrong") from error
        store = self._launcher.kv_store
        told = Flags(flags.words, {**os.environ, **env})
        saves = slot_states.can_be_saved(told) and await store.is_there()
        group = slot_states.group(model.files, self.build.build, told)
        if saves:
            await store.drop(slot_states.outdated(store, model.alias, group))
        words = (*flags.words, "--slot-save-path", f"{store.folder}{os.sep}") if saves else flags.words
        command = EngineOrder(
            alias=model.alias,
            argv=self._argv(model, words),
            env=env,
            load_stall_sec=order.load_stall_sec,
            load_limit_sec=order.load_limit_sec,
            stop_grace_sec=order.stop_grace_sec,
        )
        engine = await self.start(command, log)
        if saves:
            engine.keeper = Keeper(
                store, group, model.alias, model.slots, partial(slot_states.ask, engine.endpoint)
            )
        return engine

    async def start(self, command: EngineOrder, log: LogRing) -> server.LlamaServer:
        launcher = self._launcher
        takes_sockets = launcher.has_sockets and await apart(lambda: self.build.takes_unix_sockets)

        def start(port: int) -> server.LlamaServer:
            unix_socket = launcher.unix_socket(port) if takes_sockets else None
            return server.LlamaServer.start(command, port, log, unix_socket)

        return launcher.launch(start)

    def fallback(self, model: ModelConfig) -> Fallback | None:
        """Return the model without its projector if that was not configured but found."""
        assert isinstance(model, LlamaCppModel)
        if not model.projector_was_found or "mmproj" not in model.purposes:
            return None
        why = (
            "is started without the projector that was found beside it (name the right one by `mmproj` in its "
            "entry, or give it the flag --no-mmproj)"
        )
        return Fallback(_without_projector(model), why)


def _without_projector(model: LlamaCppModel) -> LlamaCppModel:
    flags = argv(flag for flag in parse(model.flags) if flag.name != "mmproj")
    return replace(model, flags=tuple(flags), purposes=model.purposes - {"mmproj"})


def _environment(order: Launch) -> Mapping[str, str]:
    """Return its environment variables, including those that select its GPUs."""
    env = shown(order.shows, order.model.env)
    anew = Flags(order.chosen.flags)  # inherited ones may name GPUs that it cannot see
    for name in plan.NAMES_GPUS:
        flag, variable = anew.last(name), FORMS[name].variable
        if flag is not None and variable:
            env[variable] = flag.text
    return env
