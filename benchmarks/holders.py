"""What holds the event loop? Samples it from a thread of the router's own process.

`hostile.py --holders FILE` writes the samples to a file: where the loop's thread was during iterations that took
too long, by the wall clock and by its CPU time; what other threads computed meanwhile; and for the longest
iterations, the time spent computing, waiting for a processor, and neither: waiting for the interpreter's lock, for
another thread, or for the kernel.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from types import FrameType

_LOOK_SEC = 0.002
_LONG_SEC = 0.015
_FRAMES = 8
_SHOWN = 25


@dataclass
class Clocks:
    """Seconds, of one iteration of the loop or since some point in time."""

    wall: float
    own: float
    """CPU time of the loop's thread."""
    queued: float
    """Time for which that thread was ready and had no processor (Linux)."""
    process: float

    def __sub__(self, before: Clocks) -> Clocks:
        return Clocks(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    def __str__(self) -> str:
        rest = self.wall - self.own - self.queued
        figures = (self.wall, self.own, self.queued, rest, self.process)
        said = "wall {:.0f}, own {:.0f}, without a processor {:.0f}, neither {:.0f}; all threads {:.0f} ms"
        return said.format(*(figure * 1000 for figure in figures))


class Holders:
    """Samples of the event loop. Create it on the loop's thread, and call `tick` in each iteration."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._thread)
        self._schedstat = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        self._before = self._clocks()
        self._longest: list[Clocks] = []
        self._places: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._others: defaultdict[str, float] = defaultdict(float)
        threading.Thread(target=self._look, name="holders", daemon=True).start()
        self._write()

    def _clocks(self) -> Clocks:
        queued_ns = int(os.pread(self._schedstat, 100, 0).split()[1])
        return Clocks(time.perf_counter(), time.thread_time(), queued_ns / 1e9, time.process_time())

    def tick(self) -> None:
        before, self._before = self._before, self._clocks()
        took = self._before - before
        if took.wall > _LONG_SEC:
            self._longest.append(took)

    def _look(self) -> None:
        turn, at, own, clocks = self._before, 0.0, 0.0, _clocks_of_others()
        while True:
            time.sleep(_LOOK_SEC)
            now, now_own = time.perf_counter(), time.clock_gettime(self._clock)
            if self._before is not turn:
                turn = self._before
                at, own = turn.wall, turn.own
            if now - turn.wall < _LONG_SEC / 2:
                clocks = _clocks_of_others()
                continue
            frames = sys._current_frames()
            place = self._places[_told(frames.get(self._thread))]
            place[0] += now - at
            place[1] += now_own - own
            at, own = now, now_own
            earlier, clocks = clocks, _clocks_of_others()
            for thread, computed in clocks.items():
                took = computed - earlier.get(thread, computed)
                if took > 0.001 and thread != self._thread:
                    self._others[_told(frames.get(thread))] += took

    def _write(self) -> None:
        with self._place.open("w") as file:
            for number, clock in enumerate(("wall clock", "own clock")):
                print(f"where the loop was in long turns, by its {clock}, ms", file=file)
                found = sorted(self._places.items(), key=lambda item: -item[1][number])
                for told, seconds in found[:_SHOWN]:
                    print(f"{seconds[number] * 1000:7.0f}  {told}", file=file)
            print("what other threads computed then, ms", file=file)
            for told, sec in sorted(self._others.items(), key=lambda item: -item[1])[:_SHOWN]:
                print(f"{sec * 1000:7.0f}  {told}", file=file)
            for name in ("wall", "own"):
                print(f"the longest turns by {name}, of {len(self._longest)}", file=file)
                longest = sorted(self._longest, key=lambda took: -float(getattr(took, name)))
                print(*longest[:_SHOWN], sep="\n", file=file)
        asyncio.get_running_loop().call_later(5, self._write)


def _clocks_of_others() -> dict[int, float]:
    clocks: dict[int, float] = {}
    for thread in sys._current_frames():
        with suppress(OSError):
            clocks[thread] = time.clock_gettime(time.pthread_getcpuclockid(thread))
    return clocks


def _told(frame: FrameType | None) -> str:
    told: list[str] = []
    while frame is not None and len(told) < _FRAMES:
        told.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(told)
