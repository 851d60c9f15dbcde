"""What a vLLM that ended has logged: why it ended, and what helps. The words are those of vLLM 0.32."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_PREFIX = re.compile(r"^(?:\(\S+(?: \S+)*? pid=\d+\) )?(?:(?:INFO|WARNING|ERROR) [\d-]+ [\d:]+ \[[^\]]+\] ?)?")
_CAUSE = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt)): (.+)")
_DETAIL = re.compile(r"^\s+(?:Value|Assertion) error, (.+)")
"""The line after pydantic's ValidationError that says what is wrong."""
_MORE = re.compile(r" (?:Supported architectures: dict_keys\(|\[type=value_error, input_value=).*")
"""What follows it and helps nobody: all that vLLM supports, and all of its settings."""
_CONSEQUENCE = re.compile(
    r"Engine core initialization failed|EngineDeadError|EngineCore encountered|Worker failed"
)
_DIED = re.compile(
    r"\bproc \S+ died unexpectedly(?: \(exit code: [^)]*\))?|\bengine core exited unexpectedly|"
    r"Failed core proc\(s\): \{.*: -9\b"
)
"""What its other processes say of one that was killed, or has crashed."""
_OF_SERVER = re.compile(r"^\(APIServer\S* pid=\d+\)")
"""How lines of the API server begin. It tells errors of requests, too, after which it goes on."""
_USAGE = re.compile(r"^(?:vllm|vllm serve|\S+\.py): error: (.+)")


class _Lack(NamedTuple):
    sign: re.Pattern[str]
    what: str
    helps: str


_LACKS = (
    _Lack(
        re.compile(
            r"KV cache is needed, which is larger than the available KV cache|No available memory for the cache"
        ),
        "its KV cache does not fit",
        "set a smaller `context` or fewer `slots` in its entry, or --kv-cache-dtype fp8",
    ),
    _Lack(
        re.compile(r"less than desired (?:GPU|CPU) memory utilization|less than requested memory for kv"),
        "other programs hold memory that it was to have",
        "lower --gpu-memory-utilization in its flags if it is there, or set a smaller `context`",
    ),
    _Lack(
        re.compile(r"(?:CUDA|HIP|XPU) out of memory|torch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory"),
        "a GPU is out of memory",
        "set a smaller `context` or fewer `slots` in its entry, or the flag --enforce-eager",
    ),
)


def plain(line: str) -> str:
    """Return a line without the process, level, time and place that vLLM begins it with."""
    return _PREFIX.sub("", line, count=1)


def lack_of_memory(log: Sequence[str]) -> str | None:
    """Return what helps if it ended for want of memory; None if it did not."""
    for line in reversed(log):
        for lack in _LACKS:
            if lack.sign.search(line):
                return f"{lack.what}: {lack.helps}"
    return None


def has_lost_a_process(log: Sequence[str]) -> bool:
    """Return whether one of its processes was killed or has crashed, without a word of its own."""
    return any(map(_DIED.search, log))


def without_requests(log: Sequence[str]) -> list[str]:
    """Return the lines of one that has served without what the API server tells, but for deaths of the others."""
    return [line for line in log if not _OF_SERVER.match(line) or _DIED.search(line) or _CONSEQUENCE.search(line)]


def cause(log: Sequence[str]) -> str:
    """Return the error that the others follow from; empty if the log tells none.

    Each process tells its own error and then those of the processes that it has started. So the first error counts
    that is no consequence of another.
    """
    last = ""
    for line in map(plain, log):
        if (died := _DIED.search(line)) is not None:
            return died[0]
        if (detail := _DETAIL.match(line)) is not None:
            return _MORE.sub("", detail[1])
        if (usage := _USAGE.match(line)) is not None:
            return usage[1]
        if (found := _CAUSE.match(line)) is None:
            continue
        if not _CONSEQUENCE.search(line) and found[1] != "ValidationError":
            return f"{found[1]}: {found[2]}"
        last = line
    return last
