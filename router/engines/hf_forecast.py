"""Forecast of where a model in safetensors runs on an otherwise idle machine, also before it is downloaded.

By formula: the weights as they are stored, the KV cache of one request, and what Transformers takes besides (vLLM:
`engines/vllm/plan.py`). Engines that have run are planned with what was measured of them instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from router.engines.hf_plan import Cache, Demand, HfPlan, largest_context
from router.engines.transformers.plan import demand_of
from router.formats.hf_model import HfModel
from router.hardware.devices import Devices
from router.memory.ledger import idle_ground
from router.memory.measurements import Identity, Learned
from router.memory.plan import Alternative, Ground, Site
from router.scheduling.messages import Placement

_MIB = 1 << 20
_USUAL_CONTEXT = 4096
"""For models whose configuration names none."""


@dataclass(frozen=True, slots=True)
class HfForecast:
    """Placement of a model if the router ran nothing else; MiB by device."""

    best: Alternative
    context: int
    """Tokens for which memory is counted."""
    free_mib: Placement
    weights_mib: float
    kv_mib: float
    largest_context: int
    """Largest context that fits; 0 if none does."""

    @property
    def placement(self) -> Placement:
        return self.best.placement

    @property
    def fits(self) -> bool:
        return all(mib <= self.free_mib[device] for device, mib in self.placement.items())


def forecast(model: HfModel, context: int | None = None) -> HfForecast:
    """Forecast a model with one request of `context` tokens, by default as many as it was made for.

    Blocking: reads the devices. Raises ValueError if its KV cache is unknown.
    """
    context = context or model.context or _USUAL_CONTEXT
    if model.kv_bytes(context) is None:
        named = model.architecture or model.model_type or "a model of unknown kind"
        weights = f"its weights take {model.weight_bytes / _MIB:,.0f} MiB"
        raise ValueError(f"what {named} caches of each token is unknown; {weights}")

    ground = idle_ground(Devices())
    demand = demand_of(model, context, gpus=len(ground.gpus))
    best = _Places(demand, ground, Learned()).inspection().alternatives[0]
    free = {site.device: site.budget_mib for site in (*ground.gpus, ground.host)}
    room = _room_mib(demand, best, ground)
    taken = partial(demand.of_request, on_gpus=bool(best.gpus))
    largest = largest_context(taken, room, model.context or _USUAL_CONTEXT)
    return HfForecast(best, context, free, demand.weights, demand.kv(context), largest)


class _Places(HfPlan):
    """Alternatives of a model of which nothing is measured yet."""

    def identity(self, gpus: int, cache: Cache) -> Identity:
        return Identity((), "forecast", (), gpus)

    def flags(self, sites: Sequence[Site], cache: Cache, mib: int) -> tuple[str, ...]:
        return ()


def _room_mib(demand: Demand, best: Alternative, ground: Ground) -> float:
    """Return what is left for the KV cache where the model is placed."""
    if not best.gpus:
        return ground.host.budget_mib - demand.without_gpus - demand.weights
    budgets = [site.budget_mib for site in ground.gpus if site.device in best.gpus]
    return len(budgets) * (min(budgets) - demand.on_each_gpu) - demand.weights
