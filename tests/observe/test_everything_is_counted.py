"""Three hundred requests of which we know how each ends; then everything that counts must agree, to the last."""

from __future__ import annotations

import json
import shlex
import socket
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import FAKE_ENGINE, Router, Start, eventually, models
from prometheus_client.parser import text_string_to_metric_families as parse

from router.engines.llamacpp import embedded

Ends = Counter[tuple[str, str, str]]
"""Alias, priority, outcome: how many."""

CHAT = "/v1/chat/completions"


@pytest.fixture
def router(start: Start, tiny: Path, tmp_path: Path) -> Router:
    """`real` has a real engine; the others are played, each with its own fault."""
    engine = tmp_path / "engine"
    real = shlex.join(embedded.command())
    engine.write_text(
        f'#!/bin/sh\ncase "$*" in *"--alias real"*) exec {real} "$@";; esac\n'
        f'exec {sys.executable} {FAKE_ENGINE} "$@"\n'
    )
    engine.chmod(0o755)
    (tmp_path / "events").write_text('{"choices": []}\n{"error":{"code":500,"message":"it failed"}}\n')
    faults = {
        "fast": {},
        "stuck": {"FAKE_READY": "never"},
        "slow": {"FAKE_ANSWER_SEC": "60", "FAKE_DEAF": "1"},
        **{f"dies-{n}": {"FAKE_DIE": f"once {tmp_path}/death-{n}"} for n in range(3)},
        "breaks": {"FAKE_DIE": "after"},
        "gives-up": {"FAKE_EVENTS": f"{tmp_path}/events"},
    }
    return start(
        {
            "system": {
                "llama_server_path": str(engine),
                "max_concurrent_models": 20,
                "max_queue_size_per_model": 3,
                "queue_timeout_sec": 6,
                "request_timeout_sec": 3,
                "structured_logs": True,
            },
            "models": {
                **models(tiny, "real", flags=["-c", "2048", "-t", "1", "-np", "4", "--ignore-eos"]),
                **{
                    alias: models(tiny, alias, env=fault, flags=["-np", "4"])[alias]
                    for alias, fault in faults.items()
                },
            },
        }
    )


def test_everything_that_counts_agrees_to_the_last_request(router: Router) -> None:
    script = Script(router)
    script.cancelled_in_flight("slow", "low", 4)
    with ThreadPoolExecutor(12) as pool:
        slow = [
            *(pool.submit(script.served, f"dies-{number}", "high", 1) for number in range(3)),
            pool.submit(script.ends, "breaks", "normal", 1, "engine_lost", 200, stream=True),
            pool.submit(script.ends, "gives-up", "high", 1, "engine_error", 200, stream=True),
            *(pool.submit(script.ends, "slow", "normal", 1, "request_timeout", 504) for _ in range(2)),
            *(pool.submit(script.ends, "stuck", "low", 1, "queue_timeout", 504) for _ in range(3)),
        ]
        eventually(lambda: router.http.get("/v1/queue/stats").json()["per_model"]["stuck"]["queue_length"] == 3)
        script.ends("stuck", "low", 30, "queue_full", 429)
        for priority in ("high", "normal", "low"):
            script.served("real", priority, 20)
            script.served("real", priority, 20, stream=True)
            script.served("fast", priority, 30)
        for request in slow:
            request.result()
    script.ends("real", "normal", 10, "engine_refused", 400)
    script.turned_away(7, {"model": "nobody"}, "model_not_found", 404)
    script.turned_away(14, {"messages": []}, "model_required", 400)
    script.turned_away(15, {"model": "real"}, "invalid_priority", 400, **{"x-request-priority": "x"})
    assert script.expected.total() == 300

    eventually(lambda: sum(counted(router).values()) == 300)
    assert counted(router) == script.expected
    script.compare_with_the_other_metrics()
    script.compare_with_telemetry()
    script.compare_with_the_queue()
    router.stop()
    script.compare_with_the_log()


def counted(router: Router) -> Ends:
    """What `router_requests_total` says."""
    samples = samples_of(router.http.get("/metrics").text, "router_requests_total")
    return Counter({(s["model"], s["priority"], s["status"]): int(n) for s, n in samples})


def samples_of(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    return [(s.labels, s.value) for family in parse(text) for s in family.samples if s.name == name]


class Script:
    """Makes requests whose end is known, and keeps the account."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.expected: Ends = Counter()
        self.streams: Counter[tuple[str, str]] = Counter()
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.tokens: Counter[str] = Counter()
        self._lock = threading.Lock()

    def served(self, alias: str, priority: str, count: int, *, stream: bool = False) -> None:
        self.ends(alias, priority, count, "served", 200, stream=stream)

    def ends(
        self, alias: str, priority: str, count: int, outcome: str, status: int, *, stream: bool = False
    ) -> None:
        headers = {"x-request-priority": priority}
        mistake = {"temperature": "hot"} if outcome == "engine_refused" else {}
        for _ in range(count):
            answer = self.router.chat(alias, stream=stream, max_tokens=3, headers=headers, **mistake)
            assert answer.status_code == status, answer.text
            if alias == "real" and outcome == "served":
                self.tokens[alias] += 3
            if outcome == "engine_lost":  # without the engine's figures: as many as pieces of text have passed
                self.tokens[alias] += answer.text.count('"content"')
        self._account(alias, priority, count, outcome, status)
        self.streams[alias, priority] += count * stream

    def cancelled_in_flight(self, alias: str, priority: str, count: int) -> None:
        self.router.http.post("/v1/models/load", json={"model": alias})
        body = json.dumps({"model": alias, "messages": []}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nx-request-priority: {priority}\r\n"
        clients = [socket.create_connection(self.router.address) for _ in range(count)]
        for client in clients:
            client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: self._in_flight(alias) == count)
        for client in clients:
            client.close()
        eventually(lambda: self._in_flight(alias) == 0)
        self._account(alias, priority, count, "cancelled", 0)

    def turned_away(self, count: int, body: dict[str, Any], outcome: str, status: int, **headers: str) -> None:
        for _ in range(count):
            answer = self.router.http.post(CHAT, json=body, headers=headers)
            assert answer.status_code == status, answer.text
        self._account("", "", count, outcome, status)

    def _account(self, alias: str, priority: str, count: int, outcome: str, status: int) -> None:
        with self._lock:
            self.expected[alias, priority, outcome] += count
            self.statuses[alias, status] += count

    def _in_flight(self, alias: str) -> int:
        stats = self.router.http.get("/v1/queue/stats").json()["per_model"][alias]
        return int(stats["current_processing"])

    # --- what must agree ----------------------------------------------------------------------------------

    def by(self, *parts: int, asked: bool = True) -> Counter[Any]:
        """Requests that asked for a slot, by some of alias, priority and outcome."""
        sums: Counter[Any] = Counter()
        for key, count in self.expected.items():
            if key[1] or not asked:
                sums[tuple(key[part] for part in parts) if len(parts) > 1 else key[parts[0]]] += count
        return sums

    def compare_with_the_other_metrics(self) -> None:
        text = self.router.http.get("/metrics").text

        def by_model(name: str) -> dict[str, int]:
            return {s["model"]: int(n) for s, n in samples_of(text, name) if n}

        assert by_model("router_request_duration_seconds_count") == self.by(0)
        waits = samples_of(text, "router_queue_wait_seconds_count")
        assert {(s["model"], s["priority"]): n for s, n in waits} == self.by(0, 1)
        first = samples_of(text, "router_time_to_first_token_seconds_count")
        assert {(s["model"], s["priority"]): n for s, n in first if n} == +self.streams
        assert by_model("router_queue_rejected_total") == {"stuck": 33}
        assert by_model("router_timeout_requests_total") == {"stuck": 3, "slow": 2}
        for name, low, high in (("4xx", 400, 500), ("5xx", 500, 600)):
            answered: Counter[str] = Counter()
            for (alias, status), count in self.statuses.items():
                answered[alias] += count * (low <= status < high)
            assert by_model(f"router_request_{name}_total") == +answered
        once = {f"dies-{number}": 1 for number in range(3)}
        assert by_model("router_retry_attempts_total") == once
        assert by_model("router_retry_success_total") == once
        assert by_model("router_output_tokens_total") == self.tokens
        assert by_model("router_engine_restarts_total").items() >= once.items()

    def compare_with_telemetry(self) -> None:
        summary = self.router.http.get("/v1/telemetry/summary").json()
        requests, served = self.by(0).total(), self.by(2)["served"]
        assert (summary["total_requests"], summary["successful"]) == (requests, served)
        cancelled = self.by(2)["cancelled"]
        assert (summary["failed"], summary["cancelled"]) == (requests - served - cancelled, cancelled)
        assert summary["success_rate"] == pytest.approx(served / (requests - cancelled))
        turned_away = {key[2]: count for key, count in self.expected.items() if not key[1]}
        assert summary["turned_away"] == turned_away
        assert {alias: m["total_requests"] for alias, m in summary["by_model"].items()} == self.by(0)
        window = summary["windows"]["5m"]
        assert window["outcomes"] == self.by(2)
        assert {name: part["requests"] for name, part in window["by_priority"].items()} == self.by(1)
        assert window["output_tokens"] == self.tokens.total()
        stuck = window["by_model"]["stuck"]["queue_sec"]
        assert stuck["p50"] < 0.1
        assert stuck["p99"] == pytest.approx(6, rel=0.1)

    def compare_with_the_queue(self) -> None:
        stats = self.router.http.get("/v1/queue/stats").json()
        assert stats["summary"]["total_processed"] == self.by(2)["served"] + self.by(2)["engine_refused"]
        assert stats["summary"]["total_rejected"] == 33
        requests = {alias: model["total_requests"] for alias, model in stats["per_model"].items()}
        assert requests == self.by(0)

    def compare_with_the_log(self) -> None:
        lines = [json.loads(line) for line in self.router.output if line.startswith('{"time"')]
        done = [line for line in lines if line["message"] == "request"]
        more = [line for line in lines if "count" in line]  # of those that were refused for the same
        outcomes, statuses = Counter[tuple[str, str, str]](), Counter[tuple[str, int]]()
        for line in (*done, *more):
            outcomes[line.get("alias", ""), line.get("priority", ""), line["outcome"]] += line.get("count", 1)
            statuses[line.get("alias", ""), line.get("status", 0)] += line.get("count", 1)
        assert outcomes == self.expected
        assert statuses == self.statuses
        assert len({d["request_id"] for d in done}) + sum(line["count"] for line in more) == 300
        assert sum(d.get("output_tokens", 0) for d in done) == self.tokens.total()
        assert sum(d.get("retries", 0) for d in done) == 3
        assert {d["reason"] for d in done if d["outcome"] == "queue_full"}
