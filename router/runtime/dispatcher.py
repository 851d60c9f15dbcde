"""Dispatcher: the only writer of the scheduler. It posts events and carries out the resulting effects.

Everything here runs on one event loop and nothing in `_post` waits: spawning, stopping, probing and looking at
files happen in tasks of their own, whose results come back as events. So no lock is needed, and a slow load or
stop of one model never delays a request to another. A request that meets a ready engine with a free slot is
granted within the call that submits it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from router.config.resolved import DEFAULT_ENGINE, Config, ModelConfig, idle_timeout
from router.config.schema import MaxWait, Patience, Scheduling, WaitFactor
from router.engines.base import EngineBackend, Facts, Fallback, Launch
from router.engines.launcher import LAST_PORT
from router.engines.log_ring import LogRing
from router.engines.running import RunningEngine
from router.engines.upstream import EnginePool
from router.hardware import page_cache
from router.hardware.devices import Devices
from router.memory.ledger import Account, Ledger
from router.memory.manager import MemoryManager
from router.memory.measurements import Learned
from router.memory.plan import Inspection, Site, Unusable
from router.observe.events import (
    Attempt,
    Breakdown,
    EngineEnded,
    Events,
    LoadMoved,
    ModelChanged,
    ModelsListed,
    ServerChanged,
    ServerState,
)
from router.observe.reasons import Problem, Reason, Reasons
from router.runtime.background import Background
from router.scheduling.messages import (
    Configured,
    Displace,
    Effect,
    Eject,
    EngineAlive,
    EngineAsleep,
    EngineExited,
    EngineLost,
    EngineReady,
    Event,
    Finished,
    Grant,
    Inspect,
    Inspected,
    KeepAlive,
    Load,
    ModelSpec,
    ModelState,
    Pin,
    Probe,
    PutToSleep,
    ReadAhead,
    Refusal,
    Reject,
    Requeue,
    Reset,
    Retry,
    ShutDown,
    StartEngine,
    StopCause,
    StopEngine,
    Submit,
    Tick,
    Transition,
    WakeUp,
)
from router.scheduling.policy import CONSTANTS, ByPriority, Policy
from router.scheduling.queue import Priority, Request
from router.scheduling.residency import Model
from router.scheduling.scheduler import Scheduler
from router.scheduling.wait_estimate import Forecast
from router.scheduling.wait_reason import why
from router.system.readings import apart
from router.system.tasks import Tasks

_log = logging.getLogger("router")

_POSITIONS_VALID_SEC = 1
_SEE_LOG = "the router's log says why"
_DYING_SEC = 1.0
"""Time for an unresponsive engine to exit by itself, so that the real reason of its exit is recorded."""
_SAVING_SEC = 5.0
"""Time for saving the conversations of an engine that is stopped."""
_ENDING_SEC = 5.0
"""The same for one that has told that it is ending."""


@dataclass(frozen=True, slots=True)
class LastExit:
    """Exit of a model's last engine."""

    reason: str
    at: float
    """Seconds since the epoch."""
    wanted: bool
    """True if the router had stopped the engine."""
    code: int | None = None
    """Exit code; negative: the signal that ended it; None if it could not be started."""
    out_of_memory: bool = False
    log_tail: tuple[str, ...] = ()


class Ticket(msgspec.Struct, eq=False):
    """State of a request: waiting, granted to `engine`, or refused with `rejection`."""

    id: str
    alias: str
    priority: Priority
    arrival_sec: float
    granted_sec: float
    client: str = ""
    """Its name, if its key has one."""
    slotless: bool = False
    queue_sec: float = 0.0
    """Time in the queue, set once the request is decided."""
    load_sec: float = 0.0
    """Part of that time spent on loading the model."""
    engine: RunningEngine | None = None
    rejection: Reject | None = None
    retries: int = 0
    """Number of returns to the queue after an engine failure."""
    attempts: tuple[Attempt, ...] = ()
    """The grants before these returns."""
    _listener: Callable[[], None] | None = None

    @property
    def decided(self) -> bool:
        return self.engine is not None or self.rejection is not None

    def when_decided(self, listener: Callable[[], None]) -> None:
        """Call `listener` once after the decision, in a separate iteration of the event loop."""
        self._listener = listener

    def tell_nobody(self) -> None:
        """Drop the listener, which may refer to the ticket: the two would keep each other alive."""
        self._listener = None

    def decide(self, now: float, engine: RunningEngine | None, rejection: Reject | None) -> None:
        self.granted_sec = now
        self.queue_sec = now - self.arrival_sec
        self.engine = engine
        self.rejection = rejection
        if engine is not None:
            self.load_sec = engine.loading_sec(since=self.arrival_sec)
        if self._listener is not None:
            asyncio.get_running_loop().call_soon(self._listener)
            self._listener = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Waiting request, as shown to users."""

    id: str
    alias: str
    priority: Priority
    position: int
    """Position in the queue; 1 is served next."""
    waited_sec: float
    expected_sec: float | None
    """Expected time until it gets a slot; None if measurements do not suffice."""
    why: str
    client: str
    """Its name, if its key has one."""


class _Sleepless(NamedTuple):
    """Engine that could not be put to sleep."""

    what: Hashable
    """What that holds for; see `_what_sleeps`."""
    revision: Hashable
    """Revision of its model."""
    reason: str


@dataclass(slots=True)
class Counts:
    """Number of requests for one model since the start."""

    submitted: int = 0
    served: int = 0
    rejected: int = 0


class Dispatcher:
    """Owner of the scheduler, the engines and the waiting requests. Create and use it on one event loop."""

    def __init__(
        self,
        config: Config,
        backends: Mapping[str, EngineBackend],
        devices: Devices,
        learned: Learned,
        events: Events,
    ) -> None:
        self.config = config
        self.events = events
        self._backends = backends
        self.devices = devices
        self.scheduler = Scheduler()
        self._memory_manager = MemoryManager(
            config.system, self.backend_of, devices, learned, self.scheduler, self._post
        )
        self.logs: dict[str, LogRing] = {}
        """Log of each model; a running engine also has its own."""
        self.engine_file: Callable[[str], Callable[[bytes], None] | None] = lambda alias: None
        """Returns a second destination for the output of an alias's engines; None: none."""
        self.states_of: Callable[[str], Iterable[Path]] = lambda alias: ()
        """Returns the files of an alias's saved conversations, the likeliest first."""
        self.running: dict[int, RunningEngine] = {}
        self.status = ServerState.INITIALIZING
        self.started_at = time.time()
        """Start time in seconds since the epoch, for display; use `uptime_sec` for durations."""
        self._started_sec = time.monotonic()
        self.counts: dict[str, Counts] = defaultdict(Counts)
        self.exits: dict[str, LastExit] = {}
        self._reasons = Reasons()
        self.crashes: dict[str, int] = defaultdict(int)
        self.restarts: dict[str, int] = defaultdict(int)
        """Number of engines started because the previous one had died, by model."""
        self._tickets: dict[str, Ticket] = {}
        self._positions: dict[str, tuple[float, dict[str, int]]] = {}
        self._forecast = Forecast(-math.inf, {}, 0)
        self.background = Background()
        self._pending: deque[Event] = deque()
        self._posting = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._tasks = Tasks()
        self._inspections: set[asyncio.Task[None]] = set()
        self._stopping: set[int] = set()
        self._fallen_back: dict[str, tuple[Hashable, Fallback]] = {}
        """By alias, the revision that did not load, and the other way in which it is run."""
        self._sleepless: dict[str, _Sleepless] = {}
        """What could not sleep, by alias."""
        self._preloading: set[str] = set()
        self._told: set[str] = set()
        """Warnings about models that have been logged."""
        self._changes: dict[str, set[asyncio.Future[None]]] = {}
        """Futures waiting for a change of a model, or of any model under an empty name."""
        self._preload: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def uptime_sec(self) -> float:
        return time.monotonic() - self._started_sec

    @property
    def backend(self) -> EngineBackend:
        """Backend of models whose entry names no engine."""
        return self._backends[DEFAULT_ENGINE]

    def backend_of(self, model: ModelConfig) -> EngineBackend:
        """Backend of a model's engine."""
        return self._backends[model.engine]

    @property
    def ledger(self) -> Ledger:
        """Ledger of the memory of each device."""
        return self._memory_manager.ledger

    # --- life -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start: configure the scheduler, watch memory, and begin to preload."""
        self._configure()
        self._watch = self.background.keep("watch of memory", self._memory_manager.watch)
        self.status = ServerState.READY
        self.events.publish(ServerChanged(self.status, time.time()))
        if self._to_preload():
            self._preload = self._tasks.begin(self._preload_models(), "preload")

    async def shut_down(self) -> None:
        """Refuse waiting requests, let those in flight finish within the grace period, stop every engine."""
        self.status = ServerState.SHUTTING_DOWN
        self.events.publish(ServerChanged(self.status, time.time()))
        for task in (self._preload, self._watch, *self._inspections):
            if task is not None:
                task.cancel()
        self._post(ShutDown(time.monotonic()))
        deadline = time.monotonic() + self.config.system.shutdown_grace_sec
        while self.scheduler.engines and (left := deadline - time.monotonic()) > 0:
            await self._next_change(None, left)
        for engine_id in list(self.scheduler.engines):
            self._stop(engine_id)
        await self._tasks.ended()
        if self._timer is not None:
            self._timer.cancel()

    def kill_engines(self) -> None:
        """Kill all engines without a grace period, for a second shutdown signal."""
        for running in self.running.values():
            running.handle.kill()

    def apply(self, config: Config) -> None:
        """Apply a new configuration. Engines of unchanged entries keep running."""
        models = {alias: self._as_it_loads(model, config) for alias, model in config.models.items()}
        self.config = replace(config, models=models)
        self._configure()
        self.events.publish(ModelsListed(time.time()))

    # --- requests ---------------------------------------------------------------------------------------

    def submit(
        self, request_id: str, alias: str, priority: Priority, client: str = "", *, slotless: bool = False
    ) -> Ticket:
        """Request a slot, or only an engine. Every ticket must be passed to `finish`, including cancelled ones."""
        now = time.monotonic()
        ticket = Ticket(request_id, alias, priority, now, now, client, slotless)
        self._tickets[request_id] = ticket
        self.counts[alias].submitted += 1
        self._post(Submit(now, request_id, alias, priority, slotless))
        return ticket

    def finish(self, ticket: Ticket, *, served: bool, computed: bool) -> None:
        """End a request in any state: answered, with or without tokens, failed, or abandoned."""
        ticket.tell_nobody()
        if self._tickets.pop(ticket.id, None) is not None:
            self.counts[ticket.alias].served += served
            self._post(Finished(time.monotonic(), ticket.id, served, computed))
            engine = ticket.engine
            if computed and engine is not None and not engine.account.has_answered:
                engine.account.has_answered = True
                self._tasks.begin(self._memory_manager.answered(engine.account), f"measuring of {ticket.alias}")

    def displace(self, ticket: Ticket, reason: str) -> None:
        """Refuse a waiting request at once because one of higher priority needs the memory of its body."""
        self._post(Displace(time.monotonic(), ticket.id, reason))

    def requeue(self, ticket: Ticket, reason: str) -> None:
        """Return a request to the head of its queue: its engine failed before the first byte of a response."""
        now = time.monotonic()
        if ticket.engine is not None:
            granted_sec, failed_sec = ticket.granted_sec - ticket.arrival_sec, now - ticket.arrival_sec
            ticket.attempts += (Attempt(ticket.engine.id, granted_sec, failed_sec, reason),)
        ticket.engine = None
        ticket.retries += 1
        self._post(Requeue(now, ticket.id, reason))

    def is_taken(self, request_id: str) -> bool:
        return request_id in self._tickets

    def position(self, ticket: Ticket) -> int | None:
        """Position in the queue, 1 being served next; None if not waiting. The value is at most a second old."""
        now = time.monotonic()
        counted_sec, positions = self._positions.get(ticket.alias, (-math.inf, {}))
        if now - counted_sec > _POSITIONS_VALID_SEC or ticket.id not in positions:
            model = self.scheduler.models.get(ticket.alias)
            positions = {request.id: place for place, request in model.queue.places()} if model is not None else {}
            self._positions[ticket.alias] = now, positions
        return positions.get(ticket.id)

    def waits(self, alias: str, most: int) -> list[Waiting]:
        """First `most` waiting requests of a model, in the order of service."""
        model = self.scheduler.models.get(alias)
        if model is None or not model.queue:
            return []
        now = time.monotonic()
        reasons = [why(model, now, slotless=slotless) for slotless in (False, True)]
        return [
            self._wait(model, request, place, reasons[request.slotless], now)
            for place, request in islice(model.queue.places(), most)
        ]

    def wait_of(self, ticket: Ticket, *, is_one_of_many: bool = False) -> Waiting | None:
        """State of a waiting request; None if it is not waiting. For one of many, no forecast is made only because
        it came after the last one."""
        model = self.scheduler.models.get(ticket.alias)
        position = self.position(ticket)
        if model is None or position is None:
            return None
        now = time.monotonic()
        reason = why(model, now, slotless=ticket.slotless)
        return self._wait(model, ticket, position, reason, now, is_one_of_many=is_one_of_many)

    def _forecast_with(self, waiting: Ticket | Request | None, now: float) -> Forecast:
        """Return a forecast, shared by all waiting requests while it is valid and includes the one that asks."""
        known = self._forecast
        if now - known.at > known.told_sec or (waiting is not None and waiting.arrival_sec > known.at):
            self._forecast = self.scheduler.forecast(now)
        return self._forecast

    def _wait(
        self,
        model: Model,
        waiting: Ticket | Request,
        position: int,
        reason: str,
        now: float,
        *,
        is_one_of_many: bool = False,
    ) -> Waiting:
        forecast = self._forecast_with(None if is_one_of_many else waiting, now)
        return Waiting(
            id=waiting.id,
            alias=waiting.alias,
            priority=waiting.priority,
            position=position,
            waited_sec=now - waiting.arrival_sec,
            expected_sec=forecast.wait_sec(waiting.id, now),
            why=reason if position == 1 else f"{position - 1} before it; {reason}",
            client=self._tickets[waiting.id].client,
        )

    async def plan(self, alias: str) -> Inspection:
        """Return the ways to run a model on this machine. Raises Unusable."""
        return await self._memory_manager.plan(self.config.models[alias], self.config.system)

    def sites(self) -> list[Site]:
        """Devices as planning sees them."""
        ground = self._memory_manager.ground()
        return [*ground.gpus, ground.host]

    def in_full(self, alias: str, text: str) -> str:
        """Full text of a reason for operators, with paths and engine output."""
        return self._reasons.in_full(alias, text)

    # --- operators --------------------------------------------------------------------------------------

    def ask_to_load(self, alias: str) -> ModelState | None:
        """Request a model to be loaded. Returns its state if it is already final; `eject` cancels the request."""
        self._post(Load(time.monotonic(), alias))
        self.events.publish(LoadMoved(alias, time.time()))  # its state may not change for long
        return self._settled(alias)

    async def load(self, alias: str) -> ModelState:
        """Load a model; returns its state once it is ready, failed, or cancelled."""
        self.ask_to_load(alias)
        return await self._until_settled(alias)

    def begin_eject(self, alias: str) -> None:
        """Start to unload a model after its requests in flight."""
        self._post(Eject(time.monotonic(), alias))

    async def eject(self, alias: str) -> None:
        """Unload a model after its requests in flight; returns once its engines have exited."""
        going = {engine.id for engine in self.scheduler.models[alias].engines}
        self.begin_eject(alias)
        while not going.isdisjoint(self.scheduler.engines):
            await self._next_change(alias)

    def keep_alive(self, alias: str, idle_sec: float) -> None:
        """Set the idle timeout of a model's current engines; 0: unload as soon as they are idle."""
        self._post(KeepAlive(time.monotonic(), alias, idle_sec))

    def pin(self, alias: str, for_sec: float | None) -> None:
        """Pin a model for this long, also if it is loaded only later; None: from now on as configured."""
        now = time.monotonic()
        self._post(Pin(now, alias, None if for_sec is None else now + for_sec))

    def reset(self, alias: str) -> None:
        self._post(Reset(time.monotonic(), alias))

    async def _until_settled(self, alias: str) -> ModelState:
        while (state := self._settled(alias)) is None:
            await self._next_change(alias)
        return state

    def _settled(self, alias: str) -> ModelState | None:
        """State of a model; None while a load is in progress or requested."""
        model = self.scheduler.models.get(alias)
        if model is None:
            return ModelState.OFF
        state = self.scheduler.state(alias)
        is_settled = state in (ModelState.READY, ModelState.FAILED) or (
            state in (ModelState.OFF, ModelState.ASLEEP) and model.wanted_since_sec is None
        )
        return state if is_settled else None

    async def _next_change(self, alias: str | None, timeout_sec: float | None = None) -> None:
        """Wait until the state of a model (None: of any model) changes."""
        changed = asyncio.get_running_loop().create_future()
        waiters = self._changes.setdefault(alias or "", set())
        waiters.add(changed)
        try:
            await asyncio.wait({changed}, timeout=timeout_sec)
        finally:  # also after a timeout or cancellation
            waiters.discard(changed)

    # --- the loop ---------------------------------------------------------------------------------------

    def _post(self, event: Event) -> None:
        """Process one event at a time; events posted by effects are queued."""
        if self._posting:
            self._pending.append(event)
            return
        self._posting = True
        scheduler = self.scheduler
        try:
            while True:
                try:
                    effects = scheduler.step(event)
                except Exception:
                    effects = self._broken_at(event)
                for effect in effects:
                    try:
                        self._carry_out(effect)
                    except Exception:  # neither others nor those concerned must wait for it
                        _log.exception("effect could not be carried out: %s", effect)
                        self._make_good(effect)
                if not self._pending:
                    break
                event = self._pending.popleft()
        finally:
            self._posting = False
        if scheduler.wake_at < self._timer_at:
            self._set_timer()

    def _broken_at(self, event: Event) -> list[Effect]:
        """Handle an exception of the scheduler. Returns the effects collected before it was raised."""
        _log.exception("the scheduler failed on the event %s", event)
        if isinstance(event, Submit | Requeue):
            self._turn_away(event.request_id)
        return self.scheduler.wanted

    def _make_good(self, effect: Effect) -> None:
        """Report a failed effect to the requests or engines concerned."""
        now = time.monotonic()
        match effect:
            case Grant(request_id) | Reject(request_id):
                self._turn_away(request_id)
            case Inspect(alias):
                self._pending.append(
                    Inspected(now, alias, problem=f"{alias!r} could not be inspected; {_SEE_LOG}")
                )
            case StartEngine(engine_id):
                self._pending.append(EngineExited(now, engine_id, f"it could not be started; {_SEE_LOG}"))
            case StopEngine(engine_id) | Probe(engine_id) | PutToSleep(engine_id) | WakeUp(engine_id):
                if (running := self.running.get(engine_id)) is not None:
                    running.handle.kill()

    def _turn_away(self, request_id: str) -> None:
        """Refuse a request with an internal error."""
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            reason = "Internal error of the router; see its log."
            ticket.decide(time.monotonic(), None, Reject(request_id, Refusal.INTERNAL_ERROR, reason))

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Grant(request_id, engine_id):
                ticket = self._tickets.get(request_id)
                if ticket is None:
                    self._pending.append(Finished(time.monotonic(), request_id, served=False))
                else:
                    ticket.decide(time.monotonic(), self.running[engine_id], None)
            case Reject(request_id):
                ticket = self._tickets.get(request_id)
                if ticket is not None:
                    self.counts[ticket.alias].rejected += 1
                    ticket.decide(time.monotonic(), None, effect)
            case Inspect(alias):
                inspection = self._tasks.begin(self._inspect(alias), f"inspection of {alias}")
                self._inspections.add(inspection)
                inspection.add_done_callback(self._inspections.discard)
            case StartEngine(engine_id, alias, placement):
                model = self.config.models[alias]
                account = self._memory_manager.open(engine_id, alias, placement)
                self._tasks.begin(self._live(account, model), f"engine {engine_id} of {alias}")
            case StopEngine(engine_id):
                self._stop(engine_id)
            case PutToSleep(engine_id):
                self._tasks.begin(self._put_to_sleep(engine_id), f"sleep of engine {engine_id}")
            case WakeUp(engine_id):
                self._tasks.begin(self._wake_up(engine_id), f"waking of engine {engine_id}")
            case Probe(engine_id):
                self._tasks.begin(self._probe(engine_id), f"probe of engine {engine_id}")
            case ReadAhead(alias):
                self._tasks.begin(self._read_ahead(alias), f"reading ahead for {alias}")
            case Transition(alias, state, reason, engine_id):
                for waiter in (*self._changes.pop(alias, ()), *self._changes.pop("", ())):
                    if not waiter.done():
                        waiter.set_result(None)
                full = self.in_full(alias, reason)
                self._log_change(alias, state, full)
                self.events.publish(ModelChanged(alias, state, full, time.time(), reason, engine_id))

    def _log_change(self, alias: str, state: ModelState, reason: str) -> None:
        model = self.scheduler.models.get(alias)
        first = model.queue.head() if model is not None else None
        fields = {"alias": alias, "state": state, "reason": reason, "request_id": first.id if first else None}
        _log.info("model %s: %s (%s)", alias, state, reason, extra=fields)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self.scheduler.wake_at
        delay = max(0.0, self._timer_at - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer_at = math.inf
        self._post(Tick(time.monotonic()))

    # --- the world --------------------------------------------------------------------------------------

    async def _inspect(self, alias: str) -> None:
        """Inspect a model for the scheduler; repeat if the configuration changes in the meantime."""
        answer: Inspected | None = None
        model: ModelConfig | None = None
        while model != self.config.models.get(alias):
            model = self.config.models.get(alias)
            system = self.config.system
            try:
                answer = await self._memory_manager.inspect(model, system) if model is not None else None
            except Unusable as unusable:
                other = None if model is None else self._on_another_kind(model, self.config)
                if model is not None and other is not None:
                    self._run_otherwise(model, other, unusable.reason.full)
                    continue
                told = f"{alias!r}: {unusable.reason.told}"
                self._reasons.note(alias, Reason(unusable.reason.full, told))
                answer = Inspected(time.monotonic(), alias, problem=told, for_good=unusable.for_good)
        if answer is not None:
            self._post(answer)

    async def _live(self, account: Account, model: ModelConfig) -> None:
        """Supervise an engine from its start to its end. Its exit is reported in every case."""
        engine_id = account.engine_id
        unwatched = f"the router failed to supervise it; {_SEE_LOG}"
        reason = Reason(unwatched, unwatched)
        before = self.exits.get(model.alias)
        self.restarts[model.alias] += before is not None and not before.wanted
        running: RunningEngine | None = None
        ended_itself = has_been_ready = False
        try:
            started = time.monotonic()
            log = LogRing(self.config.system.log_ring_lines, self.log_of(model.alias).feed)
            handle = await self.backend_of(model).launch(self._order(model, account), log)
            most_idle = self.config.system.http_max_keepalive
            pool = EnginePool(handle.endpoint, most_idle, lambda: handle.alive, handle.kill)
            running = RunningEngine(engine_id, model.alias, handle, pool, account, log, started)
            self.running[engine_id] = running
            account.pids = handle.pids
            if engine_id in self._stopping:
                await handle.stop()
            handle.when_load_moves = lambda: self.events.publish(LoadMoved(model.alias, time.time()))
            await handle.ready()
            running.ready_sec = time.monotonic()
            has_been_ready = True
            asleep = account.chosen.asleep if self._can_sleep(running, model) else None
            wake_sec = self._memory_manager.wake_sec(account)
            self._post(EngineReady(running.ready_sec, engine_id, asleep, wake_sec))
            self._tasks.begin(self._memory_manager.ready(account), f"measuring of {model.alias}")
            self._tasks.begin(self._ask_what_it_has(running), f"question to the engine of {model.alias}")
            reason = await handle.exited
        except Problem as failed:
            reason = failed.reason
            ended_itself = running is not None and not running.handle.alive
        except Exception:
            _log.exception("the engine of %s cannot be supervised", model.alias)
        finally:
            if running is not None:
                await running.handle.stop()
                if running.handle.keeper is not None:
                    running.handle.keeper.end()
                running.log.end()
            self._post(EngineLost(time.monotonic(), engine_id))
            wanted = engine_id in self._stopping
            self._reasons.note(model.alias, reason)
            self.exits[model.alias] = _exit_of(running, reason.full, wanted)
            retry = Retry.LATER if running is None or has_been_ready else running.handle.ending.retry
            self.crashes[model.alias] += not wanted and retry is not Retry.AT_ONCE
            cause = self._cause_of_end(engine_id, running if has_been_ready else None, wanted=wanted)
            self.events.publish(EngineEnded(engine_id, model.alias, cause, wanted, reason.full, time.time()))
            self._stopping.discard(engine_id)
            if running is not None:
                running.pool.close_idle()
                del self.running[engine_id]
            advice = await self._look_for_memory(account, model, running, wanted=wanted)
            if ended_itself and not wanted and advice is None and retry is not Retry.AT_ONCE:
                retry = self._fall_back(model, reason.full, retry)
            told = f"{reason.told}; {advice}" if advice else reason.told
            self._post(EngineExited(time.monotonic(), engine_id, told, advice is not None, retry))

    def _fall_back(self, model: ModelConfig, reason: str, retry: Retry) -> Retry:
        """Return when to retry a failed load: at once, if there is another way."""
        other = self._other_way(model, self.config)
        if other is None or (retry is Retry.NEVER and other.model.engine == model.engine):
            return retry
        self._run_otherwise(model, other, reason)
        return Retry.AT_ONCE

    def _run_otherwise(self, model: ModelConfig, other: Fallback, reason: str) -> None:
        """Remember another way, until the model's entry or files change."""
        _log.warning("model %s did not load, and %s: %s", model.alias, other.why, reason)
        self._fallen_back[model.alias] = model.revision, other
        self.apply(self.config)

    def _other_way(self, model: ModelConfig, config: Config) -> Fallback | None:
        return self.backend_of(model).fallback(model) or self._on_another_kind(model, config)

    def _on_another_kind(self, model: ModelConfig, config: Config) -> Fallback | None:
        other = config.otherwise.get(model.alias)
        if other is None or other.engine == model.engine:
            return None
        names = (self.backend_of(each).name for each in (other, model))
        return Fallback(other, "runs on {} instead of {}".format(*names))

    def _as_it_loads(self, model: ModelConfig, config: Config) -> ModelConfig:
        failed, fallback = self._fallen_back.get(model.alias, (None, None))
        if fallback is None or model.revision == fallback.model.revision:
            return model
        other = self._other_way(model, config) if model.revision == failed else None
        if other is None:
            del self._fallen_back[model.alias]
            return model
        return other.model

    def fallback_of(self, alias: str) -> str | None:
        """Return how a model runs that did not load as it is configured; None if it runs as configured."""
        _, fallback = self._fallen_back.get(alias, (None, None))
        return None if fallback is None else f"did not load, and {fallback.why}"

    async def _look_for_memory(
        self, account: Account, model: ModelConfig, running: RunningEngine | None, *, wanted: bool
    ) -> str | None:
        """Return advice, which may be empty, if an engine ran out of memory; else None. Waits until its memory is
        released."""
        advice = None
        try:
            if running is not None and not wanted:
                wanted_mib = running.handle.ending.wanted_mib
                if wanted_mib is not None:
                    advice = await self._memory_manager.ran_out(account, model, self.config.system, wanted_mib)
        except Exception:  # of any kind: the exit must be reported
            _log.exception("why the engine of %s ended could not be found out", model.alias)
        try:
            await self._memory_manager.close(account)
        except Exception:
            _log.exception("whether the memory of the engine of %s is back could not be found out", model.alias)
        return advice

    def _can_sleep(self, running: RunningEngine, model: ModelConfig) -> bool:
        failed = self._sleepless.get(model.alias)
        if failed is not None and failed.what == _what_sleeps(running.account, model):
            return False
        self._sleepless.pop(model.alias, None)
        return running.handle.sleeper is not None

    def sleep_problem_of(self, alias: str) -> str | None:
        """Return why a model's engine does not sleep although it is configured to; None if there is no reason."""
        running = self.front_of(alias)
        if running is not None and running.handle.cannot_sleep is not None:
            return running.handle.cannot_sleep
        failed, model = self._sleepless.get(alias), self.config.models.get(alias)
        if failed is None or model is None or model.revision != failed.revision:
            return None
        return failed.reason

    async def _put_to_sleep(self, engine_id: int) -> None:
        """Have an engine sleep; stop it if it does not, or does not release its memory, and do not try again."""
        running = self.running.get(engine_id)
        if running is None or running.handle.sleeper is None:
            return
        running.ready_sec = None
        sleeper, alias, limit_sec = running.handle.sleeper, running.alias, self.config.system.load_stall_sec
        try:
            held = await self._memory_manager.put_to_sleep(
                running.account, partial(sleeper.fall_asleep, limit_sec)
            )
        except Problem as failed:
            reason = failed.reason.full
        except Exception:
            _log.exception("the engine of %s could not be put to sleep", alias)
            reason = f"it could not be put to sleep; {_SEE_LOG}"
        else:
            self._post(EngineAsleep(time.monotonic(), engine_id, held))
            return
        if engine_id in self._stopping or not running.handle.alive:
            return  # that is why
        _log.warning("model %s: its engine cannot sleep, and is stopped instead from now on: %s", alias, reason)
        model = self.config.models.get(alias)
        if model is not None:
            self._sleepless[alias] = _Sleepless(_what_sleeps(running.account, model), model.revision, reason)
        self._stop(engine_id)

    async def _wake_up(self, engine_id: int) -> None:
        """Have an engine serve again; one that does not is killed, and its model is loaded anew."""
        running = self.running.get(engine_id)
        if running is None or running.handle.sleeper is None:
            return
        running.started_sec = time.monotonic()
        self._memory_manager.wakes_up(running.account)
        try:
            await running.handle.sleeper.wake_up(self.config.system.load_stall_sec)
        except Problem as failed:
            if engine_id not in self._stopping:
                running.handle.kill(f"it did not wake up: {failed.reason.full}")
            return
        running.failed_probes = 0
        running.probed_sec = running.ready_sec = time.monotonic()
        self._post(EngineReady(running.ready_sec, engine_id))
        self._tasks.begin(self._memory_manager.woke(running.account), f"measuring of {running.alias}")

    def _cause_of_end(
        self, engine_id: int, running: RunningEngine | None, *, wanted: bool
    ) -> StopCause | Breakdown:
        """`running` is an engine that was ready; None if it never was."""
        engine = self.scheduler.engines.get(engine_id)
        if wanted:
            cause = engine.cause if engine is not None else None
            return cause or StopCause.SHUTDOWN
        if running is None:
            return Breakdown.LOAD_FAILED
        return Breakdown.HUNG if running.handle.was_killed else Breakdown.CRASHED

    async def _read_ahead(self, alias: str) -> None:
        """Read what the model's next engine will read, as far as memory is free, while others finish."""
        model = self.config.models.get(alias)
        if model is not None:
            files = [Path(path) for path, *_ in model.files]
            await apart(lambda: page_cache.read_ahead([*files, *self.states_of(alias)], page_cache.room()))

    def _stop(self, engine_id: int) -> None:
        """Stop an engine; one that is being spawned is stopped right after."""
        if engine_id in self._stopping:
            return
        self._stopping.add(engine_id)
        running = self.running.get(engine_id)
        if running is not None:
            self._tasks.begin(self._end(running), f"stop of {running.alias}")

    async def _end(self, running: RunningEngine) -> None:
        if (keeper := running.handle.keeper) is not None and running.ready_sec is not None:
            await keeper.flush(_SAVING_SEC)
        running.pool.break_off()
        await running.handle.stop()

    async def _probe(self, engine_id: int) -> None:
        running = self.running.get(engine_id)
        if running is None:
            return
        handle = running.handle
        began = time.monotonic()
        if not running.is_ending and (await handle.healthy() or running.pool.heard_sec >= began):
            self._post(EngineAlive(time.monotonic(), engine_id))
            return
        await asyncio.wait({handle.exited}, timeout=_ENDING_SEC if running.is_ending else _DYING_SEC)
        handle.kill("it broke a request off and does not answer")

    async def _ask_what_it_has(self, running: RunningEngine) -> None:
        running.facts = await running.handle.facts()

    def facts_of(self, alias: str) -> Facts | None:
        """Return the properties that a model's engine reports; None without a ready engine."""
        running = self.front_of(alias)
        return running.facts if running is not None else None

    def front_of(self, alias: str) -> RunningEngine | None:
        """Return the running engine that serves a model, or will first; None without one."""
        model = self.scheduler.models.get(alias)
        front = model.front if model is not None else None
        return self.running.get(front.id) if front is not None else None

    def _order(self, model: ModelConfig, account: Account) -> Launch:
        """Return everything needed to start the engine. Raises Unusable."""
        system = self.config.system
        limit = system.timeout_warmup_sec if model.alias in self._preloading else system.wait_ready_sec
        return Launch(
            model=model,
            chosen=account.chosen,
            shows=self._memory_manager.shows(account),
            load_stall_sec=system.load_stall_sec,
            load_limit_sec=limit,
            stop_grace_sec=system.stop_grace_sec,
        )

    def log_of(self, alias: str) -> LogRing:
        """Return the log of all engines of a model, in whole lines in the order of arrival."""
        if alias not in self.logs:
            self.logs[alias] = LogRing(self.config.system.log_ring_lines, self.engine_file(alias))
        return self.logs[alias]

    # --- configuration ----------------------------------------------------------------------------------

    async def _tell_what_is_odd(self) -> None:
        """Log warnings about models before they are requested."""
        models, backends = self.config.models, self._backends
        for problem in await apart(lambda: list(warnings(backends, models))):
            if problem not in self._told:
                self._told.add(problem)
                _log.warning("%s", problem)

    def _configure(self) -> None:
        self._post(Configured(time.monotonic(), self._specs(), policy_of(self.config)))
        self._memory_manager.configure(self.config.system)
        self._tasks.begin(self._tell_what_is_odd(), "look at what is configured of models")

    def _specs(self) -> Mapping[str, ModelSpec]:
        connections = self.config.system.http_max_connections
        preloaded = frozenset(self._to_preload())
        return {
            alias: ModelSpec(
                alias,
                slots=min(model.slots, connections),
                most_slotless=connections,
                pinned=model.pinned,
                kept=model.pinned or alias in preloaded,
                idle_timeout_sec=model.idle_timeout_sec,
                revision=model.revision,
            )
            for alias, model in self.config.models.items()
        }

    def _to_preload(self) -> list[str]:
        names = self.config.system.preload_models
        return list(self.config.models) if "*" in names else list(names)

    async def _preload_models(self) -> None:
        for index, alias in enumerate(self._to_preload()):
            if index:
                await asyncio.sleep(self.config.system.preload_delay_sec)
            if alias not in self.config.models:
                continue
            self._preloading.add(alias)
            try:
                self._post(Load(time.monotonic(), alias, evict=False))
                await self._until_settled(alias)
            finally:
                self._preloading.discard(alias)


def warnings(backends: Mapping[str, EngineBackend], models: Mapping[str, ModelConfig]) -> Iterator[str]:
    """Yield warnings about models, by the kinds of their engines. Blocking."""
    for kind, backend in backends.items():
        yield from backend.warnings({alias: model for alias, model in models.items() if model.engine == kind})


def _what_sleeps(account: Account, model: ModelConfig) -> Hashable:
    """Return what a failure to sleep holds for: files, build and flags."""
    return account.chosen.identity or model.revision


def _exit_of(running: RunningEngine | None, reason: str, wanted: bool) -> LastExit:
    if running is None:
        return LastExit(reason, time.time(), wanted)
    handle = running.handle
    tail = tuple(handle.last_words())
    return LastExit(reason, time.time(), wanted, handle.exit_code, handle.out_of_memory, tail)


def policy_of(config: Config) -> Policy:
    system, scheduling = config.system, config.scheduling
    figures = {
        name: _figure(getattr(scheduling if name in Scheduling.model_fields else system, name))
        for name in CONSTANTS
    }
    figures["idle_timeout_sec"] = idle_timeout(system.idle_timeout_sec if system.enable_idle_timeout else 0)
    return Policy(**figures, ports=LAST_PORT + 1 - system.base_port)


def _figure(configured: Any) -> Any:
    if isinstance(configured, Patience | MaxWait | WaitFactor):
        return ByPriority(configured.high, configured.normal, configured.low)
    return configured
