"""Memory manager: reads devices, sizes models, measures engines, and waits for memory to be released.

It maintains the ledger and posts changed budgets and measured engine memory to the scheduler, which makes all
decisions. Everything here runs on the event loop; blocking calls run in threads.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial

from router.config.resolved import ModelConfig
from router.config.schema import System
from router.config.snapshots import FolderHangs, FolderLooks
from router.hardware.devices import Devices
from router.hardware.ram import ProcessMemory
from router.memory.ledger import Account, Ledger, is_news
from router.memory.measurements import Learned
from router.memory.plan import Alternative, Ground, Inspection, Planner, Size, Unusable
from router.observe.reasons import Problem
from router.scheduling.messages import EngineMeasured, Event, Inspected, MemoryChanged, Placement
from router.scheduling.residency import larger, memory_of
from router.scheduling.scheduler import Scheduler
from router.system.devices import HOST, Device

INSPECTION_LIMIT_SEC = 60
_REMEMBERED = 4
_LOOK_SEC = (2.0, 30.0)
"""Interval of device readings in seconds: while there are engines or waiting requests, and otherwise."""
_MAPPED_SEC = 30.0
"""Interval of readings of mapped files, for which the kernel walks through all mapped pages."""
_LISTED_SEC = 10.0
"""Maximum age of an engine's list of GPUs, which takes a process to obtain."""
_OLD_SEC = 30.0
_ANSWER_SEC = 0.1
_BACK_SEC = 5.0
_BACK_LOOK_SEC = 0.05
_FREED, _LEAST_FREED_MIB = 0.5, 32
"""Share of what an engine was expected to release that it must have released to count as asleep."""

_log = logging.getLogger("router")


class FreesTooLittle(Problem):
    """Raised if an engine that says that it sleeps has not released its memory."""


class MemoryManager:
    """Memory manager of one dispatcher. `scheduler` is only read; `planner_of` returns a model's planner."""

    def __init__(
        self,
        system: System,
        planner_of: Callable[[ModelConfig], Planner],
        devices: Devices,
        learned: Learned,
        scheduler: Scheduler,
        post: Callable[[Event], None],
    ) -> None:
        self.ledger = Ledger(system)
        self.looks = FolderLooks(INSPECTION_LIMIT_SEC)
        self._planner_of = planner_of
        self._devices = devices
        self._learned = learned
        self._scheduler = scheduler
        self._post = post
        self._found: dict[str, deque[tuple[Alternative, ...]]] = {}
        """Alternatives of recent inspections by alias, latest first; a swap may refer to an earlier one."""
        self._saving = asyncio.Lock()
        self._processes: dict[int, ProcessMemory] = {}
        self._mapped_sec = 0.0
        self.ledger.observe(devices.last, {})

    def configure(self, system: System) -> None:
        self.ledger.system = system
        self._tell_budgets()

    # --- looking ----------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Run until cancelled: report changes in memory held by other programs and by engines."""
        while True:
            busy = self._scheduler.engines or any(model.queue for model in self._scheduler.models.values())
            await asyncio.sleep(_LOOK_SEC[0] if busy else _LOOK_SEC[1])
            mapped = time.monotonic() - self._mapped_sec >= _MAPPED_SEC
            await self.look(mapped=mapped, within_sec=_LISTED_SEC if busy else math.inf)

    async def look(self, *, mapped: bool = False, within_sec: float = 0.0) -> bool:
        """Read all devices and processes and post changes. Returns whether the devices responded.

        Mapped files are read only if `mapped`. This may take long and is done first, so that the device readings
        are not older than those of a concurrent call.
        """
        await self._read_processes(mapped)
        readings = await self._devices.read(within_sec=within_sec)
        self.ledger.observe(readings, self._processes)
        for account in tuple(self.ledger.accounts.values()):
            engine = self._scheduler.engines.get(account.engine_id)
            booked = account.booked()
            if engine is not None and is_news(memory_of(engine.placement), booked):
                self._post(EngineMeasured(time.monotonic(), account.engine_id, booked))
        if self.ledger.has_news:
            self._tell_budgets()
        return not readings.is_stale

    async def _read_processes(self, mapped: bool) -> None:
        """Read the memory of engine processes. Those not read before the deadline keep their last value.

        A reading without `mapped` counts pages shared by engines once for each engine; the file pages of the last
        full reading are kept instead.
        """
        pids = self.ledger.pids
        held = await self._devices.held_by(pids, mapped=mapped) if pids else {}
        known = {pid: memory for pid, memory in self._processes.items() if pid in self.ledger.pids}
        if mapped:
            self._mapped_sec = time.monotonic()
        else:
            files = {pid: memory.file_mib for pid, memory in known.items()}
            held = {pid: replace(memory, file_mib=files.get(pid, 0)) for pid, memory in held.items()}
        self._processes = {**known, **held}

    def _tell_budgets(self) -> None:
        budgets, capacity = self.ledger.budgets()
        self._post(MemoryChanged(time.monotonic(), budgets, capacity))

    # --- before a start ---------------------------------------------------------------------------------

    async def inspect(self, model: ModelConfig, system: System) -> Inspected:
        """Return possible placements of a model given the memory that is free now, one of which an engine may be
        started on. Raises Unusable."""
        found = await self.plan(model, system)
        self._found.setdefault(model.alias, deque(maxlen=_REMEMBERED)).appendleft(found.alternatives)
        return inspected(model.alias, found)

    async def plan(self, model: ModelConfig, system: System) -> Inspection:
        """Return the ways to run a model given the memory that is free now. Raises Unusable."""
        try:
            await self.look()
            plan, beside_others = self._planner_of(model).plan, bool(self._scheduler.engines)
            look = partial(plan, model, system, self.ground(), beside_others=beside_others)
            return await self.looks.take(look, model.model_path.parent)
        except Unusable:
            raise
        except FolderHangs:
            what = f"could not be inspected within {self.looks.limit_sec:g} s"
            raise Unusable(f"{model.model_path} {what}", f"its file {what}") from None
        except Exception as error:  # of any kind: the model must not wait forever
            _log.exception("inspection of %s failed", model.model_path)
            reason = f"{model.model_path} cannot be inspected: {error!r}"
            raise Unusable(reason, "its file cannot be inspected") from error

    def ground(self) -> Ground:
        """Return the devices as they are now, for planning."""
        return self.ledger.ground(self._scheduler.free(), self._devices.environment)

    # --- an engine's life -------------------------------------------------------------------------------

    def open(self, engine_id: int, alias: str, placement: Placement) -> Account:
        """Open the account of an engine that is about to start on `placement`."""
        looks = self._found.get(alias, ())
        chosen = next((one for found in looks for one in found if one.placement == placement), None)
        if chosen is None:
            account = self.ledger.open(
                engine_id, alias, Alternative((), Size(placement, "", placement), placement)
            )
            account.problem = "its memory plan has changed in the meantime"
            return account
        if chosen.remark:
            _log.warning("model %s: %s, because memory is short", alias, chosen.remark)
        return self.ledger.open(engine_id, alias, chosen)

    def shows(self, account: Account) -> Mapping[str, str]:
        """Return environment variables that restrict the engine to its chosen GPUs. Raises Unusable if one of them
        is no longer available."""
        gpus = account.chosen.gpus
        gone = [str(gpu) for gpu in gpus if gpu not in self.ledger.devices]
        problem = account.problem or (
            f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone" if gone else ""
        )
        if problem:
            raise Unusable(problem, problem)
        age_sec = self._devices.last.age_sec
        if gpus and age_sec > _OLD_SEC:
            _log.warning(
                "model %s: starting on %s with free memory as of %.0f s ago, because the driver does not respond",
                *(account.alias, ", ".join(map(str, gpus)), age_sec),
            )
        return self._devices.environment(self.ledger.devices[gpu] for gpu in gpus)

    async def ready(self, account: Account) -> None:
        """Measure an engine that has loaded, after a pause in which waiting requests are answered first."""
        account.is_settled = True
        await asyncio.sleep(_ANSWER_SEC)
        await self.look(mapped=True)
        identity, model = account.chosen.identity, self._scheduler.models.get(account.alias)
        if identity is not None and model is not None and model.load_is_known:
            self._learned.loaded(identity, model.load_sec)
            await self._save()

    async def answered(self, account: Account) -> None:
        """Store the measurements of an engine after its first response, when all its memory is allocated."""
        is_fresh = await self.look(mapped=True)
        chosen, lesson = account.chosen, account.lesson
        if lesson is not None and is_fresh and chosen.identity is not None:
            self._learned.learn(chosen.identity, chosen.size.estimated, chosen.as_counted(lesson))
            await self._save()

    def wake_sec(self, account: Account) -> float | None:
        """Return the time in which such an engine woke up earlier; None if unknown."""
        identity = account.chosen.identity
        return None if identity is None else self._learned.wake_sec(identity)

    async def put_to_sleep(self, account: Account, fall_asleep: Callable[[], Awaitable[None]]) -> Placement:
        """Have an engine sleep and return the memory that it then holds, as measured.

        Its word does not count, but what is freed. Raises FreesTooLittle, and whatever `fall_asleep` raises.
        """
        await self.look(mapped=True)
        expected, booked, freed = account.chosen.asleep or {}, account.booked_awake(), self._freed_since(account)
        held = {gpu: account.holds.get(gpu, booked[gpu]) for gpu in account.chosen.gpus}
        wanted = {gpu: max(_LEAST_FREED_MIB, _FREED * (mib - expected.get(gpu, 0))) for gpu, mib in held.items()}
        account.asleep = larger(booked, expected)
        account.is_settled = False
        await fall_asleep()
        deadline = time.monotonic() + _BACK_SEC
        while True:
            is_fresh = await self.look(mapped=True)
            if is_fresh and all(freed(gpu) >= mib for gpu, mib in wanted.items()):
                break
            if time.monotonic() > deadline:
                parts = [f"{max(0, freed(gpu))} of {held[gpu]} MiB on {gpu}" for gpu in wanted]
                told = f"it said that it sleeps and freed only {' and '.join(parts)}"
                raise FreesTooLittle(told if is_fresh else "what it freed cannot be read from the driver", told)
            await asyncio.sleep(_BACK_LOOK_SEC)
        asleep = {gpu: account.holds.get(gpu, max(0, mib - freed(gpu))) for gpu, mib in held.items()}
        asleep[HOST] = account.holds.get(HOST, expected.get(HOST, 0))
        account.asleep, account.is_settled = asleep, True
        if account.chosen.identity is not None:
            self._learned.slept(account.chosen.identity, account.chosen.as_counted(asleep))
            await self._save()
        return dict(asleep)

    def _freed_since(self, account: Account) -> Callable[[Device], int]:
        """Return a function that tells how many MiB an engine has released on a GPU since now; if the driver does
        not tell what it holds, by what is free there."""
        ledger, held = self.ledger, dict(account.holds)
        before = {gpu: reading.free_mib for gpu, reading in ledger.devices.items()}

        def freed(gpu: Device) -> int:
            if gpu in held:
                return held[gpu] - account.holds.get(gpu, 0)
            return ledger.devices[gpu].free_mib - before[gpu] if gpu in before and gpu in ledger.devices else 0

        return freed

    def wakes_up(self, account: Account) -> None:
        """Reserve what an engine needs that is being woken up."""
        account.asleep = larger(account.booked_awake(), account.booked())
        account.is_settled = False

    async def woke(self, account: Account) -> None:
        """Measure an engine that is awake again, and store how long that took."""
        account.asleep, account.is_settled = None, True
        identity, model = account.chosen.identity, self._scheduler.models.get(account.alias)
        if identity is not None and model is not None and model.wake_sec is not None:
            self._learned.woke(identity, model.wake_sec)
            await self._save()
        await asyncio.sleep(_ANSWER_SEC)
        await self.look(mapped=True)

    async def ran_out(
        self, account: Account, model: ModelConfig, system: System, wanted_mib: Mapping[Device, int]
    ) -> str:
        """Raise the estimate of an engine that ran out of memory. `wanted_mib` is its last failed request, by
        device as the engine counts them. Returns advice on what would have fit; empty if unknown."""
        chosen = account.chosen
        if chosen.identity is not None and not chosen.is_given:
            self._learned.ran_out(chosen.identity, chosen.as_counted(account.booked_awake()), wanted_mib)
            await self._save()
        ground, placement = self.ground(), chosen.placement
        look = partial(self._planner_of(model).advise, model, system, ground, placement)
        try:
            return await self.looks.take(look, model.model_path.parent)
        except FolderHangs:
            return ""

    async def close(self, account: Account) -> None:
        """Close the account of an engine that has exited once its memory is released, or after a few seconds.

        Does not wait during shutdown, or while the driver does not report the memory in use.
        """
        account.is_gone = True
        try:
            await self._until_back(account)
        finally:
            self.ledger.close(account.engine_id)
            self.ledger.observe(self._devices.last, self._processes)
            self._tell_budgets()

    async def _until_back(self, account: Account) -> None:
        deadline = time.monotonic() + _BACK_SEC
        while account.pids and not self._scheduler.shutting_down and await self.look():
            if self.ledger.memory_is_back(account):
                return
            if time.monotonic() > deadline:
                _log.warning(
                    "model %s: its engine has exited, but after %g s not all of its memory on %s is free",
                    *(account.alias, _BACK_SEC, ", ".join(map(str, account.chosen.gpus))),
                )
                return
            await asyncio.sleep(_BACK_LOOK_SEC)

    async def _save(self) -> None:
        async with self._saving:
            await asyncio.to_thread(self._learned.save, self._learned.entries())


def inspected(alias: str, found: Inspection) -> Inspected:
    """Return the result of an inspection as the scheduler takes it."""
    return Inspected(
        time.monotonic(),
        alias,
        tuple(one.placement for one in found.alternatives),
        need=found.alternatives[0].need,
        expected_load_sec=found.expected_load_sec,
        load_is_known=found.load_is_known,
        advice=found.advice,
    )
