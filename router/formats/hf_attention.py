"""What each layer of a Hugging Face model caches of every token, according to its `config.json`.

`config.json` has no fixed vocabulary: each family of models has words of its own for the same numbers. The rules
are those of vLLM (`transformers_utils/model_arch_config_convertor.py`) and of Transformers (`cache_utils.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

MOST_LAYERS = 2048

_NESTED = ("thinker_config", "text_config", "llm_config", "language_config", "decoder", "generator")
"""Keys of models with several parts that hold the configuration of the one that generates text."""

# fmt: off
_ENCODERS = frozenset((
    "albert", "bert", "big_bird", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra",
    "ernie", "esm", "eurobert", "flaubert", "fnet", "funnel", "ibert", "jina_embeddings_v3", "layoutlm",
    "layoutlmv2", "layoutlmv3", "lilt", "longformer", "luke", "megatron-bert", "mobilebert", "modernbert",
    "mpnet", "mra", "new", "nezha", "nomic_bert", "nystromformer", "rembert", "roberta",
    "roberta-prelayernorm", "roformer", "splinter", "squeezebert", "xlm-roberta", "xlm-roberta-xl", "xmod",
    "yoso", "clip", "siglip", "siglip2", "vit", "dinov2", "wav2vec2", "hubert",
))
# fmt: on
"""Kinds of models that look at a whole text at once: nothing is cached."""
_RECURRENT = frozenset(("falcon_mamba", "mamba", "mamba2", "rwkv", "rwkv5", "rwkv6", "rwkv7", "xlstm"))
"""Kinds of models that keep a state of fixed size instead of tokens."""

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads")
_KEY_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
_WIDTH = ("hidden_size", "n_embd", "n_embed", "d_model")
_HEAD_WIDTH = ("head_dim", "attention_head_dim", "hidden_size_per_head", "kv_channels")
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_decoder_layers", "decoder_layers", "num_layers")

_Kind = Literal["full", "window", "none"]
_KINDS: Mapping[str, _Kind] = {
    "sliding_attention": "window",
    "hybrid_sliding": "window",
    "chunked_attention": "window",
    "local_attention": "window",
    "linear_attention": "none",
    "mamba": "none",
    "mamba2": "none",
    "conv": "none",
    "recurrent": "none",
    "rglru": "none",
    "mlp": "none",
    "moe": "none",
}
"""What a word in `layer_types` means; every other one is a layer that caches all tokens."""
_KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "block_types", "_block_types")
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gemma3n_text": 5, "cohere2": 4}
"""Of kinds of models whose configuration may leave it out: every how many layers one caches all tokens."""

_PROJECTION = re.compile(
    r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,5})\.(?:self_attn|attn|attention)\.([kv])_proj\.weight$"
)
_OTHER_TOWERS = re.compile(r"vis|audio|encoder|tower|image|mtp", re.IGNORECASE)


class LayerCache(NamedTuple):
    """What one layer caches, in numbers per token."""

    numbers: int
    window: int | None = None
    """The number of tokens that it caches at most."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the model that generates text."""
    for key in _NESTED:
        nested = config.get(key)
        if isinstance(nested, dict) and nested:
            return text_config(nested) if key == "thinker_config" else nested
    return config


def layer_count(text: Mapping[str, Any]) -> int | None:
    words = text.get("layers_block_type")  # Nemotron-H says no number
    return number(text, *_LAYERS) or (len(words) if isinstance(words, list) else None)


def number(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first of the keys that is a positive whole number."""
    return next((value for key in keys if (value := _positive(config.get(key))) is not None), None)


def width(text: Mapping[str, Any]) -> int | None:
    """Return how many numbers represent a token between two layers; None if that is unknown."""
    return number(text, *_WIDTH)


def heads(text: Mapping[str, Any]) -> int | None:
    """Return the number of attention heads of a layer; None if that is unknown."""
    return number(text, *_HEADS)


def caches(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> tuple[LayerCache, ...] | None:
    """Return what each layer with a cache caches, first to last; None if that is unknown.

    `shapes` are those of the weights: nested configurations leave out what is usual for their kind.
    """
    text = text_config(config)
    model_type = str(text.get("model_type", ""))
    if model_type in _ENCODERS | _RECURRENT or _is_bidirectional(text):
        return ()
    widths = _widths_of_weights(shapes)
    count = layer_count(text) or len(widths)
    if not 0 < count <= MOST_LAYERS or _is_compressed(text):
        return None
    special = _by_layer(text)
    found: list[LayerCache] = []
    for index, kind in enumerate(_kinds(text, model_type, count)):
        if kind == "none":
            continue
        of_layer = {**text, **special.get(index, {})}
        numbers = _numbers(of_layer, index, kind) or widths.get(index)
        if numbers is None:
            return None
        window = number(of_layer, *_WINDOWS) if kind == "window" else None
        found.append(LayerCache(numbers, window))
    if text.get("is_encoder_decoder", config.get("is_encoder_decoder")) is True or model_type == "longcat_flash":
        found += found  # the keys and values of the encoder's output; LongCat has two attentions in each layer
    return tuple(found)


def _is_bidirectional(text: Mapping[str, Any]) -> bool:
    return text.get("use_bidirectional_attention") is True or text.get("is_causal") is False


def _is_compressed(text: Mapping[str, Any]) -> bool:
    """Whether layers cache one vector for several tokens, as in DeepSeek-V4."""
    words = [word for key in _KINDS_OF_LAYERS for word in _list(text, key)]
    return "compress_ratios" in text or any("compressed" in str(word) for word in words)


def _by_layer(text: Mapping[str, Any]) -> Mapping[int, Mapping[str, Any]]:
    """Return what is different in single layers, as Transformers writes it: `{"05": {"head_dim": 512}}`."""
    written = text.get("per_layer_config")
    return {
        int(index): values
        for index, values in (written.items() if isinstance(written, dict) else ())
        if index.isdecimal() and len(index) < 6 and isinstance(values, dict)
    }


def _kinds(text: Mapping[str, Any], model_type: str, count: int) -> Iterator[_Kind]:
    shared = number(text, "num_kv_shared_layers") or 0
    last_own = count - shared if shared < count else count
    return (_kind(text, model_type, index) if index < last_own else "none" for index in range(count))


def _kind(text: Mapping[str, Any], model_type: str, index: int) -> _Kind:
    """Return what layer `index` caches."""
    for key in _KINDS_OF_LAYERS:
        if isinstance(words := text.get(key), list) and words:
            kind = _KINDS.get(str(words[index % len(words)]), "full")
            return "window" if kind == "full" and model_type == "recurrent_gemma" else kind
    if isinstance(letters := text.get("hybrid_override_pattern"), str) and letters:  # Nemotron-H
        return "full" if letters[index % len(letters)] == "*" else "none"
    if isinstance(kinds := text.get("attn_type_list"), list) and kinds:  # MiniMax
        return "full" if kinds[index % len(kinds)] == 1 else "none"
    if isinstance(linear := text.get("linear_attn_config"), dict):  # Kimi; counts from 1
        return "full" if index + 1 in _list(linear, "full_attn_layers") else "none"
    for key in ("attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids"):  # Bamba, LFM2, Zamba2
        if isinstance(text.get(key), list):
            return "full" if index in text[key] else "none"
    if period := number(text, "attn_layer_period"):  # Jamba
        return "full" if index % period == (number(text, "attn_layer_offset") or 0) else "none"
    if interval := number(text, "full_attention_interval"):  # Qwen3-Next
        return "full" if (index + 1) % interval == 0 else "none"
    return "window" if _slides(text, model_type, index) else "full"


def _slides(text: Mapping[str, Any], model_type: str, index: int) -> bool:
    """Whether layer `index` caches only the last tokens."""
    if number(text, "attention_chunk_size") is not None:  # Llama 4: layers with rotary embeddings
        roped = _list(text, "no_rope_layers")
        interval = number(text, "no_rope_layer_interval") or 4
        return bool(roped[index]) if index < len(roped) else (index + 1) % interval != 0
    if number(text, "sliding_window") is None or text.get("use_sliding_window") is False:
        return False
    if isinstance(flags := text.get("hybrid_layer_pattern"), list) and index < len(flags):  # MiMo
        return bool(flags[index] == 1)
    pattern = text.get("sliding_window_pattern", text.get("_sliding_window_pattern", _PATTERNS.get(model_type)))
    if isinstance(pattern, str) and pattern:  # EXAONE: `LLLG`
        return pattern[index % len(pattern)] == "L"
    if every := _positive(pattern):
        return (index + 1) % every != 0
    first = text.get("max_window_layers")  # Qwen2
    return not isinstance(first, int) or "use_sliding_window" not in text or index >= first


def _numbers(text: Mapping[str, Any], index: int, kind: _Kind) -> int | None:
    """Return how many numbers layer `index` caches per token, if the configuration says so."""
    rank, heads = number(text, "kv_lora_rank"), number(text, *_HEADS)
    if rank is not None and "qk_rope_head_dim" in text:  # multi-head latent attention: one vector for all heads
        keys_and_values = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if text.get("model_type") == "minicpm3" and heads is not None:  # which vLLM caches like any other model
            return heads * sum(number(text, key) or 0 for key in keys_and_values)
        return rank + (number(text, "qk_rope_head_dim") or 0) + (number(text, "index_head_dim") or 0)
    width = number(text, *_WIDTH)
    keys = _key_heads(text, index, kind) or heads
    if keys is None:
        return None
    of_window = ("swa_head_dim",) if kind == "window" else ("global_head_dim",)  # MiMo, Gemma 4
    of_keys = number(text, *of_window, *_HEAD_WIDTH)
    if of_keys is None:
        if heads is None or width is None or width % heads:
            return None
        of_keys = width // heads
    of_values = number(text, *(("swa_v_head_dim",) if kind == "window" else ()), "v_head_dim") or of_keys
    return keys * (of_keys + of_values)


def _key_heads(text: Mapping[str, Any], index: int, kind: _Kind) -> int | None:
    if text.get("multi_query") is True and text.get("new_decoder_architecture") is not True:  # Falcon, StarCoder
        return 1
    of_attention = text.get("attn_config")
    if isinstance(of_attention, dict) and (heads := number(of_attention, "kv_n_heads")):  # MPT, DBRX
        return heads
    for key in (*_KEY_HEADS, "num_key_value_heads_per_layer"):
        if isinstance(by_layer := text.get(key), list):  # OpenELM
            return _positive(by_layer[index]) if index < len(by_layer) else None
    if text.get("multi_query_attention") is False:  # ChatGLM
        return None
    special = "swa_num_key_value_heads" if kind == "window" else "num_global_key_value_heads"
    return number(text, special, *_KEY_HEADS)


def _widths_of_weights(shapes: Mapping[str, Sequence[int]]) -> dict[int, int]:
    """Return how many numbers each layer caches, from the shapes of what projects keys and values."""
    widths: dict[int, dict[str, int]] = {}
    for name, shape in shapes.items():
        found = _PROJECTION.search(name)
        if found is not None and len(shape) == 2 and shape[1] > 1 and not _OTHER_TOWERS.search(name):
            widths.setdefault(int(found[1]), {})[found[2]] = shape[0]
    return {layer: width["k"] + width.get("v", width["k"]) for layer, width in widths.items() if "k" in width}


def _list(config: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = config.get(key)
    return value if isinstance(value, list) else ()


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40 else None
