"""Python imports this before anything else where it is on the path: SIGUSR1 makes the process count what it holds.

Only the chaos tests put it on a router's path. It changes nothing and looks at nothing until it is asked.
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


def count(*_: object) -> None:
    gc.collect()
    counts: Counter[str] = Counter(dict.fromkeys((*COUNTED, "tasks"), 0))
    for thing in gc.get_objects():
        if isinstance(thing, asyncio.Task):
            counts["tasks"] += not thing.done()
        elif type(thing).__name__ in COUNTED and type(thing).__module__.startswith(("router.", "uvicorn.")):
            counts[type(thing).__name__] += 1
    observation = Path(os.environ["OBSERVATION"])
    written = observation.with_suffix(".new")
    written.write_text(json.dumps(counts))
    written.rename(observation)


if "OBSERVATION" in os.environ:
    signal.signal(signal.SIGUSR1, count)
