"""Scheduler: a state machine that decides which request is served next and which engines run.

Pure: no clock, no I/O, no asyncio. `step(event)` takes an event, with its time in seconds on any monotonic
clock, and returns effects for the caller to carry out. Equal events give equal effects.

`eviction` decides which models make room, `fleet` keeps track of engines and memory. This module guarantees
that every request gets exactly one outcome, an engine never has more requests in flight than slots, a draining
engine admits none, room made for one model is taken by no other, and no ready engine idles while its own queue
is not empty.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from zlib import crc32

from router.scheduling.eviction import Fits, MakeRoom, NeverFits, Outlook, Room, Wait, decide, outlook
from router.scheduling.fleet import Fleet
from router.scheduling.messages import (
    Configured,
    Displace,
    Effect,
    Eject,
    EngineAlive,
    EngineAsleep,
    EngineExited,
    EngineLost,
    EngineMeasured,
    EngineReady,
    EngineState,
    Event,
    Finished,
    Grant,
    Inspect,
    Inspected,
    KeepAlive,
    Load,
    MemoryChanged,
    ModelSpec,
    ModelState,
    Pin,
    Placement,
    Probe,
    Refusal,
    Reject,
    Requeue,
    Reset,
    Retry,
    ShutDown,
    StopCause,
    Submit,
    Tick,
    Transition,
)
from router.scheduling.policy import Policy
from router.scheduling.queue import Priority, Request
from router.scheduling.residency import (
    ENGINES,
    Engine,
    Model,
    Swap,
    Why,
    amounts,
    claim,
    rest,
    shortage,
    take,
)
from router.scheduling.wait_estimate import Forecast, forecast
from router.scheduling.wait_reason import why
from router.system.devices import Device

INSPECTION_PATIENCE_SEC = 1.0
_LOOKED_AT = 16
"""Number of first models waiting for an engine that a step considers, and the same number of others."""
_LOOK_ON_SEC = 0.25
_NOT_LOOKED_AT = Why("the router has not yet checked whether there is room")
_NO_MEMORY_KNOWN = Why("the available memory is not known yet")
_FOR_EVER_SEC = 100 * 365 * 86_400.0
"""Idle timeouts beyond this count as infinite, because dates are limited."""
_STEPS_AT_ONCE = 8_000.0
_STEPS_PER_SEC = 4_000.0
"""Budget of steps for forecasts to rejected requests; a step takes about 10 µs."""


_InLine = tuple[float, int, int, Model]
"""Virtual deadline and number of the first request waiting for a model, the model's position, and the model."""


class Scheduler:
    """State of the policy. `models`, `engines` and `budgets` may be read between steps, not written."""

    def __init__(self) -> None:
        self.policy = Policy()
        self.models: dict[str, Model] = {}
        self.wake_at: float = math.inf
        """When the next `Tick` is due; may be too early, never too late."""
        self.shutting_down = False
        self._fleet = Fleet()
        self.engines: Mapping[int, Engine] = self._fleet.engines
        self._requests: dict[str, Request] = {}
        self._waiting: dict[str, Model] = {}
        """Models that want an engine."""
        self._looked_until: tuple[float, ...] = ()
        """Position up to which the models beyond the first ones have been considered."""
        self._recent: set[Engine] = set()
        self._stop_sec = 0.0
        """Mean time from the stop of an engine until its memory is released."""
        self._come_back: dict[tuple[str, Priority], tuple[float, float | None]] = {}
        """Times given to rejected requests, each with the time until which others are given the same."""
        self._steps_left, self._steps_at = _STEPS_AT_ONCE, 0.0
        """Steps left for forecasts to rejected requests, and the time of the last refill."""
        self._joined = 0
        """Number of times that a request has joined a queue."""
        self._none_below: tuple[int, Priority] = (-1, Priority.HIGH)
        """Value of `_joined` at which no queue held a request below the priority."""
        self._now = 0.0
        self._seq = 0
        self._effects: list[Effect] = []

    def step(self, event: Event) -> list[Effect]:
        """Process one event and return its effects, to be carried out in this order."""
        if event.at > self._now:
            self._now = event.at
        effects: list[Effect] = []
        self._effects = self._fleet.effects = effects
        room_may_change = True
        match event:
            case Submit():
                room_may_change = self._submit(event)
            case Finished():
                room_may_change = self._finish(event)
            case Displace():
                self._displace(self._requests.get(event.request_id), event.reason)
            case Requeue():
                self._requeue(event)
            case Inspected():
                self._inspected(event)
            case EngineReady():
                self._ready(event)
            case EngineAsleep():
                self._asleep(event)
            case EngineMeasured():
                room_may_change = self._measured(event)
            case EngineAlive():
                self._alive(event)
            case EngineLost():
                self._lost(event)
            case EngineExited():
                self._exited(event)
            case Tick():
                self._tick()
            case Load():
                self._load(event)
            case Eject():
                self._eject(event)
            case KeepAlive():
                self._keep_alive(event)
            case Pin():
                self._pin(event)
            case Reset():
                self._reset(event)
            case MemoryChanged():
                self._memory_changed(event)
            case Configured():
                self._configure(event)
            case ShutDown():
                self._shut_down()
        if room_may_change and (self._waiting or self._fleet.swaps) and self.budgets:
            self._place_all()
        for effect in effects:
            if type(effect) is Transition and (changed := self.models.get(effect.alias)) is not None:
                changed.turn(self._now, is_here=changed.is_here)
        return effects

    @property
    def wanted(self) -> list[Effect]:
        """Effects of the last step, even if it raised: they match the changes made until then."""
        return self._effects

    # --- reading ----------------------------------------------------------------------------------------

    @property
    def budgets(self) -> Placement:
        """Amount of each resource that engines may use together; empty until the first `MemoryChanged`."""
        return self._fleet.budgets

    def state(self, alias: str) -> ModelState:
        model = self.models[alias]
        if (engine := model.front) is not None:
            return ModelState(engine.state)
        return ModelState.FAILED if model.failed_until_sec > self._now else ModelState.OFF

    def unload_at_sec(self, alias: str) -> float | None:
        """Return when the last engine of a model is unloaded without further requests; None if it is not."""
        most_recent = self._most_recent()
        goes_at_sec: list[float] = []
        for engine in self.models[alias].engines:
            if engine.idle_since_sec is None or engine.state not in (EngineState.READY, EngineState.ASLEEP):
                return None
            limit_sec = self._idle_limit_sec(engine, most_recent)
            if limit_sec > _FOR_EVER_SEC:
                return None
            goes_at_sec.append(engine.idle_since_sec + limit_sec)
        return max(goes_at_sec, default=None)

    def free(self) -> dict[Device, int]:
        """Return the resources that are neither used, nor reserved for a loading engine, nor promised to a
        swap."""
        return self._fleet.free()

    def outlook(self, inspected: Inspected) -> Outlook:
        """Return what it would take to load a model, whose engines if any count as unloaded."""
        fleet, free = self._fleet, self._fleet.free()
        others = [engine for engine in self.engines.values() if engine.alias != inspected.alias]
        for engine in self.engines.values():
            if engine.alias == inspected.alias:
                take(free, {device: -amount for device, amount in engine.placement.items()})
        places = tuple({**place, ENGINES: 1} for place in inspected.placements)
        room = Room(self._now, self.policy, self.models, others, fleet.budgets, fleet.capacity, free, {})
        return outlook(replace(inspected, placements=places), room)

    def forecast(self, now: float, newcomer: Request | None = None) -> Forecast:
        """Forecast when waiting requests are served, as far as measurements allow, including a `newcomer`."""
        swaps, stop_sec = self._fleet.swaps.values(), self._stop_sec
        models = self.models.values()
        return forecast(models, self._requests, swaps, self.budgets, self.policy, stop_sec, now, newcomer)

    def waiting(self) -> int:
        """Number of waiting requests of all models."""
        granted = sum(engine.load for engine in self.engines.values())
        return len(self._requests) - granted

    # --- requests ---------------------------------------------------------------------------------------

    def _submit(self, event: Submit) -> bool:
        model = self.models.get(event.alias)
        if self.shutting_down:
            self._reject(event.request_id, Refusal.SHUTTING_DOWN, "the router is shutting down", 5)
            return False
        if model is None or model.retired:
            self._reject(event.request_id, Refusal.MODEL_NOT_FOUND, f"there is no model {event.alias!r}")
            return False
        if model.failed_until_sec > event.at:
            self._reject_failed(event.request_id, model)
            return False
        model.arrival(event.at)
        self._seq += 1
        deadline_sec = event.at + self.policy.patience_sec[event.priority]
        request = Request(event.request_id, event.alias, event.priority, event.at, deadline_sec, self._seq)
        request.slotless = event.slotless
        engine = model.admitting(slotless=event.slotless)
        if engine is not None:  # so no request of its kind waits
            self._requests[request.id] = request
            model.joined(request, self._now)
            self._grant(request, engine)
            return False
        displaced = None
        if (full := self._queue_full(model)) is not None:
            reason, displaced = full, self._who_gives_way(model, event.priority)
            if displaced is None:
                come_back_sec = self._come_back_sec(model, event.priority)
                self._reject(event.request_id, Refusal.QUEUE_FULL, reason, come_back_sec)
                return False
        self._requests[request.id] = request
        model.joined(request, self._now)
        self._enqueue(request, model)
        if displaced is not None:
            self._displace(displaced, f"{reason}, and a request of higher priority has arrived")
            return True
        return model.wants_engine and (event.priority is Priority.HIGH or not self._can_wait_for_a_look())

    def _can_wait_for_a_look(self) -> bool:
        """Return whether so many models wait that placement is postponed: a thousand may arrive or leave at
        once."""
        crowded = len(self._waiting) > 2 * _LOOKED_AT
        if crowded:
            self._wake(self._now + _LOOK_ON_SEC)
        return crowded

    def _queue_full(self, model: Model) -> str | None:
        """Reason why the queue is full; None if there is room."""
        if self._is_full(model):
            waiting = len(model.queue)
            return f"{waiting} requests are already waiting for {model.spec.alias!r} (max_queue_size_per_model)"
        waiting = self.waiting()
        if waiting >= self.policy.max_queue_size_total:
            ours = f"{len(model.queue)} of them for {model.spec.alias!r}"
            return f"{waiting} requests are already waiting, {ours} (max_queue_size_total)"
        return None

    def _is_full(self, model: Model) -> bool:
        return len(model.queue) >= self.policy.max_queue_size_per_model

    def _who_gives_way(self, model: Model, priority: Priority) -> Request | None:
        """Return the waiting request of lowest priority, and of these the newest, that is below `priority`."""
        if self._is_full(model):
            return _lowest((model,), priority)
        joined, none_below = self._none_below
        if joined == self._joined and none_below <= priority:
            return None
        lowest = _lowest(self.models.values(), priority)
        if lowest is None:
            self._none_below = self._joined, priority
        return lowest

    def _displace(self, request: Request | None, reason: str) -> None:
        if request is None or request.granted_sec is not None:
            return
        model = self.models[request.alias]
        model.queue.remove(request)
        come_back_sec = self._come_back_sec(model, request.priority)
        self._reject(request.id, Refusal.DISPLACED, reason, come_back_sec)
        self._left_queue(model)

    def _come_back_sec(self, model: Model, priority: Priority) -> float | None:
        """Return the expected wait of a request that arrives now; None: unknown.

        Thousands of requests may be rejected at the same moment, for hundreds of models. Once the budget of steps
        is used up, the answer is None, as everything else would have to wait for it.
        """
        key, now = (model.spec.alias, priority), self._now
        told_until, at = self._come_back.get(key, (-math.inf, None))
        if told_until <= now:
            self._steps_left = min(_STEPS_AT_ONCE, self._steps_left + (now - self._steps_at) * _STEPS_PER_SEC)
            self._steps_at = now
            if self._steps_left <= 0:
                return None
            deadline_sec = now + self.policy.patience_sec[priority]
            newcomer = Request("", model.spec.alias, priority, now, deadline_sec, self._seq)
            found = self.forecast(now, newcomer)
            at = found.granted_at.get(newcomer.id)
            self._steps_left -= found.steps
            self._come_back[key] = now + found.told_sec, at
        return None if at is None else max(1.0, at - now)

    def _enqueue(self, request: Request, model: Model) -> None:
        request.queued_sec = self._now
        self._joined += 1
        model.queue.push(request)
        self._want_engine_or_keep(model)
        self._wake(self._now + self.policy.queue_timeout_sec)

    def _want_engine_or_keep(self, model: Model) -> None:
        """Note that the model is wanted; an engine that loads without waiting requests is kept."""
        if model.wants_engine:
            self._want_engine(model)
        for engine in model.engines:
            engine.nobody_waits_since_sec = None

    def _want_engine(self, model: Model) -> None:
        if model.spec.alias not in self._waiting:
            model.why_waiting = _NOT_LOOKED_AT if self.budgets else _NO_MEMORY_KNOWN
        self._waiting[model.spec.alias] = model

    def _grant(self, request: Request, engine: Engine) -> None:
        request.granted_sec = self._now
        request.engine_id = engine.id
        if request.slotless:
            engine.slotless.add(request.id)
        else:
            engine.in_flight[request.id] = request.priority
        model = self.models[engine.alias]
        if engine.idle_since_sec is not None:
            engine.idle_since_sec = None
            model.busy.go_on(self._now)
        if not model.queue:
            model.busy.clear(self._now)
        self._effects.append(Grant(request.id, engine.id))
        self._used(engine)

    def _admit(self, model: Model) -> None:
        if not model.queue:
            return
        for slotless in (False, True):
            while (engine := model.admitting(slotless=slotless)) is not None:
                request = model.queue.take(slotless=slotless)
                if request is None:
                    break
                self._grant(request, engine)

    def _finish(self, event: Finished) -> bool:
        request = self._requests.pop(event.request_id, None)
        model = self.models.get(request.alias) if request is not None else None
        if request is None or model is None:
            return False
        if request.granted_sec is None or request.engine_id is None:
            model.queue.remove(request)
            self._left_queue(model)
            return not self._can_wait_for_a_look()
        engine = self.engines.get(request.engine_id)
        computed = event.served and event.computed and not request.slotless
        if computed:
            model.computed(self._now - request.granted_sec)
        if engine is None:
            return False
        if computed:
            engine.served += 1
            model.attempts = 0
        self._release(request, model, engine)
        # Requests of high priority may evict an engine sooner once it has only low ones left.
        return not engine.is_busy or (request.priority is not Priority.LOW and not request.slotless)

    def _release(self, request: Request, model: Model, engine: Engine) -> None:
        if request.slotless:
            engine.slotless.remove(request.id)
        else:
            del engine.in_flight[request.id]
        model.last_used_sec = self._now
        self._admit(model)
        if not engine.is_busy:
            engine.idle_since_sec = self._now
            model.busy.fall_idle(self._now)
            if engine.state is EngineState.DRAINING:
                self._fleet.leave(engine, engine.cause or StopCause.DRAINED, self._now)
            else:
                self._wake(self._now + engine.idle_timeout_sec(self.policy))

    def _left_queue(self, model: Model) -> None:
        """Update a model after a waiting request has left, which may remove the reason to load it."""
        if model.queue or model.wanted_since_sec is not None:
            return
        self._waiting.pop(model.spec.alias, None)
        model.cramped_since_sec = None
        for engine in model.engines:
            if engine.state is EngineState.LOADING and not engine.wakes_up:
                engine.nobody_waits_since_sec = self._now
                self._wake(self._now + self.policy.abandoned_load_grace_sec)
            elif engine.state is EngineState.ASLEEP:
                self._wake_for_its_end(engine)

    def _requeue(self, event: Requeue) -> None:
        request = self._requests.get(event.request_id)
        if request is None or request.engine_id is None:
            return
        model = self.models.get(request.alias)
        engine = self.engines.get(request.engine_id)
        request.engine_id = request.granted_sec = None
        if engine is not None and model is not None:
            if engine.state in (EngineState.READY, EngineState.DRAINING) and not engine.suspect:
                engine.suspect = True
                self._effects.append(Probe(engine.id))
            self._release(request, model, engine)
        if model is None or model.retired:
            self._reject_removed(request)
        elif self.shutting_down:
            self._reject(request.id, Refusal.SHUTTING_DOWN, "the router is shutting down", 5)
        elif request.retries >= self.policy.max_request_retries:
            reason = f"the engine of {request.alias!r} failed {request.retries + 1} times: {event.reason}"
            pause_sec = self._come_back_sec(model, request.priority) or 1  # unknown of one that never answered
            self._reject(request.id, Refusal.MODEL_FAILED, reason, pause_sec)
        elif model.failed_until_sec > self._now:
            self._reject_failed(request.id, model)
        else:
            request.retries += 1
            self._enqueue(request, model)
            self._admit(model)

    def _reject(
        self,
        request_id: str,
        refusal: Refusal,
        reason: str,
        retry_after_sec: float | None = None,
        is_final: bool = False,
    ) -> None:
        self._requests.pop(request_id, None)
        self._effects.append(Reject(request_id, refusal, reason, retry_after_sec, is_final))

    def _reject_failed(self, request_id: str, model: Model) -> None:
        reason = model.last_error or f"{model.spec.alias!r} failed"
        pause_sec = model.failed_until_sec - self._now
        self._reject(request_id, Refusal.MODEL_FAILED, reason, pause_sec, model.failed_for_good)

    def _reject_removed(self, request: Request) -> None:
        reason = f"{request.alias!r} was removed from the configuration"
        self._reject(request.id, Refusal.MODEL_NOT_FOUND, reason)

    def _reject_waiting(
        self,
        model: Model,
        refusal: Refusal,
        reason: str,
        retry_after_sec: float | None = None,
        is_final: bool = False,
    ) -> None:
        while model.queue:
            self._reject(model.queue.pop().id, refusal, reason, retry_after_sec, is_final)
        model.forget_wish()
        self._left_queue(model)

    # --- engines ----------------------------------------------------------------------------------------

    def _ready(self, event: EngineReady) -> None:
        engine = self.engines.get(event.engine_id)
        if engine is None or engine.state is not EngineState.LOADING:
            return
        model = self.models[engine.alias]
        took_sec = self._now - engine.started_sec
        if engine.awake is not None:
            engine.placement, engine.awake = engine.awake, None
            model.woke(took_sec)
            told = f"woke up in {took_sec:.1f} s"
        else:
            engine.asleep = event.asleep
            model.loaded(took_sec)
            model.wake_sec = model.wake_sec or event.wake_sec
            told = f"loaded in {took_sec:.1f} s"
        model.forget_wish()
        model.ran_out = model.comes_back = False
        model.ports_lost = 0
        engine.ready_sec = engine.idle_since_sec = model.last_used_sec = self._now
        engine.nobody_waits_since_sec = None
        self._fleet.enter(engine, EngineState.READY, told)
        self._serve(model, engine)

    def _serve(self, model: Model, engine: Engine) -> None:
        """Admit requests to an engine that is ready, or ready again."""
        self._used(engine)
        self._admit(model)
        if engine.idle_since_sec is not None:
            self._wake(engine.idle_since_sec + engine.idle_timeout_sec(self.policy))

    def _asleep(self, event: EngineAsleep) -> None:
        engine = self.engines.get(event.engine_id)
        if engine is None or not engine.falls_asleep:
            return
        model = self.models[engine.alias]
        self._note_stop(engine)
        self._fleet.rests(engine, event.placement)
        if model.wants_engine:
            self._want_engine(model)
        self._wake_for_its_end(engine)
        self._relieve()

    def _wake_for_its_end(self, engine: Engine) -> None:
        """Have a `Tick` at which an engine without requests has been idle for too long."""
        idle_since_sec = self._now if engine.idle_since_sec is None else engine.idle_since_sec
        self._wake(max(self._now, idle_since_sec + engine.idle_timeout_sec(self.policy)))

    def _relieve(self) -> None:
        """Stop sleeping engines if they hold memory that is not there any more."""
        self._fleet.relieve(self._now)
        self._wait_no_more(self._waiting.values())

    def _wait_no_more(self, models: Iterable[Model]) -> None:
        """Remove models whose sleeping engine is being stopped from those that want one, until it has exited."""
        for model in tuple(models):
            if not model.wants_engine:
                self._waiting.pop(model.spec.alias, None)

    def _measured(self, event: EngineMeasured) -> bool:
        engine = self.engines.get(event.engine_id)
        if engine is None or engine.state is EngineState.STOPPING or engine.awake is not None:
            return False
        engine.placement = {**event.placement, ENGINES: 1}
        return True

    def _alive(self, event: EngineAlive) -> None:
        engine = self.engines.get(event.engine_id)
        if engine is not None and engine.suspect:
            engine.suspect = False
            if engine.state is EngineState.READY:
                self._serve(self.models[engine.alias], engine)

    def _lost(self, event: EngineLost) -> None:
        engine = self.engines.get(event.engine_id)
        if engine is not None:
            self._fleet.lose(engine)
            self._wait_no_more((self.models[engine.alias],))

    def _exited(self, event: EngineExited) -> None:
        engine = self._fleet.engines.pop(event.engine_id, None)
        if engine is None:
            return
        model = self.models[engine.alias]
        model.engines.remove(engine)
        if engine.state is EngineState.STOPPING and engine.died_while is None:
            self._note_stop(engine)
            self._off(model, engine.departure or event.reason, engine)
        else:
            self._engine_failed(model, engine, event)
        if model.retired:
            if not model.engines:
                del self.models[engine.alias]
            return
        self._want_back(model)
        if model.wants_engine:
            self._want_engine(model)

    def _note_stop(self, engine: Engine) -> None:
        self._stop_sec += 0.3 * (self._now - engine.stopping_since_sec - self._stop_sec)

    def _want_back(self, model: Model) -> None:
        """Request a load as for a preloaded model, but not during a cooldown."""
        if model.comes_back and not model.engines and model.failed_until_sec <= self._now:
            model.wanted_since_sec = self._now
            self._want_engine(model)

    def _engine_failed(self, model: Model, engine: Engine, event: EngineExited) -> None:
        """Handle an unrequested exit: retry after a pause, or mark the model as failed if it happens too often.

        A model fails either without serving any request, or by crashing repeatedly in between.
        """
        policy = self.policy
        state = engine.died_while or engine.state
        loading = state is EngineState.LOADING and not engine.ready_sec
        crashes = 0 if loading else model.crashed(self._now, policy.model_crash_window_sec)
        what = "did not load" if loading else "did not wake up" if state is EngineState.LOADING else "crashed"
        model.last_error = f"{engine.alias!r} {what}: {event.reason}"
        if not loading:
            had_place = engine.cause is None and state is not EngineState.ASLEEP
            model.comes_back = model.spec.kept and had_place and not self.shutting_down
        if event.retry is Retry.AT_ONCE and model.ports_lost < policy.most_port_races:
            model.ports_lost += 1
            model.retry_at_sec = self._now + self._backoff_sec(model.ports_lost > policy.free_port_races, engine)
            self._off(model, model.last_error, engine)
            return
        model.attempts += not engine.served
        if loading and event.out_of_memory and not model.ran_out:
            model.ran_out = True  # one retry with a raised estimate
            self._off(model, model.last_error, engine)
        elif (
            model.attempts > policy.model_load_max_retries
            or (loading and event.out_of_memory)
            or event.retry is Retry.NEVER
        ):
            self._fail(model, policy.model_load_cooldown_sec, for_good=event.retry is Retry.NEVER)
        elif crashes >= policy.model_max_crashes:
            often = f"crashed {crashes} times in {self._now - model.crashes_sec[0]:.0f} s"
            model.last_error = f"{engine.alias!r} {often}, most recently: {event.reason}"
            self._fail(model, policy.model_load_cooldown_sec)
        else:
            # An engine that has served is restarted at once after its first crash.
            model.retry_at_sec = self._now + self._backoff_sec(max(model.attempts, crashes - 1), engine)
            self._off(model, model.last_error, engine)

    def _backoff_sec(self, tries: int, engine: Engine) -> float:
        """Return the pause, doubled with each try, plus a jitter of up to half, so that retries do not
        coincide."""
        if not tries:
            return 0.0
        jitter = crc32(f"{engine.alias} {engine.id}".encode()) / 2**33
        return min(self.policy.max_backoff_sec, self.policy.backoff_sec * 2.0 ** min(tries - 1, 32)) * (1 + jitter)

    def _fail(self, model: Model, cooldown_sec: float, *, for_good: bool = False) -> None:
        model.ports_lost = 0
        model.ran_out = False
        model.failed_until_sec = self._now + cooldown_sec
        model.failed_for_good = for_good
        self._wake(model.failed_until_sec)
        reason = model.last_error or "failed"
        self._effects.append(Transition(model.spec.alias, ModelState.FAILED, reason))
        self._reject_waiting(model, Refusal.MODEL_FAILED, reason, cooldown_sec, for_good)

    def _off(self, model: Model, reason: str, engine: Engine | None = None) -> None:
        """Publish that an engine of the model has exited, or that none will be started."""
        engine_id = None if engine is None else engine.id
        self._effects.append(Transition(model.spec.alias, ModelState.OFF, reason, engine_id))

    def _drain_all(self, model: Model, cause: StopCause, reason: str) -> None:
        for engine in tuple(model.engines):
            self._drain(engine, cause, reason)
        self._wait_no_more((model,))

    def _drain(self, engine: Engine, cause: StopCause, reason: str) -> None:
        self._fleet.drain(engine, cause, reason, self._now)
        if self.policy.max_drain_sec is not None:
            self._wake(self._now + self.policy.max_drain_sec)

    # --- placement: carrying out the policy -------------------------------------------------------------

    def _place_all(self) -> None:
        """Place waiting models until nothing changes, because one placement may affect earlier candidates."""
        while True:
            before = len(self._effects), len(self._fleet.swaps)
            self._settle_swaps()
            self._place_each()
            if before == (len(self._effects), len(self._fleet.swaps)):
                return

    def _place_each(self) -> None:
        free = self._fleet.free()
        swaps = self._fleet.swaps
        taken = {victim: swap.alias for swap in swaps.values() for victim in swap.victims}
        taken |= {own: swap.alias for swap in swaps.values() if (own := self.models[swap.alias].sleeper)}
        line = sorted((*self._order(model), place, model) for place, model in enumerate(self._waiting.values()))
        for number, (deadline_sec, seq, place, model) in enumerate(self._to_look_at(line)):
            if self._has_swap(model) or not model.wants_engine:
                continue
            if model.retry_at_sec > self._now:
                model.why_waiting = Why(f"a retry is pending: {model.last_error}")
                self._wake(model.retry_at_sec)
                continue
            self._place(model, free, taken)
            if model.inspecting_since_sec is not None:
                # No model overtakes it for lack of an inspection, unless its disk is slow.
                patience_ends = model.inspecting_since_sec + INSPECTION_PATIENCE_SEC
                if patience_ends > self._now:
                    self._wake(patience_ends)
                    first_looked_at = Why(f"the file of {model.spec.alias}, which comes first, is being inspected")
                    for *_, behind in line[bisect(line, (deadline_sec, seq, place + 1)) :]:
                        if not self._has_swap(behind):
                            behind.why_waiting = first_looked_at
                    return
            if number >= _LOOKED_AT:
                self._looked_until = deadline_sec, seq, place + 1

    def _to_look_at(self, line: list[_InLine]) -> list[_InLine]:
        """Return the first models, and a few of the others in turn if there are very many: considering a thousand
        at once would delay every token. The others never get what is reserved or held for the first."""
        if len(line) <= 2 * _LOOKED_AT:
            return line
        self._wake(self._now + _LOOK_ON_SEC)
        begin = bisect(line, self._looked_until, _LOOKED_AT)
        begin = begin if begin < len(line) else _LOOKED_AT
        return line[:_LOOKED_AT] + line[begin : begin + _LOOKED_AT]

    def _settle_swaps(self) -> None:
        """Complete swaps whose memory is free; cancel those that are not wanted or can no longer succeed."""
        swaps = self._fleet.swaps
        for engine_id, swap in list(swaps.items()):
            model = self.models[swap.alias]
            if not model.wants_engine or model.sleeper is not swap.wakes:
                self._end_swap(engine_id)
                continue
            del swaps[engine_id]  # its own claim must not count against it
            there = not shortage(swap.placement, self._fleet.free())
            will_be = not shortage(swap.placement, self._fleet.obtainable_by(swap))
            swaps[engine_id] = swap
            if there:
                self._start(model, swap.placement, engine_id)
            if there or not will_be:  # the budget may have shrunk
                self._end_swap(engine_id)
            else:
                self._fleet.stop_sleepers(swap, self._now)
                self._wait_no_more(self.models[victim.alias] for victim in swap.victims)

    def _has_swap(self, model: Model) -> bool:
        """Return whether a swap for the model is in progress."""
        return any(swap.alias == model.spec.alias for swap in self._fleet.swaps.values())

    def _end_swaps_for(self, model: Model) -> None:
        for engine_id, swap in list(self._fleet.swaps.items()):
            if swap.alias == model.spec.alias:
                self._end_swap(engine_id)

    def _end_swap(self, engine_id: int) -> None:
        for engine in self._fleet.end_swap(engine_id):
            model = self.models[engine.alias]
            model.forget_wish()
            self._serve(model, engine)

    def _order(self, model: Model) -> tuple[float, int]:
        head = model.queue.head()
        if head is not None:
            return head.deadline_sec, head.seq
        wanted = model.wanted_since_sec if model.wanted_since_sec is not None else self._now
        return wanted + self.policy.patience_sec[Priority.NORMAL], 0

    def _place(self, model: Model, free: dict[Device, int], taken: dict[Engine, str]) -> None:
        """Carry out the policy's verdict on a candidate; updates `free` and `taken` by what is kept for it."""
        sleeper, fleet = model.sleeper, self._fleet
        if sleeper in taken:
            model.why_waiting = Why(f"its memory is kept for {taken[sleeper]}, which has waited longer")
            return
        inspected = model.inspected if sleeper is None else self._as_found(sleeper)
        if inspected is None:
            self._inspect(model)
            return
        budgets, capacity = fleet.budgets, fleet.capacity
        others = [engine for engine in self.engines.values() if engine is not sleeper]
        if sleeper is not None:
            budgets, capacity = (rest(each, sleeper.placement) for each in (budgets, capacity))
        room = Room(self._now, self.policy, self.models, others, budgets, capacity, free, taken)
        verdict = decide(model, inspected, room)
        if sleeper is not None and (
            isinstance(verdict, NeverFits)
            or (isinstance(verdict, Wait) and any(not shortage(place, free) for place in model.places))
        ):
            sleeper.leaves_for = "it is loaded anew, as there is no room to wake it up where it was"
            fleet.stop(sleeper, StopCause.EVICTED, self._now)
            self._waiting.pop(model.spec.alias)
            return
        if not isinstance(verdict, NeverFits):
            model.cramped_since_sec = None
        elif verdict.others_hold_it and self._may_get_back(model):
            model.why_waiting = Why(f"other programs hold the memory: {verdict.reason}")
            return
        if isinstance(verdict, Wait | MakeRoom) and not model.queue and not model.may_evict:
            if model.comes_back:
                return
            model.forget_wish()
            self._waiting.pop(model.spec.alias)
            told = f"not preloaded: {verdict.reason}"
            if sleeper is not None:
                fleet.enter(sleeper, EngineState.ASLEEP, told)
                self._wake_for_its_end(sleeper)
            else:
                self._off(model, told)
            return
        if not isinstance(verdict, Wait) and self._now - inspected.at > self.policy.inspection_valid_sec:
            self._inspect(model)  # inspect again before acting
            return
        match verdict:
            case Fits(placement):
                self._start(model, placement, fleet.next_id())
                take(free, placement)
            case MakeRoom(placement, victims):
                self._swap(model, Swap(model.spec.alias, placement, victims, sleeper))
                take(free, claim(placement, victims))
                taken |= dict.fromkeys(victims, model.spec.alias)
            case Wait(again_at, reason, reserve, hold, departures):
                model.why_waiting = Why(reason, departures)
                for at in again_at:
                    self._wake(at)
                take(free, reserve)
                taken |= dict.fromkeys(hold, model.spec.alias)
            case NeverFits(reason, others_hold_it):
                model.last_error = reason
                model.too_big = True
                model.inspected = model.cramped_since_sec = None
                model.comes_back = False
                self._off(model, reason)
                self._reject_waiting(model, Refusal.INSUFFICIENT_MEMORY, reason, is_final=not others_hold_it)

    def _memory_changed(self, event: MemoryChanged) -> None:
        self._fleet.set_budgets(event.budgets, event.capacity, self.policy)
        self._relieve()
        for model in self._waiting.values():
            if model.cramped_since_sec is not None:
                model.inspected = None  # other placements may be possible now

    def _may_get_back(self, model: Model) -> bool:
        """Return whether to wait for memory held by other programs: once, and not for long."""
        if model.too_big:
            return False
        if model.cramped_since_sec is None:
            model.cramped_since_sec = self._now
        until = model.cramped_since_sec + self.policy.others_patience_sec
        if until > self._now:
            self._wake(until)
        return until > self._now

    def _as_found(self, sleeper: Engine) -> Inspected:
        """Return what a sleeping engine needs in addition to be woken up, as if an inspection had found it."""
        more = sleeper.more_awake
        return Inspected(self._now, sleeper.alias, (more,), need=f"{amounts(more)} to wake up")

    def _start(self, model: Model, placement: Placement, engine_id: int) -> None:
        model.too_big = False
        if (sleeper := model.sleeper) is not None:
            self._fleet.wake(sleeper, self._now)
        else:
            self._fleet.start(engine_id, model, placement, self._now)
        self._waiting.pop(model.spec.alias)
        model.inspected = None
        model.why_waiting = Why("it is loading")

    def _swap(self, model: Model, swap: Swap) -> None:
        names = ", ".join(sorted({victim.alias for victim in swap.victims}))
        model.why_waiting = Why(f"waiting to be loaded in place of {names}")
        self._fleet.swap(swap, self._now)
        self._wait_no_more(self.models[victim.alias] for victim in swap.victims)
        if self.policy.max_drain_sec is not None:
            self._wake(self._now + self.policy.max_drain_sec)

    def _inspect(self, model: Model) -> None:
        if model.inspecting_since_sec is None:
            model.inspecting_since_sec = self._now
            model.why_waiting = Why("its file is being inspected")
            self._effects.append(Inspect(model.spec.alias))

    def _inspected(self, event: Inspected) -> None:
        model = self.models.get(event.alias)
        if model is None:
            return
        model.inspecting_since_sec = None
        model.inspected = None
        if event.problem is None:
            places = tuple({**place, ENGINES: 1} for place in event.placements)
            model.places = places
            model.inspected = Inspected(self._now, event.alias, places, need=event.need, advice=event.advice)
            if event.expected_load_sec is not None and not model.load_is_known:
                model.load_sec, model.load_is_known = event.expected_load_sec, event.load_is_known
        elif model.wants_engine and not model.engines:
            model.last_error = event.problem
            model.comes_back = False
            self._fail(model, self.policy.inspection_valid_sec, for_good=event.for_good)

    # --- time -------------------------------------------------------------------------------------------

    def _wake(self, at: float) -> None:
        if at < self.wake_at:
            self.wake_at = at

    def _tick(self) -> None:
        """Process everything that is due, and determine the next time."""
        self.wake_at = math.inf
        for model in self.models.values():
            self._expire_waiting(model)
            if model.failed_until_sec > self._now:
                self._wake(model.failed_until_sec)
            elif model.failed_until_sec:
                model.failed_until_sec = 0.0
                model.forget_tries()
                self._off(model, "may be tried again")
                self._want_back(model)
            if model.pinned_until_sec is not None:
                self._unpin_in_time(model, model.pinned_until_sec)
        self._recent = self._most_recent()
        for engine in list(self.engines.values()):
            since_sec, limit_sec, cause = self._time_limit(engine)
            if since_sec is not None:
                if since_sec + limit_sec <= self._now:
                    self._fleet.stop(engine, cause, self._now)
                else:
                    self._wake(since_sec + limit_sec)

    def _expire_waiting(self, model: Model) -> None:
        come_back_sec: dict[Priority, float | None] = {}  # thousands may expire at once
        while (request := model.queue.longest_here()) is not None:
            expiry = request.queued_sec + self.policy.queue_timeout_sec
            if expiry > self._now:
                self._wake(expiry)
                return
            reason = f"waited {self._now - request.arrival_sec:.0f} s (queue_timeout_sec) for {request.alias!r}"
            if not model.is_here:
                reason += f": {why(model, self._now)}"
            model.queue.remove(request)
            if request.priority not in come_back_sec:
                come_back_sec[request.priority] = self._come_back_sec(model, request.priority)
            self._reject(request.id, Refusal.QUEUE_TIMEOUT, reason, come_back_sec[request.priority])
            self._left_queue(model)

    def _time_limit(self, engine: Engine) -> tuple[float | None, float, StopCause]:
        """Return since when an engine is in a limited state (or None), the limit in seconds, and the stop
        cause."""
        match engine.state:
            case EngineState.LOADING:
                grace_sec = self.policy.abandoned_load_grace_sec
                return engine.nobody_waits_since_sec, grace_sec, StopCause.ABANDONED
            case EngineState.DRAINING if self.policy.max_drain_sec is not None:
                cause = engine.cause or StopCause.DRAINED
                return engine.draining_since_sec, self.policy.max_drain_sec, cause
            case EngineState.ASLEEP if not self.models[engine.alias].is_wanted:
                return engine.idle_since_sec, self._idle_limit_sec(engine, self._recent), StopCause.IDLE
            case EngineState.READY if not engine.suspect:
                return engine.idle_since_sec, self._idle_limit_sec(engine, self._recent), StopCause.IDLE
        return None, math.inf, StopCause.IDLE

    def _most_recent(self) -> set[Engine]:
        """The most recently used engines, which the global idle timeout (but no other) spares."""
        ready = [engine for engine in self.engines.values() if engine.state is EngineState.READY]
        ready.sort(
            key=lambda engine: (engine.idle_since_sec is None, self.models[engine.alias].last_used_sec),
            reverse=True,
        )
        return set(ready[: self.policy.keep_warm_models])

    def _idle_limit_sec(self, engine: Engine, most_recent: set[Engine]) -> float:
        has_its_own = engine.keep_alive_sec is not None or engine.spec.idle_timeout_sec is not None
        spared = engine in most_recent and not has_its_own
        return math.inf if spared else engine.idle_timeout_sec(self.policy)

    def _used(self, engine: Engine) -> None:
        """Note the use of an engine: another one may no longer be among the most recently used ones."""
        limit_sec = self.policy.idle_timeout_sec
        if engine not in self._recent:
            for other in self._recent:
                if other.idle_since_sec is not None:
                    self._wake(other.idle_since_sec + limit_sec)

    # --- operators --------------------------------------------------------------------------------------

    def _load(self, event: Load) -> None:
        model = self.models.get(event.alias)
        if model is None or model.retired or self.shutting_down:
            return
        if model.failed_until_sec > self._now or model.is_here:
            return
        model.wanted_since_sec = self._now
        model.may_evict = model.may_evict or event.evict
        self._want_engine_or_keep(model)

    def _eject(self, event: Eject) -> None:
        model = self.models.get(event.alias)
        if model is None:
            return
        self._set_pin(model, None)
        self._give_up(model, "ejected by hand")
        self._left_queue(model)
        self._drain_all(model, StopCause.MANUAL, "ejected by hand")

    def _give_up(self, model: Model, reason: str) -> None:
        """Cancel a requested load and publish this, even if no engine is stopped."""
        if not model.engines and model.wanted_since_sec is not None:
            self._off(model, reason)
        model.comes_back = False
        model.forget_wish()

    def _keep_alive(self, event: KeepAlive) -> None:
        model = self.models.get(event.alias)
        for engine in model.engines if model is not None else ():
            engine.keep_alive_sec = event.idle_sec
            if engine.idle_since_sec is not None:
                self._wake(engine.idle_since_sec + engine.idle_timeout_sec(self.policy))

    def _pin(self, event: Pin) -> None:
        model = self.models.get(event.alias)
        if model is None or model.retired:
            return
        self._set_pin(model, event.until)
        if event.until is not None:
            self._unpin_in_time(model, event.until)

    def _unpin_in_time(self, model: Model, until_sec: float) -> None:
        if until_sec > self._now:
            self._wake(until_sec)
        else:
            self._set_pin(model, None)

    def _set_pin(self, model: Model, until_sec: float | None) -> None:
        if until_sec == model.pinned_until_sec:
            return
        configured = model.unpinned or model.spec
        model.pinned_until_sec = until_sec
        model.put_in_force(configured)
        model.comes_back = model.comes_back and model.spec.kept
        for engine in model.engines:
            if engine.spec.revision == configured.revision:  # not one that leaves because that has changed
                engine.spec = model.spec
        self._wake(self._now)  # it may have been idle for long

    def _reset(self, event: Reset) -> None:
        model = self.models.get(event.alias)
        if model is not None:
            self._forgive(model, "reset")

    def _forgive(self, model: Model, reason: str) -> None:
        if model.failed_until_sec:
            self._off(model, reason)
        model.forget_failures()
        self._want_back(model)

    def _configure(self, event: Configured) -> None:
        self.policy = event.policy
        if self.budgets:
            self._fleet.set_budgets(self.budgets, self._fleet.capacity, event.policy)
        for alias, model in list(self.models.items()):
            if alias not in event.models and not model.retired:
                self._retire(model)
        for alias, spec in event.models.items():
            known = self.models.get(alias)
            if known is None:
                self.models[alias] = Model(spec, spec.expected_load_sec)
                self.models[alias].turn(self._now, is_here=False)
            else:
                self._reconfigure(known, spec)
        self._wake(self._now)  # timeouts may be shorter now

    def _reconfigure(self, model: Model, spec: ModelSpec) -> None:
        changed = (model.spec.revision, model.spec.slots) != (spec.revision, spec.slots)
        model.put_in_force(spec)
        model.comes_back = model.comes_back and model.spec.kept
        if changed or model.retired:
            model.retired = model.load_is_known = False
            self._forgive(model, "its configuration changed")
            self._end_swaps_for(model)  # it may need more now, or less
            self._drain_all(model, StopCause.RELOAD, "its configuration changed")
        elif model.engines:
            for engine in model.engines:
                engine.spec = model.spec
            self._admit(model)

    def _retire(self, model: Model) -> None:
        reason = "removed from the configuration"
        model.retired = True
        self._set_pin(model, None)
        self._give_up(model, reason)
        while model.queue:
            self._reject_removed(model.queue.pop())
        self._left_queue(model)
        if model.engines:
            self._drain_all(model, StopCause.RELOAD, reason)
            return
        if model.failed_until_sec:
            self._off(model, reason)
        self._end_swaps_for(model)
        del self.models[model.spec.alias]

    def _shut_down(self) -> None:
        self.shutting_down = True
        for model in self.models.values():
            self._give_up(model, "the router is shutting down")
            self._reject_waiting(model, Refusal.SHUTTING_DOWN, "the router is shutting down", 5)
        for engine_id in list(self._fleet.swaps):
            self._end_swap(engine_id)
        for engine in list(self.engines.values()):
            self._drain(engine, StopCause.SHUTDOWN, "the router is shutting down")


def _lowest(models: Iterable[Model], above: Priority) -> Request | None:
    """Return the newest waiting request of the lowest priority below `above`; None if there is none."""
    for priority in (Priority.LOW, Priority.NORMAL):
        if priority <= above:
            break
        newest = [request for model in models if (request := model.queue.newest(priority)) is not None]
        if newest:
            return max(newest, key=lambda request: request.seq)
    return None
