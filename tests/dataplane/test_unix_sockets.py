"""Requests reach an engine over a Unix socket where it can listen on one, and over its port where it cannot."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import psutil
import pytest
from conftest import Start, eventually, models

from router.engines.base import Endpoint
from router.engines.launcher import LocalLauncher
from router.engines.llamacpp import embedded
from router.engines.llamacpp.backend import LlamaCpp
from router.engines.llamacpp.binary import Binary
from router.engines.llamacpp.server import LlamaServer
from router.engines.llamacpp.sizing import EngineKind
from router.engines.log_ring import LogRing
from router.engines.orphans import EngineRecord
from router.engines.process import EngineOrder
from router.engines.upstream import Connection, EnginePool, Head
from router.memory.measurements import Learned
from router.scheduling.messages import Retry
from router.system.state import State


def connections(engine: psutil.Process, path: Path) -> tuple[int, int]:
    """That an engine has accepted: over the socket, over its port."""
    over_socket = [one for one in engine.net_connections("unix") if one.laddr == str(path)]
    over_port = [one for one in engine.net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED]
    return len(over_socket) - 1, len(over_port)  # one of them listens


def test_requests_go_over_the_socket_and_survive_its_loss(start: Start, tiny: Path, tmp_path: Path) -> None:
    state = tmp_path / "state-0"
    router = start({"models": models(tiny, "a")})
    assert router.chat("a", max_tokens=1).status_code == 200
    (engine,) = router.engines
    (path,) = state.glob("*.sock")
    eventually(lambda: connections(engine, path) == (1, 0))  # the last question whether it is ready is closed
    path.unlink()
    assert router.chat("a", max_tokens=5, stream=True).status_code == 200  # after which the engine closes it
    eventually(lambda: connections(engine, path) == (0, 0))
    assert router.chat("a", max_tokens=1).status_code == 200
    assert connections(engine, path) == (0, 1)
    engine.kill()
    engine.wait(10)
    assert router.chat("a", max_tokens=1).status_code == 200
    assert len(list(state.glob("*.sock"))) == 1
    router.stop()
    assert list(state.glob("*.sock")) == []


def test_engines_start_without_the_folder_of_their_sockets(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"models": models(tiny, "a")})
    (tmp_path / "state-0").rename(tmp_path / "elsewhere")
    assert router.chat("a", max_tokens=1).status_code == 200
    (engine,) = router.engines
    assert "--host 127.0.0.1 " in " ".join(engine.cmdline())


def test_what_a_killed_router_has_left_is_replaced(start: Start, tiny: Path, tmp_path: Path) -> None:
    state = str(tmp_path / "state-0")
    config = {"models": models(tiny, "a")}
    first = start(config, LLAMA_ROUTER_STATE_DIR=state)
    first.chat("a", max_tokens=1)
    (engine,) = first.engines
    (path,) = Path(state).glob("*.sock")
    first.process.kill()
    first.process.wait()
    engine.wait(10)
    assert path.is_socket()
    (Path(state) / "1.sock").write_text("not a socket, but in our place")
    second = start(config, LLAMA_ROUTER_STATE_DIR=state, LLAMA_ROUTER__SYSTEM__BASE_PORT=path.stem)
    assert second.chat("a", max_tokens=1).status_code == 200
    (engine,) = second.engines
    eventually(lambda: connections(engine, path) == (1, 0))
    assert list(Path(state).glob("*.sock")) == [path]


def test_a_dead_engine_takes_nobodys_socket_away(tmp_path: Path, free_port: int) -> None:
    apart = tmp_path / "apart"
    holds_output = f"setsid sh -c 'touch {apart}; exec sleep 1' & until [ -e {apart} ]; do sleep 0.01; done"

    async def start_another_before_its_end() -> tuple[int, int]:
        launcher = LocalLauncher(free_port, EngineRecord(State()), tmp_path)
        backend = LlamaCpp(Binary(("sh",), "embedded", ""), launcher, Learned())
        first = await backend.start(EngineOrder("a", ("sh", "-c", holds_output)), LogRing(10))
        await asyncio.to_thread(eventually, lambda: not first.alive)
        second = await backend.start(EngineOrder("b", ("true",)), LogRing(10))
        await asyncio.gather(first.exited, second.exited)
        return first.endpoint.port, second.endpoint.port

    first, second = asyncio.run(start_another_before_its_end())
    assert first != second


class Outcome:
    """Of a request to an engine."""

    def __init__(self) -> None:
        self.told: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connected(self, connection: Connection) -> None:
        pass

    def received(self, head: Head, part: bytes, last: bool) -> None:
        self.told.set_result(f"answered {head.status}")

    def lost(self, reason: str) -> None:
        self.told.set_result(reason)


@pytest.mark.parametrize(
    ("lives", "status", "outcome", "asked"),
    [
        ([False], 200, "the engine is stopped", 0),
        ([True, False], 200, "refused", 0),
        ([True, True], 200, "answered 200", 1),
        ([True, True], 401, "somebody else's", 1),
    ],
    ids=["dead", "dying", "only its socket is dead", "not seen to be dead"],
)
def test_a_stranger_on_a_dead_engines_port_answers_nobody(
    tmp_path: Path, lives: list[bool], status: int, outcome: str, asked: int
) -> None:
    path = tmp_path / "8085.sock"
    with socket.socket(socket.AF_UNIX) as left:  # as by kill -9: a file to which nobody listens
        left.bind(str(path))
    looks = iter(lives)

    async def ask() -> tuple[str, int]:
        heard: list[bytes] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 %d Whatever\r\ncontent-length: 2\r\n\r\n{}" % status)

        stranger = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = stranger.sockets[0].getsockname()[1]
        endpoint = Endpoint(port, unix_socket=path, headers=(("Authorization", "Bearer key"),), knows_key=True)
        pool = EnginePool(endpoint, 1, lambda: next(looks))
        told = Outcome()
        pool.ask(b"POST", b"/v1/chat/completions", b"", b"{}", told)
        reason = await told.told
        pool.close_idle()
        stranger.close()
        return reason, len(heard)

    reason, heard = asyncio.run(ask())
    assert outcome in reason
    assert heard == asked


def test_a_port_that_another_program_takes_first_costs_no_pause(tiny: Path) -> None:
    async def lose(port: int) -> tuple[Retry, str]:
        order = EngineOrder("a", (*embedded.command(), "-m", str(tiny)))
        engine = LlamaServer.start(order, port, LogRing(100), None)
        reason = await engine.exited
        return engine.ending.retry, reason.full

    with socket.create_server(("127.0.0.1", 0)) as other:
        retry, reason = asyncio.run(lose(other.getsockname()[1]))
    assert retry is Retry.AT_ONCE
    assert "couldn't bind" in reason


@pytest.mark.parametrize("name", ["long" * 25, "a,b"], ids=["too long", "a comma"])
def test_a_state_directory_whose_name_does_not_do_is_no_obstacle(
    start: Start, tiny: Path, tmp_path: Path, name: str
) -> None:
    state = tmp_path / name
    router = start({"models": models(tiny, "a")}, LLAMA_ROUTER_STATE_DIR=str(state))
    assert router.chat("a", max_tokens=1).status_code == 200
    (engine,) = router.engines
    eventually(lambda: connections(engine, state) == (-1, 1))


@pytest.mark.parametrize(
    ("said", "takes"),
    [
        (
            "--host HOST      IP addresses to listen on, comma-separated, or UNIX socket paths\n"
            "                 ending in .sock; with multiple TCP addresses, :: binds IPv6 only;\n",
            True,
        ),
        (
            "--host HOST      ip address to listen, or bind to an UNIX socket if the address ends with .sock\n",
            False,
        ),
        ("", False),
    ],
    ids=["a list", "one", "no help"],
)
def test_builds_that_listen_on_one_address_only_get_one(tmp_path: Path, said: str, takes: bool) -> None:
    engine = tmp_path / "llama-server"
    engine.write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\n")
    engine.chmod(0o755)
    assert EngineKind(Binary((str(engine),), "llama-server", "here")).takes_unix_sockets is takes
