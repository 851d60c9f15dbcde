"""Engines die, hang, lie and close connections; requests are answered all the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from conftest import Router, Start, eventually, fake, models

from router.engines.complaints import complaints
from router.engines.log_ring import LogRing
from router.hardware.ram import oom_kills


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    return start_shared({"models": models(tiny, "a", "b")})


@pytest.fixture(scope="module")
def played(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    """Each model has its own way to let its clients down."""
    folder = tmp_path_factory.mktemp("played")
    ways = {
        "dies-once": {"FAKE_DIE": f"once {folder / 'died'}"},
        "dies-always": {"FAKE_DIE": "before"},
        "breaks-off": {"FAKE_DIE": "after"},
        "breaks-off-streams": {"FAKE_DIE": "after"},
        "tears-an-event": {"FAKE_DIE": "torn"},
        "dies-when-done": {"FAKE_DIE": "done"},
        "closes": {"FAKE_IDLE_CLOSE": "1"},
        "is-polled": {"FAKE_READY": "poll", "FAKE_LOAD_SEC": "0.2"},
        "is-older": {"FAKE_READY": "older", "FAKE_LOAD_SEC": "0.2"},
    }
    entries = {alias: models(tiny, alias, env=way)[alias] for alias, way in ways.items()}
    system = {"llama_server_path": fake(folder), "max_concurrent_models": len(ways)}
    return start_shared({"system": system, "models": entries})


def test_an_engine_killed_between_requests_is_replaced_at_the_next(router: Router) -> None:
    router.chat("a")
    first = router.status("a")["pid"]
    os.kill(first, signal.SIGKILL)
    answer = router.chat("a")
    assert answer.status_code == 200
    assert router.status("a")["pid"] != first


def test_a_request_survives_the_death_of_its_engine(played: Router) -> None:
    assert played.chat("dies-once").status_code == 200
    assert played.http.get("/v1/health/models").json()["models"]["dies-once"]["crashes"] == 1


def test_a_request_that_kills_every_engine_is_answered_in_the_end(played: Router) -> None:
    answer = played.chat("dies-always")
    assert answer.status_code == 503
    assert "failed 2 times" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]


def test_an_answer_that_breaks_off_unseen_is_tried_again(played: Router) -> None:
    answer = played.chat("breaks-off")  # half a document never reaches the client
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_failed"


@pytest.mark.parametrize("model", ["breaks-off-streams", "tears-an-event"])
def test_a_stream_that_breaks_off_ends_with_an_error_event(played: Router, model: str) -> None:
    answer = played.chat(model, stream=True)
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert "delta" in events[0]
    assert json.loads(events[-2])["error"]["code"] == "engine_lost"
    assert events[-1] == "[DONE]"


def test_a_stream_whose_engine_dies_after_the_last_event_is_whole(played: Router) -> None:
    events = played.chat("dies-when-done", stream=True).text.split("\n\n")
    assert ["delta" in event for event in events[:3]] == [True] * 3
    assert events[3:] == ["data: [DONE]", ""]
    metrics = played.http.get("/metrics").text
    assert re.search(r'router_requests_total{model="dies-when-done",.*status="served"} 1', metrics)


def test_connections_that_the_engine_closes_lose_no_request(played: Router) -> None:
    assert [played.chat("closes").status_code for _ in range(100)] == [200] * 100


@pytest.mark.parametrize("build", ["is-polled", "is-older"])
def test_builds_that_say_otherwise_or_nothing_when_they_are_ready_are_served(played: Router, build: str) -> None:
    assert played.chat(build).status_code == 200


def test_whoever_answers_without_a_key_is_not_taken_for_an_engine(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    system = {"llama_server_path": fake(tmp_path, ready="open"), "load_stall_sec": 1, "model_load_max_retries": 0}
    answer = start({"system": system, "models": models(tiny, "a")}).chat("a")
    assert answer.status_code == 503
    assert "its port answers /props without the key (200)" in answer.json()["error"]["message"]


class Stranger(BaseHTTPRequestHandler):
    """Says yes to everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_stranger_on_the_port_is_never_served(start: Start, tiny: Path, tmp_path: Path) -> None:
    stranger = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=stranger.serve_forever, daemon=True).start()
    port = stranger.server_address[1]
    config = {"system": {"base_port": port}, "models": models(tiny, "a")}
    router = start(config)
    assert router.chat("a").json()["usage"]["completion_tokens"] == 1
    assert router.status("a")["port"] > port
    stranger.shutdown()


def test_another_program_that_is_quicker_at_every_port_fails_no_model(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    real, ports = Path(fake(tmp_path)).rename(tmp_path / "real-engine"), tmp_path / "ports"
    script = tmp_path / "unlucky"
    script.write_text(
        f"""#!/bin/sh
        for port; do :; done
        [ "$port" = --help ] || echo "$port" >>{ports}
        [ "$port" = --help ] || [ "$(wc -l <{ports})" -gt 3 ] || {{
            echo "couldn't bind HTTP server socket" >&2
            exit 1
        }}
        exec {real} "$@"
        """
    )
    script.chmod(0o755)
    system = {"llama_server_path": str(script), "model_load_max_retries": 0}
    router = start({"system": system, "models": models(tiny, "a")})
    assert router.chat("a").status_code == 200
    asked_for = ports.read_text().split()
    assert len(asked_for) == len(set(asked_for)) == 4  # none of them twice
    assert router.http.get("/v1/health/models").json()["models"]["a"]["crashes"] == 0


def test_a_load_that_stands_still_fails_with_its_last_words(start: Start, tiny: Path, tmp_path: Path) -> None:
    system = {
        "llama_server_path": fake(tmp_path, ready="never"),
        "load_stall_sec": 1.5,
        "model_load_max_retries": 0,
    }
    router = start({"system": system, "models": models(tiny, "a")})
    answer = router.chat("a")
    assert answer.status_code == 503
    assert "made no progress" in answer.json()["error"]["message"]
    assert "fake engine: loading" in answer.json()["error"]["message"]
    (failed,) = router.http.get("/v1/models/failed").json()["failed_models"]
    assert (failed["model"], failed["attempts"]) == ("a", 1)
    assert router.engines == []
    again = router.chat("a")
    assert again.status_code == 503  # at once: it is in its cooldown
    assert again.headers["retry-after"] == "60"  # of 300: who is told more stays away, or hangs
    assert "x-should-retry" not in again.headers
    assert router.http.post("/v1/models/a/reset").json()["previous_error"]
    assert router.status("a")["status"] == "off"


def test_a_load_goes_on_while_what_a_wrapper_has_started_grows(start: Start, tiny: Path, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\n{fake(tmp_path, load_sec="2.5", grows="1")} "$@"\nexit $?\n')
    wrapper.chmod(0o755)
    system = {"llama_server_path": str(wrapper), "load_stall_sec": 1.5, "model_load_max_retries": 0}
    assert start({"system": system, "models": models(tiny, "a")}).chat("a").status_code == 200


def test_an_engine_that_gives_up_is_quoted_with_why_and_not_with_what_a_debugger_said(
    start: Start, tiny: Path
) -> None:
    """llama.cpp aborts, as a context of one token is too small, and prints where: itself, as it finds no gdb."""
    entries = models(tiny, "a", flags=["-c", "1"], env={"PATH": "/nowhere"})
    router = start({"system": {"model_load_max_retries": 0}, "models": entries})
    message = router.chat("a").json()["error"]["message"]
    assert re.fullmatch(r"'a' did not load: killed by SIGABRT: \S+/common\.cpp:\d+: [^|]*", message), message


GDB = """\
[New LWP 17007]
warning: could not find '.gnu_debugaltlink' file for /lib/x86_64-linux-gnu/libtinfo.so.6
0x00007fc5708f1c17 in __GI___wait4 () at ../sysdeps/unix/sysv/linux/wait4.c:30
30	../sysdeps/unix/sysv/linux/wait4.c: No such file or directory.
#1  0x00007fc5700bfcdb in ggml_print_backtrace () from /usr/lib/libggml-base.so
#2  0x00007fc5700bfe72 in error_cannot_happen () from /usr/lib/libggml-base.so
[Inferior 1 (process 16953) detached]
"""
ITSELF = (
    "/usr/lib/libggml-base.so(ggml_abort+0x152)[0x7f98eb6d3e72]\n/lib/libfailing.so(+0x6f7a)[0x7f98eb78af7a]\n"
)
ASSERTED = "/src/ggml.c:1234: GGML_ASSERT(ggml_can_mul_mat(a, b)) failed"
CUDA = """\
CUDA error: out of memory
  current device: 0, in function alloc at /src/ggml-cuda.cu:405
  cuMemCreate(&handle, reserve_size, &prop, 0)
/src/ggml-cuda.cu:83: CUDA error
"""
REFUSED = """\
0.00.033.356 E llama_init_from_model: K cache type q8_0 does not divide n_embd_head_k=16
0.00.033.496 E common_fit_params: encountered an error while trying to fit params: failed to create llama_context
0.00.040.609 E llama_init_from_model: K cache type q8_0 does not divide n_embd_head_k=16
0.00.040.615 E cmn  common_init_: failed to create context with model 'tiny.gguf'
0.00.040.625 E srv    load_model: failed to create_context with model 'tiny.gguf'
0.00.040.629 I srv    operator(): operator(): cleaning up before exit...
0.00.044.826 E srv  llama_server: exiting due to model loading error
"""
THROWN = "terminate called after throwing an instance of 'std::runtime_error'\n  what():  no more slots\n"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (f"{ASSERTED}\n{GDB}", ASSERTED),
        (f"{ASSERTED}\n{GDB * 20}", ASSERTED),
        (f"{ASSERTED}\n{ITSELF}Aborted: cannot go on\n", ASSERTED),
        (f"{CUDA}{GDB}", "CUDA error: out of memory | /src/ggml-cuda.cu:83: CUDA error"),
        (f"{GDB}{THROWN}", THROWN.strip().replace("\n", " | ")),
        ("loading\nerror: no such tensor\nbye\n", "error: no such tensor"),
        (REFUSED, "0.00.040.609 E llama_init_from_model: K cache type q8_0 does not divide n_embd_head_k=16"),
        (
            "0.00.04 E srv  llama_server: exiting due to model loading error\n",
            "0.00.04 E srv  llama_server: exiting due to model loading error",
        ),
        ("loading\nbye\n", "loading | bye"),
    ],
    ids=["gdb", "many threads", "backtrace", "CUDA", "exception", "error", "cause", "no cause", "words"],
)
def test_the_reason_of_an_end_is_found_in_what_an_engine_said(said: str, reason: str) -> None:
    assert complaints(said.splitlines()) == reason


def test_the_lines_of_several_engines_are_kept_apart_and_whole_together() -> None:
    of_model = LogRing(10)
    first, second = (LogRing(10, of_model.feed) for _ in range(2))
    first.feed(b"load")
    second.feed(b"also loading\nread")
    first.feed(b"ing\nand ")
    second.feed(b"y\n")
    first.end()  # in the middle of a line
    second.end()
    assert first.tail(9) == ["loading", "and"]
    assert second.tail(9) == ["also loading", "ready"]
    assert of_model.tail(9) == ["also loading", "loading", "ready", "and"]


def test_a_broken_file_costs_the_good_model_nothing(start: Start, tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:200_000])
    config = {"system": {"max_concurrent_models": 1}, "models": {**models(tiny, "good"), **models(broken, "bad")}}
    router = start(config)
    router.chat("good")
    pid = router.status("good")["pid"]
    for _ in range(5):
        answer = router.chat("bad")
        assert answer.status_code == 503
        assert "broken.gguf" in answer.json()["error"]["message"]
        assert router.chat("good").status_code == 200
    assert router.status("good")["pid"] == pid


HOLDS_FILE = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
fcntl.fcntl(os.open(sys.argv[1], os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
signal.pause()
"""
"""With a lease on a file, whoever else opens it is kept waiting, as by a network drive whose server is gone."""


def threads(router: Router) -> int:
    return psutil.Process(router.process.pid).num_threads()


@pytest.mark.skipif(sys.platform != "linux", reason="there are no leases")
def test_a_disk_that_hangs_keeps_the_router_neither_from_serving_nor_from_ending(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    stuck = Path(shutil.copy(tiny, tmp_path / "stuck.gguf"))
    router = start({"models": {**models(stuck, "stuck"), **models(tiny, "good")}})
    argv = [sys.executable, "-c", HOLDS_FILE, str(stuck)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as holder, ThreadPoolExecutor(1) as client:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            before = threads(router)
            asked = client.submit(router.chat, "stuck")
            eventually(lambda: router.status("stuck")["why_waiting"] == "its file is being inspected")
            for _ in range(2):  # the second time it is not even waited for
                cards = {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}
                assert [alias for alias, card in cards.items() if "size" in card] == ["good"]
                listed = {model["name"]: model["size"] for model in router.http.get("/api/tags").json()["models"]}
                assert (listed["stuck:latest"], listed["good:latest"]) == (0, tiny.stat().st_size)
            shown = router.http.post("/api/show", json={"model": "stuck"})
            assert (shown.status_code, str(stuck.parent) in shown.json()["error"]) == (500, True)
            assert router.http.get("/v1/models/stuck").json()["state"] == "off"
            assert threads(router) - before <= 3
            assert router.chat("good", headers={"X-Request-Priority": "high"}).status_code == 200
            assert router.stop(timeout_sec=10) == 0
            assert asked.result().status_code == 503
        finally:
            holder.kill()


def test_an_engine_that_does_not_take_its_flags_is_started_once(start: Start, tiny: Path) -> None:
    router = start({"models": models(tiny, "a", flags=["--nonsense"]) | models(tiny, "b", flags=["-c", "many"])})
    answer = router.chat("a")
    assert answer.status_code == 503
    assert "--nonsense" in answer.json()["error"]["message"]
    assert 'router_engine_exits_total{model="a",reason="load_failed"} 1\n' in router.http.get("/metrics").text
    for path, key in (("/v1/models", "data"), ("/api/tags", "models")):
        assert len(router.http.get(path).json()[key]) == 2


def test_streams_in_flight_finish_before_the_router_goes(start: Start, tiny: Path, tmp_path: Path) -> None:
    engine = fake(tmp_path, chunks="10", chunk_sec="0.1")
    router = start({"system": {"llama_server_path": engine}, "models": models(tiny, "a")})
    body = {"model": "a", "messages": [], "stream": True}
    with router.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        router.process.send_signal(signal.SIGTERM)
        eventually(lambda: router.http.get("/ready").status_code == 503)
        refused = router.chat("a")
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert router.process.wait(20) == 0


def test_a_second_router_on_the_port_leaves_the_first_alone(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"models": models(tiny, "a")})
    port = int(router.url.rsplit(":", 1)[1])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) == 0
    router.chat("a")
    with pytest.raises(AssertionError, match="in use"):
        start(arguments=["--port", str(port)])
    assert router.chat("a").status_code == 200


def test_an_engine_that_hangs_is_replaced_and_its_requests_are_served(start: Start, tiny: Path) -> None:
    system = {"health_check_interval_sec": 60, "stall_timeout_sec": 3}
    router = start({"system": system, "models": models(tiny, "a")})
    router.chat("a")
    hung = router.status("a")["pid"]
    os.kill(hung, signal.SIGSTOP)
    began = time.monotonic()
    with ThreadPoolExecutor() as clients:  # one is with the engine, two wait behind it
        answers = list(clients.map(lambda _: router.chat("a"), range(3)))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert time.monotonic() - began < 3 + 2 + 5  # the silence, the pauses between looks, a load
    assert router.status("a")["pid"] != hung
    health = router.http.get("/v1/health/models").json()["models"]["a"]
    assert health["healthy"]
    assert health["crashes"] == health["restarts"] == 1
    assert health["last_probe_ms"] is None  # of this engine
    assert "it hung" in health["last_exit"]["reason"]
    assert 'router_engine_exits_total{model="a",reason="hung"} 1\n' in router.http.get("/metrics").text


def test_an_engine_that_computes_for_long_is_not_taken_for_one_that_hangs(start: Start, middling: Path) -> None:
    """Some seconds without a byte."""
    system = {"request_timeout_sec": 0.5, "stall_timeout_sec": 0.5}
    router = start({"system": system, "models": models(middling, "a", flags=["-c", "1024", "-t", "1"])})
    answer = router.chat("a", max_tokens=50, ignore_eos=True)
    assert answer.json()["usage"]["completion_tokens"] == 50
    assert router.http.get("/v1/health/models").json()["models"]["a"]["crashes"] == 0


def test_how_an_engine_ended_can_be_read(router: Router) -> None:
    router.chat("b")
    os.kill(router.status("b")["pid"], signal.SIGSEGV)
    router.until("b", "off")
    health = router.http.get("/v1/health/models").json()["models"]["b"]
    assert (health["status"], health["healthy"], health["uptime_sec"]) == ("off", False, None)
    assert (health["crashes"], health["restarts"]) == (1, 0)  # nobody waits for it
    ended = health["last_exit"]
    assert (ended["code"], ended["signal"], ended["wanted"], ended["out_of_memory"]) == (
        None,
        "SIGSEGV",
        False,
        False,
    )
    assert ended["log_tail"]
    assert "killed by SIGSEGV" in health["last_error"]


def test_an_engine_answers_for_its_own_words_only(start: Start, tiny: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.write_text(
        f"#!/bin/sh\n[ $1 = -m ] && mkdir '{tmp_path}/second' 2>&- && echo 'error: of the first' >&2\nexit 7\n"
    )
    engine.chmod(0o755)
    system = {"llama_server_path": str(engine), "model_load_max_retries": 1}
    router = start({"system": system, "models": models(tiny, "a")})
    assert router.chat("a").json()["error"]["message"] == "'a' did not load: exited with code 7"
    assert "error: of the first" in router.http.get("/v1/logs/a").text
    assert router.http.get("/v1/health/models").json()["models"]["a"]["last_exit"]["log_tail"] == []


def test_an_engine_that_serves_and_dies_ends_in_failed_until_a_reset(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    system = {"llama_server_path": fake(tmp_path), "model_max_crashes": 3}
    router = start({"system": system, "models": models(tiny, "a")})
    for _ in range(3):
        assert router.chat("a").status_code == 200
        os.kill(router.status("a")["pid"], signal.SIGKILL)
        eventually(lambda: router.engines == [])
    refused = router.chat("a")
    assert refused.status_code == 503
    assert "crashed 3 times" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"] == "60"
    (failed,) = router.http.get("/v1/models/failed").json()["failed_models"]
    assert (failed["model"], failed["attempts"]) == ("a", 3)
    router.http.post("/v1/models/a/reset")
    assert router.chat("a").status_code == 200


def test_an_engine_that_is_to_be_there_is_replaced_though_nobody_waits_for_it(start: Start, tiny: Path) -> None:
    system = {"preload_models": ["preloaded"]}
    entries = models(tiny, "preloaded", "usual") | models(tiny, "pinned", pinned=True)
    router = start({"system": system, "models": entries})
    for alias in ("pinned", "usual"):
        assert router.chat(alias).status_code == 200
    before = {alias: router.until(alias, "ready")["pid"] for alias in entries}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    router.until("usual", "off")

    def is_back(alias: str) -> bool:
        status = router.status(alias)
        return status["status"] == "ready" and status["pid"] != before[alias]

    eventually(lambda: is_back("preloaded") and is_back("pinned"), timeout_sec=30)
    assert router.status("usual")["status"] == "off"


@pytest.mark.parametrize(
    ("group", "counts"),
    [
        (
            "0::/system.slice/router",
            {"sys/fs/cgroup/system.slice/router/memory.events": "low 0\noom 1\noom_kill 3"},
        ),
        ("4:memory:/docker/1", {"sys/fs/cgroup/memory/memory.oom_control": "under_oom 0\noom_kill 3"}),
        ("0::/", {"proc/vmstat": "nr_free_pages 1\noom_kill 3\n"}),
    ],
    ids=["cgroup v2", "cgroup v1", "no cgroup"],
)
def test_those_whom_the_kernel_killed_for_memory_are_counted(
    tmp_path: Path, group: str, counts: dict[str, str]
) -> None:
    assert oom_kills(tmp_path) is None
    for name, text in {"proc/self/cgroup": group, **counts}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path) == 3
