"""What engines were measured to take: kept, bounded, and never in the way."""

from __future__ import annotations

import json
import time
from pathlib import Path

from gpus import SHOWN0, SHOWN1
from hypothesis import given
from hypothesis import strategies as st

from router.engines.out_of_memory import ran_out
from router.memory.measurements import MOST_ENTRIES, Entry, Identity, Learned, Ratio
from router.system.devices import HOST, Device
from router.system.state import StateFile


def identity(name: str = "a", *flags: str) -> Identity:
    return Identity(((f"/models/{name}", 1000, 7),), "build", flags, 1)


def store(folder: Path) -> StateFile[list[Entry]]:
    return StateFile(folder / "footprints.json", list[Entry], "nothing is remembered")


def test_what_was_measured_outlives_the_router(tmp_path: Path) -> None:
    learned = Learned(store(tmp_path))
    learned.learn(identity(), {SHOWN0: 1000}, {SHOWN0: 1100})
    learned.save(learned.entries())
    assert Learned(store(tmp_path)).measured(identity()) == {SHOWN0: 1100}


def test_how_long_loads_take_outlives_the_router_but_not_the_machine(tmp_path: Path) -> None:
    """After a start of the machine the first load comes from its disk, and may take many times as long."""
    learned = Learned(store(tmp_path))
    assert learned.load_sec(identity()) is None
    learned.loaded(identity(), 7.5)
    learned.learn(identity(), {SHOWN0: 1000}, {SHOWN0: 1100})
    learned.ran_out(identity(), {SHOWN0: 1100}, {})
    learned.save(learned.entries())
    assert Learned(store(tmp_path)).load_sec(identity()) == 7.5
    later = Learned(store(tmp_path), machine_since=time.time() + 60)
    assert later.load_sec(identity()) is None
    assert later.raised(identity())


def test_what_an_engine_holds_asleep_and_how_long_it_takes_to_wake_outlive_the_router(tmp_path: Path) -> None:
    learned = Learned(store(tmp_path))
    assert (learned.asleep(identity()), learned.wake_sec(identity())) == (None, None)
    learned.slept(identity(), {SHOWN0: 900, HOST: 20000})
    learned.woke(identity(), 2.5)
    learned.loaded(identity(), 40.0)
    learned.save(learned.entries())
    later = Learned(store(tmp_path), machine_since=time.time() + 60)
    assert later.asleep(identity()) == {SHOWN0: 900, HOST: 20000}
    assert (later.wake_sec(identity()), later.load_sec(identity())) == (2.5, None)


def test_a_load_takes_what_it_took_with_other_flags() -> None:
    learned = Learned()
    learned.loaded(identity("a", "-c", "1"), 5.0)
    learned.loaded(identity("a", "-c", "2"), 6.0)
    learned.loaded(identity("b"), 70.0)
    assert learned.load_sec(identity("a", "-c", "1")) == 5.0
    assert learned.load_sec(identity("a", "-c", "3")) == 6.0, "the latest"
    assert learned.measured(identity("a", "-c", "1")) is None, "of its memory nothing is known"


def test_other_files_builds_and_flags_are_others(tmp_path: Path) -> None:
    learned = Learned()
    learned.learn(identity(), {SHOWN0: 1000}, {SHOWN0: 1100})
    assert learned.measured(identity("b")) is None
    assert learned.measured(identity("a", "-c", "9")) is None
    assert learned.ratio(identity("a", "-c", "9")) == Ratio(gpus=1.1)
    assert learned.ratio(identity("b")) == Ratio()


def test_a_file_that_makes_no_sense_is_forgotten(tmp_path: Path) -> None:
    entry = {"files": [["/m", 1, 2]], "build": "", "flags": [], "gpus": 1, "estimated": {"gpu0": 5}}
    wrong = [
        {"measured": {"gpu0": -5}},
        {"raised": {"gpu0": 1 << 40}},
        {"measured": {"gpu0": None}},
        {"measured": {"gpu": 5}},
        {"load_sec": -1},
    ]
    lies = [json.dumps([{**entry, "rule": 1, **one}]).encode() for one in wrong]
    for junk in (b"", b"{", b'[{"files": 3}]', b"\xff\xfe", b"null", *lies):
        (tmp_path / "footprints.json").write_bytes(junk)
        learned = Learned(store(tmp_path))
        assert learned.entries() == []
        learned.learn(identity(), {HOST: 1}, {HOST: 2})
        learned.save(learned.entries())
        assert len(Learned(store(tmp_path)).entries()) == 1


def test_what_was_measured_in_another_way_is_forgotten(tmp_path: Path) -> None:
    entry = {"files": [["/m", 1, 2]], "build": "", "flags": [], "gpus": 0, "estimated": {"host": 5}}
    (tmp_path / "footprints.json").write_text(json.dumps([{**entry, "measured": {"host": 9}}]))
    assert Learned(store(tmp_path)).entries() == []


def test_the_oldest_are_forgotten(tmp_path: Path) -> None:
    learned = Learned()
    for number in range(MOST_ENTRIES + 10):
        learned.learn(identity(str(number)), {HOST: 1}, {HOST: 2})
        learned.learn(identity("0"), {HOST: 1}, {HOST: 2})
    assert len(learned.entries()) == MOST_ENTRIES
    assert learned.measured(identity("0"))
    assert learned.measured(identity("5")) is None


class LearnsMeanwhile(str):
    """The build of an engine. When it is compared, another is measured, as between two steps of a thread."""

    learned: Learned

    def __eq__(self, other: object) -> bool:
        self.learned.learn(identity(f"another {len(self.learned.entries())}"), {HOST: 1}, {HOST: 2, SHOWN0: 3})
        return super().__eq__(other)

    __hash__ = str.__hash__


def test_what_is_learnt_while_a_thread_reads_does_not_disturb_it() -> None:
    learned = Learned()
    learned.learn(identity("a"), {SHOWN0: 1000}, {SHOWN0: 900})
    learned.learn(Identity(identity("a").files, "older build", (), 1), {SHOWN0: 1000}, {SHOWN0: 800})
    known, entries = learned.measured(identity("a")), learned.entries()
    build = LearnsMeanwhile("build")
    build.learned = learned
    assert learned.ratio(Identity(identity("a").files, build, ("-c", "9"), 1)) == Ratio(gpus=0.9)
    assert len(learned.entries()) > 2
    learned.learn(identity("a"), {SHOWN0: 1000}, {SHOWN0: 950, HOST: 50})
    assert (known, entries[0].measured) == ({SHOWN0: 900}, {"gpu0": 900})


def test_ram_never_corrects_downwards() -> None:
    learned = Learned()
    learned.learn(identity(), {SHOWN0: 1000, HOST: 1000}, {SHOWN0: 900, HOST: 700})
    assert learned.ratio(identity()) == Ratio(gpus=0.9, host=1.0)


@given(
    booked=st.dictionaries(st.sampled_from((SHOWN0, SHOWN1, HOST)), st.integers(0, 10**6), min_size=1),
    wanted=st.dictionaries(st.sampled_from((SHOWN0, SHOWN1, HOST)), st.integers(0, 10**7)),
)
def test_running_out_raises_the_estimate_within_bounds(
    booked: dict[Device, int], wanted: dict[Device, int]
) -> None:
    learned = Learned()
    learned.ran_out(identity(), booked, wanted)
    raised = learned.raised(identity())
    short = {device if device in booked else HOST for device in wanted}
    assert set(raised) == (set(booked) & short if wanted else set(booked))
    assert all(booked[name] < mib <= max(2 * booked[name], 2) for name, mib in raised.items())
    assert all(mib >= min(wanted.get(name, 0), 2 * booked[name]) for name, mib in raised.items())


def test_a_gpu_without_memory_of_its_own_runs_out_of_ram() -> None:
    wanted = ran_out(["ggml_gallocr_reserve_n_impl: failed to allocate MTL0 buffer of size 1610612736"])
    assert wanted is not None
    learned = Learned()
    learned.ran_out(identity(), {HOST: 1000}, wanted)
    assert learned.raised(identity()) == {HOST: 1536}


def test_running_out_again_and_again_raises_no_further() -> None:
    learned = Learned()
    booked = 1000
    for _ in range(20):  # another program takes the memory each time
        learned.ran_out(identity(), {SHOWN0: booked}, {})
        booked = learned.raised(identity())[SHOWN0]
    assert booked == 2000


def test_the_texts_of_llama_cpp_are_understood() -> None:
    cuda = "alloc_buffer: allocating 4403.49 MiB on device 1: cudaMalloc failed: out of memory"
    assert ran_out(["loading", cuda]) == {SHOWN1: 4403}
    compute = "ggml_gallocr_reserve_n_impl: failed to allocate CUDA0 buffer of size 321908736"
    assert ran_out([compute, cuda]) == {SHOWN0: 307, SHOWN1: 4403}
    assert (
        ran_out(["ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 321908736"]) == {}
    )
    assert ran_out(["alloc_tensor_range: failed to allocate CPU buffer of size 321908736"]) == {HOST: 307}
    for line in (
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache",
        "llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers",
        "graph_reserve: failed to allocate compute buffers",
        "ggml_vulkan: Device memory allocation of size 2147483648 failed.",
        "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "ggml_metal_buffer_init: error: failed to allocate buffer, size =  4096.00 MiB",
        "ggml_aligned_malloc: insufficient memory (attempted to allocate 4096.00 MB)",
        "alloc_buffer: allocating 900.00 MiB on device 0: aclrtMalloc failed: EL0004",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
        "process_ubatch: failed to compute graph, status: GGML status: error (failed to allocate memory)",
        "ggml_backend_sycl_buffer_type_alloc_buffer: can't allocate 900 Bytes of memory on device",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "llama_kv_cache_init: mmap failed: Cannot allocate memory",
        "failed to initialize the context: failed to allocate buffer for rs cache",
        "MemoryError",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "common_fit_params: failed to fit params to free device memory: n_gpu_layers already set, abort",
    ):
        assert ran_out([line]) is not None, line


def test_what_an_engine_gets_by_without_is_not_the_reason() -> None:
    assert ran_out([]) is None
    assert ran_out(["srv  load: failed to allocate 64.00 MiB of pinned memory: out of memory"]) is None
    assert (
        ran_out(["sched_reserve: compute buffer allocation failed, retrying without pipeline parallelism"]) is None
    )
    assert ran_out(["error: unknown model architecture: 'x'", "failed to load model"]) is None
