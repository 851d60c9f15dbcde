"""Spans of requests, from the events after the fact, under the client's own trace."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conftest import Start, models

from router.events import RequestDone
from router.meter import Usage

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from router.tracing import Tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def test_a_request_becomes_a_span_with_its_parts() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))
    now = time.time()
    tracing.note(
        RequestDone(
            request_id="r1",
            alias="a",
            route="/v1/chat/completions",
            priority="high",
            outcome="served",
            status=200,
            queue_sec=2.0,
            load_sec=1.5,
            total_sec=4.0,
            at=now,
            ttft_sec=2.5,
            usage=Usage(10, 0, 20, 0.4, 1.4),
            trace=f"00-{TRACE}-{PARENT}-01",
        )
    )
    spans = {span.name: span for span in exporter.get_finished_spans()}
    request = spans["/v1/chat/completions"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.attributes is not None
    assert request.attributes["gen_ai.usage.output_tokens"] == 20
    lasted = {name: (span.end_time - span.start_time) / 1e9 for name, span in spans.items()}  # type: ignore[operator]
    assert lasted == pytest.approx(
        {"/v1/chat/completions": 4.0, "queue": 2.0, "load": 1.5, "prefill": 0.5, "stream": 1.5}, abs=1e-3
    )
    for name in ("queue", "load", "prefill", "stream"):
        assert spans[name].parent is not None
        assert spans[name].parent.span_id == request.context.span_id  # type: ignore[union-attr]


def test_a_request_that_failed_says_so() -> None:
    exporter = InMemorySpanExporter()
    Tracing(SimpleSpanProcessor(exporter)).note(
        RequestDone("r", "a", "/v1/completions", "low", "queue_timeout", 504, 3.0, 0.0, 3.0, at=time.time())
    )
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert spans.keys() == {"/v1/completions", "queue"}
    assert not spans["/v1/completions"].status.is_ok


def test_tracing_without_a_collector_delays_nobody(start: Start, tiny: Path) -> None:
    system = {"tracing": True}
    router = start(
        {"system": system, "models": models(tiny, "a")}, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9"
    )
    assert router.chat("a").status_code == 200
    assert router.stop() == 0
