"""Stories about the configuration: sources of values, rejected values and their messages, engine flags."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import write_llama, write_projector

from router.catalog.load import Loaded, load
from router.config import llama_swap, sources
from router.config import schema as config
from router.config.file import read_file
from router.config.problems import ConfigError
from router.config.resolved import Config, ModelConfig
from router.config.show import leaves, render
from router.engines.command.entry import CommandModel
from router.engines.llamacpp import flags
from router.engines.llamacpp.model import LlamaCppModel
from router.engines.registry import KINDS
from router.store import discovery as hub

PROJECT = Path(__file__).parents[2]
EXAMPLES = [*sorted((PROJECT / "config").glob("*.yaml")), PROJECT / "config.example.json"]


def loaded(folder: Path, content: Any = None, *, check_files: bool = False, **sources: Any) -> Loaded:
    """`content` as config.json in `folder` (text as config.yaml), loaded from there."""
    if isinstance(content, str):
        (folder / "config.yaml").write_text(content)
    elif content is not None:
        (folder / "config.json").write_text(json.dumps(content))
    return load(**{"environ": {}, "cwd": folder, "check_files": check_files, **sources})


def problems(folder: Path, content: Any = None, **sources: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, content, **sources)
    return str(caught.value).splitlines()


def model(folder: Path, entry: Mapping[str, Any], system: Mapping[str, Any] | None = None) -> ModelConfig:
    content = {"system": system or {}, "models": {"m": {"model_path": "m.gguf", **entry}}}
    return loaded(folder, content).config.models["m"]


@pytest.fixture(autouse=True)
def files_need_not_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are whole when they are looked at; `test_watch.py` has some that are not."""
    monkeypatch.setattr(hub, "SETTLE_SEC", 0.0)


# --- the defaults ---------------------------------------------------------------------------------------------


def test_without_any_file_every_default_holds(tmp_path: Path) -> None:
    result = loaded(tmp_path)
    assert result.source is None
    assert result.warnings == ()
    assert set(result.origins.values()) == {"default"}
    assert result.config == replace(
        Config(), system=Config().system.model_copy(update={"base_models_path": str(tmp_path)})
    )


def test_the_names_and_defaults_of_earlier_routers_are_kept() -> None:
    seed = {
        "llama_server_path": None,
        "base_models_path": "",
        "max_concurrent_models": 3,
        "preload_models": (),
        "preload_delay_sec": 5,
        "enable_idle_timeout": True,
        "idle_timeout_sec": 300,
        "request_timeout_sec": 120,
        "gpu_devices": None,
        "default_parallel": 1,
        "max_queue_size_per_model": 500,
        "queue_timeout_sec": 300,
        "vram_multiplier": 1.1,
        "min_vram_required": 500,
        "keep_warm_models": 2,
        "timeout_warmup_sec": None,  # a big model may take its time: only standing still is a failure
        "wait_ready_sec": None,
        "http_max_keepalive": 100,
        "http_max_connections": 200,
        "model_load_max_retries": 2,
    }
    system = Config().system.model_dump()
    assert {key: system[key] for key in seed} == seed
    assert Config().api.port == 8000
    assert "http://localhost:*" in Config().api.cors_origins


def test_it_listens_on_this_machine_only_unless_told_otherwise(tmp_path: Path) -> None:
    assert loaded(tmp_path).config.api.host == "127.0.0.1"


# --- where values come from -----------------------------------------------------------------------------------


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    content = {"system": {"base_models_path": "from-file", "base_port": 9000, "keep_warm_models": 7}}
    result = loaded(
        tmp_path,
        content,
        environ={"BASE_MODELS_PATH": "/from/env", "LLAMA_ROUTER__SYSTEM__BASE_PORT": "9001"},
        overrides={"system.base_port": ("--base-port", 9002)},
    )
    system = result.config.system
    assert (system.base_models_path, system.base_port, system.keep_warm_models) == ("/from/env", 9002, 7)
    assert result.origins["system.base_models_path"] == "env BASE_MODELS_PATH"
    assert result.origins["system.base_port"] == "--base-port"
    assert result.origins["system.keep_warm_models"] == "config.json"
    assert result.origins["system.log_ring_lines"] == "default"


def test_an_override_may_bring_a_whole_model(tmp_path: Path) -> None:
    overrides = {"models.demo:v1.5": ("demo", {"model_path": "/opt/demo.gguf", "pinned": True})}
    result = loaded(tmp_path, overrides=overrides)
    assert result.config.models["demo:v1.5"].model_path == Path("/opt/demo.gguf")
    assert result.origins["models.demo:v1.5.pinned"] == "demo"


def test_the_file_is_the_named_one_else_config_path_else_the_one_at_hand(tmp_path: Path) -> None:
    for name in ("named.json", "by-variable.json", "config.json"):
        (tmp_path / name).write_text("{}")
    environ = {"CONFIG_PATH": "by-variable.json"}
    assert loaded(tmp_path).source == tmp_path / "config.json"
    assert loaded(tmp_path, environ=environ).source == tmp_path / "by-variable.json"
    assert loaded(tmp_path, environ=environ, path=Path("named.json")).source == tmp_path / "named.json"


def test_of_two_files_at_hand_one_is_used_and_said_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("api: {port: 1}")
    result = loaded(tmp_path)
    assert result.source == tmp_path / "config.json"
    assert result.warnings == ("config.json is used, config.yaml ignored",)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'),
        ("config.json", '{"architectures": ["LlamaForCausalLM"],}'),
        ("config.yaml", "homeassistant: !include home.yaml\n"),
        ("config.yaml", "- one\n- two\n"),
    ],
)
def test_another_programs_file_with_a_common_name_is_not_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    result = loaded(tmp_path)
    assert (result.source, len(result.warnings)) == (None, 1)
    assert result.warnings[0].startswith(f"{name} has none of the keys api, system, ")
    with pytest.raises(ConfigError):
        loaded(tmp_path, path=Path(name))


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "llama-router.json"])
def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_text('{"api": {"port": 2}}')
    read: list[Path] = []

    def noted(path: Path, name: str) -> dict[str, Any]:
        read.append(path)
        return read_file(path, name)

    monkeypatch.setattr(sources, "read_file", noted)
    assert loaded(tmp_path).config.api.port == 2
    assert read == [tmp_path / name]


@pytest.mark.parametrize("text", ['{"models": {"a": }', "models:\n\ta: 1\n"])
def test_a_broken_file_that_speaks_of_models_is_an_error(tmp_path: Path, text: str) -> None:
    name = "config.json" if text.startswith("{") else "config.yaml"
    (tmp_path / name).write_text(text)
    assert problems(tmp_path)[0].startswith(f"{name}:")


@pytest.mark.parametrize("name", ["llama-router.yaml", "llama-router.yml", "llama-router.json"])
def test_a_file_with_our_own_name_comes_first(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"api": {"port": 1}}')
    result = loaded(tmp_path, {"api": {"port": 2}})
    assert (result.source, result.config.api.port) == (tmp_path / name, 1)
    assert result.warnings == (f"{name} is used, config.json ignored",)


def test_the_other_spelling_of_an_earlier_router_is_named(tmp_path: Path) -> None:
    (tmp_path / "konfig.json").write_text('{"api": {"port": 2}}')
    result = loaded(tmp_path)
    assert (result.source, result.config.api.port) == (None, 8000)
    assert result.warnings == (
        "konfig.json is not read: rename it to config.json, or pass it with --config or CONFIG_PATH",
    )


def test_a_dotenv_file_sets_what_the_environment_does_not(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "# keys\nexport API_KEY='from dotenv' # ours\nDEBUG=true\nLLAMA_SERVER_PATH=\"llama\"\nnonsense\n"
    )
    result = loaded(tmp_path, environ={"API_KEY": "from-env"})
    assert [key.get_secret_value() for key in result.config.api.api_keys] == ["from-env"]
    assert result.config.system.debug is True
    assert result.config.system.llama_server_path == "llama"
    assert result.origins["system.debug"] == ".env DEBUG"
    assert result.warnings == (".env:5: is not NAME=VALUE; ignored",)


def test_a_variable_that_is_set_to_nothing_does_not_hide_the_key_in_a_dotenv_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("API_KEY=from-dotenv\n")
    (key,) = loaded(tmp_path, environ={"API_KEY": ""}).config.api.api_keys
    assert key.get_secret_value() == "from-dotenv"


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("", None),
        (" # nothing", None),
        ("#1 # the first", "#1"),
        ("a#1", "a#1"),
        ("'a # b'", "a # b"),
        ("'old' # not 'new'", "old"),
        ('"new" # was "old"', "new"),
    ],
)
def test_a_comment_in_a_dotenv_file_is_no_value(tmp_path: Path, written: str, path: str | None) -> None:
    (tmp_path / ".env").write_text(f"LLAMA_SERVER_PATH={written}\n")
    result = loaded(tmp_path)
    assert (result.config.system.llama_server_path, result.warnings) == (path, ())


def test_a_dotenv_file_that_cannot_be_read_does_not_open_the_router_to_everybody(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"API_KEY=\xff\xfe")
    assert problems(tmp_path) == [".env: cannot be read: not UTF-8"]


def test_an_empty_variable_is_none(tmp_path: Path) -> None:
    content = {"api": {"api_keys": ["k"]}, "system": {"llama_server_path": "here"}}
    result = loaded(tmp_path, content, environ={"API_KEY": "", "LLAMA_SERVER_PATH": ""})
    assert result.config.system.llama_server_path == "here"
    assert result.origins["api.api_keys"] == "config.json"


@pytest.mark.parametrize("text", ["1", "true", "yes", "ON"])
def test_switches_in_the_environment_are_read_as_people_write_them(tmp_path: Path, text: str) -> None:
    system = loaded(tmp_path, environ={"DEBUG": text, "STRUCTURED_LOGS": text}).config.system
    assert (system.debug, system.structured_logs) == (True, True)


def test_a_variable_that_is_wrong_is_named(tmp_path: Path) -> None:
    environ = {
        "LLAMA_ROUTER__SYSTEM__DEBUG": "express:*",
        "LLAMA_ROUTER__API__PORT": "http",
        "LLAMA_ROUTER__SYSTEM__BASEPORT": "1",
        "LLAMA_ROUTER__MODELS__A__PINNED": "1",
        "LLAMA_ROUTER__SYSTEM__GPU_DEVICES": "0,1",
    }
    assert problems(tmp_path, environ=environ) == [
        "env LLAMA_ROUTER__SYSTEM__BASEPORT: unknown key; did you mean base_port?",
        "env LLAMA_ROUTER__MODELS__A__PINNED: variables can set single values only; set this key in a file",
        "env LLAMA_ROUTER__SYSTEM__GPU_DEVICES: variables can set single values only; set this key in a file",
        'env LLAMA_ROUTER__API__PORT: api.port: should be a valid integer, not "http"',
        'env LLAMA_ROUTER__SYSTEM__DEBUG: system.debug: should be a valid boolean, not "express:*"',
    ]


def test_a_variable_that_other_programs_have_too_stops_no_start_by_its_value(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("API_KEY=two words\nDEBUG=release\nSTRUCTURED_LOGS=ecs\n")
    result = loaded(tmp_path)
    assert (result.config.api.api_keys, result.config.system.debug) == ((), False)
    assert sorted(result.warnings) == [
        ".env API_KEY is not a valid API key: a key is one or more printable ASCII characters without spaces; "
        "ignored, as it seems to be meant for another program",
        ".env DEBUG is neither true nor false, as system.debug requires; ignored, as it "
        "seems to be meant for another program",
        ".env STRUCTURED_LOGS is neither true nor false, as system.structured_logs requires; ignored, "
        "as it seems to be meant for another program",
    ]


def test_a_key_that_can_be_none_does_not_open_the_router_to_the_network(tmp_path: Path) -> None:
    environ = {"API_KEY": "schlüssel"}
    (problem,) = problems(tmp_path, {"api": {"host": "0.0.0.0"}}, environ=environ)
    assert problem.startswith("env API_KEY is not a valid API key: ")
    assert problem.endswith(", and 0.0.0.0 would be open to the network without a key")
    guarded = loaded(tmp_path, {"api": {"host": "0.0.0.0", "inference_keys": ["k"]}}, environ=environ)
    assert [warning.split(" is ")[0] for warning in guarded.warnings] == ["env API_KEY"]


def test_paths_in_the_file_start_from_its_folder_and_others_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/router.yaml").write_text(
        "system: {base_models_path: ../models, llama_server_path: bin/llama-server, "
        "log_dir: log, state_dir: state}\n"
        "models: {a: {model_path: a.gguf}, b: {model_path: ~/b.gguf}, c: {model_path: /c.gguf}}\n"
    )
    path = Path("etc/router.yaml")
    config = loaded(tmp_path, path=path, environ={"HOME": "/home/ann"}).config
    assert config.system.llama_server_path == str(tmp_path / "etc/bin/llama-server")
    paths = [entry.model_path for entry in config.models.values()]
    assert paths == [tmp_path / "models/a.gguf", Path("/home/ann/b.gguf"), Path("/c.gguf")]
    assert config.system.log_dir == str(tmp_path / "etc/log")
    assert config.system.state_dir == str(tmp_path / "etc/state")
    environ = {"BASE_MODELS_PATH": "store", "LLAMA_ROUTER__SYSTEM__LOG_DIR": "log"}
    config = loaded(tmp_path, path=path, environ=environ).config
    assert config.models["a"].model_path == tmp_path / "store/a.gguf"
    assert config.system.log_dir == str(tmp_path / "log")


# --- how files are read ---------------------------------------------------------------------------------------


def test_keys_that_begin_with_an_underscore_are_comments_everywhere_and_may_repeat(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"_": 1, "_": 2, "api": {"_why": [], "port": 7}, "models": {"_old": {"modelpath": 1}}}'
    )
    result = loaded(tmp_path)
    assert result.config.api.port == 7
    assert result.config.models == {}


def test_a_key_written_twice_is_an_error_in_json_and_in_yaml(tmp_path: Path) -> None:
    twice = '{"models": {"a": {"model_path": "1"}, "a": {"model_path": "2"}}, "api": {"port": 1, "port": 2}}'
    for name in ("config.json", "config.yaml"):
        (tmp_path / name).write_text(twice)
        assert problems(tmp_path, path=Path(name)) == [
            f"{name}: models.a: is defined twice; remove one of them",
            f"{name}: api.port: is defined twice; remove one of them",
        ]


def test_syntax_errors_tell_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{\n  "api": {"port": 1,}\n}')
    (line,) = problems(tmp_path)
    assert line.startswith("config.json:2:")
    (tmp_path / "bad.yaml").write_text("api:\n  port: 1\n host: x\n")
    (line,) = problems(tmp_path, path=Path("bad.yaml"))
    assert line.startswith("bad.yaml:3:2: ")


def test_files_that_are_no_configuration_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "latin.yaml").write_bytes(b"\xe9")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "loop.yaml").write_text("models: &m {a: *m}")
    (tmp_path / "tag.yaml").write_text("api: {port: !!bool z}")
    (tmp_path / "bell.yaml").write_text("api:\n  host: \x07")
    (tmp_path / "untold.yaml").write_text("api: {heartbeat_sec: !!float ''}")
    (tmp_path / "long.json").write_text(f'{{"api": {{"port": {"9" * 5000}}}}}')
    (tmp_path / "folder").mkdir()
    deeper = {"aliases": {"a": {"uses": "m", "defaults": {"x": {}}}}}
    for _ in range(97):
        deeper["aliases"]["a"]["defaults"] = {"x": deeper["aliases"]["a"]["defaults"]}
    (tmp_path / "deeper.json").write_text(json.dumps(deeper))
    expected = {
        "absent.json": "absent.json: cannot be read: No such file or directory",
        "config.toml": "config.toml: must end in .json, .yaml or .yml",
        "list.yaml": "list.yaml: must be a mapping with keys such as api, system and models",
        "latin.yaml": "latin.yaml: is not UTF-8 text (byte 0)",
        "deep.json": "deep.json: is nested too deeply",
        "deeper.json": f"deeper.json: aliases.a.defaults{'.x' * 98}: is nested too deeply",
        "long.json": "long.json: api.port: is too large a number (2^64 or more)",
        "folder": "folder: is a folder; name the file in it",
        "loop.yaml": "loop.yaml:1:9: refers to itself",
        "untold.yaml": "untold.yaml:1:22: this value does not fit its tag",
        "tag.yaml": "tag.yaml:1:13: this value does not fit its tag",
        "bell.yaml": "bell.yaml:2:9: special characters are not allowed",
    }
    for name, line in expected.items():
        assert problems(tmp_path, path=Path(name)) == [line]


def test_a_few_lines_of_anchors_do_not_fill_the_memory(tmp_path: Path) -> None:
    """Each line stands for ten times the one before it."""
    for kind, line in (("keys", "{{{}}}"), ("merge", "{{<<: [{}]}}")):
        lines = ["_a0: &a0 {x: 1}"]
        for depth in range(12):
            ten = ", ".join(f"k{number}: *a{depth}" if kind == "keys" else f"*a{depth}" for number in range(10))
            lines.append(f"_a{depth + 1}: &a{depth + 1} {line.format(ten)}")
        (tmp_path / f"{kind}.yaml").write_text("\n".join([*lines, "system: *a12"]))
    assert problems(tmp_path, path=Path("merge.yaml")) == ["merge.yaml: system.x: unknown key"]
    assert problems(tmp_path, path=Path("keys.yaml")) == [
        "keys.yaml: has more than 200,000 values after its anchors are expanded"
    ]


def test_an_empty_yaml_file_and_empty_sections_are_fine(tmp_path: Path) -> None:
    assert loaded(tmp_path, "# nothing yet\n").config.models == {}
    assert loaded(tmp_path, "api:\n  # port: 1\nsystem:\nmodels:\n").config.api.port == 8000


def test_yaml_values_mean_what_they_look_like(tmp_path: Path) -> None:
    text = """
    system: {flash_attention: on}
    models:
      405: {model_path: m.gguf, flags: [-c, 8192, --temp, 0.7, -ts, 1:30, -fa, off, --jinja], env: {N: 2}}
      no: {model_path: 2024-01-01, description: yes}
    """
    models = loaded(tmp_path, text).config.models
    assert list(models) == ["405", "no"]
    expected = ("-c", "8192", "--temp", "0.7", "-ts", "1:30", "-fa", "off", "--jinja")
    assert models["405"].flags[: len(expected)] == expected
    assert models["405"].env == {"N": "2"}
    assert models["no"].model_path.name == "2024-01-01"
    assert models["no"].description == "yes"


def test_yaml_anchors_and_merges_share_what_entries_have_in_common(tmp_path: Path) -> None:
    text = """
    _common: &common {flags: [-c, 8192], pinned: true}
    models:
      a: {<<: *common, model_path: a.gguf}
      b: {<<: *common, model_path: b.gguf, pinned: false}
    """
    models = loaded(tmp_path, text).config.models
    assert models["a"].flags == models["b"].flags == ("-c", "8192", "--parallel", "1")
    assert (models["a"].pinned, models["b"].pinned) == (True, False)


def test_a_list_among_the_flags_is_what_models_have_in_common(tmp_path: Path) -> None:
    text = """
    _gpu: &gpu [-ngl, 99]
    models: {a: {model_path: a.gguf, flags: [*gpu, -c, 512]}, b: {model_path: b.gguf, flags: *gpu}}
    """
    models = loaded(tmp_path, text).config.models
    assert models["a"].flags == ("-ngl", "99", "-c", "512", "--parallel", "1")
    assert models["b"].flags == ("-ngl", "99", "--parallel", "1")


# --- what is refused ------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_reported_at_once_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "qwen3-8b.gguf").touch()
    content = {
        "api": {"prot": 1, "cors_origins": ["http://localhost:3000/"]},
        "system": {"max_concurrent_models": 0, "vram_multiplier": "big", "preload_models": ["qwen", "x y"]},
        "scheduling": {"patience_sec": {"high": 20}},
        "sheduling": {},
        "models": {
            "qwem": {"model_path": "qwen3-8.gguf", "flags": ["-c", "8192", "--port", "1", "-np"]},
            "x y": {"flags": "-c 1", "params": {"n_ctx": 1, "ctx": 2}},
            "z": None,
        },
    }
    assert problems(tmp_path, content, check_files=True) == [
        "config.json: sheduling: unknown key; did you mean scheduling?",
        "config.json: api.cors_origins[0]: should be *, or like http://localhost:3000 or https://*.example.com, "
        "without a path",
        "config.json: api.prot: unknown key; did you mean port?",
        "config.json: system.max_concurrent_models: should be greater than or equal to 1, not 0",
        'config.json: system.vram_multiplier: should be a valid number, not "big"',
        "config.json: scheduling.patience_sec: high must not exceed normal, nor normal low",
        f"config.json: models.qwem.model_path: there is no file {tmp_path}/qwen3-8.gguf; "
        "did you mean qwen3-8b.gguf?",
        "config.json: models.qwem.flags[4]: -np needs a value",
        f"config.json: models.qwem.flags[2]: --port cannot be set: {flags.OWNED['port']}",
        "config.json: models.x y: an alias is up to 256 printable characters without spaces",
        "config.json: models.x y.model_path: is required, because no model of this name was found",
        "config.json: models.x y.flags: should be a list: [-c, 8192, --jinja], not one line of text",
        "config.json: models.x y.params.ctx: unknown key; did you mean n_ctx?",
        "config.json: models.z: should be a mapping of keys to values, such as {model_path: FILE.gguf}",
        "config.json: system.preload_models[0]: there is no model 'qwen'; did you mean qwem?",
    ]


@pytest.mark.parametrize("spelling", ["--port=1", "--host", "--api-key", "-m", "--model", "-hf"])
def test_flags_that_the_router_owns_are_refused(tmp_path: Path, spelling: str) -> None:
    words = [spelling] if "=" in spelling else [spelling, "x"]
    (line,) = problems(tmp_path, {"models": {"m": {"model_path": "m", "flags": ["--jinja", *words]}}})
    assert line.startswith(f"config.json: models.m.flags[1]: {spelling.removesuffix('=1')} cannot be set: ")


def test_nor_can_they_be_set_behind_its_back_by_variables(tmp_path: Path) -> None:
    entries = {
        "a": {"model_path": "a", "env": {"A B": ""}},
        "b": {"model_path": "b", "env": {"LLAMA_ARG_PORT": "1", "LLAMA_ARG_N_PARALLEL": "x"}},
    }
    assert problems(tmp_path, {"models": entries}) == [
        "config.json: models.a.env: 'A B' is not a valid name for an environment variable",
        "config.json: models.b.env.LLAMA_ARG_PORT: cannot be set: the router sets it itself",
        "config.json: models.b.env: LLAMA_ARG_N_PARALLEL takes a whole number, not 'x'",
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"api": {"port": True}}, "api.port: should be a valid integer, not true"),
        ({"api": {"port": "8000"}}, 'api.port: should be a valid integer, not "8000"'),
        ({"api": {"heartbeat_sec": -1}}, "api.heartbeat_sec: should be greater than or equal to 0, not -1"),
        ({"system": {"preload_models": "*"}}, "system.preload_models: should be a list"),
        (
            {"api": {"port": 11434, "ollama_port": 11434}},
            "api.ollama_port: 11434 is already api.port, which Ollama's clients can use as well",
        ),
        ({"system": {"base_models_path": 5}}, "system.base_models_path: should be text: enclose it in quotes"),
        ({"system": {"port": 1}}, "system.port: unknown key here; it belongs to api"),
        (
            {"system": {"flash_attention": "auto?"}},
            "system.flash_attention: should be 'on', 'off' or 'auto', not \"auto?\"",
        ),
        (
            {"scheduling": {"wait_factor": {"urgent": 1}}},
            "scheduling.wait_factor.urgent: unknown key; known keys: high, normal, low",
        ),
        (
            {"models": {"m": {"model_path": "m", "params": {"chat_template": "-c"}}}},
            "models.m.params.chat_template: should match pattern '^[^-]', not \"-c\"",
        ),
        (
            {"system": {"idle_timeout_sec": "5m"}},
            'system.idle_timeout_sec: should be a valid number (seconds), not "5m"',
        ),
        (
            {"models": {"m": {"model_path": "m", "footprint_mb": "20GB"}}},
            'models.m.footprint_mb: should be a valid integer (MiB), not "20GB"',
        ),
        (
            {"models": {"m": {"model_path": "m", "env": ["A=B"]}}},
            "models.m.env: should be a mapping of keys to values, such as {CUDA_VISIBLE_DEVICES: 0}",
        ),
        ({"models": []}, "models: should map model names to entries with model_path and flags"),
        ({"api": 5}, "api: should be a mapping of keys to values"),
        (
            {"system": {"log_ring_lines": 10**18}},
            "system.log_ring_lines: should be less than or equal to 1000000000000000, not 1000000000000000000",
        ),
        (
            {"system": {"queue_timeout_sec": 1e11}},
            "system.queue_timeout_sec: should be less than or equal to 10000000000, not 100000000000.0",
        ),
        (
            {"api": {"port": 10**30}},
            "api.port: is too large a number (2^64 or more)",
        ),
        (
            {"models": {"m": {"model_path": "m", "flags": ["--alias", "a\0"]}}},
            "models.m.flags[1]: contains a NUL character, which paths, names and arguments cannot have",
        ),
        (
            {"models": {"m": {"model_path": "m", "description": "\ud83d"}}},
            "models.m.description: contains half a character (a lone UTF-16 surrogate)",
        ),
        (
            {"api": {"clients": {"a\x7f": {"key": "k"}}}},
            "api.clients.a\x7f: a name is up to 256 printable characters without spaces",
        ),
        ({"system": {"base_port": "8" * 90}}, f'system.base_port: should be a valid integer, not "{"8" * 79}…'),
    ],
)
def test_a_wrong_value_gets_a_line_that_says_what_would_be_right(tmp_path: Path, content: Any, line: str) -> None:
    assert problems(tmp_path, content) == [f"config.json: {line}"]


def test_whoever_comes_from_llama_swap_is_told_what_its_keys_are_here(tmp_path: Path) -> None:
    page = (PROJECT / "docs" / "llama-swap.md").read_text()
    theirs, ours = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    read = loaded(tmp_path, ours)
    assert read.warnings == ()
    assert read.config.models["qwen"].flags == ("-ngl", "99", "-fa", "on", "-c", "16384", "-np", "2")
    lines = problems(tmp_path, theirs)
    assert [line for line in lines if "it is a key of llama-swap, here replaced by: " not in line] == [
        "config.yaml: models.coder.env: should be a mapping of keys to values, such as {CUDA_VISIBLE_DEVICES: 0}"
    ]
    assert (
        "config.yaml: models.qwen.ttl: unknown key; it is a key of llama-swap, here replaced by: idle_timeout_sec"
        in "\n".join(lines)
    )
    assert problems(tmp_path, "models: {}\npeers: {}") == [
        "config.yaml: peers: unknown key; it is a key of llama-swap without a counterpart: other servers are not "
        "called (docs/llama-swap.md; `llama-router import` converts a whole file)"
    ]


def test_the_page_about_llama_swap_knows_its_keys_that_the_errors_know() -> None:
    page = (PROJECT / "docs" / "llama-swap.md").read_text()
    for keys in (*llama_swap.REPLACED.values(), *llama_swap.DROPPED.values()):
        assert [key for key in keys if f"`{key}`" not in page] == []


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        (
            "c.json",
            '{\n  // mine\n  "api": {}}',
            "2:3: JSON has no comments: write them as keys that begin with _, ",
        ),
        ("c.json", '{"api": {"port": 1,}}', "1:20: a value is missing before this }; is there an extra comma?"),
        ("c.yaml", "api:\n\tport: 1", "2:1: YAML does not allow tabs here: indent with spaces"),
    ],
)
def test_what_the_parser_cannot_know_is_said_of_comments_commas_and_tabs(
    tmp_path: Path, name: str, text: str, line: str
) -> None:
    (tmp_path / name).write_text(text)
    assert problems(tmp_path, path=Path(name))[0].startswith(f"{name}:{line}")


def test_a_path_that_was_meant_as_something_else_is_told_so(tmp_path: Path) -> None:
    paths = {"a": "$HOME/a.gguf", "b": "hf.co/x/y:Q4_K_M", "c": "https://huggingface.co/x/y/z.gguf"}
    lines = problems(
        tmp_path, {"models": {alias: {"model_path": path} for alias, path in paths.items()}}, check_files=True
    )
    assert lines[0].endswith(": variables are not expanded in paths")
    for line in lines[1:]:
        assert line.endswith("`llama-router pull hf.co/USER/REPO:QUANT`")


def test_a_flag_that_no_engine_is_known_to_have_is_doubted_but_passed_on(tmp_path: Path) -> None:
    entry = {"model_path": "m.gguf", "flags": ["-ngll", "3", "--new-in-this-build"]}
    result = loaded(tmp_path, {"models": {"m": entry}})
    assert result.config.models["m"].flags[:3] == ("-ngll", "3", "--new-in-this-build")
    doubts = "is not a flag of any llama-server known here"
    assert result.warnings == (
        f"config.json: models.m.flags[0]: -ngll {doubts}; did you mean -ngl?",
        f"config.json: models.m.flags[2]: --new-in-this-build {doubts}",
    )


def test_infinity_is_no_time_to_wait(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"system": {"queue_timeout_sec": Infinity}}')
    assert problems(tmp_path) == ["config.json: system.queue_timeout_sec: should be a finite number"]


def test_a_missing_file_is_shown_as_it_was_resolved(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    content = {
        "system": {"base_models_path": "sub/.."},
        "models": {
            "a": {"model_path": "nowhere/a.gguf", "mmproj": "../p.gguf"},
            "b": {"model_path": "folder.gguf"},
        },
    }
    assert problems(tmp_path, content, check_files=True) == [
        f"config.json: models.a.model_path: there is no file {tmp_path}/nowhere/a.gguf: its folder is missing",
        f"config.json: models.a.mmproj: there is no file {tmp_path.parent}/p.gguf",
        f"config.json: models.b.model_path: {tmp_path}/folder.gguf is a folder; name the GGUF file in it",
    ]


def test_a_path_that_the_system_does_not_take_is_refused_like_others(tmp_path: Path) -> None:
    content = {"system": {"llama_server_path": "./" + "s" * 300}, "models": {"m": {"model_path": "m" * 300}}}
    for line, key in zip(
        problems(tmp_path, content, check_files=True), ("system.llama_server", "models.m.model"), strict=True
    ):
        assert line.startswith(f"config.json: {key}_path: ")
    (tmp_path / ".env").write_text("HF_HOME=/cache\0\n")
    assert ".env:1: contains a NUL character, which variables cannot have" in problems(tmp_path, content)


def test_a_split_model_needs_all_its_parts_and_is_named_by_the_first(tmp_path: Path) -> None:
    (tmp_path / "big-00001-of-00002.gguf").touch()
    content = {
        "models": {"a": {"model_path": "big-00001-of-00002.gguf"}, "b": {"model_path": "big-00002-of-00002.gguf"}}
    }
    lines = problems(tmp_path, content, check_files=True)
    assert lines[0].startswith(
        f"config.json: models.a.model_path: there is no file {tmp_path}/big-00002-of-00002.gguf"
    )
    assert lines[1] == (
        "config.json: models.b.model_path: big-00002-of-00002.gguf is one part of a split model; name the first "
        "one, big-00001-of-00002.gguf"
    )


def test_an_engine_that_is_not_there_or_cannot_run_is_reported(tmp_path: Path) -> None:
    engine = tmp_path / "llama-server"
    environ = {"LLAMA_SERVER_PATH": str(engine)}
    where = "env LLAMA_SERVER_PATH: system.llama_server_path"
    assert problems(tmp_path, environ=environ, check_files=True) == [f"{where}: there is no file {engine}"]
    engine.touch()
    assert problems(tmp_path, environ=environ, check_files=True) == [f"{where}: {engine} is not executable"]
    engine.chmod(0o755)
    assert loaded(tmp_path, environ=environ, check_files=True).config.system.llama_server_path == str(engine)


def test_preload_takes_known_aliases_or_a_star_alone(tmp_path: Path) -> None:
    models = {"a": {"model_path": "a.gguf"}}
    assert loaded(tmp_path, {"system": {"preload_models": ["*"]}, "models": models})
    assert loaded(tmp_path, {"system": {"preload_models": ["a"]}, "models": models})
    assert problems(tmp_path, {"system": {"preload_models": ["a", "*"]}, "models": models}) == [
        'config.json: system.preload_models[1]: "*" means all models and cannot be combined with others'
    ]


def test_a_model_to_preload_that_was_found_may_go_and_need_not_be_here_to_ask_a_router(tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    file = write_llama(tmp_path / "found" / "a.gguf")
    content = {"system": {"preload_models": ["a"], "models_dirs": ["found"]}}
    first = loaded(tmp_path, content, check_files=True)
    assert first.warnings == ()
    write_llama(tmp_path / "found" / "b.gguf", seed=1)
    file.unlink()
    then = first.look_again()
    missing = "config.json: system.preload_models[0]: there is no model 'a'"
    assert (list(then.config.models), then.warnings) == (["b"], (missing,))
    assert loaded(tmp_path, check_files=False).config.system.preload_models == ("a",)  # as `ps` reads it
    assert problems(tmp_path, check_files=True) == [missing]


# --- secrets --------------------------------------------------------------------------------------------------


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    content = {
        "api": {
            "api_keys": ["hush-1"],
            "inference_keys": ["hush-2"],
            "clients": {"anna": {"key": "hush-5", "priority": "low"}},
        },
        "models": {
            "m": {"model_path": "m.gguf", "flags": ["-hft", "hush-3"], "env": {"HF_TOKEN": "hush-4", "GPU": "0"}}
        },
    }
    result = loaded(tmp_path, content)
    shown = "\n".join(render(result.config, result.origins))
    assert "hush" not in shown
    assert "hush" not in repr(result.config.api)
    assert "hush-4" not in repr(result)
    assert "api.api_keys = (1 not shown)   (config.json)" in shown
    assert "api.clients.anna.key = (not shown)   (config.json)" in shown
    assert "api.clients.anna.priority = low   (config.json)" in shown
    assert "models.m.env.GPU = 0   (config.json)" in shown


@pytest.mark.parametrize(
    "text",
    [
        "api: {api_keys: hush}",
        "api: {api_keys: [12345, hush hush, {hush: hush}]}",
        "api: {api_keys: [*hush]}",
        "api: {api_keys: [!hush x]}",
        "api: {api_keys: [!hush!x x]}",
        "api: {api_keys: [!!int hush, x]}",
        "api: {api_keys: ['hush\n",
        "api: {inference_keys: {a: hush}}",
        "api: {clients: {a: hush}}",
        "api: {clients: {a: {key: hush hush}, b: {key: 12345}, c: {key: [hush]}}}",
        "api: hush",
        "models: {m: {model_path: m, env: {TOKEN: [hush]}}}",
        "models: {m: {model_path: m, env: hush}}",
        "models: {m: {model_path: m, api_key: hush}}",
        "api: {host: 1, api_keys: [hüsh]}",
    ],
)
def test_no_error_text_gives_a_secret_away(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    lines = problems(tmp_path)
    assert lines
    assert not any(secret in line for line in lines for secret in ("hush", "hüsh", "12345"))


def test_a_key_that_no_client_can_send_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, {"api": {"api_keys": ["two words"]}}) == [
        "config.json: api.api_keys[0]: a key is one or more printable ASCII characters without spaces"
    ]


def test_a_key_belongs_to_one_client(tmp_path: Path) -> None:
    anna, jobs = {"key": "one"}, {"key": "two", "priority": "normal", "highest_priority": "low"}
    content = {"api": {"api_keys": ["two"], "clients": {"anna": anna, "jobs": jobs, "twin": anna}}}
    assert problems(tmp_path, content) == [
        "config.json: api.clients.jobs.key: is also one of api_keys: each client needs a key of its own",
        "config.json: api.clients.jobs.priority: is above highest_priority, low",
        "config.json: api.clients.twin.key: is also the key of 'anna': each client needs a key of its own",
    ]
    (line,) = problems(tmp_path, {"api": {"clients": {"anna": {"key": "one", "max_priority": "low"}}}})
    assert line == "config.json: api.clients.anna.max_priority: unknown key; did you mean priority?"


# --- warnings -------------------------------------------------------------------------------------------------


def test_an_open_router_without_a_key_earns_a_warning(tmp_path: Path) -> None:
    overrides = {"api.host": ("--host", "0.0.0.0")}
    (warning,) = loaded(tmp_path, overrides=overrides).warnings
    assert warning.startswith("--host: api.host: 0.0.0.0 is open to the network and no API key is set")
    assert loaded(tmp_path, overrides=overrides, environ={"API_KEY": "k"}).warnings == ()


def test_pinned_models_that_leave_no_place_for_others_earn_a_warning(tmp_path: Path) -> None:
    pinned = {alias: {"model_path": f"{alias}.gguf", "pinned": True} for alias in ("a", "b", "c")}
    assert loaded(tmp_path, {"models": pinned}).warnings == ()
    (warning,) = loaded(tmp_path, {"models": {**pinned, "d": {"model_path": "d.gguf"}}}).warnings
    assert warning == (
        "system.max_concurrent_models: 3 leaves no place beside the pinned models (a, b, c) for others"
    )


def test_older_names_still_work_and_obsolete_ones_are_ignored_aloud(tmp_path: Path) -> None:
    result = loaded(tmp_path, {"system": {"parallel_requests": 6, "queue_processor_idle_sec": 120}})
    assert result.config.system.default_parallel == 6
    assert result.warnings == (
        "config.json: system.queue_processor_idle_sec: is obsolete and ignored: the queue is not polled",
        "config.json: system.parallel_requests: is the former name of default_parallel",
    )
    both = loaded(tmp_path, {"system": {"parallel_requests": 6, "default_parallel": 2}})
    assert both.config.system.default_parallel == 2


# --- what engines get -----------------------------------------------------------------------------------------


def test_flags_are_passed_on_and_parallel_is_always_said(tmp_path: Path) -> None:
    assert model(tmp_path, {"flags": ["-c", "8192"]}).flags == ("-c", "8192", "--parallel", "1")
    assert model(tmp_path, {"flags": ["-np", "3"]}, {"default_parallel": 2}).flags == ("-np", "3")
    assert model(tmp_path, {}, {"default_parallel": 2}).slots == 2
    assert model(tmp_path, {"flags": ["-np", "3"]}).slots == 3
    assert model(tmp_path, {"flags": ["-np", "-1"]}).slots == flags.AUTO_SLOTS
    by_variable = model(tmp_path, {"env": {"LLAMA_ARG_N_PARALLEL": "5"}})
    assert (by_variable.flags, by_variable.slots) == ((), 5)


def test_the_older_params_become_flags_with_their_defaults(tmp_path: Path) -> None:
    params = {
        "n_batch": 256,
        "batch_override": 512,
        "rope_freq_base": 1000000,
        "type_k": "q8_0",
        "embedding": True,
        "parallel_override": 4,
    }
    built = model(tmp_path, {"params": params})
    assert built.slots == 4
    assert " ".join(built.flags) == (
        "--n-gpu-layers 99 --ctx-size 4096 --batch-size 512 --parallel 4 --rope-freq-base 1000000.0 "
        "--cache-type-k q8_0 --embedding"
    )


def test_where_params_and_flags_name_the_same_flags_win_and_say_so(tmp_path: Path) -> None:
    entry = {"model_path": "m.gguf", "flags": ["-ngl", "10", "--ctx-size", "8192"], "params": {"n_ctx": 4096}}
    result = loaded(tmp_path, {"models": {"m": entry}})
    assert result.config.models["m"].flags == ("-ngl", "10", "--ctx-size", "8192", "--parallel", "1")
    # n_gpu_layers is only a default here, so nothing that somebody wrote is lost.
    assert result.warnings == ("config.json: models.m.params.n_ctx: is overridden by --ctx-size",)


def test_the_device_of_an_entry_counts_or_is_refused(tmp_path: Path) -> None:
    assert model(tmp_path, {"device": "cpu"}).flags == ("--n-gpu-layers", "0", "--parallel", "1")
    assert model(tmp_path, {"device": "cpu", "params": {"n_ctx": 512}}).flags[:4] == (
        *("--n-gpu-layers", "0", "--ctx-size", "512"),
    )
    assert model(tmp_path, {"device": "auto"}).flags == ("--parallel", "1")
    entries = {
        "cuda": {"model_path": "m.gguf", "device": "cuda"},
        "both": {"model_path": "m.gguf", "device": "cpu", "flags": ["-ngl", "99"]},
    }
    assert problems(tmp_path, {"models": entries}) == [
        "config.json: models.cuda.device: should be cpu or auto: the GPU is chosen by available memory, or "
        "set by --device in flags",
        "config.json: models.both.device: cpu means -ngl 0, but -ngl is also set: keep one of them",
    ]


def test_older_system_keys_become_flags_of_models_that_do_not_say_otherwise(tmp_path: Path) -> None:
    system = {"cpu_threads": 8, "use_mmap": False, "flash_attention": "on"}
    older = ("--threads", "8", "--load-mode", "none", "--flash-attn", "on", "--parallel", "1")
    assert model(tmp_path, {}, system).flags == older
    own = ("-t", "4", "--mlock", "-fa", "off")
    assert model(tmp_path, {"flags": own}, system).flags == (*own, "--parallel", "1")
    assert model(tmp_path, {}, {"use_mmap": True}).flags == ("--parallel", "1")


def test_mmproj_is_found_like_the_model_and_given_once(tmp_path: Path) -> None:
    built = model(tmp_path, {"mmproj": "p.gguf"}, {"base_models_path": "/srv"})
    assert built.flags == ("--mmproj", "/srv/p.gguf", "--parallel", "1")
    content = {"models": {"m": {"model_path": "m", "mmproj": "p", "flags": ["-mm", "/p"]}}}
    assert problems(tmp_path, content) == ["config.json: models.m.mmproj: is also set by -mm"]


def test_check_shows_where_each_flag_comes_from(tmp_path: Path) -> None:
    entry = {"model_path": "m.gguf", "flags": ["--alias", "a b"], "params": {"n_ctx": 1}}
    result = loaded(tmp_path, {"models": {"m": entry}})
    (line,) = [line for line in render(result.config, result.origins) if ".flags = " in line]
    assert line == (
        "models.m.flags = --alias 'a b' --n-gpu-layers 99 --ctx-size 1 --parallel 1   (config.json, "
        "--n-gpu-layers from params.n_gpu_layers, --ctx-size from params.n_ctx, "
        "--parallel from system.default_parallel)"
    )


def test_zero_idle_timeout_means_never_and_none_means_the_systems(tmp_path: Path) -> None:
    assert model(tmp_path, {}).idle_timeout_sec is None
    assert model(tmp_path, {"idle_timeout_sec": 9}).idle_timeout_sec == 9
    assert model(tmp_path, {"idle_timeout_sec": 0}).idle_timeout_sec == math.inf


def test_only_what_an_engine_is_started_with_changes_its_revision(tmp_path: Path) -> None:
    before = model(tmp_path, {})
    applied_live = {
        "pinned": True,
        "idle_timeout_sec": 9,
        "footprint_mb": 9,
        "priority": "low",
        "description": "x",
    }
    for key, value in applied_live.items():
        after = model(tmp_path, {key: value})
        assert after != before
        assert after.revision == before.revision
    for key, value in {"model_path": "n.gguf", "flags": ["-c", "9"], "env": {"X": "9"}, "mmproj": "p"}.items():
        assert model(tmp_path, {key: value}).revision != before.revision
    assert model(tmp_path, {}) == before
    assert model(tmp_path, {}, {"cpu_threads": 2}).revision != before.revision


# --- models found in folders ----------------------------------------------------------------------------------


def test_a_folder_of_models_is_served_without_any_file(tmp_path: Path) -> None:
    write_llama(tmp_path / "tiny-Q8_0.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"junk")
    result = loaded(tmp_path, models_dirs=[Path()], check_files=True)
    assert list(result.config.models) == ["tiny-Q8_0"]
    assert result.config.models["tiny-Q8_0"].model_path == tmp_path / "tiny-Q8_0.gguf"
    assert result.origins["models.tiny-Q8_0.model_path"] == "--models-dir"
    (warning,) = result.warnings
    assert warning.startswith(f"{tmp_path}/broken.gguf is not served: ")


def test_what_the_configuration_serves_is_not_served_again(tmp_path: Path) -> None:
    write_llama(tmp_path / "a.gguf")
    write_llama(tmp_path / "b.gguf", seed=1)
    content = {"models": {"mine": {"model_path": "a.gguf"}, "b": {"model_path": "other.gguf"}}}
    models = loaded(tmp_path, content, models_dirs=[tmp_path]).config.models
    assert {alias: model.model_path.name for alias, model in models.items()} == {
        "mine": "a.gguf",
        "b": "other.gguf",
    }


def test_flags_for_a_model_that_was_found_need_no_path(tmp_path: Path) -> None:
    write_llama(tmp_path / "a.gguf")
    content = {"models": {"a": {"flags": ["-c", "512"]}}}
    result = loaded(tmp_path, content, models_dirs=[tmp_path], check_files=True)
    (model,) = result.config.models.values()
    assert (model.model_path, model.flags[:2]) == (tmp_path / "a.gguf", ("-c", "512"))
    assert model.source == "--models-dir"
    assert result.warnings == ()
    (tmp_path / "a.gguf").unlink()
    missing = "models.a.model_path: is required, because no model of this name was found"
    later = result.look_again()
    assert later.config.models == {}
    assert later.warnings == (f"config.json: {missing}",)
    (line,) = problems(tmp_path, content, models_dirs=[tmp_path], check_files=True)
    assert line == f"config.json: {missing}"


def test_the_projector_beside_a_found_model_yields_to_what_its_flags_say_of_one(tmp_path: Path) -> None:
    write_llama(tmp_path / "a.gguf")
    write_projector(tmp_path / "mmproj-a.gguf")
    found = ("--mmproj", f"{tmp_path}/mmproj-a.gguf")
    for entry, projector in (
        ({}, found),
        ({"flags": ["--mmproj-auto"]}, ("--mmproj-auto", *found)),
        ({"flags": ["--no-mmproj"]}, ("--no-mmproj",)),
        ({"flags": ["-mm", "/other"]}, ("-mm", "/other")),
        ({"env": {"LLAMA_ARG_MMPROJ": "/other"}}, ()),
    ):
        result = loaded(tmp_path, {"models": {"a": entry}}, models_dirs=[tmp_path])
        assert result.config.models["a"].flags == (*projector, "--parallel", "1")


def test_of_two_files_of_one_name_in_two_folders_the_first_is_served(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_llama(tmp_path / folder / "a.gguf")
    result = loaded(tmp_path, models_dirs=[Path("one"), Path("two")])
    assert result.config.models["a"].model_path == tmp_path / "one/a.gguf"
    assert result.warnings == (f"{tmp_path}/two/a.gguf is not served: {tmp_path}/one/a.gguf has the same name",)


def test_a_file_whose_name_cannot_be_an_alias_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    for name in ("good", "bad\x07"):
        write_llama(tmp_path / f"{name}.gguf")
    result = loaded(tmp_path, models_dirs=[tmp_path])
    assert list(result.config.models) == ["good"]
    assert result.warnings == (f"{tmp_path}/bad\x07.gguf is not served: 'bad\\x07' is not a valid name",)


def test_a_models_folder_that_is_not_there_is_reported(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, models_dirs=[Path("absent")])
    assert line == f"--models-dir: {tmp_path}/absent: No such file or directory"


# --- schema and examples --------------------------------------------------------------------------------------


def test_the_schema_in_the_repository_is_that_of_the_code() -> None:
    stored = json.loads((PROJECT / "config/schema.json").read_text())
    assert stored == config.schema(), "run: llama-router schema > config/schema.json"


def test_every_key_is_described_in_the_schema() -> None:
    sections = [config.schema(), *config.schema()["$defs"].values()]
    undescribed = [
        name for each in sections for name, key in each.get("properties", {}).items() if not key.get("description")
    ]
    assert undescribed == []


def test_the_schema_names_the_kinds_of_engine() -> None:
    assert list(KINDS) == list(config.ENGINES)


@pytest.mark.parametrize(
    ("entry", "model"),
    [
        (config.ModelEntry, LlamaCppModel("a", Path("a.gguf"), ())),
        (config.CommandEntry, CommandModel("a", Path("serve"), (), cmd=("serve", "{port}"))),
    ],
    ids=["llamacpp", "command"],
)
def test_what_is_shown_of_a_model_are_keys_of_its_entry(entry: type[config.Section], model: ModelConfig) -> None:
    shown = {path[2] for path, _ in leaves(Config(models={"a": model})) if path[0] == "models"}
    assert {"pinned", "idle_timeout_sec", "priority"} <= shown <= entry.model_fields.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_load_without_a_word_and_use_flags_that_exist(path: Path) -> None:
    result = load(path, environ={}, cwd=PROJECT, check_files=False)
    assert result.warnings == ()
    assert result.config.models
    for entry in result.config.models.values():
        assert {flag.name for flag in flags.parse(entry.flags)} <= set(flags.FORMS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_valid_by_the_schema(path: Path) -> None:
    # With their comments, as an editor sees them.
    content = json.loads(path.read_text()) if path.suffix == ".json" else read_file(path, path.name)
    jsonschema.validate(content, config.schema(), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "content",
    [
        {"api": {"prot": 1}},
        {"api": {"port": "1"}},
        {"models": {"a b": {"model_path": "x"}}},
        {"models": {"a": {"model_path": ""}}},
        {"system": {"max_concurrent_models": 0}},
    ],
)
def test_schema_and_loader_refuse_the_same(tmp_path: Path, content: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, config.schema(), cls=jsonschema.Draft202012Validator)
    assert problems(tmp_path, content)


# --- properties -----------------------------------------------------------------------------------------------

PROPERTY = settings(
    max_examples=examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=["C", "Z"]), min_size=1)
SECONDS = st.integers(0, 10**6) | st.floats(0, 10**6)
ENTRIES = st.fixed_dictionaries(
    {"model_path": TEXT},
    optional={
        "flags": st.lists(st.sampled_from(["--jinja", "--ctx-size=512", "--swa-full", "--parallel=2"])),
        "params": st.fixed_dictionaries({}, optional={"n_ctx": st.integers(0, 10**6), "embedding": st.booleans()}),
        "mmproj": TEXT,
        "env": st.dictionaries(st.sampled_from(["A", "B"]), TEXT),
        "pinned": st.booleans(),
        "idle_timeout_sec": SECONDS | st.none(),
        "priority": st.sampled_from(["high", "normal", "low", None]),
        "description": TEXT,
    },
)
CONTENTS = st.fixed_dictionaries(
    {},
    optional={
        "api": st.fixed_dictionaries({}, optional={"port": st.integers(0, 65535), "heartbeat_sec": SECONDS}),
        "system": st.fixed_dictionaries(
            {},
            optional={
                "base_models_path": TEXT,
                "gpu_devices": st.lists(st.integers(0, 9)),
                "default_parallel": st.integers(1, 9),
                "cpu_threads": st.integers(1, 9),
                "idle_timeout_sec": SECONDS,
            },
        ),
        "models": st.dictionaries(TEXT.filter(lambda alias: not alias.startswith("_")), ENTRIES, max_size=3),
    },
)


def as_file(resolved: Config) -> dict[str, Any]:
    """Return a file that states explicitly what `resolved` contains."""
    models = {
        alias: {
            "model_path": str(entry.model_path),
            "flags": entry.flags,
            "env": dict(entry.env),
            "pinned": entry.pinned,
            "idle_timeout_sec": 0 if entry.idle_timeout_sec == math.inf else entry.idle_timeout_sec,
            "footprint_mb": entry.footprint_mb,
            "priority": entry.priority,
            "description": entry.description,
        }
        for alias, entry in resolved.models.items()
    }
    sections = {name: getattr(resolved, name).model_dump() for name in ("api", "system", "scheduling")}
    return {**sections, "models": models}


@PROPERTY
@given(content=CONTENTS)
def test_a_resolved_configuration_loads_to_itself(tmp_path: Path, content: Any) -> None:
    first = loaded(tmp_path, content).config
    assert loaded(tmp_path, as_file(first)).config == first


@PROPERTY
@given(content=CONTENTS)
def test_a_json_file_means_the_same_as_yaml(tmp_path: Path, content: Any) -> None:
    (tmp_path / "same.yaml").write_text(json.dumps(content, ensure_ascii=False))
    assert loaded(tmp_path, path=Path("same.yaml")).config == loaded(tmp_path, content).config


KEYS = st.sampled_from(
    [
        name
        for section in (config.Api, config.System, config.Scheduling, config.ModelEntry)
        for name in section.model_fields
    ]
    + ["api", "system", "scheduling", "models", "high", "$schema", "_", "", "a b", "\x00"]
)
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from(["-c", "--port", "-np", "\0", "x" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=30,
)


@PROPERTY
@given(content=st.dictionaries(st.sampled_from(["api", "system", "scheduling", "models"]), JUNK))
def test_whatever_a_file_says_it_is_either_a_configuration_or_refused_in_words(
    tmp_path: Path, content: Any
) -> None:
    try:
        result = loaded(tmp_path, content, check_files=True)
    except ConfigError as error:
        refusals = error.problems
    else:
        refusals = ()
        assert len(render(result.config, result.origins)) == len(result.origins)
    assert all(refusal.source == "config.json" and refusal.message for refusal in refusals)


def test_older_names_of_variables_set_the_same_keys(tmp_path: Path) -> None:
    system = loaded(tmp_path, environ={"MAX_CACHE_MODELS": "2", "MODEL_LOAD_COOLDOWN": "1.5"}).config.system
    assert (system.max_concurrent_models, system.model_load_cooldown_sec) == (2, 1.5)
    assert problems(tmp_path, environ={"MAX_CACHE_MODELS": "few"})[0].startswith("env MAX_CACHE_MODELS: ")
    assert system.allowed_models is None
    allowing = {"ALLOWED_MODELS_JSON": '{"a.b": "org/m:Q4_0"}', "MODEL_Q4_THRESHOLD_BYTES": "5"}
    system = loaded(tmp_path, environ=allowing).config.system
    assert (system.allowed_models, system.q4_threshold_bytes) == ({"a.b": "org/m:Q4_0"}, 5)
    for wrong, where in (
        ("a: b", ""),
        ("[]", ""),
        ('{"a": 3}', ".a"),
        ('{"a b": "org/m"}', ".a b"),
        ('{"a": "m"}', ".a"),
    ):
        (problem,) = problems(tmp_path, environ={"ALLOWED_MODELS_JSON": wrong})
        assert problem.startswith(f"env ALLOWED_MODELS_JSON: system.allowed_models{where}"), problem


# --- aliases --------------------------------------------------------------------------------------------------


def test_an_alias_is_a_name_or_what_it_changes(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf")
    more = {"uses": "m", "defaults": {"temperature": 0.2, "stop": ["a"]}, "system_prompt": "Be\nkind."}
    content = {"models": {"m": {"model_path": "m.gguf"}}, "aliases": {"plain": "m", "more": more}}
    result = loaded(tmp_path, content, check_files=True)
    assert result.config.names == ["m", "plain", "more"]
    assert not result.config.aliases["plain"].rewrites
    assert result.config.aliases["more"].rewrites
    lines = [line for line in render(result.config, result.origins) if line.startswith("aliases.")]
    assert lines == [
        "aliases.plain.uses = m   (config.json)",
        "aliases.more.uses = m   (config.json)",
        "aliases.more.defaults.temperature = 0.2   (config.json)",
        'aliases.more.defaults.stop = ["a"]   (config.json)',
        'aliases.more.system_prompt = "Be\\nkind."   (config.json)',
    ]


def test_all_that_is_wrong_with_aliases_is_said_at_once(tmp_path: Path) -> None:
    write_llama(tmp_path / "qwen.gguf")
    aliases = {
        "qwen": "other",
        "typo": "qwem",
        "chain": "typo",
        "n": {"uses": "qwen", "defaults": {"model": "x"}, "forced": {"t": 1}, "removed": ["stream"]},
        "twice": {"uses": "qwen", "defaults": {"t": 1}, "forced": {"t": 2}},
        "both": {"uses": "qwen", "system_prompt_replaces": True, "system_prompt_yields": True},
        "bad": 7,
        "short": {"use": "qwen"},
    }
    qwen = {"model_path": "qwen.gguf"}
    content = {"models": {"qwen": qwen, "other": qwen}, "aliases": aliases}
    assert problems(tmp_path, content, check_files=True) == [
        "config.json: aliases.qwen: there is a model of this name",
        "config.json: aliases.typo.uses: there is no model 'qwem'; did you mean qwen?",
        "config.json: aliases.chain.uses: 'typo' is an alias itself; name the model",
        "config.json: aliases.n.defaults: 'model' cannot be changed: clients and the router depend on it",
        "config.json: aliases.n.removed: 'stream' cannot be changed: clients and the router depend on it",
        "config.json: aliases.twice: 't' may appear only once in defaults, forced and removed",
        "config.json: aliases.both: system_prompt_replaces and system_prompt_yields cannot both be true",
        "config.json: aliases.bad: should be a mapping of keys to values",
        "config.json: aliases.short.uses: is required",
        "config.json: aliases.short.use: unknown key; did you mean uses?",
    ]


def test_an_alias_wins_over_a_file_that_was_found(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    write_llama(folder / "a.gguf")
    write_llama(folder / "b.gguf")
    result = loaded(tmp_path, {"aliases": {"a": "b"}}, models_dirs=[folder])
    assert result.config.names == ["b", "a"]
    assert result.warnings == (f"{folder / 'a.gguf'} is not served: an alias has the same name",)


def test_a_model_that_goes_takes_no_alias_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    write_llama(folder / "a.gguf")
    first = loaded(tmp_path, {"aliases": {"x": "a"}}, models_dirs=[folder], check_files=True)
    (folder / "a.gguf").rename(tmp_path / "away")
    then = first.look_again()
    assert then.config.names == []
    assert "aliases.x.uses: there is no model 'a'" in then.warnings[0]
    (tmp_path / "away").rename(folder / "a.gguf")
    assert first.look_again().config.names == ["a", "x"]
