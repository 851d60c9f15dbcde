"""Detection in an engine's log of memory that ran out, and of the allocations that failed.

The texts are those of llama.cpp, build 11434: ggml/src/ggml.c, ggml-alloc.c, ggml-backend.cpp, ggml-cuda (also
for ROCm), ggml-vulkan, ggml-sycl, ggml-metal, ggml-opencl, ggml-cann, and src/llama-model.cpp, llama-context.cpp,
llama-kv-cache.cpp, llama-memory-recurrent.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from router.system.devices import HOST, Device

_MIB = 1 << 20
_SIGNS = re.compile(
    r"out of memory|insufficient memory|MemoryError"
    r"|alloc failed|ALLOC_FAILED|bad_alloc"
    r"|failed to allocate (\w+ )*(buffer|graph|context|compute|memory)"
    r"|failed to allocate [\d.]+ (bytes|MB|MiB)"
    r"|(unable to|can't|cannot|couldn't|could not) allocate"
    r"|memory allocation of size \d+ failed"
    r"|(ErrorOutOf|OUT_OF_)(Device|Host|Pool)_?Memory|MEM_OBJECT_ALLOCATION_FAILURE"
    r"|failed to fit params to free device memory",
    re.IGNORECASE,
)
# Failures after which the engine continues.
_HARMLESS = re.compile(
    r"pinned memory|async uploads|prompt cache state|retrying without|fallback|skipping reorder", re.IGNORECASE
)
_ON_DEVICE = re.compile(r"allocating ([\d.]+) MiB on device (\d+)")
_BUFFER = re.compile(r"allocate (\w+) buffer of size (\d+)")
_NUMBER = re.compile(r"\D(\d+)$")


def ran_out(log: Iterable[str]) -> Mapping[Device, int] | None:
    """Return the last failed allocation on each device in MiB, as far as the log reports it; None if memory did
    not run out.

    GPUs are counted as the engine counts them.
    """
    found = False
    wanted: dict[Device, int] = {}
    for line in log:
        if not _SIGNS.search(line) or _HARMLESS.search(line):
            continue
        found = True
        if (asked := _ON_DEVICE.search(line)) is not None:
            wanted[Device.shown(int(asked[2]))] = round(float(asked[1]))
        elif (buffer := _BUFFER.search(line)) is not None:
            number = _NUMBER.search(buffer[1])
            wanted[Device.shown(int(number[1])) if number else HOST] = -(-int(buffer[2]) // _MIB)
    return wanted if found else None
