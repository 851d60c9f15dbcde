"""The data path with invalid input, with waiting requests, and at its limits."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, eventually, fake, models


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    api = {"max_body_mb": 1, "cors_origins": ["http://my.page"], "allowed_hosts": ["my.proxy"]}
    endless = models(tiny, "endless", flags=["-c", "1024", "-t", "1", "--ignore-eos", "--context-shift"])
    return start_shared({"api": api, "models": models(tiny, "a", "b") | endless})


@pytest.fixture(scope="module")
def played(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    """Each model has its own way to be slow."""
    timeouts = {"queue_timeout_sec": 1.5, "request_timeout_sec": 0.8}
    ways = {
        "loads": {"FAKE_LOAD_SEC": "0.5"},
        "never-ready": {"FAKE_READY": "never"},
        "hangs": {"FAKE_ANSWER_SEC": "60", "FAKE_DEAF": "1"},
        "computes": {"FAKE_ANSWER_SEC": "2"},
        "trickles": {"FAKE_CHUNKS": "8", "FAKE_CHUNK_SEC": "0.2"},
        "bodiless": {"FAKE_STATUS": "204"},
    }
    entries = {alias: models(tiny, alias, env=way)[alias] for alias, way in ways.items()}
    entries["loads"]["model_path"] = str(shutil.copy(tiny, tmp_path_factory.mktemp("never-loaded")))
    engine = fake(tmp_path_factory.mktemp("engine"))
    system = {"llama_server_path": engine, "max_concurrent_models": len(ways), **timeouts}
    return start_shared({"api": {"heartbeat_sec": 0.2}, "system": system, "models": entries})


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"{}", 400, "model_required"),
        (b'{"model": null}', 400, "model_required"),
        (b'{"model": 7}', 400, "invalid_model"),
        (b'{"model": "c"}', 404, "model_not_found"),
        (b'{"model": "' + b"x" * (1 << 20) + b'"}', 413, "body_too_large"),
    ],
    ids=["empty", "cut off", "list", "not utf-8", "no model", "null", "number", "unknown", "too large"],
)
def test_junk_is_answered_in_openais_envelope(router: Router, body: bytes, status: int, code: str) -> None:
    answer = router.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-request-id"]


def test_a_body_without_a_length_is_limited_too(router: Router) -> None:
    def endless() -> Any:
        for _ in range(64):
            yield b" " * 65536

    assert router.http.post("/v1/chat/completions", content=endless()).status_code == 413


def test_anthropics_routes_have_their_own_envelope(router: Router) -> None:
    answer = router.http.post("/v1/messages", json={"model": "c"})
    assert answer.status_code == 404
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "not_found_error"
    good = {"model": "a", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
    assert router.http.post("/v1/messages", json=good).json()["usage"]["output_tokens"] == 2


def test_routes_that_do_not_exist_say_so(router: Router) -> None:
    assert router.http.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"
    missing = router.http.get("/v1/nonsense")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "route_not_found"


def test_other_routes_of_the_engine_are_reached(router: Router) -> None:
    tokens = router.http.post("/tokenize", json={"model": "a", "content": "ab"}).json()["tokens"]
    text = router.http.post("/detokenize", json={"model": "a", "tokens": tokens}).json()["content"]
    assert text.endswith("ab")
    prompt = router.http.post(
        "/apply-template", json={"model": "a", "messages": [{"role": "user", "content": "x"}]}
    )
    assert "x" in prompt.json()["prompt"]
    assert router.http.post("/completion", json={"model": "a", "prompt": "a", "n_predict": 1}).status_code == 200


def test_what_an_engine_answers_beside_its_slots_waits_for_none(router: Router) -> None:
    question = {
        "model": "endless",
        "content": "hi",
        "tokens": [1],
        "messages": [{"role": "user", "content": "hi"}],
    }
    stream = router.http.stream("POST", "/v1/chat/completions", json={**question, "stream": True})
    with stream as answer:
        lines = answer.iter_lines()  # it is closed with its last reference
        next(lines)
        assert router.status("endless")["in_flight"] == router.status("endless")["slots"] == 1
        for path in ("/tokenize", "/detokenize", "/apply-template", "/v1/messages/count_tokens"):
            counted = router.http.post(path, json=question, timeout=5)
            assert counted.status_code == 200, (path, counted.text)
            assert int(counted.headers["x-queue-ms"]) < 500
        loaded = router.http.post("/api/generate", json={"model": "endless"}, timeout=5)
        assert loaded.json()["done_reason"] == "load", "who only asks for a load finds it loaded"
        assert router.status("endless")["in_flight"] == 1


def test_a_multipart_body_is_routed_by_its_model_field(router: Router) -> None:
    files = {"file": ("a.wav", b"RIFF" + b"\0" * 100_000)}
    good = router.http.post("/v1/audio/transcriptions", data={"model": "a"}, files=files)
    assert good.headers["x-model-alias"] == "a"  # whatever the engine says of the audio, it was asked
    bad = router.http.post("/v1/audio/transcriptions", data={"model": "zzz"}, files=files)
    assert bad.json()["error"]["code"] == "model_not_found"
    torn = {"content-type": "multipart/form-data; boundary=x"}
    answer = router.http.post("/v1/audio/transcriptions", content=b"--x\r\nnothing", headers=torn)
    assert answer.json()["error"]["code"] == "invalid_multipart"


def test_an_answer_of_the_engine_comes_as_it_is(router: Router) -> None:
    answer = router.chat("a", max_tokens=1, temperature="hot")
    assert answer.status_code == 400
    assert "error" in answer.json()
    assert "access-control-allow-origin" not in answer.headers


def test_an_answer_without_a_body_has_no_framing_and_its_connection_stays(played: Router) -> None:
    connection = http.client.HTTPConnection(played.url.removeprefix("http://"), timeout=20)
    for _ in range(2):
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "bodiless", "messages": []}))
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (204, b"")
        assert not {"transfer-encoding", "content-length", "connection"} & {
            name.lower() for name in answer.headers
        }
    connection.close()


def test_keys(start: Start, tiny: Path) -> None:
    api = {"api_keys": ["full"], "inference_keys": ["infer"]}
    router = start({"api": api, "models": models(tiny, "a")})

    def statuses(path: str, method: str = "GET", body: Any = None) -> list[int]:
        headers: list[dict[str, str]] = [
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer infer"},
            {"authorization": "Bearer full"},
        ]
        return [router.http.request(method, path, headers=h, json=body).status_code for h in headers]

    assert statuses("/health") == [200, 200, 200, 200]
    assert statuses("/v1/models") == [401, 401, 200, 200]
    assert statuses("/v1/models/a/reset", "POST") == [401, 401, 403, 200]
    chat = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert statuses("/v1/chat/completions", "POST", chat) == [401, 401, 200, 200]
    assert router.http.get("/v1/models", headers={"x-api-key": "infer"}).status_code == 200
    for one, other in (("wrong", "infer"), ("infer", "wrong"), ("infer", "full"), ("full", "infer")):
        both = {"authorization": f"Bearer {one}", "x-api-key": other}
        asked = ("/v1/models", "GET"), ("/v1/models/a/reset", "POST")
        known = [router.http.request(method, path, headers=both).status_code for path, method in asked]
        assert known == [200, 200 if "full" in (one, other) else 403]
    neither = {"authorization": "Basic full", "x-api-key": "wrong"}
    assert router.http.get("/v1/models", headers=neither).status_code == 401
    assert "full" not in router.log


def test_a_key_that_is_taken_away_is_no_good_any_more(start: Start, tiny: Path, tmp_path: Path) -> None:
    """Though its requests go on with the same head on the same connection, which was let in many times before."""
    config = {"api": {"api_keys": ["full"], "inference_keys": ["theirs"]}, "models": models(tiny, "a")}
    router = start(config)

    def statuses() -> list[int]:
        headers = {"authorization": "Bearer theirs"}
        return [router.chat("a", content="hi" * length, headers=headers).status_code for length in range(1, 5)]

    assert statuses() == [200] * 4
    config["api"]["inference_keys"] = []
    (tmp_path / "config.json").write_text(json.dumps(config))
    reload = router.http.post("/v1/config/reload", headers={"authorization": "Bearer full"})
    assert reload.status_code == 200
    assert statuses() == [401] * 4


def test_clients_have_names_and_priorities(start: Start, tiny: Path) -> None:
    jobs = {"key": "jobs-key", "priority": "low", "highest_priority": "normal"}
    api = {"api_keys": ["full"], "clients": {"anna": {"key": "annas-key"}, "jobs": jobs}}
    aliases = {"urgent": {"uses": "a", "priority": "high"}}
    router = start({"api": api, "models": models(tiny, "a"), "aliases": aliases})

    def priority(key: str, asked: str | None = None, model: str = "a") -> str | None:
        headers = {"authorization": f"Bearer {key}"} | ({"x-request-priority": asked} if asked else {})
        answer = router.chat(model, headers=headers)
        assert answer.status_code == 200
        return answer.headers.get("x-request-priority")

    assert [priority("annas-key", asked) for asked in (None, "high", "low")] == ["normal", "high", "low"]
    assert [priority("jobs-key", asked) for asked in (None, "high", "low")] == ["low", "normal", "low"]
    assert [priority(key, model="urgent") for key in ("annas-key", "jobs-key")] == ["high", "normal"]
    assert priority("full", "high") is None
    may_not = router.http.post("/v1/models/a/reset", headers={"authorization": "Bearer annas-key"})
    assert may_not.json()["error"]["code"] == "insufficient_permissions"
    metrics = router.http.get("/metrics", headers={"authorization": "Bearer full"}).text
    for name, requests in (("anna", 4), ("jobs", 4)):
        assert f'router_client_requests_total{{client="{name}",status="served"}} {requests}\n' in metrics
        assert f'router_client_output_tokens_total{{client="{name}"}} {requests}\n' in metrics
    assert 'router_output_tokens_total{model="a"} 9\n' in metrics
    eventually(lambda: router.log.count('"client":"jobs"') == 4)
    assert "-key" not in router.log


def test_a_page_of_an_allowed_origin_may_call(router: Router) -> None:
    preflight = {"origin": "http://my.page", "access-control-request-method": "POST"}
    answer = router.http.options("/v1/chat/completions", headers=preflight)
    assert answer.headers["access-control-allow-origin"] == "http://my.page"
    preflight["origin"] = "http://evil.page"
    answer = router.http.options("/v1/chat/completions", headers=preflight)
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_that_points_its_name_at_us_is_turned_away(router: Router) -> None:
    for path in ("/v1/models", "/health"):
        assert router.http.get(path, headers={"host": "evil.page:8000"}).json()["error"]["code"] == "unknown_host"
        for known in ("localhost:8000", "127.0.0.1", "[::1]:8000", "My.Proxy"):
            assert router.http.get(path, headers={"host": known}).status_code == 200
    chat = {"model": "a", "messages": []}
    assert router.http.post("/v1/chat/completions", json=chat, headers={"host": "evil.page"}).status_code == 403


def test_a_stream_that_waits_gets_heartbeats_with_the_reason(played: Router) -> None:
    answer = played.chat("loads", stream=True)
    assert answer.headers["x-queue-position"] == "1"
    assert answer.headers["x-queue-reason"].startswith("loads is loading (")
    assert answer.headers["x-queue-expected-ms"] == "unknown", "it was never loaded"
    lines = answer.text.splitlines()
    beats = [line for line in lines if line.startswith(":")]
    assert len(beats) >= 2
    assert "position 1" in beats[0]
    assert "time to go unknown" in beats[0]
    assert "loading" in beats[0]
    assert lines[-2:] == ["data: [DONE]", ""]
    assert sum("delta" in line for line in lines) == 3


def test_a_stream_that_waited_in_vain_ends_with_an_error_event(played: Router) -> None:
    answer = played.chat("never-ready", stream=True)
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[0])["error"]["code"] == "queue_timeout"
    assert events[1] == "[DONE]"
    plain = played.chat("never-ready")
    assert plain.status_code == 504
    assert "loading" in plain.json()["error"]["message"]


def test_a_full_queue_refuses_with_an_honest_time(start: Start, tiny: Path, tmp_path: Path) -> None:
    system = {"llama_server_path": fake(tmp_path, ready="never"), "max_queue_size_per_model": 2}
    clients = {name: {"key": f"{name}-key"} for name in ("anna", "jobs")}
    api = {"api_keys": ["full"], "clients": clients}
    router = start({"api": api, "system": system, "models": models(tiny, "a")})
    router.http.headers["authorization"] = "Bearer full"
    body = json.dumps({"model": "a", "messages": []}).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"authorization: Bearer jobs-key\r\ncontent-length: %d\r\n\r\n" % len(body)
    )
    waiting = [socket.create_connection(router.address) for _ in range(2)]
    for connection in waiting:
        connection.sendall(head + body)
    eventually(lambda: router.queued == 2)
    in_line = router.http.get("/v1/queue/stats").json()["per_model"]["a"]["waiting"]
    assert [(request["client"], request["position"]) for request in in_line] == [("jobs", 1), ("jobs", 2)]
    refused = router.chat("a")
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert "retry-after" not in refused.headers, "it was never loaded"
    for connection in waiting:  # clients that leave free their places
        connection.close()
    eventually(lambda: router.queued == 0)


def test_an_engine_that_says_nothing_and_answers_no_probe_is_given_up(played: Router) -> None:
    answer = played.chat("hangs")
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "request_timeout"


def test_an_engine_that_computes_in_silence_is_waited_for(played: Router) -> None:
    assert played.chat("computes").status_code == 200
    assert played.http.get("/v1/health/models").json()["models"]["computes"]["failed_probes"] == 0


def test_who_wants_no_longer_silence_than_that_may_say_so(start: Start, tiny: Path, tmp_path: Path) -> None:
    system = {"llama_server_path": fake(tmp_path, answer_sec="60"), "answer_timeout_sec": 0.5}
    answer = start({"system": system, "models": models(tiny, "a")}).chat("a")
    assert answer.status_code == 504
    assert "answer_timeout_sec" in answer.json()["error"]["message"]


def test_a_slow_stream_is_not_given_up_while_it_moves(played: Router) -> None:
    text = played.chat("trickles", stream=True).text
    assert text.endswith("data: [DONE]\n\n")
