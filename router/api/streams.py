"""Server-sent events of the router itself. A reader who stops reading is let go; a missed one reconnects."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

_log = logging.getLogger("router")

SEND_LIMIT_SEC = 30.0
"""For one event to leave once the connection is full: longer, and nobody reads it."""


class EventStream(EventSourceResponse):
    """An `EventSourceResponse` that ends, and logs no traceback, when its client does not take what is sent."""

    def __init__(self, events: AsyncIterator[ServerSentEvent], **more: Any) -> None:
        super().__init__(events, **{"send_timeout": SEND_LIMIT_SEC, **more})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _log.warning("%s: a client that reads nothing was disconnected", scope["path"])
