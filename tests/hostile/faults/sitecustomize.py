"""Python imports this before anything else where it is on the path: the router makes mistakes where it is told to.

`FAULTS` is a file that names one of `SEAMS`: whoever comes there gets an exception, until the file is empty.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

SEAMS = (
    "router.exchange:Exchange._read",
    "router.exchange:Exchange._submit",
    "router.exchange:Exchange._decided",
    "router.exchange:Exchange.connected",
    "router.exchange:Exchange.received",
    "router.exchange:Exchange._usage",
    "router.meter:AnswerMeter.note",
    "router.answer:Answer.told",
    "router.answer:Answer.rest",
    "router.answer:Answer.whole",
    "router.answer:Answer.start",
    "router.answer:Answer.write",
    "router.answer:Answer.end",
    "router.answer:Translator.events",
    "router.answer:TranslatedAnswer.told",
    "router.answer:TranslatedAnswer.rest",
    "router.answer:TranslatedAnswer.write",
    "router.anthropic_answers:Translation.document",
    "router.anthropic_answers:Translation.last_events",
    "router.choices:Several.usage",
    "router.choices:Several.last_events",
    "router.ollama_answers:Translation.document",
    "router.ollama_answers:Translation.last_events",
    "router.responses:Completion.document",
    "router.responses:Completion.last_events",
)


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
    for each in SEAMS:
        install(each, Path(os.environ["FAULTS"]))
