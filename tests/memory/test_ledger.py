"""The books of memory: who holds what, by what devices and processes say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
from conftest import examples
from gpus import GPU0, GPU1
from hypothesis import given, settings
from hypothesis import strategies as st

from router.config.schema import System
from router.hardware.devices import Readings
from router.hardware.ram import ProcessMemory
from router.memory.ledger import Account, Ledger, Line
from router.memory.plan import Alternative, Footprint, Share, Size
from router.system.devices import HOST, Device, by_name
from router.system.readings import Reading


def gpu(number: int, used_mib: int, total_mib: int = 10000, used_by: Mapping[int, int] | None = None) -> Reading:
    gpu = Device.gpu(number)
    return Reading(gpu, "cuda", "", str(gpu), total_mib, total_mib - used_mib, used_by=used_by)


def ram(used_mib: int, total_mib: int = 10000) -> Reading:
    return Reading(HOST, "host", "", "", total_mib, total_mib - used_mib)


def readings(*taken: Reading) -> Readings:
    everything = (ram(1000, 32000), *taken)
    return Readings({reading.device: reading for reading in everything}, 0.0)


def book(
    ledger: Ledger, engine_id: int, gpus: tuple[Device, ...] = (), given: bool = False, **figures: int
) -> Account:
    mib = {Device.named(name): figure for name, figure in figures.items()}
    account = ledger.open(engine_id, f"m{engine_id}", Alternative(gpus, Size(mib, "", mib), mib, is_given=given))
    account.pids = (engine_id,)
    return account


def line(ledger: Ledger, device: Device) -> Line:
    return next(line for line in ledger.lines() if line.device == device)


def settle(account: Account) -> None:
    account.is_settled = account.has_answered = True


def test_what_others_hold_of_a_gpu_is_not_ours_to_give() -> None:
    ledger = Ledger(System(vram_reserve_mb=500))
    ledger.observe(readings(gpu(0, used_mib=3000)), {})
    gpu0 = line(ledger, GPU0)
    assert (gpu0.external_mib, gpu0.budget_mib, gpu0.capacity_mib) == (3000, 6500, 9500)


def test_an_engine_is_booked_with_its_estimate_until_it_has_answered() -> None:
    ledger = Ledger(System())
    account = book(ledger, 1, (GPU0,), gpu0=4000)
    ledger.observe(readings(gpu(0, used_mib=1500, used_by={1: 500})), {})
    gpu0 = line(ledger, GPU0)
    assert (gpu0.external_mib, gpu0.booked_mib, gpu0.reserved_mib, gpu0.free_mib) == (1000, 4000, 4000, 5000)
    settle(account)
    ledger.observe(readings(gpu(0, used_mib=4600, used_by={1: 3600})), {})
    gpu0 = line(ledger, GPU0)
    assert (gpu0.external_mib, gpu0.booked_mib, gpu0.reserved_mib, gpu0.free_mib) == (1000, 3600, 0, 5400)


def test_an_engine_that_takes_more_than_was_thought_is_booked_with_it_at_once() -> None:
    ledger = Ledger(System())
    account = book(ledger, 1, (GPU0,), gpu0=4000)
    ledger.observe(readings(gpu(0, used_mib=4500, used_by={1: 4500})), {})
    assert account.booked() == {GPU0: 4500}


def test_a_figure_from_the_configuration_is_never_replaced() -> None:
    ledger = Ledger(System())
    account = book(ledger, 1, (GPU0,), given=True, gpu0=4000)
    settle(account)
    ledger.observe(readings(gpu(0, used_mib=6000, used_by={1: 6000})), {})
    assert account.booked() == {GPU0: 4000}
    assert account.measured[GPU0] == 6000
    assert account.lesson is None


def test_where_the_driver_does_not_tell_who_holds_what_others_stay_while_one_of_ours_comes() -> None:
    ledger = Ledger(System())
    ledger.observe(readings(gpu(0, used_mib=1000)), {})
    account = book(ledger, 1, (GPU0,), gpu0=4000)
    ledger.observe(readings(gpu(0, used_mib=3000)), {})
    assert line(ledger, GPU0).external_mib == 1000, "the 2000 are ours, most likely"
    settle(account)
    ledger.observe(readings(gpu(0, used_mib=5200)), {})
    assert line(ledger, GPU0).external_mib == 1200
    ledger.close(1)
    ledger.observe(readings(gpu(0, used_mib=1200)), {})
    assert line(ledger, GPU0).budget_mib == 8800


def test_another_containers_process_ids_are_as_good_as_none() -> None:
    ledger = Ledger(System())
    settle(book(ledger, 1, (GPU0,), gpu0=4000))
    ledger.observe(readings(gpu(0, used_mib=5000, used_by={77001: 4000})), {})
    assert line(ledger, GPU0).external_mib == 1000


def test_in_ram_mapped_weights_are_ours_though_the_kernel_calls_them_free() -> None:
    ledger = Ledger(System())
    account = book(ledger, 1, host=3000)
    settle(account)
    # 1000 by others, 500 by our engine's buffers; its 2400 of mapped weights are page cache.
    ledger.observe(readings(ram(used_mib=1500)), {1: ProcessMemory(500, 2400)})
    host = line(ledger, HOST)
    assert host.external_mib == 1000
    assert host.budget_mib == int(0.8 * 9000)
    assert host.booked_mib == 2900
    assert account.lesson == {HOST: 2900}


def test_the_pages_that_copied_weights_come_from_are_not_needed() -> None:
    ledger = Ledger(System())
    account = book(ledger, 1, host=1100)
    account.chosen = replace(
        account.chosen, size=replace(account.chosen.size, details=knowing(weights=700, kv=300))
    )
    settle(account)
    ledger.observe(readings(ram(used_mib=2000)), {1: ProcessMemory(300 + 690, 700)})
    assert account.booked() == {HOST: 1100}, "10 of the weights at most are not copied"
    ledger.observe(readings(ram(used_mib=2400)), {1: ProcessMemory(300 + 690 + 400, 700)})
    assert account.booked() == {HOST: 1400}, "what it takes later, such as a cache of prompts, is no copy"


def test_mapped_weights_count_beside_what_an_engine_takes_for_itself() -> None:
    ledger = Ledger(System())
    account = book(ledger, 1, host=1100)
    account.chosen = replace(
        account.chosen, size=replace(account.chosen.size, details=knowing(weights=700, kv=300))
    )
    settle(account)
    ledger.observe(readings(ram(used_mib=2000)), {1: ProcessMemory(300, 710)})
    ledger.observe(readings(ram(used_mib=2400)), {1: ProcessMemory(300 + 200, 710)})
    assert account.booked() == {HOST: 1200}


def knowing(weights: float, kv: float) -> Footprint:
    return Footprint({HOST: Share(weights=weights, kv=kv)}, "", 0)


def test_what_an_engine_maps_while_it_loads_and_gives_back_is_not_booked_for_good() -> None:
    ledger = Ledger(System())
    account = book(ledger, 1, (GPU0,), gpu0=4000, host=300)
    ledger.observe(readings(gpu(0, 3000, used_by={1: 3000})), {1: ProcessMemory(200, 4000)})
    settle(account)
    ledger.observe(readings(gpu(0, 4000, used_by={1: 4000})), {1: ProcessMemory(250, 20)})
    assert account.booked() == {GPU0: 4000, HOST: 270}


def test_the_budget_of_all_gpus_together_is_given_to_the_first_ones() -> None:
    ledger = Ledger(System(memory_budget_mb=14000))
    ledger.observe(readings(gpu(0, 1000), gpu(1, 0), gpu(2, 0)), {})
    assert [one.budget_mib for one in ledger.lines()] == [9000, 4000, 0, int(0.8 * 31000)]
    on_ram = Ledger(System(memory_budget_mb=2000))
    on_ram.observe(readings(ram(1000)), {})
    assert line(on_ram, HOST).budget_mib == 2000


@pytest.mark.parametrize("tells", [True, False])
def test_memory_is_back_when_the_device_says_so(tells: bool) -> None:
    ledger = Ledger(System())
    account = book(ledger, 1, (GPU0,), gpu0=4000)
    settle(account)
    ledger.observe(readings(gpu(0, used_mib=5000, used_by={1: 4000} if tells else None)), {})
    account.is_gone = True
    ledger.observe(readings(gpu(0, used_mib=5000, used_by={} if tells else None)), {})
    assert not ledger.memory_is_back(account)
    ledger.observe(readings(gpu(0, used_mib=4000, used_by={} if tells else None)), {})
    assert not ledger.memory_is_back(account)
    ledger.observe(readings(gpu(0, used_mib=1000, used_by={} if tells else None)), {})
    assert ledger.memory_is_back(account)


def test_a_few_mib_are_no_news() -> None:
    ledger = Ledger(System())
    ledger.observe(readings(gpu(0, used_mib=1000)), {})
    ledger.budgets()
    ledger.observe(readings(gpu(0, used_mib=1050)), {})
    assert not ledger.has_news
    ledger.observe(readings(gpu(0, used_mib=1200)), {})
    assert ledger.has_news


def test_a_gpu_that_is_gone_has_no_room() -> None:
    ledger = Ledger(System())
    ledger.observe(readings(gpu(0, 0), gpu(1, 0)), {})
    ledger.budgets()
    ledger.observe(readings(gpu(0, 0)), {})
    assert ledger.has_news
    assert GPU1 not in ledger.budgets()[0]


def test_a_device_with_less_than_the_least_takes_nobody() -> None:
    ledger = Ledger(System(min_vram_required=500))
    ledger.observe(readings(gpu(0, used_mib=9600)), {})
    assert (line(ledger, GPU0).budget_mib, line(ledger, GPU0).capacity_mib) == (0, 10000)


def test_an_engine_that_has_just_started_does_not_make_others_look_larger() -> None:
    ledger = Ledger(System())
    ledger.observe(readings(ram(used_mib=1000)), {})
    book(ledger, 1, host=3000)
    ledger.observe(readings(ram(used_mib=3500)), {})
    assert line(ledger, HOST).external_mib == 1000, "it was not read yet"
    ledger.observe(readings(ram(used_mib=4000)), {1: ProcessMemory(2900, 0)})
    assert line(ledger, HOST).external_mib == 1100


def test_what_an_engine_behind_a_wrapper_holds_is_found_under_its_childs_number() -> None:
    ledger = Ledger(System())
    account = book(ledger, 1, (GPU0,), gpu0=4000)
    device = gpu(0, used_mib=4500, used_by={12: 3500, 99: 1000})
    ledger.observe(readings(device), {1: ProcessMemory(10, 10, family=(1, 12))})
    assert account.holds[GPU0] == 3500
    assert line(ledger, GPU0).external_mib == 1000


def test_while_a_driver_hangs_what_an_engine_held_that_is_gone_is_not_taken_for_others() -> None:
    ledger = Ledger(System())
    account = book(ledger, 1, (GPU0,), gpu0=4000)
    settle(account)
    now = readings(gpu(0, used_mib=5000, used_by={1: 4000}))
    ledger.observe(now, {})
    account.is_gone = True
    ledger.observe(replace(now, age_sec=7.0), {})
    assert line(ledger, GPU0).external_mib == 1000
    ledger.close(1)
    assert line(ledger, GPU0).free_mib == 9000


@dataclass
class World:
    """One GPU and RAM as they really are, besides what the books say."""

    others: dict[Device, int]
    held: dict[int, dict[Device, int]] = field(default_factory=dict)
    """By engines, also by those whose memory is not back yet."""

    def tell(self, ledger: Ledger, *, by_process: bool) -> None:
        used = {
            device: min(10000, self.others[device] + sum(held.get(device, 0) for held in self.held.values()))
            for device in (GPU0, HOST)
        }
        used_by = {pid: held[GPU0] for pid, held in self.held.items() if GPU0 in held}
        reading = gpu(0, used[GPU0], used_by=used_by if by_process else None)
        processes = {
            account.engine_id: ProcessMemory(self.held[account.engine_id].get(HOST, 0), 100)
            for account in ledger.accounts.values()
            if account.engine_id in self.held and not account.is_gone
        }
        ledger.observe(readings(reading, ram(used[HOST])), processes)


def check(ledger: Ledger, world: World) -> None:
    for one in ledger.lines():
        engines = [account.booked().get(one.device, 0) for account in ledger.accounts.values()]
        assert one.external_mib + one.reserve_mib + one.budget_mib == one.reading.total_mib
        assert one.booked_mib == sum(engines)
        assert one.free_mib == max(0, one.budget_mib - one.booked_mib)
        assert min(one.external_mib, one.reserve_mib, one.budget_mib) >= 0
        assert one.reserved_mib <= one.booked_mib
        assert one.budget_mib <= one.capacity_mib
        total_held = sum(held.get(one.device, 0) for held in world.held.values())
        if world.others[one.device] + total_held <= one.reading.total_mib:
            assert one.external_mib == world.others[one.device], "what others hold is known to the MiB"


@given(
    data=st.data(), by_process=st.booleans(), reserve=st.integers(0, 3000), cap=st.none() | st.integers(1, 20000)
)
@settings(max_examples=examples(75), deadline=None, derandomize=True, database=None)
def test_the_books_add_up_whatever_happens(
    data: st.DataObject, by_process: bool, reserve: int, cap: int | None
) -> None:
    ledger = Ledger(System(vram_reserve_mb=reserve, memory_budget_mb=cap))
    world = World({GPU0: 1000, HOST: 2000})
    world.tell(ledger, by_process=by_process)
    for engine_id in range(1, data.draw(st.integers(1, 12), "steps")):
        step = data.draw(st.sampled_from(("start", "settle", "die", "others")), "step")
        accounts = list(ledger.accounts.values())
        if step == "start":
            mib = data.draw(st.integers(1, 3000), "MiB")
            on_gpu = data.draw(st.booleans(), "on the GPU")
            placement = {GPU0: mib, HOST: 50} if on_gpu else {HOST: mib}
            book(ledger, engine_id, (GPU0,) if on_gpu else (), **by_name(placement))
            world.held[engine_id] = {device: data.draw(st.integers(1, mib)) for device, mib in placement.items()}
        elif step == "settle" and accounts:
            account = data.draw(st.sampled_from(accounts), "whose")
            if account.engine_id in world.held:
                settle(account)
                world.held[account.engine_id] = dict(account.chosen.placement)
        elif step == "die" and accounts:
            account = data.draw(st.sampled_from(accounts), "whose")
            account.is_gone = True
            world.held.get(account.engine_id, {}).pop(HOST, None)
            world.tell(ledger, by_process=by_process)  # a driver is slow: others are not blamed
            check(ledger, world)
            world.held.pop(account.engine_id, None)
            world.tell(ledger, by_process=by_process)
            assert ledger.memory_is_back(account)
            ledger.close(account.engine_id)
        elif step == "others" and by_process:  # else they cannot be told from an engine that loads
            world.others[GPU0] = data.draw(st.integers(0, 4000), "MiB")
        world.tell(ledger, by_process=by_process)
        check(ledger, world)
