"""Import of llama-swap's configurations: what can be converted is served, the rest is reported with its line."""

from __future__ import annotations

import re
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Start, run

from router.cli.llama_swap import imported
from router.config.schema import ConfigFile

SPEECH_SERVER = Path(__file__).parents[1] / "speech_server.py"
SWAP = """\
healthCheckTimeout: 5
logLevel: debug
globalTTL: 0
apiKeys: [sk-one, "${env.SECOND}"]
macros:
  server: llama-server --host 127.0.0.1 --port ${PORT}
  ctx: 1024
  usual: "--ctx-size ${ctx} --temp 1e0"
models:
  chat:
    macros: {ctx: 512}
    cmd: |
      # ${server} is replaced nowhere but below
      ${server} ${usual} \\
      --model FOLDER/tiny.gguf -t 1 --ignore-eos --api-key secret
    env: [LLAMA_LOG_VERBOSITY=1, LLAMA_ARG_PORT=9]
    ttl: 600
    name: Chat
    description: of a kind
    aliases: [gpt-4o-mini]
    useModelName: another
    filters:
      stripParams: "n, model"
      setParams: {max_tokens: 3, "a.b": 1}
      setParamsByID:
        "${MODEL_ID}:short": {max_tokens: 1}
  near:
    cmd: env TZ=UTC llama-server -m tiny.gguf -c 256 -t 1
    checkEndpoint: none
    unlisted: true
  speaks:
    cmd: PYTHON SERVER --port ${PORT} --name tts-1
    checkEndpoint: /ready
    useModelName: tts-1
    concurrencyLimit: 2
    capabilities: {out: [audio]}
  hub:
    cmd: llama-server -hf ggml-org/Qwen3-4B-GGUF:Q4_K_M -c 2048
groups:
  forever: {persistent: true, swap: false, exclusive: false, members: [near]}
  chats: {swap: true, members: [chat]}
hooks: {on_startup: {preload: [near, other]}}
selectors:
  best: {strategy: pin, targets: [chat, near]}
peers: {there: {proxy: http://192.0.2.1, models: [x]}}
metricsMaxInMemory: 20000
"""


@pytest.fixture
def theirs(tmp_path: Path, tiny: Path) -> Path:
    (tmp_path / "tiny.gguf").symlink_to(tiny)
    path = tmp_path / "llama-swap.yaml"
    there = {"FOLDER": str(tmp_path), "PYTHON": sys.executable, "SERVER": str(SPEECH_SERVER)}
    path.write_text(re.sub("FOLDER|PYTHON|SERVER", lambda word: there[word[0]], SWAP))
    return path


def test_what_is_brought_is_served(theirs: Path, start: Start) -> None:
    done = run("import", str(theirs), "-o", "ours.yaml", cwd=theirs.parent, SECOND="sk-two")
    assert done.returncode == 0, done.stderr
    ours = theirs.parent / "ours.yaml"
    assert stat.S_IMODE(ours.stat().st_mode) == 0o600, "there are keys in it"
    checked = run("check", "--config", str(ours), cwd=theirs.parent)
    assert (checked.returncode, checked.stderr) == (0, "")
    router = start(yaml.safe_load(ours.read_text()))
    router.http.headers["authorization"] = "Bearer sk-two"
    assert router.http.get("/v1/requests").json()["kept"] == 10_000  # the most that there is here
    listed = {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}
    assert set(listed) == {"chat", "near", "speaks", "gpt-4o-mini", "chat:short", "best"}
    assert listed["chat"]["description"] == "Chat: of a kind"
    for name, tokens in (("chat", 3), ("gpt-4o-mini", 3), ("chat:short", 1), ("best", 3)):
        answer = router.chat(name, max_tokens=50, n=7).json()
        assert answer["usage"]["completion_tokens"] == tokens, name
    spoken = router.http.post("/v1/audio/speech", json={"model": "speaks", "input": "hello"})
    assert (spoken.status_code, spoken.headers["content-type"]) == (200, "audio/mpeg")


def test_what_has_no_counterpart_is_named_with_its_line(theirs: Path) -> None:
    done = run("import", str(theirs), cwd=theirs.parent, SECOND="sk-two")
    told = [line.removeprefix(f"{theirs}:") for line in done.stderr.splitlines()]
    assert [line.partition(" has ")[0].partition(" the model ")[0] for line in told] == [
        "4: apiKeys: the new file contains the value of an environment variable",
        "12: models.chat.cmd:",
        "16: models.chat.env:",
        "21: models.chat.useModelName:",
        "24: models.chat.filters.setParams.a.b:",
        f"28: models.near.cmd: 'tiny.gguf' is resolved against {theirs.parent}, "
        "not against the directory in which llama-swap was started",
        "30: models.near.unlisted:",
        "32: models.speaks.cmd: is assumed to serve /v1/audio/speech: "
        "check `routes` and `footprint_mb` in its entry",
        "38: models.hub.cmd:",
        "41: groups.chats:",
        "42: hooks.on_startup.preload: 'other' is not preloaded: there is no such model",
        "45: peers:",
    ]
    assert "--api-key: the router gives every engine a key of its own" in told[1]
    assert "`llama-router pull hf.co/ggml-org/Qwen3-4B-GGUF:Q4_K_M --alias hub`" in told[8]


def test_nothing_that_is_there_is_written_over(theirs: Path) -> None:
    there = theirs.parent / "config.yaml"
    there.write_text("mine")
    done = run("import", str(theirs), "-o", str(there), cwd=theirs.parent, SECOND="sk-two")
    assert (done.returncode, there.read_text()) == (2, "mine")
    assert done.stderr.startswith(f"{there}: already exists")


def brought(**theirs: Any) -> tuple[dict[str, Any], list[str]]:
    """Convert a configuration with two models and the given keys; return the result and the remarks."""
    models = {name: {"cmd": f"llama-server -m /m/{name}.gguf"} for name in ("a", "b")}
    document, remarks = imported({"models": models, **theirs}, {}, Path("/here"), {})
    ConfigFile.model_validate(document)
    return document, [remark.message for remark in remarks]


def test_models_stay_for_as_long_as_they_did() -> None:
    assert brought()[0]["system"] == {"idle_timeout_sec": 0}
    assert brought(globalTTL=60)[0]["system"] == {"idle_timeout_sec": 60, "keep_warm_models": 0}
    one = {"a": {"cmd": "llama-server -m /m/a.gguf", "ttl": 60}}
    document, _ = brought(models=one)
    assert document["models"]["a"]["idle_timeout_sec"] == 60
    assert document["system"] == {"idle_timeout_sec": 0, "keep_warm_models": 0}


def test_groups_say_who_stays_in_the_older_place_and_the_newer() -> None:
    groups = {"g": {"persistent": True, "swap": False, "members": ["a"]}}
    for theirs in ({"groups": groups}, {"routing": {"router": {"use": "group", "settings": {"groups": groups}}}}):
        document, remarks = brought(**theirs)
        pinned = [name for name, model in document["models"].items() if model.get("pinned")]
        assert (pinned, remarks) == (["a"], [])
    many = {str(number): {"cmd": f"llama-server -m /m/{number}.gguf"} for number in range(5)}
    document, _ = brought(models=many, groups={"g": {"swap": False, "members": list(many)}})
    assert document["system"]["max_concurrent_models"] == 5


def test_a_priority_of_a_model_is_that_of_its_requests() -> None:
    fifo = {"scheduler": {"use": "fifo", "settings": {"fifo": {"priority": {"a": 10, "b": -1, "none": 1}}}}}
    document, remarks = brought(routing=fifo)
    assert [document["models"][name]["priority"] for name in ("a", "b")] == ["high", "low"]
    assert remarks == ["is not a model with a numeric priority"]


def test_the_binary_of_most_models_runs_all() -> None:
    commands = {"a": "/opt/new/llama-server", "b": "/opt/new/llama-server", "c": "/opt/old/llama-server-b1"}
    models = {name: {"cmd": f"{binary} -m /m/{name}.gguf"} for name, binary in commands.items()}
    document, remarks = brought(models=models)
    assert document["system"]["llama_server_path"] == "/opt/new/llama-server"
    assert remarks == [
        "will run with /opt/new/llama-server instead of /opt/old/llama-server-b1: all models share one binary"
    ]


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"matrix": {"sets": {"s": "a & b"}}}, "has no counterpart: memory decides"),
        ({"nonsense": 1}, "is not a key of llama-swap"),
        ({"macros": {"x": "1"}, "healthCheckTimeout": "${y}"}, "there is no macro 'y'"),
        (
            {"selectors": {"s": {"strategy": "warm", "targets": ["a"]}}},
            "has no counterpart: an alias always",
        ),
    ],
)
def test_nothing_is_lost_without_a_word(theirs: dict[str, Any], told: str) -> None:
    _, remarks = brought(**theirs)
    assert any(remark.startswith(told) for remark in remarks), remarks


def test_a_variable_that_is_not_set_is_no_key(theirs: Path) -> None:
    done = run("import", str(theirs), "-o", "ours.yaml", cwd=theirs.parent)
    assert (done.returncode, done.stderr) == (2, "line 4: apiKeys[1]: the variable SECOND is not set\n")
    assert not (theirs.parent / "ours.yaml").exists()


def test_where_no_model_can_be_brought_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "llama-swap.yaml"
    path.write_text("models:\n  a:\n    cmd: vllm serve x\n")
    done = run("import", str(path), "-o", "ours.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{path}:3: models.a.cmd: the model is left out" in done.stderr
    assert not (tmp_path / "ours.yaml").exists()


def command(**model: Any) -> tuple[dict[str, Any] | None, list[str]]:
    """Convert a model of another server; return its entry and the remarks."""
    document, remarks = brought(models={"x": model, "a": {"cmd": "llama-server -m /m/a.gguf"}})
    return document["models"].get("x"), remarks


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"cmd": "vllm serve M --port ${PORT}"}, {"cmd": ["vllm", "serve", "M", "--port", "{port}"], "slots": 10}),
        (
            {"cmd": "env A=1 served ${PORT}", "cmdStop": "kill ${PID}", "env": ["B=2"], "ttl": 60},
            {
                "cmd": ["served", "{port}"],
                "slots": 10,
                "stop_cmd": "kill {pid}",
                "env": {"A": "1", "B": "2"},
                "idle_timeout_sec": 60,
            },
        ),
        (
            {
                "cmd": "docker run --rm -it --name ${MODEL_ID} --gpus all --shm-size=8g --ipc host -u 1000 "
                "-p ${PORT}:8080 -v /data/m:/models:ro --mount type=bind,src=/v,dst=/voices,readonly -e HF_TOKEN "
                "-e A=1 --entrypoint /serve --network shared --device=/dev/dri ghcr.io/acme/speech:1 "
                "--voices /voices",
                "cmdStop": "docker stop ${MODEL_ID}",
                "checkEndpoint": "none",
                "env": ["HF_TOKEN=secret"],
            },
            {
                "cmd": ["--voices", "/voices"],
                "container": {
                    "image": "ghcr.io/acme/speech:1",
                    "name": "x",
                    "gpus": "all",
                    "shm_size": "8g",
                    "ipc": "host",
                    "user": "1000",
                    "entrypoint": ["/serve"],
                    "network": "shared",
                    "devices": ["/dev/dri"],
                    "port": 8080,
                    "volumes": ["/data/m:/models:ro", "/v:/voices:ro"],
                },
                "slots": 10,
                "routes": ["/v1/audio/speech"],
                "ready_path": None,
                "env": {"HF_TOKEN": "secret", "A": "1"},
            },
        ),
        (
            {"cmd": "podman run -p127.0.0.1:9000:9000/tcp x:1 --port 9000", "proxy": "http://localhost:9000"},
            {"cmd": ["--port", "{port}"], "container": {"image": "x:1", "port": 9000}, "slots": 10},
        ),
        (
            {"cmd": "docker run --net=near --name y x:1", "proxy": "http://y:5000"},
            {"container": {"image": "x:1", "network": "near", "name": "y", "port": 5000}, "slots": 10},
        ),
        (
            {"cmd": "whisper-server --port 9233 -t 4", "proxy": "http://127.0.0.1:9233", "concurrencyLimit": 1},
            {
                "cmd": ["whisper-server", "--port", "{port}", "-t", 4],
                "slots": 1,
                "routes": ["/v1/audio/transcriptions"],
            },
        ),
        (
            {"cmd": "serve ${PORT}", "useModelName": "y", "capabilities": {"reranker": True}},
            {"cmd": ["serve", "{port}"], "slots": 10, "routes": ["/v1/rerank"], "model_name": "y"},
        ),
    ],
)
def test_another_server_is_run_by_its_command(model: dict[str, Any], expected: dict[str, Any]) -> None:
    entry, (remark,) = command(**model)
    assert entry == {"engine": "command", **expected}
    assert remark.startswith("is assumed to serve")


def test_what_a_container_here_has_no_key_for_is_said() -> None:
    options = (
        "--network host --memory 8g --privileged --gpus device=1 --restart=always --pull always -p 1:2 "
        "-v /anonymous -e HOME --env-file x -l a=b"
    )
    entry, remarks = command(
        cmd=f"docker run {options} vllm/vllm-openai:v0.32.0 --host 127.0.0.1 --port ${{PORT}}",
        cmdStop="sh stop.sh",
        env=["A=1"],
    )
    assert entry == {
        "engine": "command",
        "container": {"image": "vllm/vllm-openai:v0.32.0", "gpus": "all"},
        "cmd": ["--host", "{host}", "--port", "{port}"],
        "slots": 10,
    }
    said = "\n".join(remarks)
    for remark in (
        "--memory 8g: `container` has no such key",
        "--privileged: `container` has no such key",
        "--gpus device=1: the router chooses GPUs by memory",
        "--restart always: the router starts servers again itself",
        "--pull always: the router pulls no images",
        "--publish 1:2: only the port at which the router asks is published",
        "--volume /anonymous: only SOURCE:TARGET[:ro] is mounted",
        "--env HOME: containers inherit nothing of the router's; set it in `env`",
        "--env-file x: `container` has no such key",
        "--label a=b: `container` has no such key",
        "--network host: the server gets a network of its own, and a port of 127.0.0.1",
        "a container gets the variables of -e only, and not A",
        "has no counterpart: Docker stops the container",
        "as `engine: vllm` with this `container` its memory would be planned",
        "is assumed to serve chats, completions and embeddings",
    ):
        assert remark in said
    assert len(remarks) == 15, "and nothing twice"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"cmd": "docker run x:1"}, "docker publishes no port as ${PORT}, at which the server is asked (-p)"),
        ({"cmd": "docker run --network host x:1"}, "its server is not told which port to listen on (${PORT})"),
        ({"cmd": "docker run -p ${PORT}:${PORT} x:1"}, "its server is not told which port to listen on (${PORT})"),
        ({"cmd": "docker run --rm -p"}, "-p has no value"),
        ({"cmd": "docker run --rm"}, "its command names no image"),
        ({"cmd": "docker run x", "proxy": "http://localhost:1/v2"}, "its proxy has a path"),
        ({"cmd": "serve ${PORT}", "proxy": "http://192.0.2.1:80"}, "its proxy is on another host"),
        ({"cmd": "serve ${PORT}", "proxy": "http://localhost:${PORT}/api"}, "or has a path"),
        ({"cmd": "serve", "proxy": "http://localhost:80"}, "serve is not told which port to listen on (80)"),
        ({"cmd": "serve '"}, "cannot be read"),
        ({}, "its command is empty"),
    ],
)
def test_a_server_that_could_not_be_reached_is_left_out(model: dict[str, Any], reason: str) -> None:
    entry, remarks = command(**model)
    assert entry is None
    assert reason in remarks[0]


def test_the_documented_example_is_converted_as_it_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "llama-swap.md").read_text()
    theirs, ours = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "llama-swap.yaml").write_text(theirs)
    converted = run("import", "llama-swap.yaml", "-o", "llama-router.yaml", cwd=tmp_path)
    assert f"\n{converted.stderr}" in page
    written, documented = yaml.safe_load((tmp_path / "llama-router.yaml").read_text()), yaml.safe_load(ours)
    assert written["models"].keys() == documented["models"].keys()
    assert written["aliases"]["qwen"] == documented["aliases"]["qwen"]
