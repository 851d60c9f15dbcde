"""Where a vLLM could run a model, and the arguments that make it claim what was planned.

On GPUs, vLLM claims a share of each (`--gpu-memory-utilization`) and makes everything that weights and working
memory leave of it a KV cache. So the share is computed from what the KV cache needs. On the CPU, the size of the
cache is an argument of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial

from router.engines.hf_plan import Cache, Demand, HfPlan, caches
from router.engines.vllm.flags import Flags
from router.engines.vllm.model import VllmModel
from router.engines.vllm.program import Program
from router.engines.vllm.sleep import FLAG
from router.formats.hf_model import DTYPE_BITS, HfModel
from router.memory.measurements import Identity, Learned, files_of
from router.memory.plan import Ground, Site, Unusable

_MIB = 1 << 20
_GIB_IN_MIB = 1024
CPU_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
_KINDS = ("cuda", "rocm")
"""Kinds of GPUs that vLLM can use."""
_ON_EACH_GPU_MIB = 2048
"""CUDA's context, buffers for a batch, and graphs."""
_BESIDE_GPUS_MIB = 3000
_WITHOUT_GPUS_MIB = 1500
"""RAM of its four processes, of which compiled code takes 45 MiB; measured with vLLM 0.32 on the CPU."""
_BATCH_ON_CPU = 2048
"""Default of --max-num-batched-tokens there."""
_WORK_ON_CPU = 24
"""Numbers of working memory per token of a batch, for each number that represents a token between layers."""
_UNKNOWN_CACHE = 0.25
"""KV cache of a model whose layers are not understood, as a part of its weights."""
_UNKNOWN_SHARE = 0.9
"""Share of each GPU for a model whose files are still to be downloaded; vLLM's own default."""
_UNKNOWN_MIB = 4096
"""RAM for weights and KV cache of such a model on the CPU, and vLLM's own default for the cache."""
_DEFAULT_CONTEXT = 4096
_BLOCK = 128
"""Tokens of a block of the KV cache on the CPU; on GPUs it is smaller. Only whole blocks are used,
and layers with a window need one more."""
_BATCH = 8192
"""Largest default of --max-num-batched-tokens. Layers with a window keep so many tokens beyond it."""
_START_SEC = 45.0
_STEP = 1000
"""Shares of GPUs are multiples of a thousandth."""
_OWN_SEAT = 1
"""Requests in addition to the slots, so that a health probe does not wait for one."""


class VllmPlan(HfPlan):
    """Alternatives of one model."""

    def __init__(
        self, model: VllmModel, folder: HfModel | None, program: Program, ground: Ground, learned: Learned
    ) -> None:
        """`folder` is None for a model whose files are still to be downloaded."""
        self._model = model
        self._folder = folder
        self._program = program
        self._flags = Flags(model.flags)
        env = model.env if program.image else {**os.environ, **model.env}
        self._given_cache_mib = _given_cache_mib(self._flags, env)
        self._own_share = self._flags.share("gpu-memory-utilization")
        gpus = tuple(site for site in ground.gpus if site.kind in _KINDS) if not program.is_for_cpu else ()
        ground = Ground(gpus, ground.host, ground.environment)
        self._is_unseen = bool(program.image) and not program.is_for_cpu and not gpus
        """Whether it is given GPUs that the router, in a container of its own without any, does not see."""
        if folder is None or self._is_unseen:
            demand = self._least_demand(model, folder)
        else:
            demand = self._demand_of(model, folder, len(gpus))
        super().__init__(demand, ground, learned)
        if program.needs_gpu and not gpus:
            reason = f"{program.build} ({program.path}) is built for GPUs, and there is none that it can use"
            raise Unusable(reason, reason)

    def _demand_of(self, model: VllmModel, folder: HfModel, gpus: int) -> Demand:
        flags = self._flags
        asked = model.context or flags.size("max-model-len")
        context = asked or folder.context or _DEFAULT_CONTEXT
        requests = model.slots
        if self._own_share is not None or self._given_cache_mib is not None:
            requests = 1  # how large the cache becomes is settled; it has to hold one
        dtype = _dtype(flags, folder)
        converted = 1.0 if folder.quantization else DTYPE_BITS[dtype] / DTYPE_BITS.get(folder.dtype, 16)
        weights_mib = folder.weight_bytes * converted / _MIB
        wanted = flags.devices
        if wanted is not None:
            counts: Sequence[int] = (wanted,)
        else:
            heads = folder.heads or 1  # a division among GPUs must not tear them
            counts = [count for count in (1, 2, 4, 8, 16) if count <= max(1, gpus) and not heads % count]
        return Demand(
            weights=weights_mib,
            kv=partial(self._kv_mib, folder, dtype, weights_mib, context),
            caches=caches(context, requests, may_shorten=asked is None and self._given_cache_mib is None),
            on_each_gpu=_ON_EACH_GPU_MIB,
            beside_gpus=_BESIDE_GPUS_MIB,
            without_gpus=_without_gpus_mib(folder, flags, DTYPE_BITS[dtype] // 8, converted),
            gpu_counts=counts,
            start_sec=_START_SEC,
        )

    def _least_demand(self, model: VllmModel, folder: HfModel | None) -> Demand:
        """Return the demand of an engine of which it is not known what it takes of its GPUs, or in RAM."""
        context = model.context or (folder.context if folder is not None else None) or _DEFAULT_CONTEXT
        return Demand(
            weights=0.0,
            kv=lambda _: 0.0,
            caches=[Cache(context, 1)],
            on_each_gpu=0.0,
            beside_gpus=_BESIDE_GPUS_MIB,
            without_gpus=_BESIDE_GPUS_MIB if self._is_unseen else _WITHOUT_GPUS_MIB + _UNKNOWN_MIB,
            gpu_counts=(self._flags.devices or 1,),
            start_sec=_START_SEC,
        )

    def _kv_mib(self, folder: HfModel, dtype: str, weights_mib: float, longest: int, tokens: int) -> float:
        """Return the KV cache of one request with so many tokens, as vLLM demands it before it starts."""
        if self._given_cache_mib is not None:
            return self._given_cache_mib * tokens / longest
        kept_as = self._flags.text("kv-cache-dtype")
        slides = any(cache.window is not None for cache in folder.caches or ())
        nbytes = folder.kv_bytes(
            (math.ceil(tokens / _BLOCK) + slides) * _BLOCK,
            dtype if kept_as in (None, "auto") else kept_as,
            ahead=(self._flags.size("max-num-batched-tokens") or _BATCH) + slides * _BLOCK,
        )
        return weights_mib * _UNKNOWN_CACHE * tokens / longest if nbytes is None else nbytes / _MIB

    def identity(self, gpus: int, cache: Cache) -> Identity:
        files = () if self._folder is None else files_of(*self._folder.files)
        own = tuple(f"{name}={value}" for name, value in sorted(self._model.env.items()))
        if self._folder is None:
            own += (str(self._model.repo),)
        words = (*self._model.flags, *own, str(cache.context), str(cache.requests), str(self._model.slots))
        if self._model.sleep:
            words += (FLAG,)
        return Identity(files, self._program.build, words, gpus)

    def claim(self, site: Site, mib: int) -> int | None:
        share = self._share(site, mib)
        return math.ceil(share * site.total_mib) if share <= 1 else None

    def flags(self, sites: Sequence[Site], cache: Cache, mib: int) -> tuple[str, ...]:
        own, added = self._flags, []
        context = cache.context if self._folder is None else self._folder.context
        if "max-model-len" not in own and (self._model.context is not None or cache.context != context):
            added += ["--max-model-len", str(cache.context)]
        if "max-num-seqs" not in own:
            added += ["--max-num-seqs", str(self._model.slots + _OWN_SEAT)]
        if not sites:
            if self._given_cache_mib is None and self._folder is not None and not self._is_unseen:
                size = max(1, math.ceil(cache.requests * self.demand.kv(cache.context) * _MIB))
                added += ["--kv-cache-memory-bytes", str(size)]
            return tuple(added)
        if self._own_share is None:
            share = max(self._share(site, mib) for site in sites)
            added += ["--gpu-memory-utilization", f"{min(1.0, share):g}"]
        if len(sites) > 1 and own.devices is None:
            added += ["--tensor-parallel-size", str(len(sites))]
        if self._model.sleep:
            added.append(FLAG)
        return tuple(added)

    def sleeps(self, sites: Sequence[Site]) -> bool:
        """See `HfPlan`."""
        return self._model.sleep and bool(sites)

    def advice(self) -> str:
        """See `HfPlan`."""
        return "lower --gpu-memory-utilization in its flags" if self._folder is None else super().advice()

    def _share(self, site: Site, mib: int) -> float:
        """Return the share of a GPU that its flags set; else the one that this is, rounded up."""
        if self._own_share is not None:
            return self._own_share
        if self._folder is None:
            return _UNKNOWN_SHARE
        return math.ceil(_STEP * mib / max(1, site.total_mib)) / _STEP


def _dtype(flags: Flags, folder: HfModel) -> str:
    """Return the type of numbers that vLLM computes with: of 16 bits even for models of 32, without --dtype."""
    asked = flags.text("dtype")
    if asked is not None and asked in DTYPE_BITS:
        return asked
    return folder.dtype if folder.dtype in DTYPE_BITS and folder.dtype != "float32" else "bfloat16"


def _without_gpus_mib(folder: HfModel, flags: Flags, nbytes: int, converted: float) -> float:
    """Return the RAM that it takes on the CPU besides weights and KV cache. `nbytes`: size of a number.

    There, tables of the vocabulary are packed for faster multiplication, and the originals stay: one for tokens
    that come in, and one for those that go out, also where the model has a single table for both.
    """
    copies = (2 if folder.writes_text else 1) * folder.vocabulary_bytes * converted
    batch = flags.size("max-num-batched-tokens") or _BATCH_ON_CPU
    return _WITHOUT_GPUS_MIB + (copies + batch * _WORK_ON_CPU * (folder.width or 0) * nbytes) / _MIB


def _given_cache_mib(flags: Flags, env: Mapping[str, str]) -> float | None:
    """Return the size of the KV cache that flags or variables set; None if they leave it to the router."""
    nbytes = flags.size("kv-cache-memory-bytes")
    if nbytes is not None:
        return nbytes / _MIB
    gib = env.get(CPU_CACHE_VARIABLE, "")
    return float(gib) * _GIB_IN_MIB if gib.isdecimal() and int(gib) else None
