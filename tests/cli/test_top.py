"""The screen of `llama-router top`, read back by a terminal emulator."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from conftest import ROOT, Router, Start, eventually, fake, models, run
from terminal import Terminal

Open = Callable[..., Terminal]


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Open]:
    opened: list[Terminal] = []

    def open_top(router: Router | str, columns: int = 80, lines: int = 24) -> Terminal:
        url = router if isinstance(router, str) else router.url
        command = [sys.executable, str(ROOT / "run.py"), "top", "--url", url]
        opened.append(Terminal(command, tmp_path, columns, lines))
        return opened[-1]

    yield open_top
    for terminal in opened:
        terminal.close()


def in_background(act: Callable[[], object]) -> None:
    """For requests that end with the router, at the end of the test."""

    def run() -> None:
        with contextlib.suppress(httpx.TransportError):
            act()

    threading.Thread(target=run, daemon=True).start()


def test_the_screen_tells_who_runs_who_waits_and_why(start: Start, tiny: Path, tmp_path: Path, top: Open) -> None:
    engine = fake(tmp_path, answer_sec="60")
    system = {"llama_server_path": engine, "max_concurrent_models": 1, "default_parallel": 1}
    router = start({"system": system, "models": models(tiny, "busy", "cold", flags=[])})
    in_background(lambda: router.chat("busy"))
    router.until("busy", "ready")
    in_background(lambda: router.chat("cold", headers={"X-Request-Priority": "low"}))
    in_background(lambda: router.chat("busy", headers={"X-Request-Priority": "low"}))

    lines = top(router).until(
        r"llama-router ready, up \d\.\d?s +1 in flight, \d\.\d requests/s, \d tokens/s",
        r"host [█▒·]+ \d+MiB models \+ [\d.]+[GM]iB others of [\d.]+[GM]iB",
        r"MODEL +STATE +QUEUE +SLOTS +MEMORY +UP +UNLOADS IN",
        r"busy +ready +1 +1/1 +\S+ +\S+ +busy",
        r"cold +off +1 +0/\d +- +- +-",
        r"WAITING  high 0  normal 0  low 2 \(oldest \d\.\ds\)",
        r"cold: 1 low, \d\.\ds: .*busy",
        r"DECISIONS",
    )
    assert len(lines) == 24
    assert all(len(line) <= 80 for line in lines)


def test_decisions_scroll_by_newest_first(start: Start, tiny: Path, tmp_path: Path, top: Open) -> None:
    system = {"llama_server_path": fake(tmp_path), "max_concurrent_models": 1}
    router = start({"system": system, "models": models(tiny, "first", "second")})
    screen = top(router)
    screen.until("first +off")
    router.chat("first")
    screen.until(r"\d\d:\d\d:\d\d first ready: loaded in", r"first loading: takes")
    router.chat("second")
    seen = ("second ready", "second loading", "first off: evicted", "first ready", "first loading")
    screen.until(*seen)
    entries = models(tiny, "first", "second", "third")
    (tmp_path / "config.json").write_text(json.dumps({"system": system, "models": entries}))
    router.http.post("/v1/config/reload")
    top(router).until("third +off", *seen)  # who comes later sees what was decided before


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    return start_shared({"models": models(tiny, "a")})


def test_rates_are_those_of_the_last_seconds(router: Router, top: Open) -> None:
    router.chat("a")
    screen = top(router)
    screen.until("0.0 requests/s, 0 tokens/s")
    for _ in range(20):
        router.chat("a", max_tokens=8)
    screen.until(r"[1-9][\d.]* requests/s, [1-9]\d* tokens/s")


def test_it_survives_a_restart_of_the_router_and_says_so(start: Start, tiny: Path, top: Open) -> None:
    first = start({"models": models(tiny, "a")})
    screen = top(first)
    screen.until("a +off")
    first.stop()
    screen.until("No response for .*retrying. No router can be reached", "a +off", "router lost")
    port = first.url.rpartition(":")[2]
    second = start({"models": models(tiny, "a", "b")}, arguments=["--port", port])
    screen.until("llama-router ready", "b +off", "router back: it was started again", "router lost")
    second.chat("b")
    screen.until("b +ready", "b ready: loaded in")


def test_it_leaves_the_terminal_as_it_was(router: Router, top: Open) -> None:
    leaving: tuple[Callable[[Terminal], None], ...] = (
        lambda screen: screen.type(b"q"),
        lambda screen: screen.type(b"\x03"),  # Ctrl-C
        lambda screen: screen.process.terminate(),
    )
    for leave in leaving:
        screen = top(router)
        before = screen.modes
        screen.until("a +(off|ready)")
        assert screen.modes != before  # keys come at once and are not echoed
        leave(screen)
        assert screen.process.wait(10) == 0
        assert screen.modes == before
        eventually(lambda: screen.raw.rfind(b"\x1b[?1049l") > screen.raw.rfind(b"\x1b[?1049h"))  # noqa: B023
        eventually(lambda: screen.raw.rfind(b"\x1b[?25h") > screen.raw.rfind(b"\x1b[?25l"))  # noqa: B023
        assert b"Traceback" not in screen.raw


def test_what_an_engine_says_gives_no_commands_to_the_terminal(
    start: Start, tiny: Path, tmp_path: Path, top: Open
) -> None:
    engine = tmp_path / "llama-server"
    engine.write_text("#!/bin/sh\nprintf 'error: \\033[2Jgone\\007\\n' >&2\nexit 1\n")
    engine.chmod(0o755)
    system = {"llama_server_path": str(engine), "model_load_max_retries": 0}
    router = start({"system": system, "models": models(tiny, "a", flags=[])})
    screen = top(router)
    screen.until("a +off")
    router.chat("a")
    screen.until(r"a +failed", r"a failed: .*error: ·\[2Jgone")
    logs = Terminal([sys.executable, str(ROOT / "run.py"), "logs", "a", "--url", router.url], tmp_path)
    logs.until(r"error: ·\[2Jgone·")
    logs.close()


def test_it_fits_every_size(start: Start, tiny: Path, top: Open) -> None:
    router = start({"models": models(tiny, *(f"model-{number:02}" for number in range(30)))})
    router.chat("model-29")
    screen = top(router)
    screen.until("MODEL", "model-29 +ready", "model-00", r"… and \d+ more", "WAITING", "DECISIONS")
    screen.resize(140, 50)
    screen.until("model-29 +ready", "model-28 +off", "WAITING", "DECISIONS")
    screen.resize(40, 8)
    lines = screen.until("llama-router", "MODEL", "model-29 +ready", "… and 29 more", "WAITING", "DECISIONS")
    assert len(lines) == 8
    assert screen.process.poll() is None


def test_without_a_terminal_it_is_printed_once(router: Router, tmp_path: Path) -> None:
    router.chat("a")
    printed = run("top", "--url", router.url, cwd=tmp_path)
    assert printed.returncode == 0
    assert "\x1b" not in printed.stdout
    assert printed.stdout.startswith("llama-router ready")
    assert re.search(r"^a +ready", printed.stdout, re.MULTILINE)
    assert re.search(r"^  \d\d:\d\d:\d\d a ready: loaded in ", printed.stdout, re.MULTILINE)
    document = json.loads(run("top", "--json", "--url", router.url, cwd=tmp_path).stdout)
    assert document["status"]["models"]["a"]["status"] == "ready"
    assert {"queue", "memory", "decisions"} <= document.keys()


def test_a_router_that_is_not_there_at_first_is_one_sentence(free_port: int, top: Open) -> None:
    screen = top(f"http://127.0.0.1:{free_port}")
    assert screen.process.wait(15) == 1
    screen.until("llama-router: No router can be reached at http://127.0.0.1")
    assert b"\x1b" not in screen.raw
