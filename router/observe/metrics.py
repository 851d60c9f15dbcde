"""Prometheus: what is counted when it happens, and what is read from the scheduler when it is asked for.

Aliases, routes, priorities and outcomes are the router's own words, so that no client can make labels; a request
that named no configured model has `model=""`. `monitoring/README.md` lists every metric.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import psutil
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from router import __version__
from router.engines.llamacpp.metrics import EngineMetrics
from router.engines.running import RunningEngine
from router.observe.events import (
    Breakdown,
    ClientRefused,
    EngineEnded,
    Labels,
    ModelChanged,
    Outcome,
    RequestDone,
    RequestsDone,
)
from router.observe.prometheus import Counter, CounterCell, Family, Gauges, Histogram, exposition, label_text
from router.observe.usage import Usage
from router.runtime.dispatcher import Dispatcher
from router.scheduling.messages import ModelState, Refusal
from router.scheduling.policy import CONSTANTS, ByPriority
from router.scheduling.queue import NAMES, Priority
from router.scheduling.residency import Engine, Model
from router.system.readings import Reading
from router.system.turns import in_turns

K = TypeVar("K")

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LAG_LOOK_SEC = 1.0
_STATUS = {
    ModelState.OFF: 0,
    ModelState.LOADING: 1,
    ModelState.READY: 2,
    ModelState.DRAINING: 2,
    ModelState.STOPPING: 0,
    ModelState.FAILED: 3,
}
_REFUSALS = frozenset(Refusal)
_TIMEOUTS = frozenset({Refusal.QUEUE_TIMEOUT, "request_timeout"})
_MIB = 1 << 20


class NotAcceptable(Exception):
    """What a client says that it accepts makes no sense."""


class Metrics:
    """Everything under `/metrics`. Create it on the router's event loop."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._requests = _Requests()
        self._engines = _Engines(dispatcher)
        self._refused = Counter(
            "router_clients_refused_total", "Connections closed for what their clients do, or do not", "reason"
        )
        self.of_engines = EngineMetrics(lambda: dispatcher.running, lambda: dispatcher.config)
        self._lag = Histogram(
            "router_event_loop_lag_seconds", "How late the event loop came to a timer", bounds=_LAG_SECONDS
        )
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        psutil.cpu_percent()  # it tells of the time since the last call
        self._loop = asyncio.get_running_loop()
        self._look_at_lag(self._loop.time())
        dispatcher.events.listen(RequestsDone, self._requests.note)
        dispatcher.events.listen(ClientRefused, self._note_refused)
        dispatcher.events.listen(ModelChanged, self._engines.note)
        dispatcher.events.listen(EngineEnded, self._engines.note)

    async def exposition(self, accept: str = "", client: str | None = None) -> tuple[bytes, str]:
        """The text and its content type: OpenMetrics for those who ask for it. For a `client`, without what is
        counted for others by name. Written in several turns of the event loop: with many models it takes longer
        than a token may wait. Raises NotAcceptable."""
        self._dispatcher.events.settle()
        try:
            encode, content_type = choose_encoder(accept)
        except Exception as error:  # it compares what need not be numbers
            raise NotAcceptable from error
        openmetrics = content_type.startswith("application/openmetrics-text")
        self._engines.know(self._dispatcher.scheduler.models)
        self._requests.know(self._dispatcher.scheduler.models)
        counted: list[Family] = [
            *self._requests.families,
            *self._engines.families,
            self._refused,
            self._lag,
        ]
        if client is not None:
            counted = [self._requests.only_of(client, family) for family in counted]
        parts: list[bytes] = []
        async for family in in_turns(chain(counted, _gauges(self._dispatcher), self.of_engines.families())):
            parts += exposition([family], openmetrics=openmetrics)
        return b"".join([*parts, encode(self._process)]), content_type

    def _note_refused(self, happening: ClientRefused) -> None:
        self._refused.of(happening.reason).value += 1

    def _look_at_lag(self, due: float) -> None:
        now = self._loop.time()
        self._lag.of().observe([max(0.0, now - due)])
        self._loop.call_at(now + _LAG_LOOK_SEC, self._look_at_lag, now + _LAG_LOOK_SEC)


class _Requests:
    """Counted when a request is over."""

    def __init__(self) -> None:
        self.requests = Counter(
            "router_requests_total", "Requests, by outcome", "model", "endpoint", "priority", "status"
        )
        self.rejected = Counter("router_queue_rejected_total", "Requests refused a slot", "model")
        self.timeouts = Counter("router_timeout_requests_total", "Requests given up for time", "model")
        self.client_errors = Counter("router_request_4xx_total", "Requests answered by 4xx", "model")
        self.server_errors = Counter("router_request_5xx_total", "Requests answered by 5xx", "model")
        self.retries = Counter(
            "router_retry_attempts_total", "Requests sent back to the queue, as their engine broke", "model"
        )
        self.retried = Counter("router_retry_success_total", "Requests served after a retry", "model")
        self.resends = Counter(
            "router_upstream_resends_total", "Requests sent again, as an idle connection was just closed", "model"
        )
        self.input_tokens = Counter("router_input_tokens_total", "Tokens of prompts", "model")
        self.cached_tokens = Counter(
            "router_cached_tokens_total", "Tokens of prompts that were in an engine's cache", "model"
        )
        self.output_tokens = Counter("router_output_tokens_total", "Tokens of answers", "model")
        self.generated = Counter("router_tokens_generated_total", "Tokens of answers (older name)", "model")
        self.prefill = Counter("router_prefill_seconds_total", "Engines' time for prompts", "model")
        self.decode = Counter("router_decode_seconds_total", "Engines' time for answers", "model")
        self.received = Counter("router_request_bytes_total", "Bytes of requests' bodies", "model")
        self.sent = Counter("router_response_bytes_total", "Bytes of engines' answers", "model")
        self.duration = Histogram(
            "router_request_duration_seconds",
            "From the whole request to the end of its answer",
            "model",
            "endpoint",
            bounds=_SECONDS,
        )
        self.queue_wait = Histogram(
            "router_queue_wait_seconds",
            "From the whole request to a slot, or to the end of the wait",
            "model",
            "priority",
            bounds=_SECONDS,
        )
        self.first_token = Histogram(
            "router_time_to_first_token_seconds",
            "From the whole request to the first byte of a streamed answer",
            "model",
            "priority",
            bounds=_SECONDS,
        )
        self.per_token = Histogram(
            "router_time_per_output_token_seconds",
            "Engine's time per token after the first",
            "model",
            bounds=_TOKEN_SECONDS,
        )
        self.client_requests = Counter(
            "router_client_requests_total", "Requests with a client's own key, by outcome", "client", "status"
        )
        self.client_input_tokens = Counter(
            "router_client_input_tokens_total", "Tokens of a client's prompts", "client"
        )
        self.client_output_tokens = Counter(
            "router_client_output_tokens_total", "Tokens of answers to a client", "client"
        )
        self._per_model = (
            self.rejected,
            self.timeouts,
            self.client_errors,
            self.server_errors,
            self.retries,
            self.retried,
            self.resends,
            self.input_tokens,
            self.cached_tokens,
            self.output_tokens,
            self.generated,
            self.prefill,
            self.decode,
            self.received,
            self.sent,
        )
        self.families: tuple[Counter | Histogram, ...] = (
            self.requests,
            *self._per_model,
            self.client_requests,
            self.client_input_tokens,
            self.client_output_tokens,
            self.duration,
            self.queue_wait,
            self.first_token,
            self.per_token,
        )
        self._found: dict[Labels, _Cells] = {}
        self._known: set[str] = set()

    def only_of(self, client: str, family: Family) -> Family:
        """The same, without other clients."""
        if family in (self.client_requests, self.client_input_tokens, self.client_output_tokens):
            assert isinstance(family, Counter)
            return family.beginning_with(client)
        return family

    def know(self, aliases: Collection[str]) -> None:
        """Counters begin at 0, so that a rate sees the first count; those of models that are gone go, too."""
        if gone := self._known.difference(aliases):
            self._known -= gone
            self._found = {labels: cells for labels, cells in self._found.items() if labels.alias not in gone}
            for family in self.families:
                family.forget("model", gone)
        for alias in aliases:
            if alias not in self._known:
                self._known.add(alias)
                for counter in self._per_model:
                    counter.of(alias)

    def note(self, happening: RequestsDone) -> None:
        for labels, requests in happening.by_labels.items():
            cells = self._found.get(labels)
            if cells is None:
                cells = self._found[labels] = _Cells(self, labels)
                if labels.alias:
                    self._known.add(labels.alias)
            cells.note(requests)


class _Cells:
    """Of requests that have all labels in common. Finding a series costs more than counting."""

    def __init__(self, series: _Requests, labels: Labels) -> None:
        alias, route, priority, outcome, client = labels
        self._counts = [series.requests.of(alias, route, priority, outcome)]
        if client:
            self._counts.append(series.client_requests.of(client, outcome))
        self._served = outcome == Outcome.SERVED
        self._client_errors = series.client_errors.of(alias)
        self._server_errors = series.server_errors.of(alias)
        self._had_tickets = bool(priority)
        if not priority:
            return
        if outcome in _REFUSALS:
            self._counts.append(series.rejected.of(alias))
        if outcome in _TIMEOUTS:
            self._counts.append(series.timeouts.of(alias))
        self._inputs = [series.input_tokens.of(alias)]
        self._outputs = [series.output_tokens.of(alias), series.generated.of(alias)]
        if client:
            self._inputs.append(series.client_input_tokens.of(client))
            self._outputs.append(series.client_output_tokens.of(client))
        self._duration = series.duration.of(alias, route)
        self._queue_wait = series.queue_wait.of(alias, priority)
        self._first_token = series.first_token.of(alias, priority)
        self._per_token = series.per_token.of(alias)
        self._retries = series.retries.of(alias)
        self._retried = series.retried.of(alias)
        self._resends = series.resends.of(alias)
        self._cached = series.cached_tokens.of(alias)
        self._prefill = series.prefill.of(alias)
        self._decode = series.decode.of(alias)
        self._received = series.received.of(alias)
        self._sent = series.sent.of(alias)

    def note(self, requests: Sequence[RequestDone]) -> None:
        _add(self._counts, len(requests))
        errors = [done.status for done in requests if done.status >= 400]
        if errors:
            of_ours = sum([status >= 500 for status in errors])
            self._server_errors.value += of_ours
            self._client_errors.value += len(errors) - of_ours
        if self._had_tickets:
            self._note_service(requests)
            self._note_usage([done.usage for done in requests])

    def _note_service(self, requests: Sequence[RequestDone]) -> None:
        self._duration.observe([done.total_sec for done in requests])
        self._queue_wait.observe([done.queue_sec for done in requests])
        self._first_token.observe(
            [done.ttft_sec for done in requests if done.streamed and done.ttft_sec is not None]
        )
        self._received.value += sum([done.request_bytes for done in requests])
        self._sent.value += sum([done.answer_bytes for done in requests])
        retries = [done.retries for done in requests if done.retries]
        self._retries.value += sum(retries)
        if self._served:
            self._retried.value += len(retries)
        self._resends.value += sum([done.resends for done in requests])

    def _note_usage(self, usages: list[Usage]) -> None:
        _add(self._inputs, sum([usage.prompt_tokens for usage in usages]))
        _add(self._outputs, sum([usage.output_tokens for usage in usages]))
        self._cached.value += sum([usage.cached_tokens for usage in usages])
        self._prefill.value += sum([usage.prefill_sec for usage in usages])
        decoded = [usage for usage in usages if usage.decode_sec and usage.output_tokens > 1]
        self._decode.value += sum([usage.decode_sec for usage in decoded])
        self._per_token.observe([usage.decode_sec / (usage.output_tokens - 1) for usage in decoded])


def _add(counters: Iterable[CounterCell], amount: float) -> None:
    for counter in counters:
        counter.value += amount


class _Engines:
    """Counted when an engine becomes ready, is stopped, or ends."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._known: set[str] = set()
        self._loading: set[int] = set()
        """Engines that have yet to become ready for the first time."""
        self._broken: set[str] = set()
        """Models whose last engine that ended was not meant to."""
        self.load = Histogram(
            "router_model_load_duration_seconds", "From start to ready", "model", bounds=_SECONDS
        )
        self.loads = Counter("router_model_loads_total", "Engines that became ready", "model")
        self.restarts = Counter(
            "router_engine_restarts_total", "Engines that became ready after one that broke", "model"
        )
        self.ejects = Counter("router_model_ejects_total", "Engines stopped by the router", "model", "cause")
        self.exits = Counter(
            "router_engine_exits_total",
            "Engines that ended: the cause why they were stopped, or crashed, hung, load_failed",
            "model",
            "reason",
        )
        self.families: tuple[Counter | Histogram, ...] = (
            self.load,
            self.loads,
            self.restarts,
            self.ejects,
            self.exits,
        )

    def know(self, aliases: Collection[str]) -> None:
        """The same."""
        if gone := self._known.difference(aliases):
            self._known -= gone
            self._broken -= gone
            for family in self.families:
                family.forget("model", gone)
        for alias in aliases:
            self._known.add(alias)
            self.loads.of(alias)
            self.restarts.of(alias)
            for cause in Breakdown:
                self.exits.of(alias, cause)

    def note(self, happening: ModelChanged | EngineEnded) -> None:
        alias = happening.alias
        self._known.add(alias)
        if isinstance(happening, EngineEnded):
            self.exits.of(alias, happening.cause).value += 1
            if happening.wanted:
                self.ejects.of(alias, happening.cause).value += 1
            (self._broken.discard if happening.wanted else self._broken.add)(alias)
            return
        engine_id = happening.engine_id
        if happening.state is ModelState.LOADING and engine_id is not None:
            self._loading.add(engine_id)
        elif engine_id in self._loading:
            self._loading.discard(engine_id)
            if happening.state is ModelState.READY:
                self._note_load(self._dispatcher.scheduler.engines[engine_id])

    def _note_load(self, engine: Engine) -> None:
        alias = engine.alias
        self.loads.of(alias).value += 1
        self.load.of(alias).observe([engine.ready_sec - engine.started_sec])
        if alias in self._broken:
            self._broken.discard(alias)
            self.restarts.of(alias).value += 1


# --- read when asked for --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Look:
    """One model, now, and the processes of its engines."""

    model: Model
    running: Sequence[RunningEngine]
    state: ModelState
    now: float

    def active(self) -> int:
        return sum(engine.load for engine in self.model.engines)

    def slots(self) -> int:
        return sum(engine.spec.slots for engine in self.model.engines)

    def slots_used(self) -> int:
        return sum(len(engine.in_flight) for engine in self.model.engines)

    def resident_sec(self) -> float:
        return max((self.now - engine.ready_sec for engine in self.model.engines if engine.ready_sec), default=0)

    def failed_probes(self) -> int:
        return max((running.failed_probes for running in self.running), default=0)

    def silent_sec(self) -> float:
        busy = {engine.id for engine in self.model.engines if engine.is_busy}
        silent_sec = (self.now - each.pool.silent_since_sec for each in self.running if each.id in busy)
        return max(0.0, max(silent_sec, default=0.0))


_PER_MODEL: tuple[tuple[str, str, Callable[[_Look], float]], ...] = (
    ("router_queue_depth", "Requests that wait", lambda look: len(look.model.queue)),
    (
        "router_active_requests",
        "Requests in flight, those that need no slot among them",
        _Look.active,
    ),
    ("router_model_status", "0 stopped, 1 loading, 2 ready, 3 error", lambda look: _STATUS[look.state]),
    (
        "router_model_slots_total",
        "Requests that its engine serves at once; 0 without one",
        _Look.slots,
    ),
    (
        "router_model_slots_used",
        "Slots that are taken",
        _Look.slots_used,
    ),
    ("router_model_resident_seconds", "For how long its engine has been ready", _Look.resident_sec),
    ("router_model_expected_load_seconds", "What loading it takes, learnt", lambda look: look.model.load_sec),
    (
        "router_model_failed_attempts",
        "Loads and crashes that failed in a row",
        lambda look: look.model.attempts,
    ),
    (
        "router_engine_failed_probes",
        "Probes in a row that its engine did not answer",
        _Look.failed_probes,
    ),
    (
        "router_engine_silent_seconds",
        "For how long an engine that has requests has sent nothing",
        _Look.silent_sec,
    ),
)


def _gauges(dispatcher: Dispatcher) -> Iterator[Family]:
    yield from _model_gauges(dispatcher)
    yield from _memory_gauges(dispatcher)
    yield from _scheduler_gauges(dispatcher)
    yield from _gpu_gauges(dispatcher.devices.last.gpus)
    yield from _machine_gauges()
    yield _single("router_models_loaded_total", "Engines resident", len(dispatcher.scheduler.engines))
    yield _single("router_uptime_seconds", "Since the start", dispatcher.uptime_sec)
    yield _failures(dispatcher)
    build = Gauges("router_build_info", "Version of the router, and what runs the models", "version", "engine")
    build.set(1, __version__, dispatcher.backend.name)
    yield build


def _failures(dispatcher: Dispatcher) -> Counter:
    failures = Counter(
        "router_background_failures_total", "Background tasks that broke and were begun again", "task"
    )
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
    states = Gauges("router_model_state", "1 for the state that a model is in", "model", "state")
    states.lines(
        (label + state_label, int(state == look.state)) for label, look in looks for state, state_label in _STATES
    )
    yield states
    waiting = Gauges("router_queue_by_priority", "Requests that wait, by priority", "model", "priority")
    waiting.lines(depths)
    yield waiting
    longest = Gauges("router_queue_oldest_wait_seconds", "Longest wait of those that wait", "model", "priority")
    longest.lines(oldest)
    yield longest
    for name, text, value in _PER_MODEL:
        gauges = Gauges(name, text, "model")
        gauges.lines((label, value(look)) for label, look in looks)
        yield gauges


_PRIORITY_LABELS = tuple((priority, f',priority="{name}"') for priority, name in NAMES.items())
_STATES = tuple((state, f',state="{state}"') for state in ModelState)


def _memory_gauges(dispatcher: Dispatcher) -> Iterator[Gauges]:
    ledger = dispatcher.ledger
    accounts = ledger.accounts.values()
    booked = _summed((account.alias, account.main_mib) for account in accounts)
    by_model = Gauges("router_model_vram_bytes", "What its engine takes of GPUs; without any, of RAM", "model")
    for alias in dispatcher.scheduler.models:
        by_model.set(booked.get(alias, 0) * _MIB, alias)
    yield by_model
    held = _summed(((each.alias, str(device)), mib) for each in accounts for device, mib in each.holds.items())
    measured = Gauges("router_model_memory_bytes", "What its engine holds, as measured last", "model", "device")
    for labels, mib in held.items():
        measured.set(mib * _MIB, *labels)
    yield measured
    lines = ledger.lines()
    for name, text, amounts in (
        ("router_memory_total_bytes", "Memory of a device", [line.reading.total_mib for line in lines]),
        ("router_memory_budget_bytes", "What all engines together may use", [line.budget_mib for line in lines]),
        ("router_memory_reserved_bytes", "What engines are booked with", [line.booked_mib for line in lines]),
        ("router_memory_external_bytes", "What others hold", [line.external_mib for line in lines]),
    ):
        gauges = Gauges(name, text, "device")
        for line, mib in zip(lines, amounts, strict=True):
            gauges.set(mib * _MIB, str(line.device))
        yield gauges


def _summed(figures: Iterable[tuple[K, int]]) -> dict[K, int]:
    """Of each model, whose engines may be several."""
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
            yield _single(*constant.metric, figures)
            continue
        gauges = Gauges(*constant.metric, "priority")
        for priority in Priority:
            gauges.set(figures[priority], NAMES[priority])
        yield gauges
    yield _single("router_models_limit", "Engines that may be resident", policy.places)


def _gpu_gauges(gpus: Sequence[Reading]) -> Iterator[Gauges]:
    """As the drivers said last; without a line where they do not tell."""
    for name, text, value in _PER_GPU:
        gauges = Gauges(name, text, "gpu")
        for gpu in gpus:
            if (figure := value(gpu)) is not None:
                gauges.set(figure, str(gpu.device))
        yield gauges


_PER_GPU: tuple[tuple[str, str, Callable[[Reading], float | None]], ...] = (
    ("router_gpu_vram_total_bytes", "Memory of a GPU", lambda gpu: gpu.total_mib * _MIB),
    (
        "router_gpu_vram_used_bytes",
        "What everybody uses of it",
        lambda gpu: (gpu.total_mib - gpu.free_mib) * _MIB,
    ),
    ("router_gpu_vram_free_bytes", "What nobody uses of it", lambda gpu: gpu.free_mib * _MIB),
    (
        "router_gpu_utilization_percent",
        "Share of the time in which it worked",
        lambda gpu: None if gpu.utilization is None else 100 * gpu.utilization,
    ),
    ("router_gpu_temperature_celsius", "Temperature", lambda gpu: gpu.temperature_c),
    ("router_gpu_power_watts", "Power drawn", lambda gpu: gpu.power_w),
    ("router_gpu_power_limit_watts", "Power that it may draw", lambda gpu: gpu.power_limit_w),
)


def _machine_gauges() -> Iterator[Gauges]:
    memory = psutil.virtual_memory()
    yield _single("router_system_cpu_percent", "Of all cores, since the last scrape", psutil.cpu_percent())
    yield _single("router_system_ram_total_bytes", "Memory of the machine", memory.total)
    yield _single("router_system_ram_used_bytes", "Memory that is not available", memory.total - memory.available)
    yield _single("router_system_ram_percent", "The same as a share", memory.percent)


def _single(name: str, text: str, value: float) -> Gauges:
    gauges = Gauges(name, text)
    gauges.set(value)
    return gauges
