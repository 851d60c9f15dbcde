"""Is what people are told of waiting true? The goals of `benchmarks/waits.py`, in the simulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import examples, fake

from benchmarks.waits import MEDIAN_ERROR, MOST_BELOW, MOST_UNKNOWN, listen, live, stated, workloads


@pytest.mark.parametrize("seed", range(1, 1 + examples(1)))
@pytest.mark.parametrize("name", ["saturated", "rotating", "quick", "low", "low-behind", "longer", "cold"])
def test_what_people_are_told_of_waiting_is_true(name: str, seed: int) -> None:
    workload = next(workload for workload in stated(seed) if workload.name == name)
    told = listen(workload, seed)
    assert told.median_error <= MEDIAN_ERROR
    assert told.below <= MOST_BELOW, "who waits twice as long as he was told"
    assert told.unknown_share <= MOST_UNKNOWN


def test_it_is_also_true_where_chance_decides_when_an_engine_falls_idle_and_who_overtakes() -> None:
    workload = next(workload for workload in workloads(1) if workload.name == "poisson-0.45")
    told = listen(replace(workload, asks=tuple(ask for ask in workload.asks if ask.at < 900)), 1)
    assert told.median_error <= MEDIAN_ERROR
    assert told.below <= MOST_BELOW
    assert told.unknown_share <= MOST_UNKNOWN


def test_on_real_engines_it_is_not_measured_without_one_of_the_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_SERVER_PATH", fake(tmp_path, status="500"))
    with pytest.raises(SystemExit, match=r"a client of [abc] died: .* is not served: 500"):
        live(seconds=20, megabytes=None)
