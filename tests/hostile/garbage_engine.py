"""An engine that says whatever it is asked to: a request names one of `garbage.KINDS` as `kind:NAME;` in its text.

All else is answered as an engine does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator

from garbage import FOREVER, RESET, SILENCE, answer_of

_ASKED = re.compile(rb"kind:([^;]+);")
_STREAMS = re.compile(rb'"stream": ?true')
_LINGER = struct.pack("ii", 1, 0)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            method, path, _ = line.decode().split()
            length = 0
            while (line := await reader.readline()).strip():
                name, _, value = line.decode().partition(":")
                length = int(value) if name.lower() == "content-length" else length
            body = await reader.readexactly(length)
            asked = _ASKED.search(body)
            if method == "POST" and asked is not None:
                pieces = answer_of(asked[1].decode(), path, streams=bool(_STREAMS.search(body)))
                await say(writer, pieces)
                return
            answer = json.dumps({"choices": [{"index": 0, "message": {"content": "ok"}}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def say(writer: asyncio.StreamWriter, pieces: Iterator[bytes]) -> None:
    for piece in pieces:
        if piece == SILENCE:
            await asyncio.sleep(3600)
        elif piece == RESET:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        elif piece == FOREVER:
            again = next(pieces)
            while True:
                writer.write(again)
                await writer.drain()
        else:
            writer.write(piece)
            await writer.drain()


async def main() -> None:
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = await asyncio.start_server(serve, "127.0.0.1", port)
    print('cmd_child_to_router:state:{"state":"ready","payload":{}}', flush=True)
    await server.serve_forever()


asyncio.run(main())
