"""Alternatives for placing a model, best first, each with its memory and the flags that implement it.

An alternative decides what llama-server would otherwise decide by the memory that is free when it loads (`--fit`):
the context if no flag sets it, how layers are split among GPUs, and how many stay on the host.

The best alternative is a single GPU, the one with least memory left over, then as few GPUs as possible. A reduced
context is worse than one more GPU, and layers on the host are the last resort. The scheduler chooses among the
alternatives. Explicit flags of a model are never changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from router.config.schema import System
from router.engines.llamacpp.flags import FlagError, as_started
from router.engines.llamacpp.footprint import gpu_numbers
from router.engines.llamacpp.model import LlamaCppModel
from router.engines.llamacpp.sizing import EngineKind, Sizer, WrongFlags, read_files
from router.hardware.devices import VISIBLE, shown, visible
from router.memory.measurements import Learned
from router.memory.plan import Alternative, Ground, Inspection, Site, Size, Unusable
from router.scheduling.messages import Placement
from router.system.devices import HOST, Device

LEAST_CONTEXT = 4096
"""As in llama-server's `--fit` (common/common.h)."""
_CONTEXT_STEP = 1024
NAMES_GPUS = ("device", "spec-draft-device", "mmproj-device")
"""Flags whose values are GPUs as the engine numbers them."""
_VISIBLE_TO_VULKAN = ("GGML_VK_VISIBLE_DEVICES",)
_NO_GPU = ("", "-1", "none", "NoDevFiles")

# First guess, for a fast disk; measurements replace it.
_START_SEC = 0.1
_LOAD_BYTES_PER_SEC = 1 << 30


def inspect(
    model: LlamaCppModel, system: System, engine: EngineKind, ground: Ground, learned: Learned
) -> Inspection:
    """Read the headers and find the alternatives. Blocking: call it in a thread. Raises Unusable."""
    try:
        places = _places(model, system, engine, ground, learned)
        found = places.alternatives()
    except FlagError as error:
        raise WrongFlags(error.message) from error
    except OSError as error:
        what = f"cannot be read: {error.strerror or type(error).__name__}"
        raise Unusable(f"{error.filename or model.model_path} {what}", f"its file {what}") from error
    guessed_load_sec = _START_SEC + places.nbytes / _LOAD_BYTES_PER_SEC
    return Inspection.of(found, ground, learned, guessed_load_sec, places.advice)


def alternatives(sizer: Sizer, engine: EngineKind | None, ground: Ground) -> list[Alternative]:
    """Return the alternatives of a model without an entry, best first, including those that do not fit."""
    return _Places(sizer, engine, ground, {}).alternatives()


def advise(
    model: LlamaCppModel,
    system: System,
    engine: EngineKind,
    ground: Ground,
    learned: Learned,
    too_much: Placement,
) -> str:
    """Return advice on what fits where a placement proved too large; empty if unknown. Blocking."""

    def smaller(site: Site) -> Site:
        return replace(site, budget_mib=int(0.9 * too_much.get(site.device, 0)))

    gpus = tuple(smaller(site) for site in ground.gpus if site.device in too_much)
    host = ground.host if gpus else smaller(ground.host)
    try:
        return _places(model, system, engine, Ground(gpus, host), learned).advice()
    except (Unusable, FlagError, OSError):
        return ""


def _places(model: LlamaCppModel, system: System, engine: EngineKind, ground: Ground, learned: Learned) -> _Places:
    environ = {**os.environ, **model.env}
    flags = as_started(model.flags, model.env)
    sizer = Sizer(
        read_files(model.model_path, flags),
        flags,
        environ,
        engine,
        learned,
        given_mib=model.footprint_mb,
        multiplier=system.vram_multiplier,
    )
    return _Places(sizer, engine, ground if engine.uses_gpus else Ground((), ground.host), model.env)


@dataclass(frozen=True, slots=True)
class _Group:
    """GPUs that are used together, with their shares of the model."""

    sites: tuple[Site, ...]
    rooms: tuple[float, ...]
    added: tuple[str, ...] = ()
    """Flags by which the engine numbers them in this order."""


def _group(sites: Sequence[Site], added: tuple[str, ...] = ()) -> _Group:
    return _Group(tuple(sites), tuple(max(1.0, site.budget_mib) for site in sites), added)


class _Places:
    """Alternatives of one model on the given devices."""

    def __init__(
        self, sizer: Sizer, engine: EngineKind | None, ground: Ground, own_env: Mapping[str, str]
    ) -> None:
        self._sizer = sizer
        self._flags = sizer.flags
        self._engine = engine
        self._ground = ground
        self._own_env = own_env

    @property
    def nbytes(self) -> int:
        """Size of all files that are loaded."""
        return self._sizer.files.nbytes

    def alternatives(self) -> list[Alternative]:
        """Return all alternatives, best first, including those that never fit; at least one."""
        if not self._ground.gpus:
            return [self._on_host()]
        if self._stays_on_host:  # an engine rejects a GPU that it cannot see
            named = self._flags.last("device")
            return [self._on_host(() if named is None or named.text == "none" else ("--device", "none"))]
        groups = list(self._groups())
        found: list[Alternative] = []
        for group in groups:
            one = self._on_gpus(group)
            if one is None:  # this build does not use GPUs
                self._ground = replace(self._ground, gpus=())
                return [self._on_host()]
            if all(one.placement != other.placement for other in found):
                found.append(one)
        found.sort(key=self._rank)
        if not self._ground.holds(found[0].placement):
            roomiest = max(reversed(groups), key=lambda group: sum(site.budget_mib for site in group.sites))
            less = self._partly(roomiest) or self._without_gpus()
            found[:0] = [] if less is None else [less]
        return found

    def advice(self) -> str:
        """Return advice on what would fit instead of what the flags request."""
        if not self._sizer.knows_parts:
            return ""
        sites = () if self._stays_on_host else self._together()
        free = {Device.shown(place): site.budget_mib for place, site in enumerate(sites)}
        free[HOST] = self._ground.host.budget_mib
        if largest := self._sizer.largest_context((), free):
            return f"it would fit with -c {largest}"
        for layers in range(self._layers - 1, -1, -1) if sites else ():
            if largest := self._sizer.largest_context(("-ngl", str(layers)), free):
                return f"it would fit with -ngl {layers} -c {largest}"
        return "no context is small enough for it to fit"

    # --- what the flags say -----------------------------------------------------------------------------

    @property
    def _stays_on_host(self) -> bool:
        device, layers = self._flags.last("device"), self._flags.last("n-gpu-layers")
        return (
            (device is not None and device.text == "none")
            or (layers is not None and layers.text == "0")
            or self._named_by_variables() == []
        )

    def _own_group(self) -> _Group | None:
        """Return the GPUs of a model whose flags or variables select some, in that order.

        The engine then sees only these and numbers them from 0.
        """
        gpus = self._ground.gpus
        device, main = self._flags.last("device"), self._flags.last("main-gpu")
        if (named := self._named_by_variables()) is not None:
            return _group(named)
        overrides = self._flags.last("override-tensor")
        if self._flags.last("rpc") or (overrides is not None and re.search(r"=[A-Za-z]+\d", overrides.text)):
            return _group(gpus)
        if device is not None:
            return self._named_by_flags()
        if any(self._flags.last(name) for name in ("tensor-split", *NAMES_GPUS)):
            return _group(gpus)
        if main is not None and not self._may_divide and main.integer(low=0) < len(gpus):
            return _group([gpus[main.integer()]], ("--main-gpu", "0"))
        return _group(gpus) if main is not None else None

    def _named_by_flags(self) -> _Group:
        """Return the GPUs of `--device`, then those of other flags; all GPUs if the build is of another kind than
        the devices, as visibility then cannot be restricted."""
        gpus = self._ground.gpus
        flags = [flag for name in NAMES_GPUS if (flag := self._flags.last(name)) is not None]
        backend = "Vulkan" if self._are_of_vulkan else "CUDA|ROCm"
        if not all(re.fullmatch(rf"none|(({backend})\d+,?)+", flag.text) for flag in flags):
            return _group(gpus)
        shown = list(dict.fromkeys(number for flag in flags for number in gpu_numbers(flag.text)))
        if max(shown, default=-1) >= len(gpus):
            ours = ", ".join(str(site.device) for site in gpus)
            wrong = " ".join(word for flag in flags for word in flag.words)
            raise Unusable(f"its flags: {wrong} refers to more GPUs than available ({ours}, counted from 0)")
        added: list[str] = []
        for flag in flags:
            added += [f"--{flag.name}", re.sub(r"\d+", lambda found: str(shown.index(int(found[0]))), flag.text)]
        return _group([gpus[number] for number in shown], tuple(added))

    def _named_by_variables(self) -> list[Site] | None:
        """Return the GPUs that variables of the entry select; None if there are no such variables."""
        for name in _VISIBLE_TO_VULKAN if self._are_of_vulkan else VISIBLE:
            spelled = self._own_env.get(name)
            if spelled is None or (name == "HIP_VISIBLE_DEVICES" and not spelled):  # HIP treats "" as unset
                continue
            if spelled.split(",")[0].strip() in _NO_GPU:
                return []
            by_number: dict[int, list[Site]] = {}
            for site in self._ground.gpus:
                if self._are_of_vulkan:
                    by_number.setdefault(int(site.uuid), [site])
                else:
                    by_number.setdefault(site.device.index, []).append(site)
            named = visible(by_number, spelled)
            if not named:
                ours = ", ".join(str(site.device) for site in self._ground.gpus)
                raise Unusable(f"{name}={spelled} in its env begins with no available GPU ({ours})")
            return named
        return None

    @property
    def _are_of_vulkan(self) -> bool:
        return bool(self._ground.gpus) and self._ground.gpus[0].kind == "vulkan"

    @property
    def _may_divide(self) -> bool:
        return self._flags.text("split-mode", "layer") != "none"

    @property
    def _layers(self) -> int:
        header = self._sizer.files.model
        return (header.block_count or 0) + 1 if header is not None else 0

    @property
    def _whole_context(self) -> int | None:
        """Return the context to set, for all slots together; None if the flags set it."""
        header, flags, asked = self._sizer.files.model, self._flags, self._flags.last("ctx-size")
        if header is None or not header.context_length or flags.last("kv-unified-per-slot"):
            return None
        if asked is not None and asked.integer(low=0) > 0:
            return None
        return header.context_length * (1 if flags.kv_unified else flags.slots)

    # --- groups of GPUs ---------------------------------------------------------------------------------

    def _groups(self) -> Iterator[_Group]:
        """Return each GPU alone, then the two, three, … with most memory, by free memory and by budget."""
        own = self._own_group()
        if own is not None:
            yield own
            return
        sites = self._ground.gpus
        for site in sites:
            yield _group([site])
        divisible = [site for site in sites if not site.device.is_part] if self._may_divide else []
        for count in range(2, len(divisible) + 1):
            for figure in ("free_mib", "budget_mib"):
                room = attrgetter(figure)
                most = sorted(divisible, key=room, reverse=True)[:count]
                chosen = tuple(site for site in divisible if site in most)
                yield _Group(chosen, tuple(max(1.0, room(site)) for site in chosen))

    def _together(self) -> tuple[Site, ...]:
        """Return the largest group of GPUs that one model can use."""
        own = self._own_group()
        gpus = self._ground.gpus if own is None else own.sites
        several = tuple(site for site in gpus if not site.device.is_part) if self._may_divide else ()
        return several or tuple(sorted(gpus, key=lambda site: site.budget_mib, reverse=True)[:1])

    def _rank(self, one: Alternative) -> tuple[bool, bool, int, bool, int]:
        """Sort key: alternatives that fit come first, then unreduced ones, then those with fewer GPUs; of these,
        those that fit now, with least memory left over."""
        left = self._ground.left_mib(one)
        return not self._ground.holds(one.placement), bool(one.remark), len(one.gpus), left < 0, left

    # --- alternatives -----------------------------------------------------------------------------------

    def _on_host(self, added: tuple[str, ...] = ()) -> Alternative:
        one = self._settled(_Group((), (), added), ())
        assert one is not None
        return one

    def _on_gpus(self, group: _Group) -> Alternative | None:
        if len(group.sites) == 1 or not self._may_divide or self._flags.last("tensor-split"):
            return self._settled(group, ())
        rooms = list(group.rooms)
        one: Alternative | None = None
        for _ in range(4):  # layers are indivisible: reduce the share of a GPU with too many
            one = self._settled(group, ("--tensor-split", _percentages(rooms)))
            if one is None or not self._sizer.knows_parts:
                break
            over = [max(0, one.placement.get(site.device, 0) - site.budget_mib) for site in group.sites]
            if not any(over):
                break
            rooms = [max(1.0, room - 1.1 * mib) for room, mib in zip(rooms, over, strict=True)]
        return one

    def _partly(self, group: _Group) -> Alternative | None:
        """Return the alternative with as many layers on the GPUs as fit; None if none fits or the flags set the
        number."""
        if not self._sizer.knows_parts or self._flags.last("n-gpu-layers"):
            return None
        own_split = len(group.sites) == 1 or not self._may_divide or self._flags.last("tensor-split")
        split = () if own_split else ("--tensor-split", _percentages(group.rooms))
        context = self._whole_context
        least = None if context is None else min(context, LEAST_CONTEXT)
        best: Alternative | None = None
        low, high = 0, self._layers
        while low < high:
            middle = (low + high + 1) // 2
            remark = f"{middle} of {self._layers} layers on the GPU"
            one = self._one(group, (*split, "-ngl", str(middle)), least, remark)
            if one is not None and self._ground.holds(one.placement):
                best, low = one, middle
            else:
                high = middle - 1
        return best

    def _without_gpus(self) -> Alternative | None:
        """Return the alternative in RAM if no layer fits on a GPU; None if it does not fit or the flags require
        GPUs."""
        if not self._sizer.knows_parts or self._flags.last("n-gpu-layers") or self._own_group() is not None:
            return None
        one = self._on_host()
        remark = ", ".join(filter(None, (f"0 of {self._layers} layers on the GPU", one.remark)))
        return replace(one, remark=remark) if self._ground.holds(one.placement) else None

    def _settled(self, group: _Group, added: tuple[str, ...]) -> Alternative | None:
        """Return the alternative with the whole context if it fits, or else with the largest that does."""
        if not self._sizer.knows_parts:
            size = self._sizer.whole(group.rooms)
            return self._alternative(group, size, group.added, None, "")
        whole = self._whole_context
        one = self._one(group, added, whole, "")
        if one is None or whole is None or self._ground.holds(one.placement) or self._flags.last("ctx-size"):
            return one
        low, high = 0, whole // _CONTEXT_STEP
        while low < high:
            middle = (low + high + 1) // 2
            cut = self._one(group, added, middle * _CONTEXT_STEP, "", exact=False)
            low, high = (
                (middle, high) if cut is not None and self._ground.holds(cut.placement) else (low, middle - 1)
            )
        context = _rounded(low * _CONTEXT_STEP)
        while context >= min(LEAST_CONTEXT, whole):  # the tool may report more than the formulas
            cut = self._one(group, added, context, f"context {context} of {whole}")
            if cut is not None and self._ground.holds(cut.placement):
                return cut
            context = _rounded(context - _CONTEXT_STEP)
        return one

    @property
    def _as_placed(self) -> tuple[str, ...]:
        """It must not be changed behind our back."""
        own = self._flags.last("fit") or self._flags.last("fit-target") or self._flags.last("fit-ctx")
        return () if own or self._engine is None or not self._engine.fits_by_itself else ("--fit", "off")

    def _one(
        self, group: _Group, added: tuple[str, ...], context: int | None, remark: str, *, exact: bool = True
    ) -> Alternative | None:
        added = (*group.added, *added, *(self._as_placed if group.sites else ()))
        if context is not None:
            added = (*added, "-c", str(context))
        variables = shown(self._ground.environment([site.device for site in group.sites]), self._own_env)
        size = self._sizer.parts(added, len(group.sites), variables, exact=exact)
        return None if size is None else self._alternative(group, size, added, context, remark)

    def _alternative(
        self, group: _Group, size: Size, added: tuple[str, ...], context: int | None, remark: str
    ) -> Alternative:
        gpus = tuple(site.device for site in group.sites)
        one = Alternative(gpus, size, {}, added, context, remark, is_given=self._sizer.given_mib is not None)
        figures = one.as_driven(size.mib)
        if size.source == "measured":
            figures = self._let_in(figures, one.as_driven(size.estimated))
        return replace(one, placement=figures)

    def _let_in(self, measured: Placement, estimated: Placement) -> dict[Device, int]:
        """Lower measurements to the budget where the estimate fits: an earlier measurement does not exclude a
        model."""
        budgets = {site.device: site.budget_mib for site in (*self._ground.gpus, self._ground.host)}
        return {
            device: budgets[device] if estimated.get(device, mib) <= budgets[device] < mib else mib
            for device, mib in measured.items()
        }


def _percentages(rooms: Sequence[float]) -> str:
    """Round shares coarsely, so that small differences in memory give the same flags."""
    return ",".join(str(max(1, round(100 * room / sum(rooms)))) for room in rooms)


def _rounded(context: int) -> int:
    """Round a context down to three significant bits and a multiple of 1024, for the same reason."""
    if context < 8 * _CONTEXT_STEP:
        return context // _CONTEXT_STEP * _CONTEXT_STEP
    step = 1 << (context.bit_length() - 4)
    return context // step * step
