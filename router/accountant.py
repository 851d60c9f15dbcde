"""All about memory that takes time: reads devices, sizes models, measures engines, sees to it that memory is back.

It keeps the ledger, and tells the scheduler, through `post`, what of it changes: budgets and what engines really
take. It decides nothing. Everything here runs on the event loop; what blocks is done in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from router.config import ModelConfig, System
from router.devices import Devices
from router.engine import Binary
from router.host import ProcessMemory
from router.learning import Learned
from router.memory import Account, Ledger, is_news
from router.messages import EngineMeasured, Event, Inspected, MemoryChanged, Placement
from router.out_of_memory import ran_out
from router.placing import Ground, Inspection, advise, inspect
from router.residency import ENGINES
from router.scheduler import Scheduler
from router.sizing import EngineKind, Unusable

INSPECTION_LIMIT_SEC = 60
_LOOK_SEC = (2.0, 30.0)
"""Pause between two looks at the devices: while there are engines or somebody waits, and else."""
_BACK_SEC = 5.0
_BACK_LOOK_SEC = 0.05

_log = logging.getLogger("router")


class Accountant:
    """One per dispatcher; `scheduler` is only read."""

    def __init__(
        self,
        system: System,
        binary: Binary,
        devices: Devices,
        learned: Learned,
        scheduler: Scheduler,
        post: Callable[[Event], None],
    ) -> None:
        self.ledger = Ledger(system)
        self.kind = EngineKind(binary)
        self._devices = devices
        self._learned = learned
        self._scheduler = scheduler
        self._post = post
        self._inspections: dict[str, Inspection] = {}
        self._saving = asyncio.Lock()
        self._processes: Mapping[int, ProcessMemory] = {}
        self.ledger.observe(devices.last, {})

    def configure(self, system: System) -> None:
        self.ledger.system = system
        self._tell_budgets()

    # --- looking ----------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """For ever: notice when others take memory or give it back, and when engines grow."""
        while True:
            busy = self._scheduler.engines or any(model.queue for model in self._scheduler.models.values())
            await asyncio.sleep(_LOOK_SEC[0] if busy else _LOOK_SEC[1])
            await self.look()

    async def look(self) -> None:
        """Read everything afresh, and tell what has changed."""
        readings = await self._devices.read()
        pids = self.ledger.pids
        self._processes = await self._devices.held_by(pids) if pids else {}
        self.ledger.observe(readings, self._processes)
        for account in tuple(self.ledger.accounts.values()):
            engine = self._scheduler.engines.get(account.engine_id)
            booked = account.booked()
            if engine is not None and is_news(_memory(engine.placement), booked):
                self._post(EngineMeasured(time.monotonic(), account.engine_id, booked))
        if self.ledger.has_news:
            self._tell_budgets()

    def _tell_budgets(self) -> None:
        budgets, capacity = self.ledger.budgets()
        self._post(MemoryChanged(time.monotonic(), budgets, capacity))

    # --- before a start ---------------------------------------------------------------------------------

    async def inspect(self, model: ModelConfig, system: System) -> Inspected:
        """Where it could live, by what is free now."""
        await self.look()
        look = asyncio.to_thread(inspect, model, system, self.kind, self._ground(), self._learned)
        try:
            found = await asyncio.wait_for(look, INSPECTION_LIMIT_SEC)
        except Unusable as unusable:
            problem = str(unusable)
        except asyncio.TimeoutError:
            problem = f"{model.model_path} could not be looked at within {INSPECTION_LIMIT_SEC} s"
        except Exception as error:  # whatever it is, the model must not wait for ever
            _log.exception("looking at %s failed", model.model_path)
            problem = f"{model.model_path} cannot be looked at: {error!r}"
        else:
            self._inspections[model.alias] = found
            return Inspected(
                time.monotonic(),
                model.alias,
                tuple(one.placement for one in found.alternatives),
                need=found.alternatives[0].need,
                expected_load_sec=found.expected_load_sec,
                advice=found.advice,
            )
        return Inspected(time.monotonic(), model.alias, problem=problem)

    def _ground(self) -> Ground:
        return self.ledger.ground(self._scheduler.free(), self._devices.environment)

    # --- an engine's life -------------------------------------------------------------------------------

    def open(self, engine_id: int, alias: str, placement: Placement) -> Account:
        """An engine is about to start where the scheduler wants it."""
        chosen = self._inspections[alias].chosen(placement)
        if chosen.remark:
            _log.warning("model %s: %s, for want of memory", alias, chosen.remark)
        return self.ledger.open(engine_id, alias, chosen)

    def environment(self, account: Account) -> Mapping[str, str]:
        """What shows the engine the GPUs that were chosen for it, and no others."""
        return self._devices.environment(
            self.ledger.devices[name] for name in account.chosen.gpus if name in self.ledger.devices
        )

    async def ready(self, account: Account) -> None:
        account.is_settled = True
        await self.look()

    async def answered(self, account: Account) -> None:
        """It has answered for the first time, and has all that it takes late: remember what that is."""
        await self.look()
        chosen, lesson = account.chosen, account.lesson
        if lesson is not None and chosen.size.identity is not None:
            self._learned.learn(chosen.size.identity, chosen.size.estimated, chosen.as_counted(lesson))
            await self._save()

    async def ran_out(
        self, account: Account, model: ModelConfig, system: System, log: Sequence[str]
    ) -> str | None:
        """Whether the log of a failed load tells that memory ran out. Then its next estimate is larger, and this
        is what would fit in what there was (empty if nobody knows); else None."""
        wanted = ran_out(log)
        if wanted is None:
            return None
        chosen = account.chosen
        if chosen.size.identity is not None:
            self._learned.ran_out(chosen.size.identity, chosen.as_counted(chosen.placement), wanted)
            await self._save()
        ground, placement = self._ground(), chosen.placement
        return await asyncio.to_thread(advise, model, system, self.kind, ground, self._learned, placement)

    async def close(self, account: Account) -> None:
        """Its process is gone: until its memory is back, or for a few seconds; then the books are right again."""
        account.is_gone = True
        before = self.ledger.external
        deadline = time.monotonic() + _BACK_SEC
        await self.look()
        while not self.ledger.memory_is_back(account, before):
            if time.monotonic() > deadline:
                _log.warning(
                    "model %s: its engine is gone, but after %g s not all of its memory on %s is back",
                    account.alias,
                    _BACK_SEC,
                    ", ".join(account.chosen.gpus),
                )
                break
            await asyncio.sleep(_BACK_LOOK_SEC)
            await self.look()
        self.ledger.close(account.engine_id)
        self.ledger.observe(self._devices.last, self._processes)
        self._tell_budgets()

    async def _save(self) -> None:
        async with self._saving:
            await asyncio.to_thread(self._learned.save, self._learned.entries())


def _memory(placement: Placement) -> dict[str, int]:
    return {name: mib for name, mib in placement.items() if name != ENGINES}
