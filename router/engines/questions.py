"""Requests of the router itself to an engine, each over a connection of its own, outside the pool."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from typing import NamedTuple

import anyio

from router.engines.base import Endpoint

CANNOT_ASK = -1
"""Result if the router is out of file descriptors, which says nothing about the engine."""


class Document(NamedTuple):
    """Response of an engine."""

    status: int
    content_type: str
    body: bytes

    @classmethod
    async def read(cls, answer: asyncio.StreamReader) -> Document:
        """Read a response. Raises OSError, EOFError, ValueError, IndexError and LimitOverrunError."""
        first, *lines = (await answer.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
        length = fields.get("content-length")
        body = await (answer.read() if length is None else answer.readexactly(int(length)))
        return cls(int(first.split(" ")[1]), fields.get("content-type", "application/json"), body)


async def document(endpoint: Endpoint, path: str, limit_sec: float, body: bytes | None = None) -> Document | None:
    """Return the document at `path`, or the answer to the JSON `body`; None without a valid response in time."""
    try:
        with anyio.fail_after(limit_sec):
            async with _asked(endpoint, path, body) as answer:
                return await Document.read(answer)
    except (OSError, EOFError, ValueError, IndexError, asyncio.LimitOverrunError):  # TimeoutError is an OSError
        return None


async def status(endpoint: Endpoint, path: str, body: bytes | None = None) -> int | None:
    """Return the status of the response at `path`; None if it is not HTTP. Call it with a timeout.

    `body` is JSON to be posted; without it, the request is a GET.
    """
    try:
        async with _asked(endpoint, path, body) as answer:
            return int((await answer.readline()).split()[1])
    except OSError as error:
        return CANNOT_ASK if error.errno in (errno.EMFILE, errno.ENFILE) else None
    except (ValueError, IndexError):
        return None


@contextlib.asynccontextmanager
async def _asked(endpoint: Endpoint, path: str, body: bytes | None = None) -> AsyncIterator[asyncio.StreamReader]:
    """Open a connection, send the request, and yield the stream of the response. Raises OSError."""
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    try:
        lines = "".join(f"{name}: {value}\r\n" for name, value in endpoint.headers)
        method = "GET"
        if body is not None:
            method = "POST"
            lines += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        head = f"{method} {path} HTTP/1.1\r\nHost: {endpoint.host}\r\n{lines}Connection: close\r\n\r\n"
        writer.write(head.encode() + (body or b""))
        yield reader
    finally:
        writer.close()
