"""Eviction policy: which of the models waiting for an engine gets room, and which engines are unloaded for it.

`decide` handles one candidate; the scheduler calls it for each, earliest virtual deadline first.

1. It fits: start it.
2. Idle engines can make room: the cheapest sufficient set goes. An engine that fell idle a moment ago counts
   as busy for a short *linger*, because agents and batch jobs send their next request right after the answer.
   Engines that are asleep go first. One that can sleep does so instead of exiting, if there is memory for that.
3. Only busy engines can make room: they drain, once the candidate has waited for its bound *and* the victim
   has been resident for its quantum (a short one while high waits for low). So while engines are kept busy, the
   share of time lost to swapping is at most about `1 / (1 + residency_factor)`, and the time until a drain starts
   is bounded: what an overdue candidate waits for is held for it, and none behind it swaps there.
4. A request in flight is not killed to make room, unless `max_drain_sec` is set.

Serving a resident model until its queue is empty keeps the mean low when changing over is dear (polling
systems with set-up times: Takagi, 1988); the bound and the quantum keep it from starving the others.
Memory is an amount in MiB per device; a place among `max_concurrent_models` is one more resource.

Pure functions; nothing is changed here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from router.scheduling.messages import EngineState, Inspected, Placement
from router.scheduling.policy import Policy
from router.scheduling.queue import Priority
from router.scheduling.residency import (
    ENGINES,
    Departure,
    Engine,
    Hold,
    Holder,
    Model,
    amounts,
    claim,
    shortage,
    total,
)


@dataclass(frozen=True, slots=True)
class Room:
    """State seen by a candidate, less what earlier candidates have reserved."""

    now: float
    policy: Policy
    models: Mapping[str, Model]
    engines: Collection[Engine]
    budgets: Placement
    capacity: Placement
    """Budgets if other programs used no memory."""
    free: Placement
    taken: Mapping[Engine, str]
    """Engines already being unloaded or held for other models, with the alias of that model."""


@dataclass(frozen=True, slots=True)
class Fits:
    placement: Placement


@dataclass(frozen=True, slots=True)
class MakeRoom:
    placement: Placement
    victims: frozenset[Engine]
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    again_at: tuple[float, ...]
    """Times at which the verdict may change without an event."""
    reason: str
    reserve: Placement
    """Part of `free` that later candidates must leave for this one."""
    hold: frozenset[Engine]
    """Engines that later candidates may not have unloaded."""
    departures: tuple[Departure, ...] = ()
    """Departures that the candidate waits for."""


@dataclass(frozen=True, slots=True)
class NeverFits:
    reason: str
    others_hold_it: bool
    """True if it would fit once other programs release their memory."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What it would take to load a model now."""

    placement: Placement | None
    """None: it can never fit."""
    beside: tuple[str, ...] = ()
    """Models that would stay on the devices that it takes."""
    victims: tuple[str, ...] = ()
    """Models that would be unloaded for it."""
    reason: str = ""
    """Why it can never fit, or why it is not known what would have to go."""


_Holder = TypeVar("_Holder", bound=Holder)
Bounds = list[tuple[float, float, float]]
Verdict = Fits | MakeRoom | Wait | NeverFits
_GONE_SOON = (EngineState.STOPPING, EngineState.ASLEEP)
"""States in which nothing keeps an engine from releasing its memory."""


def decide(candidate: Model, inspected: Inspected, room: Room) -> Verdict:
    placements = _possible(inspected.placements, room, room.budgets)
    if not placements:
        others_hold_it = bool(_possible(inspected.placements, room, room.capacity))
        return NeverFits(_why_never(inspected, room), others_hold_it)

    for placement in placements:  # rule 1
        if not shortage(placement, room.free):
            return Fits(placement)

    movable = [engine for engine in room.engines if not _stays(engine) and engine not in room.taken]
    bounds = _bounds(candidate, room.policy)
    departures = {engine: _departure(candidate, bounds, engine, room) for engine in movable}
    goes_at = {engine: departure.at for engine, departure in departures.items()}
    due = [engine for engine in movable if goes_at[engine] <= room.now]
    idle = [engine for engine in due if _is_idle(engine, room)]
    for pool in (idle, due):  # rules 2 and 3
        choice = _cheapest_choice(placements, pool, room)
        if choice is not None:
            return MakeRoom(*choice, _shortage_in_words(choice[0], inspected, room))

    again_at = tuple(at for at in goes_at.values() if room.now < at < math.inf)
    soonest = sorted(movable, key=lambda engine: (goes_at[engine], engine.id))
    plans = [
        (max((goes_at[engine] for engine in leaving), default=room.now), index, leaving)
        for index, placement in enumerate(placements)
        if (leaving := sufficient(shortage(placement, room.free), soonest)) is not None
    ]
    if not plans:
        ahead = ", ".join(sorted(set(room.taken.values()))) or "others"
        short = _shortage_in_words(placements[0], inspected, room)
        return Wait(again_at, f"no room until {ahead} has been served: {short}", {}, frozenset())
    _, index, leaving = min(plans, key=lambda plan: plan[:2])
    names = ", ".join(sorted({engine.alias for engine in leaving}))
    overdue = all(
        due_at(bounds, candidate.comes_sec + room.models[engine.alias].comes_sec) <= room.now for engine in leaving
    )
    return Wait(
        again_at,
        f"no room until {names} can be unloaded: {_shortage_in_words(placements[index], inspected, room)}",
        reserve=claim(placements[index], leaving),
        hold=frozenset(leaving if overdue else ()),
        departures=tuple(departures[engine] for engine in leaving),
    )


def outlook(inspected: Inspected, room: Room) -> Outlook:
    """Return what it would take to load a model now, with no regard to how long others may stay.

    `inspected` may be of a model that is not configured, or not even downloaded.
    """
    placements = _possible(inspected.placements, room, room.budgets)
    if not placements:
        return Outlook(None, reason=_why_never(inspected, room))
    movable = [engine for engine in room.engines if not _stays(engine)]
    idle = [engine for engine in movable if _is_idle(engine, room)]
    choice = (
        _cheapest_choice(placements, (), room)
        or _cheapest_choice(placements, idle, room)
        or _cheapest_choice(placements, movable, room)
    )
    if choice is None:
        return Outlook(placements[0], reason="the memory that is free is promised to others")
    chosen, victims = choice
    devices = {device for device, amount in chosen.items() if amount and device != ENGINES}
    beside = {
        engine.alias
        for engine in room.engines
        if engine not in victims and any(engine.placement.get(device) for device in devices)
    }
    return Outlook(chosen, tuple(sorted(beside)), tuple(sorted({victim.alias for victim in victims})))


def _cheapest_choice(
    placements: Iterable[Placement], pool: Iterable[Engine], room: Room
) -> tuple[Placement, frozenset[Engine]] | None:
    """Return the placement whose victims among these engines are the cheapest, with the victims; None if they
    suffice for none."""
    costs = {engine: _eviction_cost(engine, room) for engine in pool}
    choices = [
        (sum(costs[victim] for victim in victims), placement, victims)
        for placement in placements
        if (victims := cheapest_victims(shortage(placement, room.free), costs)) is not None
    ]
    return min(choices, key=lambda choice: choice[0])[1:] if choices else None


def cheapest_victims(short: Placement, costs: Mapping[Engine, float]) -> frozenset[Engine] | None:
    """Return the cheapest set of engines that frees what is short, or None if all of them together do not.

    The better of the cheapest single engine and the cheapest ones together less those not needed; a set
    bigger than it must be is never returned, and engines on devices with room enough are never in it.
    """
    by_cost = sorted(costs, key=lambda engine: (costs[engine], engine.id))
    several = sufficient(short, by_cost)
    if several is None:
        return None
    if len(several) > 1:
        single = next((engine for engine in by_cost if not shortage(short, engine.placement)), None)
        if single is not None and costs[single] <= sum(costs[engine] for engine in several):
            return frozenset((single,))
    return frozenset(several)


def sufficient(short: Placement, preferred: Iterable[_Holder]) -> list[_Holder] | None:
    """Return the most preferred engines that free what is short, without those that prove unnecessary."""
    chosen: list[_Holder] = []
    still_short = short
    for engine in preferred:
        if not still_short:
            break
        chosen.append(engine)
        still_short = shortage(still_short, engine.placement)
    if still_short:
        return None
    for engine in tuple(reversed(chosen)):
        rest = [other for other in chosen if other is not engine]
        if not shortage(short, total(other.placement for other in rest)):
            chosen = rest
    return chosen


def _departure(candidate: Model, bounds: Bounds, engine: Engine, room: Room) -> Departure:
    """Earliest time at which an engine may be unloaded for the candidate, or is expected to exit anyway."""
    if engine.state is EngineState.LOADING:
        return Departure(engine.id, engine.alias, math.inf, Hold.LOADING)
    if engine.state in _GONE_SOON:
        return Departure(engine.id, engine.alias, room.now, Hold.BOUND)
    model = room.models[engine.alias]
    swap_sec = candidate.comes_sec + model.comes_sec
    due = due_at(bounds, swap_sec)
    if engine.state is EngineState.DRAINING:
        return Departure(engine.id, engine.alias, due, Hold.BOUND)
    factor = room.policy.residency_factor
    if candidate.urgent and _only_low(engine, model):
        factor = min(1.0, factor)
    turn_ends_at = engine.ready_sec + factor * swap_sec
    by_turn = max(due, turn_ends_at)
    if engine.idle_since_sec is None or model.queue:
        return Departure(engine.id, engine.alias, by_turn, Hold.QUANTUM if turn_ends_at > due else Hold.BOUND)
    worth_sec = candidate.comes_sec / max(1, len(candidate.queue))
    linger_sec = model.returns.linger_sec(worth_sec, room.policy.max_linger_sec)
    return Departure(engine.id, engine.alias, min(by_turn, engine.idle_since_sec + linger_sec), Hold.LINGER)


def _bounds(candidate: Model, policy: Policy) -> Bounds:
    """Return for each waiting priority the arrival of its oldest request and its bounds in seconds and in
    swaps."""
    arrivals = [
        (priority, oldest.arrival_sec)
        for priority in Priority
        if (oldest := candidate.queue.oldest(priority)) is not None
    ]
    if candidate.wanted_since_sec is not None:
        arrivals.append((Priority.NORMAL, candidate.wanted_since_sec))
    return [
        (arrival, policy.max_wait_sec[priority], policy.wait_factor[priority]) for priority, arrival in arrivals
    ]


def due_at(bounds: Bounds, swap_sec: float) -> float:
    """Time at which the candidate reaches its bound on waiting."""
    return min(arrival + min(longest_sec, factor * swap_sec) for arrival, longest_sec, factor in bounds)


def _only_low(engine: Engine, model: Model) -> bool:
    """Whether all requests running on the engine or waiting for it have low priority."""
    return len(model.queue) == model.queue.count(Priority.LOW) and all(
        priority is Priority.LOW for priority in engine.in_flight.values()
    )


def _stays(engine: Engine) -> bool:
    """Whether an engine is pinned and not already being unloaded."""
    return engine.spec.pinned and engine.state in (EngineState.LOADING, EngineState.READY)


def _is_idle(engine: Engine, room: Room) -> bool:
    """Whether the engine can be unloaded without waiting for requests."""
    if engine.state in _GONE_SOON:
        return True
    return engine.idle_since_sec is not None and not room.models[engine.alias].queue


def _eviction_cost(engine: Engine, room: Room) -> float:
    """Seconds of reloading per second of absence: load time × how often it is likely to be wanted."""
    if engine.state is not EngineState.READY:
        return 0.0
    model = room.models[engine.alias]
    unused_sec = room.now - model.last_used_sec if _is_idle(engine, room) else 0.0
    return model.comes_sec / max(model.mean_gap_sec, unused_sec, 0.1)


def _possible(placements: Iterable[Placement], room: Room, budgets: Placement) -> list[Placement]:
    """Placements that fit if all engines that may be unloaded are unloaded."""
    pinned = total(engine.placement for engine in room.engines if _stays(engine))
    obtainable = {resource: budget - pinned.get(resource, 0) for resource, budget in budgets.items()}
    return [place for place in placements if not shortage(place, obtainable)]


def _shortage_in_words(placement: Placement, inspected: Inspected, room: Room) -> str:
    """Describe the limits that hold the candidate back: places, memory or both, and pinned models involved."""
    short = shortage(placement, room.free)
    limits = [room.policy.places_in_words] if ENGINES in short else []
    if short.keys() - {ENGINES}:
        free = {name: max(0, mib) for name, mib in room.free.items()}
        limits.append(f"needs {inspected.need}, {amounts(free)} free")
    pinned = sorted(
        {engine.alias for engine in room.engines if _stays(engine) and short.keys() & engine.placement.keys()}
    )
    if pinned:
        limits.append(f"{', '.join(pinned)} (pinned) cannot be unloaded")
    return "; ".join(limits)


def _why_never(inspected: Inspected, room: Room) -> str:
    stay = [engine for engine in room.engines if _stays(engine)]
    pinned = sorted({engine.alias for engine in stay})
    if len(stay) >= room.budgets[ENGINES]:
        return (
            f"{inspected.alias!r} cannot be loaded beside {', '.join(pinned)} (pinned): "
            f"{room.policy.places_in_words}; change that limit or pin fewer models"
        )
    reason = f"{inspected.alias!r} needs {inspected.need}; the budget is {amounts(room.budgets)}"
    held = {name: room.capacity[name] - mib for name, mib in room.budgets.items() if room.capacity[name] > mib}
    if held:
        reason += f", {amounts(room.free)} of it free; other programs hold {amounts(held)}"
    if pinned:
        reason += f"; {', '.join(pinned)} (pinned) cannot be unloaded"
    return f"{reason}; {inspected.advice}" if inspected.advice else reason
