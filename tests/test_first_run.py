"""What somebody sees who has just installed it, or has just made a mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Router, Start, eventually, models
from tiny_models import write_llama


def run_to_its_end(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "router", *arguments]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture(scope="module")
def router(start_shared: Start) -> Router:
    return start_shared(from_scratch=True)


def test_with_no_configuration_at_all_the_pasted_curl_line_gets_an_answer(router: Router) -> None:
    eventually(lambda: "curl" in router.log)
    assert "demo, demo-embed" in router.log
    assert "embedded" in router.log
    curl = next(line for line in router.output if line.strip().startswith("curl"))
    words = shlex.split(curl)
    answer = router.http.post(words[1], content=words[words.index("-d") + 1]).json()
    assert "demo" in answer["choices"][0]["message"]["content"]
    assert answer["model"] == "demo"


def test_the_demo_embeds_too(router: Router) -> None:
    answer = router.http.post("/v1/embeddings", json={"model": "demo-embed", "input": "hello"}).json()
    assert len(answer["data"][0]["embedding"]) > 10


def test_a_folder_of_models_needs_no_configuration(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    write_llama(folder / "Small-Q8_0.gguf")
    write_llama(folder / "Big.gguf", n_layer=4, parts=2)
    router = start(arguments=["--models-dir", str(folder)])
    cards = {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}
    assert set(cards) == {"Small-Q8_0", "Big"}
    assert cards["Big"]["capabilities"] == ["completion"]
    assert cards["Big"]["context_length"] == 2048
    assert router.chat("Big").status_code == 200


def test_a_port_in_use_is_one_clear_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        ended = run_to_its_end("--port", str(port), cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert f"Port {port} on 127.0.0.1 is in use" in ended.stderr


def test_an_empty_folder_is_served_until_something_is_put_into_it(start: Start, tmp_path: Path) -> None:
    (folder := tmp_path / "empty").mkdir()
    router = start(arguments=["--models-dir", str(folder)])
    eventually(lambda: "Try:" in router.log)
    assert "models  none yet: pull a model, or add models to a folder" in router.log
    assert "/v1/models/pull" in router.log
    assert router.http.get("/v1/models").json()["data"] == router.http.get("/api/tags").json()["models"] == []
    assert router.http.get("/health").status_code == router.http.get("/ready").status_code == 200
    refused = router.chat("first")
    assert (refused.status_code, "No models yet: pull one" in refused.json()["error"]["message"]) == (
        404,
        True,
    )
    write_llama(folder / "first.gguf")
    eventually(lambda: router.chat("first").status_code == 200)


def test_an_engine_that_is_not_there_is_named(tmp_path: Path, tiny: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"system": {"llama_server_path": "/no/such/engine"}, "models": models(tiny, "a")})
    )
    ended = run_to_its_end("--port", "0", cwd=tmp_path)
    assert ended.returncode != 0
    assert "/no/such/engine" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_every_mistake_in_a_configuration_is_reported_at_once(tmp_path: Path, tiny: Path) -> None:
    config = tmp_path / "config.json"
    entry = {"model_path": "missing.gguf", "flags": ["--port", "1", "-c", "512"]}
    config.write_text(json.dumps({"api": {"prot": 1}, "models": {"a": entry}}))
    ended = run_to_its_end("check", cwd=tmp_path)
    assert ended.returncode == 2
    for place in ("api.prot", "models.a.model_path", "models.a.flags[0]"):
        assert place in ended.stderr


def test_check_shows_where_each_value_comes_from(tmp_path: Path, tiny: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"api": {"port": 9001, "api_keys": ["sesame"]}, "models": models(tiny, "a")}))
    ended = run_to_its_end("check", "--host", "0.0.0.0", cwd=tmp_path)
    assert ended.returncode == 0
    assert re.search(r"api.port = 9001 +\(config.json\)", ended.stdout)
    assert re.search(r"api.host = \S*0.0.0.0\S* +\(--host\)", ended.stdout)
    assert "sesame" not in ended.stdout + ended.stderr


def test_check_looks_into_the_models_as_a_load_would(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "letter.gguf").write_text("Dear reader")
    entries = models(tiny, "good", "vague", "narrow", "beyond") | {
        "letter": {"model_path": str(tmp_path / "letter.gguf")}
    }
    entries["vague"]["flags"] = ["-c", "much"]
    entries["narrow"]["flags"] = ["-ctk", "q8_0"]
    entries["beyond"]["flags"] = ["--top-nsigma", "1", "--log-prompts-dir", "prompts"]
    (tmp_path / "config.json").write_text(json.dumps({"models": entries}))
    ended = run_to_its_end("check", cwd=tmp_path)
    assert ended.returncode == 0
    assert ended.stderr.splitlines() == [
        "warning: models.vague will not load: -c takes a whole number, not 'much'",
        "warning: models.narrow will not load: -ctk cannot be q8_0: it packs 32 numbers at a time, and a head "
        "has 16",
        "warning: models.beyond will not load: the embedded engine (xllamacpp) can't honor --top-nsigma; "
        "remove them, or install llama-server",
        f"warning: models.letter will not load: {tmp_path}/letter.gguf: not a GGUF file: "
        "it starts with b'Dear' (at byte 0)",
    ]
    assert not (tmp_path / "prompts").exists()


def test_an_open_door_to_the_network_earns_a_warning(start: Start) -> None:
    router = start(arguments=["--host", "0.0.0.0"])
    eventually(lambda: "Try:" in router.log)
    assert "WARNING" in router.log
    assert "API_KEY" in router.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(start: Start, number: int) -> None:
    router = start()
    router.chat("demo")
    engines = router.engines
    assert engines
    assert router.stop(number) == 0
    assert not any(engine.is_running() for engine in engines)


def test_a_killed_router_leaves_no_engine_behind(start: Start) -> None:
    router = start()
    router.chat("demo")
    engines = router.engines
    os.kill(router.process.pid, signal.SIGKILL)
    router.process.wait()
    eventually(lambda: not any(engine.is_running() for engine in engines), timeout_sec=2)
