"""State that each layer of a model keeps per token and per sequence, as laid out by llama.cpp.

The differences between architectures are collected here: sliding windows, latent attention (MLA), recurrent
layers, shared caches, indexers. Only numbers of elements; `footprint.py` derives bytes by flags and device.
Sources: `llama_model::create_memory` (src/llama-model.cpp),
`llama_hparams` (src/llama-hparams.cpp) and each architecture's `load_arch_hparams` (src/models/*.cpp), at
build 11434.

An architecture not listed here gets the usual cache: K and V of every layer for the whole context. This is
llama.cpp's default, and an upper bound for exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from router.formats.ggml import EMBEDDING_ARCHITECTURES
from router.formats.gguf import GGUF


@dataclass(frozen=True, slots=True)
class Layer:
    """State of one layer: elements of K and V per cell, and f32 elements per sequence."""

    k: int = 0
    v: int = 0
    has_v: bool = False
    """True if its cache has V, even of width 0: without flash attention, every V has the largest width."""
    indexer: int = 0
    """Elements of the indexer's K per cell, by which sparse attention selects cells."""
    indexer_v: int = 0
    """Elements of V in the indexer's cache, which are never read."""
    state: int = 0
    windowed: bool = False
    compressed: int = 0
    """Number of tokens per summary cell, which outlives the window; `indexer` then counts per summary cell."""


@dataclass(frozen=True, slots=True)
class Layout:
    layers: tuple[Layer, ...]
    trunk: int
    """Number of layers of the model itself; later ones predict further tokens (MTP)."""
    window: int
    """Window of windowed layers in tokens."""
    slots_apart: bool = False
    """True if each slot has a cache of the whole length, even if slots share one otherwise."""


class _Window(NamedTuple):
    """Pattern of windows: the first or last layer of each `period` sees the whole context, the others a window."""

    period: int
    dense_first: bool = False
    tokens: int = 0
    """Window if the file specifies none; 0: no windows."""


# src/llama-hparams.h; files with larger values are not loaded.
_MAX_LAYERS = 512

# `load_swa_pattern(ml, period, dense_first)` in src/models/*.cpp.
_WINDOWS: Mapping[str, _Window] = {
    "afmoe": _Window(4),
    "cohere2": _Window(4),
    "cohere2moe": _Window(4, dense_first=True),
    "exaone-moe": _Window(4, tokens=128),
    "exaone4": _Window(4, tokens=4096),
    "gemma2": _Window(2, tokens=4096),
    "gemma3": _Window(6),
    "gemma3n": _Window(5),
    "gpt-oss": _Window(2),
    "laguna": _Window(4, dense_first=True),
    "llama4": _Window(4, tokens=8192),
    "mellum": _Window(4),
    "muse-glimmer": _Window(4),
    "olmo2": _Window(4),
    "plamo3": _Window(8),
    "smallthinker": _Window(4, dense_first=True),
}

# Their files must specify which layers have a window (`ml.get_arr(LLM_KV_ATTENTION_SLIDING_WINDOW_PATTERN, …)`).
_WINDOWS_LISTED = frozenset(
    {"dots3note", "gemma4", "gemma4-assistant", "granite_swa", "maple", "mimo2", "spark2_5", "step35"}
)

# These ignore the window of the file and use their own (src/models/llama4.cpp, smallthinker.cpp).
_FIXED_WINDOWS = {"llama4": 8192, "smallthinker": 4096}

# `res = nullptr` in create_memory: they have no cache.
_NO_CACHE = (EMBEDDING_ARCHITECTURES - {"llama-embed", "t5encoder"}) | {
    "clef",
    "dream",
    "llada",
    "llada-moe",
    "rnd1",
    "wavtokenizer-dec",
}

# `llm_arch_is_recurrent` in src/llama-arch.cpp.
_RECURRENT = frozenset({"arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"})

# `llm_arch_is_hybrid`: layers without KV heads are recurrent …
_RECURRENT_WITHOUT_HEADS = frozenset(
    {
        "bailingmoe3",
        "glm5-next",
        "granitehybrid",
        "jamba",
        "kimi-k3",
        "kimi-linear",
        "lfm2",
        "lfm2moe",
        "nemotron_h",
        "nemotron_h_moe",
        "plamo2",
    }
)
# In these, a layer with a feed-forward part has no other part.
_EITHER_MIXES_OR_COMPUTES = frozenset({"nemotron_h", "nemotron_h_moe"})
# … or all but every n-th.
_FULL_ATTENTION_INTERVALS = {"minimax-01": 8, "qwen35": 4, "qwen35moe": 4, "qwen3next": 4, "qwen4exp": 4}

# `llm_arch_supports_rs_rollback`: they keep past states for rollback when a speculated token is rejected.
KEEPS_PAST_STATES = frozenset(
    {
        "bailingmoe3",
        "deepseek4",
        "glm5-next",
        "kimi-k3",
        "lfm2",
        "lfm2moe",
        "nemotron_h",
        "nemotron_h_moe",
        "qwen35",
        "qwen35moe",
        "qwen4exp",
    }
)

# Sparse attention: an indexer with a K of its own selects the cells to attend to
# (llama-kv-cache-dsa.cpp, llama-kv-cache-msa.cpp, llama-memory-hybrid-idx.cpp).
_INDEXED = frozenset({"deepseek32", "dots3note", "glm-dsa", "glm5-next", "hy_v4", "minimax-m3", "qwen4exp"})
_INDEXED_IN_PART = frozenset({"dots3note", "glm-dsa", "glm5-next", "hy_v4"})
"""Architectures in which some layers reuse the selection of an earlier layer's indexer."""
_POOLED = {"glm5-next": 3, "qwen4exp": 2}
"""Rows kept by a pooling indexer: key, pooled key and gate."""
_LONG_GLM = 1 << 20
"""Training context of GLM-5.2, whose first files do not specify which layers have an indexer."""

# DeepSeek-V4 keeps a window, and summaries of earlier tokens (llama-kv-cache-dsv4.cpp): of 4 tokens, overlapping
# and selected by an indexer, or of 128.
_OVERLAPPING, _APART = 4, 128


def layout(header: GGUF) -> Layout:
    """Return the state of every layer."""
    count = min(integer(header, "block_count"), _MAX_LAYERS)
    trunk = max(0, count - integer(header, "nextn_predict_layers")) or count
    if header.architecture in _NO_CACHE:
        return Layout((Layer(),) * count, trunk, 0)

    heads = per_layer(header, "attention.head_count", count)
    heads_kv = per_layer(header, "attention.head_count_kv", count, heads)
    if header.architecture == "deepseek4":
        return _summarizing(header, count, trunk, heads, heads_kv)
    recurrent = _recurrent(header, count, trunk, heads_kv)
    window, windowed = _windows(header, count, trunk, recurrent)
    cached = _layers_with_cache(header, count, recurrent)
    state = _state(header, heads)
    indexer = _indexer(header, count)
    mla = bool(integer(header, "attention.key_length_mla") and integer(header, "attention.value_length_mla"))
    layers = []
    for index in range(count):
        k, v = head_sizes(header, heads, windowed=windowed[index]) if cached[index] else (0, 0)
        has_indexer = cached[index] and indexer[index]
        layers.append(
            Layer(
                k=k * heads_kv[index],
                v=0 if mla else v * heads_kv[index],
                has_v=cached[index] and not mla,
                indexer=indexer[index] if cached[index] else 0,
                indexer_v=v if has_indexer and header.architecture == "minimax-m3" else 0,
                state=(state if recurrent[index] else 0) + _history(header, index),
                windowed=windowed[index],
            )
        )
    return Layout(tuple(layers), trunk, window)


def _summarizing(
    header: GGUF, count: int, trunk: int, heads: tuple[int, ...], heads_kv: tuple[int, ...]
) -> Layout:
    """`llama_kv_cache_dsv4` and `llama_dsv4_comp_state` in src/llama-kv-cache-dsv4.cpp; no layer keeps V."""
    k, _ = head_sizes(header, heads, windowed=True)
    indexer = integer(header, "attention.indexer.key_length")
    layers = []
    for index, ratio in enumerate(per_layer(header, "attention.compress_ratios", count)):
        # Tokens not summarized yet: values and scores, twice as wide where summaries overlap.
        unfinished = {_OVERLAPPING: 2 * (2 * ratio) * 2 * (k + indexer), _APART: 2 * ratio * k}.get(ratio, 0)
        layers.append(
            Layer(
                k=k * heads_kv[index],
                indexer=indexer if ratio == _OVERLAPPING else 0,
                state=unfinished if index < trunk else 0,
                windowed=True,
                compressed=ratio if unfinished else 0,
            )
        )
    return Layout(tuple(layers), trunk, integer(header, "attention.sliding_window"), slots_apart=True)


def _indexer(header: GGUF, count: int) -> tuple[int, ...]:
    """Return the elements of the indexer's K by layer."""
    architecture = header.architecture
    none = (0,) * count
    if architecture not in _INDEXED or (
        architecture == "hy_v4" and not integer(header, "attention.indexer.top_k")
    ):
        return none
    length = integer(header, "attention.indexer.key_length") * (
        _POOLED[architecture] if pooled_tokens(header, count) else 1
    )
    has_own = (1,) * count
    if architecture == "minimax-m3":
        dense = integer(header, "leading_dense_block_count")
        has_own = tuple(int(index >= dense) for index in range(count))
    elif architecture in _INDEXED_IN_PART:
        if architecture == "glm-dsa" and integer(header, "context_length") >= _LONG_GLM:
            has_own = tuple(int(index < 2 or index % 4 == 2) for index in range(count))
        has_own = per_layer(header, "attention.indexer.types", count, has_own)
    return tuple(length if own else 0 for own in has_own)


def pooled_tokens(header: GGUF, count: int) -> int:
    """Return the number of tokens per key of an indexer; 0: one key per token."""
    if header.architecture == "glm5-next":
        return integer(header, "attention.indexer.kpool")
    if header.architecture == "qwen4exp":
        return max(per_layer(header, "attention.compress_ratios", count), default=0)
    return 0


def widest_product(header: GGUF, count: int, tokens: int) -> int:
    """Return the f32 elements per token of a micro-batch that the widest layer needs at once, by a rule fitted to
    the engine's output."""
    heads = max(per_layer(header, "attention.head_count", count), default=0)
    experts = max(per_layer(header, "expert_used_count", count), default=0)
    latent = integer(header, "attention.key_length_mla")
    return max(
        3 * max(per_layer(header, "feed_forward_length", count), default=0),
        3 * max(per_layer(header, "expert_feed_forward_length", count), default=0) * experts,
        5 * integer(header, "ssm.inner_size")
        + 6 * integer(header, "ssm.group_count") * integer(header, "ssm.state_size"),
        heads * (2 * integer(header, "attention.key_length") + latent) if latent else 0,
        # Decay between tokens, its factor, and their products.
        3 * heads * tokens if header.architecture == "minimax-01" else 0,
        # Queries, attention output, and that output with positions removed.
        3 * heads * integer(header, "attention.key_length") if header.architecture == "deepseek4" else 0,
    )


def head_sizes(header: GGUF, heads: tuple[int, ...], *, windowed: bool) -> tuple[int, int]:
    """Return the elements of one head's K and V (llama-model.cpp, "non-transformer models do not have attention
    heads")."""
    if not any(heads[:1]) and header.architecture != "plamo2":
        return 0, 0
    usual = (header.embedding_length or 0) // heads[0] if heads[0] else 0
    k = integer(header, "attention.key_length", usual)
    v = integer(header, "attention.value_length", usual)
    if windowed:
        k = integer(header, "attention.key_length_swa", k)
        v = integer(header, "attention.value_length_swa", v)
    return k, v


def integer(header: GGUF, key: str, default: int = 0) -> int:
    """Return a hyperparameter that is a count; any other value in the file counts as missing."""
    value = header.hyperparameter(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


def per_layer(header: GGUF, key: str, count: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Return a hyperparameter by layer that is one number for all layers or a list."""
    value = header.hyperparameter(key)
    if isinstance(value, tuple):
        numbers = (int(number) if isinstance(number, int) else 0 for number in value[:count])
        return tuple(max(0, number) for number in (*numbers, *(0,) * (count - len(value))))
    if isinstance(value, int):
        return (max(0, value),) * count
    return default or (0,) * count


def _layers_with_cache(header: GGUF, count: int, recurrent: tuple[bool, ...]) -> tuple[bool, ...]:
    architecture = header.architecture
    if architecture == "falcon-h1":  # its layers are both recurrent and attending
        return (True,) * count
    if architecture in _EITHER_MIXES_OR_COMPUTES:
        feed_forward = per_layer(header, "feed_forward_length", count)
        return tuple(not recurrent[index] and not feed_forward[index] for index in range(count))
    # Later layers use the cache of an earlier one (`n_layer_kv_from_start`).
    own = {"gemma3n": 20, "gemma4": count - integer(header, "attention.shared_kv_layers")}.get(architecture, count)
    return tuple(index < own and not recurrent[index] for index in range(count))


def _recurrent(header: GGUF, count: int, trunk: int, heads_kv: tuple[int, ...]) -> tuple[bool, ...]:
    architecture = header.architecture
    if architecture in _RECURRENT or architecture == "falcon-h1":
        return (True,) * count
    if architecture in _RECURRENT_WITHOUT_HEADS:
        feed_forward = per_layer(header, "feed_forward_length", count)
        computes = feed_forward if architecture in _EITHER_MIXES_OR_COMPUTES else (0,) * count
        return tuple(index < trunk and not heads_kv[index] and not computes[index] for index in range(count))
    if architecture in _FULL_ATTENTION_INTERVALS:
        if header.hyperparameter("attention.recurrent_layers") is not None:
            return tuple(map(bool, per_layer(header, "attention.recurrent_layers", count)))
        every = integer(header, "full_attention_interval", _FULL_ATTENTION_INTERVALS[architecture]) or 1
        return tuple(index < trunk and (index + 1) % every != 0 for index in range(count))
    return (False,) * count


def _windows(header: GGUF, count: int, trunk: int, recurrent: tuple[bool, ...]) -> tuple[int, tuple[bool, ...]]:
    """Return the window, and which layers have it (`llama_model_base::load_swa_pattern`, `set_swa_pattern`)."""
    architecture = header.architecture
    none = 0, (False,) * count
    rule = _WINDOWS.get(architecture)
    window = integer(header, "attention.sliding_window", rule.tokens if rule else 0)
    if not window or (architecture == "exaone4" and trunk != 64):
        return none
    window = _FIXED_WINDOWS.get(architecture, window)
    if architecture == "lfm2":
        return window, tuple(not here for here in recurrent)
    pattern = header.hyperparameter("attention.sliding_window_pattern")
    if isinstance(pattern, tuple) and (rule or architecture in _WINDOWS_LISTED):
        return window, tuple(map(bool, per_layer(header, "attention.sliding_window_pattern", count)))
    if rule is None:
        return none
    period = integer(header, "attention.sliding_window_pattern", rule.period)
    dense = 0 if rule.dense_first else period - 1
    return window, tuple(index < trunk and (period == 0 or index % period != dense) for index in range(count))


def _state(header: GGUF, heads: tuple[int, ...]) -> int:
    """Return the f32 elements that a recurrent layer keeps per sequence (`n_embd_r` + `n_embd_s` in
    llama-hparams.cpp)."""
    width = header.embedding_length or 0
    convolution = integer(header, "ssm.conv_kernel")
    inner, state = integer(header, "ssm.inner_size"), integer(header, "ssm.state_size")
    head_count = heads[0] if heads else 0
    if wkv := integer(header, "wkv.head_size"):
        return width * (integer(header, "token_shift_count", 2) + wkv)
    if shortconv := integer(header, "shortconv.l_cache"):
        return width * (shortconv - 1)
    if delta := integer(header, "kda.head_dim"):
        return head_count * delta * (3 * ((convolution or 4) - 1) + delta)
    if header.architecture == "minimax-01":
        return head_count * integer(header, "attention.key_length") ** 2
    channels = inner + 2 * integer(header, "ssm.group_count") * state
    return max(0, convolution - 1) * channels + state * inner


def _history(header: GGUF, index: int) -> int:
    """Return the f32 elements of past n-gram embeddings, if a layer uses them (`ple_conv_state`)."""
    layers = header.hyperparameter("ple.layers")
    if not isinstance(layers, tuple) or index not in layers:
        return 0
    past = max(0, integer(header, "ple.conv_kernel") - 1) * integer(header, "ple.ngram_size")
    return past * integer(header, "hyper_connection.count") * (header.embedding_length or 0)
