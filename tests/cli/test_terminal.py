"""Commands that show a running router in a shell."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2 as httpx
import pytest
from conftest import ROOT, Router, Start, eventually, fake, models, run
from terminal import following

from router.__main__ import main
from router.cli.client import base_url

KEY = "sesame-open"


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *arguments]


def rows(printed: str) -> dict[str, dict[str, str]]:
    """A printed table by the first column; the cells of the last column may be empty, or contain spaces."""
    head, *lines = printed.replace("UNLOADS IN", "UNLOADS").splitlines()
    names = head.split()
    cells = [[*line.split(maxsplit=len(names) - 1), ""] for line in lines]
    return {line[0]: dict(zip(names, line, strict=False)) for line in cells}


def test_what_only_reads_the_configuration_imports_no_engine() -> None:
    loads = "import sys, router.catalog.load; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", loads], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = imported.stdout.split()
    assert "router.engines.registry" in modules
    assert not [name for name in modules if name in ("asyncio", "fastapi") or name.endswith(".backend")]


def test_ps_tells_what_runs_where_and_for_how_long_it_stays(start: Start, tiny: Path, tmp_path: Path) -> None:
    entries = {
        **models(tiny, "idle", "never-used"),
        **models(tiny, "own-timeout", idle_timeout_sec=7200),
        **models(tiny, "pin", pinned=True),
    }
    system = {"max_concurrent_models": 4, "keep_warm_models": 0, "idle_timeout_sec": 600}
    router = start({"system": system, "models": entries})
    for alias in ("idle", "own-timeout", "pin"):
        assert router.chat(alias).status_code == 200

    shown = run("ps", "--url", router.url, cwd=tmp_path)
    assert list(rows(shown.stdout)) == ["idle", "own-timeout", "pin"]
    assert shown.stderr == "1 more model is off (--all shows them).\n"
    asked = run("ps", "--all", "--url", router.url, cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert asked.stderr == ""
    table = rows(asked.stdout)
    assert table["idle"]["STATE"] == "ready"
    assert {int(row["PID"]) for row in table.values() if row["PID"] != "-"} == {e.pid for e in router.engines}
    assert table["idle"]["PORT"] == str(router.status("idle")["port"])
    assert table["idle"]["SLOTS"] == "0/1"
    assert table["idle"]["UNLOADS"].startswith(("9m5", "10m00"))
    assert table["own-timeout"]["UNLOADS"].startswith(("1h59", "2h00"))
    assert table["pin"]["UNLOADS"] == "pinned"
    assert table["idle"]["WHY"] == "idle"
    assert [table["never-used"][name] for name in ("STATE", "PID", "MEMORY", "UP")] == ["off", "-", "-", "-"]

    document = json.loads(run("ps", "--json", "--url", router.url, cwd=tmp_path).stdout)
    assert document["models"]["idle"]["status"] == "ready"


def test_the_last_used_models_are_kept_and_ps_says_so(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"system": {"keep_warm_models": 1}, "models": models(tiny, "first", "last")})
    router.chat("first")
    router.chat("last")
    table = rows(run("ps", cwd=tmp_path, LLAMA_ROUTER_URL=router.url).stdout)
    assert table["first"]["UNLOADS"].startswith(("4m5", "5m00"))
    assert table["last"]["UNLOADS"] == "kept"


def test_queue_tells_who_waits_how_long_and_for_what(start: Start, tiny: Path, tmp_path: Path) -> None:
    engine = fake(tmp_path, answer_sec="60")
    system = {"llama_server_path": engine, "max_concurrent_models": 1}
    router = start({"system": system, "models": models(tiny, "busy", "cold", flags=[])})
    assert run("queue", "--url", router.url, cwd=tmp_path).stdout == "No requests waiting; 0 in flight.\n"

    def post(model: str, request_id: str, priority: str) -> None:
        headers = {"X-Request-Id": request_id, "X-Request-Priority": priority}
        with contextlib.suppress(httpx.TransportError):  # the router ends before the answer
            router.chat(model, headers=headers)

    clients = [("busy", "served", "normal"), ("cold", "for-cold", "low"), ("busy", "behind-it", "low")]
    clients.append(("cold", "urgent", "high"))
    for queued, client in enumerate(clients):
        threading.Thread(target=post, args=client, daemon=True).start()
        eventually(lambda: router.queued == queued)  # noqa: B023
        router.until("busy", "ready")

    printed = run("queue", "--url", router.url, cwd=tmp_path).stdout.splitlines()
    assert printed[0].split() == ["MODEL", "PRIORITY", "POSITION", "WAITED", "EXPECTED", "REQUEST", "WHY"]
    urgent, cold, behind = (line.split(maxsplit=6) for line in printed[1:])
    assert [urgent[0], urgent[1], urgent[2], urgent[5]] == ["cold", "high", "1", "urgent"]
    assert [cold[0], cold[1], cold[2], cold[5]] == ["cold", "low", "2", "for-cold"]
    assert [behind[0], behind[1], behind[2], behind[5]] == ["busy", "low", "1", "behind-it"]
    assert cold[3].endswith("s")
    assert cold[4] == "unknown", "it was never loaded"
    assert "busy" in cold[6]

    document = json.loads(run("queue", "--json", "--url", router.url, cwd=tmp_path).stdout)
    assert document["summary"]["total_queued"] == 3


def test_logs_show_the_last_lines_of_an_engine_and_how_many_were_too_many(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    router = start({"system": {"log_ring_lines": 5}, "models": models(tiny, "org/model:q4")})
    router.chat("org/model:q4")
    router.unload()  # so that it has said its last word
    everything = run("logs", "org/model:q4", "--url", router.url, cwd=tmp_path).stdout.splitlines()
    two = run("logs", "org/model:q4", "-n", "2", "--url", router.url, cwd=tmp_path).stdout.splitlines()
    assert len(everything) == 5
    assert two == everything[-2:]
    with following(tmp_path, "logs", "-f", "org/model:q4", "-n", "1", "--url", router.url) as (_, lines):
        eventually(lambda: lines == [f"{everything[-1]}\n"])
        router.chat("org/model:q4")  # says more at once than is kept
        eventually(lambda: any(re.fullmatch(r"… \d+ lines missed\n", line) for line in lines))


def test_logs_can_be_followed_across_engines_and_until_the_router_ends(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    system = {"llama_server_path": fake(tmp_path)}
    router = start({"system": system, "models": models(tiny, "a")})
    router.chat("a")
    with following(tmp_path, "logs", "-f", "a", "--url", router.url) as (process, lines):
        eventually(lambda: lines.count("fake engine: loading\n") == 1)
        router.http.post("/v1/models/eject", json={"model": "a"})
        router.chat("a")
        eventually(lambda: lines.count("fake engine: loading\n") == 2)
        router.stop()
        assert process.wait(10) == 1
        assert process.stderr is not None
        assert process.stderr.read() == f"llama-router: The router at {router.url} has closed the stream.\n"


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    return start_shared({"models": models(tiny, "a")})


def test_ctrl_c_ends_following_without_a_traceback(router: Router, tmp_path: Path) -> None:
    router.chat("a")
    with following(tmp_path, "logs", "-f", "a", "--url", router.url) as (process, lines):
        eventually(lambda: bool(lines))
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize("arguments", [["logs", "-f", "a"], ["ps"]])
def test_a_reader_that_has_seen_enough_ends_it_quietly(
    router: Router, tmp_path: Path, arguments: list[str]
) -> None:
    router.chat("a")
    reading, writing = os.pipe()
    os.close(reading)
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    wanted = command(*arguments, "--url", router.url)
    ended = subprocess.run(wanted, env=clean, stdout=writing, stderr=-1, text=True, timeout=30)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_model_that_is_not_there_is_one_clear_sentence(router: Router, tmp_path: Path) -> None:
    asked = run("logs", "A", "--url", router.url, cwd=tmp_path)
    assert asked.returncode == 1
    assert asked.stderr.count("\n") == 1
    assert "'A'" in asked.stderr
    assert "'a'" in asked.stderr


def test_without_a_url_it_asks_the_configured_router_with_its_key(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    config = {"api": {"host": "0.0.0.0", "port": port, "api_keys": [KEY]}, "models": models(tiny, "a")}
    router = start(config, arguments=["--port", str(port)])
    assert (
        rows(run("ps", "--all", "--config", str(tmp_path / "config.json"), cwd=Path("/")).stdout)["a"]["STATE"]
        == "off"
    )

    loopback = f"http://127.0.0.1:{port}"
    refused = run("ps", "--url", loopback, cwd=tmp_path)  # a key of the configuration goes to no other address
    assert refused.returncode == 1
    assert refused.stderr == (
        f"llama-router: The router at {loopback} requires a valid API key: set LLAMA_ROUTER_API_KEY.\n"
    )
    assert run("ps", "--url", loopback, cwd=tmp_path, LLAMA_ROUTER_API_KEY=KEY).returncode == 0
    assert router.process.poll() is None


@pytest.mark.parametrize("key", ["sesame\n", "сезам"])
def test_a_key_that_no_header_can_hold_is_not_taken_for_a_stranger_at_the_address(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMA_ROUTER_API_KEY", key)
    with pytest.raises(SystemExit):
        main(["ps", "--url", "http://127.0.0.1:9"])
    assert capsys.readouterr().err.startswith("llama-router: LLAMA_ROUTER_API_KEY is not a valid key")


def test_an_inference_key_is_told_that_it_may_not_read_logs(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"api": {"api_keys": [KEY], "inference_keys": ["guest"]}, "models": models(tiny, "a")})
    asked = run("logs", "a", "--url", router.url, cwd=tmp_path, LLAMA_ROUTER_API_KEY="guest")
    assert asked.returncode == 1
    assert "inference only" in asked.stderr
    assert "api.api_keys" in asked.stderr


def test_nobody_there_and_somebody_else_there_are_told_apart(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        url = f"http://127.0.0.1:{port}"

        def answer() -> None:
            connection, _ = holder.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        stranger = run("ps", "--url", url, cwd=tmp_path)
    nobody = run("ps", "--url", url, cwd=tmp_path)
    assert (stranger.returncode, nobody.returncode) == (1, 1)
    assert stranger.stderr == f"llama-router: The server at {url} is not a llama-router.\n"
    assert nobody.stderr == (
        f"llama-router: No router can be reached at {url}: Connection refused. "
        "Start it with `llama-router`, or name another one with --url.\n"
    )


@pytest.mark.parametrize(
    ("written", "understood"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("gpu-box", "http://gpu-box:8000"),
        (":9000", "http://127.0.0.1:9000"),
        ("0.0.0.0:9000/", "http://127.0.0.1:9000"),
        ("::1", "http://[::1]:8000"),
        ("[::1]:80", "http://[::1]:80"),
        ("http://gpu-box", "http://gpu-box"),
        ("http://gpu-box:8000/v1/", "http://gpu-box:8000"),
        ("https://gpu-box/llm/v1", "https://gpu-box/llm"),
        ("http://gpu-box:8000/#/requests", "http://gpu-box:8000"),
    ],
)
def test_the_address_of_a_router_may_be_written_as_for_other_clients(written: str, understood: str) -> None:
    assert base_url(written) == understood


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://", "http://host:port", "http://[::1", "a b", " "])
def test_a_url_that_is_none_is_named(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["ps", "--url", url])
    assert repr(url) in capsys.readouterr().err


def test_a_url_with_a_password_is_refused_without_repeating_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["ps", "--url", "http://me:secret@127.0.0.1:8000"])
    said = capsys.readouterr().err
    assert "LLAMA_ROUTER_API_KEY" in said
    assert "secret" not in said
