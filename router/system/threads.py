"""Starts threads without blocking the event loop.

`threading.Thread.start` returns only when the new thread has run, and a `ThreadPoolExecutor` starts a thread when
there is work and none is idle. With all processors busy, that may take seconds and would delay every token.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier

_WORKERS = 8


def begin(work: Callable[[], object]) -> None:
    """Run work in a daemon thread. Raises RuntimeError if no thread can be started."""
    _thread.start_new_thread(work, ())


def pool(name: str, workers: int = _WORKERS) -> ThreadPoolExecutor:
    """Return a thread pool with all its threads running. Must be called before the event loop has other work."""
    threads = ThreadPoolExecutor(workers, name)
    meeting = Barrier(workers)
    wait([threads.submit(meeting.wait) for _ in range(workers)])
    return threads
