"""Many of everything: models, requests that wait, subscribers. Memory and answering times must stay bounded."""

from __future__ import annotations

import json
import re
import resource
import select
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import Router, Start, eventually, fake, models
from storm import LONG, scale

WAITING = scale(2000, 10_000)
GUESTS = scale(600, 10_000)
SUBSCRIBERS = scale(200, 1000)


def memory_mib(router: Router) -> float:
    return float(psutil.Process(router.process.pid).memory_info().rss) / 2**20


def cpu_sec(router: Router) -> float:
    times = psutil.Process(router.process.pid).cpu_times()
    return float(times.user + times.system)


@contextmanager
def many_connections(router: Router, count: int, request: bytes) -> Iterator[list[socket.socket]]:
    with ExitStack() as open_ones:
        clients = []
        for _ in range(count):
            client = open_ones.enter_context(socket.create_connection(router.address, timeout=30))
            client.sendall(request)
            clients.append(client)
        yield clients


@pytest.fixture(autouse=True)
def descriptors() -> None:
    """Raise the limit of open files for the clients here, and for the router, which inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(WAITING, SUBSCRIBERS) + scale(1000, 6000)
    if soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            pytest.skip(f"needs {needed} file descriptors, and {hard} are allowed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def test_two_hundred_models(start: Start, tiny: Path, tmp_path: Path) -> None:
    one = start({"models": models(tiny, "a")})
    memory_of_one = memory_mib(one)
    entries = {}
    for number in range(200):
        path = Path(shutil.copy(tiny, tmp_path / f"model-{number}.gguf"))
        entries |= models(path, f"family/model-{number}:q4")
    router = start({"models": entries})
    assert cpu_sec(router) - cpu_sec(one) < 2
    for path in ("/v1/models", "/v1/models/status", "/v1/queue/stats", "/metrics"):
        before = cpu_sec(router)
        answer = router.http.get(path)
        assert answer.status_code == 200
        assert cpu_sec(router) - before < 1, path
        assert "model-199" in answer.text or path == "/metrics"
    assert router.chat("family/model-150:q4").status_code == 200
    assert router.chat("family/model-1500").status_code == 404
    assert memory_mib(router) - memory_of_one < 40


@pytest.mark.timeout(900 if LONG else 120)
@pytest.mark.parametrize("streams", [False, True], ids=["plain", "streams"])
def test_thousands_wait_for_a_model_that_does_not_come(
    start: Start, tiny: Path, tmp_path: Path, streams: bool
) -> None:
    system = {"llama_server_path": fake(tmp_path, ready="never"), "max_queue_size_per_model": WAITING}
    beat_sec = scale(2, 10)
    api = {"heartbeat_sec": beat_sec, "max_connections": WAITING + 100}
    router = start({"api": api, "system": system, "models": models(tiny, "a", "b")})
    before = memory_mib(router), psutil.Process(router.process.pid).num_fds()
    body = json.dumps({"model": "a", "messages": [], "stream": streams, "x": "y" * 1000}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    with many_connections(router, WAITING, head + body) as clients:
        eventually(lambda: router.queued == WAITING, timeout_sec=60)
        if streams:
            for client in clients:
                assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
            busy, began = cpu_sec(router), time.monotonic()
            while time.monotonic() - began < 2 * beat_sec:
                assert b": position " in clients[0].recv(4096)
            assert (cpu_sec(router) - busy) / (time.monotonic() - began) < 0.4  # time is left for everybody else
        assert router.chat("a").status_code == 429
        assert router.http.get("/live", timeout=5).status_code == 200
        assert (memory_mib(router) - before[0]) / WAITING < 0.04  # 40 KiB each
    eventually(lambda: router.queued == 0, timeout_sec=30)
    eventually(lambda: psutil.Process(router.process.pid).num_fds() <= before[1] + 5, timeout_sec=30)


CHAT = b'{"model": "a", "messages": []}'
WAITS = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (
    len(CHAT),
    CHAT,
)


def test_a_full_house_keeps_a_door_for_its_keeper(start: Start, tiny: Path, tmp_path: Path) -> None:
    most, spare = scale(50, 10_000), 32
    system = {"llama_server_path": fake(tmp_path, ready="never"), "max_queue_size_per_model": most}
    router = start({"api": {"max_connections": most}, "system": system, "models": models(tiny, "a")})
    router.keep_no_connection(timeout=10)
    before = psutil.Process(router.process.pid).num_fds()
    with many_connections(router, most, WAITS) as guests:
        eventually(lambda: router.queued == most)
        refused = router.chat("a")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert refused.headers["retry-after"]
        for stream in ("/v1/models/status/stream", "/models/sse", "/api/events", "/logs/stream/a"):
            assert router.http.get(stream).status_code == 503, stream  # it would stay
        assert router.http.get("/health").status_code == 200
        assert router.http.get("/metrics").status_code == 200
        before_flood = memory_mib(router)
        with many_connections(router, 1, b"GET / HTTP/1.1\r\nx: ") as (flood,), suppress(OSError):
            for _ in range(64):
                flood.sendall(b"x" * (1 << 20))
        assert memory_mib(router) - before_flood < 16
        with many_connections(router, spare, b"GET"):  # who only dawdles there gives way, too
            assert router.http.get("/health").status_code == 200
            with many_connections(router, scale(500, 5000), b""):
                eventually(lambda: router.http.get("/health").status_code == 200)
                assert psutil.Process(router.process.pid).num_fds() - before < most + spare + 300
        eventually(lambda: router.http.get("/v1/queue/stats").status_code == 200)
        assert router.queued == most  # all who were here before, and have asked, still wait for their answers
        guests[0].close()
        eventually(lambda: router.queued == most - 1)
        assert router.http.get("/v1/models/nonsense").status_code == 404
    eventually(lambda: psutil.Process(router.process.pid).num_fds() <= before + 2, timeout_sec=30)
    assert router.log.count("are connected (api.max_connections); further connections are refused") == 1
    assert "Traceback" not in router.log


def whole_page(client: socket.socket) -> bool:
    received = b""
    while not received.endswith(b'{"status":"ok"}'):
        received += client.recv(4096)
    return received.startswith(b"HTTP/1.1 200 ")


def test_who_is_idle_gives_way_to_who_comes(start: Start, tiny: Path) -> None:
    """So do clients that have sent half a request; clients that wait for an answer, or are getting one, stay."""
    router = start({"api": {"max_connections": 20}, "models": models(tiny, "a")})
    router.keep_no_connection(timeout=10)
    page = b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n"
    follow = page.replace(b"/live", b"/v1/models/status/stream")
    with ExitStack() as stack:
        followers = stack.enter_context(many_connections(router, 10, follow))
        beginners = stack.enter_context(many_connections(router, 4, b"GET"))
        assert router.http.get("/live").status_code == 200  # they have come by now, and are idle for the longest
        half = stack.enter_context(many_connections(router, 3, WAITS[:-5]))
        idle = stack.enter_context(many_connections(router, 3, page))
        for client in followers:
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        for client in idle:
            assert whole_page(client)
        beginners[0].sendall(b" ")  # not idle since
        eventually(lambda: router.chat("a").status_code == 200)
        for _ in range(5):
            assert router.chat("a").status_code == 200  # each leaves its place to the next
        (gone,) = answered([*beginners, *half, *idle])
        assert gone in beginners[1:]
        assert b"too_many_connections" in gone.recv(4096)
        with many_connections(router, 9, b"GET") as others:
            eventually(lambda: len(answered(half)) == 3)
            assert all(b"too_many_connections" in client.recv(4096) for client in half)
            eventually(lambda: len(answered(idle)) >= 2)
            for client in others:
                client.sendall(page[3:])
                assert whole_page(client)
            assert router.chat("a").status_code == 200
        for client in followers:
            client.setblocking(False)
            with suppress(BlockingIOError):
                assert client.recv(65536)
    counted = router.http.get("/metrics").text
    refused = dict(re.findall(r'router_clients_refused_total{reason="(\w+)"} ([\d.]+)', counted))
    assert float(refused["too_many_connections"]) >= 4
    assert float(refused["gave_way"]) >= 2
    assert "Traceback" not in router.log


@pytest.mark.timeout(900 if LONG else 120)
def test_a_house_full_of_idle_clients_costs_little_and_lets_in_who_comes(start: Start, tiny: Path) -> None:
    """Half of the clients keep their connection after an answer, the others have sent half a request."""
    router = start({"api": {"max_connections": GUESTS}, "models": models(tiny, "a")})
    router.keep_no_connection(timeout=10)
    router.chat("a")
    empty_mib, alone_sec = memory_mib(router), cpu_of_requests(router, 100)
    page = b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n"
    before_sec = cpu_sec(router)
    with (
        many_connections(router, GUESTS // 2, page) as idle,
        many_connections(router, GUESTS // 2, WAITS[:-5]),
    ):
        assert all(whole_page(client) for client in idle)
        assert router.http.get("/live").status_code == 200
        came_sec, full_mib = cpu_sec(router) - before_sec, memory_mib(router)
        before_sec, began = cpu_sec(router), time.monotonic()
        time.sleep(scale(1, 10))
        at_rest = (cpu_sec(router) - before_sec) / (time.monotonic() - began)
        assert psutil.Process(router.process.pid).num_fds() >= GUESTS, "they are all still here"
        crowded_sec = cpu_of_requests(router, 100)
        before_sec = cpu_sec(router)
        with many_connections(router, GUESTS // 2, WAITS[:-5]):
            for path in ("/live", "/metrics", "/v1/queue/stats", "/v1/models/status"):
                assert router.http.get(path).status_code == 200
            assert router.chat("a").status_code == 200
        others_sec = cpu_sec(router) - before_sec
    each_kib = (full_mib - empty_mib) * 1024 / GUESTS
    figures = (
        f"{GUESTS} connections: {each_kib:.1f} KiB and {came_sec * 1e6 / GUESTS:.0f} µs each; at rest "
        f"{at_rest:.1%} of a processor; 100 chats {crowded_sec:.2f} s of its time, {alone_sec:.2f} alone; "
        f"{GUESTS // 2} more {others_sec:.2f} s"
    )
    print(figures)
    assert each_kib < 40, figures
    assert at_rest < 0.2, figures
    assert crowded_sec < 2 * alone_sec + 0.1, figures
    assert "Traceback" not in router.log


def test_all_bodies_together_have_a_bound(start: Start, tiny: Path, tmp_path: Path) -> None:
    """Many large uploads that stop just before their end."""
    api = {"max_body_mb": 8, "max_bodies_mb": 32}
    router = start({"api": api, "system": {"llama_server_path": fake(tmp_path)}, "models": models(tiny, "a")})
    assert router.chat("a").status_code == 200
    before = memory_mib(router)
    size = 7 << 20
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % size
    with many_connections(router, 16, head) as clients:
        for client in clients:
            with suppress(OSError):  # it may hang up while we are still sending
                client.sendall(b"x" * (size - 1))
        eventually(lambda: len(answered(clients)) == 12)
        for client in answered(clients):
            answer = client.recv(4096)
            assert b"503" in answer
            assert b"too_many_bodies" in answer
        assert memory_mib(router) - before < 64
        assert router.chat("a").status_code == 200  # a small one finds room
        assert not answered(clients)  # the other four wait still
        assert router.chat("a", content="x" * (5 << 20)).status_code == 503
    eventually(lambda: router.chat("a", content="x" * (5 << 20)).status_code == 200)


def answered(clients: list[socket.socket]) -> list[socket.socket]:
    """Return the clients that have received something."""
    return select.select(clients, [], [], 0)[0]


@pytest.mark.timeout(900 if LONG else 120)
def test_subscribers_that_do_not_read_cost_the_others_nothing(start: Start, tiny: Path, tmp_path: Path) -> None:
    system = {"llama_server_path": fake(tmp_path), "preload_models": ["a"]}
    router = start({"system": system, "models": models(tiny, "a", "b")})
    router.chat("a")
    before = memory_mib(router), psutil.Process(router.process.pid).num_fds()
    alone = cpu_of_requests(router)
    subscribe = b"GET /v1/models/status/stream HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with many_connections(router, SUBSCRIBERS, subscribe) as clients:
        for client in clients:
            received = b""
            while b"full_status" not in received:
                received += client.recv(65536)
        crowded = cpu_of_requests(router)
        for _ in range(scale(8, 200)):  # news for everybody, read by nobody
            router.http.post("/v1/models/eject", json={"model": "a"})
            assert router.chat("a").status_code == 200
        assert (memory_mib(router) - before[0]) / SUBSCRIBERS < 0.2
    assert crowded < 2 * alone + 0.1  # who asks for a chat is no news to them
    eventually(lambda: psutil.Process(router.process.pid).num_fds() <= before[1] + 2, timeout_sec=30)


def cpu_of_requests(router: Router, count: int = 300) -> float:
    """Seconds of the router's time."""
    before = cpu_sec(router)
    for _ in range(count):
        assert router.chat("a").status_code == 200
    return cpu_sec(router) - before
