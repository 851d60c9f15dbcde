"""Why is my request waiting? The answer, in every situation, with figures that move as time does."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conftest import Router, Start, eventually, fake, models
from gpus import GPU0
from test_scheduler import LOW, NORMAL, Machine

from router.scheduling.messages import Eject, EngineExited, EngineLost, ModelSpec
from router.scheduling.policy import Policy
from router.scheduling.wait_reason import why


def reason(machine: Machine, alias: str) -> str:
    return why(machine.scheduler.models[alias], machine.now)


def test_while_it_loads_it_says_how_far_that_is() -> None:
    machine = Machine("a", load_sec=8.0)
    first = machine.ask("a")
    assert reason(machine, "a") == "a is loading (0.0 of perhaps 5.0 s)"
    machine.wait(9)
    machine.finish(first)
    machine.tell(Eject(machine.now, "a"))  # and wanted again: now it is known how long it takes
    machine.ask("a")
    machine.wait(4)
    assert reason(machine, "a") == "a is loading (4.0 of ~8.0 s)"


def test_while_another_has_its_turn_it_says_when_that_ends() -> None:
    machine = Machine("a", "b")
    machine.served("a")
    machine.ask("b", NORMAL)
    first = reason(machine, "b")
    assert first.startswith("no room until a can be unloaded: needs ")
    assert "free; a's quantum ends in 52 s" in first
    machine.wait(10)
    assert reason(machine, "b").endswith("a's quantum ends in 42 s")


TINY = ({GPU0: 1},)


def test_where_a_place_is_lacking_memory_is_not_blamed() -> None:
    machine = Machine("a", "b", places={"a": TINY, "b": TINY}, policy=Policy(max_concurrent_models=1))
    machine.served("a")
    machine.ask("b")
    no_room = "no room until a can be unloaded: max_concurrent_models is 1"
    assert reason(machine, "b") == f"{no_room}; a's quantum ends in 52 s"


def test_where_ports_are_lacking_they_are_blamed() -> None:
    machine = Machine("a", "b", places={"a": TINY, "b": TINY}, policy=Policy(ports=1))
    machine.served("a")
    machine.ask("b")
    no_room = "no room until a can be unloaded: base_port leaves 1 port for engines"
    assert reason(machine, "b").startswith(f"{no_room}; a's")


def test_where_two_limits_hold_both_are_named() -> None:
    machine = Machine("a", "b", policy=Policy(max_concurrent_models=1))
    machine.served("a")
    machine.ask("b")
    limit = "no room until a can be unloaded: max_concurrent_models is 1"
    both = f"{limit}; needs 6 MiB (its file), 4 MiB on gpu0 free; "
    assert reason(machine, "b").startswith(both)


def test_who_is_pinned_on_what_is_lacking_is_named() -> None:
    five = dict.fromkeys("pab", ({GPU0: 5},))
    machine = Machine(ModelSpec("p", pinned=True), *"ab", places=five)
    machine.served("p")
    machine.served("a")
    machine.ask("b")
    assert "0 MiB on gpu0 free; p (pinned) cannot be unloaded; a's quantum ends in" in reason(machine, "b")


def test_behind_others_that_wait_for_the_same_room_it_names_them() -> None:
    machine = Machine("a", "b", "c", stop_sec=None)
    machine.served("a")
    machine.ask("b")
    machine.wait(100)
    machine.ask("c")
    assert reason(machine, "b") == "waiting to be loaded in place of a"
    assert reason(machine, "c").startswith("no room until b has been served: needs 6 MiB (its file), ")


def test_behind_a_file_that_is_looked_at_first_it_says_so() -> None:
    machine = Machine("a", "b")
    machine.blind.add("a")
    machine.ask("a")
    machine.ask("b")
    assert reason(machine, "b") == "the file of a, which comes first, is being inspected"


def test_before_memory_is_known_it_says_so() -> None:
    machine = Machine("a", budgets=None)
    machine.ask("a")
    assert reason(machine, "a") == "the available memory is not known yet"


def test_patient_requests_wait_for_their_own_bound() -> None:
    machine = Machine("a", "b")
    machine.served("a")
    machine.wait(60)
    machine.ask("b", LOW)
    assert "; a can be drained in " in reason(machine, "b")


def test_while_others_leave_it_names_them() -> None:
    machine = Machine("a", "b", stop_sec=None)
    machine.served("a")
    machine.ask("b", NORMAL)
    machine.wait(100)
    assert reason(machine, "b") == "waiting to be loaded in place of a"
    machine.ask("a")
    assert reason(machine, "a") == "a will be restarted once its requests in flight (1) are done"


def test_with_all_slots_taken_there_is_nothing_else_to_wait_for() -> None:
    machine = Machine("a")
    machine.served("a")
    machine.ask("a")
    assert reason(machine, "a") == "the only slot of a is in use"


def test_after_a_failure_it_says_what_failed_and_when_it_is_tried_again() -> None:
    machine = Machine("a", load_sec=None, policy=Policy(backoff_sec=4))
    machine.ask("a")
    machine.tell(EngineLost(machine.now, 1))
    assert reason(machine, "a") == "the engine of a has exited and restarts once its memory is released"
    machine.tell(EngineExited(machine.now, 1, "no such file"))
    text = reason(machine, "a")
    assert "'a' did not load: no such file" in text
    assert "(next try in " in text


def ask(router: Router, request_id: str, priority: str = "normal") -> socket.socket:
    """Ask for a, and leave the answer for later."""
    body = b'{"model": "a", "messages": []}'
    client = socket.create_connection(router.address)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-request-id: {request_id}\r\n"
    client.sendall(f"{head}x-request-priority: {priority}\r\ncontent-length: {len(body)}\r\n\r\n".encode())
    client.sendall(body)
    return client


def waiting(router: Router) -> list[Mapping[str, Any]]:
    queue: list[Mapping[str, Any]] = router.http.get("/v1/queue/stats").json()["per_model"]["a"]["waiting"]
    return queue


def test_everybody_who_waits_can_be_seen(start: Start, tiny: Path, tmp_path: Path) -> None:
    system = {"llama_server_path": fake(tmp_path, ready="never"), "queue_timeout_sec": 60}
    router = start({"system": system, "models": models(tiny, "a")})
    clients = [ask(router, "one", "low"), ask(router, "two", "high")]
    eventually(lambda: len(waiting(router)) == 2 and "loading" in waiting(router)[0]["why"])
    first, second = waiting(router)
    assert (first["id"], first["priority"], first["position"]) == ("two", "high", 1)
    assert (second["id"], second["priority"], second["position"]) == ("one", "low", 2)
    assert first["why"].startswith("a is loading (")
    assert second["why"].startswith("1 before it; a is loading (")
    assert second["waited_sec"] >= 0
    assert first["expected_wait_sec"] is None, "it was never loaded"
    for client in clients:
        client.close()


def test_a_restarted_router_knows_how_long_a_load_takes(start: Start, tiny: Path, tmp_path: Path) -> None:
    footprints = tmp_path / "state" / "footprints.json"
    system = {"llama_server_path": fake(tmp_path, load_sec="2")}
    config = {"system": system, "models": models(tiny, "a", footprint_mb=100)}
    router = start(config, LLAMA_ROUTER_STATE_DIR=str(footprints.parent))
    assert router.status("a")["load_sec"] is None
    assert router.chat("a").status_code == 200
    eventually(footprints.exists)
    assert router.stop() == 0
    router = start(config, LLAMA_ROUTER_STATE_DIR=str(footprints.parent))
    with ask(router, "one"):
        eventually(lambda: any(request["expected_wait_sec"] for request in waiting(router)))
        (told,) = waiting(router)
    took_sec = router.status("a")["load_sec"]
    assert took_sec > 2
    assert f" of ~{took_sec:.1f} s)" in told["why"]
    assert took_sec - 1 < told["waited_sec"] + told["expected_wait_sec"] < took_sec + 1
