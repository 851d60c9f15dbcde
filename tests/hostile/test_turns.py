"""Neighbours of clients that send more than their share: whatever they send, others have their turns.

`HOSTILE=long` sends each kind by itself from eight connections, and holds what is promised against what is
measured; without it all kinds are sent at once, for a moment, and bounds are wide, as for two busy cores.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from attack import KINDS
from conftest import Router, Start, models

LONG = os.environ.get("HOSTILE") == "long"
KEY = {"authorization": "Bearer full"}


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    api = {"api_keys": ["full"]}
    router = start_shared(
        {"api": api, "models": models(tiny, "a", flags=["-c", "4096", "-np", "2", "-t", "1", "--ignore-eos"])}
    )
    assert router.chat("a", headers=KEY).status_code == 200
    return router


@dataclass
class Neighbours:
    """Who measures what others feel of it: somebody who asks `/live`, and the reader of a stream."""

    router: Router
    seconds: float
    live: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    """The router's own time while `/live` waited, which tells the same on a busy machine."""

    def measure(self) -> None:
        self.router.http.get("/live")
        watchers = [threading.Thread(target=watch) for watch in (self._ask, self._read)]
        for watcher in watchers:
            watcher.start()
        for watcher in watchers:
            watcher.join()

    def _ask(self) -> None:
        process = psutil.Process(self.router.process.pid)
        request = b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n"
        until = time.monotonic() + self.seconds
        with connect(self.router) as client:
            while (began := time.monotonic()) < until:
                computed = self._computed_sec()
                client.sendall(request)
                received = client.recv(65536)
                while not received.endswith(b'{"status":"ok"}'):
                    received += client.recv(65536)
                self.live.append(time.monotonic() - began)
                self.held.append(self._computed_sec() - computed)
                self.rss_mib.append(process.memory_info().rss / 2**20)
                time.sleep(0.005)

    def _read(self) -> None:
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            body = json.dumps({"model": "a", "messages": [], "max_tokens": 3000, "stream": True}).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer full\r\n"
            with connect(self.router) as client:
                client.sendall(head + b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body))
                assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
                last = time.monotonic()
                while last < until and client.recv(65536):
                    now = time.monotonic()
                    self.gaps.append(now - last)
                    last = now

    def _computed_sec(self) -> float:
        """By the thread of its event loop."""
        pid = self.router.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9

    def __str__(self) -> str:
        return (
            f"/live p99 {slow(self.live) * 1000:.0f} ms, of which it computed {slow(self.held) * 1000:.0f} ms; "
            f"largest gap {max(self.gaps) * 1000:.0f} ms, RSS +{max(self.rss_mib) - self.rss_mib[0]:.0f} MiB"
        )


def slow(times: list[float]) -> float:
    """Return the 99th percentile."""
    return sorted(times)[int(len(times) * 0.99)]


def connect(router: Router) -> socket.socket:
    return socket.create_connection(router.address, timeout=60)


def attacked(router: Router, kinds: list[str], seconds: float, *, reads: bool) -> tuple[Neighbours, str]:
    """What neighbours feel of it, and what the attackers have to tell."""
    script = Path(__file__).with_name("attack.py")
    port = router.url.rpartition(":")[2]
    arguments = [port, str(seconds + 0.3), "reads" if reads else "ignores", *kinds]
    neighbours = Neighbours(router, seconds)
    with subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True) as attack:
        time.sleep(0.2)
        neighbours.measure()
        told, _ = attack.communicate()
    return neighbours, told


@pytest.mark.parametrize("reads", [True, False], ids=["who read", "who do not read"])
def test_what_floods_of_refused_requests_cost_others(router: Router, reads: bool) -> None:
    before = len(router.output)
    felt, told = attacked(router, list(KINDS), 2.5, reads=reads)
    print(felt, told, sep="\n")
    assert slow(felt.held) < 0.2
    assert max(felt.rss_mib) - felt.rss_mib[0] < 60
    assert len(router.output) - before < 20 * len(KINDS)
    assert "Traceback" not in router.log
    assert router.chat("a", headers=KEY).status_code == 200


@pytest.mark.skipif(not LONG, reason="takes minutes: HOSTILE=long")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reads", [True, False], ids=["reads", "ignores"])
def test_eight_connections_of_a_kind(router: Router, kind: str, reads: bool) -> None:
    before = len(router.output)
    felt, told = attacked(router, [kind] * 8, 4, reads=reads)
    print(f"\n{kind:>24} {'reads' if reads else 'ignores'}: {felt}, {len(router.output) - before} lines; {told}")
    assert slow(felt.live) <= 0.05
    assert max(felt.gaps) <= 0.1
    assert max(felt.rss_mib) - felt.rss_mib[0] <= 20
    assert len(router.output) - before < 100
