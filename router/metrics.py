"""Prometheus: counters and histograms fed by events, gauges read from the scheduler when scraped.

Aliases come from the configuration only, so that no client can make labels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.dispatcher import Dispatcher
from router.events import Happening, ModelChanged, RequestDone
from router.queue import Priority

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STATUS = {"off": 0, "loading": 1, "ready": 2, "draining": 2, "stopping": 0, "failed": 3}


class Metrics:
    """Everything under `/metrics`."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter(
            "router_requests_total", "Requests by outcome", "model", "status", "endpoint"
        )
        self._duration = self._histogram(
            "router_request_duration_seconds", "From arrival to end", "model", "endpoint"
        )
        self._queue_wait = self._histogram("router_queue_wait_seconds", "From arrival to a slot", "model")
        self._load = self._histogram("router_model_load_duration_seconds", "From start to ready", "model")
        self._loads = self._counter("router_model_loads_total", "Engines that became ready", "model")
        self._ejects = self._counter("router_model_ejects_total", "Engines stopped, by cause", "model", "cause")
        self._registry.register(_Gauges(dispatcher))
        self._dispatcher = dispatcher
        self._loading: set[str] = set()
        self._found: dict[tuple[str, str, str], tuple[Counter, Histogram, Histogram]] = {}
        dispatcher.events.listen(self._note)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=_SECONDS, registry=self._registry)

    def _note(self, happening: Happening) -> None:
        match happening:
            case RequestDone():
                requests, duration, queue_wait = self._of(happening.alias, happening.outcome, happening.route)
                requests.inc()
                duration.observe(happening.total_sec)
                queue_wait.observe(happening.queue_sec)
            case ModelChanged(alias, state, reason):
                was_loading = alias in self._loading
                self._loading.discard(alias)
                if state == "loading":
                    self._loading.add(alias)
                elif state == "ready" and was_loading:
                    self._note_load(alias)
                elif state == "stopping":
                    self._ejects.labels(alias, reason).inc()
            case _:
                pass

    def _of(self, alias: str, outcome: str, route: str) -> tuple[Counter, Histogram, Histogram]:
        """Finding a metric by its labels costs more than counting."""
        key = (alias, outcome, route)
        if key not in self._found:
            self._found[key] = (
                self._requests.labels(alias, outcome, route),
                self._duration.labels(alias, route),
                self._queue_wait.labels(alias),
            )
        return self._found[key]

    def _note_load(self, alias: str) -> None:
        engine = self._dispatcher.scheduler.models[alias].engine
        if engine is not None:
            self._loads.labels(alias).inc()
            self._load.labels(alias).observe(engine.ready_sec - engine.started_sec)


class _Gauges(Collector):
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterator[Metric]:
        scheduler = self._dispatcher.scheduler
        depth = GaugeMetricFamily("router_queue_depth", "Requests that wait", labels=["model"])
        classes = GaugeMetricFamily(
            "router_queue_by_priority", "Requests that wait, by priority", labels=["model", "priority"]
        )
        active = GaugeMetricFamily("router_active_requests", "Requests in flight", labels=["model"])
        status = GaugeMetricFamily(
            "router_model_status", "0 stopped, 1 loading, 2 ready, 3 error", labels=["model"]
        )
        slots = GaugeMetricFamily("router_model_slots_total", "Requests served at once", labels=["model"])
        memory = GaugeMetricFamily("router_model_vram_bytes", "Memory reserved by placement", labels=["model"])
        for alias, model in scheduler.models.items():
            engine = model.engine
            placement = engine.placement if engine is not None else {}
            depth.add_metric([alias], len(model.queue))
            for priority in Priority:
                classes.add_metric([alias, priority.name.lower()], model.queue.count(priority))
            active.add_metric([alias], len(engine.in_flight) if engine is not None else 0)
            status.add_metric([alias], _STATUS[scheduler.state(alias)])
            slots.add_metric([alias], model.spec.slots)
            memory.add_metric([alias], placement.get(self._dispatcher.device.name, 0) << 20)
        yield from (depth, classes, active, status, slots, memory)
        yield GaugeMetricFamily("router_models_loaded_total", "Engines resident", value=len(scheduler.engines))
        uptime = time.time() - self._dispatcher.started_at
        yield GaugeMetricFamily("router_uptime_seconds", "Since the start", value=uptime)
