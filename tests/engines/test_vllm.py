"""vLLM as a kind of engine, on a program that has its processes and its oddities and no model (`fake_vllm.py`)."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Router, Start, eventually, models, run
from hf_models import LLAMA, played_vllm, write_model

from router.config.schema import ContainerOfVllm
from router.engines.vllm import log
from router.engines.vllm.engine import tells_end
from router.engines.vllm.entry import routes_of
from router.engines.vllm.flags import Flags
from router.engines.vllm.model import VllmModel
from router.engines.vllm.plan import VllmPlan
from router.engines.vllm.program import Program, find_program, in_image
from router.engines.vllm.server import VllmServer
from router.formats import hf_model
from router.memory.measurements import Learned
from router.memory.plan import Ground, Inspection, Site, Unusable
from router.scheduling.messages import Retry
from router.system.devices import HOST, Device

GPU0, GPU1 = Device.gpu(0), Device.gpu(1)
PROCESSES = ("minder", "server", "engine")
FORMS = ("document", "stream")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the fake looks into /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return played_vllm(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def router(start_shared: Start, vllm: Path, folder: Path, tiny: Path, tmp_path_factory: Any) -> Router:
    notes = tmp_path_factory.mktemp("notes") / "notes"
    system = {"vllm_path": str(vllm), "health_check_interval_sec": 0.2, "stall_timeout_sec": 6}
    entry = {"engine": "vllm", "model_path": str(folder), "slots": 3, "flags": ["--enforce-eager"]}
    # One that has crashed is started again after a pause that becomes longer each time.
    vllms = dict.fromkeys(
        ("loses", "hangs", *(f"{victim}-{form}" for victim in PROCESSES for form in FORMS)), entry
    )
    vllms["chat"] = {**entry, "env": {"FAKE_VLLM_NOTES": str(notes)}}
    sees = write_model(tmp_path_factory.mktemp("hf") / "sees", {**LLAMA, "vision_config": {}})
    vllms["sees"] = {**entry, "model_path": str(sees)}
    return start_shared(
        {"system": {**system, "max_concurrent_models": 20}, "models": {**vllms, **models(tiny, "gguf")}}
    )


def tree(router: Router, alias: str) -> tuple[psutil.Process, psutil.Process, psutil.Process]:
    """The minder, the API server, and the engine of a model."""
    minder = psutil.Process(router.status(alias)["pid"])
    (server,) = minder.children()
    (engine,) = server.children()
    return minder, server, engine


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def folder_of(process: psutil.Process) -> Path:
    return Path(process.environ()["TMPDIR"])


# --- what clients and operators see -----------------------------------------------------------------------


def test_a_chat_is_answered_and_its_tokens_are_counted(router: Router) -> None:
    def tokens() -> float:
        lines = router.http.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith('router_output_tokens_total{model="chat"')]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    before = tokens()
    answer = router.chat("chat", max_tokens=4)
    assert answer.json()["choices"][0]["message"]["content"] == "xxxx"
    status = router.status("chat")
    assert (status["status"], status["engine"], status["slots"], status["context_length"]) == (
        "ready",
        "vllm",
        3,
        2048,
    )
    chunks: list[str] = []
    body = {"model": "chat", "stream": True, "messages": [{"role": "user", "content": "tokens 5"}]}
    with router.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        chunks = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
    assert chunks[-1] == "[DONE]"
    assert all(json.loads(chunk)["choices"] for chunk in chunks[:-1]), (
        "usage is hidden from who did not ask for it"
    )

    eventually(lambda: tokens() == before + 9)


def test_json_need_not_be_called_json(router: Router) -> None:
    """As curl's -d sends it."""
    body = b'{"model": "chat", "messages": [{"role": "user", "content": "hi"}]}'
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert router.http.post("/v1/chat/completions", content=body, headers=headers).status_code == 200


def test_it_is_started_with_what_was_planned(router: Router, folder: Path) -> None:
    router.chat("chat")
    notes = Path(tree(router, "chat")[1].environ()["FAKE_VLLM_NOTES"])
    argv = json.loads(notes.read_text().splitlines()[0])[1:]
    status = router.status("chat")
    cache_bytes = (
        3 * 2048 * 2 * 2 * 32 * 2
    )  # three requests of 2048 tokens, 2 layers, keys and values of 32 numbers
    assert argv == [
        *("serve", str(folder), "--enforce-eager", "--max-num-seqs", "4"),
        *("--kv-cache-memory-bytes", str(cache_bytes), "--host", "127.0.0.1", "--port", str(status["port"])),
        *("--served-model-name", "chat", "--disable-access-log-for-endpoints", "/health,/metrics"),
    ]
    assert status["memory"]["source"] == "weights, KV cache and overhead"
    assert status["memory"]["gpus"] == []


def test_lists_show_what_its_files_say(router: Router, folder: Path) -> None:
    cards = {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}
    card = cards["chat"]
    assert (card["family"], card["quantization"], card["context_length"]) == ("llama", "bfloat16", 2048)
    assert card["capabilities"] == ["completion"]
    assert card["size"] == hf_model.read(folder).weight_bytes
    shown = router.http.post("/api/show", json={"model": "chat"}).json()
    assert (shown["details"]["format"], shown["template"]) == ("safetensors", "{{ messages }}")
    assert shown["model_info"]["architectures"] == ["LlamaForCausalLM"]
    assert shown["details"]["context_length"] == shown["model_info"]["llama.context_length"] == 2048


def test_what_it_does_not_serve_is_refused(router: Router) -> None:
    refused = router.http.post("/v1/embeddings", json={"model": "chat", "input": "hi"})
    assert refused.status_code == 400
    assert "'chat' does not serve /v1/embeddings. No model here does." in refused.json()["error"]["message"]
    seen: Any = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]
    refused = router.chat("chat", content=seen)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_supported")
    assert refused.json()["error"]["message"] == "'chat' takes text only. Ask 'sees' instead."


@linux_only
def test_what_it_refused_is_not_told_as_the_reason_of_its_end(router: Router) -> None:
    seen: Any = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    assert router.chat("sees", content=seen).status_code == 400
    tree(router, "sees")[2].kill()
    router.until("sees", "off")
    reason = router.http.get("/v1/health/models").json()["models"]["sees"]["last_exit"]["reason"]
    assert "multimodal" in router.http.get("/v1/logs/sees").text
    assert "multimodal" not in reason


def test_its_own_figures_are_among_the_metrics(router: Router) -> None:
    router.chat("chat")
    lines = router.http.get("/metrics").text.splitlines()
    assert 'router_engine_requests_running{model="chat"} 1.0' in lines
    assert 'router_engine_kv_cache_usage_ratio{model="chat"} 0.25' in lines


# --- deaths -----------------------------------------------------------------------------------------------


@linux_only
@pytest.mark.parametrize("victim", PROCESSES)
@pytest.mark.parametrize("form", FORMS)
def test_a_request_survives_the_death_of_any_process_before_its_answer(
    router: Router, victim: str, form: str
) -> None:
    alias = f"{victim}-{form}"
    router.chat(alias)
    processes = dict(zip(PROCESSES, tree(router, alias), strict=True))
    temporary = folder_of(processes["server"])
    processes["engine"].suspend()  # so that nothing is answered yet
    messages = [{"role": "user", "content": "tokens 2"}]
    body = {"model": alias, "stream": form == "stream", "messages": messages}
    answers: list[str] = []

    def ask() -> None:
        answers.append(router.http.post("/v1/chat/completions", json=body, timeout=30).text)

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: router.status(alias)["in_flight"] == 1)
    processes[victim].kill()
    asking.join(30)
    assert answers
    assert answers[0].count("x") >= 2, answers
    assert "error" not in answers[0]
    eventually(lambda: all(map(is_gone, processes.values())), 5)
    eventually(lambda: not temporary.exists())
    reason = router.http.get("/v1/health/models").json()["models"][alias]["last_exit"]["reason"]
    assert reason.startswith("ended by itself" if victim == "engine" else "killed by SIGKILL"), reason


@linux_only
def test_a_stream_that_loses_its_engine_counts_as_failed(router: Router) -> None:
    def failed() -> float:
        lines = router.http.get("/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("router_requests_total{")
            and 'model="loses"' in line
            and 'status="engine_error"' in line
        )

    router.chat("loses")
    before = failed()
    body = {"model": "loses", "stream": True, "messages": [{"role": "user", "content": "slowly tokens 100"}]}
    with router.http.stream("POST", "/v1/chat/completions", json=body, timeout=30) as stream:
        lines = stream.iter_lines()
        next(line for line in lines if '"x"' in line)
        tree(router, "loses")[2].kill()
        rest = list(lines)
    assert any('"error"' in line for line in rest)
    eventually(lambda: failed() == before + 1)
    assert router.chat("loses").status_code == 200


@linux_only
def test_one_that_hangs_is_found_out_although_its_health_is_good(router: Router) -> None:
    router.chat("hangs")
    minder, _, engine = tree(router, "hangs")
    engine.suspend()
    eventually(lambda: is_gone(minder) and is_gone(engine), 25)
    eventually(lambda: "hung" in router.log, 5)


@linux_only
def test_stopping_it_while_it_loads_leaves_nothing(start: Start, vllm: Path, folder: Path) -> None:
    entry = {"engine": "vllm", "model_path": str(folder), "env": {"FAKE_VLLM_LOAD_SEC": "60"}}
    router = start({"system": {"vllm_path": str(vllm), "preload_models": ["slow"]}, "models": {"slow": entry}})
    eventually(lambda: router.status("slow")["status"] == "loading")
    eventually(lambda: len(psutil.Process(router.status("slow")["pid"]).children(recursive=True)) == 2)
    processes = tree(router, "slow")
    temporary = folder_of(processes[1])
    router.http.post("/v1/models/eject", json={"model": "slow"})
    eventually(lambda: all(map(is_gone, processes)), 8)
    assert not temporary.exists()


@linux_only
@pytest.mark.parametrize("load_sec", ["0", "60"], ids=["ready", "loading"])
def test_nothing_outlives_a_router_that_is_killed(start: Start, vllm: Path, folder: Path, load_sec: str) -> None:
    entry = {"engine": "vllm", "model_path": str(folder), "env": {"FAKE_VLLM_LOAD_SEC": load_sec}}
    router = start({"system": {"vllm_path": str(vllm), "preload_models": ["a"]}, "models": {"a": entry}})
    state = "loading" if load_sec == "60" else "ready"
    eventually(lambda: router.status("a")["status"] == state)
    eventually(lambda: len(psutil.Process(router.status("a")["pid"]).children(recursive=True)) == 2)
    processes = tree(router, "a")
    temporary = folder_of(processes[1])
    router.process.kill()
    router.process.wait()
    eventually(lambda: all(map(is_gone, processes)), 8)
    assert not temporary.exists()


@linux_only
@pytest.mark.parametrize("load_sec", ["0", "60"], ids=["ready", "loading"])
def test_nothing_outlives_a_router_and_a_minder_that_are_killed_together(
    start: Start, vllm: Path, folder: Path, load_sec: str
) -> None:
    entry = {"engine": "vllm", "model_path": str(folder), "env": {"FAKE_VLLM_LOAD_SEC": load_sec}}
    router = start({"system": {"vllm_path": str(vllm), "preload_models": ["a"]}, "models": {"a": entry}})
    state = "loading" if load_sec == "60" else "ready"
    eventually(lambda: router.status("a")["status"] == state)
    eventually(lambda: "Resolved architecture" in router.http.get("/v1/logs/a").text)
    processes = tree(router, "a")
    psutil.Process(router.process.pid).suspend()  # or it would end the rest
    processes[0].kill()
    router.process.kill()
    router.process.wait()
    eventually(lambda: all(map(is_gone, processes)))


@linux_only
def test_the_next_router_ends_an_engine_of_which_only_a_nameless_process_is_left(
    start: Start, vllm: Path, folder: Path, tmp_path: Path
) -> None:
    """And removes its folder, of which its minder could not take care."""
    config = {
        "system": {"vllm_path": str(vllm), "preload_models": ["a"]},
        "models": {"a": {"engine": "vllm", "model_path": str(folder)}},
    }
    state = str(tmp_path / "state")
    router = start(config, LLAMA_ROUTER_STATE_DIR=state)
    eventually(lambda: router.status("a")["status"] == "ready")
    minder, server, engine = tree(router, "a")
    assert engine.environ() == {}
    temporary = folder_of(server)
    eventually(lambda: f'"pid":{minder.pid}' in Path(state, "engines.json").read_text().replace(" ", ""))
    psutil.Process(router.process.pid).suspend()
    minder.suspend()  # or it would end the rest
    server.kill()
    minder.kill()
    router.process.kill()
    router.process.wait()
    assert engine.is_running()
    assert temporary.exists()
    successor = start({}, LLAMA_ROUTER_STATE_DIR=state)
    assert is_gone(engine)
    assert not temporary.exists()
    assert f"pid {engine.pid} " in successor.log


@linux_only
def test_a_port_where_somebody_else_listens_is_given_up(
    start: Start, vllm: Path, folder: Path, tmp_path: Path
) -> None:
    """Both may bind it, and the one that listens first has it."""
    notes = tmp_path / "notes"
    env = {"FAKE_VLLM_LOAD_SEC": "1", "FAKE_VLLM_NOTES": str(notes)}
    entry = {"engine": "vllm", "model_path": str(folder), "env": env}
    router = start({"system": {"vllm_path": str(vllm), "preload_models": ["a"]}, "models": {"a": entry}})
    eventually(lambda: notes.exists() and notes.read_text().endswith("\n"))
    port = router.status("a")["port"]
    stranger = ThreadingHTTPServer(("127.0.0.1", port), Stranger)
    threading.Thread(target=stranger.serve_forever, daemon=True).start()
    try:
        eventually(lambda: router.status("a")["status"] == "ready")
        assert router.status("a")["port"] != port
        assert f"another program listens on its port, {port}" in router.log
    finally:
        stranger.shutdown()
        stranger.server_close()


class Stranger(BaseHTTPRequestHandler):
    """Answers everything with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_an_end_says_what_it_followed_from(start: Start, vllm: Path, folder: Path, tmp_path: Path) -> None:
    """The last error of a vLLM is never the one that matters."""
    said = tmp_path / "said"
    said.write_text("\n".join((*NO_ROOM, *GIVES_UP)))
    entry = {"engine": "vllm", "model_path": str(folder), "env": {"FAKE_VLLM_FAILS": str(said)}}
    system = {"vllm_path": str(vllm), "model_load_max_retries": 0}
    router = start({"system": system, "models": {"a": entry}})
    refused = router.chat("a")
    assert refused.status_code == 503
    message = refused.json()["error"]["message"]
    assert "ValueError: To serve at least one request with the model's max seq len (65536)" in message
    assert "its KV cache does not fit: set a smaller `context`" in message
    assert "initialization failed" not in message


# --- what is configured -----------------------------------------------------------------------------------


def test_what_is_wrong_with_an_entry_is_said(tmp_path: Path, folder: Path, vllm: Path) -> None:
    (tmp_path / "file.gguf").touch()
    (tmp_path / "empty").mkdir()
    entries: dict[str, dict[str, Any]] = {
        "ours": {
            "model_path": str(folder),
            "flags": ["--port", "80", "--api_key=k"],
            "env": {"VLLM_API_KEY": "k"},
        },
        "twice": {
            "model_path": str(folder),
            "context": 5,
            "slots": 2,
            "flags": ["--max-model-len=9", "--max-num-seqs", 3],
        },
        "nothing": {},
        "both": {"model_path": str(folder), "repo": "org/name"},
        "file": {"model_path": "file.gguf"},
        "empty": {"model_path": "empty"},
        "absent": {"repo": "org/absent"},
        "boxed": {"model_path": str(folder), "container": {"downloads": True, "network": "host"}},
        "boxed-absent": {"repo": "org/absent", "container": {}},
        "boxed-both": {"model_path": str(folder), "repo": "org/name", "container": {"downloads": True}},
    }
    config = {"models": {alias: {"engine": "vllm", **entry} for alias, entry in entries.items()}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = run("check", "--config", "config.json", cwd=tmp_path, VLLM_PATH=str(vllm)).stderr
    for expected in (
        "models.ours.flags[0]: --port cannot be set: the router chooses where engines listen",
        "models.ours.flags[2]: --api-key cannot be set: engines have a key of the router's",
        "models.ours.env.VLLM_API_KEY: cannot be set: the router sets it itself",
        "models.twice.context: is also set by --max-model-len in flags",
        "models.twice.slots: is also set by --max-num-seqs in flags",
        "models.nothing: needs either model_path (a folder) or repo",
        "models.both: needs either model_path (a folder) or repo",
        "name the folder with config.json and the safetensors files",
        "empty has no config.json",
        "models.absent.repo: org/absent is not in the Hugging Face cache: `llama-router pull org/absent`",
        "models.boxed.container.downloads: needs repo, the repository that is downloaded",
        "models.boxed.container.network: cannot be host: name a network",
        "models.boxed-absent.repo: org/absent is not in the Hugging Face cache: `llama-router pull org/absent`",
        "models.boxed-both: needs either model_path (a folder) or repo",
    ):
        assert expected in said


def test_a_repository_is_found_in_the_cache(tmp_path: Path, vllm: Path) -> None:
    repository = tmp_path / "hub/models--org--name"
    write_model(repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    (tmp_path / "config.json").write_text(json.dumps({"models": {"a": {"engine": "vllm", "repo": "org/name"}}}))
    checked = run(
        "check", "--config", "config.json", cwd=tmp_path, VLLM_PATH=str(vllm), HF_HUB_CACHE=str(tmp_path / "hub")
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    assert f"models.a.model_path = {repository}/snapshots/abc" in checked.stdout


def test_without_the_program_all_else_works(start: Start, folder: Path, tiny: Path) -> None:
    entry = {"engine": "vllm", "model_path": str(folder)}
    router = start({"models": {"a": entry, **models(tiny, "gguf")}})
    assert router.chat("gguf").status_code == 200
    refused = router.chat("a")
    assert refused.status_code == 503
    assert "pip install 'llama-router[vllm]'" in refused.json()["error"]["message"]


def test_the_build_is_told_by_the_package_beside_the_played_vllm(tmp_path: Path) -> None:
    cpu = find_program(str(played_vllm(tmp_path / "cpu")))
    assert (cpu.build, cpu.is_for_cpu, cpu.needs_gpu) == ("vllm 0.32.0+cpu", True, False)
    assert (cpu.is_since(0, 32), cpu.is_since(0, 33), cpu.is_since(1, 0)) == (True, False, False)
    cuda = find_program(str(played_vllm(tmp_path / "cuda", "0.33.1")))
    assert (cuda.build, cuda.is_for_cpu, cuda.needs_gpu) == ("vllm 0.33.1", False, True)
    rocm = find_program(str(played_vllm(tmp_path / "rocm", "0.33.1+rocm641")))
    assert (rocm.is_for_cpu, rocm.needs_gpu) == (False, False)
    with pytest.raises(Unusable, match="there is no program"):
        find_program(str(tmp_path / "none"))


def test_the_build_in_an_image_is_told_by_its_tag_and_its_devices() -> None:
    tagged = in_image(ContainerOfVllm(image="quay.io:5000/vllm/vllm-openai:v0.32.1-x86_64"))
    assert (tagged.is_since(0, 32), tagged.is_for_cpu, tagged.needs_gpu) == (True, False, False)
    latest = in_image(ContainerOfVllm(gpus=None))
    assert (latest.build, latest.version, latest.is_for_cpu) == ("vllm/vllm-openai:latest", "", True)
    amd = in_image(ContainerOfVllm(image="rocm/vllm", gpus=None, devices=("/dev/kfd", "/dev/dri")))
    assert not amd.is_for_cpu


def test_flags_are_understood_in_all_their_forms() -> None:
    flags = Flags(
        ["--max_model_len=32k", "-tp", "2", "--pipeline-parallel-size", "2", "--enforce-eager", "--a", "-1"]
    )
    assert (flags.size("max-model-len"), flags.devices, flags.text("a")) == (32000, 4, "-1")
    assert ("enforce-eager" in flags, flags.text("enforce-eager")) == (True, None)
    assert Flags(["--max-model-len", "1K"]).size("max-model-len") == 1024
    assert Flags(["--max-model-len", "auto"]).size("max-model-len") is None
    assert Flags(["--gpu-memory-utilization", "0.4"]).share("gpu-memory-utilization") == 0.4
    assert Flags([]).devices is None


@pytest.mark.parametrize(
    ("architecture", "flags", "route"),
    [
        ("LlamaForCausalLM", [], "/v1/chat/completions"),
        ("Qwen2VLForConditionalGeneration", [], "/v1/chat/completions"),
        ("GPT2LMHeadModel", [], "/v1/completions"),
        ("WhisperForConditionalGeneration", [], "/v1/audio/transcriptions"),
        ("BertModel", [], "/v1/embeddings"),
        ("Qwen3ForCausalLM", ["--runner", "pooling"], "/v1/embeddings"),
        ("LlamaForCausalLM", ["--task=embed"], "/v1/embeddings"),
        ("BertForSequenceClassification", [], "/v1/rerank"),
    ],
)
def test_its_routes_follow_from_its_architecture(architecture: str, flags: Sequence[str], route: str) -> None:
    routes = routes_of(architecture, Flags(flags))
    assert route in routes
    assert ("/v1/embeddings" in routes) + ("/v1/completions" in routes) + ("/v1/rerank" in routes) == 1


# --- memory -----------------------------------------------------------------------------------------------


def big_model(folder: Path) -> Path:
    """16 GiB of weights; 128 KiB of cache for a token."""
    config = {**LLAMA, "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "max_position_embeddings": 16384}
    return write_model(folder, config, {"weight": ("BF16", (8 << 20, 1024))})


def inspected(
    folder: Path, *gpus: Site, version: str = "0.32.0", flags: Sequence[str] = (), **model: Any
) -> Inspection:
    container: ContainerOfVllm | None = model.get("container")
    build = Program(Path("/bin/vllm"), "on PATH", *version.partition("+")[::2])
    if container is not None:
        build = in_image(container)
    host = Site(HOST, 64000, 64000, total_mib=80000)
    configured = VllmModel(alias="a", model_path=folder, flags=tuple(flags), slots=2, **model)
    files = hf_model.read(folder) if folder.exists() else None
    return VllmPlan(configured, files, build, Ground(gpus, host), Learned()).inspection()


def gpu(device: Device, mib: int) -> Site:
    return Site(device, int(0.95 * mib), int(0.95 * mib), total_mib=mib)


def test_the_share_of_a_gpu_holds_weights_cache_and_the_rest(tmp_path: Path) -> None:
    best = inspected(big_model(tmp_path), gpu(GPU0, 81920)).alternatives[0]
    needed = 16384 + 2 * 2048 + 2048  # MiB: weights, two requests of 16384 tokens, overhead
    assert best.flags == ("--max-num-seqs", "3", "--gpu-memory-utilization", "0.275")
    assert best.placement[GPU0] == round(0.275 * 81920) >= needed
    assert not best.remark


def test_a_model_is_divided_if_one_gpu_does_not_hold_it(tmp_path: Path) -> None:
    best = inspected(big_model(tmp_path), gpu(GPU0, 16384), gpu(GPU1, 16384)).alternatives[0]
    assert best.gpus == (GPU0, GPU1)
    share = best.flags[best.flags.index("--gpu-memory-utilization") + 1]
    assert best.flags[-2:] == ("--tensor-parallel-size", "2")
    assert best.placement[GPU0] == best.placement[GPU1] >= float(share) * 16384
    heads_of_seven = {**LLAMA, "num_attention_heads": 7, "num_key_value_heads": 7}
    odd = write_model(tmp_path / "odd", heads_of_seven, {"weight": ("BF16", (8 << 20, 1024))})
    found = inspected(odd, gpu(GPU0, 16384), gpu(GPU1, 16384))
    assert found.advice == "its weights alone are 16384 MiB"


def test_a_context_that_does_not_fit_is_shortened_unless_it_was_given(tmp_path: Path) -> None:
    folder = big_model(tmp_path)
    best = inspected(folder, gpu(GPU0, 20600)).alternatives[0]
    assert best.remark == "context 8192 of 16384"
    assert best.flags[:2] == ("--max-model-len", "8192")
    given = inspected(folder, gpu(GPU0, 20600), context=16384)
    assert given.advice.startswith("it would fit with a context of ")


def test_what_the_flags_say_of_memory_stays(tmp_path: Path) -> None:
    folder = big_model(tmp_path)
    own = ["--gpu-memory-utilization", "0.9", "--max-num-seqs", "7", "--max-model-len", "4096"]
    best = inspected(folder, gpu(GPU0, 81920), flags=own).alternatives[0]
    assert (best.flags, best.placement[GPU0]) == ((), round(0.9 * 81920))
    both = [gpu(GPU0, 81920), gpu(GPU1, 81920)]
    assert inspected(folder, *both, flags=["-tp", "2"]).alternatives[0].gpus == (GPU0, GPU1)


def test_builds_for_the_cpu_use_no_gpu_and_others_need_one(tmp_path: Path) -> None:
    folder = big_model(tmp_path)
    best = inspected(folder, gpu(GPU0, 81920), version="0.32.0+cpu").alternatives[0]
    assert best.gpus == ()
    assert best.flags[-2:] == ("--kv-cache-memory-bytes", str(2 * 16384 * 131072))
    work = 2048 * 24 * 4096 * 2 >> 20  # tokens of a batch, and what it computes for each of the numbers of a token
    assert best.placement == {HOST: 16384 + 4096 + 1500 + work}
    own = inspected(folder, version="0.32.0+cpu", env={"VLLM_CPU_KVCACHE_SPACE": "3"}).alternatives[0]
    assert "--kv-cache-memory-bytes" not in own.flags
    assert own.placement == {HOST: 16384 + 3072 + 1500 + work}
    short = inspected(folder, version="0.32.0+cpu", flags=["--max-num-batched-tokens", "512"]).alternatives[0]
    assert short.placement == {HOST: 16384 + 4096 + 1500 + work // 4}
    with pytest.raises(Unusable, match="is built for GPUs"):
        inspected(folder)


def test_a_container_is_planned_for_the_gpus_that_it_is_given(tmp_path: Path) -> None:
    folder, one = big_model(tmp_path), gpu(GPU0, 81920)
    seen = inspected(folder, one, container=ContainerOfVllm()).alternatives[0]
    by_processes = inspected(folder, one).alternatives[0]
    assert (seen.flags, seen.placement) == (by_processes.flags, by_processes.placement)
    none = inspected(folder, one, container=ContainerOfVllm(gpus=None), env={"VLLM_CPU_KVCACHE_SPACE": "3"})
    assert none.alternatives[0].placement == {HOST: 16384 + 3072 + 1500 + 384}
    unseen = inspected(folder, container=ContainerOfVllm()).alternatives[0]
    assert (unseen.flags, unseen.placement) == (("--max-num-seqs", "3"), {HOST: 3000})


def test_nothing_is_known_of_a_model_that_is_still_to_be_downloaded(tmp_path: Path) -> None:
    """So it is given all of a GPU, as by vLLM itself."""
    absent, container = tmp_path / "models--org--name", ContainerOfVllm(downloads=True)
    best = inspected(absent, gpu(GPU0, 10000), container=container, repo="org/name").alternatives[0]
    assert best.flags == ("--max-num-seqs", "3", "--gpu-memory-utilization", "0.9")
    assert best.placement == {GPU0: 9000, HOST: 3000}
    own = inspected(absent, gpu(GPU0, 10000), container=container, flags=["--gpu-memory-utilization", "0.4"])
    assert own.alternatives[0].placement == {GPU0: 4000, HOST: 3000}
    full = Site(GPU0, 8000, 8000, total_mib=10000)
    assert inspected(absent, full, container=container).advice == "lower --gpu-memory-utilization in its flags"


def test_one_that_sleeps_keeps_its_weights_in_ram_and_a_rest_on_each_gpu(tmp_path: Path) -> None:
    folder = big_model(tmp_path)
    best = inspected(folder, gpu(GPU0, 81920), sleep=True).alternatives[0]
    assert best.flags[-1] == "--enable-sleep-mode"
    assert best.asleep == {GPU0: 1024, HOST: 3000 + 1.5 * 16384}
    on_two = inspected(folder, gpu(GPU0, 16384), gpu(GPU1, 16384), sleep=True).alternatives[0]
    assert on_two.asleep == {GPU0: 1024, GPU1: 1024, HOST: 3000 + 1.5 * 16384}
    on_the_cpu = inspected(folder, version="0.32.0+cpu", sleep=True).alternatives[0]
    assert on_the_cpu.asleep is None
    assert "--enable-sleep-mode" not in on_the_cpu.flags


def test_layers_with_a_window_take_as_much_as_vllm_demands(tmp_path: Path) -> None:
    """vLLM 0.32 counted 20.84 MB for this model, and starts with no less."""
    config = {"model_type": "gemma3_text", "num_hidden_layers": 18, "num_attention_heads": 4, "head_dim": 256}
    config |= {"num_key_value_heads": 1, "sliding_window": 512, "max_position_embeddings": 131072}
    folder = write_model(tmp_path, config, {"weight": ("BF16", (8 << 20, 16))})
    best = inspected(folder, version="0.32.0+cpu", context=1024).alternatives[0]
    assert 2 * 20.84e6 <= int(best.flags[-1]) <= 2 * 22e6
    long = inspected(folder, version="0.32.0+cpu").alternatives[0]
    full, sliding = 3 * (131072 + 128), 15 * (512 + 8192 + 128)
    assert int(long.flags[-1]) == 2 * 1024 * (full + sliding)


def test_a_model_of_32_bits_computes_with_16(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {**LLAMA, "torch_dtype": "float32"}, {"weight": ("F32", (8 << 20, 128))})
    host = {HOST: 4096 // 2 + 1500 + 1 + 6}
    assert inspected(folder, version="0.32.0+cpu").alternatives[0].placement == host
    as_stored = inspected(folder, version="0.32.0+cpu", flags=["--dtype", "float32"]).alternatives[0]
    assert as_stored.placement == {HOST: 4096 + 1500 + 2 + 12}


# --- what it says -----------------------------------------------------------------------------------------

NO_ROOM = (
    "(EngineCore pid=5017) ERROR 11-28 17:10:57 [core.py:1510]     raise ValueError(",
    "(EngineCore pid=5017) ERROR 11-28 17:10:57 [core.py:1510] ValueError: To serve at least one request with the "
    "model's max seq len (65536), (0.03 GiB KV cache is needed, which is larger than the available KV cache "
    "memory (0.0 GiB). Based on the available memory, the estimated maximum model length is 1792.",
    "Traceback (most recent call last):",
)
GIVES_UP = (
    "    raise RuntimeError(",
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
)


WORKER_DIED = (
    "(EngineCore pid=8188) ERROR 11-28 21:00:11 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
    "unexpectedly (exit code: None), shutting down executor.",
    '(EngineCore pid=8188) ERROR 11-28 21:00:11 [core.py:1512]     raise RuntimeError("cancelled")',
    "(EngineCore pid=8188) ERROR 11-28 21:00:11 [core.py:1512] RuntimeError: cancelled",
)
CORE_DIED = (
    "(APIServer pid=5740) WARNING 11-28 21:31:33 [core_client.py:817] [shutdown] MPClient: engine core exited "
    "unexpectedly; starting cleanup",
    "(APIServer pid=5740) ERROR 11-28 21:31:33 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: "
    "EngineCore encountered an issue. See stack trace (above) for the root cause.",
)


@pytest.mark.parametrize(
    ("said", "cause", "lack", "retry"),
    [
        (
            NO_ROOM + GIVES_UP,
            "ValueError: To serve at least one request",
            "its KV cache does not fit",
            Retry.LATER,
        ),
        (GIVES_UP, "RuntimeError: Engine core initialization failed", None, Retry.LATER),
        (("vllm: error: unrecognized arguments: --foo 3",), "unrecognized arguments: --foo 3", None, Retry.LATER),
        (
            (
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "  Value error, User-specified max_model_len (1000000) is greater than the derived max_model_len",
            ),
            "User-specified max_model_len (1000000) is greater",
            None,
            Retry.NEVER,
        ),
        (
            ("(Worker_TP0 pid=9) ERROR 11-28 17:10:57 [a.py:1] torch.OutOfMemoryError: CUDA out of memory. ",),
            "OutOfMemoryError: CUDA out of memory",
            "a GPU is out of memory",
            Retry.LATER,
        ),
        (
            ("ValueError: Sleep mode is not supported on current platform.",),
            "ValueError: Sleep mode is not supported",
            None,
            Retry.NEVER,
        ),
        (WORKER_DIED, "proc VllmWorker-0 died unexpectedly (exit code: None)", None, Retry.LATER),
        (CORE_DIED, "engine core exited unexpectedly", None, Retry.LATER),
        (NO_ROOM + CORE_DIED, "ValueError: To serve at least", "its KV cache does not fit", Retry.LATER),
        (("OSError: [Errno 98] Address already in use",), "OSError: [Errno 98]", None, Retry.AT_ONCE),
        (("INFO 11-28 17:10:57 [a.py:1] all is well",), "", None, Retry.LATER),
    ],
    ids=[
        *("no room", "gives up", "usage", "too long", "out of memory", "sleep", "worker", "core", "room and core"),
        *("port", "nothing"),
    ],
)
def test_its_log_tells_the_cause(said: Sequence[str], cause: str, lack: str | None, retry: Retry) -> None:
    assert log.cause(said).startswith(cause)
    found = log.lack_of_memory(said)
    assert (found or "").startswith(lack or "")
    assert (found is None) == (lack is None)
    assert VllmServer.retry_after(1, said) is retry
    assert VllmServer.retry_after(2, said) is (retry if retry is Retry.AT_ONCE else Retry.NEVER)


def test_errors_of_requests_are_not_why_it_ended() -> None:
    request = ("(APIServer pid=7) ERROR 11-28 21:38:40 [a.py:1] ValueError: m is not a multimodal model",)
    assert log.cause(request) != "", "while it loads, they are"
    assert log.cause(log.without_requests(request)) == ""
    assert log.cause(log.without_requests(request + CORE_DIED)) == "engine core exited unexpectedly"
    assert log.cause(log.without_requests(request + CORE_DIED[1:])).startswith("vllm.v1.engine.exceptions.Eng")
    assert log.cause(log.without_requests(request + NO_ROOM)).startswith("ValueError: To serve at least")


def test_a_killed_process_is_found_by_what_the_others_say() -> None:
    """They end with 0 and 1, as if nobody was killed, be it by the kernel for want of memory."""
    assert log.has_lost_a_process(WORKER_DIED)
    assert log.has_lost_a_process(CORE_DIED)
    assert log.has_lost_a_process([f"{GIVES_UP[1][:-2]}{{'EngineCore': -9}}"])
    assert not log.has_lost_a_process(NO_ROOM + GIVES_UP)


def test_a_cause_is_no_list_of_all_that_vllm_has() -> None:
    said = "  Value error, Model architectures ['OldGPT'] are not supported for now. Supported architectures: "
    said += "dict_keys(['AfmoeForCausalLM', 'ApertusForCausalLM']) [type=value_error, input_value=ArgsKwargs(())]"
    assert log.cause([said]) == "Model architectures ['OldGPT'] are not supported for now."
    assert VllmServer.retry_after(1, [said]) is Retry.NEVER


def test_an_answer_tells_the_end_by_its_form_and_not_by_its_text() -> None:
    assert tells_end(
        200, b'data: {"choices":[{"delta":{"content":""},"finish_reason":"abort"}]}\n\ndata: [DONE]\n\n'
    )
    assert tells_end(200, b'{"choices": [{"finish_reason": "abort"}]}')
    assert tells_end(500, b'{"error":{"message":"EngineCore encountered an issue. See stack trace","code":500}}')
    assert not tells_end(
        200, json.dumps({"content": '"finish_reason":"abort" EngineCore encountered an issue'}).encode()
    )
    assert not tells_end(400, b'{"error":{"message":"The model does not exist"}}')
