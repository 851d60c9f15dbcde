"""Purpose of a model by its file and flags, and the flags that its engine needs for it.

llama-server does not infer it: started without the flag for an embedding or reranking model, it rejects every
request, and with its default micro-batch it rejects longer texts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import PurePath

from router.engines.llamacpp.architectures import layout
from router.engines.llamacpp.flags import Flags
from router.engines.llamacpp.footprint import slot_context
from router.formats.ggml import EMBEDDING_ARCHITECTURES, NOT_SERVED
from router.formats.gguf import GGUF

# llama.cpp: `draft_prefixes` in common/preset.cpp and `gguf_filename_is_model` in common/download.cpp.
DRAFT_PREFIXES = ("mtp-", "eagle3-", "dflash-", "dspark-")

SAYS_IF_IT_EMBEDS = frozenset({"LLAMA_ARG_EMBEDDINGS", "LLAMA_ARG_RERANKING"})
"""Variables that override the file if set to any value; no flag can unset them."""

_MOST_LOGITS = 8192
"""Micro-batch of a model that is not only an encoder, as it computes logits for each token."""


def unserved(path: PurePath, header: GGUF) -> str | None:
    """Return why a file is not a model that can be served; None if it can."""
    if header.kind not in ("model", "mmproj"):
        return NOT_SERVED.get(header.architecture) or f"is a GGUF of type {header.kind!r}, not a model"
    if path.name.lower().startswith(DRAFT_PREFIXES) or _only_predicts(header):
        return NOT_SERVED["eagle3"]
    if not header.tensors:
        return "has no tensors: it holds a vocabulary only"
    if header.byte_order != sys.byteorder:
        return f"is {header.byte_order}-endian, unlike this machine: convert it with `gguf-convert-endian`"
    if header.kind == "mmproj":
        return None
    if header.architecture in NOT_SERVED:
        return NOT_SERVED[header.architecture]
    if "tokenizer.ggml.model" not in header.metadata:  # llama.cpp loads nothing without one
        return "has no vocabulary: it is no model that reads or writes text"
    return None


def _only_predicts(header: GGUF) -> bool:
    """Return whether a file has only layers that predict further tokens, without the model itself."""
    plan = layout(header)
    if plan.trunk == len(plan.layers):
        return False
    return not any(tensor.name.startswith("blk.0.") for tensor in header.tensors)


def flags_for(header: GGUF, flags: Flags) -> Iterator[tuple[str, ...]]:
    """Yield flags that the file requires and `flags` do not set: name and value, if any."""
    pooling = flags.text("pooling", header.pooling_type or "")
    answers = flags.switch("embedding", False) or flags.switch("rerank", False)
    if not answers and (header.pooling_type == "rank" or header.is_embedding_model):
        yield ("rerank",) if pooling == "rank" else ("embedding",)
        answers = True
        if not pooling:  # without pooling, an engine rejects OpenAI's clients; libraries default to this
            yield "pooling", "mean"
    if answers and not _reads_in_pieces(header, pooling):
        context = slot_context(header, flags)
        if header.architecture not in EMBEDDING_ARCHITECTURES:
            context = min(context, _MOST_LOGITS)
        for name in ("batch-size", "ubatch-size"):
            if context and flags.last(name) is None:
                yield name, str(context)


def _reads_in_pieces(header: GGUF, pooling: str) -> bool:
    """Return whether a text may span micro-batches (`server_slot::can_split` in
    tools/server/server-context.cpp)."""
    remembers = any(layer.k or layer.state for layer in layout(header).layers)
    is_causal = header.hyperparameter("attention.causal") is not False
    return remembers and (pooling == "last" or (pooling == "rank" and is_causal))
