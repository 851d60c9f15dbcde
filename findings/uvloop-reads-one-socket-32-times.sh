#!/usr/bin/env bash
# uvloop 0.23.0 (libuv 1.52.1), beside CPython's own event loop.
# Good guess: a BufferedProtocol with a small buffer reads one buffer of a socket in a turn of the event loop, so that a
#   client that sends without end waits after each for everybody else; CPython's own loop does so.
# Behaviour: a buffer that came full is followed by the next read of the same socket, up to 32 of them, before any other
#   socket and any callback has its turn. A pause_reading() inside buffer_updated() ends it.
# Seen: buffers of a turn: asyncio 1, uvloop 32, uvloop with a pause after each 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q uvloop==0.23.0 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio, socket, sys, threading
from collections import Counter

import uvloop

SENT = 4 << 20


class Reader(asyncio.BufferedProtocol):
    def __init__(self, pauses, done):
        self._buffer, self._pauses, self._done = bytearray(4096), pauses, done
        self.turn, self.reads, self._received = 0, Counter(), 0

    def connection_made(self, transport):
        self._transport = transport
        self._next_turn()

    def _next_turn(self):
        self.turn += 1
        if not self._done.done():
            asyncio.get_running_loop().call_soon(self._next_turn)

    def get_buffer(self, sizehint):
        return self._buffer

    def buffer_updated(self, count):
        self.reads[self.turn] += 1
        self._received += count
        if self._received == SENT:
            self._done.set_result(None)
        elif self._pauses:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._transport.resume_reading)


async def most_of_a_turn(pauses):
    loop = asyncio.get_running_loop()
    reader = Reader(pauses, loop.create_future())
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    sender = threading.Thread(target=theirs.sendall, args=(b"x" * SENT,))
    sender.start()
    threading.Event().wait(0.2)  # the socket's own buffer is full by now
    await loop.create_connection(lambda: reader, sock=ours)
    await reader._done
    sender.join()
    return max(reader.reads.values())


seen = asyncio.run(most_of_a_turn(False)), uvloop.run(most_of_a_turn(False)), uvloop.run(most_of_a_turn(True))
print("buffers of a turn: asyncio {}, uvloop {}, uvloop with a pause after each {}".format(*seen))
sys.exit(seen != (1, 32, 1))
PYTHON
