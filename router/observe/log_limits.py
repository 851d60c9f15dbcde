"""Rate limits for log lines that any client can cause."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_Kind = TypeVar("_Kind", bound=Hashable)

_SPARED_SEC = 1.0
_MOST = 1000
"""Maximum number of pairs of kind and client that are distinguished."""
_OTHERS = "others"


class Sparing(Generic[_Kind]):
    """Admits one line per second for each kind and client, and reports how many others were left out."""

    def __init__(self, tell: Callable[[_Kind, str, int], None]) -> None:
        """`tell` is called with a kind, a client, and the number of lines left out."""
        self._tell = tell
        self._left_out: dict[tuple[_Kind, str], int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def lets_in(self, kind: _Kind, client: str) -> bool:
        """Whether to write a line of this kind and client. Must be called on the event loop."""
        if len(self._left_out) >= _MOST and (kind, client) not in self._left_out:
            client = _OTHERS
        left_out = self._left_out.get((kind, client))
        self._left_out[kind, client] = 0 if left_out is None else left_out + 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SPARED_SEC, self.settle)
        return left_out is None

    def settle(self) -> None:
        """Report what was left out so far."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left_out, self._left_out = self._left_out, {}
        for (kind, client), count in left_out.items():
            if count:
                self._tell(kind, client, count)
