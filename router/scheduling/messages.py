"""What the scheduler is told (events), what it answers (effects), and which models there are.

All immutable. Times are seconds on one monotonic clock, memory is MiB. Nothing here decides anything.
What every request needs is a msgspec struct, which is made in a third of the time that a frozen dataclass takes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import msgspec

from router.scheduling.policy import Policy
from router.scheduling.queue import Priority
from router.system.devices import Device
from router.system.words import Word

Placement = Mapping[Device, int]
"""Where a model may live, and the MiB that it takes there."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the scheduler must know of a model. A change of `revision` means: another engine is needed."""

    alias: str
    slots: int = 1
    most_slotless: int = 200
    """How many requests that need none may be with its engine at once, so that they cannot flood it."""
    pinned: bool = False
    kept: bool = False
    """It is to be there although nobody asks for it: when its engine has died, another one is started."""
    idle_timeout_sec: float | None = None
    """None: the policy's; `math.inf`: never unloaded for being idle."""
    expected_load_sec: float = 5
    """First guess; measured load times replace it."""
    revision: Hashable = None


class EngineState(Word):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"


class ModelState(Word):
    """That of its engine, or why it has none."""

    OFF = "off"
    LOADING = EngineState.LOADING.value
    READY = EngineState.READY.value
    DRAINING = EngineState.DRAINING.value
    STOPPING = EngineState.STOPPING.value
    FAILED = "failed"


class Refusal(Word):
    """Why a request is not served."""

    DISPLACED = "displaced"
    """It waited where there was no more room, and one of a higher priority took its place."""
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_FAILED = "model_failed"
    INSUFFICIENT_MEMORY = "insufficient_memory"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL_ERROR = "internal_error"
    """The router made a mistake."""


class StopCause(Word):
    """Why an engine is stopped by us."""

    IDLE = "idle"
    EVICTED = "evicted"
    DRAINED = "drained"
    MANUAL = "manual"
    RELOAD = "reload"
    ABANDONED = "abandoned"
    SHUTDOWN = "shutdown"


class Retry(Word):
    """When to try again after a load that failed."""

    LATER = "later"
    AT_ONCE = "at_once"
    """Somebody else was quicker to take its port, for which the model can't be blamed; or it had a projector that
    nobody had asked for."""
    NEVER = "never"
    """It does not take the flags of its model: the next one would not, either."""


# --- events ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Configured:
    """The configuration is (now) this: models that are missing go, changed ones drain and come back."""

    at: float
    models: Mapping[str, ModelSpec]
    policy: Policy


@dataclass(frozen=True, slots=True)
class MemoryChanged:
    """What our engines together may use of each device from now on."""

    at: float
    budgets: Placement
    capacity: Placement = field(default_factory=dict)
    """What they might use if nobody else used anything; for devices that are missing, the budget."""


class Submit(msgspec.Struct, frozen=True):
    at: float
    request_id: str
    alias: str
    priority: Priority = Priority.NORMAL
    slotless: bool = False
    """It needs an engine, but none of its slots: nothing is computed for it."""


class Finished(msgspec.Struct, frozen=True):
    """The request is over wherever it was: answered, failed, or given up by its client."""

    at: float
    request_id: str
    served: bool = True
    computed: bool = True
    """Whoever was served got tokens that were computed; what is refused, or only counted, says nothing of how
    long that takes."""


@dataclass(frozen=True, slots=True)
class Displace:
    """A request that waits has to make room for one of a higher priority, which is somebody else's to know."""

    at: float
    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Requeue:
    """The engine of a granted request broke before the first byte of its answer."""

    at: float
    request_id: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Inspected:
    """The answer to `Inspect`: where the model could be placed, best first, or what is wrong with it."""

    at: float
    alias: str
    placements: tuple[Placement, ...] = ()
    problem: str | None = None
    need: str = ""
    """The footprint in words, with its source, for people."""
    expected_load_sec: float | None = None
    """What loading it takes, as far as earlier loads or its size tell."""
    load_is_known: bool = False
    """That was measured; else it is a guess."""
    advice: str = ""
    """What would fit, when it does not."""
    for_good: bool = False
    """The problem stays until the model's flags or its file are others."""


@dataclass(frozen=True, slots=True)
class EngineReady:
    at: float
    engine_id: int


@dataclass(frozen=True, slots=True)
class EngineMeasured:
    """What an engine really takes: it is booked with that from now on."""

    at: float
    engine_id: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class EngineAlive:
    """The answer to `Probe` when the engine is well; when it is not, `EngineExited` comes instead."""

    at: float
    engine_id: int


@dataclass(frozen=True, slots=True)
class EngineLost:
    """Its process is gone. Its memory may not be back yet: `EngineExited` follows when it is."""

    at: float
    engine_id: int


@dataclass(frozen=True, slots=True)
class EngineExited:
    """The process is gone and its memory is back."""

    at: float
    engine_id: int
    reason: str
    out_of_memory: bool = False
    """That is what ended it. The next inspection will tell of a larger footprint."""
    retry: Retry = Retry.LATER


@dataclass(frozen=True, slots=True)
class Load:
    """Asked for by hand (`evict=True`) or preload, which never costs another model its place."""

    at: float
    alias: str
    evict: bool = True


@dataclass(frozen=True, slots=True)
class Eject:
    at: float
    alias: str


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """A client says how long a model's engine is to stay once it is idle, however long it lives."""

    at: float
    alias: str
    idle_sec: float
    """0: it goes as soon as nobody uses it; `math.inf`: it stays while nobody else needs the room."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget the failures of a model."""

    at: float
    alias: str


@dataclass(frozen=True, slots=True)
class ShutDown:
    at: float


@dataclass(frozen=True, slots=True)
class Tick:
    """`Scheduler.wake_at` has come."""

    at: float


Event = (
    Configured
    | MemoryChanged
    | Submit
    | Finished
    | Displace
    | Requeue
    | Inspected
    | EngineReady
    | EngineMeasured
    | EngineAlive
    | EngineLost
    | EngineExited
    | Load
    | Eject
    | KeepAlive
    | Reset
    | ShutDown
    | Tick
)


# --- effects --------------------------------------------------------------------------------------------


class Grant(msgspec.Struct, frozen=True):
    """The request has a slot of the engine: send it."""

    request_id: str
    engine_id: int


@dataclass(frozen=True, slots=True)
class Reject:
    request_id: str
    refusal: Refusal
    reason: str
    retry_after_sec: float | None = None
    is_final: bool = False
    """It would be refused again, until somebody changes the configuration or the machine."""


@dataclass(frozen=True, slots=True)
class Inspect:
    """Look before anything is stopped for this model: is its file there and sound, and what does it take?"""

    alias: str


@dataclass(frozen=True, slots=True)
class StartEngine:
    engine_id: int
    alias: str
    placement: Placement


@dataclass(frozen=True, slots=True)
class StopEngine:
    engine_id: int
    cause: StopCause


@dataclass(frozen=True, slots=True)
class Probe:
    """A request broke on this engine: find out whether it still lives. It admits nobody until then."""

    engine_id: int


@dataclass(frozen=True, slots=True)
class Transition:
    """The state of a model's engine changed, or of a model that has none."""

    alias: str
    state: ModelState
    reason: str
    engine_id: int | None = None
    """None: the model has none, or is not to have one."""


Effect = Grant | Reject | Inspect | StartEngine | StopEngine | Probe | Transition
