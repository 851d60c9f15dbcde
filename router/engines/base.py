"""Protocols for the rest of the router: a kind of engine, which plans and starts, and a running engine.

Nothing here is about llama.cpp. A kind is a package beside this file: `llamacpp/` for llama-server and the
embedded engine, `command/` for any server by its command line. `registry.py` lists them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from router.config.resolved import ModelConfig
from router.engines.log_ring import LogRing
from router.hardware.devices import ListedGpus
from router.kv.keeper import Keeper
from router.memory.plan import Alternative, Planner
from router.observe.reasons import Problem, Reason
from router.scheduling.messages import Retry
from router.system.devices import Device

PROBE_LIMIT_SEC = 3


class NoEngine(Exception):
    """Raised when a kind of engine has no program to run; the message says what to do."""


class EngineFailed(Problem):
    """Raised if an engine does not become ready."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address of an engine, and how requests to it must look."""

    port: int
    host: str = "127.0.0.1"
    unix_socket: Path | None = None
    """Socket on which it also listens."""
    headers: tuple[tuple[str, str], ...] = ()
    """Headers added to every request."""
    knows_key: bool = False
    """True if the headers hold a key of the router's own: a 401 then means that another program has its port."""
    marks_end: bool = True
    """True if its streams end with an event such as `[DONE]`; a stream without it is incomplete."""
    tells_end: Callable[[int, bytes], bool] | None = None
    """Returns whether a response, by its status and its (last) bytes, is that of an engine that has failed or is
    ending although it answers. None: its connections then break off."""


class Facts(NamedTuple):
    """Properties that a ready engine reports."""

    context: int | None = None
    """Context size of one slot in tokens."""
    modalities: Mapping[str, bool] = {}
    """Whether it accepts `vision`, `audio` …; for missing ones, its files decide."""


class LoadProgress(NamedTuple):
    """Progress of a load, as the engine reports it."""

    value: float
    """Progress of the stage, 0 to 1."""
    stage: str | None = None
    """Stage in progress."""
    stages: tuple[str, ...] = ()
    """All stages in order."""


class Ending(NamedTuple):
    """Consequences of an engine's exit, derived from its exit code and its log."""

    retry: Retry = Retry.LATER
    """Time to start the next engine, if this one was not ready yet."""
    wanted_mib: Mapping[Device, int] | None = None
    """Last failed allocations in MiB by device, as the engine counts devices; empty if unknown. None if the engine
    did not run out of memory."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything needed to start an engine for a model."""

    model: ModelConfig
    chosen: Alternative
    shows: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that restrict it to its chosen GPUs."""
    load_stall_sec: float = 60
    load_limit_sec: float | None = None
    stop_grace_sec: float = 10


class Sleeper(Protocol):
    """Way to have an engine give up its GPUs and take them back without loading anew."""

    async def fall_asleep(self, limit_sec: float) -> None:
        """Ask it to sleep; return once it says that it does. It must have no requests. Raises EngineFailed."""

    async def wake_up(self, limit_sec: float) -> None:
        """Have it serve again. Raises EngineFailed."""


class EngineHandle(Protocol):
    """One engine, from its start to its exit. It supervises itself."""

    when_load_moves: Callable[[], None]
    keeper: Keeper | None
    """Keeper of its slots; None if their states cannot be saved."""

    @property
    def command(self) -> tuple[str, ...]:
        """Its command line; of a container, its image and the arguments of its entrypoint."""

    @property
    def sleeper(self) -> Sleeper | None:
        """None: it cannot sleep."""

    @property
    def cannot_sleep(self) -> str | None:
        """Reason why it cannot sleep although it is configured to; None if there is none."""

    @property
    def endpoint(self) -> Endpoint: ...

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes that hold its memory, together with their descendants; empty if they are not on this
        machine."""

    @property
    def alive(self) -> bool: ...

    @property
    def exited(self) -> asyncio.Task[Reason]:
        """Task that returns the reason once the engine and all processes it started have exited."""

    @property
    def exit_code(self) -> int | None:
        """Exit code; negative: the signal that ended it. None while it runs, or if there is none."""

    @property
    def ending(self) -> Ending:
        """Consequences of its exit; the default until then."""

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel killed it because memory ran out."""

    @property
    def was_killed(self) -> bool:
        """Whether `kill` ended it."""

    @property
    def load_progress(self) -> LoadProgress | None:
        """Progress while it loads, if it reports any."""

    async def ready(self) -> None:
        """Wait until it accepts requests. Raises EngineFailed if it exits, hangs or takes too long."""

    async def healthy(self, limit_sec: float = PROBE_LIMIT_SEC) -> bool:
        """Return whether it is alive and answers a probe within `limit_sec` seconds."""

    async def facts(self) -> Facts | None:
        """Return the properties it reports; None if it reports none."""

    async def stop(self) -> None:
        """Ask it to exit, and kill it after the grace period. Returns once it and all it started have exited.

        Close all connections to it first: engines wait for connected clients.
        """

    def kill(self, reason: str = "") -> None:
        """Kill it at once; `reason` becomes the reason of its exit."""

    def last_words(self, lines: int = 10) -> list[str]:
        """Return the last lines of its log."""


class Fallback(NamedTuple):
    """Another way to run a model that did not load."""

    model: ModelConfig
    why: str
    """Reason, for the log."""


class EngineBackend(Planner, Protocol):
    """A kind of engine: plans (see `Planner`) and starts engines, and knows the models of its kind."""

    @property
    def name(self) -> str:
        """Name for display and metrics, such as `llama-server`."""

    @property
    def origin(self) -> str:
        """Source of its program, for display; empty if each model names its own."""

    @property
    def uses_gpus(self) -> bool:
        """Whether engines of this kind may use GPUs."""

    def gpu_list(self, asked: Collection[int]) -> ListedGpus | None:
        """Return the source of GPUs that no driver reports but these engines do; None if they report none.

        `asked` are numbers of GPUs to offer even if they share memory with the processor.
        """

    def check_runs(self) -> None:
        """Check that models of this kind can be run at all. Blocking. Raises Unusable."""

    def command(self, model: ModelConfig) -> tuple[str, ...]:
        """Return the command line of a model's engine, without what is decided when it is started."""

    def validate(self, model: ModelConfig) -> Iterator[str]:
        """Yield reasons why a model will not load, for `llama-router check`. Blocking.

        Raises NoEngine if no model of this kind will.
        """

    def warnings(self, models: Mapping[str, ModelConfig]) -> Iterator[str]:
        """Yield warnings about models of this kind by alias, before any of them is requested. Blocking."""

    async def launch(self, order: Launch, log: LogRing) -> EngineHandle:
        """Start an engine, whose output goes to `log`. Raises EngineFailed if it cannot be started."""

    def fallback(self, model: ModelConfig) -> Fallback | None:
        """Return another way to run a model, to be tried at once after its load failed; None if there is none."""
