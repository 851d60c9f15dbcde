"""What each layer of a model keeps per token and per sequence, as llama.cpp lays it out.

The differences between architectures are gathered here: sliding windows, latent attention (MLA), recurrent
layers, shared caches, indexers. Numbers of elements only; what they weigh in bytes, with which flags and on
which device, is `footprint.py`'s business. Followed: `llama_model::create_memory` (src/llama-model.cpp),
`llama_hparams` (src/llama-hparams.cpp) and each architecture's `load_arch_hparams` (src/models/*.cpp), at
build 11434.

An architecture that is not named here gets the usual cache: K and V of every layer for the whole context.
That is what llama.cpp does by default, and more rather than less than what the exceptions need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from router.ggml import EMBEDDING_ARCHITECTURES
from router.gguf import GGUF, ArrayStub


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps: elements of K and V per cell, and f32 elements per sequence."""

    k: int = 0
    v: int = 0
    indexer: int = 0
    """Elements of its own K per cell, with which sparse attention picks the cells worth attending to."""
    state: int = 0
    windowed: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    layers: tuple[Layer, ...]
    window: int
    causal: bool
    trunk: int
    """How many of the layers are the model itself; the rest predict further tokens (MTP)."""


class _Window(NamedTuple):
    """Every `period`-th layer sees everything, the first or the last of each period; the others a window."""

    period: int
    dense_first: bool = False
    tokens: int = 0
    """The window if the file names none; 0: then there are no windows."""


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

# These read which layers have a window from the file, layer by layer (`ml.get_arr(…SLIDING_WINDOW_PATTERN`).
_WINDOWS_LISTED = frozenset(
    {"dots3note", "gemma4", "gemma4-assistant", "granite_swa", "maple", "mimo2", "spark2_5", "step35"}
)

# Whatever the file says, the window is this (src/models/llama4.cpp, smallthinker.cpp).
_FIXED_WINDOWS = {"llama4": 8192, "smallthinker": 4096}

# `case … res = nullptr` in create_memory: they read everything at once.
_NO_CACHE = EMBEDDING_ARCHITECTURES - {"llama-embed", "t5encoder"} | {
    "clef",
    "dream",
    "llada",
    "llada-moe",
    "rnd1",
    "wavtokenizer-dec",
}

# `llm_arch_is_recurrent` in src/llama-arch.cpp.
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})

# `llm_arch_is_hybrid`: a layer without KV heads is recurrent …
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
# … or every layer is but each n-th.
_FULL_ATTENTION_INTERVALS = {"minimax-01": 8, "qwen35": 4, "qwen35moe": 4, "qwen3next": 4, "qwen4exp": 4}

# Their attention layers keep K of an indexer, too (llama-kv-cache-dsa.cpp, -msa.cpp, llama-memory-hybrid-idx.cpp).
_INDEXED = frozenset(
    {"deepseek32", "dots3note", "glm-dsa", "glm5-next", "hy_v4", "minimax-m3", "qwen4exp"}
)


def layout(header: GGUF) -> Layout:
    """What every layer of the model keeps."""
    count = header.block_count or 0
    trunk = max(0, count - _integer(header, "nextn_predict_layers"))
    caches, causal = _caches(header, count, trunk)
    recurrent = _recurrent(header, count, trunk)
    state = _state(header)
    window, windowed = _windows(header, trunk, recurrent)
    layers = []
    for index, cache in enumerate(caches):
        if recurrent[index]:
            both = header.architecture == "falcon-h1"
            layers.append(replace(cache, state=state) if both else Layer(state=state))
        else:
            layers.append(replace(cache, windowed=windowed[index]))
    if window and header.architecture not in ("gemma2",):
        layers = [_resized_for_window(header, layer) for layer in layers]
    return Layout(tuple(layers), window, causal, trunk)
