"""Counts the objects of a process on SIGUSR1; Python imports this module first if it is on the path.

Only tests put it on a router's path. It does nothing until the signal comes.
"""

import asyncio
import gc
import json
import os
import signal
from collections import Counter
from pathlib import Path

COUNTED = ("Ticket", "Request", "Connection", "EnginePool", "LlamaServer", "RunningEngine", "Exchange")
COUNTED += ("Answer", "HttpProtocol", "RequestResponseCycle")
"""Endings of the names of classes that are counted."""


def held() -> Counter[str]:
    counts: Counter[str] = Counter(dict.fromkeys((*COUNTED, "tasks"), 0))
    for thing in gc.get_objects():
        of = type(thing)
        if isinstance(thing, asyncio.Task):
            counts["tasks"] += not thing.done()
        elif of.__module__.startswith(("router.", "uvicorn.")) and of.__name__.endswith(COUNTED):
            counts[next(name for name in COUNTED if of.__name__.endswith(name))] += 1
    return counts


def count(*_: object) -> None:
    before = held()
    gc.collect()
    counts = held()
    counts["waiting for the garbage collector"] = (before - counts).total()
    observation = Path(os.environ["OBSERVATION"])
    written = observation.with_suffix(".new")
    written.write_text(json.dumps(counts))
    written.rename(observation)


if "OBSERVATION" in os.environ:
    signal.signal(signal.SIGUSR1, count)
