"""Memory of a model by its header and flags alone, computed as llama.cpp computes it.

Weights, KV cache and recurrent state follow llama.cpp's source to the byte (build 11434; each function names the
source). The compute buffer and a projector's working memory follow rules fitted to measurements, as only the
engine's graph code determines them. Weights on the CPU count once, mapped or copied: if the backend repacks them
into a copy, the kernel can drop the original pages. Not included: the CUDA context (0.3 to 0.5 GiB per process and
GPU; keep a reserve), and reductions by `--fit`, on by default, when less memory is free than the flags require.

Pure functions, no I/O.
"""

from __future__ import annotations

import platform
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

from router.engines.llamacpp.architectures import (
    KEEPS_PAST_STATES,
    Layout,
    head_sizes,
    integer,
    layout,
    per_layer,
    widest_product,
)
from router.engines.llamacpp.flags import Flag, Flags
from router.engines.llamacpp.selection import Batch, selection
from router.formats.ggml import EMBEDDING_ARCHITECTURES, TENSOR_TYPES, TensorType
from router.formats.gguf import GGUF, Tensor
from router.memory.plan import Footprint, Share
from router.system.devices import HOST, Device

MIB = 1 << 20

# llama-server's defaults: common/common.h.
_BATCH, _MICRO_BATCH, _CACHE_RAM_MIB, _DRAFT_TOKENS = 2048, 512, 8192, 3
_PADDING = 256

_CACHE_TYPES = {kind.name.lower(): kind for kind in TENSOR_TYPES.values()}
_LAYER_OF = re.compile(r"blk\.(\d+)\.")
# `LLM_TENSOR_LAYER_INPUT` in src/llama-arch.cpp: these stay on the host.
_INPUTS = frozenset({"token_embd", "position_embd", "token_types", "token_embd_norm", "per_layer_token_embd"})
_REPACKED = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}) | (
    frozenset({"Q5_K", "Q6_K", "Q8_0"}) if platform.machine() in ("arm64", "aarch64") else frozenset()
)
# `LLM_FFN_EXPS_REGEX` and `LLM_FFN_DENSE_REGEX` in common/common.h.
_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
_DENSE = r"\.ffn_(up|down|gate)\."
_SPECULATES_WITH_STATES = frozenset({"draft-mtp", "draft-eagle3", "draft-dflash", "draft-dspark"})
# For projectors without an image size.
_PROJECTOR_WORK_BYTES = 1 << 30


def estimate(
    header: GGUF,
    flags: Flags,
    *,
    projector: GGUF | None = None,
    draft: GGUF | None = None,
    adapters: Sequence[GGUF] = (),
    gpus: int = 1,
) -> Footprint:
    """Return the footprint by formula. Raises `FlagError` if a relevant flag has an invalid value."""
    asked = _count(flags, "ctx-size", 0)
    return _estimate(_parts(header, flags, draft, adapters, gpus), _cells(header, flags, asked), projector)


def largest_context(
    header: GGUF,
    flags: Flags,
    free_mib: Mapping[Device, int],
    *,
    projector: GGUF | None = None,
    draft: GGUF | None = None,
    adapters: Sequence[GGUF] = (),
) -> int:
    """Return the largest `-c` that fits, up to the training context; 0 if none does.

    `free_mib` is by device, as in `Footprint.devices`; its GPUs are the ones to use.
    """
    gpus = sum(device.is_gpu for device in free_mib)
    parts = _parts(header, flags, draft, adapters, gpus)

    def fits(steps: int) -> bool:
        need = _estimate(parts, _cells(header, flags, steps * _PADDING), projector).mib()
        return all(mib <= free_mib.get(device, 0) for device, mib in need.items())

    steps = -(-integer(header, "context_length") // _PADDING) * (1 if flags.kv_unified else flags.slots)
    if not steps or not fits(1):  # usually not, when called for several numbers of layers
        return 0
    low, high = 1, steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * _PADDING


@dataclass(frozen=True, slots=True)
class _Cells:
    """`llama_context::llama_context` in src/llama-context.cpp: division of the KV cache into slots."""

    per_stream: int
    streams: int
    slots: int
    micro_batch: int
    outputs: int

    def of_summaries(self, tokens: int) -> int:
        """Return the number of summary cells, each of `tokens` tokens (`dsv4_comp_size` in
        src/llama-kv-cache-dsv4.cpp)."""
        return _pad(-(-self.per_stream // tokens))

    def of_window(self, window: int, *, whole: bool) -> int:
        """`llama_kv_cache_iswa::llama_kv_cache_iswa` in src/llama-kv-cache-iswa.cpp."""
        if whole:
            return self.per_stream
        sharing = self.slots if self.streams == 1 else 1
        return _pad(min(self.per_stream, window * sharing + self.micro_batch))


def _cells(header: GGUF, flags: Flags, asked: int) -> _Cells:
    slots = flags.slots
    context = asked or slots * _count(flags, "kv-unified-per-slot", 0) or integer(header, "context_length")
    context = context or _PADDING
    batch, micro = _count(flags, "batch-size", _BATCH), _count(flags, "ubatch-size", _MICRO_BATCH)
    embeds = flags.switch("embedding", False) or flags.switch("rerank", False)
    if header.hyperparameter("attention.causal") is not False:
        batch = min(context, batch)
    micro = min(batch, micro or batch)
    streams = 1 if flags.kv_unified else slots
    per_stream = _pad(context) if streams == 1 else _pad(_pad(context) // streams)
    return _Cells(per_stream, streams, slots, micro, micro if embeds else slots)


def slot_context(header: GGUF, flags: Flags, *, is_sized: bool = False) -> int:
    """Return the context of one request, including its output, in tokens; 0 if unknown.

    `server_context_impl::n_ctx_slot` in tools/server/server-context.cpp: never more than the training context.
    Without `-c`, each slot has all of it, as `plan.py` ensures, unless `is_sized`: then slots share it.
    """
    trained, asked = _trained(header, flags), _count(flags, "ctx-size", 0)
    most = [trained, _count(flags, "kv-unified-per-slot", 0)]
    if asked or (is_sized and trained):
        most.append(_cells(header, flags, asked).per_stream)
    return min(filter(None, most), default=0)


def _trained(header: GGUF, flags: Flags) -> int:
    """Return the training context, extended by YaRN if set (`llama_init_from_model`)."""
    trained, told = integer(header, "context_length"), header.hyperparameter("rope.scaling.type")
    scale = flags.last("rope-scale") or flags.last("rope-freq-scale")
    number = scale.number() if scale is not None else 0.0
    if flags.text("rope-scaling", told if isinstance(told, str) else "") != "yarn" or number <= 0:
        return trained
    original = integer(header, "rope.scaling.original_context_length", trained)
    factor = number if scale is not None and scale.name == "rope-scale" else 1 / number
    return int((_count(flags, "yarn-orig-ctx", 0) or original) * factor)


@dataclass(frozen=True, slots=True)
class _Part:
    """Model in the engine: the main one, or its draft."""

    header: GGUF
    layout: Layout
    weights: Mapping[Device, int]
    device_of: Callable[[int], Device]
    """Device of a layer's weights, cache and state; the index after the last layer is the output."""
    cache_on: Callable[[int], Device]
    k_bytes: float
    v_bytes: float
    flags: Flags

    @property
    def flash_attention(self) -> bool:
        """Whether flash attention is used: `auto` enables it on CPUs and current GPUs; Grok never has it
        (`llama_init_from_model` in src/llama-context.cpp)."""
        if self.header.architecture == "grok":
            return False
        return self.flags.text("flash-attn", "auto") not in ("off", "0", "false", "disabled")

    @property
    def _past_states(self) -> int:
        """Number of past states per slot (`need_n_rs_seq` in common/common.h)."""
        speculates = _SPECULATES_WITH_STATES & set(self.flags.text("spec-type", "").split(","))
        keeps = bool(speculates) and self.header.architecture in KEEPS_PAST_STATES
        return _count(self.flags, "spec-draft-n-max", _DRAFT_TOKENS) if keeps else 0

    def _own(self, cells: _Cells) -> _Cells:
        return replace(cells, streams=cells.slots) if self.layout.slots_apart else cells

    def cache(self, cells: _Cells) -> dict[Device, Share]:
        """`llama_kv_cache::llama_kv_cache` in src/llama-kv-cache.cpp, `llama_memory_recurrent` in its file."""
        cells = self._own(cells)
        window_cells = cells.of_window(self.layout.window, whole=self.flags.switch("swa-full", False))
        layers = self.layout.layers[: None if _predicts_tokens(self.flags) else self.layout.trunk]
        widest_v = max((layer.v for layer in layers), default=0)
        states = cells.slots * (1 + self._past_states)
        shares: dict[Device, Share] = {}
        for index, layer in enumerate(layers):
            count = (window_cells if layer.windowed else cells.per_stream) * cells.streams
            v = widest_v if layer.has_v and not self.flash_attention else layer.v
            kv = count * (layer.k * self.k_bytes + v * self.v_bytes)
            picked_from = count
            if layer.compressed:
                picked_from = cells.of_summaries(layer.compressed) * cells.streams
                kv += picked_from * layer.k * self.k_bytes
            kv += picked_from * (layer.indexer * self.k_bytes + layer.indexer_v * self.v_bytes)
            device = self.cache_on(index)
            share = Share(kv=kv / MIB, recurrent=layer.state * 4 * states / MIB)
            shares[device] = shares.get(device, Share()) + share
        return shares

    def compute(self, cells: _Cells) -> dict[Device, Share]:
        """Return the buffer for intermediate results, by a rule fitted to the engine's output.

        Per token of a micro-batch: five rows of the embedding's width (one of them once per hyper-connection), and
        the widest result of a layer or, for the few output tokens, the logits; per kind of cache, a mask; and the
        tensors of `selection.py`. For most models it matches the CPU backend to the MiB; other backends differ.
        """
        cells = self._own(cells)
        width = self.header.embedding_length or 0
        vocabulary = next((t.shape[-1] for t in self.header.tensors if t.name == "token_embd.weight"), 0)
        if self.header.architecture in EMBEDDING_ARCHITECTURES:  # these compute no logits
            vocabulary = 0
        layers = self.layout.layers
        windowed = cells.of_window(self.layout.window, whole=self.flags.switch("swa-full", False))
        masks = [cells.per_stream] if any(layer.k and not layer.windowed for layer in layers) else []
        masks += [windowed] if any(layer.windowed for layer in layers) else []
        attended = max(masks, default=0) + max(
            (cells.of_summaries(layer.compressed) for layer in layers if layer.compressed), default=0
        )
        inner, mask_bytes = widest_product(self.header, len(layers), cells.micro_batch), 2
        if not self.flash_attention and masks:
            heads = max(per_layer(self.header, "attention.head_count", len(layers)), default=0)
            inner, mask_bytes = max(inner, 3 * width) + heads * attended, 4

        batch = Batch(
            tokens=cells.micro_batch,
            cells=cells.per_stream,
            window=windowed,
            slots=cells.slots,
            are_shared=cells.streams == 1,
            flash_attention=self.flash_attention,
        )
        chosen = selection(self.header, self.layout, batch)
        rows = 4 + max(1, integer(self.header, "hyper_connection.count"))
        floats = rows * width * cells.micro_batch + max(
            inner * cells.micro_batch + chosen.attending // 4, chosen.choosing // 4, vocabulary * cells.outputs
        )
        masked = mask_bytes * sum(masks) * cells.micro_batch + chosen.held
        inputs = Share(compute=(4 * width * cells.micro_batch + masked) / MIB)
        used = {self.device_of(index) for index in range(len(layers) + 1)}
        shares = {HOST: inputs} | dict.fromkeys(used, Share(compute=(4 * floats + masked) / MIB))
        shares[HOST] += self._work(cells, attended)
        return shares

    def _work(self, cells: _Cells, attended: int) -> Share:
        """Return the working memory of the CPU backend: without flash attention, a copy of the scores of all heads
        in the precision of V (`GGML_OP_MUL_MAT` in `ggml_graph_plan`, ggml/src/ggml-cpu/ggml-cpu.c); otherwise
        almost nothing."""
        layers = self.layout.layers
        if self.flash_attention or not any(
            layer.v and self.device_of(index) == HOST for index, layer in enumerate(layers)
        ):
            return Share()
        heads = max(per_layer(self.header, "attention.head_count", len(layers)), default=0)
        return Share(work=heads * attended * cells.micro_batch * 2 / MIB)


def _parts(header: GGUF, flags: Flags, draft: GGUF | None, adapters: Sequence[GGUF], gpus: int) -> list[_Part]:
    parts = [_part(header, flags, gpus, adapters, draft=False)]
    if draft is not None:
        parts.append(_part(draft, flags, gpus, draft=True))
    return parts


def _part(header: GGUF, flags: Flags, gpus: int, adapters: Sequence[GGUF] = (), *, draft: bool) -> _Part:
    kinds = ("spec-draft-type-k", "spec-draft-type-v") if draft else ("cache-type-k", "cache-type-v")
    k_type, v_type = (_cache_type(flags, kind) for kind in kinds)
    plan = layout(header)
    device_of = _placement(len(plan.layers), flags, _usable_gpus(flags, gpus, draft=draft), draft=draft)
    # With a GPU, the CPU keeps weights in a layout that suits both (`make_cpu_buft_list`).
    repacks = flags.switch("repack", True) and not gpus
    offloads = flags.switch("kv-offload", True)
    part = _Part(
        header=header,
        layout=plan,
        weights=_weights(header, plan, flags, device_of, adapters, draft=draft, repacks=repacks),
        device_of=device_of,
        cache_on=device_of if offloads else lambda _: HOST,
        k_bytes=k_type.block_bytes / k_type.block,
        v_bytes=v_type.block_bytes / v_type.block,
        flags=flags,
    )
    _check_cache(part, kinds, (k_type, v_type))
    return part


def _check_cache(part: _Part, flags: tuple[str, str], types: tuple[TensorType, TensorType]) -> None:
    """Raise `FlagError` for a quantized K or V that the engine rejects (`llama_init_from_model`)."""
    trunk = part.layout.layers[: part.layout.trunk]
    heads = per_layer(part.header, "attention.head_count", len(trunk))
    kinds_of_layers = {layer.windowed for layer in trunk} or {False}
    lengths = (head_sizes(part.header, heads, windowed=windowed) for windowed in kinds_of_layers)
    for name, kind, of_a_head in zip(flags, types, zip(*lengths, strict=True), strict=True):
        flag = part.flags.last(name)
        if flag is None or kind.block == 1:
            continue
        if name == flags[-1] and not part.flash_attention:
            lacks = "which grok does not have" if part.header.architecture == "grok" else "and --flash-attn is off"
            raise flag.error(f"cannot be {flag.text}: a quantized V cache needs flash attention, {lacks}")
        odd = next((length for length in of_a_head if length % kind.block), 0)
        if odd and part.flash_attention:
            raise flag.error(
                f"cannot be {flag.text}: it packs {kind.block} numbers at a time, and a head has {odd}"
            )


def _estimate(parts: Iterable[_Part], cells: _Cells, projector: GGUF | None) -> Footprint:
    devices: dict[Device, Share] = {}

    def add(shares: Mapping[Device, Share]) -> None:
        for device, share in shares.items():
            devices[device] = devices.get(device, Share()) + share

    flags = None
    for part in parts:
        flags = flags or part.flags
        add({device: Share(weights=nbytes / MIB) for device, nbytes in part.weights.items()})
        add(part.cache(cells))
        add(part.compute(cells))
    assert flags is not None
    if projector is not None:
        add({_projector_device(flags, _gpus_of(devices)): Share(projector=_projector_bytes(projector) / MIB)})
    cache_ram = flags.integer("cache-ram", _CACHE_RAM_MIB)
    return Footprint(
        devices={device: devices[device] for device in (*_gpus_of(devices), HOST)},
        provenance="llama.cpp's formulas applied to the file's header",
        context=cells.per_stream * cells.streams,
        host_cache_mib=None if cache_ram < 0 else cache_ram,
    )


def _weights(
    header: GGUF,
    plan: Layout,
    flags: Flags,
    device_of: Callable[[int], Device],
    adapters: Sequence[GGUF],
    *,
    draft: bool,
    repacks: bool,
) -> dict[Device, int]:
    """Bytes per device (`llama_model_loader::create_tensor` in src/llama-model-loader.cpp).

    Adapters of a tensor are on its device (`llama_adapter_lora_init_impl` in src/llama-adapter.cpp). Tensors that
    the CPU backend repacks count twice only if the original pages are locked.
    """
    overridden = _overrides(flags, draft=draft)
    output = len(plan.layers)
    skipped = range(0) if _predicts_tokens(flags) else range(plan.trunk, output)
    is_repacked = _is_repacked if repacks else lambda _: False
    is_locked = _locks_mapped(flags)
    nbytes = {HOST: 0}
    for tensor in chain(header.tensors, *(adapter.tensors for adapter in adapters)):
        match = _LAYER_OF.match(tensor.name)
        if match is not None:
            if int(match[1]) in skipped:
                continue
            device = device_of(int(match[1]))
        else:
            device = HOST if tensor.name.partition(".")[0] in _INPUTS else device_of(output)
        kept_elsewhere = next((where for pattern, where in overridden if pattern.search(tensor.name)), None)
        device = kept_elsewhere or device
        nbytes[device] = nbytes.get(device, 0) + tensor.nbytes
        is_input = match is None and tensor.name.partition(".")[0] in _INPUTS
        if is_locked and device == HOST and not kept_elsewhere and not is_input and is_repacked(tensor):
            nbytes[HOST] += tensor.nbytes

    # Tied embeddings are an input and an output: a copy is made where the output wants them otherwise
    # (`TENSOR_DUPLICATED`), on a GPU or repacked.
    tensors = {tensor.name: tensor for tensor in header.tensors}
    tied = tensors.get("token_embd.weight") if "output.weight" not in tensors else None
    if tied is not None and any(layer.k or layer.state for layer in plan.layers):
        device = device_of(output)
        if device != HOST or is_repacked(tied):
            nbytes[device] = nbytes.get(device, 0) + tied.nbytes
    return nbytes


def _is_repacked(tensor: Tensor) -> bool:
    """Return whether the CPU backend uses a copy of a tensor in another layout
    (`ggml_repack_get_optimal_repack_type` in ggml/src/ggml-cpu/repack.cpp).

    This is valid for x86 with AVX2 and for ARM with i8mm; builds with AMX kernels copy more types.
    """
    return len(tensor.shape) > 1 and tensor.type in _REPACKED and tensor.shape[1] % 8 == 0


def _locks_mapped(flags: Flags) -> bool:
    """Return whether mapped pages are locked in RAM, as if they were copied."""
    mode = flags.last("load-mode")
    if mode is not None:
        return mode.text == "mmap+mlock"
    return flags.switch("mlock", False) and flags.switch("mmap", True)


def _placement(layers: int, flags: Flags, gpus: Sequence[int], *, draft: bool) -> Callable[[int], Device]:
    """Return the device of each layer (`get_layer_buft_list` in src/llama-model.cpp).

    Without `--tensor-split`, llama.cpp divides by free memory, which is unknown here: GPUs count as equal.
    """
    flag = flags.last("spec-draft-ngl" if draft else "n-gpu-layers")
    everything = layers + 1
    wanted = -1 if flag is None or flag.text in ("auto", "all") else flag.integer()
    on_gpu = min(wanted, everything) if wanted >= 0 else everything
    first = everything - on_gpu
    main = flags.integer("main-gpu", 0)
    if not gpus or on_gpu == 0:
        return lambda _: HOST
    if flags.text("split-mode", "layer") == "none":
        only = Device.shown(gpus[main] if 0 <= main < len(gpus) else gpus[0])
        return lambda layer: HOST if layer < first else only
    split = flags.last("tensor-split")
    parts = list(split.numbers() if split else ())[: len(gpus)]
    parts += [0.0] * (len(gpus) - len(parts))
    if min(parts) < 0 or not any(parts):
        parts = [1.0] * len(gpus)
    ends = [end / sum(parts) for end in accumulate(parts)]

    def device_of(layer: int) -> Device:
        if layer < first:
            return HOST
        return Device.shown(gpus[bisect_right(ends[:-1], (layer - first) / on_gpu)])

    return device_of


def gpu_numbers(text: str) -> list[int]:
    """Return the numbers in `CUDA1,CUDA0`, as the engine numbers GPUs; -1 for other names, nothing for `none`."""
    names = [name.strip() for name in text.split(",")]
    found = [re.fullmatch(r"[A-Za-z]+(\d+)", name) for name in names if name != "none"]
    return [int(name[1]) if name is not None else -1 for name in found]


def _usable_gpus(flags: Flags, gpus: int, *, draft: bool) -> list[int]:
    """Return the numbers of the GPUs in the order in which they get layers."""
    flag = (flags.last("spec-draft-device") if draft else None) or flags.last("device")
    if flag is None:
        return list(range(gpus))
    numbers = gpu_numbers(flag.text)
    return numbers if all(0 <= number < gpus for number in numbers) else list(range(min(gpus, len(numbers))))


def _overrides(flags: Flags, *, draft: bool) -> list[tuple[re.Pattern[str], Device]]:
    """Return patterns of tensors on another device than their layer; the first match counts (common/arg.cpp)."""
    prefix = "spec-draft-" if draft else ""
    found = []
    for flag in flags.given:
        if flag.name == f"{prefix}cpu-moe":
            found.append((_pattern(flag, _EXPERTS), HOST))
        elif flag.name in (f"{prefix}n-cpu-moe", f"{prefix}n-cpu-ffn"):
            blocks = "|".join(map(str, range(min(flag.integer(low=0), 999))))
            if blocks:
                rest = _EXPERTS if flag.name.endswith("moe") else _DENSE
                found.append((_pattern(flag, rf"blk\.({blocks}){rest}"), HOST))
        elif flag.name == f"{prefix}override-tensor":
            for item in flag.text.split(","):
                pattern, _, buffer = item.rpartition("=")
                number = re.fullmatch(r"[A-Za-z]+(\d+)", buffer)
                found.append((_pattern(flag, pattern), Device.shown(int(number[1])) if number else HOST))
    return found


def _pattern(flag: Flag, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise flag.error(f"has a pattern that is not a regular expression: {pattern!r} ({error})") from None


def _cache_type(flags: Flags, name: str) -> TensorType:
    flag = flags.last(name)
    kind = "f16" if flag is None else flag.text.lower()
    if kind not in _CACHE_TYPES:
        assert flag is not None
        raise flag.error(f"takes a type like f16, q8_0 or q4_0, not {flag.text!r}")
    return _CACHE_TYPES[kind]


def _count(flags: Flags, name: str, default: int) -> int:
    flag = flags.last(name)
    return default if flag is None else flag.integer(low=0)


def _predicts_tokens(flags: Flags) -> bool:
    """Return whether the layers that predict further tokens are loaded (`load_mtp` in common/common.cpp)."""
    return "draft-mtp" in flags.text("spec-type", "").split(",")


def _gpus_of(devices: Iterable[Device]) -> list[Device]:
    return sorted(device for device in devices if device.is_gpu)


def _projector_device(flags: Flags, used: Sequence[Device]) -> Device:
    """Return the projector's device. `used` are the GPUs of the model itself."""
    named = flags.last("mmproj-device")
    if not used or not flags.switch("mmproj-offload", True) or (named is not None and named.text == "none"):
        return HOST
    number = gpu_numbers(named.text)[0] if named is not None else -1
    return Device.shown(number) if number >= 0 else used[0]


def _projector_bytes(projector: GGUF) -> int:
    """Return the memory of the tensors and of encoding the largest image: scores of all heads, activations of a
    layer."""
    tensors = sum(tensor.nbytes for tensor in projector.tensors)
    size, patch, width, feed_forward, heads = (
        integer(projector, f"vision.{key}")
        for key in ("image_size", "patch_size", "embedding_length", "feed_forward_length", "attention.head_count")
    )
    if not size or not patch:
        return tensors + _PROJECTOR_WORK_BYTES
    patches = (size // patch) ** 2
    return tensors + 4 * patches * (heads * patches + 3 * feed_forward + 5 * width)


def _pad(cells: int) -> int:
    return -(-cells // _PADDING) * _PADDING
