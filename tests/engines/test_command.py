"""Servers that are known by their command line alone: they are routed, replaced and stopped like any other."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Router, Start, eventually, models, run
from speech_server import PIECE, PIECES

from router.config.schema import System
from router.engines.command.backend import Command
from router.engines.command.entry import CommandModel
from router.engines.command.server import CommandServer
from router.engines.launcher import LocalLauncher
from router.engines.orphans import EngineRecord
from router.engines.out_of_memory import ran_out
from router.engines.readiness import log_of_probe
from router.memory.measurements import Learned
from router.memory.plan import Alternative, Ground, Site, Unusable
from router.scheduling.messages import Retry
from router.system.devices import HOST, Device, by_name
from router.system.state import State

SERVER = Path(__file__).parent.parent / "speech_server.py"
AUDIO = ["/v1/audio/transcriptions", "/v1/audio/speech"]
CHAT = [{"role": "user", "content": "hi"}]
GPU0, GPU1 = Device.gpu(0), Device.gpu(1)


def speech(*arguments: str, **entry: Any) -> dict[str, Any]:
    cmd = [sys.executable, str(SERVER), "--host", "{host}", "--port", "{port}", *arguments]
    return {
        "engine": "command",
        "cmd": cmd,
        "routes": AUDIO,
        "model_name": "whisper-1",
        "ready_path": "/ready",
        **entry,
    }


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    config = {
        "system": {"stop_grace_sec": 3},
        "models": {
            "speech": speech("--load-sec", "0.2"),
            "locked": speech("--key", "secret", footprint_mb=300),
            **models(tiny, "tiny"),
        },
        "aliases": {"tts": "speech"},
    }
    return start_shared(config)


def transcribed(router: Router, model: str | None, audio: bytes, **fields: str) -> dict[str, Any]:
    data = {**fields, **({} if model is None else {"model": model})}
    answer = router.http.post("/v1/audio/transcriptions", data=data, files={"file": ("a.wav", audio, "audio/wav")})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-model-alias"] == "speech"
    document: dict[str, Any] = answer.json()
    return document


@pytest.mark.parametrize("size", [100, 200_000, 3_000_000], ids=["small", "read apart", "large"])
def test_a_recording_is_passed_on_under_the_name_that_the_server_knows(router: Router, size: int) -> None:
    recording = os.urandom(size)
    for name in ("speech", "tts", "speech:latest"):
        heard = transcribed(router, name, recording, language="en")
        assert heard == {"text": f"{size} bytes of speech", "fields": ["file", "language", "model"]}


def test_what_is_spoken_reaches_the_client_while_the_rest_is_still_made(router: Router) -> None:
    asked = {"model": "tts", "input": "slowly", "voice": "alloy"}
    with router.http.stream("POST", "/v1/audio/speech", json=asked) as answer:
        assert answer.headers["content-type"] == "audio/mpeg"
        pieces = answer.iter_bytes(len(PIECE))
        assert next(pieces) == PIECE
        assert router.http.get("/upstream/speech/go-on").status_code == 200
        assert b"".join(pieces) == PIECE * (PIECES - 1)


def test_a_request_to_a_server_that_tells_no_tokens_is_counted_without(router: Router) -> None:
    def counted(name: str) -> list[float]:
        lines = router.http.get("/metrics").text.splitlines()
        of_speech = [line for line in lines if line.startswith(f"{name}{{") and 'model="speech"' in line]
        return [float(line.rpartition(" ")[2]) for line in of_speech]

    before = sum(counted("router_requests_total"))
    assert router.http.post("/v1/audio/speech", json={"model": "speech", "input": "hi"}).status_code == 200
    eventually(lambda: sum(counted("router_requests_total")) == before + 1)
    assert sum(counted("router_output_tokens_total")) == 0


def test_what_it_does_not_serve_is_refused_before_it_is_loaded(router: Router) -> None:
    refused = router.chat("tts")
    assert refused.status_code == 400
    assert refused.json()["error"] == {
        "message": "'speech' does not serve /v1/chat/completions. Ask 'tiny' instead.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "not_supported",
    }
    refused = router.http.post("/v1/audio/speech", json={"model": "tiny", "input": "hi"})
    assert refused.status_code == 400
    assert "'tiny' does not serve /v1/audio/speech" in refused.json()["error"]["message"]
    in_ollamas_words = router.http.post("/api/chat", json={"model": "tts", "messages": CHAT})
    assert (in_ollamas_words.status_code, list(in_ollamas_words.json())) == (400, ["error"])
    assert router.status("tiny")["status"] == "off"


def test_a_401_is_its_own(router: Router) -> None:
    """And not that of a stranger on its port: it wants a key that nobody gave it."""
    answer = router.http.post("/v1/audio/speech", json={"model": "locked", "input": "hi"})
    assert answer.status_code == 401
    assert answer.json()["error"]["message"] == "Unauthorized"
    status = router.status("locked")
    assert (status["status"], status["engine"]) == ("ready", "command"), "it was not taken for lost"
    assert status["memory"]["booked_mb"] == {"host": 300}


def test_lists_say_what_it_can_be_asked_for(router: Router) -> None:
    cards = {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}
    assert cards["speech"]["capabilities"] == ["transcription", "speech"]
    assert cards["speech"]["architecture"] == {
        "input_modalities": ["text", "audio"],
        "output_modalities": ["audio"],
    }
    assert "completion" in cards["tiny"]["capabilities"]


def test_ollamas_page_shows_what_is_known_of_it(router: Router) -> None:
    shown = {name: router.http.post("/api/show", json={"model": name}).json() for name in ("speech", "tiny")}
    assert shown["tiny"]["details"]["format"] == "gguf"
    assert shown["speech"]["details"]["format"] == "", "nobody knows"
    assert (shown["speech"]["template"], shown["speech"]["model_info"]) == ("", {})
    assert shown["speech"]["capabilities"] == ["transcription", "speech"]
    formats = {each["name"]: each["details"]["format"] for each in router.http.get("/api/tags").json()["models"]}
    assert (formats["speech:latest"], formats["tiny:latest"]) == ("", "gguf")


def test_one_that_is_killed_is_replaced_and_what_it_took_is_measured(router: Router) -> None:
    transcribed(router, "speech", b"RIFF")
    status = router.status("speech")
    eventually(lambda: bool(router.status("speech")["memory"]["measured_mb"]))
    psutil.Process(status["pid"]).send_signal(signal.SIGKILL)
    transcribed(router, "speech", b"RIFF")
    again = router.status("speech")
    assert again["pid"] != status["pid"]
    assert again["memory"]["source"] == "measured", "and no guess any more"


def test_it_is_told_what_it_needs_and_stopped_as_it_is_said(start: Start, tmp_path: Path) -> None:
    script, file, folder = tmp_path / "stop.sh", tmp_path / "voices.bin", tmp_path / "folder"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/stopped; echo stopping; kill -TERM "$1"\n')
    script.chmod(0o755)
    file.write_bytes(b"voices")
    folder.mkdir()
    entry = speech(
        "--model",
        "{model}",
        "--key",
        '{"a": 1}',
        model_path="voices.bin",
        cwd=str(folder),
        env={"WHERE": "http://{host}:{port}/{alias}"},
        stop_cmd=f"{script} {{pid}} {{alias}}",
    )
    router = start({"models": {"a/b:c": entry}})
    seen = router.http.get("/upstream/a/b:c/seen").json()
    status = router.status("a/b:c")
    assert seen["argv"][2:] == ["--port", str(status["port"]), "--model", str(file), "--key", '{"a": 1}']
    assert (seen["cwd"], seen["env"]["WHERE"]) == (str(folder), f"http://127.0.0.1:{status['port']}/a/b:c")
    assert router.http.post("/v1/models/eject", json={"model": "a/b:c"}).status_code == 200
    assert (tmp_path / "stopped").read_text() == f"{status['pid']} a/b:c\n"
    assert "stopping" in router.http.get("/v1/logs/a/b:c").text


def test_it_ends_with_its_router(start: Start) -> None:
    """By SIGTERM, not SIGKILL: it may be a script, with more to end than itself."""
    router = start({"models": {"speech": speech()}})
    assert router.http.post("/v1/audio/speech", json={"model": "speech", "input": "hi"}).status_code == 200
    (engine,) = router.engines
    router.process.kill()
    engine.wait(10)


def test_one_that_does_not_start_says_why(start: Start, tmp_path: Path) -> None:
    system = {"model_load_max_retries": 0, "load_stall_sec": 5}
    gone = speech(cmd=["no-such-program", "--port", "{port}"])
    router = start({"system": system, "models": {"broken": speech("--model", "broken"), "gone": gone}})
    refused = router.http.post("/v1/audio/speech", json={"model": "broken", "input": "hi"})
    assert refused.status_code == 503
    assert "exited with code 1: cannot open broken: it is no model" in refused.json()["error"]["message"]
    refused = router.http.post("/v1/audio/speech", json={"model": "gone", "input": "hi"})
    assert "there is no program no-such-program" in refused.json()["error"]["message"]


def test_a_load_that_only_logs_our_probes_makes_no_progress(start: Start) -> None:
    """As with a wrong `ready_path`: the server writes a line for each of our requests, without end."""
    system = {"model_load_max_retries": 0, "load_stall_sec": 3}
    router = start({"system": system, "models": {"speech": speech(ready_path="/health")}})
    refused = router.http.post("/v1/audio/speech", json={"model": "speech", "input": "hi"}, timeout=20)
    assert refused.status_code == 503
    message = refused.json()["error"]["message"]
    assert "loading made no progress for 3 s; it answers /health (ready_path) with 404; " in message


FORGETFUL = """
import http.server, itertools, threading
class Handler(http.server.BaseHTTPRequestHandler):
    numbers = itertools.count()
    def do_GET(self):
        if next(self.numbers) == 0:
            threading.Event().wait()
        self.send_response(200)
        self.end_headers()
http.server.ThreadingHTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


def test_a_probe_that_is_lost_while_it_loads_is_sent_again(start: Start) -> None:
    router = start({"models": {"forgetful": speech(cmd=[sys.executable, "-c", FORGETFUL])}})
    loaded = router.http.post("/v1/models/load", json={"model": "forgetful"}, timeout=20)
    assert loaded.status_code == 200, loaded.text


@pytest.mark.parametrize(
    ("path", "line", "is_probe"),
    [
        ("/health", 'INFO:     127.0.0.1:5 - "GET /health HTTP/1.1" 503 Service Unavailable', True),
        ("/health", '[GIN] | 404 | 1.2ms | 127.0.0.1 | GET      "/health"', True),
        ("/health", '{"path":"/health","status":503,"method":"GET"}', True),
        ("/", '"GET / HTTP/1.1" 404 -', True),
        ("/", "GET /models/whisper.bin: 50 of 100 MB", False),
        ("/health", '"GET /health/model HTTP/1.1" 200', False),
        ("/health", '"POST /health HTTP/1.1" 200', False),
        ("/health", "loading 12 %", False),
        (None, '"GET / HTTP/1.1" 200', False),
    ],
)
def test_log_lines_about_probes_are_known_in_every_format(path: str | None, line: str, is_probe: bool) -> None:
    assert (log_of_probe(path).search(line) is not None) == is_probe


# --- plans ----------------------------------------------------------------------------------------------


def planned(
    *gpus: Site, learned: Learned | None = None, file: Path | None = None, **footprint: int
) -> tuple[Alternative, ...]:
    model = CommandModel(
        alias="a",
        model_path=file or Path("sh"),
        flags=(),
        cmd=("sh", "{port}"),
        file=file,
        known_as="a",
        footprint=footprint or None,
    )
    command = Command(LocalLauncher(8085, EngineRecord(State()), None), learned or Learned())
    ground = Ground(gpus, Site(HOST, 8000, 8000))
    return command.plan(model, System(), ground, beside_others=False).alternatives


def gpu(device: Device, budget_mib: int, free_mib: int) -> Site:
    return Site(device, budget_mib, free_mib)


@pytest.mark.parametrize(
    ("footprint", "expected"),
    [
        ({"gpu": 3000}, [{"gpu1": 3000}, {"gpu0": 3000}]),
        ({"gpu": 3000, "host": 500}, [{"gpu1": 3000, "host": 500}, {"gpu0": 3000, "host": 500}]),
        ({"gpu": 5000}, [{"gpu0": 5000}]),
        ({"host": 500}, [{"host": 500}]),
        ({"gpu0": 2000, "gpu1": 1000}, [{"gpu0": 2000, "gpu1": 1000}]),
        ({}, [{"gpu1": 512}, {"gpu0": 512}]),
    ],
    ids=["any GPU, snugly", "and RAM", "the one that is large enough", "RAM", "named", "unknown"],
)
def test_where_it_may_live_follows_from_what_it_is_said_to_take(
    footprint: dict[str, int], expected: list[dict[str, int]]
) -> None:
    found = planned(gpu(GPU0, 8000, 8000), gpu(GPU1, 4000, 4000), **footprint)
    assert [by_name(one.placement) for one in found] == expected
    assert [one.gpus for one in found] == [
        tuple(sorted(device for device in one.placement if device.is_gpu)) for one in found
    ]


def test_without_any_gpu_it_lives_in_ram(tmp_path: Path) -> None:
    assert [by_name(one.placement) for one in planned(gpu=3000, host=100)] == [{"host": 3100}]
    file = tmp_path / "voices.bin"
    file.write_bytes(b"v" * (10 << 20))
    (one,) = planned(file=file)
    assert (by_name(one.placement), one.size.source) == ({"host": 11}, "file size × 1.1")
    learned, identity = Learned(), one.identity
    assert identity is not None
    learned.learn(identity, one.size.estimated, {HOST: 70})
    (one,) = planned(file=file, learned=learned)
    assert (by_name(one.placement), one.size.source) == ({"host": 70}, "measured")


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(Unusable, match="its footprint_mb names gpu3, and there are gpu0, host"):
        planned(gpu(GPU0, 8000, 8000), gpu3=1000)


@pytest.mark.parametrize(
    ("code", "log", "retry", "memory"),
    [
        (1, ["OSError: [Errno 98] Address already in use"], Retry.AT_ONCE, False),
        (2, ["usage: a", "a: error: unrecognized arguments: --x"], Retry.NEVER, False),
        (1, ["torch.OutOfMemoryError: CUDA out of memory."], Retry.LATER, True),
        (1, ["something else"], Retry.LATER, False),
    ],
)
def test_its_last_words_tell_when_to_try_again(code: int, log: list[str], retry: Retry, memory: bool) -> None:
    assert CommandServer.retry_after(code, log) is retry
    assert (ran_out(log) is not None) is memory


# --- configuration --------------------------------------------------------------------------------------


def test_a_command_line_may_be_one_text(start: Start) -> None:
    line = f"'{sys.executable}' {SERVER} --port {{port}} \\\n  --name whisper-1  # as in a shell"
    router = start({"models": {"a": speech(cmd=line, footprint_mb=100)}})
    assert router.http.post("/v1/audio/speech", json={"model": "a", "input": "hi"}).status_code == 200


def test_all_that_is_wrong_with_an_entry_is_said(tmp_path: Path) -> None:
    wrong = {
        "deaf": speech(cmd=["whisper-server"]),
        "lost": speech(routes=["/v1/audio/transcription"], model_path="gone.bin"),
        "foreign": {**speech(), "cmdStop": "docker stop x", "flags": ["-c", 1]},
        "other": {"engine": "ollama", "model_path": "a.gguf"},
        "heavy": speech(footprint_mb={"cuda": 5}),
    }
    (tmp_path / "config.json").write_text(json.dumps({"models": wrong}))
    said = run("check", cwd=tmp_path).stderr
    for problem in (
        "models.deaf.cmd: holds no {port}, by which it is told where to listen",
        "models.lost.routes[0]: is no route of models; did you mean /v1/audio/transcriptions?",
        f"models.lost.model_path: there is no {tmp_path}/gone.bin",
        "models.foreign.cmdStop: unknown key; it is a key of llama-swap, "
        "here replaced by: stop_cmd (docs/llama-swap.md; `llama-router import` converts a whole file)",
        "models.foreign.flags: unknown key",
        "models.other.engine: should be auto, which is the default, "
        "or one of: llamacpp, command, vllm, transformers",
        "models.heavy.footprint_mb.cuda",
    ):
        assert problem in said, said


def test_check_shows_an_entry_without_its_secrets(tmp_path: Path) -> None:
    entry = speech("--api-key", "hunter2", "--hf-token=hunter3", cmd=["no-such-program", "{port}"])
    entry["cmd"] += ["--api-key", "hunter2", "--hf-token=hunter3"]
    (tmp_path / "config.json").write_text(json.dumps({"models": {"speech": entry}}))
    shown = run("check", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "models.speech.engine = command" in shown.stdout
    assert "models.speech.cmd = no-such-program '{port}' --api-key '(not-shown)' '--hf-token=(not-shown)'" in (
        shown.stdout
    )
    assert "models.speech will not load: there is no program no-such-program" in shown.stderr
