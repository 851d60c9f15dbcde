"""Makes functions of the router raise on demand; Python imports this module first if it is on the path.

`FAULTS` is a file that names one of `SEAMS`: every call there raises an exception until the file is empty.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

SEAMS = (
    "router.dataplane.incoming:IncomingRequest._read",
    "router.dataplane.exchange:Exchange._submit",
    "router.dataplane.exchange:Exchange._decided",
    "router.dataplane.exchange:Exchange.connected",
    "router.dataplane.exchange:Exchange.received",
    "router.dataplane.exchange:Exchange._usage",
    "router.engines.llamacpp.usage:AnswerMeter.note",
    "router.dataplane.answer:Answer.told",
    "router.dataplane.answer:Answer.rest",
    "router.dataplane.answer:Answer.whole",
    "router.dataplane.answer:Answer.start",
    "router.dataplane.answer:Answer.write",
    "router.dataplane.answer:Answer.end",
    "router.dataplane.answer:Translator.events",
    "router.dataplane.answer:TranslatedAnswer.told",
    "router.dataplane.answer:TranslatedAnswer.rest",
    "router.dataplane.answer:TranslatedAnswer.write",
    "router.dialects.anthropic.answers:Translation.document",
    "router.dialects.anthropic.answers:Translation.last_events",
    "router.dialects.openai.choices:Several.usage",
    "router.dialects.openai.choices:Several.last_events",
    "router.dialects.ollama.answers:Translation.document",
    "router.dialects.ollama.answers:Translation.last_events",
    "router.dialects.openai.responses:Completion.document",
    "router.dialects.openai.responses:Completion.last_events",
)
THREADS = "threading:Thread.start"
"""A function that blocks its caller until the new thread has started."""


def install(seam: str, faults: Path) -> None:
    module, _, place = seam.partition(":")
    owner_name, _, name = place.partition(".")
    owner: Any = getattr(importlib.import_module(module), owner_name)
    original = getattr(owner, name)

    @functools.wraps(original)
    def faulty(*arguments: Any, **named: Any) -> Any:
        if faults.read_text() == seam:
            raise ZeroDivisionError(f"a fault at {seam}")
        return original(*arguments, **named)

    setattr(owner, name, faulty)


if "FAULTS" in os.environ and any(word.endswith("run.py") for word in sys.orig_argv):
    for each in (*SEAMS, THREADS):
        install(each, Path(os.environ["FAULTS"]))
