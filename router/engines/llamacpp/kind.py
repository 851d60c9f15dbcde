"""llama-server and the embedded engine, as a kind of engine."""

from __future__ import annotations

from router.engines.documents import OF_LLAMA_SERVER
from router.engines.kind import Kind
from router.engines.llamacpp.backend import LlamaCpp
from router.engines.llamacpp.binary import find_binary
from router.engines.llamacpp.describe import described, file_info

LLAMACPP = Kind(
    backend=lambda system, launcher, learned: LlamaCpp(find_binary(system.llama_server_path), launcher, learned),
    described=described,
    documents=OF_LLAMA_SERVER,
    file_format="gguf",
    file_info=file_info,
)
