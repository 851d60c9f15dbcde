"""Selection of the log lines that best explain an exit, by the formats of llama.cpp, C, C++ and debuggers."""

from __future__ import annotations

import re
from collections.abc import Iterable

_ABORTED = re.compile(
    r"^\S+\.(?:cc?|cpp|cuh?|h|hpp|mm?):\d+: |: Assertion `.* failed|^terminate called |^ *what\(\): "
    r"|^libc\+\+abi: terminating"
)
"""Messages of a program that aborts: GGML_ASSERT and GGML_ABORT of llama.cpp, and those of C and C++ libraries."""
_OF_DEBUGGER = re.compile(
    r"^(?:#\d+ |\d+\t|0x[0-9a-f]+ in |\[(?:New|Thread|Inferior|Switching|Detaching|LWP)|warning: |\(lldb\)"
    r"|\* thread #| *frame #)|\[0x[0-9a-f]+\]$"
)
"""Stack traces, which llama.cpp prints itself or through gdb or lldb: after an assertion, but before an
exception."""
_LEVEL_OF_ERROR = re.compile(r"^[\d.]+ E ")
"""Beginning of llama.cpp's lines of level error."""
_CONSEQUENCE = re.compile(
    r"failed to create[ _](?:context|model)|failed to load[ _](?:context|model)(?! ')|due to model loading error"
    r"|trying to fit params"
    r"|the lines above say why"
)
"""Messages that follow from an earlier error, except where they quote the file."""
_WRONG = ("error", "fail", "unable", "couldn't", "could not", "cannot", "can't")
_LINES_OF_REASON = 60


def complaints(lines: Iterable[str], count: int = 3) -> str:
    """Join the lines that best explain a failure: the last `count` errors up to an abort, without those that only
    follow from others; the last lines if there are none."""
    said = [line for line in lines if line.strip() and not _OF_DEBUGGER.search(line)]
    aborted = [place for place, line in enumerate(said, 1) if _ABORTED.search(line)]
    tail = said[: aborted[-1] if aborted else None][-_LINES_OF_REASON:]
    wrong = [line for line in tail if _tells_error(line)]
    causes = {line.partition(" E ")[2] or line: line for line in wrong if not _CONSEQUENCE.search(line)}
    return " | ".join((list(causes.values()) or wrong or tail)[-count:])


def _tells_error(line: str) -> bool:
    return bool(_ABORTED.search(line) or _LEVEL_OF_ERROR.search(line)) or any(
        word in line.lower() for word in _WRONG
    )
