"""Which words of a program that ended tell best why: it knows llama.cpp and its kin, C, C++ and debuggers."""

from __future__ import annotations

import re
from collections.abc import Iterable

_ABORTED = re.compile(
    r"^\S+\.(?:cc?|cpp|cuh?|h|hpp|mm?):\d+: |: Assertion `.* failed|^terminate called |^ *what\(\): "
    r"|^libc\+\+abi: terminating"
)
"""Why a program has ended itself: llama.cpp's GGML_ASSERT and GGML_ABORT, and what the C and C++ libraries say."""
_OF_DEBUGGER = re.compile(
    r"^(?:#\d+ |\d+\t|0x[0-9a-f]+ in |\[(?:New|Thread|Inferior|Switching|Detaching|LWP)|warning: |\(lldb\)"
    r"|\* thread #| *frame #)|\[0x[0-9a-f]+\]$"
)
"""llama.cpp has gdb or lldb print where it was, or does so itself: after an assertion, but before an exception."""
_LEVEL_OF_ERROR = re.compile(r"^[\d.]+ E ")
"""How llama.cpp begins a line that tells an error, whatever its words."""
_CONSEQUENCE = re.compile(
    r"failed to create[ _](?:context|model)|failed to load[ _](?:context|model)(?! ')|due to model loading error"
    r"|trying to fit params"
    r"|the lines above say why"
)
"""What it says after that, on its way out; not where it quotes the file."""
_WRONG = ("error", "fail", "unable", "couldn't", "could not", "cannot", "can't")
_LINES_OF_REASON = 60


def complaints(lines: Iterable[str], count: int = 3) -> str:
    """What tells best what went wrong: the last that speak of an error, and not only of what came of it, up to the
    one that gave up; else the last."""
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
