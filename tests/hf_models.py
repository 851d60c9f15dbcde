"""Model folders in the layout of the Hugging Face hub, for tests: small real ones, and headers without weights.

Written by hand, so that the tests need neither torch nor safetensors.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router.formats.safetensors import BITS

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Types and shapes by name."""

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 259,
    "torch_dtype": "bfloat16",
}


def tensors_of(config: Mapping[str, Any]) -> Tensors:
    """The tensors of a Llama, or a Qwen 2, whose queries, keys and values have a bias."""
    hidden, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    of_layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config["model_type"] == "qwen2":
        of_layer |= {
            f"self_attn.{name}_proj.bias": (size,) for name, size in zip("qkv", (hidden, keys, keys), strict=True)
        }
    shapes = {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (words, hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    kind = {"bfloat16": "BF16", "float32": "F32"}[config["torch_dtype"]]
    return {name: (kind, shape) for name, shape in shapes.items()}


LLAMA_TENSORS = tensors_of(LLAMA)
LOADABLE_LLAMA: Mapping[str, Any] = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1}
"""With heads of 32 numbers: vLLM cannot compute smaller ones on the CPU, and crashes when it is asked to."""
MIDDLE_LLAMA: Mapping[str, Any] = {
    **LLAMA,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "vocab_size": 32000,
}
"""223 million parameters."""
MIDDLE_QWEN: Mapping[str, Any] = {
    **MIDDLE_LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1152,
    "intermediate_size": 5376,
    "num_hidden_layers": 16,
    "num_attention_heads": 18,
    "num_key_value_heads": 2,
    "vocab_size": 100_000,
    "tie_word_embeddings": True,
}
"""460 million parameters, a quarter of them in one table for tokens that come in and go out."""
SMALLER_QWEN: Mapping[str, Any] = {
    **MIDDLE_QWEN,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 12,
    "num_attention_heads": 14,
    "vocab_size": 64_000,
    "torch_dtype": "float32",
}
"""236 million parameters of 32 bits."""
LLAMA_PARAMETERS = sum(math.prod(shape) for _, shape in LLAMA_TENSORS.values())


def header(tensors: Tensors) -> tuple[bytes, int]:
    """The header of a file with these tensors, with its length in front, and the size of its data."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, end


def write_weights(path: Path, tensors: Tensors) -> Path:
    """A file with these tensors, all zero; on disk it takes only the space of its header."""
    head, data = header(tensors)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + data)
    return path


def write_model(
    folder: Path,
    config: Mapping[str, Any] = LLAMA,
    tensors: Tensors = LLAMA_TENSORS,
    *,
    shards: int = 1,
    chat_template: str | None = "{{ messages }}",
) -> Path:
    """A model folder; its weights are in so many files, with an index if there is more than one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    settings = {} if chat_template is None else {"chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if shards == 1:
        write_weights(folder / "model.safetensors", tensors)
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        write_weights(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_model_of_bytes(folder: Path, config: Mapping[str, Any] = LOADABLE_LLAMA) -> Path:
    """A model that real engines can load. Its tokens are bytes; its weights are zero, so that it says the first of
    them for ever: `!`."""
    write_model(folder, {**config, "bos_token_id": 257, "eos_token_id": 258}, tensors_of(config))
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(code) for code in (*plain, *(256 + place for place in range(256 - len(plain))))]
    special = ("<s>", "</s>", "<pad>")
    vocabulary = {token: number for number, token in enumerate([*alphabet, *special])}
    form = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    bytes_as_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary[token], "content": token, "special": True, **form} for token in special
        ],
        "pre_tokenizer": bytes_as_text,
        "decoder": bytes_as_text,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def played_transformers(folder: Path) -> Path:
    """`played_transformers.py` as the program `transformers`, in a folder."""
    path = folder / "transformers"
    played = Path(__file__).with_name("played_transformers.py")
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{played}" "$@"\n')
    path.chmod(0o755)
    return path


def played_vllm(folder: Path, version: str = "0.32.0+cpu") -> Path:
    """`fake_vllm.py` as the program `vllm`, in an environment of its own."""
    (folder / f"lib/python3.11/site-packages/vllm-{version}.dist-info").mkdir(parents=True)
    path = folder / "bin" / "vllm"
    path.parent.mkdir()
    played = Path(__file__).with_name("fake_vllm.py")
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{played}" "$@"\n')
    path.chmod(0o755)
    return path
