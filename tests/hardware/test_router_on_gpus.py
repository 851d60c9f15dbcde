"""A router on a machine with GPUs: NVIDIA's library is played, engines are real and run on the CPU."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, eventually, fake, models
from played_nvml import DRIVER_NOT_LOADED, Fault, Gpu, PlayedGpus, llama_server

from router.hardware.devices import DEADLINE_SEC

Environ = dict[str, str]


def environ_of_engine(router: Router) -> Environ:
    (engine,) = router.engines
    return engine.environ()


@pytest.fixture
def environ(gpus: PlayedGpus, tmp_path: Path) -> Environ:
    return {**gpus.environ, "LLAMA_SERVER_PATH": llama_server(tmp_path)}


def test_engines_are_shown_a_gpu_that_is_ours_and_no_other(
    start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ
) -> None:
    gpus.set(Gpu(total_mib=6000, used_mib=1000), Gpu(total_mib=4000), Gpu(total_mib=2000))
    router = start({"system": {"gpu_devices": [0, 2]}, "models": models(tiny, "a")}, **environ)
    assert router.chat("a").status_code == 200
    seen = environ_of_engine(router)
    assert seen["CUDA_VISIBLE_DEVICES"] == gpus.gpus[2].uuid, "where the least is left"
    assert seen["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_an_entry_may_choose_its_gpus_itself(start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ) -> None:
    gpus.set(Gpu(), Gpu())
    own: dict[str, Any] = models(tiny, "a", env={"CUDA_VISIBLE_DEVICES": "1"})
    router = start({"models": own}, **environ)
    assert router.chat("a").status_code == 200
    assert environ_of_engine(router)["CUDA_VISIBLE_DEVICES"] == "1"


def test_an_engine_is_told_of_no_gpu_that_it_is_not_shown(
    start: Start, tiny: Path, gpus: PlayedGpus, tmp_path: Path
) -> None:
    gpus.set(Gpu(), Gpu())
    inherited = {"LLAMA_ARG_DEVICE": "CUDA1", "MTMD_BACKEND_DEVICE": "CUDA1"}
    environ = {**gpus.environ, "LLAMA_SERVER_PATH": fake(tmp_path), **inherited}
    router = start({"models": models(tiny, "a", flags=["-c", "1024", "--device", "CUDA1"])}, **environ)
    assert router.chat("a").status_code == 200
    (engine,) = router.engines
    assert engine.environ()["CUDA_VISIBLE_DEVICES"] == gpus.gpus[1].uuid
    assert [engine.environ()[name] for name in inherited] == ["CUDA0", "CUDA0"]
    words = engine.cmdline()
    assert [words[place + 1] for place, word in enumerate(words) if word == "--device"] == ["CUDA0"], (
        "llama-server takes a device that is not there for an error, also where a later flag names another"
    )


def test_no_gpu_is_touched_where_none_may_be_used(
    start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ
) -> None:
    gpus.set(Gpu())
    router = start({"system": {"gpu_devices": []}, "models": models(tiny, "a")}, **environ)
    assert router.chat("a").status_code == 200
    assert environ_of_engine(router)["CUDA_VISIBLE_DEVICES"] == ""
    assert "RAM free" in router.log


@pytest.mark.parametrize("code", [None, DRIVER_NOT_LOADED], ids=["hangs", "is unloaded"])
def test_requests_are_served_though_the_driver_breaks(
    start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ, code: int | None
) -> None:
    gpus.set(Gpu(), Gpu())
    router = start({"models": models(tiny, "a", "b")}, **environ)
    assert router.chat("a").status_code == 200
    gpus.set(*gpus.gpus, faults=[Fault(code=code)])
    assert router.chat("a").status_code == 200
    router.http.post("/v1/models/eject", json={"model": "a"})
    eventually(lambda: not router.engines)
    if code is None:
        assert router.chat("a").status_code == 200, "by what was known last"
        assert environ_of_engine(router)["CUDA_VISIBLE_DEVICES"] in [gpu.uuid for gpu in gpus.gpus]
        assert router.status("a")["memory"]["gpus"]
    gpus.set(*gpus.gpus)
    assert router.chat("b").status_code == 200, "and all is well when it works again"
    assert router.stop() == 0


def test_a_driver_that_takes_seconds_to_wake_is_waited_for_at_the_start(
    start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ
) -> None:
    gpus.set(Gpu(), faults=[Fault(code=None)])
    threading.Timer(2 * DEADLINE_SEC, gpus.set, gpus.gpus).start()
    router = start({"models": models(tiny, "a")}, **environ)
    assert router.chat("a").status_code == 200
    assert environ_of_engine(router)["CUDA_VISIBLE_DEVICES"] == gpus.gpus[0].uuid


def test_how_the_gpus_are_is_in_the_metrics(start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ) -> None:
    first = Gpu(total_mib=6000, used_mib=1000, utilization=60, temperature=71, power=200)
    gpus.set(first, Gpu(total_mib=4000))
    router = start({"models": models(tiny, "a")}, **environ)
    gpus.set(replace(first, used_mib=2000), gpus.gpus[1])
    lines = router.http.get("/metrics").text.splitlines()
    for line in (
        f'router_gpu_vram_used_bytes{{gpu="gpu0"}} {2000 << 20}',
        f'router_gpu_vram_total_bytes{{gpu="gpu1"}} {4000 << 20}',
        'router_gpu_utilization_percent{gpu="gpu0"} 60.0',
        'router_gpu_temperature_celsius{gpu="gpu0"} 71',
        'router_gpu_power_watts{gpu="gpu0"} 200.0',
        'router_gpu_power_limit_watts{gpu="gpu1"} 350.0',
    ):
        assert any(known.startswith(line.removesuffix(".0")) for known in lines), line


def test_a_model_is_loaded_on_the_device_that_is_asked_for_or_not_at_all(
    start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ
) -> None:
    gpus.set(Gpu())
    entries = models(tiny, "a") | models(tiny, "kept-off", flags=["-ngl", "0"])
    router = start({"models": entries}, **environ)

    def load(model: str, device: str) -> tuple[int, Any]:
        answer = router.http.post("/v1/models", json={"model": model, "device": device})
        return answer.status_code, answer.json().get("devices") or answer.json()["error"]["param"]

    assert load("a", "cpu") == load("kept-off", "cuda") == (400, "device")
    assert load("a", "cuda:0") == (200, ["gpu0", "host"])
    assert load("kept-off", "cpu") == (200, ["host"])


def test_a_device_that_a_model_will_not_compute_on_is_refused_with_what_helps(
    start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ
) -> None:
    gpus.set(Gpu())
    other = {"engine": "command", "cmd": "server {port}"}
    router = start({"models": {**models(tiny, "a"), "b": other}}, **environ)
    for alias, words in {"a": "its flags have to say `-ngl 0`", "b": "set system.gpu_devices to []"}.items():
        answer = router.http.post("/v1/models", json={"model": alias, "device": "cpu"})
        assert answer.status_code == 400
        assert f"'{alias}' would take a GPU: {words}" in answer.json()["error"]["message"]
