"""Reader of model folders in the layout of the Hugging Face hub: `config.json`, safetensors and a tokenizer.

Only the configuration and the headers of the weights are read. A folder that no engine can load, such as a partial
download, raises `Unreadable` in bounded time and memory.
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from router.formats import hf_attention, safetensors
from router.formats.hf_attention import LayerCache
from router.formats.safetensors import BITS, Header, Incomplete, Tensor, Unreadable

__all__ = ["HfModel", "Incomplete", "Unreadable", "read"]

Purpose = Literal["completion", "embedding", "rerank"]
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODULES = "modules.json"
"""The parts of a model of Sentence Transformers, which embeds whatever its architecture."""
_READ = (".safetensors", ".json", ".jinja")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
MOST_BYTES = 64 << 20
"""Of each JSON file. The largest real ones are indexes and tokenizer configurations of some megabytes."""

DTYPE_BITS: Mapping[str, int] = {
    "float32": 32,
    "float": 32,
    "bfloat16": 16,
    "float16": 16,
    "half": 16,
    "fp8": 8,
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "int8": 8,
}
"""Bits of one number, by the names that torch and vLLM use."""
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn"}
_CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_ALREADY_SCALED = (
    "su",
    "longrope",
    "llama3",
    "yarn",
    "deepseek_yarn",
    "deepseek_llama_scaling",
    "default",
    "mrope",
)
"""Kinds of rotary scaling whose `factor` the context of the configuration includes."""

_NOT_LOADED = re.compile(r"(?:^|\.)(?:attn|attention)\.(?:bias|masked_bias)$")
"""Masks that GPT-2 and GPT-Neo keep with the weights; engines make their own."""
_BESIDE_PACKED = re.compile(
    r"(?:zeros|scales?|scale_inv|g_idx|zero_point|shape|absmax|quant_map|amax|quant_state\.\w+|SCB|weight_format)$"
)
"""Tensors that say how quantized ones are unpacked: no parameters of the model."""


@dataclass(frozen=True, slots=True)
class HfModel:
    """A model folder. Sizes are those of the weights as they are stored."""

    folder: Path
    architecture: str
    """The class that implements it, such as `LlamaForCausalLM`; empty if the configuration names none."""
    model_type: str
    """The kind of model, such as `llama`; of a model with several parts, that of the whole."""
    dtype: str
    """Type of the numbers that it computes with, in torch's words: `bfloat16`."""
    quantization: str | None
    """Method by which the weights are quantized, such as `awq`, `gptq`, `fp8` and `bitsandbytes`."""
    quantization_bits: int | None
    weight_bytes: int
    vocabulary_bytes: int
    """Size of the table with a row for each token of the vocabulary; 0 if it is unknown."""
    width: int | None
    """How many numbers represent a token between two layers; None if that is unknown."""
    parameters: int
    context: int | None
    """The most tokens for which it was made."""
    layers: int | None
    caches: tuple[LayerCache, ...] | None
    """What each layer that caches tokens caches of them; None if that is unknown."""
    has_chat_template: bool
    files: tuple[Path, ...]
    """The files with the weights."""
    heads: int | None = None
    """Number of attention heads of a layer; None if that is unknown."""
    takes_images: bool = False
    purpose: Purpose | None = "completion"
    """What it is for, according to its architecture and files; None: none of these, such as classifying images."""

    @property
    def writes_text(self) -> bool:
        return self.purpose == "completion"

    def kv_bytes_per_token(self, dtype: str | None = None) -> int | None:
        """Return the size of what all layers cache of one token; None if that is unknown.

        `dtype` is the type of the cached numbers, by default the model's.
        """
        return self.kv_bytes(1, dtype)

    def kv_bytes(self, tokens: int, dtype: str | None = None, *, ahead: int = 0) -> int | None:
        """Return the size of the cache of a sequence; None if that is unknown.

        Layers that look only at the last tokens keep no others, except that an engine may write so many `ahead`,
        such as those of a piece of a prompt, before it drops what is out of sight.
        """
        bits = DTYPE_BITS.get(self.dtype if dtype in (None, "auto") else str(dtype).removeprefix("torch."))
        if self.caches is None or bits is None:
            return None
        numbers = sum(
            cache.numbers * (tokens if cache.window is None else min(tokens, cache.window + ahead))
            for cache in self.caches
        )
        return numbers * bits // 8


def read(folder: Path) -> HfModel:
    """Return what the files of a folder say of its model. Raises Unreadable; OSError if one cannot be opened.

    Unchanged files are not read again: the headers of DeepSeek-V3's 163 files take a second.
    """
    try:
        version = stamps(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise Unreadable(f"{folder}: is no folder") from None
    return _remembered(folder, version)


def stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return path, size and modification time (ns) of each file that `read` reads; size -1: a link to nothing.

    Raises OSError if there is no folder.
    """
    found: list[tuple[str, int, int]] = []
    with os.scandir(folder) as entries:
        paths = sorted(entry.path for entry in entries if entry.name.endswith(_READ))
    for path in paths:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            found.append((path, -1, 0))
        else:
            found.append((path, status.st_size, status.st_mtime_ns))
    return tuple(found)


@functools.lru_cache(maxsize=256)
def _remembered(folder: Path, _version: tuple[tuple[str, int, int], ...]) -> HfModel:
    config = _object(folder / CONFIG)
    if config is None:
        raise Unreadable(f"{folder}: has no {CONFIG}")
    names = tuple(path.name for path in folder.iterdir())
    index = _object(folder / INDEX) if INDEX in names else None
    files = weight_files(names, index, str(folder))
    headers: list[Header] = []
    for name in files:
        try:
            headers.append(safetensors.read(folder / name))
        except FileNotFoundError:
            raise Incomplete(f"{folder}: is incomplete: {name} is missing") from None
    tokenizer = _object(folder / TOKENIZER_CONFIG) or {}
    return of_parts(
        folder,
        config,
        headers,
        tuple(folder / name for name in files),
        has_chat_template=bool(tokenizer.get("chat_template"))
        or any((folder / name).is_file() for name in TEMPLATES),
        has_modules=MODULES in names,
    )


def is_folder_of_model(names: Collection[str]) -> bool:
    """Whether a folder with files of these names holds a model, whole or not."""
    return CONFIG in names and any(name.endswith(".safetensors") or name == INDEX for name in names)


def weight_files(names: Sequence[str], index: Mapping[str, Any] | None, source: str) -> tuple[str, ...]:
    """Return the names of the files with the weights, of all that a folder has. Raises Unreadable.

    They are those of the index, if there is one; else the whole model. Other safetensors are what vLLM falls back
    to, but not the copy in Mistral's own format.
    """
    if index is not None:
        weight_map = index.get("weight_map")
        found = set(weight_map.values()) if isinstance(weight_map, dict) and _is_text(weight_map) else set()
        if not found or not all(_is_plain(name) for name in found):
            raise Unreadable(f"{source}: {INDEX} does not map tensors to files of the folder")
        missing = sorted(found - set(names))
        if missing:
            raise Incomplete(
                f"{source}: is incomplete: {len(missing)} of {len(found)} files are missing: {missing[0]}"
            )
        return tuple(sorted(found))
    if WHOLE in names:
        return (WHOLE,)
    weights = [name for name in sorted(names) if name.endswith(".safetensors") and not name.startswith("adapter")]
    weights = [name for name in weights if not name.startswith("consolidated")] or weights
    if not weights:
        raise Unreadable(f"{source}: has no weights in safetensors format")
    parts = re.search(r"-of-(\d+)\.safetensors$", weights[0])
    if parts is not None and int(parts[1]) != len(weights):
        raise Incomplete(f"{source}: is incomplete: it has {len(weights)} of {int(parts[1])} files")
    return tuple(weights)


def of_parts(
    folder: Path,
    config: Mapping[str, Any],
    headers: Sequence[Header],
    files: tuple[Path, ...],
    *,
    has_chat_template: bool,
    has_modules: bool = False,
) -> HfModel:
    """Return the model that a configuration and the headers of its weights describe. Raises Unreadable."""
    tensors = {
        name: tensor
        for header in headers
        for name, tensor in header.tensors.items()
        if not (_NOT_LOADED.search(name) and len(tensor.shape) != 1)
    }
    text = hf_attention.text_config(config)
    layers = hf_attention.layer_count(text)
    if layers is not None and layers > hf_attention.MOST_LAYERS:
        raise Unreadable(f"{folder}: {CONFIG} claims {layers:,} layers")
    quantization, bits = _quantization(config, text)
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else ""
    return HfModel(
        folder=folder,
        architecture=str(named),
        model_type=str(config.get("model_type", "")),
        dtype=_dtype(config, text, tensors),
        quantization=quantization,
        quantization_bits=bits,
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        vocabulary_bytes=_vocabulary_bytes(text, tensors),
        width=hf_attention.width(text),
        parameters=_parameters(tensors, bits),
        context=_context(text),
        layers=layers,
        caches=hf_attention.caches(config, {name: tensor.shape for name, tensor in tensors.items()}),
        has_chat_template=has_chat_template,
        files=files,
        heads=hf_attention.heads(text) or hf_attention.heads(config),
        takes_images="vision_config" in config,
        purpose=_purpose(str(named), config, has_modules=has_modules),
    )


def _purpose(architecture: str, config: Mapping[str, Any], *, has_modules: bool) -> Purpose | None:
    if "ForSequenceClassification" in architecture:  # with a single label, it says how well two texts match
        labels = config.get("id2label")
        count = len(labels) if isinstance(labels, dict) else config.get("num_labels")
        return "rerank" if count == 1 else None
    if has_modules:
        return "embedding"
    if not architecture or architecture.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return "completion"
    if "LMHead" in architecture:
        return "completion"
    reads_text = "vocab_size" in config and "vision_config" not in config
    return "embedding" if architecture.endswith("Model") and reads_text else None


def parse_object(text: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object. Raises Unreadable."""
    try:
        # Not msgspec: Python's own `json`, with which these files are written, knows `Infinity`, as in Mamba 2's.
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{source}: is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise Unreadable(f"{source}: is not a JSON object")
    return document


def _object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no such file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(f"{path}: is not a regular file")
    if status.st_size > MOST_BYTES:
        raise Unreadable(f"{path}: is larger than {MOST_BYTES >> 20} MiB")
    with path.open("rb") as file:
        return parse_object(file.read(status.st_size), str(path))


def _is_text(mapping: Mapping[Any, Any]) -> bool:
    return all(isinstance(value, str) for value in mapping.values())


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file with weights in the folder itself."""
    return name.endswith(".safetensors") and "/" not in name and "\0" not in name


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    for each in (config, text):
        for key in ("dtype", "torch_dtype"):
            if isinstance(named := each.get(key), str) and named and named != "auto":
                return named.removeprefix("torch.")
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in _TORCH_NAMES:
            sizes[tensor.dtype] += tensor.nbytes
    return _TORCH_NAMES[sizes.most_common(1)[0][0]] if sizes else "float32"


def _quantization(config: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """Return the method by which the weights are quantized, and the bits per weight, as far as that is known."""
    for each in (config, text):
        for key in ("quantization_config", "compression_config"):
            settings = each.get(key)
            if not isinstance(settings, dict):
                continue
            method = str(settings.get("quant_method") or "").lower().replace("_", "-") or "unknown"
            bits = hf_attention.number(settings, "bits", "w_bit", "weight_bits")
            if settings.get("load_in_4bit") is True or method == "mxfp4":
                bits = 4
            elif settings.get("load_in_8bit") is True or "fp8" in method:
                bits = 8
            return method, bits or _bits_of_groups(settings)
    return None, None


def _bits_of_groups(settings: Mapping[str, Any]) -> int | None:
    """Return the bits per weight of the first group of compressed tensors."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            return hf_attention.number(weights, "num_bits")
    return None


def _parameters(tensors: Mapping[str, Tensor], bits: int | None) -> int:
    """Count the model's numbers; quantized weights are packed, several in one integer."""
    if bits is None:
        return sum(tensor.elements for tensor in tensors.values())
    count = 0
    for name, tensor in tensors.items():
        if _BESIDE_PACKED.search(name):
            continue
        size = BITS.get(tensor.dtype, 0)
        is_packed = tensor.dtype in ("I32", "U8", "I8", "I64", "U32") and bits < size
        count += tensor.elements * size // bits if is_packed else tensor.elements
    return count


def _vocabulary_bytes(text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    words = hf_attention.number(text, "vocab_size", "n_vocab")
    tables = (tensor for tensor in tensors.values() if len(tensor.shape) == 2 and tensor.shape[0] == words)
    return max((table.nbytes for table in tables), default=0)


def _context(text: Mapping[str, Any]) -> int | None:
    """Return the context as vLLM derives it (`_get_and_verify_max_len`)."""
    lengths = [length for key in _CONTEXTS if (length := hf_attention.number(text, key)) is not None]
    if not lengths:
        return None
    context = hf_attention.number(text, "model_max_length") or min(lengths)
    scaling = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(scaling, dict) or str(text.get("model_type", "")).startswith("gemma3"):
        return context
    kind, factor = scaling.get("rope_type", scaling.get("type", "default")), scaling.get("factor")
    if kind in _ALREADY_SCALED or not isinstance(factor, (int, float)) or not 1 <= factor <= 1 << 20:
        return context
    return int(context * factor)
