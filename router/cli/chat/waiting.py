"""Tells on standard error why an answer does not come yet."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from typing import Any

from router.cli.client import CannotAsk, Refused, RouterClient
from router.cli.columns import duration
from router.system.printable import line

_PATIENCE_SEC = 0.7
_PATIENCE_OF_LOGS_SEC = 2.0
"""Shorter waits are not told: on a terminal, elsewhere."""
_LOOK_SEC = 1.0
_LINE_EVERY_SEC = 10.0
"""Interval of lines if standard error is not a terminal."""


class Waiting:
    """Asks the router about a request in a thread of its own, and shows what it says, until `end`.

    On a terminal that is one line, which is redrawn, and erased at the end.
    """

    def __init__(self, client: RouterClient, request_id: str) -> None:
        self._client = client
        self._id = request_id
        self._since = time.monotonic()
        self._is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._told_sec = -_LINE_EVERY_SEC
        self._is_drawn = False
        self._ended = threading.Event()
        self._drawing = threading.Lock()

    def __enter__(self) -> Waiting:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Stop telling, before anything else is printed."""
        if self._ended.is_set():
            return
        with self._drawing:
            self._ended.set()
            if self._is_drawn:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()

    def _watch(self) -> None:
        wait_sec = _PATIENCE_SEC if self._is_terminal else _PATIENCE_OF_LOGS_SEC
        while not self._ended.wait(wait_sec):
            wait_sec = _LOOK_SEC
            try:
                told = _told(self._client.get(f"/v1/requests/{self._id}"))
            except Refused as refused:
                if refused.code != "request_not_found":  # its beginning may not have arrived yet
                    return
            except (CannotAsk, KeyError, TypeError):  # another server, or an answer that will say what is wrong
                return
            else:
                self._tell(f"{duration(time.monotonic() - self._since)}: {told}")

    def _tell(self, told: str) -> None:
        with self._drawing:
            if self._ended.is_set():
                return
            if self._is_terminal:
                text = line(told)[: shutil.get_terminal_size().columns - 1]
                sys.stderr.write(f"\r\x1b[2m{text}\x1b[22m\x1b[K")
                self._is_drawn = True
            elif (now := time.monotonic()) - self._told_sec >= _LINE_EVERY_SEC:
                self._told_sec = now
                sys.stderr.write(f"{line(told)}\n")
            sys.stderr.flush()


def _told(request: dict[str, Any]) -> str:
    """Return what the router says about a request."""
    if request["state"] == "receiving":
        return "the router receives the request"
    if request["state"] != "queued":
        return "the model reads the prompt"
    expected = request["expected_wait_sec"]
    to_go = "" if expected is None else f", ~{duration(expected)} to go"
    return f"position {request['position']}{to_go}: {request['why']}"
