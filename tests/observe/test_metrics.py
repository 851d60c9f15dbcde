"""`/metrics`: in both formats, as documented, with the right values."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, Router, Start, eventually, fake, models
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from router.engines.llamacpp.metrics import relayed
from router.observe.prometheus import exposition

# Gauges that dashboards of earlier routers know by these names.
OLDER_NAMES = {"router_model_slots_total", "router_models_loaded_total"}
ROW = re.compile(r"\| `(?P<name>\w+)` \| (?P<kind>\w+) \| (?P<labels>[^|]*) \| (?P<text>.*) \|")


def test_every_metric_is_documented_and_in_both_formats(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "a", "b/c")})
    assert router.chat("a").status_code == 200
    assert router.chat("a", stream=True).status_code == 200
    assert router.chat("no such model").status_code == 404
    eventually(lambda: memory_agrees(router), timeout_sec=20)  # also: the engine is measured

    plain = router.http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    described = [line.split(" ", 3)[2:] for line in plain.text.splitlines() if line.startswith("# HELP router_")]
    kinds = dict(line.split(" ")[2:] for line in plain.text.splitlines() if line.startswith("# TYPE "))
    documented = {row["name"]: row for row in ROW.finditer((ROOT / "monitoring" / "README.md").read_text())}
    assert {name: (kinds[name], text) for name, text in described} == {
        name: (row["kind"], row["text"]) for name, row in documented.items()
    }
    assert {name for name, row in documented.items() if row["kind"] == "gauge" and name.endswith("_total")} == (
        OLDER_NAMES
    ), "gauges do not end like counters"
    labels: dict[str, set[str]] = {}
    families = list(parse(plain.text))
    for sample in (sample for family in families for sample in family.samples):
        name = re.sub(r"_(bucket|sum|count)$", "", sample.name)
        labels.setdefault(name, set()).update(sample.labels.keys() - {"le"})
    for name, row in documented.items():
        if name in labels:
            assert labels[name] == set(re.findall(r"\w+", row["labels"])), name

    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = router.http.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert names(list(parse_openmetrics(answer.text))) == names(families)


def memory_agrees(router: Router) -> bool:
    """What is measured, every two seconds, is the same in bytes here and in MiB there."""
    text, vram = router.http.get("/metrics").text, router.http.get("/vram").json()
    for name, field in (("total", "total_mb"), ("reserved", "booked_mb"), ("external", "external_mb")):
        told = {(device["name"],): float(device[field] << 20) for device in vram["devices"]}
        if counted(text, f"router_memory_{name}_bytes", "device") != told:
            return False
    (engine,) = vram["models"]
    held = counted(text, "router_model_memory_bytes", "model", "device")
    return (
        counted(text, "router_model_vram_bytes", "model") == {("a",): float(engine["vram_used_mb"] << 20)}
        and held.keys() == {("a", "host")}
        and 0 < held["a", "host"] <= engine["measured_mb"]["host"] << 20
    )


def names(families: list[Metric]) -> set[str]:
    return {sample.name for family in families for sample in family.samples}


def test_no_client_makes_a_label(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "a")})
    for strange in ('x"} 1', "x\n", "é", " "):
        assert router.chat(strange).status_code == 404
    text = router.http.get("/metrics").text
    labels = 'model="",endpoint="/v1/chat/completions",priority="",status="model_not_found"'
    assert f"router_requests_total{{{labels}}} 4\n" in text
    assert set(re.findall(r'model="([^"]*)"', text)) == {"", "a"}


def test_a_client_sees_how_long_it_waited_itself(start: Start, tiny: Path) -> None:
    keys = {"api_keys": ["full"], "clients": {"anna": {"key": "annas"}, "ben": {"key": "bens"}}}
    router = start({"api": keys, "models": models(tiny, "a")})
    for key in ("annas", "annas", "bens"):
        assert router.chat("a", headers={"x-api-key": key}).status_code == 200

    def waits(key: str) -> dict[tuple[str, ...], float]:
        text = router.http.get("/metrics", headers={"x-api-key": key}).text
        return counted(text, "router_client_queue_wait_seconds_count", "client")

    assert waits("full") == {("anna",): 2, ("ben",): 1}
    assert waits("bens") == {("ben",): 1}


def test_reloads_are_counted_and_what_they_loaded_is_told_apart(start: Start, tiny: Path, tmp_path: Path) -> None:
    def config(key: str, *aliases: str) -> str:
        return json.dumps({"api": {"api_keys": ["full", key]}, "models": models(tiny, *aliases)})

    router = start(json.loads(config("one", "a")))
    router.http.headers["x-api-key"] = "full"

    def after(content: str) -> dict[str, float]:
        (tmp_path / "config.json").write_text(content)
        router.http.post("/v1/config/reload")
        text = router.http.get("/metrics").text
        found = {
            name: value
            for name in ("hash", "last_reload_successful", "last_load_timestamp_seconds")
            for value in counted(text, f"router_config_{name}").values() or [0.0]
        }
        of_reloads = counted(text, "router_config_reloads_total", "outcome")
        return {**found, **{outcome: count for (outcome,), count in of_reloads.items()}}

    contents = (config("one", "a"), config("one", "b"), "{", config("two", "a"))
    first, other, wrong, back = map(after, contents)
    assert [first["hash"] == each["hash"] for each in (other, wrong, back)] == [False, False, True]
    assert wrong["hash"] == other["hash"], "it is still in effect"
    assert [each["last_reload_successful"] for each in (first, other, wrong, back)] == [1, 1, 0, 1]
    times = [each["last_load_timestamp_seconds"] for each in (first, other, wrong, back)]
    assert times[0] < times[1] == times[2] < times[3]
    assert (back["success"], back["failed"]) == (3, 1)


def test_keys_that_are_refused_connections_and_disks_are_told(start: Start, tiny: Path, tmp_path: Path) -> None:
    api = {"api_keys": ["full"], "inference_keys": ["inference"], "max_connections": 100}
    config = {"api": api, "system": {"log_dir": str(tmp_path / "log")}, "models": models(tiny, "a")}
    router = start(config)
    for path, key in (("/v1/models", "wrong"), ("/nowhere", "wrong"), ("/v1/models", ""), ("/v1/kv", "inference")):
        headers = {"x-api-key": key} if key else {}
        assert router.http.request("GET" if key != "inference" else "DELETE", path, headers=headers).is_error

    def told() -> str:
        return router.http.get("/metrics", headers={"x-api-key": "full"}).text

    assert counted(told(), "router_pages_refused_total", "code") == {
        ("invalid_api_key",): 2,
        ("missing_api_key",): 1,
        ("insufficient_permissions",): 1,
    }
    assert "router_connections 1\n" in told()
    assert "router_connections_limit 100\n" in told()
    eventually(lambda: "router_disk_free_bytes{" in told())
    free, total = (counted(told(), f"router_disk_{what}_bytes", "place") for what in ("free", "total"))
    assert free.keys() == total.keys() == {(place,) for place in ("state", "log", "kv", "cache", "models")}
    usage = shutil.disk_usage(tmp_path)
    assert total["state",] == usage.total
    assert free["state",] == pytest.approx(usage.free, rel=0.1)


def test_engines_that_end_are_counted_by_cause(start: Start, tiny: Path, tmp_path: Path) -> None:
    faults = {
        "dies": {"FAKE_DIE": f"once {tmp_path}/witness"},
        "slow": {"FAKE_ANSWER_SEC": "1"},
        "broken": {"FAKE_READY": "fails"},
        "plain": {"FAKE_IDLE_CLOSE": "late"},
    }
    config = {
        "system": {
            "llama_server_path": fake(tmp_path),
            "max_concurrent_models": 1,
            "model_load_max_retries": 1,
        },
        "scheduling": {"residency_factor": 0.1, "max_linger_sec": 0},
        "models": {alias: models(tiny, alias, env=fault)[alias] for alias, fault in faults.items()},
    }
    config["models"]["plain"]["idle_timeout_sec"] = 1
    router = start(config)

    assert router.chat("dies").status_code == 200  # served by the second engine
    with ThreadPoolExecutor() as clients:
        slow = clients.submit(router.chat, "slow")
        router.until("slow", "ready")
        assert router.chat("plain", headers={"x-request-priority": "high"}).status_code == 200
        assert slow.result().status_code == 200
    assert [router.chat("plain").status_code for _ in range(3)] == [200] * 3  # each is sent twice
    router.until("plain", "off")
    assert router.chat("broken").status_code == 503
    router.http.post("/v1/models/load", json={"model": "plain"})
    router.http.post("/v1/models/eject", json={"model": "plain"})
    router.http.post("/v1/models/load", json={"model": "dies"})
    config["models"]["dies"]["flags"] = ["-c", "2048"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    router.http.post("/v1/config/reload")
    router.until("dies", "off")

    text = router.http.get("/metrics").text
    ends = {
        ("dies", "crashed"): 1,
        ("dies", "evicted"): 1,
        ("slow", "drained"): 1,
        ("plain", "idle"): 1,
        ("broken", "load_failed"): 2,
        ("plain", "manual"): 1,
        ("dies", "reload"): 1,
    }
    assert counted(text, "router_engine_exits_total", "model", "reason") == ends
    unwanted = {key for key in ends if key[1] in ("crashed", "load_failed")}
    assert counted(text, "router_model_ejects_total", "model", "cause") == {
        key: count for key, count in ends.items() if key not in unwanted
    }
    loads = {("dies",): 3, ("slow",): 1, ("plain",): 2}
    assert counted(text, "router_model_loads_total", "model") == loads
    assert counted(text, "router_model_load_duration_seconds_count", "model") == loads
    for once in ("router_engine_restarts_total", "router_retry_attempts_total", "router_retry_success_total"):
        assert counted(text, once, "model") == {("dies",): 1}
    assert counted(text, "router_upstream_resends_total", "model") == {("plain",): 3}


def test_engines_that_are_told_to_tell_their_own_figures(start: Start, tiny: Path) -> None:
    flags = ["-c", "1024", "-t", "1", "--ignore-eos", "--metrics"]
    router = start({"models": {**models(tiny, "a", 'b"c', flags=flags), **models(tiny, "silent")}})
    for alias, tokens in (("a", 3), ('b"c', 5), ("silent", 1)):
        assert router.chat(alias, max_tokens=tokens).status_code == 200
    predicted = {("a",): 3.0, ('b"c',): 5.0}

    def told(accept: str = "") -> str:
        return router.http.get("/metrics", headers={"accept": accept}).text

    assert counted(told(), "llamacpp:tokens_predicted_total", "model") == predicted
    openmetrics = told("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in parse_openmetrics(openmetrics)}
    assert (families["llamacpp:tokens_predicted"].type, families["llamacpp:n_tokens_max"].type) == (
        "counter",
        "gauge",
    )
    os.kill(router.status("a")["pid"], signal.SIGSTOP)  # it holds nobody up, and what it said last still counts
    assert counted(told(), "llamacpp:tokens_predicted_total", "model") == predicted
    os.kill(router.status("a")["pid"], signal.SIGCONT)
    router.http.post("/v1/models/eject", json={"model": "a"})
    del predicted[("a",)]
    assert counted(told(), "llamacpp:tokens_predicted_total", "model") == predicted


def test_what_several_engines_of_a_model_say_adds_up() -> None:
    def said(tokens: int, longest: int, busy: float) -> str:
        return f"""# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total {tokens}
# TYPE llamacpp:n_tokens_max gauge
llamacpp:n_tokens_max {longest}
# TYPE llamacpp:n_busy_slots_per_decode gauge
llamacpp:n_busy_slots_per_decode {busy}
"""

    texts = [("a", said(100, 80, 1.5)), ("b", said(7, 7, 1.0)), ("a", said(20, 90, 1.0))]
    text = b"".join(exposition(relayed(texts), openmetrics=False)).decode()
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        'llamacpp:tokens_predicted_total{model="a"} 120.0',
        'llamacpp:tokens_predicted_total{model="b"} 7.0',
        'llamacpp:n_tokens_max{model="a"} 90.0',
        'llamacpp:n_tokens_max{model="b"} 7.0',
        'llamacpp:n_busy_slots_per_decode{model="a"} 1.5',
        'llamacpp:n_busy_slots_per_decode{model="b"} 1.0',
    ]


def test_no_engine_spoils_a_scrape() -> None:
    said = """# HELP llamacpp:good_total Good
# TYPE llamacpp:good_total counter
llamacpp:good_total 1
llamacpp:good_total{position="0"} 2e3
llamacpp:good_total{model="mine"} 3
llamacpp:good_total{position="0" 4
llamacpp:good_total -nan
llamacpp:good_total much
llamacpp:headless 5
router_requests_total 6
{"error": 7}
"""
    text = b"".join(
        exposition(relayed([("x", said), ("y", "# TYPE llamacpp:good_total counter\n")]), openmetrics=False)
    )
    samples = [line for line in text.decode().splitlines() if not line.startswith("#")]
    assert samples == [
        'llamacpp:good_total{model="x"} nan',
        'llamacpp:good_total{model="x",position="0"} 2000.0',
    ]
    assert text.count(b"# TYPE") == 1


def counted(text: str, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """Samples above 0, by these labels."""
    samples = [sample for family in parse(text) for sample in family.samples if sample.name == name]
    return {tuple(s.labels[label] for label in labels): s.value for s in samples if s.value}
