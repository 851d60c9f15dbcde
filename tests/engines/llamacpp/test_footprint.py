"""The formulas against what llama.cpp says, recorded and live, and what the flags do to them.

`RECORDED` are weights and context in MiB as `llama-fit-params` of build 11434 prints them for headers of
`benchmarks/footprints.py` (it drops fractions); `LOGGED` is from the log of that build's `llama-server`.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from gpus import SHOWN0, SHOWN1
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Blueprint, gguf_bytes, write_llama, write_projector

from benchmarks.footprints import FLAGS, MODELS, by_formula, compare, find_fit_params, percentile
from router.engines.llamacpp import fit_params, footprint
from router.engines.llamacpp.flags import FlagError, Flags
from router.engines.llamacpp.footprint import Footprint, Share
from router.formats import gguf
from router.formats.gguf import GGUF
from router.system.devices import HOST

FIT_PARAMS = find_fit_params()
needs_the_tool = pytest.mark.skipif(FIT_PARAMS is None, reason="no llama-fit-params on this machine")

RECORDED = [
    ("llama-3.2-1b", "-c 8192 -np 1", 727, 256),
    ("llama-3.1-8b", "-c 32768 -np 1", 4566, 4096),
    ("llama-3.1-8b-q8", "-c 16384 -np 4", 8137, 2048),
    ("llama-2-7b", "-c 5000 -np 3", 3680, 2688),
    ("mistral-nemo-12b", "-c 8192 -np 1 -ctk q8_0 -ctv q8_0", 6901, 680),
    ("mixtral-8x7b", "-c 8192 -np 2 -ctk q8_0 -ctv q4_0", 25122, 416),
    ("smollm2-135m", "-c 16384 -np 1 --swa-full", 123, 360),
    ("nemotron-49b", "-c 16384 -np 1 -ub 2048", 4625, 1536),
    ("nemotron-49b", "-c 8192 -np 1 -fa off", 4625, 1024),
    ("qwen2.5-0.5b", "-c 8192 -np 1 -fa off", 450, 96),
    ("qwen2.5-7b", "-np 1", 4354, 1792),
    ("qwen3-0.6b", "-c 8192 -np 1", 358, 896),
    ("qwen3-8b", "-c 32768 -np 1", 4700, 4608),
    ("qwen3-30b-a3b", "-c 16384 -np 4", 16573, 1536),
    ("gemma-2-9b", "-c 5000 -np 3", 5185, 1764),
    ("gemma-3-1b", "-c 8192 -np 1 -ctk q8_0 -ctv q8_0", 900, 28),
    ("gemma-3-12b", "-c 8192 -np 2 -ctk q8_0 -ctv q4_0", 6561, 598),
    ("gemma-3-27b", "-c 16384 -np 1 --swa-full", 14839, 7936),
    ("phi-3-mini", "-c 16384 -np 1 -ub 2048", 2098, 6144),
    ("glm-4.5-air", "-c 8192 -np 2 -ctk q8_0 -ctv q4_0", 73691, 598),
    ("gpt-oss-20b", "-c 8192 -np 1 -fa off", 11213, 210),
    ("deepseek-v2-lite", "-c 32768 -np 1", 10767, 972),
    ("deepseek-v3", "-c 16384 -np 4", 361018, 1098),
    ("deepseek-v3.2", "-c 65536 -np 3", 361475, 5409),
    ("glm-5", "-c 8192 -np 1 -ctk q8_0 -ctv q8_0", 397359, 455),
    ("deepseek-v4-flash", "-c 65536 -np 3", 153053, 579),
    ("deepseek-v4-flash", "-c 8192 -np 1 -ctk q8_0 -ctv q8_0", 153053, 59),
    ("minimax-m3", "-c 5000 -np 3", 229371, 779),
    ("glm-5.3-flash", "-c 16384 -np 1 --swa-full", 76386, 453),
    ("llama-4-scout", "-c 32768 -np 1", 58335, 2760),
    ("command-r7b", "-c 16384 -np 4", 4564, 2048),
    ("olmo-3-32b", "-c 5000 -np 3", 17547, 1344),
    ("mamba-130m", "-c 8192 -np 1 -ctk q8_0 -ctv q8_0", 84, 2),
    ("mamba-2.8b", "-c 8192 -np 2 -ctk q8_0 -ctv q4_0", 1566, 47),
    ("codestral-mamba-7b", "-c 16384 -np 1 --swa-full", 3987, 263),
    ("jamba-3b", "-c 16384 -np 1 -ub 2048", 1689, 73),
    ("granite-4-tiny", "-c 8192 -np 1 -fa off", 3775, 119),
    ("nemotron-nano-9b", "-np 1", 8378, 2186),
    ("qwen3-next-80b", "-c 8192 -np 1", 43063, 267),
    ("falcon-h1-1.5b", "-c 32768 -np 1", 3264, 1297),
    ("lfm2-1.2b", "-c 16384 -np 4", 1211, 192),
]

LOGGED = [
    # model, flags, KV, recurrent state, compute buffer
    ("qwen3-0.6b", "-c 8192", 896.00, 0.0, 36.02),
    ("qwen3-0.6b", "-c 32768", 3584.00, 0.0, 60.02),
    ("gemma-3-1b", "-c 8192", 32.00 + 55.00, 0.0, 62.28),
    ("gemma-3-1b", "-c 8192 -np 2 -no-kvu", 32.00 + 44.00, 0.0, 56.78),
    ("llama-3.2-1b", "-c 8192", 256.00, 0.0, 76.02),
    ("qwen2.5-0.5b", "-c 8192 -ub 2048", 96.00, 0.0, 181.07),
    ("phi-3-mini", "-c 8192 -np 1", 3072.00, 0.0, 86.02),
    ("deepseek-v2-lite", "-c 8192 -np 1", 243.00, 0.0, 92.14),
    ("lfm2-1.2b", "-c 8192", 96.00, 0.62, 76.02),
    ("mamba-130m", "-c 8192", 0.0, 10.69, 22.95),
    ("codestral-mamba-7b", "-c 8192 -np 1", 0.0, 263.50, 132.38),
    ("jamba-3b", "-c 8192 -np 1", 32.0, 9.65, 83.39),
    ("granite-4-tiny", "-c 8192 -np 1", 64.0, 55.37, 59.02),
    ("falcon-h1-1.5b", "-c 8192 -np 1", 288.0, 145.90, 76.02),
]


COMPUTED = [
    # model, flags, compute buffer: of sparse attention, as `llama-fit-params` prints it
    ("deepseek-v3.2", "-c 65536 -np 1", 906),
    ("deepseek-v3.2", "-c 8192 -np 1 -fa off", 2722),
    ("glm-5", "-c 65536 -np 1", 788),
    ("deepseek-v4-flash", "-c 65536 -np 1", 347),
    ("deepseek-v4-flash", "-c 8192 -np 1 -fa off", 621),
    ("minimax-m3", "-c 65536 -np 1", 1308),
    ("glm-5.3-flash", "-c 65536 -np 1", 431),
    ("glm-5.3-flash", "-c 65536 -np 1 -ub 128", 169),
]


def header_of(name: str) -> GGUF:
    return gguf.parse(MODELS[name].header(), file_bytes=MODELS[name].file_bytes())


def need(name: str, flags: str, gpus: int = 0, **others: Any) -> Footprint:
    return footprint.estimate(header_of(name), Flags(flags.split()), gpus=gpus, **others)


@pytest.mark.parametrize(("model", "flags", "weights", "context"), RECORDED)
def test_weights_and_context_are_what_the_engine_says(model: str, flags: str, weights: int, context: int) -> None:
    ours = by_formula(header_of(model), flags.split())

    assert ours is not None
    assert 0 <= ours.weights - weights < 1.01
    assert 0 <= ours.context - context < 1.01


@pytest.mark.parametrize(("model", "flags", "compute"), COMPUTED)
def test_sparse_attention_computes_with_what_the_engine_says(model: str, flags: str, compute: int) -> None:
    ours = by_formula(header_of(model), flags.split())

    assert ours is not None
    assert ours.compute == pytest.approx(compute, rel=0.1)


@pytest.mark.parametrize(("model", "flags", "kv", "recurrent", "compute"), LOGGED)
def test_a_server_needs_what_its_log_says(
    model: str, flags: str, kv: float, recurrent: float, compute: float
) -> None:
    host = need(model, flags).devices[HOST]

    assert (host.kv, host.recurrent) == pytest.approx((kv, recurrent), abs=0.01)
    assert host.compute == pytest.approx(compute, rel=0.15)


@needs_the_tool
def test_the_installed_engine_says_the_same() -> None:
    assert FIT_PARAMS is not None
    errors = [one.error for one in compare(FIT_PARAMS, flags=FLAGS[2:3])]

    assert len(errors) >= 40
    assert statistics.median(errors) <= 0.02
    assert percentile(errors, 0.95) <= 0.08


class TestPlacement:
    def test_without_gpus_everything_is_on_the_host(self) -> None:
        assert set(need("llama-3.1-8b", "-c 8192 -ngl 99").devices) == {HOST}

    def test_the_last_layers_go_to_the_gpu_first_and_the_input_embedding_never(self) -> None:
        half = need("llama-3.1-8b", "-c 8192 -ngl 17", gpus=1).devices
        all_of_it = need("llama-3.1-8b", "-c 8192", gpus=1).devices
        embedding = 128256 * 4096 * 210 / 256 / footprint.MIB

        assert half[SHOWN0].kv == half[HOST].kv == 512
        assert half[SHOWN0].weights - half[HOST].weights == pytest.approx(0, abs=1)  # output there, input here
        assert all_of_it[HOST].weights == pytest.approx(embedding)
        assert all_of_it[HOST].kv == 0

    def test_a_tied_embedding_is_on_both_sides(self) -> None:
        there = need("qwen3-4b", "-c 8192", gpus=1).devices
        here = need("qwen3-4b", "-c 8192").devices[HOST]

        assert there[SHOWN0].weights == pytest.approx(here.weights)
        assert there[HOST].weights == pytest.approx(151936 * 2560 * 210 / 256 / footprint.MIB)

    def test_a_tied_embedding_that_the_processor_repacks_is_there_twice(self, tmp_path: Path) -> None:
        header = gguf.read(write_llama(tmp_path / "tied.gguf", n_vocab=1024, quantization="Q4_0", tied=True))
        (embedding,) = (tensor.nbytes for tensor in header.tensors if tensor.name == "token_embd.weight")
        weights = {
            flag: footprint.estimate(header, Flags(flag.split()), gpus=0).devices[HOST].weights * footprint.MIB
            for flag in ("", "--no-repack", "--load-mode mmap+mlock", "--mlock")
        }
        assert weights[""] - weights["--no-repack"] == embedding
        assert weights["--no-repack"] == sum(tensor.nbytes for tensor in header.tensors)
        layers = sum(tensor.nbytes for tensor in header.tensors if tensor.type == "Q4_0") - embedding
        assert weights["--mlock"] - weights[""] == layers, "what is locked cannot be dropped once it is copied"
        assert weights["--load-mode mmap+mlock"] == weights["--mlock"]

    def test_experts_stay_on_the_host_when_told_to(self) -> None:
        all_experts = need("qwen3-30b-a3b", "-c 8192 --cpu-moe", gpus=1)
        by_pattern = need("qwen3-30b-a3b", "-c 8192 -ot exps=CPU", gpus=1)
        half = need("qwen3-30b-a3b", "-c 8192 --n-cpu-moe 24", gpus=1)
        none = need("qwen3-30b-a3b", "-c 8192 --n-cpu-moe 0", gpus=1)

        experts = none.devices[SHOWN0].weights - all_experts.devices[SHOWN0].weights
        assert experts == pytest.approx(48 * 3 * 128 * 768 * 2048 * 144 / 256 / footprint.MIB)
        assert none.devices[SHOWN0].weights - half.devices[SHOWN0].weights == pytest.approx(experts / 2)
        assert by_pattern.devices == all_experts.devices

    def test_a_split_gives_each_gpu_its_part_of_the_layers(self) -> None:
        three_to_one = need("qwen3-30b-a3b", "-c 8192 -ts 3,1", gpus=2).devices
        only_second = need("qwen3-30b-a3b", "-c 8192 -sm none -mg 1", gpus=2).devices

        assert (three_to_one[SHOWN0].kv, three_to_one[SHOWN1].kv) == (37 * 16, 11 * 16)
        assert only_second[SHOWN1].kv == 768
        assert SHOWN0 not in only_second

    def test_the_cache_stays_on_the_host_when_told_to(self) -> None:
        devices = need("llama-3.1-8b", "-c 8192 -nkvo", gpus=1).devices

        assert (devices[SHOWN0].kv, devices[HOST].kv) == (0, 1024)

    def test_without_flash_attention_the_cpu_has_the_scores_of_a_full_context_twice(self) -> None:
        heads, context, batch, half = 32, 8192, 512, 2
        scores = heads * context * batch * half / footprint.MIB
        assert need("qwen3-8b", "-c 8192 -fa off").devices[HOST].work == scores
        assert need("qwen3-8b", "-c 8192").devices[HOST].work == 0
        assert need("qwen3-8b", "-c 8192 -fa off", gpus=1).devices[HOST].work == 0

    def test_no_device_means_the_host(self) -> None:
        assert set(need("llama-3.1-8b", "-c 8192 -dev none", gpus=2).devices) == {HOST}


class TestContext:
    def test_one_flag_or_the_other_or_the_files_own_sets_it(self) -> None:
        assert need("qwen3-8b", "-c 5000").context == 5120
        assert need("qwen3-8b", "-np 3 --kv-unified-per-slot 1000").context == 3 * 1024
        assert need("qwen3-8b", "").context == 40960

    def test_slots_that_do_not_share_have_a_cache_each(self) -> None:
        """300 tokens for each of three are rounded up to 512 three times, for all together once."""
        assert need("qwen3-8b", "-c 900 -np 3").context == 3 * 512
        assert need("qwen3-8b", "-c 900 -np 3 -kvu").context == 1024

    def test_the_largest_that_fits_fits_and_the_next_does_not(self) -> None:
        header, flags = header_of("qwen3-8b"), Flags([])
        largest = footprint.largest_context(header, flags, {HOST: 8000})

        assert 0 < largest < 40960
        assert need("qwen3-8b", f"-c {largest}").mib()[HOST] <= 8000
        assert need("qwen3-8b", f"-c {largest + 256}").mib()[HOST] > 8000

    def test_no_context_fits_where_the_weights_do_not(self) -> None:
        assert footprint.largest_context(header_of("qwen3-8b"), Flags([]), {HOST: 4000}) == 0

    def test_every_device_must_have_room(self) -> None:
        header, free = header_of("qwen3-8b"), {SHOWN0: 8000, HOST: 8000}

        assert footprint.largest_context(header, Flags([]), free) > 0
        assert footprint.largest_context(header, Flags([]), {**free, HOST: 100}) == 0

    def test_nobody_gets_more_than_the_model_was_trained_for(self) -> None:
        assert footprint.largest_context(header_of("qwen3-0.6b"), Flags([]), {HOST: 10**6}) == 40960


class TestCompanions:
    def test_a_projector_counts_its_tensors_and_its_work(self, tmp_path: Path) -> None:
        projector = gguf.read(write_projector(tmp_path / "mmproj.gguf"))
        share = need("gemma-3-4b", "-c 8192", gpus=1, projector=projector).devices[SHOWN0].projector
        on_host = need("gemma-3-4b", "-c 8192 --no-mmproj-offload", gpus=1, projector=projector).devices

        assert share == pytest.approx(
            1024 + 64 * 64 * 2 / footprint.MIB
        )  # it does not say how large its pictures are
        assert (on_host[SHOWN0].projector, on_host[HOST].projector) == (0, share)

    def test_a_large_picture_takes_room(self) -> None:
        keys = {"image_size": 896, "patch_size": 14, "embedding_length": 1152, "feed_forward_length": 4304}
        metadata = {f"vision.{key}": value for key, value in keys.items()} | {"vision.attention.head_count": 16}
        siglip = Blueprint("clip", metadata, {"v.blk.0.ffn_up.weight": (1152, 4304)}, "F16")
        header = gguf.parse(siglip.header(), file_bytes=siglip.file_bytes())

        assert need("gemma-3-4b", "-c 8192", projector=header).devices[HOST].projector > 1024

    def test_a_draft_has_weights_and_a_cache_of_the_same_length_with_types_of_its_own(self) -> None:
        alone = need("qwen3-8b", "-c 8192").devices[HOST]
        draft = need("qwen3-0.6b", "-c 8192 -ctk q8_0 -ctv q8_0").devices[HOST]
        both = need("qwen3-8b", "-c 8192 -ctkd q8_0 -ctvd q8_0", draft=header_of("qwen3-0.6b")).devices[HOST]

        assert both == alone + draft

    def test_a_draft_may_live_elsewhere(self) -> None:
        devices = need("qwen3-8b", "-c 8192 -ngld 0", gpus=1, draft=header_of("qwen3-0.6b")).devices

        assert devices[SHOWN0].weights == need("qwen3-8b", "-c 8192", gpus=1).devices[SHOWN0].weights
        assert devices[HOST].kv == 896

    @pytest.mark.parametrize(
        ("flags", "mib"), [("", 8192), ("-cram 100", 100), ("-cram 0", 0), ("-cram -1", None)]
    )
    def test_the_prompt_cache_is_named_apart(self, flags: str, mib: int | None) -> None:
        assert need("qwen3-8b", f"-c 8192 {flags}").host_cache_mib == mib


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["-c", "lots"], "-c takes a whole number"),
        (["-c", "-5"], "-c must be between 0"),
        (["-ctk", "q9"], "-ctk takes a type like f16"),
        (["-ot", "blk.(=CPU"], "not a regular expression"),
        (["-ts", "a,b"], "-ts takes numbers"),
        (["-ctv", "q8_0", "-fa", "off"], "-ctv cannot be q8_0: a quantized V cache needs flash attention"),
        (["-ctk", "q4_K"], "-ctk cannot be q4_K: it packs 256 numbers at a time, and a head has 128"),
    ],
)
def test_a_flag_that_makes_no_sense_is_named(flags: list[str], problem: str) -> None:
    with pytest.raises(FlagError, match=problem):
        footprint.estimate(header_of("qwen3-8b"), Flags(flags), gpus=2)


KEYS = [
    "block_count", "embedding_length", "context_length", "nextn_predict_layers", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.sliding_window", "full_attention_interval",
    "attention.sliding_window_pattern", "ssm.state_size", "ssm.conv_kernel", "feed_forward_length",
    "attention.indexer.key_length", "attention.indexer.head_count", "attention.indexer.top_k",
    "attention.indexer.kpool", "attention.compress_ratios", "attention.indexer.types", "hyper_connection.count",
    "ple.layers", "ple.conv_kernel", "ple.ngram_size",
]  # fmt: skip
VALUES = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda number: ("u32", number)),
    st.integers(-(2**63), 2**63 - 1).map(lambda number: ("i64", number)),
    st.floats(width=32).map(lambda number: ("f32", number)),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9).map(lambda numbers: ("[i32]", numbers)),
    st.just(("str", "many")),
)
ARCHITECTURES = [
    "llama", "gemma3", "gemma3n", "gemma4", "exaone4", "jamba", "qwen3next", "lfm2", "mamba", "bert",
    "nemotron_h", "deepseek32", "deepseek4", "glm5-next", "hy_v4", "minimax-m3", "qwen4exp",
]  # fmt: skip


@given(st.sampled_from(ARCHITECTURES), st.dictionaries(st.sampled_from(KEYS), VALUES))
@settings(deadline=2000)
def test_a_file_may_say_anything(architecture: str, said: dict[str, tuple[str, Any]]) -> None:
    keys = [(f"{architecture}.{key}", kind, value) for key, (kind, value) in said.items()]
    raw = gguf_bytes([("general.architecture", "str", architecture), *keys])
    header = gguf.parse(raw, file_bytes=len(raw))

    found = footprint.estimate(header, Flags([]), gpus=2)
    largest = footprint.largest_context(header, Flags([]), {SHOWN0: 1000, SHOWN1: 1000, HOST: 1000})

    assert all(mib >= 0 for mib in found.mib().values())
    assert largest >= 0


class TestFitParams:
    """Stand-ins for the tool are small scripts; the real one is asked where there is one."""

    @staticmethod
    def tool(folder: Path, script: str) -> fit_params.FitParams:
        server = folder / "llama-server"
        server.touch()
        path = folder / "llama-fit-params"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        found = fit_params.beside(server)
        assert found is not None
        return found

    @pytest.fixture
    def model(self, tmp_path: Path) -> GGUF:
        return gguf.read(MODELS["gemma-3-1b"].write(tmp_path / "model.gguf"))

    def test_a_server_without_the_tool_has_none(self, tmp_path: Path) -> None:
        assert fit_params.beside(tmp_path / "llama-server") is None

    def test_it_is_asked_with_the_flags_it_knows(self, tmp_path: Path, model: GGUF) -> None:
        tool = self.tool(tmp_path, f'echo "$@" > {tmp_path}/asked; echo "Host 900 60 600"')
        flags = Flags(["-c", "8000", "--jinja", "-np", "2", "-ctk", "q8_0"], {"LLAMA_ARG_UBATCH": "256"})

        assert tool.footprint(model, flags) is not None

        asked = (tmp_path / "asked").read_text().split()
        assert " ".join(asked[2:]) == (
            "--fit-print on --no-repack --ubatch-size 256 --cache-type-k q8_0 --ctx-size 8192 --parallel 2"
        )

    def test_it_is_asked_once_per_file_and_flags(self, tmp_path: Path, model: GGUF) -> None:
        tool = self.tool(tmp_path, f'echo x >> {tmp_path}/asked; echo "Host 900 60 600"')

        for flags in (["-c", "4096"], ["-c", "4096"], ["-c", "8192"]):
            tool.footprint(model, Flags(flags))
        assert model.path is not None
        os.utime(model.path, ns=(1, 1))
        tool.footprint(model, Flags(["-c", "8192"]))

        assert (tmp_path / "asked").read_text().count("x") == 3

    @pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"])
    def test_what_it_says_holds_for_the_gpus_it_was_shown(
        self, tmp_path: Path, model: GGUF, variable: str
    ) -> None:
        tool = self.tool(tmp_path, f'[ "${variable}" = -1 ] || echo GPU0 500 30 600; echo Host 300 0 20')

        shown = [
            tool.footprint(model, Flags(["-c", "8192"]), environ=environ)
            for environ in ({variable: "-1"}, {variable: "0"}, {})
        ]

        assert [found and list(found.devices) for found in shown] == [[HOST], [SHOWN0, HOST], [SHOWN0, HOST]]

    def test_gpus_come_in_their_order(self, tmp_path: Path, model: GGUF) -> None:
        tool = self.tool(tmp_path, "echo CUDA0 500 30 600; echo CUDA1 300 57 600; echo Host 300 0 20")

        found = tool.footprint(model, Flags(["-c", "8192", "-np", "1"]))

        assert found is not None
        assert [(name, share.weights) for name, share in found.devices.items()] == [
            (SHOWN0, 500),
            (SHOWN1, 300),
            (HOST, 300),
        ]

    @pytest.mark.parametrize(
        ("script", "reason"),
        [
            ("echo 'error: unknown model architecture' >&2; exit 1", "unknown model architecture"),
            ("echo 'Host much more than that'", "Host much more than that"),
            ("exit 0", "output: none"),
            ("kill -9 $$", "exit code -9"),
            (
                "echo '0.1 E refuses: a type' >&2; echo '[Inferior 1 detached]' >&2; kill -6 $$",
                "output: 0.1 E refuses",
            ),
            ("exec sleep 60", "no answer within 0.5 s"),
        ],
    )
    def test_what_it_cannot_tell_is_said_in_the_log(
        self, tmp_path: Path, model: GGUF, caplog: pytest.LogCaptureFixture, script: str, reason: str
    ) -> None:
        tool = self.tool(tmp_path, script)
        tool.timeout_sec = 0.5

        assert tool.footprint(model, Flags(["-c", "8192"])) is None
        assert reason in caplog.text

    def test_what_it_could_not_tell_it_is_asked_again_later(self, tmp_path: Path, model: GGUF) -> None:
        free = tmp_path / "free"
        tool = self.tool(tmp_path, f"echo x >> {tmp_path}/asked; [ -e {free} ] && echo Host 900 60 600")
        for _ in range(2):
            assert tool.footprint(model, Flags(["-c", "8192"])) is None
        assert (tmp_path / "asked").read_text().count("x") == 1, "not at once"
        free.touch()
        tool.retry_sec = 0
        assert tool.footprint(model, Flags(["-c", "8192"])) is not None

    def test_one_question_in_vain_is_enough_where_it_hangs(self, tmp_path: Path, model: GGUF) -> None:
        tool = self.tool(tmp_path, f"echo x >> {tmp_path}/asked; exec sleep 60")
        tool.timeout_sec = 0.3
        for context in ("4096", "8192", "16384"):
            assert tool.footprint(model, Flags(["-c", context])) is None
        assert (tmp_path / "asked").read_text().count("x") == 1

    @needs_the_tool
    @pytest.mark.parametrize(
        "flags", ["-c 8192", "-c 8192 -np 2", "-c 8192 -np 3 -kvu -ctk q8_0", "-c 4096 -np 1"]
    )
    @pytest.mark.parametrize("name", ["gemma-3-1b", "granite-4-tiny", "qwen3-0.6b"])
    def test_corrected_it_agrees_with_the_formulas(self, tmp_path: Path, name: str, flags: str) -> None:
        """Both know the slots that share a cache, which the tool has never heard of."""
        assert FIT_PARAMS is not None
        model = gguf.read(MODELS[name].write(tmp_path / "model.gguf"))

        said = fit_params.FitParams(FIT_PARAMS).footprint(model, Flags(flags.split()))
        ours = footprint.estimate(model, Flags(flags.split()), gpus=0)

        assert said is not None
        assert said.devices[HOST].total == pytest.approx(ours.devices[HOST].total, rel=0.01)


def test_a_model_that_is_really_there_is_counted_to_the_byte(tmp_path: Path) -> None:
    header = gguf.read(write_llama(tmp_path / "tiny.gguf"))
    host = footprint.estimate(header, Flags(["-c", "512", "-np", "1"]), gpus=0).devices[HOST]

    assert host.weights * footprint.MIB == sum(tensor.nbytes for tensor in header.tensors)
    assert host.kv * footprint.MIB == 512 * 2 * 2 * 64 * 2
    assert host == Share(weights=host.weights, kv=host.kv, compute=host.compute)


# --- every architecture ------------------------------------------------------------------------------------------

EVERY_ARCHITECTURE = json.loads(Path(__file__).with_name("archs_11434.json").read_text())
"""Models that llama.cpp's own `test-llama-archs -o DIR` writes (build 11434): what of their headers decides about
memory, and what `llama-fit-params` of that build says of context and compute buffer with each of the flags. It
drops fractions. `-best`: with 2,048 for what an indexer picks, as is usual; those models say 131,072."""


def of_architecture(name: str, flags: str) -> Share:
    metadata = {
        key: tuple(v) if isinstance(v, list) else v for key, v in EVERY_ARCHITECTURE[name]["metadata"].items()
    }
    header = GGUF(None, 3, "little", metadata, (), (), 0, ())
    return footprint.estimate(header, Flags(flags.split()), gpus=0).devices[HOST]


@pytest.mark.parametrize("name", EVERY_ARCHITECTURE)
def test_the_context_of_every_architecture_is_what_the_engine_says(name: str) -> None:
    for flags, (context, _) in EVERY_ARCHITECTURE[name]["said"].items():
        host = of_architecture(name, flags)
        assert host.kv + host.recurrent == pytest.approx(context + 0.5, abs=0.6), flags


@pytest.mark.parametrize("name", EVERY_ARCHITECTURE)
def test_no_architecture_computes_with_much_more_or_less(name: str) -> None:
    for flags, (_, compute) in EVERY_ARCHITECTURE[name]["said"].items():
        ours = of_architecture(name, f"{flags} --embedding").compute
        assert ours >= 0.8 * compute - 3, flags
        if not (name.startswith("minimax-m3") and flags.endswith("-np 3")):  # see `selection.py`: the tool divides
            assert ours <= 1.3 * compute + 8, flags


def test_summaries_belong_to_one_slot_each_also_where_slots_share_a_cache() -> None:
    """As the log of `llama-server -c 16384` says, with its four slots."""
    host = of_architecture("deepseek4-moe", "-c 16384")
    assert host.kv == 1.5 + 2 + 0.125 + 4
    assert host.recurrent == pytest.approx(0.34, abs=0.01)


def test_who_shares_a_cache_attends_to_all_of_it_in_minimax_m3() -> None:
    """As that log says: 20 MiB. Where slots do not share one, each group of heads has a mask of its own."""
    shared, apart = (of_architecture("minimax-m3-moe", f"-c 16384 {slots}").compute for slots in ("", "-np 1"))
    assert shared == pytest.approx(20, rel=0.2)
    assert apart > 5 * shared


def test_grok_computes_without_flash_attention_whatever_its_flag_says() -> None:
    on, off = (of_architecture("grok-moe", f"-c 8192 -np 1 -fa {state}") for state in ("on", "off"))
    assert on == off
    assert on.compute == pytest.approx(52, rel=0.1)  # as llama-fit-params says


def test_a_quantized_v_is_nothing_for_grok() -> None:
    assert of_architecture("grok-moe", "-c 8192 -ctk q8_0").kv
    with pytest.raises(FlagError, match="needs flash attention, which grok does not have"):
        of_architecture("grok-moe", "-c 8192 -ctv q8_0")
