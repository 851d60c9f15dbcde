"""Memory ledger: budget, reservations of engines, and memory held by other programs, for each device in MiB.

    budget = total - reserve - external         (of RAM, a fifth of what others leave is not used)
    free   = budget - reservations of engines

The reservation of a loading engine is its estimate, that of an engine that has answered is its measurement.
External memory is what the device reports as used less the measured memory of engines. If a driver does not
report memory by process, a loaded engine is assumed to hold its reservation, and external memory is assumed
constant during a load. Memory still missing after an engine's exit counts as being released until its account is
closed.

While a driver hangs, the values of its GPUs are kept, except reservations.

In RAM, mapped weights in use count as the engine's, although the kernel could drop them; page cache of other
programs counts as free, and so do mapped pages of weights that the engine has copied.

Bookkeeping only: no device is read and nothing is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from router.config.schema import System
from router.hardware.devices import Devices, Readings
from router.hardware.ram import ProcessMemory
from router.memory.plan import Alternative, Ground, Share, Site
from router.scheduling.messages import Placement
from router.system.devices import HOST, Device
from router.system.readings import Reading

_SHARE_OF_RAM = 0.8
_NEWS_MIB = 32
_NEWS_SHARE = 0.01
_REST = 0.1


@dataclass(slots=True, eq=False)
class Account:
    """Account of one engine, from the decision to start it until its memory is released."""

    engine_id: int
    alias: str
    chosen: Alternative
    pids: tuple[int, ...] = ()
    """Processes whose RAM, with that of their children, is the engine's; empty before the start and if unknown."""
    problem: str | None = None
    """Reason why the engine cannot be started."""
    is_settled: bool = False
    """True while the engine is neither loading nor exiting: it holds what is reserved for it."""
    is_gone: bool = False
    """True once the process has exited; its memory may not be released yet."""
    has_answered: bool = False
    """True once memory allocated at the first inference has been observed."""
    holds: dict[Device, int] = field(default_factory=dict)
    """MiB held now, on devices that report it."""
    measured: dict[Device, int] = field(default_factory=dict)
    """Maximum MiB held so far."""
    mapped_mib: int | None = None
    """Mapped weights in use, in MiB of RAM; None until known."""
    asleep: dict[Device, int] | None = None
    """Reservation while it falls asleep, sleeps or wakes up; None while it is awake."""

    @property
    def main_mib(self) -> int:
        """Reservation on the devices that compute: the engine's GPUs, or RAM if it has none."""
        booked = self.booked()
        return sum(booked.get(device, 0) for device in self.chosen.gpus or (HOST,))

    @property
    def lesson(self) -> dict[Device, int] | None:
        """Measurement to store for later engines with the same identity; None while incomplete."""
        known = self.has_answered and set(self.chosen.placement) <= set(self.measured)
        return self.booked_awake() if known and not self.chosen.is_given else None

    def in_ram(self, memory: ProcessMemory) -> int:
        """Return the MiB of RAM held by its processes that it needs.

        Engines copy some weights into a layout that the processor computes faster (`--repack`); which ones depends
        on build and processor. The original pages stay mapped but are not read again, and the kernel drops them
        when needed. Anonymous memory of a ready engine less its cache is therefore taken for copied weights, and
        of its mapped files only the remaining weights count; all of them if the sizes of weights and cache are
        unknown.

        While an engine loads, it may have mapped everything that it copies.
        """
        if not self.is_settled:
            return memory.anonymous_mib
        details = self.chosen.size.details
        if self.mapped_mib is None and details is not None:
            share = details.devices.get(HOST, Share())
            copied = max(0, memory.anonymous_mib - math.floor(share.kv + share.recurrent))
            self.mapped_mib = max(0, math.ceil(share.weights) - copied)
        mapped_mib = memory.file_mib if self.mapped_mib is None else min(memory.file_mib, self.mapped_mib)
        return memory.anonymous_mib + mapped_mib

    def booked(self) -> dict[Device, int]:
        """Reservation by device in MiB."""
        return self.booked_awake() if self.asleep is None else dict(self.asleep)

    def booked_awake(self) -> dict[Device, int]:
        """Reservation by device in MiB while it is awake."""
        estimated = self.chosen.placement
        if self.chosen.is_given:
            return dict(estimated)
        knows_parts = self.chosen.size.details is not None
        booked = {}
        for device in {**estimated, **self.measured}:
            least = estimated.get(device, 0)
            if device in self.measured and self.has_answered and (device.is_gpu or not knows_parts):
                least = 0  # untouched buffers in RAM remain reserved
            booked[device] = max(least, self.measured.get(device, 0))
        return booked


@dataclass(frozen=True, slots=True)
class Line:
    """Values of one device in MiB."""

    reading: Reading
    used_mib: int
    external_mib: int
    reserve_mib: int
    """Memory that engines must leave free: total = external + reserve + budget."""
    capacity_mib: int
    """Memory available to engines if other programs used none."""
    budget_mib: int
    """Memory that all engines together may use."""
    booked_mib: int
    """Reservations of all engines."""
    reserved_mib: int
    """Part of `booked_mib` that belongs to loading engines."""

    @property
    def device(self) -> Device:
        return self.reading.device

    @property
    def free_mib(self) -> int:
        """Memory available to another engine."""
        return max(0, self.budget_mib - self.booked_mib)


class Ledger:
    """Accounts of engines and values of devices. `observe` takes readings, `lines` returns the values."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.accounts: dict[int, Account] = {}
        self.devices: Mapping[Device, Reading] = {}
        self._external: dict[Device, int] = {}
        self._returning: dict[Device, int] = {}
        """Memory of exited engines that is not released yet."""
        self._told: dict[Device, int] = {}

    def open(self, engine_id: int, alias: str, chosen: Alternative) -> Account:
        account = self.accounts[engine_id] = Account(engine_id, alias, chosen)
        return account

    def close(self, engine_id: int) -> None:
        self.accounts.pop(engine_id, None)

    def accounts_of(self, alias: str) -> list[Account]:
        """Accounts of a model's engines."""
        return [account for account in self.accounts.values() if account.alias == alias]

    @property
    def pids(self) -> list[int]:
        """Processes that may still hold RAM."""
        return [pid for account in self.accounts.values() if not account.is_gone for pid in account.pids]

    def observe(self, readings: Readings, processes: Mapping[int, ProcessMemory]) -> None:
        """Update from readings. `processes` holds the latest reading of each process."""
        self.devices = readings.devices
        for account in self.accounts.values():
            held = _held(account, readings.devices, processes)
            if readings.is_stale:
                held |= {device: mib for device, mib in account.holds.items() if device.is_gpu}
            account.holds = held
            if account.asleep is not None:  # the copy of its weights in RAM is no part of it awake
                continue
            for device, mib in account.holds.items():
                account.measured[device] = max(mib, account.measured.get(device, 0))
        for device, reading in self.devices.items():
            if device == HOST or not readings.is_stale or device not in self._external:
                self._external[device] = self._others(reading, processes)

    def memory_is_back(self, account: Account) -> bool:
        """Whether the memory of an exited engine has been released."""
        booked = account.booked()
        return all(
            self._returning.get(gpu, 0) <= max(_NEWS_MIB, _REST * booked.get(gpu, 0))
            for gpu in account.chosen.gpus
        )

    # --- reading ----------------------------------------------------------------------------------------

    def lines(self) -> list[Line]:
        """Values of every device, GPUs first."""
        cap = self.system.memory_budget_mb
        has_gpus = any(device.is_gpu for device in self.devices)
        lines = []
        for device in sorted(self.devices, key=lambda device: not device.is_gpu):
            reading, external = self.devices[device], self._external.get(device, 0)
            capacity, budget = self._limits(reading, 0), self._limits(reading, external)
            if cap is not None and (device.is_gpu or not has_gpus):
                capacity, budget = min(capacity, cap), min(budget, cap)
                cap -= capacity
            bookings = [
                (account.booked().get(device, 0), account.is_settled) for account in self.accounts.values()
            ]
            lines.append(
                Line(
                    reading,
                    used_mib=reading.total_mib - reading.free_mib,
                    external_mib=external,
                    reserve_mib=reading.total_mib - external - budget,
                    capacity_mib=capacity,
                    budget_mib=budget,
                    booked_mib=sum(mib for mib, _ in bookings),
                    reserved_mib=sum(mib for mib, is_settled in bookings if not is_settled),
                )
            )
        return lines

    def budgets(self) -> tuple[dict[Device, int], dict[Device, int]]:
        """Return the memory that engines may use of each device, now and if other programs used none."""
        lines = self.lines()
        self._told = {line.device: line.budget_mib for line in lines}
        return dict(self._told), {line.device: line.capacity_mib for line in lines}

    @property
    def has_news(self) -> bool:
        """Whether the budgets differ noticeably from those returned last."""
        return is_news(self._told, {line.device: line.budget_mib for line in self.lines()})

    def ground(self, free_mib: Placement, environment: Callable[[Iterable[Reading]], Mapping[str, str]]) -> Ground:
        """Return the devices for planning. `free_mib` is the part of the budgets that is not reserved."""
        sites = {
            line.device: Site(
                line.device,
                budget_mib=line.budget_mib,
                free_mib=free_mib.get(line.device, 0),
                total_mib=line.reading.total_mib,
                uuid=line.reading.uuid,
                kind=line.reading.kind,
            )
            for line in self.lines()
        }
        readings = self.devices

        def shows(gpus: Sequence[Device]) -> Mapping[str, str]:
            return environment(readings[gpu] for gpu in gpus)

        host = sites.pop(HOST)
        return Ground(tuple(sites.values()), host, shows)

    # --- sums -------------------------------------------------------------------------------------------

    def _limits(self, reading: Reading, external_mib: int) -> int:
        left = reading.total_mib - external_mib
        if left < self.system.min_vram_required:
            return 0
        if reading.device == HOST:
            left = int(left * _SHARE_OF_RAM)
        return max(0, left - self.system.vram_reserve_mb)

    def _others(self, reading: Reading, processes: Mapping[int, ProcessMemory]) -> int:
        device, used = reading.device, reading.total_mib - reading.free_mib
        if device == HOST:
            if any(pid not in processes for pid in self.pids):  # just started
                return min(used, self._external.get(HOST, used))
            return max(0, used - sum(processes[pid].anonymous_mib for pid in self.pids))
        before = self._external.get(device, 0)
        self._returning[device] = ours = gone = 0
        for account in self.accounts.values():
            if device not in account.chosen.gpus:
                continue
            if account.is_gone:
                gone += account.booked().get(device, 0)
            elif device in account.holds:
                ours += account.holds[device]
            elif account.is_settled:
                ours += account.booked().get(device, 0)
            else:
                return min(used, before)
        rest = max(0, used - ours)
        self._returning[device] = returning = min(gone, max(0, rest - before))
        return rest - returning


def _held(
    account: Account, devices: Mapping[Device, Reading], processes: Mapping[int, ProcessMemory]
) -> dict[Device, int]:
    if not account.pids or account.is_gone:
        return {}
    known = [processes[pid] for pid in account.pids if pid in processes]
    family = {*account.pids, *(member for memory in known for member in memory.family)}
    held = {}
    for gpu in account.chosen.gpus:
        reading = devices.get(gpu)
        used_by = (reading.used_by if reading is not None else None) or {}
        if not family.isdisjoint(used_by):
            held[gpu] = sum(used_by.get(pid, 0) for pid in family)
    if known:
        anonymous_mib = sum(memory.anonymous_mib for memory in known)
        held[HOST] = account.in_ram(ProcessMemory(anonymous_mib, sum(memory.file_mib for memory in known)))
    return held


def is_news(before: Placement, now: Placement) -> bool:
    """Return whether two placements differ noticeably."""
    return any(
        abs(now.get(device, 0) - before.get(device, 0)) > max(_NEWS_MIB, _NEWS_SHARE * before.get(device, 0))
        for device in {**before, **now}
    ) or bool(before) != bool(now)


def idle_ground(devices: Devices, sites: Sequence[Site] = ()) -> Ground:
    """Return the machine's current memory as seen by a router without engines that uses every GPU. Blocking.

    `sites` are the devices as seen by a router that has engines; these replace what is read here.
    """
    ledger = Ledger(System())
    ledger.observe(devices.read_blocking(), {})
    ground = ledger.ground(ledger.budgets()[0], devices.environment)
    if not sites:
        return ground
    gpus = tuple(site for site in sites if site.device.is_gpu and site.device in ledger.devices)
    return replace(ground, gpus=gpus, host=next(site for site in sites if site.device == HOST))
