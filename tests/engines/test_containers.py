"""Servers in containers, vLLM among them, are routed, replaced and stopped like others, and none outlives its
router."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import docker_daemon
import httpx2 as httpx
import psutil
import pytest
import yaml
from conftest import ROOT, Router, Start, eventually, http_client, run
from docker_daemon import IMAGE, Daemon, said, speech, vllm
from hf_models import write_model

from router.config.schema import Container, ContainerOfVllm
from router.engines.base import Launch
from router.engines.docker import HOME_LABEL, MODEL_LABEL, ROUTER_LABEL, ContainerOrder, Containers
from router.engines.log_ring import LogRing
from router.engines.vllm.container import VllmContainer
from router.engines.vllm.model import VllmModel
from router.engines.vllm.program import in_image
from router.memory.plan import Alternative, Size
from router.system.state import State

LACKING = docker_daemon.missing()
COMPOSE = os.environ.get("COMPOSE", "")
"""Docker's Compose, of version 2."""
needs_docker = pytest.mark.skipif(LACKING is not None, reason=LACKING or "")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with docker_daemon.running() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def router(start_shared: Start, daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Router:
    voices = tmp_path_factory.mktemp("voices") / "voices.bin"
    voices.write_bytes(b"voices")
    daemon.docker("create", "--name", "taken", IMAGE, "/x")
    wrong = {
        "no-image": speech(container={"image": "ghcr.io/acme/none:1"}),
        "no-network": speech(container={"network": "lost"}),
        "no-gpu": speech(container={"gpus": "all"}),
        "taken": speech(container={"name": "taken"}),
        "no-program": speech(container={"entrypoint": ["/no/such"]}),
        "wrong-flag": speech("--nonsense"),
        "elsewhere": speech(cmd=[str(docker_daemon.SERVER), "--host", "{host}", "--port", "8111"]),
    }
    folder = tmp_path_factory.mktemp("hf") / "models--acme--tiny"
    cached = in_cache(write_model(tmp_path_factory.mktemp("tiny") / "model"), folder)
    limits = {"stop_grace_sec": 3, "load_stall_sec": 2, "stall_timeout_sec": 3, "health_check_interval_sec": 0.5}
    config = {
        "system": {**limits, "model_load_max_retries": 0, "max_concurrent_models": 6},
        "models": {
            "vllm": vllm(repo="acme/tiny", env={"HF_HUB_CACHE": str(folder.parent)}),
            "hangs": vllm(model_path=str(cached)),
            "loads": vllm(model_path=str(cached), env={"FAKE_VLLM_LOAD_SEC": "60"}),
            "vllm-image": vllm(model_path=str(cached), container={"image": "acme/vllm:v0.32.0"}),
            "a/b:c": speech("--load-sec", "0.3", env={"WHERE": "http://{host}:{port}/{alias}"}),
            "voices": speech("--model", "{model}", model_path=str(voices)),
            "open": speech(ready_path=None),
            **wrong,
        },
    }
    return start_shared(config, DOCKER_HOST=daemon.host)


def in_cache(model: Path, repository: Path) -> Path:
    """Lay a model's files out as in the Hugging Face cache, and return the snapshot."""
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in model.iterdir():
        file.rename(repository / "blobs" / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    return snapshot


def container_of(daemon: Daemon, model: str) -> str:
    """Return the name of the one container that a model has."""
    (name,) = daemon.names(**{MODEL_LABEL: model})
    return name


def spoken(router: Router, model: str) -> httpx.Response:
    answer = router.http.post("/v1/audio/speech", json={"model": model, "input": "hi"})
    assert answer.status_code == 200, answer.text
    return answer


@needs_docker
def test_a_server_in_a_container_is_told_what_it_needs(router: Router, daemon: Daemon) -> None:
    spoken(router, "a/b:c")
    seen = router.http.get("/upstream/a/b:c/seen").json()
    assert seen["argv"] == ["--host", "0.0.0.0", "--port", "8000", "--load-sec", "0.3"]
    assert seen["env"]["WHERE"] == "http://0.0.0.0:8000/a/b:c"
    assert "DOCKER_HOST" not in seen["env"], "it inherits nothing of the router's"
    assert '"POST /v1/audio/speech HTTP/1.1" 200' in router.http.get("/v1/logs/a/b:c").text
    (name,) = daemon.names(**{MODEL_LABEL: "a/b:c"})
    assert name.startswith("llama-router-a-b-c-")
    published = daemon.docker("port", name).strip()
    assert published == f"8000/tcp -> 127.0.0.1:{router.status('a/b:c')['port']}", "for nobody else"


@needs_docker
def test_its_memory_is_that_of_its_processes(router: Router) -> None:
    spoken(router, "a/b:c")
    eventually(lambda: bool(router.status("a/b:c")["memory"]["measured_mb"]))
    assert 5 < router.status("a/b:c")["memory"]["booked_mb"]["host"] < 200


@needs_docker
def test_a_model_is_mounted_under_its_own_path(router: Router) -> None:
    spoken(router, "voices")
    *_, file = router.http.get("/upstream/voices/seen").json()["argv"]
    assert Path(file).read_bytes() == b"voices"


@needs_docker
def test_a_published_port_is_not_taken_for_a_server_that_listens(router: Router) -> None:
    """Docker accepts connections to it from the start on."""
    spoken(router, "open")


@needs_docker
def test_one_that_is_killed_is_replaced(router: Router, daemon: Daemon) -> None:
    spoken(router, "a/b:c")
    (before,) = daemon.names(**{MODEL_LABEL: "a/b:c"})
    daemon.docker("kill", before)
    spoken(router, "a/b:c")
    (after,) = daemon.names(**{MODEL_LABEL: "a/b:c"})
    assert after != before


@needs_docker
def test_one_that_is_unloaded_is_removed(router: Router, daemon: Daemon) -> None:
    spoken(router, "a/b:c")
    since = time.monotonic()
    assert router.http.post("/v1/models/eject", json={"model": "a/b:c"}).status_code == 200
    eventually(lambda: daemon.names(**{MODEL_LABEL: "a/b:c"}) == [])
    assert time.monotonic() - since < 3, "by SIGTERM, and not after the grace period"


@needs_docker
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("no-image", "there is no image ghcr.io/acme/none:1 on this machine: docker pull ghcr.io/acme/none:1"),
        ("no-network", "there is no network lost: docker network create lost"),
        ("no-gpu", "containers cannot use GPUs here: install NVIDIA's container toolkit"),
        ("taken", "another container has the name taken: docker rm -f taken, or set another container.name"),
        ("no-program", 'exec: "/no/such": stat /no/such: no such file or directory'),
        (
            "wrong-flag",
            "its container exited with code 2: speech_server.py: error: unrecognized arguments",
        ),
        ("elsewhere", "loading made no progress for 2 s; it does not answer /ready (ready_path)"),
    ],
)
def test_one_that_does_not_start_says_why(router: Router, daemon: Daemon, model: str, reason: str) -> None:
    refused = router.http.post("/v1/audio/speech", json={"model": model, "input": "hi"})
    assert refused.status_code == 503
    assert reason in said(refused)
    eventually(lambda: daemon.names(**{MODEL_LABEL: model}) == [])


# --- vLLM -----------------------------------------------------------------------------------------------


@needs_docker
def test_vllm_in_a_container_is_told_what_one_in_processes_is(router: Router, daemon: Daemon) -> None:
    assert router.chat("vllm", max_tokens=4).json()["choices"][0]["message"]["content"] == "xxxx"
    name = container_of(daemon, "vllm")
    (shown,) = json.loads(daemon.docker("inspect", name))
    snapshot, *arguments = shown["Config"]["Cmd"]
    cache_bytes = 3 * 2048 * 2 * 2 * 32 * 2
    assert arguments == [
        *("--max-num-seqs", "4", "--kv-cache-memory-bytes", str(cache_bytes)),
        *("--host", "0.0.0.0", "--port", "8000", "--served-model-name", "vllm"),
    ]
    env = dict(each.split("=", 1) for each in shown["Config"]["Env"])
    assert (env["HF_HUB_OFFLINE"], env["VLLM_NO_USAGE_STATS"], len(env["VLLM_API_KEY"])) == ("1", "1", 48)
    assert shown["HostConfig"]["ShmSize"] == 8 << 30
    read = daemon.docker("exec", name, "/bin/cat", f"{snapshot}/config.json")
    assert json.loads(read)["model_type"] == "llama", "the files to which the snapshot links are there"
    with pytest.raises(AssertionError, match="Read-only file system"):
        daemon.docker("exec", name, "/usr/bin/touch", f"{snapshot}/new")
    lines = router.http.get("/metrics").text.splitlines()
    assert 'router_engine_kv_cache_usage_ratio{model="vllm"} 0.25' in lines
    assert "Application startup complete" in router.http.get("/v1/logs/vllm").text


@needs_docker
def test_what_vllm_has_not_finished_when_it_is_stopped_is_asked_again(router: Router, daemon: Daemon) -> None:
    """It ends with 200, half an answer and the word "abort"."""
    router.chat("vllm")
    before = container_of(daemon, "vllm")
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(router.chat("vllm", content="slowly tokens 20")))
    asking.start()
    eventually(lambda: router.status("vllm")["in_flight"] == 1)
    daemon.docker("kill", "-s", "TERM", before)
    asking.join(30)
    assert answers[0].json()["choices"][0]["message"]["content"] == "x" * 20
    assert container_of(daemon, "vllm") != before
    assert "ended by itself" in router.log, "although its exit code was 0"


@needs_docker
def test_a_vllm_in_a_container_that_hangs_is_replaced(router: Router, daemon: Daemon) -> None:
    """Its health is good all the time."""
    router.chat("hangs")
    before = container_of(daemon, "hangs")
    (engine,) = psutil.Process(router.status("hangs")["pid"]).children()
    engine.suspend()
    eventually(lambda: daemon.names(**{MODEL_LABEL: "hangs"}) != [before], 25)
    assert "does not respond and is killed" in router.log


@needs_docker
def test_a_vllm_in_a_container_that_computes_need_not_answer(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As during a long prompt."""
    monkeypatch.setenv("DOCKER_HOST", daemon.host)
    busy = "import socket; listener = socket.create_server(('', 8000))\nwhile True: pass"
    python = (str(Path(sys.executable).resolve()), "-c", busy)
    spec = ContainerOfVllm(image=IMAGE, entrypoint=python, volumes=tuple(docker_daemon.VOLUMES), gpus=None)
    model = VllmModel(alias="busy", model_path=write_model(tmp_path / "tiny"), container=spec)
    launch = Launch(model, Alternative((), Size({}, "", {}), {}))

    async def computes() -> bool:
        engine = await VllmContainer.start(launch, model, in_image(spec), Containers(State()), LogRing(10))
        try:
            until_sec = time.monotonic() + 15
            while not (healthy := await engine.healthy(0.3)) and time.monotonic() < until_sec:  # noqa: ASYNC110
                await asyncio.sleep(0.1)  # before it listens, its connections break off
            return healthy
        finally:
            engine.kill()
            await engine.exited

    assert asyncio.run(computes())


@needs_docker
def test_a_vllm_in_a_container_that_loads_is_removed_at_once(router: Router, daemon: Daemon) -> None:
    """It would swallow SIGTERM."""
    asking = threading.Thread(target=router.chat, args=("loads",))
    asking.start()
    eventually(lambda: router.status("loads")["status"] == "loading")
    eventually(lambda: daemon.names(**{MODEL_LABEL: "loads"}) != [])
    loading = container_of(daemon, "loads")
    since = time.monotonic()
    router.http.post("/v1/models/eject", json={"model": "loads"})
    eventually(lambda: loading not in daemon.names(**{MODEL_LABEL: "loads"}))
    assert time.monotonic() - since < 2.5, "and not after the grace period"
    asking.join(30)


@needs_docker
def test_an_image_of_vllm_that_is_not_there_is_named(router: Router) -> None:
    refused = router.chat("vllm-image")
    assert refused.status_code == 503
    assert "there is no image acme/vllm:v0.32.0 on this machine: docker pull acme/vllm:v0.32.0" in said(refused)


# --- what surrounds them ----------------------------------------------------------------------------------


@needs_docker
def test_check_looks_for_image_and_network(tmp_path: Path, daemon: Daemon) -> None:
    entries = {
        "a": speech(),
        "b": speech(container={"image": "ghcr.io/acme/none:1"}),
        "c": speech(container={"network": "lost"}),
        "d": {"engine": "vllm", "model_path": str(write_model(tmp_path / "tiny")), "container": {}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"models": entries}))
    warnings = run("check", cwd=tmp_path, DOCKER_HOST=daemon.host).stderr
    assert "models.b will not load: there is no image ghcr.io/acme/none:1 on this machine" in warnings
    assert "models.c will not load: there is no network lost" in warnings
    assert "models.a" not in warnings
    image = "vllm/vllm-openai:latest"
    assert f"models.d will not load: there is no image {image} on this machine: docker pull {image}" in warnings
    assert "program `vllm`" not in warnings, "the image has its own"


@needs_docker
def test_what_a_killed_router_leaves_is_removed_by_the_next(start: Start, daemon: Daemon, tmp_path: Path) -> None:
    own = {"DOCKER_HOST": daemon.host, "LLAMA_ROUTER_STATE_DIR": str(tmp_path / "state")}
    killed = start({"models": {"left": speech()}}, **own)
    spoken(killed, "left")
    killed.stop(signal.SIGKILL)
    another = start({"models": {"other": speech()}}, DOCKER_HOST=daemon.host)
    alive = daemon.docker("create", IMAGE, "/x").strip()
    for name, home in (("of-the-gone", "f" * 64), ("of-the-alive", alive)):
        labels = ("--label", f"{ROUTER_LABEL}=x", "--label", f"{HOME_LABEL}={home}")
        daemon.docker("create", "--name", name, *labels, IMAGE, "/x")
    spoken(another, "other")
    assert daemon.names(**{ROUTER_LABEL: "x"}) == ["of-the-alive"], "whose router may come again"
    (left,) = daemon.names(**{MODEL_LABEL: "left"})
    following = start({"models": {}}, **own)
    assert f"removed containers left by a killed router: {left}" in following.log
    assert daemon.names(**{MODEL_LABEL: "left"}) == []
    assert len(daemon.names(**{MODEL_LABEL: "other"})) == 1, "which is another router's"
    assert another.stop() == 0
    assert daemon.names(**{MODEL_LABEL: "other"}) == []


@needs_docker
def test_what_may_be_left_is_remembered_as_long_as_it_may(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next router does not look for it: for one that starts while another is removed, and for one
    that cannot be removed."""
    sleeps = (str(Path(sys.executable).resolve()), "-c", "import time; time.sleep(600)")
    spec = Container(image=IMAGE, entrypoint=sleeps, volumes=tuple(docker_daemon.VOLUMES))
    order = ContainerOrder("kept", spec, (), {})

    def may_be_left() -> bool:
        return bool(json.loads((tmp_path / "containers.json").read_text())["may_be_left"])

    async def story() -> None:
        containers, creates, may_create = Containers(State(tmp_path)), asyncio.Event(), asyncio.Event()

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while chunk := await reader.read(65536):
                if b"/containers/create" in chunk:
                    creates.set()
                    await may_create.wait()
                if b"DELETE " in chunk:
                    break
                writer.write(chunk)
            writer.close()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            from_daemon, to_daemon = await asyncio.open_unix_connection(daemon.host.removeprefix("unix://"))
            await asyncio.gather(pass_on(reader, to_daemon), pass_on(from_daemon, writer))

        monkeypatch.setenv("DOCKER_HOST", daemon.host)
        first = await containers.start(order)
        async with await asyncio.start_unix_server(connected, tmp_path / "socket"):
            monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/socket")
            starting = asyncio.create_task(containers.start(order))
            await creates.wait()
            await containers.remove(first.container)
            may_create.set()
            second = await starting
            assert may_be_left(), "the second"
            monkeypatch.setenv("DOCKER_HOST", daemon.host)
            third = await containers.start(order)
            await containers.remove(second.container)
            await containers.remove(third.container)
            assert may_be_left(), "the second, still"
            assert daemon.names(**{MODEL_LABEL: "kept"}) == [second.name]
            fourth = await containers.start(order)
            await containers.remove(fourth.container)
            assert not may_be_left(), "as the start has removed it"
            assert daemon.names(**{MODEL_LABEL: "kept"}) == []
            for each in (first, second, third, fourth):
                await each.docker.close()

    asyncio.run(story())


@needs_docker
def test_a_router_in_a_container_reaches_its_neighbours_by_name(
    daemon: Daemon, tmp_path: Path, free_port: int
) -> None:
    daemon.docker("network", "create", "shared")
    (tmp_path / "state").mkdir()
    (tmp_path / "voices.bin").write_bytes(b"voices")
    config = {
        "api": {"host": "0.0.0.0", "port": 8000},
        "system": {"state_dir": str(tmp_path / "state"), "model_load_max_retries": 0},
        "models": {
            "near": speech("--model", "{model}", model_path="state/voices.bin", container={"network": "shared"}),
            "far": speech(),
        },
    }
    (tmp_path / "state" / "voices.bin").write_bytes(b"voices")
    (tmp_path / "config.json").write_text(json.dumps(config))
    state, file = tmp_path / "state", tmp_path / "config.json"
    inside = docker_daemon.as_container(daemon, f"{state}:{state}", f"{file}:{file}:ro")
    listens = ("--network", "shared", "-p", f"127.0.0.1:{free_port}:8000")
    daemon.docker("run", "-d", "--name", "gateway", *listens, *inside, "--config", str(file))
    client = http_client(f"http://127.0.0.1:{free_port}")

    def ask(model: str) -> httpx.Response:
        return client.post("/v1/audio/speech", json={"model": model, "input": "hi"})

    eventually(lambda: _answers(client), 30)
    assert ask("near").status_code == 200
    (name,) = daemon.names(**{MODEL_LABEL: "near"})
    assert daemon.docker("port", name) == "", "and it is not published"
    assert "the router runs in a container itself: set container.network to a network of both (shared)" in said(
        ask("far")
    )
    daemon.docker("stop", "gateway")
    assert daemon.names(**{MODEL_LABEL: "near"}) == []
    daemon.docker("rm", "gateway")
    daemon.docker("network", "rm", "shared")


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


@needs_docker
def test_the_end_of_the_daemon_is_that_of_its_engines(router: Router, daemon: Daemon) -> None:
    """The daemon that starts again has lost its containers."""
    spoken(router, "a/b:c")
    daemon.import_vllm()
    daemon.end(signal.SIGKILL)
    router.until("a/b:c", "off")
    refused = router.http.post("/v1/audio/speech", json={"model": "a/b:c", "input": "hi"})
    assert f"there is no Docker daemon at {daemon.host} (Connection refused): start it" in said(refused)
    daemon.start()
    router.http.post("/v1/models/a/b:c/reset")
    spoken(router, "a/b:c")
    assert len(daemon.names(**{MODEL_LABEL: "a/b:c"})) == 1, "what the daemon had left is removed"


@needs_docker
def test_the_environment_of_an_earlier_gateway_works_as_it_is(
    daemon: Daemon, tmp_path: Path, free_port: int
) -> None:
    """One container of vLLM at a time, of the model that was asked for last. Comes after a start with GPUs."""
    (cache := tmp_path / "cache").mkdir()
    (cache / "hub").mkdir()
    compose = yaml.safe_load((ROOT / "config" / "docker-compose.vllm.yml").read_text())
    variables = {
        **compose["services"]["gateway"]["environment"],
        "API_KEY": "",
        "HUGGING_FACE_HUB_TOKEN": "hf_secret",
        "VLLM_IMAGE": docker_daemon.VLLM_IMAGE,
        "LLAMA_ROUTER__API__HOST": "0.0.0.0",  # from here on as in our image
        "LLAMA_ROUTER_STATE_DIR": "/tmp/state",
    }
    inside = docker_daemon.as_container(daemon, f"{cache}:/root/.cache/huggingface", **variables)
    daemon.docker("network", "create", "stack_vllm_network")  # as Compose calls it
    listens = ("--network", "stack_vllm_network", "-p", f"127.0.0.1:{free_port}:9000")
    daemon.docker("run", "-d", "--name", "vllm_gateway", *listens, *inside)
    _loads_one_model_at_a_time(http_client(f"http://127.0.0.1:{free_port}"), daemon)
    daemon.docker("rm", "-f", "vllm_gateway")


def _loads_one_model_at_a_time(client: httpx.Client, daemon: Daemon) -> None:
    eventually(lambda: _answers(client), 30)

    def ask(model: str) -> httpx.Response:
        messages = [{"role": "user", "content": "What are the top 3 benefits of using Docker?"}]
        return client.post("/v1/chat/completions", json={"model": model, "messages": messages})

    listed = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["gemma3-4B", "qwen2.5"]
    assert daemon.names(**{MODEL_LABEL: "gemma3-4B"}) == [], "it is loaded by the first request"
    for model, repository in (
        ("gemma3-4B", "google/gemma-3-4b-it"),
        ("qwen2.5", "Qwen/Qwen2.5-Coder-7B-Instruct"),
    ):
        answer = ask(model)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        assert daemon.names(**{MODEL_LABEL: model}) == ["vllm_server"]
        log = client.get(f"/v1/logs/{model}").text
        assert f"model='{repository}'" in log
        assert "gpu_memory_utilization=0.85) hf_secret all" in log
        assert "['hub']" in log, "the cache is the one that is mounted into the gateway"
    assert daemon.names(**{MODEL_LABEL: "gemma3-4B"}) == [], "one at a time"
    refused = ask("google/gemma-3-27b-it")
    assert refused.status_code == 404
    assert "Available models: 'gemma3-4B', 'qwen2.5'" in said(refused)


@needs_docker
@pytest.mark.skipif(not COMPOSE, reason="COMPOSE names no program")
def test_compose_runs_that_gateway(daemon: Daemon, tmp_path: Path, free_port: int) -> None:
    """As its file says, but for what takes the place of images that nobody can pull here, and for the port."""
    (tmp_path / "cache" / "hub").mkdir(parents=True)
    played = {
        "image": IMAGE,
        "entrypoint": docker_daemon.ROUTER,
        "environment": {"LLAMA_ROUTER__API__HOST": "0.0.0.0", "LLAMA_ROUTER_STATE_DIR": "/var/lib/llama-router"},
        "volumes": docker_daemon.mounts_of_router(daemon),
    }
    project = yaml.safe_dump({"services": {"gateway": played}})
    project += f"    ports: !override ['127.0.0.1:{free_port}:9000']\n"
    (tmp_path / "played.yml").write_text(project)
    variables = {
        **os.environ,
        "DOCKER_HOST": daemon.host,
        "HF_CACHE": str(tmp_path / "cache"),
        "HUGGING_FACE_HUB_TOKEN": "hf_secret",
        "VLLM_IMAGE": docker_daemon.VLLM_IMAGE,
    }
    files = ("-f", str(ROOT / "config" / "docker-compose.vllm.yml"), "-f", str(tmp_path / "played.yml"))

    def compose(*words: str) -> None:
        done = subprocess.run(
            [COMPOSE, *files, *words], env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    compose("up", "-d", "--no-build", "--pull", "never")
    _loads_one_model_at_a_time(http_client(f"http://127.0.0.1:{free_port}"), daemon)
    eventually(lambda: "(healthy)" in daemon.docker("ps", "--filter", "name=vllm_gateway"), 60)
    compose("down", "-v")
    assert daemon.names(**{MODEL_LABEL: "qwen2.5"}) == [], "it has removed its own"


# --- without a daemon -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("unix:///no/such.sock", "there is no Docker daemon at unix:///no/such.sock (No such file or directory)"),
        ("no/scheme", "DOCKER_HOST=no/scheme is not understood"),
    ],
)
def test_a_daemon_that_is_not_there_is_named(start: Start, host: str, reason: str) -> None:
    pytest.importorskip("aiodocker")
    router = start({"system": {"model_load_max_retries": 0}, "models": {"a": speech()}}, DOCKER_HOST=host)
    refused = router.http.post("/v1/audio/speech", json={"model": "a", "input": "hi"})
    assert refused.status_code == 503
    assert reason in said(refused)


def test_all_that_is_wrong_with_a_container_is_said(tmp_path: Path) -> None:
    wrong = {
        "a": speech(cwd="/tmp", stop_cmd="docker stop a"),
        "b": speech(container={"network": "host", "imag": "x"}),
        "c": speech(container={"network": "host"}),
        "d": speech(container={"volumes": ["/models"], "shm_size": "much"}),
        "e": {"engine": "command"},
    }
    (tmp_path / "config.json").write_text(json.dumps({"models": wrong}))
    problems = run("check", cwd=tmp_path).stderr
    for problem in (
        "models.a.cwd: is of no use with a container: its image has a working directory",
        "models.a.stop_cmd: is of no use with a container: Docker stops it",
        "models.b.container.imag: unknown key",
        "models.c.container.network: cannot be host: name a network, or leave it out for a port of 127.0.0.1",
        "models.d.container.volumes[0]: should match pattern",
        "models.d.container.shm_size: should match pattern",
        "models.e.cmd: is required, unless there is a container",
    ):
        assert problem in problems


def test_volumes_are_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    entry = speech(container={"volumes": ["./voices:/voices:ro", "cache:/cache", "/a/../b:/b"]})
    (tmp_path / "conf" / "config.json").write_text(json.dumps({"models": {"a": entry}}))
    shown = run("check", "--config", "conf/config.json", cwd=tmp_path, DOCKER_HOST="unix:///no").stdout
    assert f'volumes = ["{tmp_path}/conf/voices:/voices:ro", "cache:/cache", "/b:/b"]' in shown


def test_the_library_is_not_imported_without_a_container() -> None:
    look = "import sys, router.server; print('aiodocker' in sys.modules, 'aiohttp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
