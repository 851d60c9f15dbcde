"""The router's own questions to an engine: each a GET over a connection of its own, beside its pool."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from typing import NamedTuple

from router.engines.base import Endpoint

CANNOT_ASK = -1
"""We are short of file descriptors, which says nothing of the engine."""


class Document(NamedTuple):
    """An engine's answer to a question of the router's own."""

    status: int
    content_type: str
    body: bytes

    @classmethod
    async def read(cls, answer: asyncio.StreamReader) -> Document:
        """Raises what streams and wrong HTTP raise."""
        first, *lines = (await answer.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
        length = fields.get("content-length")
        body = await (answer.read() if length is None else answer.readexactly(int(length)))
        return cls(int(first.split(" ")[1]), fields.get("content-type", "application/json"), body)


async def document(endpoint: Endpoint, path: str, limit_sec: float) -> Document | None:
    """What is at `path`; None if it does not answer in time."""

    async def fetch() -> Document:
        async with _asked(endpoint, path) as answer:
            return await Document.read(answer)

    try:
        return await asyncio.wait_for(fetch(), limit_sec)
    except (OSError, EOFError, ValueError, IndexError, asyncio.LimitOverrunError, asyncio.TimeoutError):
        return None


async def status(endpoint: Endpoint, path: str) -> int | None:
    """With what status it answers; None if it does not answer in HTTP. Ask it within a limit."""
    try:
        async with _asked(endpoint, path) as answer:
            return int((await answer.readline()).split()[1])
    except OSError as error:
        return CANNOT_ASK if error.errno in (errno.EMFILE, errno.ENFILE) else None
    except (ValueError, IndexError):
        return None


@contextlib.asynccontextmanager
async def _asked(endpoint: Endpoint, path: str) -> AsyncIterator[asyncio.StreamReader]:
    """The answer. Raises OSError."""
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    try:
        lines = "".join(f"{name}: {value}\r\n" for name, value in endpoint.headers)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {endpoint.host}\r\n{lines}Connection: close\r\n\r\n".encode())
        yield reader
    finally:
        writer.close()
