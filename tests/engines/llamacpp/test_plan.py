"""Where a model could live, on machines that are only described: headers are real, GPUs are figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import examples
from gpus import GPU0, GPU1, GPU2, SHOWN0
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Blueprint, gguf_bytes

from benchmarks.footprints import MODELS
from router.config.schema import System
from router.engines.llamacpp.binary import Binary
from router.engines.llamacpp.model import LlamaCppModel
from router.engines.llamacpp.plan import advise, inspect
from router.engines.llamacpp.sizing import DRIVER_MIB, EngineKind
from router.memory.measurements import Learned
from router.memory.plan import Alternative, Ground, Inspection, Site, Unusable
from router.system.devices import HOST, Device

SERVER = EngineKind(Binary((str(Path(__file__)),), "llama-server", "any file will do: it is never run"))
EMBEDDED = EngineKind(Binary(("python",), "embedded", "xllamacpp"))
QWEN_MIB = 4701
"""Weights of qwen3-8b; KV of a token takes 0.14 MiB."""


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS["qwen3-8b"].write(tmp_path_factory.mktemp("qwen") / "qwen3-8b.gguf")


def gpu(number: int, budget_mib: int, used_mib: int = 0, *, is_part: bool = False) -> Site:
    return Site(Device.gpu(number, 0 if is_part else None), budget_mib, budget_mib - used_mib)


def ground(*gpus: Site, host_mib: int = 64000) -> Ground:
    return Ground(gpus, Site(HOST, host_mib, host_mib))


def look(
    path: Path,
    where: Ground,
    *flags: str,
    engine: EngineKind = SERVER,
    learned: Learned | None = None,
    footprint_mb: int | None = None,
    env: dict[str, str] | None = None,
) -> Inspection:
    model = LlamaCppModel("m", path, ("-np", "1", *flags), footprint_mb=footprint_mb, env=env or {})
    return inspect(model, System(), engine, where, learned or Learned())


def placed(found: Inspection) -> list[tuple[Device, ...]]:
    return [one.gpus for one in found.alternatives]


def layers_of(one: Alternative) -> int:
    return int(one.flags[one.flags.index("-ngl") + 1])


def test_the_gpu_that_is_left_with_the_least_comes_first(qwen: Path) -> None:
    found = look(qwen, ground(gpu(0, 24000), gpu(1, 8000), gpu(2, 16000)), "-c", "4096")
    assert placed(found)[:3] == [(GPU1,), (GPU2,), (GPU0,)]


def test_where_it_fits_now_comes_before_where_others_must_leave(qwen: Path) -> None:
    found = look(qwen, ground(gpu(0, 24000), gpu(1, 8000, used_mib=7000)), "-c", "4096")
    assert placed(found)[:2] == [(GPU0,), (GPU1,)]


def test_a_model_too_big_for_one_gpu_is_divided_by_what_they_have(qwen: Path) -> None:
    where = ground(gpu(0, 2000), gpu(1, 6000), gpu(2, 4000))
    first = look(qwen, where, "-c", "16384").alternatives[0]
    assert first.gpus == (GPU1, GPU2)
    assert where.holds(first.placement)
    assert first.flags[:2] == ("--tensor-split", "60,40")
    assert first.placement[GPU1] > first.placement[GPU2] > 0


def test_a_model_larger_than_all_gpus_leaves_layers_on_the_host(qwen: Path) -> None:
    where = ground(gpu(0, 2000), gpu(1, 2000))
    first = look(qwen, where, "-c", "4096").alternatives[0]
    assert first.gpus == (GPU0, GPU1)
    assert where.holds(first.placement)
    assert 10 < layers_of(first) < 37
    assert first.remark == f"{layers_of(first)} of 37 layers on the GPU"
    assert first.placement[HOST] > 1000


def test_a_model_of_which_no_layer_fits_on_a_gpu_runs_on_the_host(qwen: Path) -> None:
    where = ground(gpu(0, 600), host_mib=8000)
    first = look(qwen, where, "-c", "4096").alternatives[0]
    assert (first.gpus, set(first.placement)) == ((), {HOST})
    assert first.remark == "0 of 37 layers on the GPU"
    assert where.holds(first.placement)
    for wanted in (("-ngl", "99"), ("--device", "CUDA0")):
        assert placed(look(qwen, where, "-c", "4096", *wanted)) == [(GPU0,)], (
            "who asks for a GPU gets it or nothing"
        )


def test_the_number_of_layers_is_left_alone_where_the_flags_give_it(qwen: Path) -> None:
    found = look(qwen, ground(gpu(0, 3000)), "-c", "4096", "-ngl", "99")
    assert len(found.alternatives) == 1
    assert "-ngl" not in found.alternatives[0].flags
    assert "it would fit with -ngl" in found.advice


def test_the_whole_context_where_it_fits(qwen: Path) -> None:
    first = look(qwen, ground(gpu(0, 24000))).alternatives[0]
    assert (first.context, first.remark) == (40960, "")
    assert first.flags[-2:] == ("-c", "40960")


def test_the_context_is_cut_to_what_the_gpu_has(qwen: Path) -> None:
    where = ground(gpu(0, 8000))
    first = look(qwen, where).alternatives[0]
    assert first.context is not None
    assert 8192 < first.context < 24576
    assert where.holds(first.placement)
    assert first.remark == f"context {first.context} of 40960"


def test_a_second_gpu_is_better_than_a_context_that_is_cut(qwen: Path) -> None:
    found = look(qwen, ground(gpu(0, 8000), gpu(1, 8000)))
    assert found.alternatives[0].gpus == (GPU0, GPU1)
    assert found.alternatives[0].context == 40960
    assert found.alternatives[-1].gpus in ((GPU0,), (GPU1,))


def test_who_asks_for_the_whole_context_gets_it_or_nothing(qwen: Path) -> None:
    where = ground(gpu(0, 8000))
    (only,) = look(qwen, where, "-c", "0", "-ngl", "99").alternatives
    assert only.context == 40960
    assert not where.holds(only.placement)


def test_on_the_host_the_context_is_settled_too(qwen: Path) -> None:
    first = look(qwen, ground(host_mib=7000), engine=EMBEDDED).alternatives[0]
    assert first.gpus == ()
    assert first.context is not None
    assert first.context < 16384
    assert first.flags == ("-c", str(first.context))


@pytest.mark.parametrize(
    ("flags", "env", "gpus", "added"),
    [
        (("--device", "CUDA1"), {}, (GPU1,), ("--device", "CUDA0")),
        (("--device", "CUDA2,CUDA0"), {}, (GPU2, GPU0), ("--device", "CUDA0,CUDA1")),
        (
            ("--device", "CUDA1,CUDA2", "--tensor-split", "1,3"),
            {},
            (GPU1, GPU2),
            ("--device", "CUDA0,CUDA1"),
        ),
        (
            ("--device", "CUDA2", "--mmproj-device", "CUDA0"),
            {},
            (GPU2, GPU0),
            ("--device", "CUDA0", "--mmproj-device", "CUDA1"),
        ),
        (("--device", "Vulkan7"), {}, (GPU0, GPU1, GPU2), ()),
        (("--split-mode", "none", "--main-gpu", "2"), {}, (GPU2,), ("--main-gpu", "0")),
        (("--tensor-split", "1,0,3"), {}, (GPU0, GPU1, GPU2), ()),
        (("-ot", "exps=CUDA1"), {}, (GPU0, GPU1, GPU2), ()),
        ((), {"CUDA_VISIBLE_DEVICES": "2,1"}, (GPU2, GPU1), ()),
        (("--device", "none"), {}, (), ()),
        (("-ngl", "0"), {}, (), ()),
        (("-ngl", "0", "--device", "CUDA1"), {}, (), ("--device", "none")),
        (("--device", "CUDA1"), {"CUDA_VISIBLE_DEVICES": ""}, (), ("--device", "none")),
    ],
)
def test_what_flags_and_variables_settle_stays(
    qwen: Path, flags: tuple[str, ...], env: dict[str, str], gpus: tuple[Device, ...], added: tuple[str, ...]
) -> None:
    found = look(qwen, ground(gpu(0, 24000), gpu(1, 24000), gpu(2, 24000)), "-c", "4096", *flags, env=env)
    assert placed(found) == [gpus]
    assert found.alternatives[0].flags[: len(added)] == added


def test_of_a_gpu_that_its_flags_leave_out_it_takes_nothing(qwen: Path) -> None:
    flags = ("-c", "4096", "--tensor-split", "1,0,3")
    (only,) = look(qwen, ground(gpu(0, 24000), gpu(1, 24000), gpu(2, 24000)), *flags).alternatives
    assert set(only.placement) == {GPU0, GPU2, HOST}


def test_flags_that_name_a_gpu_that_is_not_there_are_told_so(qwen: Path) -> None:
    with pytest.raises(
        Unusable, match=r"--device CUDA1 refers to more GPUs than available \(gpu3, counted from 0"
    ):
        look(qwen, ground(gpu(3, 24000)), "--device", "CUDA1")


def test_what_is_named_is_booked_where_it_is(qwen: Path) -> None:
    where = ground(gpu(0, 24000), gpu(1, 24000), gpu(2, 24000))
    flags = ("-c", "4096", "--device", "CUDA1,CUDA2", "--tensor-split", "1,3")
    (divided,) = look(qwen, where, *flags).alternatives
    assert divided.placement[GPU2] > 2 * divided.placement[GPU1]
    (second,) = look(
        qwen, where, "-c", "4096", "--device", "CUDA1", env={"CUDA_VISIBLE_DEVICES": "2,0"}
    ).alternatives
    assert (second.gpus, set(second.placement)) == ((GPU2, GPU0), {GPU0, HOST}), "it counts what it is shown"


def test_split_mode_none_keeps_it_on_one_gpu(qwen: Path) -> None:
    found = look(qwen, ground(gpu(0, 8000), gpu(1, 8000)), "-c", "4096", "--split-mode", "none")
    assert {len(gpus) for gpus in placed(found)} == {1}


def test_parts_of_a_gpu_are_not_put_together(qwen: Path) -> None:
    found = look(qwen, ground(gpu(0, 4000, is_part=True), gpu(1, 4000, is_part=True)), "-c", "4096")
    assert {len(gpus) for gpus in placed(found)} == {1}


@pytest.mark.parametrize("are_parts", [False, True])
def test_what_fits_on_no_gpu_alone_has_its_layers_on_the_largest(qwen: Path, are_parts: bool) -> None:
    sites = (
        gpu(0, 1500, is_part=are_parts),
        gpu(1, 4000, is_part=are_parts),
        gpu(2, 1500, is_part=are_parts),
    )
    flags = ("--split-mode", "none") if not are_parts else ()
    first = look(qwen, ground(*sites), "-c", "4096", *flags).alternatives[0]
    assert first.gpus == (sites[1].device,)
    assert layers_of(first) > 20


def test_what_the_configuration_says_counts(qwen: Path) -> None:
    first = look(qwen, ground(gpu(0, 8000)), footprint_mb=123).alternatives[0]
    assert dict(first.placement) == {GPU0: 123}
    assert (first.size.source, first.is_given, first.flags) == ("footprint_mb", True, ())


def test_an_adapter_is_counted_where_what_it_adapts_is(qwen: Path, tmp_path: Path) -> None:
    shapes = {f"blk.{layer}.ffn_up.weight.lora_a": (4096, 4096) for layer in range(4)}
    path = Blueprint("qwen3", {}, shapes, "Q8_0").write(tmp_path / "a,b.gguf")

    def placement(*flags: str) -> dict[Device, int]:
        return dict(look(qwen, ground(gpu(0, 24000)), "-c", "4096", *flags).alternatives[0].placement)

    without = placement()
    assert placement("--lora", f'"{path}"') == without | {GPU0: without[GPU0] + 68}
    assert placement("--lora-scaled", f'"{path}:0.5","{path}:2"')[GPU0] == without[GPU0] + 2 * 68
    path.unlink()
    with pytest.raises(Unusable, match=r"a,b\.gguf cannot be read: No such file"):
        placement("--lora", f'"{path}"')


def test_a_format_that_nobody_knows_is_sized_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    path.write_bytes(gguf_bytes(version=9) + bytes(100 << 20))
    first = look(path, ground(gpu(0, 8000))).alternatives[0]
    assert dict(first.placement) == {GPU0: 110}
    assert first.size.source == "file size × 1.1"


def test_what_never_fits_is_told_with_what_would(qwen: Path) -> None:
    found = look(qwen, ground(host_mib=6000), "-c", "32768", engine=EMBEDDED)
    assert len(found.alternatives) == 1
    assert found.advice.startswith("it would fit with -c ")
    context = found.advice.split()[-1]
    where = ground(host_mib=6000)
    assert where.holds(look(qwen, where, "-c", context, engine=EMBEDDED).alternatives[0].placement)
    assert look(qwen, ground(host_mib=3000), "-c", "4096", engine=EMBEDDED).advice.startswith("no context")


def test_what_was_measured_counts_for_the_same_flags_and_corrects_others(qwen: Path) -> None:
    learned = Learned()
    where = ground(gpu(0, 24000))
    first = look(qwen, where, "-c", "4096", learned=learned).alternatives[0]
    assert first.identity is not None
    estimated = first.size.estimated
    learned.learn(first.identity, estimated, {SHOWN0: round(1.2 * estimated[SHOWN0]), HOST: 600})

    again = look(qwen, where, "-c", "4096", learned=learned).alternatives[0]
    assert again.size.source == "measured"
    assert dict(again.placement) == {GPU0: round(1.2 * estimated[SHOWN0]), HOST: 600}
    other = look(qwen, where, "-c", "8192", learned=learned).alternatives[0]
    assert other.size.source == "formulas, corrected as measured with other flags"
    assert other.placement[GPU0] == pytest.approx(1.2 * other.size.estimated[SHOWN0], abs=1)


@pytest.mark.parametrize(("device", "counted"), [(GPU0, SHOWN0), (HOST, HOST)], ids=str)
def test_what_ran_is_not_refused_for_what_it_was_measured_to_take(
    qwen: Path, device: Device, counted: Device
) -> None:
    learned = Learned()
    flags = ("-c", "4096") if device == GPU0 else ("-c", "4096", "-ngl", "0")
    first = look(qwen, ground(gpu(0, 24000)), *flags, learned=learned).alternatives[0]
    assert first.identity is not None
    estimated = first.size.estimated
    learned.learn(first.identity, estimated, {**estimated, counted: estimated[counted] + 1000})
    room = estimated[counted] + 500
    where = ground(gpu(0, room)) if device == GPU0 else ground(gpu(0, 24000), host_mib=room)
    again = look(qwen, where, *flags, learned=learned)
    assert (again.advice, again.alternatives[0].placement[device]) == ("", room), "it gets all that there is"


def test_secrets_of_the_environment_are_not_remembered_with_a_measurement(qwen: Path) -> None:
    env = {"HF_TOKEN": "hf_secret", "LLAMA_API_KEY": "a secret", "LLAMA_ARG_UBATCH": "256"}
    first = look(qwen, ground(gpu(0, 24000)), "-c", "4096", env=env).alternatives[0]
    assert first.identity is not None
    assert "secret" not in str(first.identity.flags)
    assert first.identity.flags[:2] == ("LLAMA_ARG_UBATCH", "256"), "what makes a difference is"


def test_a_correction_never_goes_below_what_llama_cpp_asks_for(qwen: Path) -> None:
    learned = Learned()
    where = ground(gpu(0, 24000))
    first = look(qwen, where, "-c", "4096", learned=learned).alternatives[0]
    assert first.identity is not None
    learned.learn(first.identity, first.size.estimated, {SHOWN0: 100, HOST: 400})
    other = look(qwen, where, "-c", "8192", learned=learned).alternatives[0]
    assert other.placement[GPU0] == other.size.estimated[SHOWN0] - DRIVER_MIB


def test_a_measurement_that_cannot_be_true_does_not_count(qwen: Path) -> None:
    learned = Learned()
    where = ground(gpu(0, 24000))
    first = look(qwen, where, "-c", "4096", learned=learned).alternatives[0]
    assert first.identity is not None
    nonsense = {SHOWN0: 3, Device.shown(7): 5, HOST: 10**6}  # an engine that fell back to the CPU, say
    learned.learn(first.identity, first.size.estimated, nonsense)
    again = look(qwen, where, "-c", "4096", learned=learned).alternatives[0]
    assert again.size.details is not None
    assert again.placement[GPU0] == pytest.approx(again.size.details.devices[SHOWN0].weights, abs=1)
    assert again.placement[HOST] == 4 * first.placement[HOST]
    assert set(again.placement) == {GPU0, HOST}


def test_what_ran_out_of_memory_is_thought_larger_until_it_is_measured(qwen: Path) -> None:
    learned = Learned()
    where = ground(gpu(0, 24000))
    first = look(qwen, where, "-c", "4096", learned=learned).alternatives[0]
    assert first.identity is not None
    learned.ran_out(first.identity, first.size.mib, {SHOWN0: 300})
    second = look(qwen, where, "-c", "4096", learned=learned).alternatives[0]
    assert second.placement[GPU0] == round(1.1 * first.placement[GPU0])
    assert second.placement[HOST] == first.placement[HOST]
    assert "raised since it ran out of memory" in second.size.source
    learned.learn(first.identity, first.size.estimated, dict(first.size.mib))
    assert look(qwen, where, "-c", "4096", learned=learned).alternatives[0].placement == first.placement


def test_the_advice_after_running_out_is_less_than_what_it_had(qwen: Path) -> None:
    where = ground(gpu(0, 24000))
    model = LlamaCppModel("m", qwen, ("-np", "1", "-c", "32768"))
    first = inspect(model, System(), SERVER, where, Learned()).alternatives[0]
    advice = advise(model, System(), SERVER, where, Learned(), first.placement)
    assert advice.startswith("it would fit with -c ")
    assert int(advice.split()[-1]) < 32768


BUDGETS = st.lists(st.integers(600, 30000), min_size=0, max_size=4)
CONTEXTS = st.sampled_from(((), ("-c", "4096"), ("-c", "32768"), ("-c", "0")))


@given(budgets=BUDGETS, used=st.floats(0, 1), flags=CONTEXTS, host_mib=st.integers(600, 64000))
@settings(max_examples=examples(10), deadline=None, derandomize=True, database=None)
def test_what_is_proposed_fits_and_the_best_comes_first(
    qwen: Path, budgets: list[int], used: float, flags: tuple[str, ...], host_mib: int
) -> None:
    gpus = [gpu(number, mib, int(used * mib)) for number, mib in enumerate(budgets)]
    where = ground(*gpus, host_mib=host_mib)
    found = look(qwen, where, *flags)
    fitting = [where.holds(one.placement) for one in found.alternatives]
    assert all(fitting) or (len(fitting) == 1 and not fitting[0] and found.advice)
    assert len({tuple(sorted(one.placement.items())) for one in found.alternatives}) == len(found.alternatives)
    for one in found.alternatives:
        assert set(one.placement) <= {*one.gpus, HOST}
        assert all(mib > 0 for mib in one.placement.values())
    again = look(qwen, replace(where, gpus=tuple(gpus)), *flags)
    assert [one.placement for one in again.alternatives] == [one.placement for one in found.alternatives]


@pytest.mark.parametrize("spelled", ["", "-1"])
def test_an_entry_that_hides_all_gpus_runs_on_the_host(qwen: Path, spelled: str) -> None:
    found = look(qwen, ground(gpu(0, 24000)), "-c", "4096", env={"CUDA_VISIBLE_DEVICES": spelled})
    assert placed(found) == [()]
    assert set(found.alternatives[0].placement) == {HOST}


@pytest.mark.parametrize("spelled", ["GPU-bbbb-2", "GPU-b"])
def test_an_entry_may_name_a_gpu_by_its_uuid_or_the_beginning_of_it(qwen: Path, spelled: str) -> None:
    gpus = replace(gpu(0, 24000), uuid="GPU-aaaa-1"), replace(gpu(1, 24000), uuid="GPU-bbbb-2")
    found = look(qwen, ground(*gpus), "-c", "4096", env={"CUDA_VISIBLE_DEVICES": spelled})
    assert placed(found) == [(GPU1,)]


def test_an_entry_that_names_a_gpu_that_is_not_there_is_told_so(qwen: Path) -> None:
    with pytest.raises(Unusable, match=r"CUDA_VISIBLE_DEVICES=7 .* no available GPU .gpu0."):
        look(qwen, ground(gpu(0, 24000)), env={"CUDA_VISIBLE_DEVICES": "7"})
