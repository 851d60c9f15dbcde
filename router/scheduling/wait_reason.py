"""Wait reasons in words with figures, as shown in queue statistics, heartbeats and headers.

Why there is no room, and which departures a model waits for, is decided in `eviction` (`Wait`); the scheduler
keeps it in `Model.why_waiting`, as it does its own reasons (an inspection, a retry). Only what an engine is busy
with (loading, draining, full slots) is read here. Pure functions.
"""

from __future__ import annotations

from router.scheduling.messages import EngineState
from router.scheduling.residency import Departure, Hold, Model


def why(model: Model, now: float, *, slotless: bool = False) -> str:
    """Describe in one clause what the first waiting request of a model waits for: a slot, or only an engine."""
    alias, engine = model.spec.alias, model.front
    if engine is None or engine.state is EngineState.ASLEEP:
        if model.retry_at_sec > now:
            return f"{model.why_waiting} (next try in {_seconds(model.retry_at_sec - now)})"
        return _for_room(model, now)
    busy = engine.load
    match engine.state:
        case EngineState.LOADING if engine.wakes_up:
            expected = "" if model.wake_sec is None else f" of ~{model.wake_sec:.1f}"
            return f"{alias} is waking up ({now - engine.started_sec:.1f}{expected} s)"
        case EngineState.LOADING:
            expected = f"~{model.load_sec:.1f} s" if model.load_is_known else f"perhaps {model.load_sec:.1f} s"
            return f"{alias} is loading ({now - engine.started_sec:.1f} of {expected})"
        case EngineState.DRAINING:
            return f"{alias} will be restarted once its requests in flight ({busy}) are done"
        case EngineState.STOPPING if engine.died_while is not None:
            return f"the engine of {alias} has exited and restarts once its memory is released"
        case EngineState.STOPPING if engine.falls_asleep:
            return f"{alias} is falling asleep and will then be woken up"
        case EngineState.STOPPING:
            return f"{alias} is being stopped and will then be restarted"
        case EngineState.READY if engine.suspect:
            return f"a request failed on the engine of {alias}; checking whether it still responds"
    slots = model.spec.slots
    if slotless:
        requests = f"{len(engine.slotless)} requests that need no slot"
        return f"{requests} are already in flight on {alias} (http_max_connections)"
    return f"all {slots} slots of {alias} are in use" if slots > 1 else f"the only slot of {alias} is in use"


def _for_room(model: Model, now: float) -> str:
    """`no room until a can be unloaded: needs 6000 MiB …, 500 MiB free; a's quantum ends in 12 s`"""
    held = "; ".join(_held(departure, now) for departure in model.why_waiting.departures)
    words = str(model.why_waiting) or "its engine is about to start"
    return f"{words}; {held}" if held else words


def _held(departure: Departure, now: float) -> str:
    alias, left = departure.alias, _seconds(departure.at - now)
    if departure.hold is Hold.LOADING:
        return f"{alias} is loading"
    if departure.at <= now:
        return f"{alias} can be unloaded now"
    match departure.hold:
        case Hold.QUANTUM:
            return f"{alias}'s quantum ends in {left}"
        case Hold.LINGER:
            return f"{alias} has just become idle and is kept for {left}"
    return f"{alias} can be drained in {left}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
