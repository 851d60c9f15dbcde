"""Engines that sleep instead of exiting: vLLMs (`fake_vllm.py`) on a GPU that is played, of RAM that they hold."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from conftest import Router, Start, eventually, run
from hf_models import played_vllm, write_model
from played_nvml import Gpu, PlayedGpus

HOLDS_MIB = 200
WAYS: dict[str, dict[str, str]] = {
    "a": {},
    "b": {},
    "ignores": {"FAKE_VLLM_SLEEP": "ignored"},
    "refuses": {"FAKE_VLLM_SLEEP": "fails"},
    "fails": {"FAKE_VLLM_WAKE": "fails"},
    "dies": {"FAKE_VLLM_WAKE": "dies"},
    "lies": {"FAKE_VLLM_WAKE": "lies"},
}


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes") / "notes"


@pytest.fixture(scope="module")
def environ(nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A machine whose GPU has room for one model that is awake, and several that sleep."""
    gpus = PlayedGpus(nvml_library, tmp_path_factory.mktemp("gpus"))
    gpus.set(Gpu(total_mib=450), engines=True)
    return gpus.environ


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, notes: Path) -> dict[str, Any]:
    vllm = played_vllm(tmp_path_factory.mktemp("vllm"), "0.32.0")
    flags = ["--gpu-memory-utilization", "0.6"]
    entry = {
        "engine": "vllm",
        "model_path": str(write_model(tmp_path_factory.mktemp("hf") / "tiny")),
        "flags": flags,
        "sleep": True,
    }
    own = {"FAKE_VLLM_HOLDS_MIB": str(HOLDS_MIB), "FAKE_VLLM_NOTES": str(notes)}
    entries = {alias: {**entry, "env": {**own, **env}} for alias, env in WAYS.items()}
    memory = {"min_vram_required": 0, "vram_reserve_mb": 0}
    return {
        "system": {"vllm_path": str(vllm), "health_check_interval_sec": 0.2, "max_concurrent_models": 9, **memory},
        "scheduling": {"max_linger_sec": 0},
        "models": entries,
    }


@pytest.fixture(scope="module")
def router(start_shared: Start, config: dict[str, Any], environ: dict[str, str]) -> Router:
    return start_shared(config, **environ)


def answered(router: Router, alias: str) -> dict[str, Any]:
    """What is known of a model once it has answered and was measured."""
    assert router.chat(alias, max_tokens=2).json()["choices"][0]["message"]["content"] == "xx"
    eventually(lambda: router.status(alias)["memory"]["booked_mb"]["gpu0"] < 260)
    return router.status(alias)


def asked(notes: Path) -> list[str]:
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    return [line["path"] for line in lines if isinstance(line, dict)]


def test_an_idle_model_makes_room_by_sleeping_and_wakes_for_its_next_request(router: Router, notes: Path) -> None:
    awake = answered(router, "a")
    assert awake["memory"]["booked_mb"]["gpu0"] > HOLDS_MIB
    assert awake["sleep"]["problem"] is None
    answered(router, "b")
    asleep = router.status("a")
    assert (asleep["status"], asleep["pid"]) == ("asleep", awake["pid"])
    held = asleep["memory"]["booked_mb"]
    assert held["gpu0"] < HOLDS_MIB / 2 < held["host"], "its weights are in RAM, and nothing else of it"
    vram = router.http.get("/vram").json()
    booked = {device["name"]: device["booked_mb"] for device in vram["devices"]}
    in_all = [router.status(alias)["memory"]["booked_mb"] for alias in ("a", "b")]
    assert booked == {device: sum(each[device] for each in in_all) for device in ("gpu0", "host")}
    again = answered(router, "a")
    assert (again["status"], again["pid"]) == ("ready", awake["pid"])
    assert again["memory"]["booked_mb"]["gpu0"] > HOLDS_MIB
    assert router.status("b")["status"] == "asleep"
    assert 0 < again["sleep"]["wake_sec"] < again["load_sec"]
    assert asked(notes).count("/sleep?level=1&mode=wait") == 2
    assert asked(notes).count("/wake_up") == 1
    assert "model a: asleep (makes room for 'b'; holds " in router.log


def test_all_that_shows_states_shows_that_it_sleeps(router: Router, tmp_path: Path) -> None:
    answered(router, "a")
    answered(router, "b")
    listed = {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}
    assert (listed["a"]["state"], listed["a"]["status"]["value"]) == ("asleep", "sleeping")
    assert router.http.get("/v1/models/status").json()["summary"]["by_status"]["asleep"] == 1
    assert [model["name"] for model in router.http.get("/api/ps").json()["models"]] == ["b:latest"]
    lines = router.http.get("/metrics").text.splitlines()
    assert 'router_model_state{model="a",state="asleep"} 1' in lines
    assert "router_models_asleep 1.0" in lines or "router_models_asleep 1" in lines
    shown = run("ps", "--url", router.url, cwd=tmp_path).stdout
    assert next(line.split()[:2] for line in shown.splitlines() if line.startswith("a ")) == ["a", "asleep"]
    assert router.http.post("/v1/models/load", json={"model": "a"}).json()["status"] == "success"
    lines = router.http.get("/metrics").text.splitlines()
    assert any(line.startswith('router_model_wake_duration_seconds_count{model="a"}') for line in lines)


def test_no_probe_and_no_request_goes_to_one_that_sleeps(router: Router, notes: Path) -> None:
    answered(router, "a")
    answered(router, "b")
    probes = asked(notes)
    eventually(lambda: len(asked(notes)) >= len(probes) + 3)  # of b: several intervals have passed
    answers: list[httpx.Response] = []
    asking = [threading.Thread(target=lambda: answers.append(router.chat("a"))) for _ in range(3)]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    assert [answer.status_code for answer in answers] == [200] * 3, (answers[0].text, router.log[-5000:])
    assert "not answered" not in router.log


@pytest.mark.parametrize(("alias", "what"), [("ignores", "freed only"), ("refuses", "answered /sleep with 500")])
def test_one_that_frees_nothing_is_stopped_and_never_asked_again(
    router: Router, notes: Path, alias: str, what: str
) -> None:
    told = f"model {alias}: its engine cannot sleep, and is stopped instead from now on: "
    for _ in range(2):
        answered(router, alias)
        answered(router, "b")
        assert router.status(alias)["status"] == "off"
        assert what in router.status(alias)["sleep"]["problem"]
        assert router.log.count(told) == 1
    assert router.http.get("/v1/models/status").json()["models"]["b"]["sleep"]["problem"] is None


def test_a_problem_is_forgotten_with_the_entry_that_had_it(router: Router, config: dict[str, Any]) -> None:
    answered(router, "refuses")
    answered(router, "b")
    assert router.status("refuses")["sleep"]["problem"] is not None
    file = Path(psutil.Process(router.process.pid).cwd(), "config.json")
    mended = {**config["models"], "refuses": config["models"]["a"]}
    file.write_text(json.dumps({**config, "models": mended}))
    router.http.post("/v1/config/reload").raise_for_status()
    assert router.status("refuses")["sleep"] is None
    answered(router, "refuses")
    answered(router, "b")
    assert router.status("refuses")["status"] == "asleep"
    file.write_text(json.dumps(config))
    router.http.post("/v1/config/reload").raise_for_status()


@pytest.mark.parametrize(
    ("alias", "why"), [("fails", "answered /wake_up with 500"), ("dies", ""), ("lies", "still asleep")]
)
def test_a_request_survives_an_engine_that_does_not_wake_up(router: Router, alias: str, why: str) -> None:
    before = answered(router, alias)
    answered(router, "b")
    assert router.status(alias)["status"] == "asleep"
    after = answered(router, alias)
    assert after["pid"] != before["pid"]
    assert f"'{alias}' did not wake up" in router.log
    assert why in router.log


def test_its_developer_routes_are_reached_by_nobody_else(router: Router) -> None:
    answered(router, "a")
    for path in ("/sleep", "/wake_up", "/collective_rpc", "/is_sleeping", "/reset_prefix_cache", "/server_info"):
        for where in (path, f"/v1{path}", f"/upstream/a{path}"):
            for method in ("GET", "POST"):
                answer = router.http.request(method, where, json={"model": "a"})
                assert answer.status_code in (403, 404, 405), (method, where, answer.text)
    assert router.status("a")["status"] == "ready"
    port = router.status("a")["port"]
    (listener,) = (
        each.laddr.ip
        for process in psutil.Process(router.status("a")["pid"]).children()
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port
    )
    assert listener == "127.0.0.1"


def test_an_engine_that_sleeps_is_unloaded_as_any_other(router: Router) -> None:
    answered(router, "a")
    answered(router, "b")
    engine = psutil.Process(router.status("a")["pid"])
    assert router.status("a")["unload_at"] is not None
    router.http.post("/api/generate", json={"model": "a", "keep_alive": 0})
    eventually(lambda: router.status("a")["status"] == "off")
    assert not engine.is_running()
    answered(router, "a")
    sleeper = psutil.Process(router.status("b")["pid"])
    router.http.post("/v1/models/eject", json={"model": "b"})
    assert not sleeper.is_running()


def test_one_that_dies_asleep_is_loaded_anew(router: Router) -> None:
    pid = answered(router, "a")["pid"]
    answered(router, "b")
    psutil.Process(pid).kill()
    eventually(lambda: router.status("a")["status"] == "off")
    assert answered(router, "a")["pid"] != pid


def test_where_it_cannot_sleep_that_is_said(tmp_path: Path, config: dict[str, Any], start: Start) -> None:
    cpu = played_vllm(tmp_path / "cpu")
    entry = {"engine": "vllm", "model_path": config["models"]["a"]["model_path"]}
    sleeps = {**entry, "sleep": True}
    own, boxed = {**entry, "flags": ["--enable-sleep-mode"]}, {**sleeps, "container": {}}
    entries = {"sleeps": sleeps, "own": own, "boxed": boxed}
    (tmp_path / "config.json").write_text(json.dumps({"models": entries}))
    said = run("check", "--config", "config.json", cwd=tmp_path, VLLM_PATH=str(cpu)).stderr
    assert "flags[0]: --enable-sleep-mode cannot be set: set `sleep` to true in the entry" in said
    assert "models.boxed.sleep: cannot be combined with `container`: " in said
    router = start({"system": {"vllm_path": str(cpu)}, "models": {"sleeps": sleeps}})
    assert router.chat("sleeps").status_code == 200
    told = "vllm 0.32.0+cpu computes on the CPU"
    assert told in router.status("sleeps")["sleep"]["problem"]
    eventually(lambda: f"'sleeps': `sleep` needs a GPU, and {told}: it exits instead" in router.log)
