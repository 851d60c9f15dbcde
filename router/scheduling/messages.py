"""Messages of the scheduler: events that it receives, effects that it returns, and which models there are.

All immutable. Times are seconds on one monotonic clock, memory is MiB. Nothing here decides anything.
Messages of every request are msgspec structs, created in a third of the time of a frozen dataclass.
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
"""MiB by device for one way to run a model."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Model as the scheduler knows it. A changed `revision` requires another engine."""

    alias: str
    slots: int = 1
    most_slotless: int = 200
    """Maximum number of concurrent requests that need no slot, so that they cannot flood the engine."""
    pinned: bool = False
    kept: bool = False
    """True if the model stays loaded without requests: an engine that dies is replaced."""
    idle_timeout_sec: float | None = None
    """None: the policy's; `math.inf`: never unloaded for being idle."""
    expected_load_sec: float = 5
    """First guess; measured load times replace it."""
    revision: Hashable = None


class EngineState(Word):
    LOADING = "loading"
    """Until it is ready, also when it wakes up."""
    READY = "ready"
    ASLEEP = "asleep"
    """It holds its weights in RAM and serves nothing until it is woken up."""
    DRAINING = "draining"
    STOPPING = "stopping"
    """Until it has exited, or is asleep."""


class ModelState(Word):
    """State of the model's engine, or why it has none."""

    OFF = "off"
    LOADING = EngineState.LOADING.value
    READY = EngineState.READY.value
    ASLEEP = EngineState.ASLEEP.value
    DRAINING = EngineState.DRAINING.value
    STOPPING = EngineState.STOPPING.value
    FAILED = "failed"


class Refusal(Word):
    """Reason why a request is refused."""

    DISPLACED = "displaced"
    """Removed from a full queue by a request of higher priority."""
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_FAILED = "model_failed"
    INSUFFICIENT_MEMORY = "insufficient_memory"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL_ERROR = "internal_error"
    """The router made a mistake."""


class StopCause(Word):
    """Reason why the router stops an engine."""

    IDLE = "idle"
    EVICTED = "evicted"
    DRAINED = "drained"
    MANUAL = "manual"
    RELOAD = "reload"
    ABANDONED = "abandoned"
    SHUTDOWN = "shutdown"


class Retry(Word):
    """When to retry a failed load."""

    LATER = "later"
    AT_ONCE = "at_once"
    """Another program took its port first, which is not the model's fault; or it was started with a projector that
    was not configured."""
    NEVER = "never"
    """The engine rejects the model's flags, and would reject them again."""


# --- events ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Configured:
    """The configuration was set or changed: removed models are unloaded, changed ones drained and restarted."""

    at: float
    models: Mapping[str, ModelSpec]
    policy: Policy


@dataclass(frozen=True, slots=True)
class MemoryChanged:
    """Memory that all engines together may use of each device from now on."""

    at: float
    budgets: Placement
    capacity: Placement = field(default_factory=dict)
    """Budget if other programs used no memory; missing devices have their budget."""


class Submit(msgspec.Struct, frozen=True):
    at: float
    request_id: str
    alias: str
    priority: Priority = Priority.NORMAL
    slotless: bool = False
    """True if the request needs an engine but no slot, because nothing is computed for it."""


class Finished(msgspec.Struct, frozen=True):
    """The request has ended in any state: answered, failed, or abandoned by its client."""

    at: float
    request_id: str
    served: bool = True
    computed: bool = True
    """True if tokens were computed; refused or merely counted requests do not contribute to service times."""


@dataclass(frozen=True, slots=True)
class Displace:
    """A waiting request must make room for one of higher priority, as decided outside the scheduler."""

    at: float
    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Requeue:
    """The engine of a granted request failed before the first byte of its response."""

    at: float
    request_id: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Inspected:
    """Reply to `Inspect`: possible placements of the model, best first, or the problem."""

    at: float
    alias: str
    placements: tuple[Placement, ...] = ()
    problem: str | None = None
    need: str = ""
    """The footprint in words, with its source, for people."""
    expected_load_sec: float | None = None
    """Expected load time from earlier loads or the size of the model."""
    load_is_known: bool = False
    """True if the load time was measured, false if it is a guess."""
    advice: str = ""
    """Advice on what would fit, if the model does not."""
    for_good: bool = False
    """True if the problem remains until the model's flags or file change."""


@dataclass(frozen=True, slots=True)
class EngineReady:
    at: float
    engine_id: int
    asleep: Placement | None = None
    """Memory that it is expected to hold asleep; None: it cannot sleep."""
    wake_sec: float | None = None
    """Expected time to wake it up, as measured earlier; None: unknown."""


@dataclass(frozen=True, slots=True)
class EngineAsleep:
    """Reply to `PutToSleep` once the memory is released; otherwise `EngineExited` follows."""

    at: float
    engine_id: int
    placement: Placement
    """Memory that it holds asleep."""


@dataclass(frozen=True, slots=True)
class EngineMeasured:
    """Measured memory of an engine, which becomes its reservation."""

    at: float
    engine_id: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class EngineAlive:
    """Reply to `Probe` if the engine responds; otherwise `EngineExited` follows."""

    at: float
    engine_id: int


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The process has exited. `EngineExited` follows once its memory is released."""

    at: float
    engine_id: int


@dataclass(frozen=True, slots=True)
class EngineExited:
    """The process has exited and its memory is released."""

    at: float
    engine_id: int
    reason: str
    out_of_memory: bool = False
    """True if it ran out of memory. The next inspection reports a larger footprint."""
    retry: Retry = Retry.LATER


@dataclass(frozen=True, slots=True)
class Load:
    """Requested by an operator (`evict=True`) or by preload, which never evicts another model."""

    at: float
    alias: str
    evict: bool = True


@dataclass(frozen=True, slots=True)
class Eject:
    at: float
    alias: str


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """A client sets the idle timeout of a model's current engine."""

    at: float
    alias: str
    idle_sec: float
    """0: unload as soon as it is idle; `math.inf`: keep it until room is needed."""


@dataclass(frozen=True, slots=True)
class Pin:
    """An operator pins a model for a while, also if it is loaded only later."""

    at: float
    alias: str
    until: float | None
    """None: from now on as configured."""


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
    | EngineAsleep
    | EngineMeasured
    | EngineAlive
    | EngineLost
    | EngineExited
    | Load
    | Eject
    | KeepAlive
    | Pin
    | Reset
    | ShutDown
    | Tick
)


# --- effects --------------------------------------------------------------------------------------------


class Grant(msgspec.Struct, frozen=True):
    """The request has been granted a slot of the engine: send it."""

    request_id: str
    engine_id: int


@dataclass(frozen=True, slots=True)
class Reject:
    request_id: str
    refusal: Refusal
    reason: str
    retry_after_sec: float | None = None
    is_final: bool = False
    """True if a retry would be refused again until the configuration or the machine changes."""


@dataclass(frozen=True, slots=True)
class Inspect:
    """Inspect a model before engines are stopped for it: check its file and determine its memory."""

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
class PutToSleep:
    """Have an idle engine release its GPUs. It serves nothing until `WakeUp`."""

    engine_id: int


@dataclass(frozen=True, slots=True)
class WakeUp:
    """Have a sleeping engine serve again: `EngineReady` or `EngineExited` follows."""

    engine_id: int


@dataclass(frozen=True, slots=True)
class Probe:
    """A request failed on this engine: check whether it still responds. It admits no requests until then."""

    engine_id: int


@dataclass(frozen=True, slots=True)
class Transition:
    """The state of a model's engine changed, or of a model that has none."""

    alias: str
    state: ModelState
    reason: str
    engine_id: int | None = None
    """None: the model has no engine, or must not have one."""


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """The model will be loaded once the requests of others have finished; its files may be read until then."""

    alias: str


Effect = Grant | Reject | Inspect | StartEngine | StopEngine | PutToSleep | WakeUp | Probe | Transition | ReadAhead
