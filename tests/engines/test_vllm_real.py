"""The real vLLM under a router: chats, deaths of each of its processes, stops while it loads.

A long form, skipped unless VLLM names the program `vllm`. It is started about thirty times, for half a minute or
more each.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import docker_daemon
import httpx2 as httpx
import openai
import psutil
import pytest
from conftest import Router, Start, eventually
from docker_daemon import Daemon
from hf_models import LOADABLE_LLAMA, write_model_of_bytes

from router.engines.base import Endpoint
from router.engines.docker import MODEL_LABEL
from router.engines.vllm import log
from router.engines.vllm.server import VllmServer
from router.engines.vllm.sleep import VllmSleeper
from router.hardware.ram import process_memory
from router.scheduling.messages import Retry

VLLM = os.environ.get("VLLM", "")
pytestmark = [
    pytest.mark.skipif(not VLLM, reason="VLLM names no program"),
    pytest.mark.timeout(900),
]
LOAD_SEC = 300
END_SEC = 60
"""For vLLM to end by itself while others compute, too: after the death of a worker, 6 to 15 s were measured."""
PATIENCE_SEC = 900
"""For a load while others compute, too."""
PROCESSES = ("minder", "server", "core", "worker", "tracker")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    long = {**LOADABLE_LLAMA, "max_position_embeddings": 8192}
    return write_model_of_bytes(tmp_path_factory.mktemp("hf") / "tiny", long)


def config(folder: Path, **more: Any) -> dict[str, Any]:
    entry = {
        "engine": "vllm",
        "model_path": str(folder),
        "context": 1024,
        "slots": 2,
        "flags": ["--enforce-eager"],
    }
    system = {"vllm_path": VLLM, "load_stall_sec": LOAD_SEC, **more}
    return {"system": system, "models": {"a": entry}}


@pytest.fixture
def place() -> Iterator[str]:
    """A place for temporary files, in which nothing stays; nor in /dev/shm."""
    before = set(os.listdir("/dev/shm"))

    def left() -> set[str]:
        """New files that no process uses: others may be of another vLLM on this machine."""
        new = set(os.listdir("/dev/shm")) - before
        used = "".join(read(file) for file in Path("/proc").glob("[0-9]*/maps"))
        return {name for name in new if name not in used}

    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        yield made
        eventually(lambda: not os.listdir(made))
    eventually(lambda: not left())


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def tree(router: Router) -> dict[str, psutil.Process]:
    """The processes of the engine by what they are, as far as they are there."""
    minder = psutil.Process(router.status("a")["pid"])
    found = {"minder": minder}
    for process in minder.children(recursive=True):
        words = " ".join(process.cmdline())
        for name, sign in (("core", "EngineCore"), ("worker", "Worker"), ("tracker", "resource_tracker")):
            if sign in words:
                found[name] = process
        if process.ppid() == minder.pid and "serve" in words:
            found["server"] = process
    return found


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def are_gone(processes: Mapping[str, psutil.Process]) -> bool:
    return all(map(is_gone, processes.values()))


def loading(router: Router, name: str) -> dict[str, psutil.Process]:
    """Wait until a process of the engine is there while it loads."""
    eventually(lambda: router.status("a")["status"] == "loading", LOAD_SEC)
    eventually(lambda: name in tree(router), LOAD_SEC)
    return tree(router)


def test_openais_client_chats_with_it(place: str, start: Start, folder: Path) -> None:
    router = start(config(folder, preload_models=["a"]), TMPDIR=place)
    first_200: list[float] = []

    def knock() -> None:
        while not first_200:
            try:
                if httpx.get(f"http://127.0.0.1:{router.status('a')['port']}/health").status_code == 200:
                    first_200.append(time.time())
            except httpx.HTTPError:
                time.sleep(0.002)

    eventually(lambda: router.status("a")["port"] is not None)
    knocking = threading.Thread(target=knock)
    knocking.start()
    router.until("a", "ready", LOAD_SEC)
    noticed = time.time()
    knocking.join()
    print(f"ready was noticed {1000 * (noticed - first_200[0]):.0f} ms after the first 200")
    assert noticed - first_200[0] < 0.2, "50 ms, and what a test takes to see it"
    client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none")
    asked: Any = {
        "model": "a",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 5,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    assert whole.usage is not None
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 5)
    text = "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **asked)
    )
    assert text == whole.choices[0].message.content == "!!!!!"
    memory = router.status("a")["memory"]
    eventually(lambda: bool(router.status("a")["memory"]["measured_mb"]))
    print(f"estimated {memory['estimated_mb']}, measured {router.status('a')['memory']['measured_mb']}")
    processes = tree(router)
    since = time.monotonic()
    assert router.stop() == 0
    print(f"stopped in {time.monotonic() - since:.1f} s")
    assert are_gone(processes)


@pytest.mark.parametrize("victim", PROCESSES)
def test_a_request_survives_the_death_of_each_process(place: str, start: Start, folder: Path, victim: str) -> None:
    if victim == "tracker":
        pytest.skip("only cleans up: an engine serves without it")
    router = start(config(folder), TMPDIR=place)
    assert router.http.post("/v1/models/load", json={"model": "a"}, timeout=LOAD_SEC).status_code == 200
    processes = tree(router)
    processes["core"].suspend()  # so that nothing is answered yet
    answers: list[httpx.Response] = []
    body = {"model": "a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0}
    asking = threading.Thread(
        target=lambda: answers.append(router.http.post("/v1/chat/completions", json=body, timeout=LOAD_SEC))
    )
    asking.start()
    eventually(lambda: router.status("a")["in_flight"] == 1)
    since = time.monotonic()
    processes[victim].kill()
    if victim == "worker":
        processes["core"].resume()
    eventually(lambda: are_gone(processes), 15)
    print(f"{victim}: all gone after {time.monotonic() - since:.1f} s")
    asking.join(LOAD_SEC)
    assert answers[0].json()["choices"][0]["message"]["content"] == "!!!", answers[0].text
    router.stop()


def test_a_stream_that_loses_a_process_ends_in_an_error(place: str, start: Start, folder: Path) -> None:
    """The next request is served, and nothing stays booked."""
    asked = config(folder)
    asked["models"]["a"]["context"] = 8192  # answers of 1000 tokens are over before anything can be killed
    router = start(asked, TMPDIR=place)
    router.http.timeout = httpx.Timeout(LOAD_SEC)

    def says_hello() -> None:
        answer = router.chat("a", content="hello", max_tokens=3, temperature=0)
        assert answer.json()["choices"][0]["message"]["content"] == "!!!", answer.text

    says_hello()
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "a", "messages": messages, "max_tokens": 8000, "temperature": 0, "stream": True}
    for victim in ("core", "worker"):
        processes = tree(router)
        with router.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            assert any('"content":"!' in line for line in lines)  # its first token
            processes["core"].suspend()  # so that the answer is not over before
            since = time.monotonic()
            processes[victim].kill()
            if victim == "worker":
                processes["core"].resume()
            rest = list(lines)
        assert any('"error"' in line for line in rest), rest[-5:]
        eventually(partial(are_gone, processes), END_SEC)
        print(f"{victim}: all gone after {time.monotonic() - since:.1f} s")
        says_hello()
    router.http.post("/v1/models/eject", json={"model": "a"})
    eventually(lambda: router.http.get("/vram").json()["loaded_models_count"] == 0, END_SEC)
    assert router.http.get("/vram").json()["total_allocated_by_models_mb"] == 0
    router.stop()


def test_one_that_has_lost_its_port_is_replaced(place: str, start: Start, folder: Path, free_port: int) -> None:
    """Two that load at once bind the same port. The second to listen logs that it started, and stays."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        command = [VLLM, "serve", str(folder), "--port", str(free_port), "--enforce-eager"]
        command += ["--host", "127.0.0.1", "--max-model-len", "1024"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TMPDIR": made}
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet, start_new_session=True) as stranger:
            try:
                eventually(lambda: psutil.Process(stranger.pid).cpu_times().user > 2, LOAD_SEC)  # is ahead
                router = start(config(folder, preload_models=["a"], base_port=free_port), TMPDIR=place)
                assert router.status("a")["port"] == free_port
                lost = f"another program listens on its port, {free_port}"
                eventually(lambda: lost in router.log, LOAD_SEC)
                assert stranger.poll() is None
            finally:
                stranger.send_signal(signal.SIGINT)
        router.until("a", "ready", LOAD_SEC)
        answer = router.chat("a", content="hello", max_tokens=3, temperature=0)
        assert answer.json()["choices"][0]["message"]["content"] == "!!!", answer.text
        router.stop()


@pytest.mark.parametrize("victim", ["minder", "server", "core", "worker"])
def test_a_load_survives_the_death_of_each_process(place: str, start: Start, folder: Path, victim: str) -> None:
    router = start(config(folder, preload_models=["a"]), TMPDIR=place)
    processes = loading(router, victim)
    since = time.monotonic()
    processes[victim].kill()
    eventually(lambda: are_gone(processes), END_SEC)
    print(f"{victim}: all gone after {time.monotonic() - since:.1f} s")
    router.until("a", "ready", LOAD_SEC)
    router.stop()


@pytest.mark.parametrize("moment", ["server", "core", "worker"])
def test_stopping_it_while_it_loads_leaves_nothing(place: str, start: Start, folder: Path, moment: str) -> None:
    router = start(config(folder, preload_models=["a"]), TMPDIR=place)
    processes = loading(router, moment)
    since = time.monotonic()
    router.http.post("/v1/models/eject", json={"model": "a"})
    eventually(lambda: are_gone(processes), 20)
    eventually(lambda: router.http.get("/vram").json()["loaded_models_count"] == 0)
    print(f"stopped at {moment}: all gone after {time.monotonic() - since:.1f} s")


@pytest.mark.parametrize("moment", ["server", "core", "worker", "ready"])
def test_nothing_outlives_a_router_that_is_killed(place: str, start: Start, folder: Path, moment: str) -> None:
    router = start(config(folder, preload_models=["a"]), TMPDIR=place)
    if moment == "ready":
        router.until("a", "ready", LOAD_SEC)
        processes = tree(router)
    else:
        processes = loading(router, moment)
    since = time.monotonic()
    router.process.kill()
    router.process.wait()
    eventually(lambda: are_gone(processes), 20)
    print(f"killed at {moment}: all gone after {time.monotonic() - since:.1f} s")


@pytest.mark.parametrize("moment", ["server", "core", "worker", "ready"])
def test_nothing_outlives_a_router_and_a_minder_that_are_killed_together(
    place: str, start: Start, folder: Path, tmp_path: Path, moment: str
) -> None:
    """The next router removes the folder for temporary files."""
    state = str(tmp_path / "state")
    router = start(config(folder, preload_models=["a"]), TMPDIR=place, LLAMA_ROUTER_STATE_DIR=state)
    if moment == "ready":
        router.until("a", "ready", LOAD_SEC)
        processes = tree(router)
    else:
        processes = loading(router, moment)
    psutil.Process(router.process.pid).suspend()  # or it would end the rest
    since = time.monotonic()
    processes["minder"].kill()
    router.process.kill()
    router.process.wait()
    eventually(lambda: are_gone(processes), END_SEC)
    print(f"killed with its minder at {moment}: all gone after {time.monotonic() - since:.1f} s")
    start({}, LLAMA_ROUTER_STATE_DIR=state)


# --- in a container --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    if (lacking := docker_daemon.missing()) is not None:
        pytest.skip(lacking)
    with docker_daemon.running() as daemon:
        yield daemon


@pytest.mark.timeout(3600)
def test_it_runs_in_a_container(start: Start, folder: Path, daemon: Daemon, tmp_path: Path) -> None:
    """Its program is mounted into an empty image. It chats, streams, dies, is replaced, and never stays."""
    environment = Path(VLLM).parents[1]
    container = {
        "image": docker_daemon.IMAGE,
        "entrypoint": [VLLM, "serve"],
        "volumes": [*docker_daemon.VOLUMES, f"{environment}:{environment}:ro"],
        "gpus": None,
    }
    settings = config(folder, queue_timeout_sec=PATIENCE_SEC)
    settings["models"]["a"]["container"] = container
    own = {"DOCKER_HOST": daemon.host, "LLAMA_ROUTER_STATE_DIR": str(tmp_path / "state")}
    router = start(settings, **own)

    def name() -> str:
        return " ".join(daemon.names(**{MODEL_LABEL: "a"}))

    def killed_while_it_answers(kill: Callable[[], object]) -> None:
        core = psutil.Process(router.status("a")["pid"]).children()[-1]
        core.suspend()  # so that nothing is answered yet
        before = name()
        asking = ThreadPoolExecutor().submit(router.chat, "a", content="hello", max_tokens=3, temperature=0)
        eventually(lambda: router.status("a")["in_flight"] == 1)
        since = time.monotonic()
        kill()
        eventually(lambda: before not in name(), 15)
        print(f"gone after {time.monotonic() - since:.1f} s")
        assert asking.result(PATIENCE_SEC).json()["choices"][0]["message"]["content"] == "!!!"

    router.http.timeout = httpx.Timeout(PATIENCE_SEC)
    since = time.monotonic()
    whole = router.chat("a", content="hello", max_tokens=5, temperature=0)
    print(f"first answer after {time.monotonic() - since:.1f} s")
    assert whole.status_code == 200, whole.text + "\n".join(router.log.splitlines()[-9:])
    assert whole.json()["choices"][0]["message"]["content"] == "!!!!!"
    client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none")
    hello: Any = {"model": "a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    stream = client.chat.completions.create(stream=True, temperature=0, **hello)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "!!!!!"
    message = router.http.post("/v1/messages", json=hello)
    assert message.json()["usage"]["output_tokens"] == 5
    status = router.status("a")
    assert (status["context_length"], status["memory"]["gpus"]) == (1024, [])
    eventually(lambda: bool(router.status("a")["memory"]["measured_mb"]))
    print(f"estimated {status['memory']['estimated_mb']}, measured {router.status('a')['memory']['measured_mb']}")
    assert 'router_engine_requests_running{model="a"} 0.0' in router.http.get("/metrics").text
    killed_while_it_answers(lambda: daemon.docker("kill", name()))
    killed_while_it_answers(lambda: psutil.Process(router.status("a")["pid"]).children()[-1].kill())
    assert "ended by itself" in router.log
    since = time.monotonic()
    router.http.post("/v1/models/eject", json={"model": "a"})
    eventually(lambda: not name())
    print(f"stopped in {time.monotonic() - since:.1f} s")
    router.http.post("/v1/models/load", json={"model": "a"})
    left = name()
    router.stop(signal.SIGKILL)
    assert name() == left
    assert f"removed containers left by a killed router: {left}" in start({"models": {}}, **own).log
    assert not name()


def test_it_refuses_to_sleep_on_the_cpu_and_that_is_said(folder: Path, tmp_path: Path) -> None:
    command = [VLLM, "serve", str(folder), "--enable-sleep-mode", "--max-model-len", "1024", "--enforce-eager"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LOAD_SEC, check=False)
    said = [*ended.stdout.splitlines(), *ended.stderr.splitlines()]
    print(f"exit {ended.returncode}: {log.cause(said)}")
    assert ended.returncode == 1
    assert "Sleep mode is not supported" in log.cause(said)
    assert VllmServer.retry_after(ended.returncode, said) is Retry.NEVER


def test_its_word_that_it_sleeps_is_worth_nothing_on_the_cpu(place: str, start: Start, folder: Path) -> None:
    """So what is freed decides; see `MemoryManager.put_to_sleep`."""
    asked = config(folder, health_check_interval_sec=600)
    asked["models"]["a"] |= {
        "env": {"VLLM_SERVER_DEV_MODE": "1"},
        "flags": ["--enforce-eager", "--dtype", "float32"],
    }
    router = start(asked, TMPDIR=place)
    assert router.http.post("/v1/models/load", json={"model": "a"}, timeout=LOAD_SEC).status_code == 200
    pid, port = router.status("a")["pid"], router.status("a")["port"]
    url, sleeper = f"http://127.0.0.1:{port}", VllmSleeper(Endpoint(port))
    before = process_memory([pid])[pid].anonymous_mib
    asyncio.run(sleeper.fall_asleep(60))
    after = process_memory([pid])[pid].anonymous_mib
    print(f"{before} MiB awake, {after} MiB asleep")
    assert abs(after - before) < 32
    assert httpx.get(f"{url}/is_sleeping").json() == {"is_sleeping": True}
    assert httpx.get(f"{url}/health").status_code == 200
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(router.chat("a")))
    asking.start()
    eventually(lambda: router.status("a")["in_flight"] == 1)
    asking.join(3)
    assert not answers, "it hangs until it is woken up"
    since = time.monotonic()
    asyncio.run(sleeper.wake_up(60))
    print(f"woke up in {time.monotonic() - since:.2f} s")
    asking.join(LOAD_SEC)
    assert answers[0].status_code == 200
    for path in ("/sleep", "/wake_up", "/collective_rpc", "/pause"):
        assert router.http.post(f"/upstream/a{path}").status_code == 403
    router.stop()
