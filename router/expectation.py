"""How long a request that came now would wait: what `Retry-After` promises to those who are turned away.

By then everybody who stands before it has been served, so there is room for it. The figures are measured ones:
how long requests of the model take and how long it loads, and while people queue, how many of them were served
per second of this rush: that knows of everything that costs time (swaps, loads, crashes) without being told.

Pure functions; nothing is changed here.
"""

from __future__ import annotations

from router.messages import Policy
from router.queue import Priority
from router.residency import EngineState, Model

_RUSH_KNOWN = 10
"""Requests that must have been served in a rush before its pace means anything."""
_ROUNDS = 8


def expected_wait_sec(model: Model, priority: Priority, policy: Policy, now: float) -> float:
    """Seconds from now until a request of this priority that came now would be given a slot."""
    return _wait_sec(model, _ahead(model, priority, policy, now), priority, policy, now)


def remaining_wait_sec(model: Model, position: int, priority: Priority, policy: Policy, now: float) -> float:
    """Seconds from now until the request that waits at this position (1: is next) is given a slot."""
    return _wait_sec(model, position - 1, priority, policy, now)


def _wait_sec(model: Model, ahead: int, priority: Priority, policy: Policy, now: float) -> float:
    rounds_sec = _rounds_sec(model, ahead, now)
    if not model.queue or model.rush.served < _RUSH_KNOWN:
        return rounds_sec
    rush_sec = _rush_sec(model, ahead, priority, policy, now)
    absent = model.engine is None or model.engine.state is not EngineState.READY
    return max(rush_sec, rounds_sec) if absent else rush_sec


def _rush_sec(model: Model, ahead: int, priority: Priority, policy: Policy, now: float) -> float:
    """At the pace of this rush. Who comes in the meantime with a shorter patience overtakes: the wait is the
    fixed point of `(ahead + 1 + overtakers(wait)) / pace`, which a few rounds come near enough."""
    rush = model.rush
    lasted_sec = max(0.001, now - rush.since_sec)
    wait_sec = start_sec = (ahead + 1) * lasted_sec / rush.served
    for _ in range(_ROUNDS):
        overtakers = 0.0
        for other, joined in rush.joined.items():
            head_start_sec = policy.patience_sec[priority] - policy.patience_sec[other]
            overtakers += joined / lasted_sec * min(wait_sec, max(0.0, head_start_sec))
        wait_sec = start_sec + overtakers * lasted_sec / rush.served
    return wait_sec


def _ahead(model: Model, priority: Priority, policy: Policy, now: float) -> int:
    """How many of those who wait have an earlier virtual deadline."""
    deadline_sec = now + policy.patience_sec[priority]
    return sum(
        model.queue.count_before(other, deadline_sec, policy.patience_sec[other] <= policy.patience_sec[priority])
        for other in Priority
    )


def _service_sec(model: Model, ready_sec: float, now: float) -> float:
    """What a request takes: the mean, or more where those of this rush have taken longer already."""
    if not model.queue:
        return model.mean_service_sec
    rush, slots = model.rush, model.spec.slots
    return max(model.mean_service_sec, (now - max(rush.since_sec, ready_sec)) * slots / (rush.served + slots))


def _rounds_sec(model: Model, ahead: int, now: float) -> float:
    """From mean times only: the engine serves as many at once as it has slots."""
    engine, slots = model.engine, model.spec.slots
    if engine is not None and engine.state is EngineState.READY:
        free = slots - len(engine.in_flight)
        return max(0, ahead + 1 - free) / slots * _service_sec(model, engine.ready_sec, now)
    serving_sec = ahead // slots * model.mean_service_sec
    if engine is not None and engine.state is EngineState.LOADING:
        return max(0.0, engine.started_sec + model.load_sec - now) + serving_sec
    leaving_sec = model.mean_service_sec if engine is not None else 0.0
    starts_sec = max(leaving_sec, model.retry_at_sec - now, model.room_at_sec - now)
    return starts_sec + model.load_sec + serving_sec
