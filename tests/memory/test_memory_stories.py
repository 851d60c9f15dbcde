"""Routers whose memory is short: real engines on the CPU, on GPUs that are played, or in RAM."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import FAKE_ENGINE, Router, Start, eventually, fake, models
from played_nvml import Gpu, Held, PlayedGpus, llama_server
from tiny_models import write_llama

Environ = dict[str, str]


@pytest.fixture
def environ(gpus: PlayedGpus, tmp_path: Path) -> Environ:
    return {**gpus.environ, "LLAMA_SERVER_PATH": llama_server(tmp_path)}


def shown(router: Router, alias: str) -> str:
    """The GPUs that the engine of a model was shown."""
    pid = router.status(alias)["pid"]
    (engine,) = (engine for engine in router.engines if engine.pid == pid)
    return engine.environ()["CUDA_VISIBLE_DEVICES"]


def measured(footprints: Path) -> list[dict[str, Any]]:
    """What is remembered of the memory that engines took."""
    entries = json.loads(footprints.read_bytes()) if footprints.exists() else []
    return [entry for entry in entries if entry["measured"]]


def arguments(router: Router, alias: str) -> list[str]:
    pid = router.status(alias)["pid"]
    (engine,) = (engine for engine in router.engines if engine.pid == pid)
    return engine.cmdline()


def test_two_models_that_fit_on_a_gpu_each_are_there_together(
    start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ
) -> None:
    gpus.set(Gpu(total_mib=1000), Gpu(total_mib=1000))
    router = start({"models": models(tiny, "a", "b", footprint_mb=800)}, **environ)
    for alias in ("a", "b"):
        assert router.chat(alias).status_code == 200
    assert {shown(router, "a"), shown(router, "b")} == {gpu.uuid for gpu in gpus.gpus}


def test_only_the_gpu_that_lacks_memory_is_cleared(
    start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ
) -> None:
    gpus.set(Gpu(total_mib=1000), Gpu(total_mib=3000))
    entries = models(tiny, "small", footprint_mb=800) | models(tiny, "large", "larger", footprint_mb=2000)
    router = start({"models": entries}, **environ)
    for alias in ("small", "large", "larger"):
        assert router.chat(alias).status_code == 200
    assert [router.status(alias)["status"] for alias in entries] == ["ready", "off", "ready"]


def test_a_model_too_large_for_one_gpu_is_shown_both(
    start: Start, middling: Path, gpus: PlayedGpus, environ: Environ
) -> None:
    gpus.set(Gpu(total_mib=610), Gpu(total_mib=610))
    router = start({"models": models(middling, "a", flags=["-c", "1024", "-t", "1"])}, **environ)
    assert router.chat("a").status_code == 200
    assert shown(router, "a") == ",".join(gpu.uuid for gpu in gpus.gpus)
    memory = router.status("a")["memory"]
    assert memory["gpus"] == ["gpu0", "gpu1"]
    assert memory["added_flags"][:2] == ["--tensor-split", "50,50"]


def test_another_program_takes_the_memory_and_gives_it_back(
    start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ
) -> None:
    gpus.set(Gpu(total_mib=1000, used_mib=700), engines=True)
    config = {"system": {"min_vram_required": 0}, "models": models(tiny, "a", footprint_mb=600)}
    router = start(config, **environ)
    gpus.change(0, used_mib=100)
    assert router.chat("a").status_code == 200, "what is free now counts, not what was at the start"
    router.http.post("/v1/models/eject", json={"model": "a"})
    gpus.change(0, used_mib=700)
    refused = router.chat("a")
    assert refused.status_code == 507
    message = refused.json()["error"]["message"]
    assert "needs 600 MiB on gpu0 (footprint_mb)" in message
    assert "the budget is 300 MiB on gpu0" in message
    assert "other programs hold 700 MiB on gpu0" in message
    gpus.change(0, used_mib=100)
    assert router.chat("a").status_code == 200


def test_room_is_given_away_only_when_the_memory_is_back(
    start: Start, tiny: Path, gpus: PlayedGpus, environ: Environ
) -> None:
    gpus.set(Gpu(total_mib=1000), engines=True)
    router = start({"models": models(tiny, "a", "b", footprint_mb=800)}, **environ)
    assert router.chat("a").status_code == 200
    eventually(lambda: bool(router.status("a")["memory"]["measured_mb"]))
    pid = router.status("a")["pid"]
    # From now on what it holds stays in use, also when it is long gone, as with a driver that is slow.
    gpus.set(Gpu(total_mib=1000, used_mib=800, uuid=gpus.gpus[0].uuid, processes=(Held(pid, 800),)))
    router.http.post("/v1/models/load", json={"model": "b"}, timeout=30)
    log = router.log
    assert log.index("not all of its memory on gpu0 is free") < log.index("model a: off")
    assert "model b: loading" not in log, "and then it counts as somebody else's"


def test_nothing_is_learnt_of_an_engine_before_it_has_computed(start: Start, tiny: Path, tmp_path: Path) -> None:
    """What it is measured to take would be too little: some of it comes with the first tokens."""
    footprints = tmp_path / "state" / "footprints.json"
    entries = models(tiny, "a", flags=["-c", "1024"]) | models(tiny, "later", flags=["-c", "2048"])
    router = start({"models": entries}, LLAMA_ROUTER_STATE_DIR=str(footprints.parent))
    preloaded = router.http.post("/api/generate", json={"model": "a"})
    assert preloaded.json()["done_reason"] == "load"
    chat = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}
    for path in ("/tokenize", "/detokenize", "/apply-template", "/v1/messages/count_tokens"):
        answer = router.http.post(path, json={**chat, "content": "hi", "tokens": [1]})
        assert answer.status_code == 200, (path, answer.text)
    assert router.chat("a", temperature="hot").status_code == 400
    assert router.chat("later").status_code == 200
    eventually(lambda: bool(measured(footprints)))
    assert [entry["flags"][:2] for entry in measured(footprints)] == [["-c", "2048"]]


def test_what_was_measured_is_used_the_next_time_and_after_a_restart(
    start: Start, middling: Path, gpus: PlayedGpus, environ: Environ, tmp_path: Path
) -> None:
    gpus.set(Gpu(total_mib=4000), engines=True)
    environ = {**environ, "LLAMA_ROUTER_STATE_DIR": str(tmp_path / "state")}
    config = {"models": models(middling, "a", flags=["-c", "1024", "-t", "1"])}
    router = start(config, **environ)
    assert router.chat("a").status_code == 200
    assert router.status("a")["memory"]["source"] == "formulas"
    eventually(lambda: bool(measured(tmp_path / "state" / "footprints.json")))
    took_mb = router.status("a")["memory"]["booked_mb"]["gpu0"]
    assert 100 <= took_mb <= 200
    assert router.stop() == 0
    router = start(config, **environ)
    assert router.chat("a").status_code == 200
    memory = router.status("a")["memory"]
    assert (memory["source"], memory["estimated_mb"]["gpu0"]) == ("measured", pytest.approx(took_mb, rel=0.02))


def test_weights_that_the_engine_copies_count_once(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "repacked.gguf"
    write_llama(path, n_embd=1024, n_layer=12, n_head=16, n_ff=2048, quantization="Q4_0")
    entries = models(path, "a", flags=["-c", "256", "-t", "1"])
    router = start({"system": {"memory_budget_mb": 150}, "models": entries})
    for source in ("formulas", "measured"):
        answer = router.chat("a")
        assert answer.status_code == 200, answer.text
        eventually(lambda: router.status("a")["memory"]["measured_mb"].get("host", 0) > 60)
        memory = router.status("a")["memory"]
        assert (memory["source"], memory["measured_mb"]["host"]) == (source, pytest.approx(110, abs=25))
        assert memory["booked_mb"]["host"] == pytest.approx(memory["estimated_mb"]["host"], abs=25)
        (engine,) = router.engines
        assert engine.memory_info().rss >> 20 > 160, "with pages of the file that it has mapped and needs no more"
        router.unload()


def test_a_context_that_nobody_has_set_is_cut_to_what_there_is(start: Start, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "long.gguf", target_bytes=50 << 20, context_length=131072)
    router = start({"system": {"memory_budget_mb": 300}, "models": models(path, "a", flags=["-t", "1"])})
    assert router.chat("a").status_code == 200
    memory = router.status("a")["memory"]
    assert 4096 <= memory["context"] < 131072
    command = arguments(router, "a")
    assert f"-c {memory['context']} " in " ".join(command)
    assert f"context {memory['context']} of 131072, because memory is short" in router.log
    props = router.http.get("/vram").json()["models"][0]
    assert props["booked_mb"]["host"] <= 300


def test_a_model_that_never_fits_is_refused_with_advice(start: Start, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "long.gguf", target_bytes=50 << 20, context_length=131072)
    router = start({"system": {"memory_budget_mb": 300}, "models": models(path, "a", flags=["-c", "131072"])})
    refused = router.chat("a")
    assert refused.status_code == 507
    message = refused.json()["error"]["message"]
    assert "MiB on host (formulas); the budget is 300 MiB on host" in message
    assert "it would fit with -c " in message


def dying_engine(folder: Path, *deaths: str) -> str:
    """An engine that dies while it loads with these last words, one after another, and then lives."""
    script = folder / "dying-llama-server"
    lines = ["#!/bin/sh", '[ "$1" = --help ] && exit 0']
    for number, words in enumerate(deaths):
        witness = folder / f"died{number}"
        lines.append(f'[ -e {witness} ] || {{ touch {witness}; echo "{words}" >&2; exit 1; }}')
    lines.append(f'exec {sys.executable} {FAKE_ENGINE} "$@"')
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
    return str(script)


CUDA_RAN_OUT = "alloc_buffer: allocating 900.00 MiB on device 0: cudaMalloc failed: out of memory"


def test_a_load_that_ran_out_of_memory_is_tried_again_with_more_room(
    start: Start, middling: Path, gpus: PlayedGpus, environ: Environ, tmp_path: Path
) -> None:
    gpus.set(Gpu(total_mib=1500))
    environ["LLAMA_SERVER_PATH"] = dying_engine(tmp_path, CUDA_RAN_OUT)
    router = start({"models": models(middling, "a", flags=["-c", "1024"])}, **environ)
    assert router.chat("a").status_code == 200
    memory = router.status("a")["memory"]
    assert memory["source"] == "formulas, raised since it ran out of memory"
    assert memory["estimated_mb"]["gpu0"] >= 900
    assert router.status("a")["error_message"] is None or "cudaMalloc failed" in router.log


def test_a_load_that_runs_out_of_memory_again_fails_with_advice(
    start: Start, tmp_path: Path, gpus: PlayedGpus, environ: Environ
) -> None:
    path = write_llama(tmp_path / "long.gguf", target_bytes=50 << 20, context_length=131072)
    gpus.set(Gpu(total_mib=4000))
    environ["LLAMA_SERVER_PATH"] = dying_engine(tmp_path, CUDA_RAN_OUT, CUDA_RAN_OUT, CUDA_RAN_OUT)
    router = start({"models": models(path, "a", flags=["-c", "65536", "-ngl", "99"])}, **environ)
    failed = router.chat("a")
    assert failed.status_code == 503
    message = failed.json()["error"]["message"]
    assert "cudaMalloc failed" in message
    assert "it would fit with -c " in message
    assert not (tmp_path / "died2").exists(), "twice, not thrice"


def test_an_engine_that_runs_out_of_memory_at_work_gets_more_room_the_next_time(
    start: Start, middling: Path, gpus: PlayedGpus, environ: Environ, tmp_path: Path
) -> None:
    gpus.set(Gpu(total_mib=1500))
    witness = f"once {tmp_path / 'died'}"
    environ["LLAMA_SERVER_PATH"] = fake(tmp_path, die=witness, last_words="CUDA error: out of memory")
    router = start({"models": models(middling, "a", flags=["-c", "1024"])}, **environ)
    assert router.chat("a").status_code == 200
    assert router.status("a")["memory"]["source"] == "formulas, raised since it ran out of memory"


def test_vram_tells_who_holds_what(start: Start, tiny: Path, gpus: PlayedGpus, tmp_path: Path) -> None:
    environ = {**gpus.environ, "LLAMA_SERVER_PATH": llama_server(tmp_path, behind_a_shell=True)}
    gpus.set(Gpu(total_mib=2000, used_mib=300), Gpu(total_mib=1000), engines=True)
    config = {"system": {"vram_reserve_mb": 100}, "models": models(tiny, "a", "b")}
    router = start(config, **environ)
    assert router.chat("a").status_code == 200
    eventually(lambda: bool(router.http.get("/vram").json()["models"][0]["measured_mb"]))
    vram: dict[str, Any] = router.http.get("/vram").json()
    assert vram["gpu_info"]["total_mb"] == 3000
    assert vram["gpu_info"]["baseline_used_mb"] == pytest.approx(300, abs=20)
    assert (vram["loaded_models_count"], vram["tracked_models_count"], vram["status"]) == (1, 2, "healthy")
    (model,) = vram["models"]
    assert (model["model_alias"], model["status"], model["gpus"]) == ("a", "ready", ["gpu1"])
    assert model["measured_mb"]["gpu1"] > 30, "by the process that the shell has started"
    assert model["vram_used_mb"] == vram["total_allocated_by_models_mb"] == model["booked_mb"]["gpu1"]
    by_name = {device["name"]: device for device in vram["devices"]}
    assert list(by_name) == ["gpu0", "gpu1", "host"]
    assert by_name["gpu0"]["budget_mb"] == pytest.approx(1600, abs=20)
    assert by_name["gpu1"]["booked_mb"] == model["booked_mb"]["gpu1"]
    for device in vram["devices"]:
        parts = ("external_mb", "reserve_mb", "booked_mb", "free_for_new_model_mb")
        assert sum(device[part] for part in parts) == device["total_mb"]
    assert router.http.get("/vram/summary").json()["gpu_info"] == vram["gpu_info"]
    of_model = router.http.get("/vram/models/a").json()
    assert of_model["vram_used_mb"] == model["vram_used_mb"]
    assert [engine["engine"] for engine in of_model["engines"]] == [router.status("a")["engines"][0]["name"]]
    assert router.http.get("/vram/models/b").json()["vram_used_mb"] == 0
    assert router.http.get("/vram/models/c").status_code == 404
