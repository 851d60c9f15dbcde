"""The log: complete, safe to print, never blocking, and without private data."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import httpx2 as httpx
import pytest
from conftest import ROOT, Start, eventually, fake, models

from router.observe import logs

SECRET = "the launch code is swordfish"
KEY = "sk-very-secret"


@pytest.mark.parametrize("structured", [True, False], ids=["json", "text"])
def test_never_a_prompt_an_answer_or_a_key(start: Start, tiny: Path, tmp_path: Path, structured: bool) -> None:
    config = {
        "api": {"api_keys": [KEY]},
        "system": {"structured_logs": structured, "debug": True, "log_dir": str(tmp_path / "logs")},
        "models": models(tiny, "a"),
    }
    router = start(config)
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "mine-1"}
    answer = router.chat("a", content=SECRET, max_tokens=16, headers=headers)
    assert answer.status_code == 200
    router.chat("a", content=SECRET, stream=True, headers=headers)
    router.chat("a", content=SECRET, temperature="hot", headers=headers)
    router.http.post("/v1/chat/completions", content=f'{{"model": "a", "{SECRET}', headers=headers)
    router.chat("a", content=SECRET, headers={"authorization": "Bearer sk-wrong-key"})
    pages = ("/metrics", "/v1/telemetry/summary", "/v1/queue/stats", "/v1/models/status", "/v1/health/models")
    seen = [router.http.get(path, headers=headers).text for path in (*pages, "/v1/logs/a", "/openapi.json")]
    (engine,) = router.engines
    key_of_engine = engine.environ()["LLAMA_API_KEY"]
    seen.append(" ".join(engine.cmdline()))  # for everybody on the machine to see
    router.stop()
    files = [path.read_text() for path in (tmp_path / "logs").iterdir()]
    assert "mine-1" in router.log
    assert "invalid_json" in router.log
    for text in (router.log, *seen, *files):
        said = answer.json()["choices"][0]["message"]["content"]
        for private in (SECRET, "swordfish", KEY, key_of_engine, "sk-wrong-key", said):
            assert private not in text


def test_a_line_for_every_request_and_every_change_of_state(start: Start, tiny: Path) -> None:
    router = start({"system": {"structured_logs": True}, "models": models(tiny, "a")})
    router.chat("a", max_tokens=3, headers={"x-request-id": "first", "x-request-priority": "high"})
    router.stop()
    lines = [json.loads(line) for line in router.output if line.startswith("{")]
    states = [(line["alias"], line["state"]) for line in lines if "state" in line]
    assert states == [("a", "loading"), ("a", "ready"), ("a", "stopping"), ("a", "off")]
    assert next(line for line in lines if line.get("state") == "loading")["request_id"] == "first"
    request = next(line for line in lines if line["message"] == "request")
    assert request["request_id"] == "first"
    assert (request["alias"], request["priority"], request["outcome"], request["status"]) == (
        "a",
        "high",
        "served",
        200,
    )
    assert request["output_tokens"] == 3
    assert 0 < request["load_sec"] <= request["queue_sec"] <= request["ttft_sec"] <= request["total_sec"]


def test_the_access_log_can_be_turned_off(start: Start, tiny: Path) -> None:
    router = start({"system": {"access_log": False}, "models": models(tiny, "a")})
    router.chat("a", headers={"x-request-id": "quiet-1"})
    router.stop()
    assert '"request"' not in router.log


@pytest.mark.parametrize("form", [logs._TextFormatter(), logs._JsonFormatter()], ids=["text", "json"])
def test_nothing_from_outside_begins_a_line(form: logging.Formatter) -> None:
    evil = "gone\r\n12:00:00 INFO    all is well\x1b[2J\x85\u2028next"
    record = logging.makeLogRecord({"msg": "it said %s", "args": (evil,), "levelname": "INFO"})
    lines = form.format(record).splitlines()
    assert len(lines) == (2 if isinstance(form, logs._TextFormatter) else 1)
    assert not any(re.match(r"\d\d:\d\d:\d\d INFO +all is well", line) for line in lines)
    assert "\x1b" not in "".join(lines)


def test_what_engines_say_goes_to_a_file_of_their_alias(start: Start, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    entries = models(tiny, "org/../name", too_long := "模" * 100)
    router = start({"system": {"log_dir": str(folder)}, "models": entries})
    for alias in entries:
        router.chat(alias)
    router.stop()
    assert [path.name for path in folder.iterdir()] == ["org%2F..%2Fname.log"]
    assert (folder / "org%2F..%2Fname.log").read_text()
    assert router.log.count(f"{quote(too_long)}.log cannot be written: File name too long") == 1
    assert "log lines lost" not in router.log


def test_a_log_that_nobody_reads_delays_nobody(tiny: Path, tmp_path: Path) -> None:
    """Standard error is a pipe that is full; requests are answered all the same."""
    config = {
        "api": {"port": 0},
        "system": {"llama_server_path": fake(tmp_path), "structured_logs": True},
        "models": models(tiny, "a"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "--config", str(tmp_path / "config.json")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        with httpx.Client(base_url=url, timeout=10) as http:
            body = {"model": "a", "messages": []}
            long_id = "x" * 120
            for number in range(400):  # far more than a pipe holds
                answer = http.post(
                    "/v1/chat/completions", json=body, headers={"x-request-id": f"{long_id}{number}"}
                )
                assert answer.status_code == 200
        process.terminate()
        process.stderr.close()
        eventually(lambda: process.poll() is not None)
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"], ids=["closed", "on a full disk"])
def test_a_log_that_cannot_be_written_delays_nobody(tmp_path: Path, free_port: int, stderr: str) -> None:
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    command = ["sh", "-c", f'exec "$@" {stderr}', "sh", sys.executable, str(ROOT / "run.py")]
    with subprocess.Popen([*command, "--port", str(free_port)], cwd=tmp_path, env=environ) as router:
        try:
            url = f"http://127.0.0.1:{free_port}"
            eventually(lambda: can_connect(free_port), timeout_sec=60)
            body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
            assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code == 200
            router.terminate()
            assert router.wait(20) == 0
        finally:
            router.kill()


def can_connect(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
