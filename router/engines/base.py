"""What the rest of the router knows of engines: a kind of them that plans and starts, and one that runs.

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
from router.memory.plan import Alternative, Planner
from router.observe.reasons import Problem, Reason
from router.scheduling.messages import Retry
from router.system.devices import Device

PROBE_LIMIT_SEC = 3


class NoEngine(Exception):
    """Raised when a kind of engine has no program to run; the message says what to do."""


class EngineFailed(Problem):
    """The engine did not become ready."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine serves, and how it wants to be spoken to."""

    port: int
    host: str = "127.0.0.1"
    unix_socket: Path | None = None
    """Where it listens, too."""
    headers: tuple[tuple[str, str], ...] = ()
    """Of every request to it."""
    knows_key: bool = False
    """These hold a key that it was given: a 401 tells that its port is somebody else's by now."""
    marks_end: bool = True
    """Its streams have a last event, such as `[DONE]`: one without it is not whole."""


class Facts(NamedTuple):
    """What an engine that is ready says of itself."""

    context: int | None = None
    """Of one slot, in tokens."""
    modalities: Mapping[str, bool] = {}
    """Whether it takes `vision`, `audio` …; others are left to what is known of its files."""


class LoadProgress(NamedTuple):
    """How far a load is, in the engine's own words."""

    value: float
    """0 to 1, of the stage."""
    stage: str | None = None
    """What it loads now."""
    stages: tuple[str, ...] = ()
    """All that it loads, one after the other."""


class Ending(NamedTuple):
    """Why an engine ended, as far as its exit code and its log tell."""

    retry: Retry = Retry.LATER
    """When to start the next, if it was not ready yet."""
    wanted_mib: Mapping[Device, int] | None = None
    """Memory ran out: what it asked for last, by device as it counts them (empty: unknown). None: not for that."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that is needed to start an engine for a model."""

    model: ModelConfig
    chosen: Alternative
    shows: Mapping[str, str] = field(default_factory=dict)
    """Variables that show it the GPUs that were chosen for it, and no others."""
    load_stall_sec: float = 60
    load_limit_sec: float | None = None
    stop_grace_sec: float = 10


class EngineHandle(Protocol):
    """One engine, from its start to its end. It watches itself."""

    when_load_moves: Callable[[], None]

    @property
    def endpoint(self) -> Endpoint: ...

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that hold its memory, with what they have started; none where that cannot be seen here."""

    @property
    def alive(self) -> bool: ...

    @property
    def exited(self) -> asyncio.Task[Reason]:
        """Done when it is gone, and with all that it has started."""

    @property
    def exit_code(self) -> int | None:
        """Negative: the signal that ended it; None while it lives, or where there is none."""

    @property
    def ending(self) -> Ending:
        """Once it has exited."""

    @property
    def out_of_memory(self) -> bool:
        """The system has killed it for want of memory."""

    @property
    def was_killed(self) -> bool:
        """It ended because `kill` was called."""

    @property
    def load_progress(self) -> LoadProgress | None:
        """While it loads, if it tells."""

    async def ready(self) -> None:
        """Wait until it serves. Raises EngineFailed when it ended, hangs or takes too long."""

    async def healthy(self, limit_sec: float = PROBE_LIMIT_SEC) -> bool:
        """Whether it is alive and answers in time."""

    async def facts(self) -> Facts | None:
        """What it says of itself; None if it says nothing."""

    async def stop(self) -> None:
        """Ask it to go, make it go after the grace time. Returns when it and all it started are gone.

        Nobody must be connected to it any more: engines wait for whoever is.
        """

    def kill(self, reason: str = "") -> None:
        """At once; `reason` is what will be said of its end."""

    def last_words(self, lines: int = 10) -> list[str]:
        """The end of what it has said."""


class Fallback(NamedTuple):
    """Another way to run a model that did not load."""

    model: ModelConfig
    why: str
    """For the log."""


class EngineBackend(Planner, Protocol):
    """A kind of engine: plans (see `Planner`), starts, and knows what its models are."""

    @property
    def name(self) -> str:
        """For people and metrics, such as `llama-server`."""

    @property
    def origin(self) -> str:
        """Where its program comes from, for people; empty if each model names its own."""

    @property
    def uses_gpus(self) -> bool:
        """Whether engines of this kind may use GPUs."""

    def gpu_list(self, asked: Collection[int]) -> ListedGpus | None:
        """Return the source of GPUs that no driver reports but these engines do; None if they report none.

        `asked` are numbers of GPUs to offer even if they share memory with the processor.
        """

    def check_runs(self) -> None:
        """Raises Unusable if no model of this kind can be run. Blocking."""

    def validate(self, model: ModelConfig) -> Iterator[str]:
        """What would keep a model from loading, for `llama-router check`. Blocking.

        Raises NoEngine for what keeps every model of this kind from it.
        """

    def warnings(self, models: Mapping[str, ModelConfig]) -> Iterator[str]:
        """What is odd about models of this kind, before anybody asks for one. Blocking."""

    async def launch(self, order: Launch, log: LogRing) -> EngineHandle:
        """Raises EngineFailed when nothing could be started."""

    def fallback(self, model: ModelConfig) -> Fallback | None:
        """What to try at once after a load that failed by itself; None: nothing else."""
