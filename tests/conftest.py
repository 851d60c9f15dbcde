"""A real router in a process of its own, on real engines, and what tests need to talk to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import forked
import httpx2 as httpx
import played_nvml
import psutil
import pytest
from tiny_models import write_llama

ROOT = Path(__file__).parent.parent
BASE_PORT = 10_000 + os.getpid() % 300 * 64
"""Of the engines of this run, out of the way of others on the machine."""
MOST_WORKERS = 6
LONGEST = (
    "tests/test_quality.py",
    "tests/engines/test_containers.py",
    "tests/runtime/test_survival.py",
    "tests/store/test_pull.py",
    "tests/memory/test_memory_stories.py",
    "tests/store/test_watch.py",
    "tests/engines/test_vllm.py",
    "tests/chaos/test_crowds.py",
    "tests/api/test_page.py",
    "tests/clients/test_clients.py",
    "tests/engines/test_vllm_sleep.py",
    "tests/scheduling/test_scheduler_properties.py",
)
"""Files that take half a minute or more, which therefore come first."""
FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
_LISTENS = re.compile(r"listens on (http://\S+)")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return what `-n auto` stands for: two workers a core and one more, as tests mostly wait.

    A file is not divided, as its tests share expensive fixtures: a run of a single file gets no workers.
    """
    asked = {Path(argument.partition("::")[0]) for argument in config.args}
    files = len(asked) if all(path.is_file() for path in asked) else MOST_WORKERS
    workers = min(files, 2 * (os.cpu_count() or 1) + 1, MOST_WORKERS)
    return workers if workers > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files that take longest be begun first, so that no worker is left alone with one at the end."""
    ranks = {ROOT / path: rank for rank, path in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def signals_as_in_a_terminal() -> None:
    """What tests start would inherit that a job in the background ignores these, but it inherits no handler."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def http_client(url: str, *, timeout: float = 60, **more: Any) -> httpx.Client:
    """A client for a server on this machine, without certificates, as loading them takes longer than a request."""
    return httpx.Client(base_url=url, timeout=timeout, verify=False, **more)


def examples(few: int) -> int:
    """How many examples a property is tried on: twenty times as many with PROPERTIES=long."""
    return 20 * few if os.environ.get("PROPERTIES") == "long" else few


class Router:
    """A router in a process of its own, from its start on."""

    def __init__(self, process: subprocess.Popen[str] | forked.Forked) -> None:
        self.output: list[str] = []
        self.url = ""
        self._listening = threading.Event()
        self.process = process
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._listening.wait(60)
        assert self.url, "".join(self.output)
        self.http = http_client(self.url)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.output.append(line)
            if found := _LISTENS.search(line):
                self.url = found[1]
            if self.url and line.startswith("  curl "):  # the end of what is announced
                self._listening.set()
        self._listening.set()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, for clients that open sockets themselves."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    @property
    def queued(self) -> int:
        """The number of requests that wait for a slot."""
        count: int = self.http.get("/v1/queue/stats").json()["summary"]["total_queued"]
        return count

    def keep_no_connection(self, *, timeout: float = 60) -> None:
        """Send each further request of `http` over a connection of its own, for tests that count connections."""
        self.http.close()
        self.http = http_client(self.url, timeout=timeout, headers={"connection": "close"})

    def chat(self, model: str, *, content: str = "hi", max_tokens: int = 1, **more: Any) -> httpx.Response:
        headers = more.pop("headers", None)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            **more,
        }
        return self.http.post("/v1/chat/completions", json=body, headers=headers)

    def status(self, alias: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get(f"/v1/models/{alias}/status").json()
        return answer

    def until(self, alias: str, state: str, timeout_sec: float = 20) -> dict[str, Any]:
        """Wait on the event stream, not on the clock, until a model is in a state; returns its status."""
        with self.http.stream("GET", "/v1/models/status/stream", timeout=timeout_sec) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    data = json.loads(line[5:])
                    known: dict[str, Any] | None = data.get("models", {}).get(alias) if "models" in data else data
                    if known and known.get("alias") == alias and known["status"] == state:
                        return known
        raise AssertionError(f"the stream ended before {alias} was {state}")

    def unload(self) -> None:
        """Unload every model, as at the start."""
        for card in self.http.get("/v1/models").json()["data"]:
            self.http.post("/v1/models/eject", json={"model": card["id"]})
        eventually(lambda: self.engines == [])

    @property
    def engines(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def stop(self, number: int = signal.SIGTERM, timeout_sec: float = 30) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout_sec)
        self._reader.join(5)
        return code

    @property
    def log(self) -> str:
        return "".join(self.output)


_forks = lru_cache(forked.Forks)  # by LD_LIBRARY_PATH


def fork(command: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> forked.Forked:
    """Start `python COMMAND…`, forked from a process that has imported the router."""
    return _forks(environ.get("LD_LIBRARY_PATH", "")).start(command, cwd, environ)


def run(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the router, such as `check`, to its end."""
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": str(ROOT), **environ}
    command = [str(ROOT / "run.py"), *arguments]
    process = fork(command, cwd, clean)
    process.stdin.close()
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(process.stderr.read()))
    reader.start()
    printed = process.stdout.read()
    reader.join()
    return subprocess.CompletedProcess(command, process.wait(30), printed, *said)


Start = Callable[..., Router]
Visit = Callable[..., Any]


@contextmanager
def starting(tmp_path: Path) -> Iterator[Start]:
    """For what outlives a test: what `start` gives, with the folder in which its routers are to live."""
    routers: list[Router] = []

    def start_router(
        config: dict[str, Any] | None = None,
        *,
        arguments: list[str] | None = None,
        from_scratch: bool = False,
        **environ: str,
    ) -> Router:
        arguments = list(arguments or [])
        if config is not None:
            path = tmp_path / "config.json"
            path.write_text(json.dumps(config))
            arguments += ["--config", str(path)]
        if "--port" not in arguments:
            arguments += ["--port", "0"]
        # The tests' own engine, whatever else the machine has.
        path_without_engines = os.pathsep.join(["/usr/bin", "/bin"])
        clean = {"PATH": path_without_engines, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        clean["LLAMA_ROUTER_STATE_DIR"] = str(tmp_path / f"state-{len(routers)}")
        if "base_port" not in (config or {}).get("system", {}):
            clean["LLAMA_ROUTER__SYSTEM__BASE_PORT"] = str(BASE_PORT)
        clean |= environ
        command = [str(ROOT / "run.py"), *arguments]
        process: subprocess.Popen[str] | forked.Forked
        if from_scratch or not forked.takes(environ):
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                [sys.executable, *command], cwd=tmp_path, env=clean, stderr=pipe, stdout=pipe, text=True
            )
        else:
            process = fork(command, tmp_path, clean)
        router = Router(process)
        routers.append(router)
        return router

    yield start_router
    for router in routers:
        try:
            engines = router.engines if router.process.poll() is None else []
        except psutil.NoSuchProcess:  # it is just being killed
            engines = []
        router.process.kill()
        router.process.wait()
        _, left = psutil.wait_procs(engines, timeout=1)
        psutil.wait_procs(filter(tidies_up, left), timeout=20)
        for engine in engines:
            if engine.is_running():
                engine.kill()


def tidies_up(process: psutil.Process) -> bool:
    """Whether it ends an engine of several processes: killed meanwhile, it would leave them for ever."""
    try:
        return any(word.endswith("minder.py") for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start routers: `start(config)` or `start(arguments=[…])`. Whatever is left over at the end is killed.

    They are forked (see `forked.py`), unless `from_scratch` is set: then it is `python run.py …`.
    """
    with starting(tmp_path) as start_router:
        yield start_router


@pytest.fixture(scope="module")
def start_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """The same for a router that the tests of a file share: a start takes longer than most of what they ask it."""
    with starting(tmp_path_factory.mktemp("shared")) as start_router:
        yield start_router


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is up in milliseconds and answers nonsense."""
    return write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MB: more than the noise, and work to be done for each token."""
    return write_llama(tmp_path_factory.mktemp("models") / "middling.gguf", target_bytes=100 << 20)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file in which a `fake` engine with `notes` writes down the requests that it gets."""
    return tmp_path_factory.mktemp("notes") / "notes"


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return played_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def gpus(nvml_library: Path, tmp_path: Path) -> played_nvml.PlayedGpus:
    """A machine with GPUs, for processes that get its `environ`; see `played_nvml.py`."""
    return played_nvml.PlayedGpus(nvml_library, tmp_path)


def models(path: Path, *aliases: str, **entry: Any) -> dict[str, Any]:
    """Return entries that serve the same file under several aliases."""
    flags = entry.pop("flags", ["-c", "1024", "-t", "1", "--ignore-eos"])
    return {alias: {"model_path": str(path), "flags": flags, **entry} for alias in aliases}


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium(*arguments: str) -> Iterator[Any]:
    """A browser; the test is skipped where none is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of these browsers is installed: {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", *arguments])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """Opens a router's page at a view, in a window of its own. At the end, no page may have complained."""
    complaints: list[str] = []
    windows = []

    def open_page(router: Router, view: str = "", **options: Any) -> Any:
        window = browser.new_context(**options)
        windows.append(window)
        page = window.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "Content Security" in said.text else None)
        page.goto(f"{router.url}/#/{view}")
        return page

    yield open_page
    for window in windows:
        window.close()
    assert complaints == []


def violations(page: Any) -> list[str]:
    """What axe-core finds wrong with a page as it is now; the test is skipped where that is not installed."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is missing")
    page.mouse.move(0, 0)  # a colour under the pointer may be on its way to another
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [f"{each['id']}: {node['html']} {node['failureSummary']}" for each in found for node in each["nodes"]]


def fake(tmp_path: Path, **behaviour: str) -> str:
    """Path of an engine that can do what a real one can't on demand; see `fake_engine.py`."""
    script = tmp_path / "fake-llama-server"
    settings = " ".join(f"FAKE_{name.upper()}='{value}'" for name, value in behaviour.items())
    script.write_text(f'#!/bin/sh\nexec env {settings} {sys.executable} {FAKE_ENGINE} "$@"\n')
    script.chmod(0o755)
    return str(script)


def eventually(condition: Callable[[], bool], timeout_sec: float = 10) -> None:
    """Wait for what no event announces, such as the end of a process, checking less often as time goes by."""
    since = time.monotonic()
    while not condition():
        waited_sec = time.monotonic() - since
        assert waited_sec < timeout_sec, "it did not happen in time"
        time.sleep(min(0.01 + waited_sec / 10, 0.1))


@pytest.fixture
def free_port() -> int:
    """Return a port that was free a moment ago, for programs that must be given one."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
