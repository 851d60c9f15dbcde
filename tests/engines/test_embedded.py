"""The embedded engine as the router runs it: real processes, tiny models, and every way for them to end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_models import write_embedding, write_llama

from router.engines.llamacpp import embedded, embedded_flags
from router.engines.llamacpp.flags import FORMS, Flags

KEY = "key-of-this-engine"
STATE = "cmd_child_to_router:state:"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def hanging_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes for ever to open: nobody writes to the pipe."""
    path = tmp_path_factory.mktemp("models") / "hanging.gguf"
    os.mkfifo(path)
    return path


@dataclass(frozen=True)
class Engine:
    process: subprocess.Popen[str]
    port: int

    def states(self) -> Iterator[dict[str, Any]]:
        """What it tells the router, until it has no more to say."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            assert line.startswith(STATE)
            yield json.loads(line.removeprefix(STATE))

    def ready(self) -> dict[str, Any]:
        """Returns when it is ready, and its interpreter waits for what comes: nobody need watch for it now."""
        for state in self.states():
            if state["state"] == "ready":
                for watcher in psutil.Process(self.process.pid).children():
                    watcher.wait(timeout=10)
                return dict(state["payload"])
        raise AssertionError(self.errors())

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def request(self, path: str, body: object = None, key: str = KEY) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        headers = {"Authorization": f"Bearer {key}"}
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
        return connection.getresponse()

    def ask(self, path: str, body: object = None) -> Any:
        response = self.request(path, body)
        answer = json.load(response)
        assert response.status == 200, answer
        return answer

    def seconds_until_gone(self) -> float:
        started = time.monotonic()
        self.process.wait(timeout=10)
        return time.monotonic() - started


@contextmanager
def engine(*flags: str | Path, child: bool = True, **environ: str) -> Iterator[Engine]:
    """An engine on a free port; `child` as the router starts it, otherwise as a user does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    process = subprocess.Popen(
        [*embedded.command(), "--port", str(port), "--threads", "1", *map(str, flags)],
        env=clean | {"LLAMA_API_KEY": KEY} | ({"LLAMA_SERVER_ROUTER_PORT": "1"} if child else {}) | environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Engine(process, port)
        finally:
            process.kill()


# --- serving -------------------------------------------------------------------------------------------------


def test_it_says_when_it_is_ready_and_then_answers(model: Path) -> None:
    with engine("-m", model, "--alias", "tiny") as tiny:
        states = tiny.states()
        assert next(states)["state"] == "loading"
        ready = next(state for state in states if state["state"] == "ready")
        assert ready["payload"]["id"] == "tiny"
        message = {"role": "user", "content": "Hello"}
        answer = tiny.ask("/v1/chat/completions", {"messages": [message], "max_tokens": 3, "ignore_eos": True})
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["model"] == "tiny"


def test_only_its_key_opens_it(model: Path) -> None:
    with engine("-m", model) as tiny:
        tiny.ready()
        assert tiny.request("/v1/models").status == 200
        assert tiny.request("/v1/models", key="another").status == 401


def test_without_flags_it_is_a_llama_server_without_flags(model: Path) -> None:
    with engine("-m", model) as tiny:
        tiny.ready()
        props = tiny.ask("/props")
        assert props["total_slots"] == 4
        assert props["default_generation_settings"]["n_ctx"] == 2048
        assert props["default_generation_settings"]["params"]["temperature"] == pytest.approx(0.8)
        assert tiny.request("/metrics").status == 501


def test_flags_and_variables_reach_the_engine(model: Path) -> None:
    flags = ("-c", "512", "--no-kv-unified", "--temp=0.25", "--metrics")
    with engine("-m", model, *flags, LLAMA_ARG_N_PARALLEL="2", LLAMA_ARG_CTX_SIZE="4096") as tiny:
        tiny.ready()
        props = tiny.ask("/props")
        assert props["total_slots"] == 2
        assert props["default_generation_settings"]["n_ctx"] == 256
        assert props["default_generation_settings"]["params"]["temperature"] == 0.25
        assert tiny.request("/metrics").status == 200


def test_it_embeds(tmp_path: Path) -> None:
    with engine("-m", write_embedding(tmp_path / "embed.gguf"), "--embedding") as tiny:
        tiny.ready()
        [item] = tiny.ask("/v1/embeddings", {"input": "Hello"})["data"]
        assert len(item["embedding"]) == 64


# --- ending --------------------------------------------------------------------------------------------------


def test_the_router_can_tell_it_to_exit(model: Path) -> None:
    with engine("-m", model) as tiny:
        tiny.ready()
        assert tiny.process.stdin is not None
        tiny.process.stdin.write("cmd_router_to_child:exit\n")
        tiny.process.stdin.flush()
        assert tiny.seconds_until_gone() < 1
        assert tiny.process.returncode == 0


def test_it_does_not_outlive_the_router(model: Path) -> None:
    """Also where no signal tells it: on macOS, or behind a shell that the signal has ended."""
    with engine("-m", model) as tiny:
        tiny.ready()
        for pipe in (tiny.process.stdout, tiny.process.stderr, tiny.process.stdin):  # nobody reads a last word
            assert pipe is not None
            pipe.close()
        assert tiny.seconds_until_gone() < 1
        assert tiny.process.returncode == 1


def test_it_does_not_outlive_the_router_even_if_the_model_never_loads(hanging_model: Path) -> None:
    with engine("-m", hanging_model) as tiny:
        assert next(tiny.states())["state"] == "loading"
        assert tiny.process.stdin is not None
        tiny.process.stdin.close()
        assert tiny.seconds_until_gone() < 1
        assert list(tiny.states()) == []  # the end of stdout: nobody is left to write to it


def test_sigterm_ends_it_in_the_middle_of_a_load(hanging_model: Path) -> None:
    with engine("-m", hanging_model) as tiny:
        assert next(tiny.states())["state"] == "loading"
        tiny.process.terminate()
        assert tiny.seconds_until_gone() < 1
        assert list(tiny.states()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_the_middle_of_a_stream(model: Path, number: signal.Signals) -> None:
    with engine("-m", model, "--ignore-eos") as tiny:
        tiny.ready()
        stream = tiny.request("/v1/completions", {"prompt": "Hello", "max_tokens": 2000, "stream": True})
        assert stream.readline().startswith(b"data:")
        tiny.process.send_signal(number)
        assert tiny.seconds_until_gone() < 1
        assert tiny.process.returncode == 0


def test_alone_it_serves_until_interrupted(model: Path) -> None:
    """Nobody started it as a child: no protocol, and the end of stdin means nothing."""
    with engine("-m", model, child=False) as tiny:
        assert tiny.process.stdin is not None
        assert tiny.process.stderr is not None
        tiny.process.stdin.close()
        assert any("until it is interrupted" in line for line in tiny.process.stderr)
        assert tiny.ask("/health") == {"status": "ok"}
        tiny.process.send_signal(signal.SIGINT)
        assert tiny.seconds_until_gone() < 1
        assert (tiny.process.returncode, list(tiny.states())) == (0, [])


# --- refusing ------------------------------------------------------------------------------------------------


def refusal(*flags: str | Path, **environ: str) -> tuple[int, str]:
    with engine(*flags, **environ) as tiny:
        tiny.process.wait(timeout=10)
        return tiny.process.returncode, tiny.errors()


def test_it_names_every_flag_that_it_can_not_honour(model: Path) -> None:
    code, errors = refusal("-m", model, "--override-kv", "a=int:1", "--quantum", "on", "-hf", "a/b", "-c", "512")
    assert code == 2
    assert "can't honor --override-kv, --quantum, -hf;" in errors
    assert "-c" not in errors.split(";")[0]


def test_it_names_every_value_that_is_wrong(model: Path) -> None:
    code, errors = refusal("-m", model, "-c", "many", "-fa", "perhaps", "--slot-save-path", "/nowhere")
    assert code == 2
    for complaint in ("-c takes a whole number", "-fa takes one of on", "--slot-save-path takes a folder"):
        assert complaint in errors


def test_a_variable_is_refused_by_its_name(model: Path) -> None:
    code, errors = refusal("-m", model, LLAMA_ARG_RPC="host:1")
    assert (code, "can't honor LLAMA_ARG_RPC" in errors) == (2, True)


def test_it_needs_a_model() -> None:
    assert refusal() == (2, "router.embedded: error: invalid argument: -m FILE is missing\n")


def test_flags_for_the_looks_of_the_log_are_passed_over(model: Path) -> None:
    with engine("-m", model, "--log-colors", "off", "--no-log-prefix") as tiny:
        tiny.ready()
        tiny.process.terminate()
        assert "passes over --log-colors, --no-log-prefix" in tiny.errors()


@pytest.mark.parametrize("keep_bytes", [0, 100, 100_000])
def test_a_broken_file_is_a_failure_with_a_reason(model: Path, tmp_path: Path, keep_bytes: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:keep_bytes])
    code, errors = refusal("-m", broken)
    assert code == 1
    assert "error loading model" in errors
    assert f"can't serve {broken}" in errors


def test_a_port_in_use_is_a_failure_with_a_reason(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, errors = refusal("-m", model, "--port", port)
    assert code == 1
    assert f"couldn't bind HTTP server socket, hostname: 127.0.0.1, port: {port}" in errors


def test_the_current_directory_can_not_stand_in_for_a_module(tmp_path: Path) -> None:
    for name in ("select", "json", "xllamacpp"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')")
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    version = subprocess.run(
        [*embedded.command(), "--version"], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=10
    )
    assert version.stdout == f"xllamacpp {embedded.available()}\n"


# --- flags and parameters ------------------------------------------------------------------------------------


def sampling_bits(params: Any) -> int:
    return int(params.sampling.user_sampling_config)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"n_parallel": -1, "port": 8080, "default_template_kwargs": {"preserve_reasoning": "true"}}),
        (["-c", "0"], {"n_ctx": 0, "fit_params_min_ctx": -1}),
        (["-ngl", "all"], {"n_gpu_layers": -2}),
        (["--no-mmap"], {"load_mode.name": "LLAMA_LOAD_MODE_NONE"}),
        (["--mlock"], {"load_mode.name": "LLAMA_LOAD_MODE_MMAP_MLOCK"}),
        (["--mlock", "--no-mmap"], {"load_mode.name": "LLAMA_LOAD_MODE_MLOCK"}),
        (["--no-mmap", "--mlock"], {"load_mode.name": "LLAMA_LOAD_MODE_MLOCK"}),
        (["-dio"], {"load_mode.name": "LLAMA_LOAD_MODE_DIRECT_IO"}),
        (["-fa", "off", "-ctk", "q8_0"], {"flash_attn_type": 0, "cache_type_k.name": "GGML_TYPE_Q8_0"}),
        (["--rope-scale", "4"], {"rope_freq_scale": 0.25}),
        (["--no-repack", "-nkvo"], {"no_extra_bufts": True, "no_kv_offload": True}),
        (["-s", "-1"], {"sampling.seed": 2**32 - 1}),
        (["--temp", "-1"], {"sampling.temp": 0}),
        (["--repeat-last-n", "128"], {"sampling.penalty_last_n": 128, "sampling.n_prev": 128}),
        (["--sampler-seq", "kt"], {"sampling.samplers": "top_k;temperature"}),
        (["--reasoning", "off"], {"enable_reasoning": 0}),
        (["--api-key", 'a,"b,c"'], {"api_keys": ["a", "b,c"]}),
        (["-a", "one, two", "-a", "three"], {"model_alias": {"one", "two", "three"}}),
        (["--rerank"], {"embedding": True, "pooling_type.name": "LLAMA_POOLING_TYPE_RANK"}),
        (["-ot", "x=CPU", "-ot", "y=CPU"], {"tensor_buft_overrides": "x=CPU,y=CPU"}),
        (["-ncffn", "1"], {"tensor_buft_overrides": r"blk\.0\.ffn_(up|down|gate)\.=CPU"}),
        (["--timeout", "7"], {"timeout_read": 7, "timeout_write": 7}),
        (["-r", "a\\nb", "-r", "\\x41\\\\"], {"antiprompt": ["a\nb", "A\\"]}),
        (["-r", "a\\nb", "--no-escape"], {"antiprompt": ["a\\nb"]}),
    ],
)  # fmt: skip
def test_what_flags_say_is_what_the_engine_is_told(flags: list[str], expected: Mapping[str, object]) -> None:
    params = embedded_flags.parameters(Flags(["-m", "x.gguf", *flags]))
    for path, value in expected.items():
        found = params
        for attribute in path.split("."):
            found = getattr(found, attribute)
        assert found == value, path


def test_flags_with_many_values() -> None:
    params = embedded_flags.parameters(
        Flags(
            [
                "-m",
                "x",
                "-ts",
                "3,1",
                "-fitt",
                "512",
                "--lora-scaled",
                "a.gguf:0.5,b.gguf:2",
                "-C",
                "5",
                "-Cr",
                "8-9",
            ]
        )
    )
    assert params.tensor_split[:3] == [3, 1, 0]
    assert set(params.fit_params_target) == {512 * 2**20}
    assert [(lora.path, lora.scale) for lora in params.lora_adapters] == [("a.gguf", 0.5), ("b.gguf", 2)]
    assert [cpu for cpu, used in enumerate(params.cpuparams.cpumask) if used] == [0, 2, 8, 9]


def test_a_chosen_sampler_setting_is_not_the_models_to_change() -> None:
    assert sampling_bits(embedded_flags.parameters(Flags(["-m", "x"]))) == 0
    two = Flags(["-m", "x", "--temp", "0.8", "--top-k", "40"])
    assert sampling_bits(embedded_flags.parameters(two)).bit_count() == 2


SAMPLES = {
    "cpu-range": "0-1", "cpu-range-batch": "0-1", "spec-draft-cpu-range": "0-1", "numa": "isolate",
    "flash-attn": "auto", "cache-type-k": "bf16", "cache-type-v": "f32", "spec-draft-type-k": "q8_0",
    "spec-draft-type-v": "q4_0", "rope-scaling": "yarn", "load-mode": "mmap+mlock", "lazy-mode": "on",
    "override-tensor": "x=CPU", "spec-draft-override-tensor": "x=CPU", "split-mode": "row", "fit": "off",
    "lora-scaled": "x:0.5", "mmproj-device": "none", "spec-draft-device": "none", "samplers": "top_k",
    "sampler-seq": "k", "media-path": "/", "slot-save-path": "/", "grammar": 'root ::= "a"',
    "json-schema": "{}", "chat-template-kwargs": '{"a": null}', "reasoning-format": "deepseek-legacy",
    "reasoning": "auto", "reasoning-effort": "default", "pooling": "cls", "spec-type": "ngram-mod,draft-mtp",
    "spec-draft-sampling": "greedy", "log-prompts-dir": "/",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(embedded_flags.SUPPORTED))
def test_every_flag_that_is_honoured_can_be_set(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    form = FORMS[name]
    sample = SAMPLES.get(name, str(tmp_path / "file") if name.endswith("-file") else "1")
    embedded_flags.parameters(Flags(["-m", "x", form.spellings[0], *[sample] * form.arity]))
    for negation in form.negations:
        embedded_flags.parameters(Flags(["-m", "x", negation]))


def test_what_is_neither_honoured_nor_passed_over_is_refused() -> None:
    for form in FORMS.values():
        if form.name not in embedded_flags.SUPPORTED and form.name not in embedded_flags.PASSED_OVER:
            with pytest.raises(embedded_flags.UsageError, match=f"can't honor {form.spellings[0]};"):
                embedded_flags.parameters(Flags(["-m", "x", form.spellings[0], *["1"] * form.arity]))
