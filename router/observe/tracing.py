"""OpenTelemetry spans of requests, created from the event at the end of each request.

Optional: `pip install 'llama-router[otel]'` and `system.tracing`; otherwise OpenTelemetry is not imported. The
destination is configured by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, …), and
a thread of the SDK exports the spans. A client's `traceparent` becomes the parent of the span, and is forwarded to
the engine.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context

from router import __version__
from router.observe.events import Outcome, RequestDone, RequestsDone

_WELL = (Outcome.SERVED, Outcome.CANCELLED, Outcome.ENGINE_REFUSED)

_NS = 1_000_000_000
_CLOSE_SEC = 2.0


class Tracing:
    """Exports spans of the requests passed to `note`; `close` it at the end."""

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        if processor is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            processor = BatchSpanProcessor(OTLPSpanExporter())
        service = {"service.name": "llama-router", "service.version": __version__}
        resource = Resource(service).merge(Resource.create())  # variables such as OTEL_SERVICE_NAME win
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(processor)
        self._tracer: Tracer = self._provider.get_tracer("llama-router", __version__)

    def note(self, happening: RequestsDone) -> None:
        for done in happening.requests:
            if done.priority:
                self._trace(done)

    def close(self) -> None:
        """Export pending spans, but do not wait long for a collector that does not respond."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_CLOSE_SEC)

    def _trace(self, done: RequestDone) -> None:
        """Create the span of a request and, within it, `queue` with `load`, `prefill` and `stream`."""
        began = done.at - done.total_sec
        granted = began + done.queue_sec
        span = self._tracer.start_span(
            done.route,
            context=extract({"traceparent": done.trace}) if done.trace else None,
            kind=SpanKind.SERVER,
            start_time=_ns(began),
            attributes=_attributes(done),
        )
        inside = set_span_in_context(span)
        parts = [("queue", began, granted)]
        if done.load_sec:
            parts.append(("load", granted - done.load_sec, granted))
        if done.ttft_sec is not None:
            first = began + done.ttft_sec
            parts += [("prefill", granted, first), ("stream", first, done.at)]
        for name, start, end in parts:
            self._tracer.start_span(name, context=inside, start_time=_ns(start)).end(_ns(end))
        if done.outcome not in _WELL:
            span.set_status(Status(StatusCode.ERROR, done.outcome))
        span.end(_ns(done.at))


def _attributes(done: RequestDone) -> Mapping[str, str | int]:
    """Return the attributes, named by OpenTelemetry's conventions for HTTP and generative AI where they exist."""
    return {
        "http.route": done.route,
        "http.response.status_code": done.status,
        "gen_ai.request.model": done.alias,
        "gen_ai.usage.input_tokens": done.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": done.usage.output_tokens,
        "llama_router.request_id": done.request_id,
        "llama_router.priority": done.priority,
        "llama_router.outcome": done.outcome,
        "llama_router.retries": done.retries,
        **({"llama_router.kv": done.kv} if done.kv else {}),
    }


def _ns(seconds: float) -> int:
    return int(seconds * _NS)
