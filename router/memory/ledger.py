"""The ledger: what of each device our engines may use, what they are booked with, and what others hold.

    budget = total - reserve - external         (of RAM, a fifth of what others leave stays theirs)
    free   = budget - what our engines are booked with

An engine that loads is booked with its estimate, one that has answered with what was measured. What others hold
is what the device says is in use less what our engines are measured to hold. Where a driver does not tell which
process holds what, an engine that is there is taken to hold what it is booked with, and while one comes others are
taken to hold what they did. What is missing after an engine's end is on its way back, until its account is closed.

While a driver hangs, the books of its GPUs stay as they were but for what is booked.

Of RAM, weights that an engine uses as they are mapped count as its own, though the kernel could drop them, while
page cache of others counts as free, and so do mapped pages of weights that the engine has copied.

Bookkeeping only: it reads no device and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from router.config.schema import System
from router.engines.llamacpp.footprint import Share
from router.engines.llamacpp.plan import Alternative, Ground, Site
from router.hardware.devices import HOST, Readings
from router.hardware.ram import ProcessMemory
from router.scheduling.messages import Placement
from router.system.readings import Device

_SHARE_OF_RAM = 0.8
_NEWS_MIB = 32
_NEWS_SHARE = 0.01
_REST = 0.1


@dataclass(slots=True, eq=False)
class Account:
    """One engine's, from the decision to start it until its memory is back."""

    engine_id: int
    alias: str
    chosen: Alternative
    pid: int | None = None
    problem: str | None = None
    """Why it cannot even be started."""
    is_settled: bool = False
    """It neither loads nor goes: what it holds is what it is booked with."""
    is_gone: bool = False
    """Its process is, if not all of its memory."""
    has_answered: bool = False
    """It has everything that it takes late."""
    holds: dict[str, int] = field(default_factory=dict)
    """MiB now, of the devices that tell."""
    measured: dict[str, int] = field(default_factory=dict)
    """The most that it held."""
    mapped_mib: int | None = None
    """Of its weights in RAM those that it uses as they are mapped; None until that is known."""

    @property
    def main_mib(self) -> int:
        """What it is booked with where it computes: on its GPUs, or without any in RAM."""
        booked = self.booked()
        return sum(booked.get(name, 0) for name in self.chosen.gpus or (HOST,))

    @property
    def lesson(self) -> dict[str, int] | None:
        """What is to be remembered for the next engine of its kind; None while not all is known."""
        known = self.has_answered and set(self.chosen.placement) <= set(self.measured)
        return self.booked() if known and not self.chosen.is_given else None

    def in_ram(self, memory: ProcessMemory) -> int:
        """MiB of what its processes hold that it cannot do without.

        Engines copy weights into an order in which the processor computes faster (`--repack`); which of them, is
        up to the build and the processor. The pages that these come from stay mapped, but nobody reads them any
        more, and the kernel drops them at need. So what an engine has taken for itself by the time it is there,
        less the cache, is copied weights, and of what it has mapped only the rest of the weights counts; all of it
        where nobody knows how large weights and cache are.

        While it loads it may have mapped all that it copies elsewhere.
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

    def booked(self) -> dict[str, int]:
        """What the ledger counts it with."""
        estimated = self.chosen.placement
        if self.chosen.is_given:
            return dict(estimated)
        knows_parts = self.chosen.size.details is not None
        booked = {}
        for name in {**estimated, **self.measured}:
            least = estimated.get(name, 0)
            if name in self.measured and self.has_answered and (name != HOST or not knows_parts):
                least = 0  # buffers in RAM that were not touched yet are still promised
            booked[name] = max(least, self.measured.get(name, 0))
        return booked


@dataclass(frozen=True, slots=True)
class Line:
    """One device, in MiB."""

    device: Device
    used_mib: int
    external_mib: int
    reserve_mib: int
    """What engines must leave free, so that total = external + reserve + budget."""
    capacity_mib: int
    """What they could use if nobody else used anything."""
    budget_mib: int
    """What they may use together."""
    booked_mib: int
    """By all of them."""
    reserved_mib: int
    """Of that, by those that still load."""

    @property
    def free_mib(self) -> int:
        """What a further engine could have."""
        return max(0, self.budget_mib - self.booked_mib)


class Ledger:
    """`observe` what devices and processes say; `lines` is the one place to read from."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.accounts: dict[int, Account] = {}
        self.devices: Mapping[str, Device] = {}
        self._external: dict[str, int] = {}
        self._returning: dict[str, int] = {}
        """What engines that are gone have not given back yet."""
        self._told: dict[str, int] = {}

    def open(self, engine_id: int, alias: str, chosen: Alternative) -> Account:
        account = self.accounts[engine_id] = Account(engine_id, alias, chosen)
        return account

    def close(self, engine_id: int) -> None:
        self.accounts.pop(engine_id, None)

    def account_of(self, alias: str) -> Account | None:
        return next((account for account in self.accounts.values() if account.alias == alias), None)

    @property
    def pids(self) -> list[int]:
        """Of those that may still hold RAM."""
        alive = (account for account in self.accounts.values() if not account.is_gone)
        return [account.pid for account in alive if account.pid is not None]

    def observe(self, readings: Readings, processes: Mapping[int, ProcessMemory]) -> None:
        """Take in what was read. `processes` is the latest of each that is known."""
        self.devices = readings.devices
        for account in self.accounts.values():
            held = _held(account, readings.devices, processes)
            if readings.is_stale:
                held |= {name: mib for name, mib in account.holds.items() if name != HOST}
            account.holds = held
            for name, mib in account.holds.items():
                account.measured[name] = max(mib, account.measured.get(name, 0))
        for device in self.devices.values():
            if device.kind == "host" or not readings.is_stale or device.name not in self._external:
                self._external[device.name] = self._others(device, processes)

    def memory_is_back(self, account: Account) -> bool:
        """Whether nobody holds what an engine held that is gone."""
        booked = account.booked()
        return all(
            self._returning.get(name, 0) <= max(_NEWS_MIB, _REST * booked.get(name, 0))
            for name in account.chosen.gpus
        )

    # --- reading ----------------------------------------------------------------------------------------

    def lines(self) -> list[Line]:
        """Every device, GPUs first."""
        cap = self.system.memory_budget_mb
        has_gpus = any(device.kind != "host" for device in self.devices.values())
        lines = []
        for device in sorted(self.devices.values(), key=lambda device: device.kind == "host"):
            external = self._external.get(device.name, 0)
            capacity, budget = self._limits(device, 0), self._limits(device, external)
            if cap is not None and (device.kind != "host" or not has_gpus):
                capacity, budget = min(capacity, cap), min(budget, cap)
                cap -= capacity
            bookings = [
                (account.booked().get(device.name, 0), account.is_settled) for account in self.accounts.values()
            ]
            lines.append(
                Line(
                    device,
                    used_mib=device.total_mib - device.free_mib,
                    external_mib=external,
                    reserve_mib=device.total_mib - external - budget,
                    capacity_mib=capacity,
                    budget_mib=budget,
                    booked_mib=sum(mib for mib, _ in bookings),
                    reserved_mib=sum(mib for mib, is_settled in bookings if not is_settled),
                )
            )
        return lines

    def budgets(self) -> tuple[dict[str, int], dict[str, int]]:
        """What our engines may use of each device, and what they could if nobody else used anything."""
        lines = self.lines()
        self._told = {line.device.name: line.budget_mib for line in lines}
        return dict(self._told), {line.device.name: line.capacity_mib for line in lines}

    @property
    def has_news(self) -> bool:
        """Whether the budgets differ noticeably from those that were told last."""
        return is_news(self._told, {line.device.name: line.budget_mib for line in self.lines()})

    def ground(
        self, free_mib: Mapping[str, int], environment: Callable[[Iterable[Device]], Mapping[str, str]]
    ) -> Ground:
        """What placing goes by. `free_mib` is what of the budgets nobody was promised."""
        sites = {
            line.device.name: Site(
                line.device.name,
                budget_mib=line.budget_mib,
                free_mib=free_mib.get(line.device.name, 0),
                number=line.device.number,
                uuid=line.device.uuid,
                kind=line.device.kind,
                divisible=not line.device.is_part,
            )
            for line in self.lines()
        }
        devices = self.devices

        def shows(names: Sequence[str]) -> Mapping[str, str]:
            return environment(devices[name] for name in names)

        host = sites.pop(HOST)
        return Ground(tuple(sites.values()), host, shows)

    # --- sums -------------------------------------------------------------------------------------------

    def _limits(self, device: Device, external_mib: int) -> int:
        left = device.total_mib - external_mib
        if left < self.system.min_vram_required:
            return 0
        if device.kind == "host":
            left = int(left * _SHARE_OF_RAM)
        return max(0, left - self.system.vram_reserve_mb)

    def _others(self, device: Device, processes: Mapping[int, ProcessMemory]) -> int:
        used = device.total_mib - device.free_mib
        if device.kind == "host":
            if any(pid not in processes for pid in self.pids):  # just started
                return min(used, self._external.get(HOST, used))
            return max(0, used - sum(processes[pid].anonymous_mib for pid in self.pids))
        before = self._external.get(device.name, 0)
        self._returning[device.name] = ours = gone = 0
        for account in self.accounts.values():
            if device.name not in account.chosen.gpus:
                continue
            if account.is_gone:
                gone += account.booked().get(device.name, 0)
            elif device.name in account.holds:
                ours += account.holds[device.name]
            elif account.is_settled:
                ours += account.booked().get(device.name, 0)
            else:
                return min(used, before)
        rest = max(0, used - ours)
        self._returning[device.name] = returning = min(gone, max(0, rest - before))
        return rest - returning


def _held(
    account: Account, devices: Mapping[str, Device], processes: Mapping[int, ProcessMemory]
) -> dict[str, int]:
    if account.pid is None or account.is_gone:
        return {}
    memory = processes.get(account.pid)
    family = {account.pid, *(memory.family if memory is not None else ())}
    held = {}
    for name in account.chosen.gpus:
        device = devices.get(name)
        used_by = (device.used_by if device is not None else None) or {}
        if not family.isdisjoint(used_by):
            held[name] = sum(used_by.get(pid, 0) for pid in family)
    if memory is not None:
        held[HOST] = account.in_ram(memory)
    return held


def is_news(before: Placement, now: Placement) -> bool:
    """Whether the difference matters."""
    return any(
        abs(now.get(name, 0) - before.get(name, 0)) > max(_NEWS_MIB, _NEWS_SHARE * before.get(name, 0))
        for name in {**before, **now}
    ) or bool(before) != bool(now)
