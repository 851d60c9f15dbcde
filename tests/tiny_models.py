"""Models for the tests: real ones that an engine loads and answers with in milliseconds, and broken ones.

`write_llama` and `write_embedding` use the `gguf` package, so that what they write is right by an independent
hand; `gguf_bytes` packs whatever it is told, right or wrong. The weights are random: so are the answers.
`Blueprint` makes headers of models of any size, for what only reads headers.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import gguf
import gguf.quants
import numpy as np

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONTROL_TOKENS = ("<unk>", "<s>", "</s>")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
VOCABULARY = len(CONTROL_TOKENS) + len(BYTE_TOKENS)

Shapes = Mapping[str, tuple[int, ...]]


def write_llama(
    path: Path,
    *,
    name: str = "tiny",
    seed: int = 0,
    n_embd: int = 64,
    n_layer: int = 2,
    n_head: int = 4,
    n_ff: int = 128,
    n_vocab: int = VOCABULARY,
    context_length: int = 2048,
    chat_template: str | None = CHAT_TEMPLATE,
    target_bytes: int | None = None,
    parts: int = 1,
    quantization: Literal["F16", "Q4_0"] = "F16",
    tied: bool = False,
) -> Path:
    """A llama model that completes text byte by byte; what to load: `path`, or the first of its `parts`.

    With `target_bytes` (8 MB and more) it is as wide and deep as comes nearest to that size on disk.
    `n_vocab` beyond the byte tokens adds words, for the size of the header. A `tied` one has no output of its own.
    """
    n_head_kv = n_head
    if target_bytes is not None:
        n_embd, n_head, n_head_kv = 1024, 16, 4
        n_layer = max(1, target_bytes >> 25)
        _, of_block, block_bytes = QUANTIZED_TYPES[quantization]
        elements = target_bytes * of_block // block_bytes
        attention = 2 * n_embd * (n_embd + n_embd // n_head * n_head_kv)
        n_ff = (elements - 2 * n_vocab * n_embd - n_layer * attention) // (3 * n_embd * n_layer)
        n_ff -= n_ff % 32
        if n_ff <= 0:
            raise ValueError(f"target_bytes is too small: {target_bytes}")
    n_embd_kv = n_embd // n_head * n_head_kv
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, n_embd),
        "output_norm.weight": (n_embd,),
        **({} if tied else {"output.weight": (n_vocab, n_embd)}),
    }
    for layer in range(n_layer):
        block = f"blk.{layer}."
        shapes |= {
            f"{block}attn_norm.weight": (n_embd,),
            f"{block}attn_q.weight": (n_embd, n_embd),
            f"{block}attn_k.weight": (n_embd_kv, n_embd),
            f"{block}attn_v.weight": (n_embd_kv, n_embd),
            f"{block}attn_output.weight": (n_embd, n_embd),
            f"{block}ffn_norm.weight": (n_embd,),
            f"{block}ffn_gate.weight": (n_ff, n_embd),
            f"{block}ffn_up.weight": (n_ff, n_embd),
            f"{block}ffn_down.weight": (n_embd, n_ff),
        }

    per_part = -(-len(shapes) // parts)
    if -(-len(shapes) // per_part) != parts:
        raise ValueError(f"{len(shapes)} tensors do not divide into {parts} parts")
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_part if parts > 1 else 0)
    _add_model(writer, name, context_length, n_embd, n_layer, n_head, n_ff)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_vocab_size(n_vocab)
    _add_vocabulary(writer, n_vocab)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    return _write(writer, shapes, seed, quantization)


def write_lora(path: Path, *, seed: int = 1, n_embd: int = 64, n_layer: int = 2, rank: int = 4) -> Path:
    """A LoRA adapter for `write_llama` that changes what the attention of each layer puts out, and by much."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 64.0)
    shapes = {
        f"blk.{layer}.attn_output.weight.lora_{part}": shape
        for layer in range(n_layer)
        for part, shape in (("a", (rank, n_embd)), ("b", (n_embd, rank)))
    }
    return _write(writer, shapes, seed)


def write_embedding(
    path: Path,
    *,
    name: str = "tiny-embedding",
    seed: int = 0,
    n_embd: int = 64,
    n_layer: int = 2,
    n_head: int = 4,
    n_ff: int = 128,
    context_length: int = 512,
    pooling: Literal["mean", "cls", "rank"] | None = "mean",
) -> Path:
    """A bert model for an engine with `--embedding`; with pooling "rank", one for `--rerank`."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, n_embd),
        "token_types.weight": (1, n_embd),
        "position_embd.weight": (context_length, n_embd),
        "token_embd_norm.weight": (n_embd,),
        "token_embd_norm.bias": (n_embd,),
    }
    for layer in range(n_layer):
        block = f"blk.{layer}."
        shapes |= {
            f"{block}attn_q.weight": (n_embd, n_embd),
            f"{block}attn_k.weight": (n_embd, n_embd),
            f"{block}attn_v.weight": (n_embd, n_embd),
            f"{block}attn_output.weight": (n_embd, n_embd),
            f"{block}attn_output_norm.weight": (n_embd,),
            f"{block}attn_output_norm.bias": (n_embd,),
            f"{block}ffn_up.weight": (n_ff, n_embd),
            f"{block}ffn_down.weight": (n_embd, n_ff),
            f"{block}layer_output_norm.weight": (n_embd,),
            f"{block}layer_output_norm.bias": (n_embd,),
        }
    if pooling == "rank":
        shapes |= {
            "cls.weight": (n_embd, n_embd),
            "cls.bias": (n_embd,),
            "cls.output.weight": (1, n_embd),
            "cls.output.bias": (1,),
        }

    writer = gguf.GGUFWriter(path, "bert")
    _add_model(writer, name, context_length, n_embd, n_layer, n_head, n_ff)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_pooling_type(gguf.PoolingType[pooling.upper()])
    writer.add_token_type_count(1)
    _add_vocabulary(writer, VOCABULARY)
    writer.add_sep_token_id(2)
    writer.add_add_eos_token(True)
    return _write(writer, shapes, seed)


def write_projector(
    path: Path, *, name: str = "tiny-projector", vision: bool = True, audio: bool = False, n_embd: int = 64
) -> Path:
    """The header of an `mmproj` file for models of this width, enough to be recognised; no engine runs it."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_clip_has_vision_encoder(vision)
    writer.add_clip_has_audio_encoder(audio)
    return _write(writer, {"v.patch_embd.weight": (32, 32), "mm.0.weight": (n_embd, 48)}, 0)


def _add_model(
    writer: gguf.GGUFWriter, name: str, context_length: int, n_embd: int, n_layer: int, n_head: int, n_ff: int
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(context_length)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_head_count(n_head)
    writer.add_feed_forward_length(n_ff)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def _add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    words = n_vocab - VOCABULARY
    if words < 0:
        raise ValueError(f"n_vocab must be at least {VOCABULARY}")
    normal, unknown, control, byte = (
        int(gguf.TokenType[kind]) for kind in ("NORMAL", "UNKNOWN", "CONTROL", "BYTE")
    )
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*CONTROL_TOKENS, *BYTE_TOKENS, *(f"word{number:06d}" for number in range(words))])
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types([unknown, control, control, *[byte] * len(BYTE_TOKENS), *[normal] * words])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _write(writer: gguf.GGUFWriter, shapes: Shapes, seed: int, quantization: str = "F16") -> Path:
    """Norms are one, biases zero, the rest from one random pool, so that hundreds of MB take no time."""
    pool = np.random.default_rng(seed).standard_normal(1 << 20, np.float32) * np.float32(0.05)
    kinds = {name: "F32" if _is_added(name, shape) else quantization for name, shape in shapes.items()}
    pools = {kind: _quantized(pool, kind) for kind in set(kinds.values())}
    for name, shape in shapes.items():
        number, block, block_bytes = QUANTIZED_TYPES[kinds[name]]
        stored = (*shape[:-1], shape[-1] // block * block_bytes)
        kind = gguf.GGMLQuantizationType(number)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)
    assert writer.path is not None
    first = writer.format_shard_names(writer.path)[0]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            tensor = np.full(shape, float(name.endswith("norm.weight")), np.float32)
        else:
            _, block, _ = QUANTIZED_TYPES[kinds[name]]
            blocks = np.roll(pools[kinds[name]], number, axis=0)
            tensor = np.resize(blocks, (int(np.prod(shape)) // block, blocks.shape[1]))
        writer.write_tensor_data(tensor)
    writer.close()
    return first


def _quantized(pool: np.ndarray[Any, np.dtype[np.float32]], kind: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Block by block, in bytes."""
    number, block, block_bytes = QUANTIZED_TYPES[kind]
    stored = gguf.quants.quantize(pool.reshape(-1, block), gguf.GGMLQuantizationType(number))
    return stored.view(np.uint8).reshape(-1, block_bytes)


def _is_added(name: str, shape: Sequence[int]) -> bool:
    """llama.cpp adds these to activations, which it can do with f32 only."""
    return len(shape) == 1 or name in ("token_types.weight", "position_embd.weight")


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor table entry as it is to be written; `offset` None places it where it belongs."""

    name: str | bytes
    shape: Sequence[int]
    type: int = 0
    nbytes: int = 0
    offset: int | None = None


# By name, each metadata value type's number and struct letter.
VALUE_TYPES: Mapping[str, tuple[int, str]] = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"),
    "f32": (6, "f"), "bool": (7, "?"), "str": (8, ""), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d"),
}  # fmt: skip


def gguf_bytes(
    metadata: Sequence[tuple[str | bytes, str, Any]] = (),
    tensors: Sequence[RawTensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    order: Literal["<", ">"] = "<",
    alignment: int = 32,
    key_count: int | None = None,
    tensor_count: int | None = None,
    data: bool = True,
) -> bytes:
    """A file byte by byte; the counts lie if told to.

    `metadata` is (key, type, value), with the type "u32", "str", …, "[f32]" for an array, or "raw" for bytes
    that stand for type and value both.
    """

    def string(text: str | bytes) -> bytes:
        encoded = text.encode() if isinstance(text, str) else text
        return struct.pack(f"{order}Q", len(encoded)) + encoded

    def value(kind: str, content: Any) -> bytes:
        if kind == "str":
            return string(content)
        return struct.pack(order + VALUE_TYPES[kind][1], content)

    def typed(kind: str, content: Any) -> bytes:
        if kind == "raw":
            return bytes(content)
        if not kind.startswith("["):
            return struct.pack(f"{order}I", VALUE_TYPES[kind][0]) + value(kind, content)
        kind = kind.strip("[]")
        head = struct.pack(f"{order}IIQ", 9, VALUE_TYPES[kind][0], len(content))
        return head + b"".join(value(kind, item) for item in content)

    padded = [tensor.nbytes + -tensor.nbytes % alignment for tensor in tensors]
    header = magic + struct.pack(
        f"{order}IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(metadata) if key_count is None else key_count,
    )
    header += b"".join(string(key) + typed(kind, content) for key, kind, content in metadata)
    for tensor, place in zip(tensors, accumulate(padded, initial=0), strict=False):
        header += string(tensor.name)
        header += struct.pack(f"{order}I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        header += struct.pack(f"{order}IQ", tensor.type, place if tensor.offset is None else tensor.offset)
    header += bytes(-len(header) % alignment)
    return header + bytes(sum(padded)) if data else header


QUANTIZED_TYPES: Mapping[str, tuple[int, int, int]] = {
    # name: number, elements and bytes of a block
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144),
    "Q6_K": (14, 256, 210), "MXFP4": (39, 32, 17),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model of any architecture and size without its weights: what its header says, and nothing behind it.

    `hyperparameters` go without their `{architecture}.`; `shapes` have the contiguous dimension first.
    """

    architecture: str
    hyperparameters: Mapping[str, Any]
    shapes: Shapes
    quantization: str = "Q4_K"
    token_embedding: str = "Q6_K"

    def header(self) -> bytes:
        metadata: list[tuple[str | bytes, str, Any]] = [
            ("general.architecture", "str", self.architecture),
            ("tokenizer.ggml.model", "str", "no_vocab"),
        ]
        for key, value in self.hyperparameters.items():
            metadata.append((f"{self.architecture}.{key}", _value_type(value), value))
        return gguf_bytes(metadata, self._tensors(), data=False)

    def file_bytes(self) -> int:
        return len(self.header()) + sum(tensor.nbytes + -tensor.nbytes % 32 for tensor in self._tensors())

    def write(self, path: Path) -> Path:
        """As a file of full size with a hole where the weights would be: it takes no room on most disks."""
        path.write_bytes(self.header())
        os.truncate(path, self.file_bytes())
        return path

    def _tensors(self) -> list[RawTensor]:
        tensors = []
        for name, shape in self.shapes.items():
            number, block, block_bytes = QUANTIZED_TYPES[self._type(name, shape)]
            tensors.append(RawTensor(name, shape, number, math.prod(shape) // block * block_bytes))
        return tensors

    def _type(self, name: str, shape: Sequence[int]) -> str:
        """Biases, norms and what state spaces and routers are made of stay f32, as in published models."""
        if len(shape) == 1 or re.search(
            r"bias$|ffn_gate_inp|conv|ssm_[ad]$|ssm_norm|_coef|altup_router|hc_|_ape\.", name
        ):
            return "F32"
        wanted = self.token_embedding if name in ("token_embd.weight", "output.weight") else self.quantization
        return next(kind for kind in (wanted, "Q8_0", "F16") if shape[0] % QUANTIZED_TYPES[kind][1] == 0)


def _value_type(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{_value_type(value[0])}]"
    return {bool: "bool", int: "u32", float: "f32", str: "str"}[type(value)]
