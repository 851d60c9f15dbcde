"""An engine that answers before it has read all of a request: the rest of its output reaches no other client."""

from __future__ import annotations

import asyncio

from router.engines.base import Endpoint
from router.engines.upstream import Connection, EnginePool, Head

LARGE = b"x" * 8_000_000
ANSWER = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 4\r\n\r\nnope"


class Asker:
    """Asks, and keeps what is answered."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connected(self, connection: Connection) -> None: ...

    def received(self, head: Head, part: bytes, last: bool) -> None:
        assert last
        self.answer.set_result(part)

    def lost(self, reason: str) -> None:
        self.answer.set_exception(AssertionError(reason))

    def failed(self) -> None:
        self.answer.set_exception(AssertionError("failed"))


def test_who_comes_next_gets_another_connection() -> None:
    async def story() -> None:
        connections = 0

        async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            while part := await reader.read(1000):
                writer.write(ANSWER if b"\r\n\r\n" in part else ANSWER.replace(b"nope", b"rest"))
                await asyncio.sleep(0.05)

        server = await asyncio.start_server(engine, "127.0.0.1", 0, limit=1000)
        port = server.sockets[0].getsockname()[1]
        pool = EnginePool(Endpoint(port), 4, lambda: True)
        for body in (LARGE, b"{}", b"{}"):
            asker = Asker()
            pool.ask(b"POST", b"/completion", b"", body, asker)
            assert await asyncio.wait_for(asker.answer, 10) == b"nope"
        assert connections == 2  # the second one is whole, and stays
        pool.close_idle()
        server.close()

    asyncio.run(story())
