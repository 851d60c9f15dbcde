"""Clients that send without end: `python attack.py PORT SECONDS READS KIND…`, a connection for each kind.

The attack is a process of its own, so that its use of the interpreter does not slow down the clients that are
measured beside it. It reconnects as soon as a connection is closed, and prints the bytes sent and received
by kind.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections import Counter

KEY = b"authorization: Bearer full"
PATH = b"/v1/chat/completions"
PIECE = 1 << 18


def request(method: bytes, path: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    lines = [b"%b %b HTTP/1.1" % (method, path), b"host: localhost", *headers]
    if method == b"POST":
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join((*lines, b"", body))


CHUNKED = request(b"GET", PATH, KEY, b"transfer-encoding: chunked").replace(b"GET", b"POST")
UPGRADE = (b"connection: upgrade", b"upgrade: h2c")
PREFLIGHT = (b"origin: http://localhost:3000", b"access-control-request-method: GET")

REQUESTS = {
    "live": request(b"GET", b"/live"),
    "401": request(b"POST", PATH),
    "401 page": request(b"GET", b"/v1/models"),
    "400": request(b"POST", PATH, KEY, body=b"{"),
    "400 of Ollama": request(b"POST", b"/api/chat", KEY, body=b"["),
    "404": request(b"GET", b"/v1/nonsense", KEY),
    "404 model": request(b"POST", PATH, KEY, body=json.dumps({"model": "nobody", "messages": []}).encode()),
    "405": request(b"GET", PATH, KEY),
    "415": request(b"POST", PATH, KEY, b"content-encoding: gzip"),
    "HEAD": request(b"HEAD", b"/live"),
    "OPTIONS": request(b"OPTIONS", b"/v1/models", *PREFLIGHT),
    "upgrade": request(b"POST", PATH, *UPGRADE),
    "upgraded page": request(b"GET", b"/live", *UPGRADE),
    "empty lines": b"\r\n",
}
"""Requests that are answered, and repeated on the same connection as often as possible."""
LAST_REQUESTS = {
    "invalid": b"NONSENSE\r\n\r\n",
    "414": request(b"GET", b"/live?" + b"x" * 33_000),
    "431": request(b"GET", b"/live", *[b"x: y"] * 120),
    "431, long": request(b"GET", b"/live", b"x: " + b"y" * 70_000),
}
"""Requests after which the router closes the connection."""
ENDLESS = {
    "chunks of one byte": (CHUNKED, b"1\r\nx\r\n"),
    "chunks with extensions": (CHUNKED, b"1;%b\r\nx\r\n" % (b"y" * 200)),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", b"a:b\r\n"),
    "headers": (b"GET /live HTTP/1.1\r\n", b"a:b\r\n"),
}
"""A valid beginning and the piece that follows it endlessly."""
CRUMBS = "a byte in a packet"

KINDS = (*REQUESTS, *LAST_REQUESTS, *ENDLESS, CRUMBS)


class Attacker:
    def __init__(self, port: int, kind: str) -> None:
        self._port = port
        self.kind = kind
        self.socket: socket.socket
        self._pending = memoryview(b"")
        self.connect()

    def connect(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self._port))
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begin, _ = ENDLESS.get(self.kind, (b"", b""))
        self._pending = memoryview(begin)

    def send(self) -> int:
        if not self._pending:
            self._pending = memoryview(_piece(self.kind))
        count = self.socket.send(self._pending[:1] if self.kind == CRUMBS else self._pending)
        self._pending = self._pending[count:]
        return count


_pieces: dict[str, bytes] = {}


def _piece(kind: str) -> bytes:
    if kind not in _pieces:
        if kind in ENDLESS:
            unit = ENDLESS[kind][1]
        elif kind == CRUMBS:
            unit = REQUESTS["401"]
        else:
            unit = {**REQUESTS, **LAST_REQUESTS}[kind]
        _pieces[kind] = unit * max(1, PIECE // len(unit))
    return _pieces[kind]


def main(port: int, seconds: float, reads: bool, kinds: list[str]) -> None:
    sent, received, ends = Counter[str](), Counter[str](), Counter[str]()
    selector = selectors.DefaultSelector()
    events = selectors.EVENT_WRITE | (selectors.EVENT_READ if reads else 0)
    for kind in kinds:
        attacker = Attacker(port, kind)
        selector.register(attacker.socket, events, attacker)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for key, ready in selector.select(0.1):
            attacker = key.data
            try:
                if ready & selectors.EVENT_READ:
                    got = len(attacker.socket.recv(1 << 16))
                    received[attacker.kind] += got
                    if not got:
                        raise ConnectionError
                if ready & selectors.EVENT_WRITE:
                    sent[attacker.kind] += attacker.send()
            except BlockingIOError:
                pass
            except OSError:
                ends[attacker.kind] += 1
                selector.unregister(attacker.socket)
                attacker.socket.close()
                attacker.connect()
                selector.register(attacker.socket, events, attacker)
    print(json.dumps({kind: [sent[kind], received[kind], ends[kind]] for kind in dict.fromkeys(kinds)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "reads", sys.argv[4:])
