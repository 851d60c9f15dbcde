"""llama-server and the embedded engine, as a kind of engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.engines.documents import OF_LLAMA_SERVER
from router.engines.kind import EngineTexts, Installed, Kind
from router.engines.llamacpp.describe import described, file_info
from router.engines.llamacpp.metrics import are_told, relayed

if TYPE_CHECKING:
    from router.config.schema import System
    from router.engines.base import EngineBackend
    from router.engines.launcher import LocalLauncher
    from router.memory.measurements import Learned


def _backend(system: System, launcher: LocalLauncher, learned: Learned) -> EngineBackend:
    """Find the binary and return the backend. Raises NoEngine."""
    from router.engines.llamacpp.backend import LlamaCpp
    from router.engines.llamacpp.binary import find_binary

    return LlamaCpp(find_binary(system.llama_server_path), launcher, learned)


def _installed(system: System) -> Installed:
    """Return the binary."""
    from router.engines.base import NoEngine
    from router.engines.llamacpp.binary import find_binary

    try:
        binary = find_binary(system.llama_server_path)
    except NoEngine as error:
        return Installed(problem=str(error))
    return Installed(binary.kind if binary.kind == "embedded" else binary.argv[0], origin=binary.origin)


LLAMACPP = Kind(
    installed=_installed,
    backend=_backend,
    described=described,
    documents=OF_LLAMA_SERVER,
    file_format="gguf",
    file_info=file_info,
    metrics=EngineTexts(are_told, relayed),
)
