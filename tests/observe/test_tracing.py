"""Spans of requests, from the events after the fact, under the client's own trace."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Start, fake, models

from router.observe.events import RequestDone, RequestsDone
from router.observe.usage import Usage

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from router.observe.tracing import Tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def test_a_request_becomes_a_span_with_its_parts() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))
    now = time.time()
    done = RequestDone(
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
        kv="disk",
    )
    tracing.note(RequestsDone([done]))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    request = spans["/v1/chat/completions"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.attributes is not None
    assert request.attributes["gen_ai.usage.output_tokens"] == 20
    assert request.attributes["llama_router.kv"] == "disk"
    lasted = {name: (span.end_time - span.start_time) / 1e9 for name, span in spans.items()}  # type: ignore[operator]
    assert lasted == pytest.approx(
        {"/v1/chat/completions": 4.0, "queue": 2.0, "load": 1.5, "prefill": 0.5, "stream": 1.5}, abs=1e-3
    )
    for name in ("queue", "load", "prefill", "stream"):
        assert spans[name].parent is not None
        assert spans[name].parent.span_id == request.context.span_id  # type: ignore[union-attr]


def test_a_request_that_failed_says_so() -> None:
    exporter = InMemorySpanExporter()
    done = RequestDone("r", "a", "/v1/completions", "low", "queue_timeout", 504, 3.0, 0.0, 3.0, at=time.time())
    Tracing(SimpleSpanProcessor(exporter)).note(RequestsDone([done]))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert spans.keys() == {"/v1/completions", "queue"}
    assert not spans["/v1/completions"].status.is_ok


class Collector(ThreadingHTTPServer):
    """Takes spans as an OpenTelemetry collector does, over OTLP/HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Intake)
        self.service = ""
        self.spans: dict[str, Span] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Intake(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in sent.resource_spans:
            attributes = {item.key: item.value.string_value for item in resource.resource.attributes}
            self.server.service = attributes["service.name"]
            for scope in resource.scope_spans:
                self.server.spans |= {span.name: span for span in scope.spans}
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    yield server
    server.shutdown()
    server.server_close()


def test_a_collector_gets_the_spans_of_requests_under_their_clients_traces(
    start: Start, tiny: Path, tmp_path: Path, collector: Collector
) -> None:
    engine = fake(tmp_path, load_sec="0.1", answer_sec="0.1", chunk_sec="0.02")
    config = {"system": {"tracing": True, "llama_server_path": engine}, "models": models(tiny, "a")}
    router = start(config, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_SERVICE_NAME="my-router")
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine", "x-request-priority": "high"}
    assert router.chat("a", stream=True, headers=headers).status_code == 200
    assert router.chat("a", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}).status_code == 200  # not sampled
    assert router.stop() == 0

    assert collector.service == "my-router"
    request = collector.spans.pop("/v1/chat/completions")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    attributes = {item.key: item.value.string_value for item in request.attributes}
    assert attributes["llama_router.request_id"] == "mine"
    assert {span.parent_span_id for span in collector.spans.values()} == {request.span_id}
    lasted = {n: (s.end_time_unix_nano - s.start_time_unix_nano) / 1e9 for n, s in collector.spans.items()}
    assert lasted.keys() == {"queue", "load", "prefill", "stream"}
    assert lasted["queue"] >= lasted["load"] >= 0.1
    assert lasted["prefill"] >= 0.1
    assert lasted["stream"] >= 0.04


def test_tracing_without_a_collector_delays_nobody(start: Start, tiny: Path) -> None:
    system = {"tracing": True}
    router = start(
        {"system": system, "models": models(tiny, "a")}, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9"
    )
    assert router.chat("a").status_code == 200
    assert router.stop() == 0
