"""`llama-router requests` and `load`, against one router whose engine never answers."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import httpx2 as httpx
import pytest
from conftest import Router, Start, eventually, fake, models, run
from terminal import following

KEYS = {"api_keys": ["full"], "clients": {"app": {"key": "app"}}}


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    engine = fake(tmp_path_factory.mktemp("silent"), answer_sec="1000")
    system = {"llama_server_path": engine, "max_concurrent_models": 1}
    return start_shared({"api": KEYS, "system": system, "models": models(tiny, "busy", "cold", flags=[])})


@pytest.fixture
def waiting(router: Router) -> Iterator[None]:
    """One request is being answered, and two others wait; they are gone after the test."""

    def ask(model: str, request_id: str, key: str) -> None:
        headers = {"authorization": f"Bearer {key}", "x-request-id": request_id}
        with contextlib.suppress(httpx.TransportError):
            router.chat(model, headers=headers)

    clients = [("busy", "first-asked", "app"), ("busy", "second", "full"), ("cold", "for-cold", "app")]
    threads = [threading.Thread(target=ask, args=client, daemon=True) for client in clients]
    for count, thread in enumerate(threads, 1):
        thread.start()
        eventually(lambda: len(live(router)) == count)  # noqa: B023
        eventually(lambda: live(router)["first-asked"] == "granted")
    yield
    for request_id in live(router):
        router.http.delete(f"/v1/requests/{request_id}", headers={"authorization": "Bearer full"})
    for thread in threads:
        thread.join(10)


def live(router: Router) -> dict[str, str]:
    """The states of the requests that have not ended, by id."""
    answer = router.http.get("/v1/requests?state=live", headers={"authorization": "Bearer full"})
    return {request["id"]: request["state"] for request in answer.json()["requests"]}


def requests(router: Router, folder: Path, *arguments: str, key: str = "full") -> CompletedProcess[str]:
    return run("requests", *arguments, cwd=folder, LLAMA_ROUTER_URL=router.url, LLAMA_ROUTER_API_KEY=key)


@pytest.mark.usefixtures("waiting")
def test_live_requests_say_why_they_wait_and_are_cancelled(router: Router, tmp_path: Path) -> None:
    head, *lines = requests(router, tmp_path, "--live").stdout.splitlines()
    assert head.split()[:5] == ["REQUEST", "STATE", "MODEL", "CLIENT", "PRIORITY"]
    rows = {line.split()[0]: line.split(maxsplit=12) for line in lines}
    assert list(rows) == ["for-cold", "second", "first-asked"]
    assert rows["first-asked"][1:5] == ["granted", "busy", "app", "normal"]
    assert rows["second"][1:5] == ["queued", "busy", "-", "normal"]
    assert rows["second"][12].startswith("position ")
    assert "busy" in rows["for-cold"][12]
    of_cold = requests(router, tmp_path, "--live", "--model", "cold").stdout.splitlines()
    assert [line.split()[0] for line in of_cold] == ["REQUEST", "for-cold"]

    own = json.loads(requests(router, tmp_path, "--live", "--json", key="app").stdout)
    assert [request["id"] for request in own["requests"]] == ["for-cold", "first-asked"]
    others = requests(router, tmp_path, "cancel", "second", key="app")
    assert (others.returncode, "There is no request 'second'" in others.stderr) == (1, True)

    cancelled = requests(
        router, tmp_path, "cancel", "first", "--url", router.url, "second", "third"
    )  # the first by its beginning
    assert (cancelled.returncode, cancelled.stdout) == (1, "first-asked was cancelled\nsecond was cancelled\n")
    assert cancelled.stderr.startswith("llama-router: third: There is no request 'third'")
    again = requests(router, tmp_path, "cancel", "second")
    assert (again.returncode, again.stderr) == (1, "llama-router: second: The request has ended already.\n")
    shown = requests(router, tmp_path, "second").stdout
    assert "cancelled (499)" in shown
    assert "queued: for busy, normal priority" in shown
    assert json.loads(requests(router, tmp_path, "second", "--json").stdout)["outcome"] == "cancelled"


@pytest.mark.usefixtures("waiting")
def test_a_load_says_what_it_waits_for_and_goes_on_without_its_command(router: Router, tmp_path: Path) -> None:
    arguments = ("load", "cold", "--url", router.url)
    with following(tmp_path, *arguments, LLAMA_ROUTER_API_KEY="full") as (process, _):
        assert process.stderr is not None
        told = process.stderr.readline()
        assert told.startswith("cold waits: ")
        assert "busy" in told
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read().endswith("the load goes on: `llama-router unload cold` cancels it\n")
    environ = {"LLAMA_ROUTER_URL": router.url, "LLAMA_ROUTER_API_KEY": "full"}
    unloaded = run("unload", "cold", cwd=tmp_path, **environ)
    assert unloaded.stdout == "cold is not to be loaded any more\n"


def test_requests_are_printed_as_they_end(router: Router, tmp_path: Path) -> None:
    key = {"authorization": "Bearer full"}
    router.chat("nobody", headers={**key, "x-request-id": "before"})
    at = ("--url", router.url)
    arguments = ("requests", "-f", "-n", "1", "--json", *at)
    with following(tmp_path, *arguments, LLAMA_ROUTER_API_KEY="full") as (_, lines):
        eventually(lambda: len(lines) == 1)
        router.chat("nobody", headers={**key, "x-request-id": "after"})
        eventually(lambda: len(lines) == 2)
    assert [json.loads(line)["id"] for line in lines] == ["before", "after"]


def test_that_there_are_none_is_said(router: Router, tmp_path: Path) -> None:
    none = requests(router, tmp_path, "--client", "nobody")
    assert (none.returncode, none.stdout) == (0, "")
    assert none.stderr == "No requests of these.\n"
    assert requests(router, tmp_path, "cancel").returncode == 2
