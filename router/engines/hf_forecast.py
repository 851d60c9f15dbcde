"""Forecast of where a model in safetensors runs on an otherwise idle machine, also before it is downloaded.

By formula, for the kind of engine that would run it here. Engines that have run are planned with what was measured
of them instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from router.config.schema import System
from router.engines.hf_choice import SAFETENSORS, order
from router.engines.hf_plan import Cache, HfPlan, largest_context
from router.engines.registry import KINDS
from router.engines.transformers.plan import demand_of
from router.engines.vllm.entry import MOST_REQUESTS
from router.engines.vllm.model import VllmModel
from router.engines.vllm.plan import VllmPlan
from router.engines.vllm.program import find_program
from router.formats.hf_model import HfModel
from router.hardware.devices import Devices
from router.memory.ledger import idle_ground
from router.memory.measurements import Identity, Learned
from router.memory.plan import Alternative, Ground, Site, Unusable, possible
from router.scheduling.messages import Placement

_MIB = 1 << 20
_USUAL_CONTEXT = 4096
"""For models whose configuration names none."""


@dataclass(frozen=True, slots=True)
class HfForecast:
    """Placement of a model if the router ran nothing else; MiB by device."""

    engine: str
    """Name of the engine, for display."""
    best: Alternative
    cache: Cache
    """KV cache for which memory is counted."""
    free_mib: Placement
    weights_mib: float
    kv_mib: float
    largest_context: int
    """Largest context that fits, with one request at once; 0 if none does."""
    placements: tuple[Placement, ...]
    """All placements that the budgets allow, best first; else the best."""

    @property
    def placement(self) -> Placement:
        return self.best.placement

    @property
    def fits(self) -> bool:
        return all(mib <= self.free_mib[device] for device, mib in self.placement.items())


def forecast(
    model: HfModel, context: int | None = None, quantize: str | None = None, sites: Sequence[Site] = ()
) -> HfForecast:
    """Forecast a model with requests of `context` tokens, by default as many as it was made for.

    It is counted for the first kind of engine that can run it here, else for Transformers, which alone knows
    `quantize`. `sites` are the devices as seen by a router that has engines. Blocking: looks for the engines and
    reads the devices. Raises ValueError if its KV cache is unknown there.
    """
    ground = idle_ground(Devices(), sites)
    system = _system()
    plan: HfPlan | None = None
    if quantize is None and _first_kind(model, system) == VllmModel.engine:
        plan = _plan_of_vllm(model, context, system, ground)
    engine = "Transformers" if plan is None else "vLLM"
    longest = context or model.context or _USUAL_CONTEXT
    if plan is None:
        if model.kv_bytes(longest) is None:
            named = model.architecture or model.model_type or "a model of unknown kind"
            weights = f"its weights take {model.weight_bytes / _MIB:,.0f} MiB"
            raise ValueError(f"what {named} caches of each token is unknown; {weights}")
        demand = demand_of(model, longest, quantize or "no", gpus=len(ground.gpus))
        plan = _OnTransformers(demand, ground, Learned())

    demand, ground = plan.demand, plan.ground
    found = plan.inspection().alternatives
    best = found[0]
    cache = next(cache for cache in demand.caches if cache.remark == best.remark)
    free = {site.device: site.budget_mib for site in (*ground.gpus, ground.host)}
    taken = partial(demand.of_request, on_gpus=bool(best.gpus))
    largest = largest_context(taken, _room_mib(plan, best), model.context or longest)
    kv_mib = cache.requests * demand.kv(cache.context)
    placements = possible(found, ground)
    return HfForecast(engine, best, cache, free, demand.weights, kv_mib, largest, placements)


def _first_kind(model: HfModel, system: System) -> str | None:
    """Return the kind of engine that would run a model whose entry names none; None if none can."""
    names = [name for name, kind in KINDS.items() if kind.file_format == SAFETENSORS]
    chosen = order(names, model.purpose, system, has_chat_template=model.has_chat_template).best_first
    return chosen[0] if chosen else None


def _system() -> System:
    """Return the programs that the environment names."""
    named = {kind: os.environ.get(f"{kind.upper()}_PATH") or None for kind in ("vllm", "transformers")}
    return System(vllm_path=named["vllm"], transformers_path=named["transformers"])


def _plan_of_vllm(model: HfModel, context: int | None, system: System, ground: Ground) -> HfPlan | None:
    """Return the plan that vLLM has with the settings of an entry without any; None if it cannot run here."""
    configured = VllmModel(alias="forecast", model_path=model.folder, slots=MOST_REQUESTS, context=context)
    try:
        return _OnVllm(configured, model, find_program(system.vllm_path), ground, Learned())
    except Unusable:
        return None


def _unmeasured(gpus: int) -> Identity:
    """Return the identity of engines of which nothing is measured: their files may be elsewhere."""
    return Identity((), "forecast", (), gpus)


class _OnTransformers(HfPlan):
    """Alternatives in Transformers of a model of which nothing is measured yet."""

    def identity(self, gpus: int, cache: Cache) -> Identity:
        return _unmeasured(gpus)

    def flags(self, sites: Sequence[Site], cache: Cache, mib: int) -> tuple[str, ...]:
        return ()


class _OnVllm(VllmPlan):
    """Alternatives in vLLM of a model of which nothing is measured yet."""

    def identity(self, gpus: int, cache: Cache) -> Identity:
        return _unmeasured(gpus)


def _room_mib(plan: HfPlan, best: Alternative) -> float:
    """Return what is left for the KV cache where the model is placed."""
    demand, ground = plan.demand, plan.ground
    if not best.gpus:
        return ground.host.budget_mib - demand.without_gpus - demand.weights
    budgets = [site.budget_mib for site in ground.gpus if site.device in best.gpus]
    return len(budgets) * (min(budgets) - demand.on_each_gpu) - demand.weights
