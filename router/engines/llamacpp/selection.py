"""Working memory of sparse attention, in which an indexer scores the cells and the best are attended to.

llama.cpp uses tensors as long as the whole cache for every token of a micro-batch: scores, and masks that hide the
other cells. They are counted here as its graphs hold them at once (build 11434; each function names the source).
The rest of a layer's working memory is in `footprint.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.engines.llamacpp.architectures import Layout, integer, pooled_tokens
from router.formats.gguf import GGUF


class Selection(NamedTuple):
    """Bytes for a micro-batch."""

    held: int = 0
    """Tensors that exist during the whole computation."""
    choosing: int = 0
    attending: int = 0
    """Tensors in addition to those of ordinary attention, whose mask is counted elsewhere."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Micro-batch and the cache that it uses."""

    tokens: int
    cells: int
    """Cells of each slot, or of all if they share the cache."""
    window: int
    """Cells of windowed layers."""
    slots: int
    are_shared: bool
    flash_attention: bool

    @property
    def mask(self) -> int:
        """Bytes for each cell and token."""
        return _HALF if self.flash_attention else _FLOAT


_FLOAT = _INDEX = 4
_HALF = 2
_POOLS_PADDING = 64


def selection(header: GGUF, layout: Layout, batch: Batch) -> Selection:
    match header.architecture:
        case "deepseek32" | "dots3note" | "glm-dsa" | "hy_v4" if integer(header, "attention.indexer.top_k"):
            return _of_cells(header, layout, batch)
        case "glm5-next" | "qwen4exp" if of_pool := pooled_tokens(header, len(layout.layers)):
            return _of_pools(header, batch, of_pool)
        case "minimax-m3" if batch.flash_attention and (batch.slots == 1 or not batch.are_shared):
            return _of_blocks(header, batch)  # otherwise it attends to everything
        case "deepseek4":
            return _of_summaries(header, layout, batch)
    return Selection()


def _of_cells(header: GGUF, layout: Layout, batch: Batch) -> Selection:
    """`build_attn` with `top_k` in src/llama-graph.cpp. The zeros that unmask the best cells are a separate tensor
    in each layer, and a leaf of the graph, whose memory is never reused."""
    best = min(integer(header, "attention.indexer.top_k"), batch.cells)
    queries = _queries(header)
    layers = sum(layer.k > 0 and not layer.windowed for layer in layout.layers[: layout.trunk])
    return Selection(
        held=batch.tokens * (_HALF * batch.cells + _FLOAT * best * layers),
        choosing=batch.tokens * max(_FLOAT * batch.cells + _INDEX * best + queries, 2 * queries),
        attending=batch.tokens * (2 * batch.mask * batch.cells + _INDEX * best),
    )


def _of_pools(header: GGUF, batch: Batch, of_pool: int) -> Selection:
    """`build_kpool_select` in src/models/glm5-next.cpp, `build_qsa_sel` in qwen4exp.cpp.

    Memory is reserved for recomputing all pools of all slots, as if each slot had filled the cache
    (`llama_memory_hybrid_idx_context` in src/llama-memory-hybrid-idx.cpp).
    """
    has_gates = header.architecture == "glm5-next"
    key = integer(header, "attention.indexer.key_length")
    pools = batch.cells // of_pool * batch.slots
    pooling = _FLOAT * key * pools * (4 * of_pool if has_gates else of_pool + 2)
    chosen = of_pool * min(integer(header, "attention.indexer.top_k") // of_pool, pools) + of_pool - 1
    pools = -(-(pools + 1) // _POOLS_PADDING) * _POOLS_PADDING
    covered = batch.mask * (batch.cells + chosen)
    uncovering = (batch.mask + (1 if has_gates else 4) * _INDEX) * chosen
    masking = covered + (max(batch.mask * batch.cells, uncovering) if has_gates else uncovering)
    return Selection(
        held=batch.tokens * (_HALF * pools + (_FLOAT * chosen if has_gates else 0)),
        choosing=max(pooling, batch.tokens * max(_FLOAT * pools + _queries(header), masking)),
        attending=batch.tokens * covered,
    )


def _of_blocks(header: GGUF, batch: Batch) -> Selection:
    """The graph in src/models/minimax-m3.cpp: each group of heads has a mask of its own, which is transposed.

    For slots with separate caches, the tool splits the tokens among them and reports less; a prompt uses one slot.
    """
    groups = integer(header, "attention.indexer.head_count")
    return Selection(
        held=batch.tokens * _FLOAT * batch.cells, attending=batch.tokens * 2 * _FLOAT * batch.cells * groups
    )


def _of_summaries(header: GGUF, layout: Layout, batch: Batch) -> Selection:
    """`build_csa_lid_attention` in src/models/deepseek4.cpp. Window and summaries are copied side by side."""
    layers = sum(layer.indexer > 0 for layer in layout.layers)
    summaries, coarse = -(-batch.cells // 4), -(-batch.cells // 128)
    best = min(integer(header, "attention.indexer.top_k"), summaries)
    key = integer(header, "attention.key_length")
    queries = _queries(header)
    attended = batch.window + summaries
    heads = _FLOAT * key * integer(header, "attention.head_count")
    return Selection(
        held=batch.tokens * ((batch.mask + _HALF) * summaries + batch.mask * (coarse + best * layers)),
        choosing=batch.tokens * (heads + max(_FLOAT * summaries + _INDEX * best + queries, 2 * queries)),
        attending=batch.tokens * (batch.mask * (2 * summaries + attended) + _INDEX * best)
        + _HALF * key * attended,
    )


def _queries(header: GGUF) -> int:
    """Bytes of an indexer's queries for one token."""
    heads = integer(header, "attention.indexer.head_count")
    return _FLOAT * heads * integer(header, "attention.indexer.key_length")
