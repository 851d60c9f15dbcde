"""Whether an engine that died while it loaded ran out of memory, told by its log, and what it had asked for.

The texts are those of llama.cpp, build 11434: ggml/src/ggml-cuda/ggml-cuda.cu, ggml-alloc.c, ggml-backend.cpp,
ggml-vulkan, ggml-metal, and src/llama-model.cpp, llama-context.cpp, llama-kv-cache.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_MIB = 1 << 20
_SIGNS = re.compile(
    r"out of memory"
    r"|cudaMalloc failed"
    r"|failed to allocate (\w+ )*(buffer|graph|context|compute)"
    r"|failed to allocate [\d.]+ (bytes|MB|MiB)"
    r"|unable to allocate \S+ buffer"
    r"|memory allocation of size \d+ failed"
    r"|ErrorOutOf(Device|Host|Pool)Memory"
    r"|failed to fit params to free device memory"
    r"|std::bad_alloc"
    r"|cannot allocate memory",
    re.IGNORECASE,
)
# It is a pity about these, but the engine goes on without.
_HARMLESS = re.compile(r"pinned memory|async uploads|prompt cache state", re.IGNORECASE)
_ON_DEVICE = re.compile(r"allocating ([\d.]+) MiB on device (\d+)")
_BUFFER = re.compile(r"allocate (\w+) buffer of size (\d+)")
_NUMBER = re.compile(r"\D(\d+)$")


def ran_out(log: Iterable[str]) -> Mapping[str, int] | None:
    """What it asked for last on each device that had no more, in MiB, as far as it says; None: not for memory.

    GPUs are counted as the engine does.
    """
    found = False
    wanted: dict[str, int] = {}
    for line in log:
        if not _SIGNS.search(line) or _HARMLESS.search(line):
            continue
        found = True
        if (asked := _ON_DEVICE.search(line)) is not None:
            wanted[f"gpu{asked[2]}"] = round(float(asked[1]))
        elif (buffer := _BUFFER.search(line)) is not None:
            number = _NUMBER.search(buffer[1])
            wanted[f"gpu{number[1]}" if number else "host"] = -(-int(buffer[2]) // _MIB)
    return wanted if found else None
