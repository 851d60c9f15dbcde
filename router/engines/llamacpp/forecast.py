"""Forecast of a model's placement on an otherwise idle machine, also for models that are not downloaded yet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.engines.base import NoEngine
from router.engines.llamacpp.binary import find_binary
from router.engines.llamacpp.flags import Flags, argv
from router.engines.llamacpp.listed_devices import Listed
from router.engines.llamacpp.plan import alternatives
from router.engines.llamacpp.purpose import flags_for
from router.engines.llamacpp.sizing import EngineKind, Files, Sizer
from router.formats.gguf import GGUF
from router.hardware.devices import Devices
from router.memory.ledger import idle_ground
from router.memory.measurements import Learned
from router.memory.plan import Alternative, Footprint, Site, possible
from router.scheduling.messages import Placement
from router.system.devices import Device


@dataclass(frozen=True, slots=True)
class Forecast:
    """Placement of a model if the router ran nothing else; MiB by device."""

    best: Alternative
    need: Footprint
    free_mib: Placement
    largest_context: int
    """Largest `-c` that fits; 0 if none does."""
    flags: tuple[str, ...]
    """Flags that the router would add."""
    placements: tuple[Placement, ...]
    """All placements that the budgets allow, best first; else the best."""

    @property
    def short_mib(self) -> dict[Device, int]:
        """Missing MiB by device; empty if it fits."""
        free = self.free_mib
        return {device: mib - free[device] for device, mib in self.best.placement.items() if mib > free[device]}


def forecast(
    header: GGUF,
    flags: Flags,
    *,
    projector: GGUF | None = None,
    draft: GGUF | None = None,
    lora: tuple[GGUF, ...] = (),
    sites: Sequence[Site] = (),
) -> Forecast:
    """Forecast by the header and flags of a model. Blocking: reads the devices. Raises FlagError and OSError.

    `sites` are the devices as seen by a router that has engines.
    """
    engine = _engine()
    ground = idle_ground(Devices(listed=None if engine is None else Listed(engine, os.environ)), sites)
    asked_for = [word for name, *value in flags_for(header, flags) for word in (f"--{name}", *value)]
    if engine is not None and engine.default_slots > 0 and flags.last("parallel") is None:
        asked_for += ["--parallel", str(engine.default_slots)]
    flags = Flags([*argv(flag for flag in flags.given if flag.index >= 0), *asked_for], os.environ)
    if engine is not None and not engine.uses_gpus:
        ground = replace(ground, gpus=())
    headers = [part for part in (header, projector, draft, *lora) if part is not None]
    files = Files(
        paths=tuple(path for part in headers if part.path is not None for path in part.files or (part.path,)),
        nbytes=sum(part.file_bytes for part in headers),
        model=header,
        projector=projector,
        draft=draft,
        adapters=lora,
    )
    sizer = Sizer(files, flags, os.environ, engine, Learned())
    found = alternatives(sizer, engine, ground)
    best = found[0]
    need = best.size.details
    assert need is not None  # a model whose header is known has no figure but by its parts
    free = {site.device: site.budget_mib for site in (*ground.gpus, ground.host)}
    used = best.as_counted(free)
    return Forecast(
        best,
        need,
        free,
        sizer.largest_context((), used),
        (*asked_for, *best.flags),
        possible(found, ground),
    )


def _engine() -> EngineKind | None:
    with contextlib.suppress(NoEngine):
        return EngineKind(find_binary(os.environ.get("LLAMA_SERVER_PATH")))
    return None
