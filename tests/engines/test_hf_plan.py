"""Tests where models in safetensors can run: on one GPU, on several, in RAM, and with how much cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hf_models import LLAMA, played_vllm, write_model

from router.engines import hf_forecast
from router.engines.hf_plan import Cache, Demand, HfPlan, caches
from router.engines.vllm import program
from router.engines.vllm.model import VllmModel
from router.engines.vllm.plan import VllmPlan
from router.formats import hf_model
from router.memory.measurements import Identity, Learned
from router.memory.plan import Ground, Site
from router.system.devices import HOST, Device

GPU0, GPU1, GPU2 = Device.gpu(0), Device.gpu(1), Device.gpu(2)
DEMAND = Demand(
    weights=8000,
    kv=lambda tokens: tokens * 0.125,
    caches=caches(16384, 4, may_shorten=True),
    on_each_gpu=1000,
    beside_gpus=2000,
    without_gpus=1500,
    gpu_counts=(1, 2),
    start_sec=30,
)


class Plan(HfPlan):
    def identity(self, gpus: int, cache: Cache) -> Identity:
        return Identity(
            (("model.safetensors", 1, 1),), "engine 1", (f"{cache.context}", f"{cache.requests}"), gpus
        )

    def flags(self, sites: Sequence[Site], cache: Cache, mib: int) -> tuple[str, ...]:
        return ("--context", str(cache.context), "--gpus", str(len(sites)), "--mib", str(mib))


class ClaimsTenths(Plan):
    """Takes whole tenths of a GPU, as vLLM takes a share of it."""

    def claim(self, site: Site, mib: int) -> int | None:
        return -(-mib * 10 // site.total_mib) * site.total_mib // 10


def gpu(device: Device, mib: int, free_mib: int | None = None) -> Site:
    return Site(device, mib, mib if free_mib is None else free_mib, total_mib=mib)


def ground(*gpus: Site, ram: int = 64000) -> Ground:
    return Ground(gpus, Site(HOST, ram, ram, total_mib=ram))


def test_one_gpu_that_holds_all_of_it_is_taken_alone() -> None:
    found = Plan(DEMAND, ground(gpu(GPU0, 40000), gpu(GPU1, 24000)), Learned()).inspection()
    best = found.alternatives[0]
    assert best.placement == {GPU1: 8000 + 8192 + 1000, HOST: 2000}, "where it leaves the least"
    assert best.flags == ("--context", "16384", "--gpus", "1", "--mib", "17192")
    assert best.context == 4 * 16384
    assert [one.gpus for one in found.alternatives] == [(GPU1,), (GPU0,)]
    assert not found.load_is_known


def test_the_cache_is_reduced_before_the_model_is_divided_only_if_no_group_holds_it_whole() -> None:
    on_two = Plan(DEMAND, ground(gpu(GPU0, 12000), gpu(GPU1, 12000)), Learned()).inspection().alternatives[0]
    assert on_two.gpus == (GPU0, GPU1)
    assert on_two.placement == {GPU0: 4000 + 4096 + 1000, GPU1: 4000 + 4096 + 1000, HOST: 2000}
    assert on_two.remark == ""
    alone = Plan(DEMAND, ground(gpu(GPU0, 12000)), Learned()).inspection().alternatives[0]
    assert alone.placement[GPU0] == 8000 + 2048 + 1000
    assert alone.remark == "KV cache for 1 instead of 4 requests of full length"
    short = Plan(DEMAND, ground(gpu(GPU0, 9600)), Learned()).inspection().alternatives[0]
    assert (short.context, short.remark) == (4096, "context 4096 of 16384")


def test_a_model_is_divided_among_gpus_of_one_size() -> None:
    unlike = ground(gpu(GPU0, 12000), gpu(GPU1, 8000), gpu(GPU2, 12000))
    found = Plan(DEMAND, unlike, Learned()).inspection()
    assert [one.gpus for one in found.alternatives if len(one.gpus) == 2] == [(GPU0, GPU2)]


def test_what_never_fits_says_what_would() -> None:
    found = Plan(DEMAND, ground(gpu(GPU0, 9300)), Learned()).inspection()
    assert (len(found.alternatives), found.advice) == (1, "it would fit with a context of 2304")
    found = Plan(DEMAND, ground(gpu(GPU0, 4000)), Learned()).inspection()
    assert found.advice == "its weights alone are 8000 MiB"
    # Context that is given is not shortened.
    given = replace(DEMAND, caches=caches(16384, 1, may_shorten=False))
    found = Plan(given, ground(gpu(GPU0, 10000)), Learned()).inspection()
    assert found.advice == "it would fit with a context of 7936"


def test_without_gpus_it_runs_in_ram() -> None:
    for there, demand in ((ground(), DEMAND), (ground(gpu(GPU0, 40000)), replace(DEMAND, gpu_counts=()))):
        best = Plan(demand, there, Learned()).inspection().alternatives[0]
        assert (best.gpus, best.placement) == ((), {HOST: 8000 + 8192 + 1500})


def test_what_a_prompt_needs_is_counted_in_ram_only() -> None:
    demand = replace(DEMAND, work=lambda tokens: tokens * 0.25, caches=caches(16384, 1, may_shorten=False))
    best = Plan(demand, ground(), Learned()).inspection().alternatives[0]
    assert best.placement == {HOST: 8000 + 2048 + 4096 + 1500}
    on_gpu = Plan(demand, ground(gpu(GPU0, 40000)), Learned()).inspection().alternatives[0]
    assert on_gpu.placement == {GPU0: 8000 + 2048 + 1000, HOST: 2000}
    found = Plan(demand, ground(ram=11000), Learned()).inspection()
    assert found.advice == "it would fit with a context of 3840"  # of 1500 MiB left, 0.375 for each token


def test_a_claim_counts_although_less_was_measured() -> None:
    learned = Learned()
    where = ground(gpu(GPU0, 40000))
    first = ClaimsTenths(DEMAND, where, learned).inspection().alternatives[0]
    assert first.placement == {GPU0: 20000, HOST: 2000}
    assert first.identity is not None
    learned.learn(first.identity, first.size.estimated, {Device.shown(0): 18000, HOST: 3000})
    second = ClaimsTenths(DEMAND, where, learned).inspection().alternatives[0]
    assert second.placement == {GPU0: 20000, HOST: 3000}
    assert second.flags == first.flags, "what was measured changes nothing of how it is started"
    assert second.size.source == "measured"


def test_what_was_measured_replaces_the_estimate_and_scales_that_of_other_flags() -> None:
    learned = Learned()
    where = ground(gpu(GPU0, 40000))
    first = Plan(DEMAND, where, learned).inspection().alternatives[0]
    assert first.identity is not None
    learned.learn(first.identity, first.size.estimated, {Device.shown(0): 13754, HOST: 2000})
    learned.loaded(first.identity, 12)
    second = Plan(DEMAND, where, learned).inspection()
    assert second.alternatives[0].placement == {GPU0: 13754, HOST: 2000}
    assert (second.expected_load_sec, second.load_is_known) == (12, True)
    other = replace(DEMAND, caches=caches(16384, 2, may_shorten=False))
    third = Plan(other, where, learned).inspection().alternatives[0]
    assert third.placement[GPU0] == 10478, "0.8 of 8000 + 4096 + 1000"


def test_one_that_ran_out_of_memory_gets_more() -> None:
    learned = Learned()
    where = ground(gpu(GPU0, 40000))
    first = Plan(DEMAND, where, learned).inspection().alternatives[0]
    assert first.identity is not None
    learned.ran_out(first.identity, first.as_counted(first.placement), {Device.shown(0): 1})
    again = Plan(DEMAND, where, learned).inspection().alternatives[0]
    assert again.placement[GPU0] == round(17192 * 1.1)
    assert again.flags[-1] == str(again.placement[GPU0])


def test_a_forecast_is_the_plan_of_the_engine_that_would_run_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [ground()]
    monkeypatch.setattr(hf_forecast, "idle_ground", lambda *_: there[0])
    monkeypatch.setattr(program, "_DRIVERS", (os.devnull,))
    folder = write_model(tmp_path / "model", LLAMA, {"weight": ("BF16", (8 << 20, 1024))})
    local = hf_model.read(folder)
    far = replace(local, folder=Path("org/model"), files=(Path("model.safetensors"),))
    of_two_gpus = ground(gpu(GPU0, 16384), gpu(GPU1, 16384))
    for version, where, gpus in (("0.32.0+cpu", ground(), ()), ("0.32.0", of_two_gpus, (GPU0, GPU1))):
        there[0] = where
        path = str(played_vllm(tmp_path / version, version))
        monkeypatch.setenv("VLLM_PATH", path)
        model = VllmModel(alias="m", model_path=folder, slots=8)
        plan = VllmPlan(model, local, program.find_program(path), where, Learned())
        best = plan.inspection().alternatives[0]
        found = hf_forecast.forecast(far)
        assert (found.engine, found.best.gpus) == ("vLLM", gpus)
        assert (found.placement, found.best.flags) == (best.placement, best.flags)
        assert (found.cache.requests, found.fits, found.largest_context) == (8, True, 2048)

    there[0] = ground()  # where a build for GPUs cannot run, whether there is a driver or not
    assert hf_forecast.forecast(far).engine == "Transformers"
    monkeypatch.setattr(program, "_DRIVERS", ())
    assert hf_forecast.forecast(far).engine == "Transformers"
    monkeypatch.setenv("VLLM_PATH", str(tmp_path / "0.32.0+cpu/bin/vllm"))
    assert hf_forecast.forecast(far).engine == "vLLM"
    monkeypatch.setenv("TRANSFORMERS_PATH", "/bin/true")  # which chats without a template, too
    assert hf_forecast.forecast(replace(far, has_chat_template=False)).engine == "Transformers"
