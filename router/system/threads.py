"""Threads for an event loop that waits for none of them.

`threading.Thread.start` returns when the new thread has run, and a `ThreadPoolExecutor` starts one when there is
work and none is idle. Where every processor is taken, that may take seconds, and as late would every token be.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier

_WORKERS = 8


def begin(work: Callable[[], object]) -> None:
    """On a thread of its own, which keeps no process from ending. Raises RuntimeError if there can be none."""
    _thread.start_new_thread(work, ())


def pool(name: str, workers: int = _WORKERS) -> ThreadPoolExecutor:
    """One whose threads are all there. Call it before the event loop has anything else to do."""
    threads = ThreadPoolExecutor(workers, name)
    meeting = Barrier(workers)
    wait([threads.submit(meeting.wait) for _ in range(workers)])
    return threads
