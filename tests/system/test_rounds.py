"""What is done in a turn of the event loop when there is more to do than a turn is for, and who goes first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from router.system.turns import Rounds, in_turns


class Worker:
    """Has so many steps to take, and writes its name down for each."""

    def __init__(self, name: str, steps: int, written: list[str]) -> None:
        self.name = name
        self.steps = steps
        self._written = written

    def step(self) -> bool:
        self._written.append(self.name)
        self.steps -= 1
        return self.steps > 0

    def rested(self) -> None:
        self._written.append(f"{self.name} rested")


def played(story: Callable[[Rounds, list[str]], Awaitable[None]]) -> list[str]:
    written: list[str] = []

    async def run() -> None:
        await story(Rounds(), written)

    asyncio.run(run())
    return written


def test_who_asks_for_one_step_goes_before_those_that_are_always_busy() -> None:
    async def story(rounds: Rounds, written: list[str]) -> None:
        for name in "abcdef":
            rounds.join(Worker(name, 100, written), is_patient=False)
        await asyncio.sleep(0)
        written.clear()
        rounds.join(Worker("patient", 1, written), is_patient=True)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    assert played(story)[0] == "patient"


def test_busy_workers_have_every_other_step_however_many_patient_ones_come() -> None:
    async def story(rounds: Rounds, written: list[str]) -> None:
        rounds.join(Worker("busy", 100, written), is_patient=False)
        for _ in range(50):
            rounds.join(Worker("patient", 1, written), is_patient=True)
        for _ in range(40):
            await asyncio.sleep(0)

    assert played(story)[:40].count("busy") == 20


def test_who_has_more_to_do_after_a_first_step_is_busy() -> None:
    async def story(rounds: Rounds, written: list[str]) -> None:
        rounds.join(Worker("first", 100, written), is_patient=True)
        await asyncio.sleep(0)
        written.clear()
        rounds.join(Worker("second", 1, written), is_patient=True)
        await asyncio.sleep(0)

    assert played(story)[:2] == ["second", "first"]


def test_few_steps_of_a_turn_are_taken_at_once() -> None:
    admitted: list[int] = []

    async def story(rounds: Rounds, written: list[str]) -> None:
        for _ in range(2):
            admitted.append(sum(rounds.admit(is_patient=True) for _ in range(100)))
            await asyncio.sleep(0)

    played(story)
    assert admitted == [8, 8]


def test_beside_busy_workers_only_patient_ones_take_a_step_at_once() -> None:
    admitted: list[bool] = []

    async def story(rounds: Rounds, written: list[str]) -> None:
        admitted.append(rounds.admit(is_patient=False))
        rounds.join(Worker("busy", 5, written), is_patient=False)
        admitted.extend((rounds.admit(is_patient=False), rounds.admit(is_patient=True)))

    played(story)
    assert admitted == [True, False, True]


def test_a_worker_that_rests_goes_on_in_the_next_turn() -> None:
    async def story(rounds: Rounds, written: list[str]) -> None:
        rounds.rest(Worker("a", 1, written))
        assert not written
        await asyncio.sleep(0)

    assert played(story) == ["a rested"]


def test_long_work_shares_the_time_of_a_turn_however_many_have_some(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    taken = [0]
    """Items by turn."""

    def tenths_of_a_millisecond() -> Iterator[None]:
        nonlocal now
        for _ in range(200):
            now += 0.0001
            taken[-1] += 1
            yield

    async def work() -> None:
        async for _ in in_turns(tenths_of_a_millisecond()):
            pass

    async def story(workers: int) -> list[int]:
        taken[:] = [0]
        tasks = [asyncio.create_task(work()) for _ in range(workers)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            taken.append(0)
        return taken[1:-1]  # some have not begun before the first

    assert max(asyncio.run(story(1))) <= 21
    assert max(asyncio.run(story(10))) <= 30
