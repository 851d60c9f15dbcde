"""Numbers and sizes that ggml and llama.cpp define for the contents of GGUF files.

Tables only, each with its place in llama.cpp's source; `gguf.py` reads files with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class TensorType(NamedTuple):
    """How ggml stores a tensor: each `block` elements take `block_bytes` bytes."""

    name: str
    block: int
    block_bytes: int


# `enum ggml_type` in ggml/include/ggml.h, `block_*` in ggml/src/ggml-common.h. The gaps: support removed.
TENSOR_TYPES: Mapping[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    9: TensorType("Q8_1", 32, 36),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8),
    28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18),
    42: TensorType("Q2_0", 64, 18),
}

# `general.file_type`: `enum llama_ftype` in include/llama.h, with the names that are common in file names.
FILE_TYPES: Mapping[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}

# `{architecture}.pooling_type`: `enum llama_pooling_type` in include/llama.h.
POOLING_TYPES: Mapping[int, str] = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}

# Text encoders among `LLM_ARCH_NAMES` in src/llama-arch.cpp: they embed, even if the file names no pooling.
EMBEDDING_ARCHITECTURES = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)

_A_DRAFT = (
    "is a draft for speculative decoding, not a model of its own: give it to its model with --spec-draft-model"
)
_DIFFUSES = "is a diffusion model, which llama-server does not run"
_SPEAKS = "is a model for speech, which llama-server does not serve"
# What llama-server refuses, or loads and then answers wrongly: it does not run the encoder of T5, for example
# (src/llama-arch.cpp, build 11434).
NOT_SERVED: Mapping[str, str] = {
    "clef": "answers with decisions only, for which the router has no route",
    "controlvector": "is a control vector, not a model: give it to one with --control-vector",
    **dict.fromkeys(("dflash", "eagle3", "gemma4-assistant"), _A_DRAFT),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), _DIFFUSES),
    **dict.fromkeys(("pockettts", "qwen3tts"), _SPEAKS),
    "t5": "is an encoder with a decoder, which llama-server does not run",
    "wavtokenizer-dec": "is a vocoder, which turns the output of another model into sound",
}
"""Architectures that can neither chat nor embed, rerank or transcribe, with the reason."""
