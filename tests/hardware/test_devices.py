"""What the machine has for engines: figures per device, from drivers that lie, fail, hang and go away."""

from __future__ import annotations

import asyncio
import ctypes
import json
import math
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from conftest import ROOT, eventually, examples, fork
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from played_nvml import (
    DRIVER_NOT_LOADED,
    FUNCTION_NOT_FOUND,
    GPU_IS_LOST,
    NO_PERMISSION,
    NOT_SUPPORTED,
    Fault,
    Gpu,
    Held,
    Part,
    PlayedGpus,
)
from sysfs import card, lay_out

from router.hardware import ram
from router.hardware.amd import Amd
from router.hardware.devices import Devices
from router.hardware.nvidia import Nvidia

MIB = 1 << 20

Environ = dict[str, str]


class Asker:
    """A process of its own that reads devices, with NVIDIA's library played if `environ` says so."""

    def __init__(self, environ: dict[str, str], gpu_devices: Sequence[int] | None, root: Path) -> None:
        options = json.dumps({"gpu_devices": gpu_devices, "root": str(root)})
        clean = {"PATH": os.defpath, "PYTHONPATH": str(ROOT), **environ}
        self._process = fork([str(ROOT / "tests" / "ask_devices.py"), options], Path("/"), clean)
        self.log: list[str] = []
        self._reader = threading.Thread(target=lambda: self.log.extend(self._process.stderr), daemon=True)
        self._reader.start()

    def read(self, deadline_sec: float = 30) -> dict[str, Any]:
        return self._ask({"deadline_sec": deadline_sec})

    def gpus(self) -> dict[str, Any]:
        return {name: device for name, device in self.read()["devices"].items() if name != "host"}

    def held_by(self, *pids: int) -> dict[str, Any]:
        return self._ask({"pids": pids, "deadline_sec": 30})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(question) + "\n")
        line = self._process.stdout.readline()
        assert line, "".join(self.log)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def leave(self) -> None:
        """Its own way: with the end of its input."""
        self._process.stdin.close()
        try:
            self._process.wait(5)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(5)


Ask = Callable[..., Asker]


@pytest.fixture
def ask() -> Iterator[Ask]:
    """Start a process that reads devices."""
    askers: list[Asker] = []

    def start(
        gpus: PlayedGpus | None = None,
        *,
        gpu_devices: Sequence[int] | None = None,
        root: Path = Path("/"),
        **environ: str,
    ) -> Asker:
        asker = Asker({**(gpus.environ if gpus else {}), **environ}, gpu_devices, root)
        askers.append(asker)
        return asker

    yield start
    for asker in askers:
        asker.leave()


# --- NVIDIA ----------------------------------------------------------------------------------------------


def test_every_figure_of_every_gpu_is_read(gpus: PlayedGpus, ask: Ask) -> None:
    big = Gpu(
        total_mib=24576,
        used_mib=3000,
        reserved_mib=500,
        utilization=37,
        temperature=61,
        power=280,
        processes=(Held(os.getpid(), 2500), Held(os.getppid(), 300, "graphics")),
    )
    small = Gpu(total_mib=8192, name="NVIDIA T1000 8GB")
    gpus.set(big, small)

    read = ask(gpus).read()

    assert list(read["devices"]) == ["gpu0", "gpu1", "host"]
    assert read["devices"]["gpu0"] == {
        "device": "gpu0",
        "kind": "cuda",
        "label": "NVIDIA GeForce RTX 3090",
        "uuid": big.uuid,
        "total_mib": 24576,
        "free_mib": 24576 - 3000 - 500,
        "used_by": {str(os.getpid()): 2500, str(os.getppid()): 300},
        "utilization": 0.37,
        "temperature_c": 61.0,
        "power_w": 280.0,
        "power_limit_w": 350.0,
    }
    assert read["devices"]["gpu1"]["label"] == "NVIDIA T1000 8GB"
    assert read["devices"]["gpu1"]["used_by"] == {}
    assert read["devices"]["host"]["total_mib"] > 0
    assert 0 <= read["age_sec"] < 30


def test_a_process_in_both_lists_counts_once(gpus: PlayedGpus, ask: Ask) -> None:
    gpus.set(Gpu(used_mib=900, processes=(Held(os.getpid(), 800), Held(os.getpid(), 800, "graphics"))))
    assert ask(gpus).gpus()["gpu0"]["used_by"] == {str(os.getpid()): 800}


@pytest.mark.parametrize(
    ("function", "figure"),
    [
        ("nvmlDeviceGetUtilizationRates", "utilization"),
        ("nvmlDeviceGetTemperature", "temperature_c"),
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetEnforcedPowerLimit", "power_limit_w"),
    ],
)
@pytest.mark.parametrize("code", [NO_PERMISSION, NOT_SUPPORTED, FUNCTION_NOT_FOUND])
def test_a_figure_that_is_not_told_leaves_the_others(
    gpus: PlayedGpus, ask: Ask, function: str, figure: str, code: int
) -> None:
    gpus.set(Gpu(processes=(Held(os.getpid(), 100),)), faults=[Fault(function, code=code)])
    gpu = ask(gpus).gpus()["gpu0"]
    untold = {name for name, value in gpu.items() if value is None}
    assert untold == {figure}


@pytest.mark.parametrize("missing", ["_v3", "_v2"])
def test_older_drivers_are_asked_for_processes_in_their_own_way(gpus: PlayedGpus, ask: Ask, missing: str) -> None:
    faults = [
        Fault(f"nvmlDeviceGet{kind}RunningProcesses{missing}", code=FUNCTION_NOT_FOUND)
        for kind in ("Compute", "Graphics")
    ]
    gpus.set(Gpu(processes=(Held(os.getpid(), 70),)), faults=faults)
    assert ask(gpus).gpus()["gpu0"]["used_by"] == {str(os.getpid()): 70}


def test_an_older_driver_without_the_second_memory_call(gpus: PlayedGpus, ask: Ask) -> None:
    fault = Fault("nvmlDeviceGetMemoryInfo_v2", code=FUNCTION_NOT_FOUND)
    gpus.set(Gpu(total_mib=10000, used_mib=1000, reserved_mib=300), faults=[fault])
    gpu = ask(gpus).gpus()["gpu0"]
    assert (gpu["total_mib"], gpu["free_mib"]) == (10000, 8700)


@pytest.mark.parametrize(
    ("processes", "faults"),
    [
        pytest.param((Held(os.getpid(), None),), [], id="windows"),
        pytest.param((Held(os.getpid(), 0),), [], id="container, open kernel modules"),
        pytest.param((Held(4194304 - 1, 900),), [], id="container, numbers of outside"),
        pytest.param((), [], id="container, nothing listed"),
        pytest.param(
            (Held(os.getpid(), 900),),
            [Fault(f"nvmlDeviceGet{kind}RunningProcesses{v}", code=NO_PERMISSION)
             for kind in ("Compute", "Graphics") for v in ("_v2", "_v3")],
            id="not permitted",
        ),
    ],
)  # fmt: skip
def test_use_by_processes_is_unknown_where_the_driver_does_not_tell(
    gpus: PlayedGpus, ask: Ask, processes: tuple[Held, ...], faults: list[Fault]
) -> None:
    gpus.set(Gpu(used_mib=1000, processes=processes), faults=faults)
    gpu = ask(gpus).gpus()["gpu0"]
    assert gpu["used_by"] is None
    assert gpu["free_mib"] == 24576 - 1000


def test_a_gpu_in_mig_mode_gives_its_parts(gpus: PlayedGpus, ask: Ask) -> None:
    parts = (Part(total_mib=20096, used_mib=96), Part(total_mib=9856))
    gpus.set(Gpu(), Gpu(total_mib=40536, is_mig=True, parts=parts))
    asker = ask(gpus)
    found = asker.gpus()
    assert list(found) == ["gpu0", "gpu1:0", "gpu1:1"]
    assert found["gpu1:0"]["uuid"] == parts[0].uuid
    assert (found["gpu1:0"]["total_mib"], found["gpu1:0"]["free_mib"]) == (20096, 20000)
    assert found["gpu1:0"]["temperature_c"] == 40  # of the whole
    environments = asker.read()["environments"]
    assert environments["gpu1:1"]["CUDA_VISIBLE_DEVICES"] == parts[1].uuid
    assert not asker.log


@pytest.mark.parametrize(
    "faults", [[], [Fault("nvmlDeviceGetMigDeviceHandleByIndex", code=NO_PERMISSION)]], ids=["none", "forbidden"]
)
def test_a_gpu_in_mig_mode_without_usable_parts_is_left_out(
    gpus: PlayedGpus, ask: Ask, faults: list[Fault]
) -> None:
    parts = (Part(total_mib=20096),) if faults else ()
    gpus.set(Gpu(is_mig=True, parts=parts), Gpu(), faults=faults)
    asker = ask(gpus)
    assert list(asker.gpus()) == ["gpu1"]
    assert list(asker.gpus()) == ["gpu1"]
    eventually(lambda: [line for line in asker.log if "in MIG mode" in line] != [])
    assert sum("in MIG mode" in line for line in asker.log) == 1


def test_memory_shared_with_the_processor_is_no_device_of_its_own(gpus: PlayedGpus, ask: Ask) -> None:
    silent = [Fault(f"nvmlDeviceGetMemoryInfo{version}", code=NOT_SUPPORTED) for version in ("", "_v2")]
    gpus.set(Gpu(name="NVIDIA GB10"), faults=silent)
    asker = ask(gpus)
    assert list(asker.read()["devices"]) == ["host"]
    eventually(lambda: any("NVIDIA GB10" in line and "count as in RAM" in line for line in asker.log))
    assert asker.read()["environments"]["host"] == {}, "or its models would run on the processor alone"


def test_a_lost_gpu_disappears_and_comes_back_under_its_name(gpus: PlayedGpus, ask: Ask) -> None:
    first, second = Gpu(), Gpu(name="NVIDIA RTX A6000")
    gpus.set(first, second)
    asker = ask(gpus)
    assert list(asker.gpus()) == ["gpu0", "gpu1"]

    gpus.set(first, second, faults=[Fault("nvmlDeviceGetMemoryInfo_v2", gpu=0, code=GPU_IS_LOST)])
    assert list(asker.gpus()) == ["gpu1"]
    gpus.set(second)  # the driver counts anew
    found = asker.gpus()
    assert list(found) == ["gpu1"]
    assert found["gpu1"]["uuid"] == second.uuid
    gpus.set(first, second)
    assert list(asker.gpus()) == ["gpu0", "gpu1"]
    asker.leave()
    assert [line.strip() for line in asker.log] == [
        "GPU 0 is left out: GPU is lost",
        "gpu0 (NVIDIA GeForce RTX 3090) is no longer available",
        "gpu0 (NVIDIA GeForce RTX 3090) is available again",
    ]


def test_a_lost_gpu_is_looked_for_anew_whatever_ails_the_others(gpus: PlayedGpus, ask: Ask) -> None:
    lost = Fault("nvmlDeviceGetUUID", gpu=0, code=GPU_IS_LOST)
    forbidden = Fault("nvmlDeviceGetHandleByIndex_v2", gpu=1, code=NO_PERMISSION)
    gpus.set(Gpu(), Gpu(), Gpu(), faults=[lost, forbidden, Fault("nvmlShutdown", code=NOT_SUPPORTED)])
    asker = ask(gpus)
    assert list(asker.gpus()) == ["gpu2"]
    gpus.set(*gpus.gpus, faults=[Fault("nvmlInitWithFlags", code=DRIVER_NOT_LOADED)])
    assert asker.gpus() == {}, "it was opened anew"


def test_a_driver_that_talks_nonsense_is_complained_of_once(gpus: PlayedGpus, ask: Ask) -> None:
    gpus.set(Gpu())
    asker = ask(gpus)
    assert list(asker.gpus()) == ["gpu0"]
    gpus.change(0, name="\udcff\udcfe")
    for _ in range(3):
        assert list(asker.gpus()) == ["gpu0"], "as it was"
    asker.leave()
    assert sum("Traceback" in line for line in asker.log) == 1


def test_a_gpu_that_the_driver_no_longer_lists_is_gone(gpus: PlayedGpus, ask: Ask) -> None:
    gpus.set(Gpu(), Gpu())
    asker = ask(gpus)
    assert len(asker.gpus()) == 2
    gpus.set(gpus.gpus[0])
    assert list(asker.gpus()) == ["gpu0"]
    assert list(asker.gpus()) == ["gpu0"]
    asker.leave()
    assert [line.strip() for line in asker.log] == ["gpu1 (NVIDIA GeForce RTX 3090) is no longer available"]


def test_a_reloaded_driver_is_opened_again_and_nobody_notices(gpus: PlayedGpus, ask: Ask) -> None:
    gpus.set(Gpu())
    asker = ask(gpus)
    assert list(asker.gpus()) == ["gpu0"]
    gpus.set(*gpus.gpus, driver=1)
    assert list(asker.gpus()) == ["gpu0"]
    asker.leave()
    assert asker.log == []


def test_a_driver_that_is_unloaded_and_loaded_again(gpus: PlayedGpus, ask: Ask) -> None:
    gpus.set(Gpu())
    asker = ask(gpus)
    assert list(asker.gpus()) == ["gpu0"]
    gpus.set(*gpus.gpus, driver=1, faults=[Fault(code=DRIVER_NOT_LOADED)])
    for _ in range(3):
        assert asker.gpus() == {}
    gpus.set(*gpus.gpus, driver=2)
    assert list(asker.gpus()) == ["gpu0"]
    asker.leave()
    assert [line.strip() for line in asker.log] == [
        "NVIDIA's driver can't be asked: Driver Not Loaded",
        "gpu0 (NVIDIA GeForce RTX 3090) is no longer available",
        "gpu0 (NVIDIA GeForce RTX 3090) is available again",
    ]


def test_a_driver_that_hangs_delays_nobody_and_piles_up_nothing(gpus: PlayedGpus, ask: Ask) -> None:
    gpus.set(Gpu(total_mib=1000))
    asker = ask(gpus)
    assert asker.gpus()["gpu0"]["free_mib"] == 1000
    gpus.set(*gpus.gpus, faults=[Fault("nvmlDeviceGetMemoryInfo_v2", code=None)])
    began = time.monotonic()
    answers = [asker.read(deadline_sec=0.05) for _ in range(20)]
    assert time.monotonic() - began < 15
    assert [answer["devices"]["gpu0"]["free_mib"] for answer in answers] == [1000] * 20
    ages = [answer["age_sec"] for answer in answers]
    assert ages == sorted(ages)
    assert ages[-1] > 0.9  # of the GPUs, though RAM was read just now
    assert max(answer["threads"] for answer in answers) <= 3  # the loop's, the one that hangs, one that reads RAM

    gpus.change(0, used_mib=400)
    eventually(lambda: asker.gpus()["gpu0"]["free_mib"] == 600)
    gpus.set(*gpus.gpus, faults=[Fault("nvmlDeviceGetMemoryInfo_v2", code=None)])
    asker.read(deadline_sec=0.05)
    asker.leave()  # a thread that hangs does not keep the process
    assert [line.strip() for line in asker.log][:2] == [
        "GPU driver: no response within 0.05 s; using the last reading until then",
        "GPU driver: responding again",
    ]


def test_a_driver_that_hangs_from_the_start_leaves_ram(gpus: PlayedGpus, ask: Ask) -> None:
    gpus.set(Gpu(), faults=[Fault("nvmlInitWithFlags", code=None)])
    read = ask(gpus).read(deadline_sec=0.5)
    assert list(read["devices"]) == ["host"]
    assert read["age_sec"] == math.inf


CODES = st.sampled_from([1, 2, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 17, 18, 25, 27, 999, 12345])
FUNCTIONS = st.sampled_from(
    [
        *("*", "nvmlInitWithFlags", "nvmlShutdown", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2"),
        *("nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"),
        *("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"),
        *("nvmlDeviceGetGraphicsRunningProcesses_v3", "nvmlDeviceGetMigMode", "nvmlDeviceGetPowerUsage"),
        *("nvmlDeviceGetMaxMigDeviceCount", "nvmlDeviceGetMigDeviceHandleByIndex", "nvmlDeviceGetTemperature"),
    ]
)
FAULTS = st.builds(Fault, function=FUNCTIONS, gpu=st.sampled_from([None, 0, 1]), code=CODES)


def test_no_fault_whatever_raises_out_of_a_reading(gpus: PlayedGpus, ask: Ask) -> None:
    asker = ask(gpus)
    whole, parted = Gpu(used_mib=600), Gpu(is_mig=True, parts=(Part(total_mib=5000),))

    @settings(max_examples=examples(50), deadline=None, suppress_health_check=list(HealthCheck))
    @given(faults=st.lists(FAULTS, max_size=4), driver=st.integers(0, 3))
    def world(faults: list[Fault], driver: int) -> None:
        gpus.set(whole, parted, faults=faults, driver=driver)
        read = asker.read()
        assert "host" in read["devices"]
        for device in read["devices"].values():
            assert 0 <= device["free_mib"] <= device["total_mib"]
        gpus.set(whole, parted, driver=driver)
        assert list(asker.gpus()) == ["gpu0", "gpu1:0"], "what is over is over"

    world()
    asker.leave()
    assert not any("Traceback" in line for line in asker.log), "".join(asker.log)


# --- which GPUs are ours, and what engines are shown -----------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "gpu_devices", "ours"),
    [
        (None, None, [0, 1, 2]),
        (None, [2, 1], [1, 2]),
        (None, [], []),
        ("", None, []),
        ("-1", None, []),
        ("1", None, [1]),
        ("2,0", None, [2, 0]),
        (" 0 , 2 ", None, [0, 2]),
        ("0,7,1", None, [0]),  # CUDA stops at the first that is not there
        ("NoDevFiles", None, []),
        ("GPU-b", None, [1]),
        ("GPU-c0000000,GPU-a", None, [2, 0]),
        ("1,2", [0, 2], [2]),
        ("1", [0], []),
    ],
)
def test_the_gpus_that_may_be_used(
    gpus: PlayedGpus, ask: Ask, visible: str | None, gpu_devices: list[int] | None, ours: list[int]
) -> None:
    gpus.set(*(Gpu(uuid=f"GPU-{letter}0000000-0000-0000-0000-000000000000") for letter in "abc"))
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = ask(gpus, gpu_devices=gpu_devices, **environ).gpus()
    assert list(found) == [f"gpu{number}" for number in ours]


@pytest.mark.parametrize(
    ("environ", "is_doubtful"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, False),
        ({"CUDA_VISIBLE_DEVICES": "GPU-b"}, False),
        ({}, False),
    ],
)
def test_a_number_that_cuda_would_read_otherwise_is_pointed_out(
    gpus: PlayedGpus, ask: Ask, environ: Environ, is_doubtful: bool
) -> None:
    gpus.set(Gpu(uuid="GPU-a"), Gpu(uuid="GPU-b", name="NVIDIA GeForce RTX 4090"))
    asker = ask(gpus, **environ)
    assert "gpu1" in asker.gpus()
    asker.leave()
    assert any("nvidia-smi counts" in line for line in asker.log) == is_doubtful


def test_an_engine_sees_the_chosen_gpus_and_no_others(gpus: PlayedGpus, ask: Ask) -> None:
    gpus.set(Gpu(), Gpu())
    read = ask(gpus).read()
    assert read["environments"]["gpu1"] == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": gpus.gpus[1].uuid,
    }
    both = ",".join(gpu.uuid for gpu in gpus.gpus)
    assert read["environment_of_all"]["CUDA_VISIBLE_DEVICES"] == both
    assert read["environments"]["host"]["CUDA_VISIBLE_DEVICES"] == ""


def test_gpus_that_the_configuration_forbids_are_hidden_from_engines(gpus: PlayedGpus, ask: Ask) -> None:
    gpus.set(Gpu())
    assert ask(gpus, gpu_devices=[]).read()["environments"]["host"]["CUDA_VISIBLE_DEVICES"] == ""


def test_a_hidden_choice_is_explained(gpus: PlayedGpus, ask: Ask) -> None:
    gpus.set(Gpu(), Gpu())
    asker = ask(gpus, gpu_devices=[0], CUDA_VISIBLE_DEVICES="1")
    assert asker.gpus() == {}
    eventually(lambda: any("none of gpu0, gpu1 may be used" in line for line in asker.log))


# --- AMD -------------------------------------------------------------------------------------------------


def node(root: Path, number: int, *, card: int, gpu_id: str, target: int = 110000) -> None:
    """A node of the compute driver, and the render node that is the same device as the card."""
    minor = 128 + card
    lay_out(
        root,
        {
            f"sys/class/kfd/kfd/topology/nodes/{number}/gpu_id": gpu_id,
            f"sys/class/kfd/kfd/topology/nodes/{number}/properties": "cpu_cores_count 0\nsimd_count 192\n"
            f"gfx_target_version {target}\nlocation_id 768\ndrm_render_minor {minor}\nunique_id 1234567",
        },
    )
    (root / f"sys/class/drm/renderD{minor}").mkdir()
    (root / f"sys/class/drm/renderD{minor}/device").symlink_to(root / f"sys/class/drm/card{card}/device")


def test_an_amd_gpu_is_read_from_its_files(tmp_path: Path) -> None:
    lay_out(tmp_path, card(1, vram_mib=24560, used_mib=1560, slot="0000:03:00.0"))
    lay_out(tmp_path, {"sys/class/drm/card1/device/unique_id": "7d4c9a0b1e2f3a4b"})
    lay_out(
        tmp_path, {"sys/class/drm/card1-DP-1/status": "connected", "sys/class/drm/card0/device/vendor": "0x8086"}
    )
    ((reading,), left_out) = Amd(root=tmp_path).read(list)
    assert (str(reading.device), reading.kind, reading.label) == ("gpu0", "rocm", "AMD GPU")
    assert reading.uuid == "GPU-7d4c9a0b1e2f3a4b"
    assert (reading.total_mib, reading.free_mib) == (24560, 23000)
    assert (reading.utilization, reading.temperature_c) == (0.12, 48.0)
    assert (reading.power_w, reading.power_limit_w) == (96.0, 303.0)
    assert reading.used_by is None
    assert left_out == []


def test_amd_gpus_are_counted_as_rocm_counts_them(tmp_path: Path) -> None:
    lay_out(tmp_path, card(0, vram_mib=8000, slot="0000:03:00.0"))
    lay_out(tmp_path, card(1, vram_mib=16000, slot="0000:83:00.0"))
    lay_out(tmp_path, {"sys/class/kfd/kfd/topology/nodes/0/gpu_id": 0})  # the processor
    node(tmp_path, 1, card=1, gpu_id="51821", target=90012)
    node(tmp_path, 2, card=0, gpu_id="4711", target=100302)
    gpus, _ = Amd(root=tmp_path).read(list)
    assert [(str(gpu.device), gpu.label, gpu.total_mib) for gpu in gpus] == [
        ("gpu0", "AMD gfx90c", 16000),
        ("gpu1", "AMD gfx1032", 8000),
    ]


def test_what_a_process_holds_of_an_amd_gpu(tmp_path: Path) -> None:
    lay_out(tmp_path, card(0, vram_mib=16000, slot="0000:03:00.0"))
    node(tmp_path, 1, card=0, gpu_id="51821")
    opened = "pos:\t0\ndrm-driver:\tamdgpu\ndrm-client-id:\t{}\ndrm-pdev:\t{}\ndrm-memory-vram:\t{} KiB"
    lay_out(
        tmp_path,
        {
            "proc/70/fdinfo/5": opened.format(11, "0000:03:00.0", 300 * 1024),
            "proc/70/fdinfo/6": opened.format(11, "0000:03:00.0", 300 * 1024),  # the same, duplicated
            "proc/70/fdinfo/7": opened.format(12, "0000:03:00.0", 50 * 1024),
            "proc/70/fdinfo/8": opened.format(13, "0000:83:00.0", 999 * 1024),  # of another GPU
            "proc/70/fdinfo/9": "pos:\t0\nflags:\t02",
            "proc/71/fdinfo/3": opened.format(14, "0000:03:00.0", 0),
            "sys/class/kfd/kfd/proc/71/vram_51821": 2048 * MIB,
        },
    )
    ((device,), _) = Amd(root=tmp_path).read(lambda: [70, 71, 72])
    assert device.used_by == {70: 350, 71: 2048}


@pytest.mark.parametrize(
    ("vram_mib", "asked", "is_offered"), [(512, (), False), (512, (0,), True), (65536, (), True)]
)
def test_a_carve_out_for_a_processors_graphics_is_offered_only_if_it_is_worth_it_or_asked_for(
    tmp_path: Path, vram_mib: int, asked: tuple[int, ...], is_offered: bool
) -> None:
    lay_out(tmp_path, card(0, vram_mib=vram_mib, apu=True, slot="0000:c5:00.0"))
    devices, left_out = Amd(asked, tmp_path).read(list)
    assert bool(devices) == is_offered
    assert is_offered or "its models count as in RAM" in left_out[0]


def test_a_graphics_card_beside_a_processors_own_graphics(tmp_path: Path, ask: Ask) -> None:
    lay_out(tmp_path, card(0, vram_mib=512, apu=True, slot="0000:c5:00.0"))
    lay_out(tmp_path, card(1, vram_mib=20464, slot="0000:03:00.0"))
    read = ask(root=tmp_path).read()
    assert list(read["devices"]) == ["gpu1", "host"]
    assert read["environments"]["gpu1"] == {"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}
    assert read["environments"]["host"]["HIP_VISIBLE_DEVICES"] == "-1"


@pytest.mark.parametrize(
    "environ",
    [
        {"HIP_VISIBLE_DEVICES": "1"},
        {"ROCR_VISIBLE_DEVICES": "1"},
        {"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "1,0"},
    ],
)
def test_graphics_that_are_left_out_keep_their_number(tmp_path: Path, environ: dict[str, str]) -> None:
    lay_out(tmp_path, card(0, vram_mib=512, apu=True, slot="0000:c5:00.0"))
    lay_out(tmp_path, card(1, vram_mib=20464, slot="0000:03:00.0"))
    assert [str(gpu.device) for gpu in Devices(environ=environ, root=tmp_path).read_blocking().gpus] == ["gpu1"]


@pytest.mark.parametrize(
    ("environ", "ours"),
    [
        ({}, ["gpu0", "gpu1", "gpu2"]),
        ({"HIP_VISIBLE_DEVICES": "2"}, ["gpu2"]),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, ["gpu2"]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ["gpu0"]),
        ({"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}, ["gpu1"]),
        ({"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": ""}, ["gpu0"]),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_the_amd_gpus_that_may_be_used(tmp_path: Path, ask: Ask, environ: dict[str, str], ours: list[str]) -> None:
    for number in range(3):
        lay_out(tmp_path, card(number, vram_mib=16000, slot=f"0000:0{number}:00.0"))
    found = ask(root=tmp_path, **environ).gpus()
    assert list(found) == ours


@given(
    content=st.binary(max_size=40),
    name=st.sampled_from(["mem_info_vram_total", "mem_info_vram_used", "gpu_metrics", "uevent", "unique_id"]),
)
@settings(max_examples=examples(50), deadline=None, suppress_health_check=list(HealthCheck))
def test_no_content_of_amds_files_raises(tmp_path: Path, content: bytes, name: str) -> None:
    lay_out(tmp_path, card(0, vram_mib=16000, slot="0000:03:00.0"))
    lay_out(tmp_path, {f"sys/class/drm/card0/device/{name}": content})
    devices, left_out = Amd(root=tmp_path).read(lambda: [os.getpid()])
    assert len(devices) + len(left_out) == 1


# --- RAM -------------------------------------------------------------------------------------------------


def group(path: str, **figures: object) -> dict[str, Any]:
    """A cgroup v2 folder."""
    return {f"sys/fs/cgroup/{path}/{name.replace('_', '.', 1)}": content for name, content in figures.items()}


NOT_LIMITED = {"memory_max": "max", "memory_high": "max", "memory_current": 900 * MIB, "memory_stat": "anon 1"}


def test_the_tightest_of_our_cgroups_counts(tmp_path: Path) -> None:
    lay_out(tmp_path, {"proc/self/cgroup": "0::/user.slice/app.slice/router.service"})
    lay_out(tmp_path, group("user.slice", **NOT_LIMITED))
    stat = f"anon {300 * MIB}\nfile {450 * MIB}\ninactive_file {400 * MIB}\nactive_file {50 * MIB}"
    lay_out(
        tmp_path,
        group(
            "user.slice/app.slice",
            memory_max=2000 * MIB,
            memory_high=1000 * MIB,
            memory_current=800 * MIB,
            memory_stat=stat,
        ),
    )
    lay_out(tmp_path, group("user.slice/app.slice/router.service", **NOT_LIMITED))
    assert ram.memory(tmp_path) == (1000, 1000 - (800 - 450))


def test_a_parent_may_have_less_left_than_a_child_with_a_lower_limit(tmp_path: Path) -> None:
    lay_out(tmp_path, {"proc/self/cgroup": "0::/a/b"})
    lay_out(tmp_path, group("a", memory_max=900 * MIB, memory_current=850 * MIB, memory_stat="inactive_file 0"))
    lay_out(tmp_path, group("a/b", memory_max=500 * MIB, memory_current=100 * MIB, memory_stat="inactive_file 0"))
    assert ram.memory(tmp_path) == (500, 50)


def test_in_a_container_the_mount_is_our_own_cgroup(tmp_path: Path) -> None:
    lay_out(tmp_path, {"proc/self/cgroup": "0::/../../docker/abc"})
    lay_out(tmp_path, group("", memory_max=700 * MIB, memory_current=200 * MIB, memory_stat="inactive_file 0"))
    assert ram.memory(tmp_path) == (700, 500)


def test_the_older_cgroups(tmp_path: Path) -> None:
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/",
            "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": 600 * MIB,
            "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": 500 * MIB,
            "sys/fs/cgroup/memory/docker/abc/memory.stat": f"total_inactive_file {100 * MIB}\ninactive_file 7",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 500 * MIB,
        },
    )
    assert ram.memory(tmp_path) == (600, 200)


@given(content=st.binary(max_size=60), name=st.sampled_from(["proc/self/cgroup", "memory.max", "memory.stat"]))
@settings(max_examples=examples(50), deadline=None, suppress_health_check=list(HealthCheck))
def test_no_content_of_a_cgroup_raises(tmp_path: Path, content: bytes, name: str) -> None:
    lay_out(tmp_path, {"proc/self/cgroup": "0::/"})
    lay_out(tmp_path, group("", memory_max=700 * MIB, memory_current=200 * MIB, memory_stat="inactive_file 0"))
    lay_out(tmp_path, {name if "/" in name else f"sys/fs/cgroup/{name}": content})
    total, available = ram.memory(tmp_path)
    assert 0 <= available <= total


HOLDS = """
import mmap, subprocess, sys
anonymous = bytearray(b"x") * (int(sys.argv[1]) << 20)
with open(sys.argv[2], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
sum(mapped[::4096])
child = subprocess.Popen([sys.executable, "-c", sys.argv[3]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(flush=True)
sys.stdin.read()
"""
HOLDS_CHILD = "import sys; anonymous = bytearray(b'x') * (50 << 20); print(flush=True); sys.stdin.read()"


@contextmanager
def holder(anonymous_mib: int, weights: Path) -> Iterator[int]:
    """A process, by its number, that holds memory and maps a file; with a child that holds 50 MiB."""
    argv = [sys.executable, "-c", HOLDS, str(anonymous_mib), str(weights), HOLDS_CHILD]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid  # it ends with its input, which is closed here


def test_what_a_process_and_its_children_hold_of_ram(tmp_path: Path, ask: Ask) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(os.urandom(MIB) * 80)
    with holder(120, weights) as pid:
        held = ask().held_by(pid, 4194303)
        assert list(held) == [str(pid)], "nobody has the other number"
        assert 170 <= held[str(pid)]["anonymous_mib"] <= 200
        assert len(held[str(pid)]["family"]) == 2
        assert 80 <= held[str(pid)]["file_mib"] <= 110


@pytest.mark.skipif(sys.platform != "linux", reason="others have one way to look")
def test_a_light_look_walks_through_nobodys_mappings(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(os.urandom(MIB) * 80)
    with holder(1, weights) as first, holder(1, weights) as second:
        thorough = ram.process_memory([first, second])
        light = ram.process_memory([first, second], mapped=False)
    assert all(memory.file_mib < 60 for memory in thorough.values()), "what they share counts half in each"
    assert all(memory.file_mib >= 80 for memory in light.values()), "only counters were read"
    assert list(thorough) == list(light) == [first, second]


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell")
@pytest.mark.parametrize("mapped", [True, False])
def test_weights_that_are_locked_into_ram_stay_there(tmp_path: Path, mapped: bool) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(os.urandom(6 * MIB))
    with weights.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        sum(mapping[::4096])
        before = ram.process_memory([os.getpid()], mapped=mapped)[os.getpid()]
        address = ctypes.c_char.from_buffer(mapping)
        if ctypes.CDLL(None).mlock(ctypes.byref(address), ctypes.c_size_t(len(mapping))) != 0:
            pytest.skip("this user may not lock so much (ulimit -l)")
        locked = ram.process_memory([os.getpid()], mapped=mapped)[os.getpid()]
        del address
    assert locked.anonymous_mib - before.anonymous_mib == pytest.approx(6, abs=2), "nobody else's"
    assert before.file_mib - locked.file_mib == pytest.approx(6, abs=2), "and not to be had for the asking"


def test_a_walk_through_large_mappings_keeps_no_light_look_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    look, pid, arrives = ram.process_memory, os.getpid(), threading.Event()

    def walk(pids: Iterable[int], *, mapped: bool) -> dict[int, ram.ProcessMemory]:
        assert not mapped or arrives.wait(10)
        return look(pids, mapped=mapped)

    monkeypatch.setattr(ram, "process_memory", walk)

    async def story() -> None:
        devices = Devices(())
        thorough = asyncio.create_task(devices.held_by([pid]))
        await asyncio.sleep(0)
        assert pid in await devices.held_by([pid], 1, mapped=False)
        assert await devices.held_by([pid], 0.01) == {}, "not in time"
        arrives.set()
        assert pid in await thorough
        arrives.clear()
        assert await devices.held_by([pid], 0.01) == {}, "and not what it held once"
        arrives.set()

    asyncio.run(story())


def test_who_asks_for_processes_meanwhile_is_answered_for_his_own() -> None:
    async def ask_together() -> list[set[int]]:
        devices = Devices(())
        held = await asyncio.gather(*(devices.held_by([pid]) for pid in (os.getpid(), os.getppid(), os.getpid())))
        return [set(answer) for answer in held]

    assert asyncio.run(ask_together()) == [{os.getpid()}, {os.getppid()}, {os.getpid()}]


def test_memory_that_the_machine_has_less_of_is_less_free(ask: Ask) -> None:
    asker = ask()

    def missing_mib() -> int:
        before = asker.read()["devices"]["host"]
        with mmap.mmap(-1, 512 * MIB) as taken:
            for page in range(0, len(taken), mmap.PAGESIZE):
                taken[page] = 1
            after = asker.read()["devices"]["host"]
        assert after["total_mib"] == before["total_mib"]
        return int(before["free_mib"] - after["free_mib"])

    assert any(missing_mib() > 200 for _ in range(5)), "or others have given some back, each time"


def test_a_machine_without_gpus_has_ram_and_hides_nothing_from_engines(ask: Ask) -> None:
    read = ask().read()
    assert read["devices"]["host"]["kind"] == "host"
    if list(read["devices"]) == ["host"]:
        assert read["environments"]["host"] == {}


def test_nvidias_library_is_not_looked_for_at_every_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """ctypes makes a type for each that it opens, also in vain. A driver may be installed later."""
    looks = 0

    def is_missing(name: str) -> None:
        nonlocal looks
        looks += 1
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", is_missing)
    now = time.monotonic()
    monkeypatch.setattr("router.hardware.nvidia.time", SimpleNamespace(monotonic=lambda: now))
    nvidia = Nvidia()
    for waited_sec, times in ((0, 1), (1, 1), (28, 1), (2, 2), (1, 2)):
        now += waited_sec
        assert nvidia.read() == ([], [])
        assert looks == times
