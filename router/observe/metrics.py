"""Prometheus metrics that are counted as events happen; `runtime/gauges.py` has those that are read on demand.

Aliases, routes, priorities and outcomes are the router's own words, so that no client can create labels; a request
for no configured model has `model=""`. `monitoring/README.md` lists every metric.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain

import psutil
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from router.observe.events import (
    Breakdown,
    ClientRefused,
    EngineEnded,
    Events,
    Labels,
    ModelChanged,
    Outcome,
    RequestDone,
    RequestsDone,
)
from router.observe.prometheus import Counter, CounterCell, Family, Histogram, exposition
from router.observe.usage import Usage
from router.scheduling.messages import ModelState, Refusal
from router.scheduling.residency import Engine
from router.scheduling.scheduler import Scheduler
from router.system.turns import in_turns

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LAG_LOOK_SEC = 1.0
_REFUSALS = frozenset(Refusal)
_TIMEOUTS = frozenset({Refusal.QUEUE_TIMEOUT, "request_timeout"})


class NotAcceptable(Exception):
    """Raised for an invalid Accept header."""


class Metrics:
    """Everything under `/metrics`. Create it on the router's event loop."""

    def __init__(self, events: Events, scheduler: Scheduler, read: Callable[[], Iterable[Family]]) -> None:
        """`read` returns the metrics that are not counted, but read for each scrape."""
        self._events = events
        self._scheduler = scheduler
        self._read = read
        self._requests = _Requests()
        self._engines = _Engines(scheduler)
        self._refused = Counter(
            "router_clients_refused_total",
            "Client connections closed or refused by the router, by reason",
            "reason",
        )
        self._lag = Histogram("router_event_loop_lag_seconds", "Delay of event loop timers", bounds=_LAG_SECONDS)
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        psutil.cpu_percent()  # measures the time since the previous call
        self._loop = asyncio.get_running_loop()
        self._look_at_lag(self._loop.time())
        events.listen(RequestsDone, self._requests.note)
        events.listen(ClientRefused, self._note_refused)
        events.listen(ModelChanged, self._engines.note)
        events.listen(EngineEnded, self._engines.note)

    async def exposition(self, accept: str = "", client: str | None = None) -> tuple[bytes, str]:
        """Return the text of all metrics and its content type: OpenMetrics if `accept` requests it.

        For a `client`, without the series of other clients. The text is written in several turns of the event
        loop, because with many models it takes longer than a token may be delayed. Raises NotAcceptable.
        """
        self._events.settle()
        try:
            encode, content_type = choose_encoder(accept)
        except Exception as error:  # it fails on invalid quality values
            raise NotAcceptable from error
        openmetrics = content_type.startswith("application/openmetrics-text")
        self._engines.know(self._scheduler.models)
        self._requests.know(self._scheduler.models)
        counted: list[Family] = [
            *self._requests.families,
            *self._engines.families,
            self._refused,
            self._lag,
        ]
        if client is not None:
            counted = [self._requests.only_of(client, family) for family in counted]
        parts: list[bytes] = []
        async for family in in_turns(chain(counted, self._read())):
            parts += exposition([family], openmetrics=openmetrics)
        return b"".join([*parts, encode(self._process)]), content_type

    def _note_refused(self, happening: ClientRefused) -> None:
        self._refused.of(happening.reason).value += 1

    def _look_at_lag(self, due: float) -> None:
        now = self._loop.time()
        self._lag.of().observe([max(0.0, now - due)])
        self._loop.call_at(now + _LAG_LOOK_SEC, self._look_at_lag, now + _LAG_LOOK_SEC)


class _Requests:
    """Metrics that are counted when a request ends."""

    def __init__(self) -> None:
        self.requests = Counter(
            "router_requests_total", "Requests by outcome", "model", "endpoint", "priority", "status"
        )
        self.rejected = Counter("router_queue_rejected_total", "Requests refused by the scheduler", "model")
        self.timeouts = Counter("router_timeout_requests_total", "Requests that timed out", "model")
        self.client_errors = Counter("router_request_4xx_total", "Requests answered with 4xx", "model")
        self.server_errors = Counter("router_request_5xx_total", "Requests answered with 5xx", "model")
        self.retries = Counter(
            "router_retry_attempts_total", "Returns of requests to the queue after an engine failure", "model"
        )
        self.retried = Counter(
            "router_retry_success_total", "Requests served after a return to the queue", "model"
        )
        self.resends = Counter(
            "router_upstream_resends_total",
            "Requests resent because the engine closed an idle connection",
            "model",
        )
        self.input_tokens = Counter("router_input_tokens_total", "Prompt tokens", "model")
        self.cached_tokens = Counter(
            "router_cached_tokens_total", "Prompt tokens found in an engine's cache", "model"
        )
        self.output_tokens = Counter("router_output_tokens_total", "Output tokens", "model")
        self.generated = Counter("router_tokens_generated_total", "Output tokens (former name)", "model")
        self.prefill = Counter("router_prefill_seconds_total", "Engine time spent on prompts", "model")
        self.decode = Counter("router_decode_seconds_total", "Engine time spent on generation", "model")
        self.received = Counter("router_request_bytes_total", "Bytes of request bodies", "model")
        self.sent = Counter("router_response_bytes_total", "Bytes of engine responses", "model")
        self.duration = Histogram(
            "router_request_duration_seconds",
            "Time from the complete request to the end of the response",
            "model",
            "endpoint",
            bounds=_SECONDS,
        )
        self.queue_wait = Histogram(
            "router_queue_wait_seconds",
            "Time from the complete request to a slot, or to the end of the wait",
            "model",
            "priority",
            bounds=_SECONDS,
        )
        self.first_token = Histogram(
            "router_time_to_first_token_seconds",
            "Time from the complete request to the first byte of a streamed response",
            "model",
            "priority",
            bounds=_SECONDS,
        )
        self.per_token = Histogram(
            "router_time_per_output_token_seconds",
            "Engine time per output token after the first",
            "model",
            bounds=_TOKEN_SECONDS,
        )
        self.client_requests = Counter(
            "router_client_requests_total", "Requests with a client's key, by outcome", "client", "status"
        )
        self.client_input_tokens = Counter(
            "router_client_input_tokens_total", "Prompt tokens of a client", "client"
        )
        self.client_output_tokens = Counter(
            "router_client_output_tokens_total", "Output tokens of a client", "client"
        )
        self.client_wait = Histogram(
            "router_client_queue_wait_seconds",
            "Time that a client's requests waited for a slot, or to the end of the wait",
            "client",
            bounds=_SECONDS,
        )
        self._by_client = (
            self.client_requests,
            self.client_input_tokens,
            self.client_output_tokens,
            self.client_wait,
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
            *self._by_client,
            self.duration,
            self.queue_wait,
            self.first_token,
            self.per_token,
        )
        self._found: dict[Labels, _Cells] = {}
        self._known: set[str] = set()

    def only_of(self, client: str, family: Family) -> Family:
        """Return a family without the series of other clients."""
        return next((own.beginning_with(client) for own in self._by_client if own is family), family)

    def know(self, aliases: Collection[str]) -> None:
        """Create the counters of new models at 0, so that rates include the first count; remove old ones."""
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
    """The series of requests that share all labels. Looking up a series costs more than counting."""

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
        self._waits = [series.queue_wait.of(alias, priority)]
        self._inputs = [series.input_tokens.of(alias)]
        self._outputs = [series.output_tokens.of(alias), series.generated.of(alias)]
        if client:
            self._waits.append(series.client_wait.of(client))
            self._inputs.append(series.client_input_tokens.of(client))
            self._outputs.append(series.client_output_tokens.of(client))
        self._duration = series.duration.of(alias, route)
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
        waits = [done.queue_sec for done in requests]
        for histogram in self._waits:
            histogram.observe(waits)
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
    """Metrics that are counted when an engine becomes ready, is stopped, or ends."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._known: set[str] = set()
        self._loading: set[int] = set()
        """Engines that have not become ready yet."""
        self._waking: set[int] = set()
        self._broken: set[str] = set()
        """Models whose last engine ended unexpectedly."""
        self.load = Histogram(
            "router_model_load_duration_seconds", "Time from engine start to ready", "model", bounds=_SECONDS
        )
        self.wake = Histogram(
            "router_model_wake_duration_seconds", "Time to wake up an engine", "model", bounds=_SECONDS
        )
        self.loads = Counter("router_model_loads_total", "Engine starts that became ready", "model")
        self.restarts = Counter(
            "router_engine_restarts_total", "Engine starts that became ready after an engine failure", "model"
        )
        self.ejects = Counter(
            "router_model_ejects_total", "Engines stopped by the router, by cause", "model", "cause"
        )
        self.exits = Counter(
            "router_engine_exits_total",
            "Engine exits, by cause: why it was stopped, or crashed, hung, load_failed",
            "model",
            "reason",
        )
        self.families: tuple[Counter | Histogram, ...] = (
            self.load,
            self.wake,
            self.loads,
            self.restarts,
            self.ejects,
            self.exits,
        )

    def know(self, aliases: Collection[str]) -> None:
        """Create the counters of new models at 0, and remove those of old ones."""
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
            engine = self._scheduler.engines.get(engine_id)
            (self._waking if engine is not None and engine.wakes_up else self._loading).add(engine_id)
        elif engine_id in self._waking:
            self._waking.discard(engine_id)
            if happening.state is ModelState.READY:
                engine = self._scheduler.engines[engine_id]
                self.wake.of(alias).observe([engine.ready_sec - engine.started_sec])
        elif engine_id in self._loading:
            self._loading.discard(engine_id)
            if happening.state is ModelState.READY:
                self._note_load(self._scheduler.engines[engine_id])

    def _note_load(self, engine: Engine) -> None:
        alias = engine.alias
        self.loads.of(alias).value += 1
        self.load.of(alias).observe([engine.ready_sec - engine.started_sec])
        if alias in self._broken:
            self._broken.discard(alias)
            self.restarts.of(alias).value += 1
