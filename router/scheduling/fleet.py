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
    StartEngine,
    StopCause,
    StopEngine,
    Transition,
)
from router.scheduling.residency import ENGINES, Engine, Model, Swap, amounts, claim, memory_of, take, total
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

    def set_budgets(self, budgets: Placement, capacity: Placement, engines: int) -> None:
        self.budgets = {**budgets, ENGINES: engines}
        self.capacity = {**budgets, **capacity, ENGINES: engines}

    def free(self) -> dict[Device, int]:
        """Return the resources that are neither used, nor reserved for a loading engine, nor promised to a
        swap."""
        free = dict(self.budgets)
        for engine in self.engines.values():
            take(free, engine.placement)
        for swap in self.swaps.values():
            take(free, claim(swap.placement, self._still_there(swap)))
        return free

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
        if engine.state is EngineState.STOPPING:
            return
        engine.cause, engine.leaves_for = cause, reason
        if not engine.is_busy:
            self.stop(engine, cause, now)
        elif engine.state is not EngineState.DRAINING:
            engine.draining_since_sec = now
            self.enter(engine, EngineState.DRAINING, reason)

    def stop(self, engine: Engine, cause: StopCause, now: float) -> None:
        engine.cause = cause
        engine.stopping_since_sec = now
        self.effects.append(StopEngine(engine.id, cause))
        self.enter(engine, EngineState.STOPPING, engine.departure)

    def lose(self, engine: Engine) -> None:
        """Note that the process has exited; its memory is about to be released."""
        if engine.state is not EngineState.STOPPING:
            engine.died_while = engine.state
            self.enter(engine, EngineState.STOPPING, "its process is gone")

    def swap(self, swap: Swap, now: float) -> None:
        """Record a swap, then drain its victims."""
        self.swaps[self.next_id()] = swap
        for victim in sorted(swap.victims, key=lambda engine: engine.id):
            if victim.state is EngineState.READY:
                cause = StopCause.DRAINED if victim.is_busy else StopCause.EVICTED
                self.drain(victim, cause, f"makes room for {swap.alias!r}", now)

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
