"""Engines of one machine: their states, their resources, and the swaps in progress.

Tracks memory and states, and emits the effects on processes. Decisions are made elsewhere; requests are not known
here.
"""

from __future__ import annotations

from router.scheduling.messages import (
    Effect,
    EngineState,
    ModelState,
    Placement,
    PutToSleep,
    ReadAhead,
    StartEngine,
    StopCause,
    StopEngine,
    Transition,
    WakeUp,
)
from router.scheduling.policy import Policy
from router.scheduling.residency import (
    ENGINES,
    Engine,
    Model,
    Swap,
    amounts,
    larger,
    memory_of,
    shortage,
    take,
    total,
)
from router.system.devices import Device


class Fleet:
    """Engines and resources. `effects` collects the effects of the scheduler's current step."""

    def __init__(self) -> None:
        self.engines: dict[int, Engine] = {}
        self.budgets: dict[Device, int] = {}
        self.capacity: dict[Device, int] = {}
        self.swaps: dict[int, Swap] = {}
        """Swaps by the id of the engine to be started."""
        self.effects: list[Effect] = []
        self._last_id = 0
        self._most_asleep = 0

    def set_budgets(self, budgets: Placement, capacity: Placement, policy: Policy) -> None:
        self.budgets = {**budgets, ENGINES: policy.places}
        self.capacity = {**budgets, **capacity, ENGINES: policy.places}
        self._most_asleep = policy.most_asleep

    def free(self) -> dict[Device, int]:
        """Return the resources that are neither used, nor reserved for a loading engine, nor promised to a
        swap."""
        free = dict(self.budgets)
        for engine in self.engines.values():
            take(free, engine.placement)
        for swap in self.swaps.values():
            take(free, self._claim(swap))
        return free

    def _claim(self, swap: Swap, keeps: Engine | None = None) -> dict[Device, int]:
        """Return what a swap takes beyond what its victims release; `keeps` and those asleep release nothing."""
        going = (each for each in self._still_there(swap) if each.state is not EngineState.ASLEEP)
        return shortage(swap.placement, total(victim.leaves for victim in going if victim is not keeps))

    def obtainable_by(self, swap: Swap) -> dict[Device, int]:
        """Return the resources that are free for a swap once all its victims have exited."""
        obtainable = self.free()
        for device, amount in total(victim.placement for victim in self._still_there(swap)).items():
            obtainable[device] = obtainable.get(device, 0) + amount
        return obtainable

    def next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def start(self, engine_id: int, model: Model, placement: Placement, now: float) -> None:
        engine = Engine(engine_id, model.spec, placement, now)
        self.engines[engine_id] = engine
        model.engines.append(engine)
        memory = memory_of(placement)
        self.effects.append(StartEngine(engine.id, engine.alias, memory))
        self.enter(engine, EngineState.LOADING, f"takes {amounts(memory)}")

    def drain(self, engine: Engine, cause: StopCause, reason: str, now: float) -> None:
        """Stop an engine after its requests in flight; admit no new ones."""
        if engine.falls_asleep:
            engine.awake = None
            engine.cause, engine.leaves_for = cause, reason
            self.effects.append(StopEngine(engine.id, cause))
        if engine.state is EngineState.STOPPING:
            return
        engine.cause, engine.leaves_for = cause, reason
        if not engine.is_busy:
            self.leave(engine, cause, now)
        elif engine.state is not EngineState.DRAINING:
            engine.draining_since_sec = now
            self.enter(engine, EngineState.DRAINING, reason)

    def leave(self, engine: Engine, cause: StopCause, now: float) -> None:
        """Stop an engine without requests; one that only makes room is put to sleep if it can be."""
        if cause not in (StopCause.EVICTED, StopCause.DRAINED) or not self._may_sleep(engine):
            self.stop(engine, cause, now)
            return
        engine.cause = cause
        engine.stopping_since_sec = now
        engine.awake, engine.placement = engine.placement, larger(engine.placement, engine.asleep or {})
        self.effects.append(PutToSleep(engine.id))
        self.enter(engine, EngineState.STOPPING, f"{engine.departure}; goes to sleep")

    def _may_sleep(self, engine: Engine) -> bool:
        """Whether an engine can sleep, and what it holds asleep fits beside those who want its room."""
        if engine.asleep is None or engine.suspect or engine.state is EngineState.ASLEEP:
            return False
        if sum(each.awake is not None for each in self.engines.values()) >= self._most_asleep:
            return False
        free = dict(self.budgets)
        for each in self.engines.values():
            take(free, engine.asleep if each is engine else each.placement)
        for swap in self.swaps.values():
            take(free, self._claim(swap, keeps=engine))
        return all(free.get(device, 0) >= 0 for device in {**engine.asleep, **engine.placement})

    def rests(self, engine: Engine, placement: Placement) -> None:
        """Note that an engine is asleep and holds no more than this."""
        reason = f"{engine.leaves_for}; holds {amounts(placement)}"
        engine.placement = engine.asleep = placement
        engine.cause, engine.leaves_for = None, ""
        self.enter(engine, EngineState.ASLEEP, reason)

    def wake(self, engine: Engine, now: float) -> None:
        more = engine.more_awake
        engine.placement = larger(engine.awake or {}, engine.placement)
        engine.started_sec, engine.idle_since_sec = now, None
        self.effects.append(WakeUp(engine.id))
        self.enter(engine, EngineState.LOADING, f"wakes up, takes {amounts(more)}")

    def relieve(self, now: float) -> None:
        """Stop sleeping engines where more memory is booked than there is."""
        booked = total(each.placement for each in self.engines.values() if each.state is not EngineState.STOPPING)
        asleep = [each for each in self.engines.values() if each.state is EngineState.ASLEEP]
        for engine in sorted(asleep, key=lambda each: (each.idle_since_sec or 0.0, each.id)):
            if any(
                amount and booked[device] > self.budgets.get(device, 0)
                for device, amount in engine.placement.items()
            ):
                take(booked, engine.placement)
                engine.leaves_for = "its memory is needed"
                self.stop(engine, StopCause.EVICTED, now)

    def stop_sleepers(self, swap: Swap, now: float) -> None:
        """Stop what sleeps instead of making room for a swap, once nothing else is about to release memory."""
        there = self._still_there(swap)
        if all(victim.state is EngineState.ASLEEP for victim in there):
            for victim in sorted(there, key=lambda engine: engine.id):
                self.drain(victim, StopCause.EVICTED, f"makes room for {swap.alias!r}", now)

    def stop(self, engine: Engine, cause: StopCause, now: float) -> None:
        engine.cause = cause
        engine.stopping_since_sec = now
        engine.awake = None
        self.effects.append(StopEngine(engine.id, cause))
        self.enter(engine, EngineState.STOPPING, engine.departure)

    def lose(self, engine: Engine) -> None:
        """Note that the process has exited; its memory is about to be released."""
        engine.awake = None
        if engine.state is not EngineState.STOPPING:
            engine.died_while = engine.state
            self.enter(engine, EngineState.STOPPING, "its process is gone")

    def swap(self, swap: Swap, now: float) -> None:
        """Record a swap, then drain its victims."""
        self.swaps[self.next_id()] = swap
        for victim in sorted(swap.victims, key=lambda engine: engine.id):
            if victim.state in (EngineState.READY, EngineState.ASLEEP):
                cause = StopCause.DRAINED if victim.is_busy else StopCause.EVICTED
                self.drain(victim, cause, f"makes room for {swap.alias!r}", now)
        if any(victim.state is EngineState.DRAINING for victim in swap.victims):
            self.effects.append(ReadAhead(swap.alias))

    def end_swap(self, engine_id: int) -> list[Engine]:
        """End a swap, completed or cancelled, and return the victims that were still draining and serve again."""
        spared = [
            victim
            for victim in sorted(self._still_there(self.swaps.pop(engine_id)), key=lambda engine: engine.id)
            if victim.state is EngineState.DRAINING and victim.cause is StopCause.DRAINED
        ]
        for engine in spared:
            engine.cause, engine.leaves_for = None, ""
            self.enter(engine, EngineState.READY, "its room is not needed any more")
        return spared

    def enter(self, engine: Engine, state: EngineState, reason: str) -> None:
        engine.state = state
        self.effects.append(Transition(engine.alias, ModelState(state), reason, engine.id))

    def _still_there(self, swap: Swap) -> list[Engine]:
        return [victim for victim in swap.victims if victim.id in self.engines]
