"""Stories about model folders of the Hugging Face hub: whole, partial, quantized, of many families, hostile."""

from __future__ import annotations

import contextlib
import json
import os
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import examples
from hf_models import LLAMA, LLAMA_PARAMETERS, LLAMA_TENSORS, Tensors, header, write_model, write_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.formats import hf_cache, safetensors
from router.formats.hf_model import HfModel, Unreadable, read

BF16: Tensors = {"weight": ("BF16", (1,))}


def test_a_folder_says_what_its_model_is(tmp_path: Path) -> None:
    model = read(write_model(tmp_path))

    assert (model.architecture, model.model_type, model.dtype) == ("LlamaForCausalLM", "llama", "bfloat16")
    assert (model.parameters, model.weight_bytes) == (LLAMA_PARAMETERS, 2 * LLAMA_PARAMETERS)
    assert (model.vocabulary_bytes, model.width) == (2 * 259 * 64, 64)
    assert (model.context, model.layers, model.quantization) == (2048, 2, None)
    assert model.has_chat_template
    assert model.files == (tmp_path / "model.safetensors",)


def test_a_model_in_several_files_is_all_of_them(tmp_path: Path) -> None:
    whole = read(write_model(tmp_path / "whole"))
    split = read(write_model(tmp_path / "split", shards=3))

    assert len(split.files) == 3
    assert (split.weight_bytes, split.parameters) == (whole.weight_bytes, whole.parameters)


def test_files_are_read_again_once_they_have_changed(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    first = read(folder)
    assert read(folder) is first
    write_model(folder, {**LLAMA, "max_position_embeddings": 4096})
    assert read(folder).context == 4096
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == "has no weights in safetensors format"


def test_a_copy_in_another_format_does_not_count(tmp_path: Path) -> None:
    folder = write_model(tmp_path, shards=2)
    write_weights(folder / "consolidated.safetensors", LLAMA_TENSORS)

    assert read(folder).weight_bytes == 2 * LLAMA_PARAMETERS


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_may_be_a_file_of_its_own(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path, chat_template=None)
    assert not read(folder).has_chat_template

    (folder / name).write_text("{{ messages }}")
    assert read(folder).has_chat_template


def test_the_masks_of_gpt2_are_not_loaded(tmp_path: Path) -> None:
    tensors: Tensors = {
        "h.0.attn.bias": ("F32", (1, 1, 1024, 1024)),
        "h.0.attn.c_attn.bias": ("F32", (2304,)),
        "h.0.attn.c_attn.weight": ("F32", (768, 2304)),
    }
    model = read(write_model(tmp_path, {"model_type": "gpt2"}, tensors))

    assert (model.weight_bytes, model.dtype) == (4 * (2304 + 768 * 2304), "float32")


# --- what is cached of each token -----------------------------------------------------------------------


def of_config(folder: Path, config: Mapping[str, Any], tensors: Tensors = BF16) -> HfModel:
    return read(write_model(folder, config, tensors))


FAMILIES: Mapping[str, tuple[Mapping[str, Any], int]] = {
    # Numbers are those of the models' own config.json on the hub.
    "Llama 3.1 8B": (
        {
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "hidden_size": 4096,
        },
        131_072,
    ),
    "Llama 2 7B, in which every head has keys of its own": (
        {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096},
        524_288,
    ),
    "Qwen3 0.6B, whose heads are wider than its width by their number": (
        {
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "hidden_size": 1024,
            "head_dim": 128,
        },
        114_688,
    ),
    "GPT-2": ({"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}, 36_864),
    "GPT-Neo 125M": (
        {"model_type": "gpt_neo", "num_layers": 12, "num_heads": 12, "hidden_size": 768, "window_size": 256},
        36_864,
    ),
    "Falcon 7B, with one head of keys": (
        {
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "num_kv_heads": 71,
            "hidden_size": 4544,
            "multi_query": True,
            "new_decoder_architecture": False,
        },
        8_192,
    ),
    "ChatGLM 3 6B": (
        {
            "num_layers": 28,
            "num_attention_heads": 32,
            "hidden_size": 4096,
            "kv_channels": 128,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
        },
        28_672,
    ),
    "MPT": ({"n_layers": 2, "n_heads": 4, "d_model": 64, "attn_config": {"kv_n_heads": 1}}, 2 * 2 * 16 * 2),
    "OpenELM, each layer with another number": (
        {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64, "num_kv_heads": [3, 5]},
        8 * 2 * 64 * 2,
    ),
    "Gemma 4, whose full layers have wider heads": (
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "layer_types": ["sliding_attention", "full_attention"],
            "per_layer_config": {"01": {"head_dim": 512}},
        },
        2 * 4 * (256 + 512) * 2,
    ),
    "DeepSeek-V3, which caches latent vectors": (
        {
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "hidden_size": 7168,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
        },
        70_272,
    ),
    "Qwen3-Next, three of four layers without": (
        {
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "full_attention_interval": 4,
        },
        24_576,
    ),
    "Jamba": (
        {
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "hidden_size": 4096,
            "attn_layer_period": 8,
            "attn_layer_offset": 4,
        },
        16_384,
    ),
    "Nemotron-H": (
        {"num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8, "hybrid_override_pattern": "M-*M"},
        2 * 4 * 8 * 2,
    ),
    "Granite 4, hybrid": (
        {
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "hidden_size": 32,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
        },
        2 * 4 * 8 * 2,
    ),
    "Gemma 3n, whose last layers share": (
        {
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "hidden_size": 32,
            "num_kv_shared_layers": 3,
        },
        2 * 4 * 8 * 2,
    ),
    "Mamba": ({"model_type": "mamba", "num_hidden_layers": 24, "hidden_size": 768}, 0),
    "BERT": (
        {"model_type": "bert", "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768},
        0,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_of_models_caches_in_its_own_way(tmp_path: Path, family: str) -> None:
    config, expected = FAMILIES[family]
    assert of_config(tmp_path, config).kv_bytes_per_token() == expected


def test_the_type_of_the_cache_may_be_another(tmp_path: Path) -> None:
    model = read(write_model(tmp_path))
    # Two layers, two heads of keys and of values, 16 wide.
    assert model.kv_bytes_per_token() == model.kv_bytes_per_token("auto") == 2 * 2 * 2 * 16 * 2
    assert model.kv_bytes_per_token("float32") == 2 * 2 * 2 * 16 * 4
    assert model.kv_bytes_per_token("fp8_e4m3") == 2 * 2 * 2 * 16
    assert model.kv_bytes_per_token("a type of tomorrow") is None


SLIDING: Mapping[str, tuple[Mapping[str, Any], tuple[int | None, ...]]] = {
    "Mistral 7B 0.1": ({"sliding_window": 4096}, (4096,) * 6),
    "Qwen2.5, where it is off": (
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 2},
        (None,) * 6,
    ),
    "Qwen2.5, where it is on": (
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 4},
        (None, None, None, None, 4096, 4096),
    ),
    "Gemma 2": ({"model_type": "gemma2", "sliding_window": 4096}, (4096, None) * 3),
    "Gemma 3": ({"model_type": "gemma3_text", "sliding_window": 1024}, (1024,) * 5 + (None,)),
    "Cohere 2": ({"sliding_window": 64, "sliding_window_pattern": 3}, (64, 64, None) * 2),
    "EXAONE 4": ({"sliding_window": 64, "sliding_window_pattern": "LLG"}, (64, 64, None) * 2),
    "gpt-oss": (
        {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 3},
        (128, None) * 3,
    ),
    "Llama 4": ({"attention_chunk_size": 8192, "no_rope_layers": []}, (8192, 8192, 8192, None, 8192, 8192)),
}


@pytest.mark.parametrize("family", SLIDING)
def test_layers_with_a_window_cache_no_more_than_it(tmp_path: Path, family: str) -> None:
    config, windows = SLIDING[family]
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 1, "head_dim": 1}
    model = of_config(tmp_path, {**sizes, **config})

    assert model.caches is not None
    assert tuple(cache.window for cache in model.caches) == windows
    assert model.kv_bytes_per_token() == 6 * 2 * 2
    assert model.kv_bytes(10_000) == sum(min(10_000, window or 10_000) for window in windows) * 2 * 2
    ahead = sum(min(10_000, (window or 10_000) + 512) for window in windows) * 2 * 2
    assert model.kv_bytes(10_000, ahead=512) == ahead


def test_the_shapes_of_weights_tell_what_a_nested_configuration_leaves_out(tmp_path: Path) -> None:
    """As in Gemma 3 4B, whose text_config names neither heads nor their width."""
    config = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 2},
        "vision_config": {"num_attention_heads": 16, "hidden_size": 1152, "num_hidden_layers": 27},
        "torch_dtype": "bfloat16",
    }
    tensors: Tensors = {
        **{
            f"language_model.model.layers.{layer}.self_attn.{name}_proj.weight": ("BF16", (1024, 2560))
            for layer in range(2)
            for name in "kv"
        },
        "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight": ("BF16", (1152, 1152)),
    }
    model = of_config(tmp_path, config, tensors)

    assert (model.layers, model.kv_bytes_per_token()) == (2, 2 * 2 * 1024 * 2)


@pytest.mark.parametrize(
    "config",
    [{}, {"num_hidden_layers": 2}, {"num_hidden_layers": 2, "head_dim": 64, "compress_ratios": [4, 128]}],
)
def test_what_is_cached_by_an_unknown_architecture_is_unknown(tmp_path: Path, config: dict[str, Any]) -> None:
    assert of_config(tmp_path, config).kv_bytes_per_token() is None


# --- context and quantization ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024, "n_ctx": 1024}, 1024),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16_384),
        ({"max_position_embeddings": 163_840, "rope_scaling": {"type": "yarn", "factor": 40}}, 163_840),
        ({"max_position_embeddings": 131_072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131_072),
        ({"text_config": {"max_position_embeddings": 131_072}}, 131_072),
        ({"model_type": "mamba"}, None),
    ],
)
def test_the_context_is_that_of_the_configuration(
    tmp_path: Path, config: dict[str, Any], context: int | None
) -> None:
    assert of_config(tmp_path, config).context == context


QUANTIZED: Mapping[str, tuple[Mapping[str, Any], Tensors, int]] = {
    "awq": (
        {"quant_method": "awq", "bits": 4},
        {
            "q.qweight": ("I32", (64, 8)),
            "q.qzeros": ("I32", (1, 8)),
            "q.scales": ("F16", (1, 64)),
            "norm.weight": ("F16", (64,)),
        },
        4,
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 8},
        {"q.qweight": ("I32", (16, 64)), "q.g_idx": ("I32", (64,)), "norm.weight": ("F16", (64,))},
        8,
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {
            "q.weight": ("U8", (2048, 1)),
            "q.weight.absmax": ("U8", (64,)),
            "q.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
            "norm.weight": ("F16", (64,)),
        },
        4,
    ),
    "fp8": (
        {"quant_method": "fp8"},
        {
            "q.weight": ("F8_E4M3", (64, 64)),
            "q.weight_scale_inv": ("F32", (1, 1)),
            "norm.weight": ("BF16", (64,)),
        },
        8,
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
        {
            "q.weight_packed": ("I32", (64, 8)),
            "q.weight_scale": ("BF16", (64, 1)),
            "q.weight_shape": ("I64", (2,)),
            "norm.weight": ("BF16", (64,)),
        },
        4,
    ),
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_are_counted_unpacked(tmp_path: Path, method: str) -> None:
    settings, tensors, bits = QUANTIZED[method]
    model = of_config(tmp_path, {"quantization_config": settings}, tensors)

    assert (model.quantization, model.quantization_bits) == (method, bits)
    assert model.parameters == 64 * 64 + 64
    assert model.weight_bytes == header(tensors)[1]


# --- partial, damaged and hostile ------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    """Why a folder is refused. Takes little memory to find out."""
    tracemalloc.start()
    try:
        read(folder)
    except Unreadable as error:
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
        return str(error).removeprefix(f"{folder}").lstrip("/: ")
    finally:
        tracemalloc.stop()
    pytest.fail("was not refused")


def test_a_partial_download_is_no_model(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == "is no folder"
    assert refusal(tmp_path) == "has no config.json"
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert refusal(tmp_path) == "has no weights in safetensors format"

    write_model(tmp_path, shards=3)
    second = tmp_path / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    second.unlink()
    assert refusal(tmp_path) == f"is incomplete: 1 of 3 files are missing: {second.name}"
    second.symlink_to("not-yet-there")
    assert refusal(tmp_path) == f"is incomplete: {second.name} is missing"
    second.unlink()
    for cut in (0, 5, 100, len(whole) - 1):
        second.write_bytes(whole[:cut])
        assert refusal(tmp_path).startswith(f"{second.name}: is incomplete: ")
    (tmp_path / "model.safetensors.index.json").unlink()
    second.unlink()
    assert refusal(tmp_path) == "is incomplete: it has 2 of 3 files"


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    assert "git lfs pull" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ((1 << 63).to_bytes(8, "little"), "claims a header of"),
        ((100 << 20).to_bytes(8, "little"), "claims a header of"),
        ((1 << 20).to_bytes(8, "little"), "is incomplete"),
        (b"\x02" + bytes(7) + b"[]", "is not valid"),
        (b"\x02" + bytes(7) + b"{{", "is not valid"),
    ],
)
def test_the_length_of_a_header_is_only_a_claim(tmp_path: Path, claim: bytes, reason: str) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(claim)
    assert reason in refusal(tmp_path)


def raw(entries: Mapping[str, object], data: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ({"dtype": "F16", "shape": [2], "data_offsets": [0, 2]}, "the size of its shape"),
        ({"dtype": "F16", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}, "the size of its shape"),
        ({"dtype": "F16", "shape": [2], "data_offsets": [4, 0]}, "does not begin"),
        ({"dtype": "F16", "shape": [2], "data_offsets": [2, 6]}, "does not begin"),
        ({"dtype": "F16", "shape": [-2], "data_offsets": [0, 4]}, "is not valid"),
        ({"dtype": "F16", "shape": [1] * 100_000, "data_offsets": [0, 2]}, "is not valid"),
        ({"dtype": "F16", "shape": [1 << 70], "data_offsets": [0, 4]}, "is not valid"),
        ({"dtype": 7, "shape": [2], "data_offsets": [0, 4]}, "is not valid"),
        ({"dtype": "F16"}, "is not valid"),
        ([], "is not valid"),
    ],
)
def test_tensors_that_lie_are_refused(tmp_path: Path, tensor: object, reason: str) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(raw({"weight": tensor}, 4))
    assert reason in refusal(tmp_path)


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    write_model(tmp_path)
    secret = write_weights(tmp_path.parent / "other.safetensors", BF16)
    for name in (f"../{secret.name}", str(secret), "config.json", 5):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
        assert "does not map tensors to files of the folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 100_000, '{"num_hidden_layers": 1' + "0" * 9999 + "}", "\0", '{"a": "\\ud800'],
)
def test_a_damaged_configuration_is_refused(tmp_path: Path, text: str) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert refusal(tmp_path).startswith("config.json: ")


def test_a_configuration_may_hold_infinity(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    assert read(tmp_path).kv_bytes_per_token() == 0


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    write_model(tmp_path)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        assert "is not a regular file" in refusal(tmp_path)


def test_absurd_numbers_of_layers_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, {"num_hidden_layers": 10**9, "num_attention_heads": 1, "head_dim": 1})
    assert "claims 1,000,000,000 layers" in refusal(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=9), values, max_size=3),
    max_leaves=5,
)
KEYS = sorted(
    {key for config, _ in (*FAMILIES.values(), *SLIDING.values()) for key in config}
    | {"text_config", "dtype", "architectures", "quantization_config", "rope_scaling", "max_position_embeddings"}
)


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=8))
def test_any_configuration_is_read_or_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    try:
        model = of_config(tmp_path, config)
    except Unreadable:
        return
    size = model.kv_bytes(1000)
    assert size is None or size >= 0


@settings(max_examples=examples(100), deadline=None)
@given(st.binary(max_size=200) | st.builds(lambda x: raw({"weight": x}), json_values))
def test_any_header_is_read_or_refused(blob: bytes) -> None:
    with contextlib.suppress(Unreadable):
        safetensors.parse(blob, file_bytes=len(blob), source="model.safetensors")


# --- the cache -------------------------------------------------------------------------------------------


def test_a_snapshot_is_found_by_the_commit_of_main(tmp_path: Path) -> None:
    assert hf_cache.snapshot(tmp_path, "org/name") is None
    repository = tmp_path / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
    os.utime(repository / "snapshots" / ("a" * 40), (1, 1))
    assert hf_cache.snapshot(tmp_path, "org/name") == repository / "snapshots" / ("b" * 40)

    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert hf_cache.snapshot(tmp_path, "org/name") == repository / "snapshots" / ("a" * 40)
    assert [hf_cache.name_of(folder) for folder in hf_cache.repositories(tmp_path)] == ["org/name"]


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/d", "HOME": "/c"}, "/d/huggingface/hub"),
        ({"HOME": "/c"}, "/c/.cache/huggingface/hub"),
        ({"HF_HOME": "~/models", "HOME": "/c"}, "/c/models/hub"),
    ],
)
def test_the_cache_is_where_the_library_has_it(environ: dict[str, str], folder: str) -> None:
    assert hf_cache.folder(environ) == Path(folder)
