"""Gauges of the router's current state for Prometheus: models, memory, policy, GPUs and machine."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import psutil

from router import __version__
from router.engines.running import RunningEngine
from router.kv.store import KvStore, Saved, Totals, by_model
from router.observe.prometheus import Counter, Counts, Family, Gauges, label_text
from router.runtime.dispatcher import Dispatcher
from router.scheduling.messages import EngineState, ModelState
from router.scheduling.policy import CONSTANTS, ByPriority
from router.scheduling.queue import NAMES, Priority
from router.scheduling.residency import Engine, Model
from router.system.readings import Reading

K = TypeVar("K")

_STATUS = {
    ModelState.OFF: 0,
    ModelState.LOADING: 1,
    ModelState.READY: 2,
    ModelState.DRAINING: 2,
    ModelState.ASLEEP: 0,
    ModelState.STOPPING: 0,
    ModelState.FAILED: 3,
}
_MIB = 1 << 20


@dataclass(slots=True)
class _Look:
    """Current state of one model with its running engines."""

    model: Model
    running: Sequence[RunningEngine]
    state: ModelState
    now: float

    def active(self) -> int:
        return sum(engine.load for engine in self.model.engines)

    def slots(self) -> int:
        return sum(engine.spec.slots for engine in self._awake())

    def _awake(self) -> Iterator[Engine]:
        return (engine for engine in self.model.engines if engine.state is not EngineState.ASLEEP)

    def slots_used(self) -> int:
        return sum(len(engine.in_flight) for engine in self.model.engines)

    def resident_sec(self) -> float:
        return max((self.now - engine.ready_sec for engine in self._awake() if engine.ready_sec), default=0)

    def failed_probes(self) -> int:
        return max((running.failed_probes for running in self.running), default=0)

    def silent_sec(self) -> float:
        busy = {engine.id for engine in self.model.engines if engine.is_busy}
        silent_sec = (self.now - each.pool.silent_since_sec for each in self.running if each.id in busy)
        return max(0.0, max(silent_sec, default=0.0))


_PER_MODEL: tuple[tuple[str, str, Callable[[_Look], float]], ...] = (
    ("router_queue_depth", "Waiting requests", lambda look: len(look.model.queue)),
    (
        "router_active_requests",
        "Requests in flight, including those that need no slot",
        _Look.active,
    ),
    (
        "router_model_status",
        "State of a model: 0 stopped or asleep, 1 loading, 2 ready, 3 failed",
        lambda look: _STATUS[look.state],
    ),
    ("router_model_slots", "Slots of the model's engine; 0 without an engine that is awake", _Look.slots),
    ("router_model_slots_total", "Slots of the model's engine (former name)", _Look.slots),
    (
        "router_model_slots_used",
        "Slots in use",
        _Look.slots_used,
    ),
    ("router_model_resident_seconds", "Time since the model's engine became ready", _Look.resident_sec),
    (
        "router_model_expected_load_seconds",
        "Expected load time, learned from earlier loads",
        lambda look: look.model.load_sec,
    ),
    (
        "router_model_expected_wake_seconds",
        "Expected time to wake up the model's engine, learned from earlier times; 0 if unknown",
        lambda look: look.model.wake_sec or 0,
    ),
    (
        "router_model_failed_attempts",
        "Consecutive failed loads and crashes",
        lambda look: look.model.attempts,
    ),
    (
        "router_engine_failed_probes",
        "Consecutive health probes that the engine has not answered",
        _Look.failed_probes,
    ),
    (
        "router_engine_silent_seconds",
        "Time since the last output of an engine with requests in flight",
        _Look.silent_sec,
    ),
)


def gauges_of(dispatcher: Dispatcher, kv_store: KvStore) -> Iterator[Family]:
    yield from _model_gauges(dispatcher)
    yield from _kv_families(kv_store, dispatcher.scheduler.models)
    yield from _memory_gauges(dispatcher)
    yield from _scheduler_gauges(dispatcher)
    yield from _gpu_gauges(dispatcher.devices.last.gpus)
    yield from _machine_gauges()
    engines = dispatcher.scheduler.engines.values()
    asleep = sum(engine.state is EngineState.ASLEEP for engine in engines)
    yield single("router_models_loaded", "Resident engines, without those asleep", len(engines) - asleep)
    yield single("router_models_loaded_total", "Resident engines (former name)", len(engines) - asleep)
    yield single("router_models_asleep", "Engines that are asleep", asleep)
    yield single("router_uptime_seconds", "Time since the router started", dispatcher.uptime_sec)
    yield _failures(dispatcher)
    build = Gauges("router_build_info", "Version of the router and of the engine", "version", "engine")
    build.set(1, __version__, dispatcher.backend.name)
    yield build


def _failures(dispatcher: Dispatcher) -> Counter:
    failures = Counter("router_background_failures_total", "Restarts of background tasks after an error", "task")
    for each in dispatcher.background:
        failures.of(each.name).value += each.failures
    return failures


def _model_gauges(dispatcher: Dispatcher) -> Iterator[Gauges]:
    scheduler = dispatcher.scheduler
    now = time.monotonic()
    looks: list[tuple[str, _Look]] = []
    depths: list[tuple[str, float]] = []
    oldest: list[tuple[str, float]] = []
    for alias, model in scheduler.models.items():
        running = [each for engine in model.engines if (each := dispatcher.running.get(engine.id)) is not None]
        label = label_text(("model",), (alias,))
        looks.append((label, _Look(model, running, scheduler.state(alias), now)))
        for priority, priority_label in _PRIORITY_LABELS:
            first = model.queue.oldest(priority)
            depths.append((label + priority_label, model.queue.count(priority)))
            oldest.append((label + priority_label, now - first.arrival_sec if first is not None else 0))
    states = Gauges("router_model_state", "1 for the current state of a model, 0 for the others", "model", "state")
    states.lines(
        (label + state_label, int(state == look.state)) for label, look in looks for state, state_label in _STATES
    )
    yield states
    waiting = Gauges("router_queue_by_priority", "Waiting requests by priority", "model", "priority")
    waiting.lines(depths)
    yield waiting
    longest = Gauges(
        "router_queue_oldest_wait_seconds",
        "Longest time that a waiting request has waited so far",
        "model",
        "priority",
    )
    longest.lines(oldest)
    yield longest
    for name, text, value in _PER_MODEL:
        gauges = Gauges(name, text, "model")
        gauges.lines((label, value(look)) for label, look in looks)
        yield gauges


_PRIORITY_LABELS = tuple((priority, f',priority="{name}"') for priority, name in NAMES.items())
_STATES = tuple((state, f',state="{state}"') for state in ModelState)


def _kv_families(store: KvStore, aliases: Collection[str]) -> Iterator[Family]:
    """Yield what is kept on disk of conversations, and what came of it. The store counts, as it also shows that
    elsewhere."""
    saved, of_model, nothing = list(store), by_model(store), Totals()
    labels = {alias: label_text(("model",), (alias,)) for alias in aliases}
    for name, text, value in _PER_KV_MODEL:
        counts = Counts(name, text, "model")
        counts.lines((label, value(store.totals.get(alias, nothing))) for alias, label in labels.items())
        yield counts
    for name, text, measure in _OF_SAVED:
        gauges = Gauges(f"router_model_{name}", f"{text}, by model", "model")
        gauges.lines((label, measure(of_model.get(alias, ()))) for alias, label in labels.items())
        yield gauges
        yield single(f"router_{name}", f"{text}, of all models together", measure(saved))
    yield single("router_kv_limit_bytes", "Limit on all conversations on disk", store.settings.max_gb * 1e9)


_PER_KV_MODEL: tuple[tuple[str, str, Callable[[Totals], float]], ...] = (
    ("router_kv_saves_total", "Conversations saved to disk", lambda totals: totals.saves),
    ("router_kv_restores_total", "Conversations restored from disk and reused", lambda totals: totals.restores),
    (
        "router_kv_failures_total",
        "Saves and restores that failed, or that the engine did not reuse",
        lambda totals: totals.failures,
    ),
    (
        "router_kv_restored_tokens_total",
        "Prompt tokens that were restored from disk instead of computed",
        lambda totals: totals.restored_tokens,
    ),
    (
        "router_kv_prefill_saved_seconds_total",
        "Engine time that computing these tokens would have taken",
        lambda totals: totals.prefill_saved_sec,
    ),
)
_OF_SAVED: tuple[tuple[str, str, Callable[[Sequence[Saved]], float]], ...] = (
    ("kv_saved_bytes", "Size of conversations on disk", lambda of: sum([saved.nbytes for saved in of])),
    ("kv_saved_conversations", "Conversations on disk", len),
)


def _memory_gauges(dispatcher: Dispatcher) -> Iterator[Gauges]:
    ledger = dispatcher.ledger
    accounts = ledger.accounts.values()
    booked = _summed((account.alias, account.main_mib) for account in accounts)
    reserved = Gauges(
        "router_model_vram_bytes",
        "Memory reserved for the model's engine on GPUs, or in RAM on a machine without GPUs",
        "model",
    )
    for alias in dispatcher.scheduler.models:
        reserved.set(booked.get(alias, 0) * _MIB, alias)
    yield reserved
    held = _summed(((each.alias, str(device)), mib) for each in accounts for device, mib in each.holds.items())
    measured = Gauges(
        "router_model_memory_bytes", "Memory held by the model's engine at the last measurement", "model", "device"
    )
    for labels, mib in held.items():
        measured.set(mib * _MIB, *labels)
    yield measured
    lines = ledger.lines()
    for name, text, amounts in (
        ("router_memory_total_bytes", "Total memory of a device", [line.reading.total_mib for line in lines]),
        (
            "router_memory_budget_bytes",
            "Memory that all engines together may use",
            [line.budget_mib for line in lines],
        ),
        ("router_memory_reserved_bytes", "Memory reserved for engines", [line.booked_mib for line in lines]),
        ("router_memory_external_bytes", "Memory held by other programs", [line.external_mib for line in lines]),
    ):
        gauges = Gauges(name, text, "device")
        for line, mib in zip(lines, amounts, strict=True):
            gauges.set(mib * _MIB, str(line.device))
        yield gauges


def _summed(figures: Iterable[tuple[K, int]]) -> dict[K, int]:
    """Add the figures of each key: a model may have several engines."""
    sums: defaultdict[K, int] = defaultdict(int)
    for key, figure in figures:
        sums[key] += figure
    return sums


def _scheduler_gauges(dispatcher: Dispatcher) -> Iterator[Gauges]:
    policy = dispatcher.scheduler.policy
    for name, constant in CONSTANTS.items():
        if constant.metric is None:
            continue
        figures = getattr(policy, name)
        if not isinstance(figures, ByPriority):
            yield single(*constant.metric, figures)
            continue
        gauges = Gauges(*constant.metric, "priority")
        for priority in Priority:
            gauges.set(figures[priority], NAMES[priority])
        yield gauges
    yield single("router_models_limit", "Maximum number of resident engines", policy.places)


def _gpu_gauges(gpus: Sequence[Reading]) -> Iterator[Gauges]:
    """Yield the drivers' latest readings, without values that they do not report."""
    for name, text, value in _PER_GPU:
        gauges = Gauges(name, text, "gpu")
        for gpu in gpus:
            if (figure := value(gpu)) is not None:
                gauges.set(figure, str(gpu.device))
        yield gauges


_PER_GPU: tuple[tuple[str, str, Callable[[Reading], float | None]], ...] = (
    ("router_gpu_vram_total_bytes", "Total memory of a GPU", lambda gpu: gpu.total_mib * _MIB),
    (
        "router_gpu_vram_used_bytes",
        "Memory of a GPU in use by all programs",
        lambda gpu: (gpu.total_mib - gpu.free_mib) * _MIB,
    ),
    ("router_gpu_vram_free_bytes", "Free memory of a GPU", lambda gpu: gpu.free_mib * _MIB),
    (
        "router_gpu_utilization_percent",
        "Utilization of a GPU",
        lambda gpu: None if gpu.utilization is None else 100 * gpu.utilization,
    ),
    ("router_gpu_temperature_celsius", "Temperature of a GPU", lambda gpu: gpu.temperature_c),
    ("router_gpu_power_watts", "Power draw of a GPU", lambda gpu: gpu.power_w),
    ("router_gpu_power_limit_watts", "Power limit of a GPU", lambda gpu: gpu.power_limit_w),
)


def _machine_gauges() -> Iterator[Gauges]:
    memory = psutil.virtual_memory()
    yield single(
        "router_system_cpu_percent", "CPU utilization of the machine since the last scrape", psutil.cpu_percent()
    )
    yield single("router_system_ram_total_bytes", "Total RAM of the machine", memory.total)
    yield single("router_system_ram_used_bytes", "RAM in use", memory.total - memory.available)
    yield single("router_system_ram_percent", "Share of RAM in use", memory.percent)


def single(name: str, text: str, value: float) -> Gauges:
    """Return a gauge without labels."""
    gauges = Gauges(name, text)
    gauges.set(value)
    return gauges
