"""Is what people are told of waiting true? The goals of `benchmarks/waits.py`, in the simulation."""

from __future__ import annotations

import pytest

from benchmarks.waits import MEDIAN_ERROR, MOST_BELOW, MOST_UNKNOWN, listen, stated


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["saturated", "rotating", "quick", "low", "low-behind", "cold"])
def test_what_people_are_told_of_waiting_is_true(name: str, seed: int) -> None:
    workload = next(workload for workload in stated(seed) if workload.name == name)
    told = listen(workload, seed)
    assert told.median_error <= MEDIAN_ERROR
    assert told.below <= MOST_BELOW, "who waits twice as long as he was told"
    assert told.unknown_share <= MOST_UNKNOWN
