"""Where a model in safetensors could run: alternatives on one GPU, on several together, or in RAM.

The kinds of engine that load such models share this. What an alternative takes is the size of the weights, the KV
cache and an overhead, corrected by what was measured of engines that ran before.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

from router.memory.measurements import Identity, Learned
from router.memory.plan import Alternative, Ground, Inspection, Share, Site, Size
from router.system.devices import HOST, Device

_MIB = 1 << 20
_LEAST_CONTEXT = 4096
_STEP = 256
_ASLEEP_MIB = 1024
"""On each GPU of an engine that sleeps, of which it had more: CUDA's context and graphs."""
_PINNED = 1.5
"""RAM for weights of an engine that sleeps, as a multiple: PyTorch rounds blocks of pinned memory up to powers of
two."""
_LOAD_BYTES_PER_SEC = 1 << 30


@dataclass(frozen=True, slots=True)
class Cache:
    """KV cache that an engine could have."""

    context: int
    """Tokens of the longest request."""
    requests: int
    """Number of requests of this length that it holds at once."""
    remark: str = ""
    """What was reduced to fit the model, in words."""

    @property
    def tokens(self) -> int:
        """Tokens of all requests together."""
        return self.context * self.requests


def caches(context: int, slots: int, *, may_shorten: bool) -> list[Cache]:
    """List the possible caches, best first: `slots` whole contexts, fewer, and last shorter contexts of one."""
    found = [Cache(context, slots)]
    found += [
        Cache(context, requests, f"KV cache for {requests} instead of {slots} requests of full length")
        for requests in range(slots - 1, 0, -1)
    ]
    shorter = context // 2
    while may_shorten and shorter >= _LEAST_CONTEXT:
        found.append(Cache(shorter, 1, f"context {shorter} of {context}"))
        shorter //= 2
    return found


def largest_context(taken: Callable[[int], float], room_mib: float, most: int) -> int:
    """Return the most tokens, up to `most`, for which what is taken fits into the room; a multiple of 256, or
    `most`."""
    if taken(most) <= room_mib:
        return most
    low, high = 0, most // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if taken(middle * _STEP) <= room_mib else (low, middle - 1)
    return low * _STEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Memory that engines of one model take, in MiB."""

    weights: float
    kv: Callable[[int], float]
    """Returns the MiB of the KV cache of one request with so many tokens. It need not grow evenly."""
    caches: Sequence[Cache]
    """Best first; at least one."""
    on_each_gpu: float
    """In addition to weights and KV cache."""
    beside_gpus: float
    """RAM of an engine that computes on GPUs."""
    without_gpus: float
    """RAM of an engine that computes on the CPU, in addition to weights, KV cache and what `work` returns."""
    gpu_counts: Sequence[int] = (1,)
    """Numbers of GPUs among which the model can be divided; none: it runs in RAM even if there are GPUs."""
    start_sec: float
    """Loading time apart from reading the weights."""
    work: Callable[[int], float] = lambda _: 0.0
    """Returns the MiB that an engine on the CPU needs to compute a prompt with so many tokens at once."""

    def of_request(self, tokens: int, *, on_gpus: bool) -> float:
        """Return the MiB that grow with a request: its KV cache, and working memory on the CPU."""
        return self.kv(tokens) + (0.0 if on_gpus else self.work(tokens))


class HfPlan(ABC):
    """Alternatives of one model on this machine. Each kind of engine has a subclass."""

    def __init__(self, demand: Demand, ground: Ground, learned: Learned) -> None:
        self.demand = demand
        self.ground = ground
        self._learned = learned

    @abstractmethod
    def identity(self, gpus: int, cache: Cache) -> Identity:
        """Return what measurements of such an engine hold for."""

    @abstractmethod
    def flags(self, sites: Sequence[Site], cache: Cache, mib: int) -> tuple[str, ...]:
        """Return the arguments that make an engine run as planned, with `mib` on each of the GPUs."""

    def claim(self, site: Site, mib: int) -> int | None:
        """Return the MiB that an engine wants free on a GPU on which it needs `mib`; None: only those."""
        return None

    def sleeps(self, sites: Sequence[Site]) -> bool:
        """Whether an engine on these GPUs can sleep."""
        return False

    def inspection(self) -> Inspection:
        found = sorted((self._on(sites) for sites in dict.fromkeys(self._groups())), key=self._rank)
        load_sec = self.demand.start_sec + self.demand.weights * _MIB / _LOAD_BYTES_PER_SEC
        return Inspection.of(found, self.ground, self._learned, load_sec, self.advice)

    def advice(self) -> str:
        """Return what would fit on the roomiest place."""
        demand, host = self.demand, self.ground.host
        rooms = [
            len(sites) * min(site.budget_mib - demand.on_each_gpu for site in sites)
            for sites in self._groups()
            if sites
        ]
        room = max(rooms) if rooms else host.budget_mib - demand.without_gpus
        if room < demand.weights:
            return f"its weights alone are {math.ceil(demand.weights)} MiB"
        taken = partial(demand.of_request, on_gpus=bool(rooms))
        tokens = largest_context(taken, room - demand.weights, demand.caches[0].context)
        if tokens <= 0:
            return "no context is small enough for it to fit"
        return f"it would fit with a context of {tokens}"

    def _groups(self) -> Iterator[tuple[Site, ...]]:
        """Yield each GPU alone, then several with the most room: by what is free, and by what there is in all.

        A model is divided equally, so the GPUs of a group are of one size.
        """
        gpus, counts = self.ground.gpus, self.demand.gpu_counts
        if not gpus or not counts:
            yield ()
            return
        for count in counts:
            if count == 1:
                yield from ((site,) for site in gpus)
                continue
            for total in sorted({site.total_mib for site in gpus}):
                alike = [site for site in gpus if site.total_mib == total and not site.device.is_part]
                if len(alike) >= count:
                    for room in ("free_mib", "budget_mib"):
                        most = sorted(alike, key=attrgetter(room), reverse=True)[:count]
                        yield tuple(site for site in alike if site in most)

    def _on(self, sites: tuple[Site, ...]) -> Alternative:
        """Return the alternative with the best cache that fits; with the smallest one if none does."""
        for cache in self.demand.caches:
            one = self._with(sites, cache)
            if self.ground.holds(one.placement):
                break
        return one

    def _with(self, sites: tuple[Site, ...], cache: Cache) -> Alternative:
        demand, count = self.demand, len(sites)
        kv = cache.requests * demand.kv(cache.context)
        share = Share(weights=demand.weights / max(1, count), kv=kv / max(1, count))
        if sites:
            shares = {Device.shown(place): replace(share, compute=demand.on_each_gpu) for place in range(count)}
            shares[HOST] = Share(work=demand.beside_gpus)
        else:
            shares = {HOST: replace(share, compute=demand.without_gpus, work=demand.work(cache.context))}
        estimated = {device: math.ceil(each.total) for device, each in shares.items()}
        identity = self.identity(count, cache)
        raised = self._learned.raised(identity)
        needed = {device: max(mib, raised.get(device, 0)) for device, mib in estimated.items()}
        mib = max((needed[Device.shown(place)] for place in range(count)), default=0)
        claims = {Device.shown(place): self.claim(site, mib) for place, site in enumerate(sites)}
        claimed = {device: claim for device, claim in claims.items() if claim is not None}
        size = self._corrected(needed, claimed, identity)
        if needed != estimated and size.source != "measured":
            size = replace(size, source=f"{size.source}, raised since it ran out of memory")
        gpus = tuple(site.device for site in sites)
        flags = self.flags(sites, cache, mib)
        one = Alternative(gpus, size, {}, flags, cache.tokens, cache.remark)
        asleep = one.as_driven(self._asleep(size, count, identity)) if self.sleeps(sites) else None
        return replace(one, placement=one.as_driven(size.mib), asleep=asleep)

    def _asleep(self, size: Size, count: int, identity: Identity) -> Mapping[Device, int]:
        """Return what an engine holds asleep: the weights in RAM, a rest on its GPUs; or what was measured."""
        gpus = map(Device.shown, range(count))
        held = {gpu: min(_ASLEEP_MIB, size.mib[gpu] // 4) for gpu in gpus}
        held[HOST] = size.mib[HOST] + math.ceil(_PINNED * self.demand.weights)
        return self._learned.asleep(identity) or held

    def _corrected(self, needed: Mapping[Device, int], claimed: Mapping[Device, int], identity: Identity) -> Size:
        """Return a size corrected by what such engines, or others of the same files, were measured to take.

        What an engine claims has to be free when it starts, whatever it takes of that.
        """
        estimated = {**needed, **claimed}
        measured = self._learned.measured(identity)
        if measured is not None:
            wanted = {device: max(mib, claimed.get(device, 0)) for device, mib in {**needed, **measured}.items()}
            return Size(wanted, "measured", estimated, identity)
        ratio = self._learned.ratio(identity)
        scaled = {
            device: math.ceil(mib * (ratio.gpus if device.is_gpu else ratio.host))
            for device, mib in needed.items()
        }
        source = "weights, KV cache and overhead"
        if scaled != needed:
            source += ", scaled by what was measured with other flags"
        return Size({**scaled, **claimed}, source, estimated, identity)

    def _rank(self, one: Alternative) -> tuple[bool, bool, int, bool, int]:
        """What fits comes first, then what is whole, then fewer GPUs; of those, where it fits now and snugly."""
        left = self.ground.left_mib(one)
        return not self.ground.holds(one.placement), bool(one.remark), len(one.gpus), left < 0, left
