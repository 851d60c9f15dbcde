"""Requests reach an engine over a Unix socket where it can listen on one, and over its port where it cannot."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
from conftest import Start, eventually, models

from router.engine import Binary, EngineOrder, LogRing
from router.launcher import LocalLauncher
from router.leftovers import EngineRecord
from router.sizing import EngineKind
from router.state import State


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
        kind = EngineKind(Binary(("sh",), "embedded", ""))
        launcher = LocalLauncher(free_port, EngineRecord(State()), kind, tmp_path)
        first = await launcher.launch(EngineOrder("a", ("sh", "-c", holds_output)), LogRing(10))
        await asyncio.to_thread(eventually, lambda: not first.alive)
        second = await launcher.launch(EngineOrder("b", ("true",)), LogRing(10))
        await asyncio.gather(first.exited, second.exited)
        return first.port, second.port

    first, second = asyncio.run(start_another_before_its_end())
    assert first != second


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
