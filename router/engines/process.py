"""One engine process: how it is started, when it is ready, how it is stopped, what it said and why it ended.

Engines listen on 127.0.0.1 with a key of their own, given through the environment, so that it shows neither in
`ps` nor in a log. A port that answers proves nothing: an orphan or a stranger may sit there. Readiness counts
only when our child says so on its own pipe (the protocol between llama-server's router mode and its children,
tools/server/server-models.cpp) or, for builds that do not speak it, when the port wants our key and takes it.
Asked for that is `/props`: `/health` is for everybody, and so was `/v1/models` before build 10500.

An engine that can listen on a Unix socket beside its port is asked for that: requests go there, as for two
processes of one machine TCP's acknowledgements are so much work for nothing.

This module knows one process. Which models have engines, and when, is the scheduler's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from router.engines.llamacpp.flags import OWNED_VARIABLES
from router.hardware.ram import oom_kills, resident_bytes
from router.observe.reasons import Problem, Reason
from router.scheduling.messages import Retry
from router.system.privacy import without_secrets
from router.system.processes import PIPE_BYTES, exit_code, is_foreign, log_pipe, signal_group, spawn

KEY_VARIABLE = "LLAMA_API_KEY"
_STATE_PREFIX = b"cmd_child_to_router:state:"
_SAYS_READY = b"cmd_child_to_router:ready"
"""What builds before June 2026 say instead of that state."""
_EXIT_COMMAND = b"cmd_router_to_child:exit\n"
_KEPT_PATH = "/props"
"""Nobody gets it without the key, whatever the build."""
PROBE_LIMIT_SEC = 3

_POLL_SEC = 0.01
_SILENCE_CHECK_SEC = 1.0
_LEAVING_SEC = 0.3
"""From the first word to an engine that it is to go to the second."""
_READS_AT_ONCE = 4
_DRAIN_SEC = (0.02, 1.0)
_CANNOT_ASK = -1  # we are short of file descriptors, which says nothing of the engine
_REFUSED_FLAG = re.compile(r"error: invalid argument: |error while handling argument ")
"""llama.cpp, common/arg.cpp; the embedded engine says so, too."""
_TAKEN_PORT = re.compile(r"couldn't bind .*socket")
"""tools/server/server-http.cpp"""
_ABORTED = re.compile(
    r"^\S+\.(?:cc?|cpp|cuh?|h|hpp|mm?):\d+: |: Assertion `.* failed|^terminate called |^ *what\(\): "
    r"|^libc\+\+abi: terminating"
)
"""Why a program has ended itself: llama.cpp's GGML_ASSERT and GGML_ABORT, and what the C and C++ libraries say."""
_OF_DEBUGGER = re.compile(
    r"^(?:#\d+ |\d+\t|0x[0-9a-f]+ in |\[(?:New|Thread|Inferior|Switching|Detaching|LWP)|warning: |\(lldb\)"
    r"|\* thread #| *frame #)|\[0x[0-9a-f]+\]$"
)
"""llama.cpp has gdb or lldb print where it was, or does so itself: after an assertion, but before an exception."""
_LEVEL_OF_ERROR = re.compile(r"^[\d.]+ E ")
"""How llama.cpp begins a line that tells an error, whatever its words."""
_CONSEQUENCE = re.compile(
    r"failed to create[ _](?:context|model)|failed to load[ _](?:context|model)(?! ')|due to model loading error"
    r"|trying to fit params"
    r"|the lines above say why"
)
"""What it says after that, on its way out; not where it quotes the file."""
_WRONG = ("error", "fail", "unable", "couldn't", "could not", "cannot", "can't")
_LINES_OF_REASON = 60
_LONGEST_LINE = 16 * 1024
_LONGEST_MESSAGE = 1 << 20


class EngineFailed(Problem):
    """The engine did not become ready."""


@dataclass(frozen=True, slots=True)
class Binary:
    """What runs models: the real llama-server or the embedded one."""

    argv: tuple[str, ...]
    kind: str
    """`llama-server` or `embedded`"""
    origin: str
    """Where it was found, for people."""


@dataclass(frozen=True, slots=True)
class EngineOrder:
    """Everything needed to start one engine."""

    alias: str
    argv: tuple[str, ...]
    """Without address and key, which the process gets from us."""
    env: Mapping[str, str] = field(default_factory=dict)
    load_stall_sec: float = 60
    load_limit_sec: float | None = None
    stop_grace_sec: float = 10


class LogRing:
    """The last lines of an engine's output, whatever it writes. Taken raw: most are never looked at.

    `copy` gets all of it, too, as it comes.
    """

    def __init__(self, lines: int, copy: Callable[[bytes], None] | None = None) -> None:
        self._copy = copy
        self._lines: deque[bytes] = deque(maxlen=lines)
        self._rest = b""
        self.total = 0
        """Lines ever written; tells a reader what it has missed."""

    def feed(self, chunk: bytes) -> None:
        if self._copy is not None:
            self._copy(chunk)
        *lines, rest = (self._rest + chunk).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines.append(rest)
            rest = b""
        self._rest = rest
        self._lines.extend(lines)
        self.total += len(lines)

    def since(self, total: int) -> list[str]:
        """What was written after `total` lines, as far as it is still here."""
        return self.tail(self.total - total)

    def tail(self, count: int) -> list[str]:
        """The last lines, oldest first."""
        lines = list(self._lines)[-count:] if count > 0 else []
        return [line[:_LONGEST_LINE].decode("utf-8", "replace").rstrip() for line in lines]

    def complaints(self, since: int = 0, count: int = 3) -> str:
        """What tells best what went wrong after `since` lines: the last that speak of an error, and not only of
        what came of it, up to the one that gave up; else the last."""
        said = [line for line in self.since(since) if line.strip() and not _OF_DEBUGGER.search(line)]
        aborted = [place for place, line in enumerate(said, 1) if _ABORTED.search(line)]
        tail = said[: aborted[-1] if aborted else None][-_LINES_OF_REASON:]
        wrong = [line for line in tail if _tells_error(line)]
        causes = {line.partition(" E ")[2] or line: line for line in wrong if not _CONSEQUENCE.search(line)}
        return " | ".join((list(causes.values()) or wrong or tail)[-count:])


def _tells_error(line: str) -> bool:
    return bool(_ABORTED.search(line) or _LEVEL_OF_ERROR.search(line)) or any(
        word in line.lower() for word in _WRONG
    )


class _State(msgspec.Struct):
    state: str = ""
    payload: dict[str, object] = {}


class Document(NamedTuple):
    """An engine's answer to a question of the router's own."""

    status: int
    content_type: str
    body: bytes

    @classmethod
    async def read(cls, answer: asyncio.StreamReader) -> Document:
        """Raises what streams and wrong HTTP raise."""
        first, *lines = (await answer.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
        length = fields.get("content-length")
        body = await (answer.read() if length is None else answer.readexactly(int(length)))
        return cls(int(first.split(" ")[1]), fields.get("content-type", "application/json"), body)


class EngineProcess:
    """A running engine. Create it with `start`; `exited` is done when the process is gone."""

    def __init__(
        self,
        order: EngineOrder,
        port: int,
        process: subprocess.Popen[bytes],
        key: str,
        log: LogRing,
        stderr: int,
        unix_socket: Path | None,
    ) -> None:
        self.order = order
        self.port = port
        self.unix_socket = unix_socket
        """Where it listens, too."""
        self.key = key
        self.log = log
        self.started = time.monotonic()
        self.load_progress: float | None = None
        """0 to 1 where the engine tells, while it loads."""
        self.load_stage: str | None = None
        """What it loads, in llama-server's words: text_model, spec_model, mmproj_model."""
        self.load_stages: list[str] = []
        """All that it loads, one after the other."""
        self.when_load_moves: Callable[[], None] = lambda: None
        self._process = process
        self.was_killed = False
        """It ended because `kill` was called."""
        self._log_begin = log.total
        self._oom_kills = oom_kills()
        self.out_of_memory = False
        """The kernel has killed it for want of memory."""
        self.retry = Retry.LATER
        """If it ends before it is ready."""
        self._killed_because = ""
        self._said_ready = asyncio.Event()
        self._without_key: int | None = None
        """With what status its port answered last who has no key."""
        self._last_sign = self.started
        self._loop = asyncio.get_running_loop()
        self._messages = asyncio.create_task(self._read_messages(), name=f"messages of {order.alias}")
        self._stderr = stderr
        self._drain_timer = self._loop.call_later(_DRAIN_SEC[0], self._drain)
        self._drain_sec = _DRAIN_SEC[0]
        self.exited: asyncio.Task[Reason] = asyncio.create_task(self._wait(), name=f"exit of {order.alias}")

    @classmethod
    async def start(cls, order: EngineOrder, port: int, log: LogRing, unix_socket: Path | None) -> EngineProcess:
        """Spawn it. Raises EngineFailed when the binary cannot be run."""
        key = secrets.token_hex(24)
        hosts = "127.0.0.1" if unix_socket is None else f"127.0.0.1,{unix_socket}"
        argv = (*order.argv, "--host", hosts, "--port", str(port))
        env = {
            **{name: value for name, value in without_secrets(os.environ).items() if name not in OWNED_VARIABLES},
            **order.env,
            KEY_VARIABLE: key,
            "LLAMA_SERVER_ROUTER_PORT": str(port),  # turns on the child protocol
        }
        stderr, stderr_of_child = log_pipe()
        try:
            process = spawn(argv, env, stderr_of_child)
        except (OSError, ValueError) as error:
            os.close(stderr)
            raise EngineFailed(f"{order.argv[0]} cannot be run: {error}", "the engine cannot be run") from error
        finally:
            os.close(stderr_of_child)
        return cls(order, port, process, key, log, stderr, unix_socket)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    @property
    def exit_code(self) -> int | None:
        """Negative: the signal that ended it; None while it lives."""
        return self._process.returncode

    def last_words(self, lines: int = 10) -> list[str]:
        """The end of what it has said itself; the ring also keeps what the engines before it said."""
        return self.log.since(self._log_begin)[-lines:]

    async def ready(self) -> None:
        """Until the engine serves. Raises EngineFailed when it ended, hangs or takes too long."""
        said = asyncio.create_task(self._said_ready.wait())
        polled = asyncio.create_task(self._poll_ready())
        watched = asyncio.create_task(self._watch_progress())
        try:
            await asyncio.wait({said, polled, watched, self.exited}, return_when=asyncio.FIRST_COMPLETED)
            if self.exited.done():
                raise EngineFailed(*self.exited.result())
            if not (said.done() or polled.done()):
                watched.result()
        finally:
            for task in (said, polled, watched):
                task.cancel()
            await asyncio.gather(said, polled, watched, return_exceptions=True)
        self.load_progress = None

    async def stop(self) -> None:
        """Ask it to go, make it go after the grace time. Returns when it and all it started are gone.

        Nobody must be connected to it any more: llama-server waits for whoever is, and even so takes its time, as
        it ends what it computes and looks once a second who is still there. One that takes the exit command is
        then killed: what it would tidy up goes with it. What has to be told by signals may have more to do, as it
        may be a script around an engine.
        """
        grace_sec = self.order.stop_grace_sec
        leaving_sec = min(_LEAVING_SEC, grace_sec)
        since = time.monotonic()
        if self.alive:
            takes_commands = self._said_ready.is_set()
            if takes_commands:  # and SIGTERM not before it is through: its handler takes a lock that may be held
                assert self._process.stdin is not None
                with contextlib.suppress(OSError):
                    self._process.stdin.write(_EXIT_COMMAND)
            else:
                signal_group(self.pid, signal.SIGTERM)
            await asyncio.wait({self.exited}, timeout=leaving_sec)
            if self.alive and not takes_commands:
                signal_group(self.pid, signal.SIGTERM)  # the second makes llama-server wait for nobody
                await asyncio.wait({self.exited}, timeout=grace_sec - leaving_sec)
        self.kill(f"killed, as it was still there {time.monotonic() - since:.1f} s after it was told to go")
        await self.exited

    def kill(self, reason: str = "") -> None:
        """At once; `reason` is what will be said of its end."""
        if self.alive:  # once it is reaped, its number may be somebody else's
            self._killed_because = self._killed_because or reason
            signal_group(self.pid, signal.SIGKILL)

    async def _wait(self) -> Reason:
        code = await exit_code(self._process)
        await asyncio.wait({self._messages}, timeout=0.5)  # a grandchild may hold the pipe open
        self._messages.cancel()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._drain_timer.cancel()
        self._drain()  # what it said last is the reason
        self._drain_timer.cancel()
        os.close(self._stderr)
        if self.unix_socket is not None:
            with contextlib.suppress(OSError):
                self.unix_socket.unlink()
        was_killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)  # by itself, or behind a shell
        self.out_of_memory = was_killed and not self._killed_because and oom_kills() != self._oom_kills
        if code in (126, 127) and is_foreign(self.order.argv[0]):  # a shell has tried to make sense of it
            what = "cannot be run: Exec format error (it is built for another processor)"
            return Reason(f"{self.order.argv[0]} {what}", f"the engine {what}")
        if code > 0:
            self.retry = _retry_after(self.log.since(self._log_begin), self.port)
        self.was_killed = bool(self._killed_because) and code == -signal.SIGKILL  # else it was gone before
        if self.was_killed:
            return Reason(self._killed_because, self._killed_because)
        return self._describe_exit(code)

    def _signs(self) -> str:
        """What there was of it before it was given up."""
        words = f"its last words: {self.log.complaints(self._log_begin)}"
        status = self._without_key
        if status is None or status in (401, _CANNOT_ASK) or status >= 500:
            return words
        return f"its port answers {_KEPT_PATH} without the key, too ({status}): that is no llama-server; {words}"

    def _describe_exit(self, code: int) -> Reason:
        if self.out_of_memory:
            reason = "killed by the kernel: the memory ran out"
        elif code >= 0:
            reason = f"exited with code {code}"
        else:
            reason = f"killed by {signal_name(code)}"
            if code == -signal.SIGKILL and self._oom_kills is None:
                reason += " (out of memory?)"
        said = self.log.complaints(self._log_begin)
        return Reason(f"{reason}: {said}" if said and code not in (0, -signal.SIGTERM) else reason, reason)

    async def _read_messages(self) -> None:
        """Standard output: state messages in child mode, log lines in builds that do not know it."""
        stream = asyncio.StreamReader(limit=_LONGEST_MESSAGE)
        transport, _ = await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), self._process.stdout
        )
        try:
            with contextlib.suppress(ValueError):  # a line beyond all bounds; nothing after it can be trusted
                while line := await stream.readline():
                    self._last_sign = time.monotonic()
                    if line.startswith(_STATE_PREFIX):
                        self._take_message(line[len(_STATE_PREFIX) :])
                    elif line.rstrip() == _SAYS_READY:
                        self._said_ready.set()
                    else:
                        self.log.feed(line)
            while await stream.read(65536):
                pass  # it must never block on us
        finally:
            transport.close()

    def _drain(self) -> None:
        """Take what the engine has logged since the last look.

        An engine logs several lines per request. Waking up for each costs more than the request itself, so the
        pipe is looked into now and then: soon again when there was much, seldom when there was nothing.
        """
        size = 0
        for _ in range(_READS_AT_ONCE):  # one that writes without end must not keep us from all else
            try:
                chunk = os.read(self._stderr, 1 << 18)
            except BlockingIOError:
                break
            if not chunk:
                break
            size += len(chunk)
            self.log.feed(chunk)
        soonest, latest = _DRAIN_SEC
        if size:
            self._last_sign = time.monotonic()
            self._drain_sec = soonest if size > PIPE_BYTES // 4 else min(self._drain_sec, latest / 4)
        else:
            self._drain_sec = min(latest, 2 * self._drain_sec)
        self._drain_timer = self._loop.call_later(self._drain_sec, self._drain)

    def _take_message(self, message: bytes) -> None:
        try:
            state = msgspec.json.decode(message, type=_State)
        except msgspec.MsgspecError:
            return
        if state.state == "ready":
            self._said_ready.set()
        value, stage = state.payload.get("value"), state.payload.get("current")
        if isinstance(value, int | float):
            self.load_progress = float(value)
            self.load_stage = stage if isinstance(stage, str) else None
            stages = state.payload.get("stages")
            self.load_stages = (
                [stage for stage in stages if isinstance(stage, str)] if isinstance(stages, list) else []
            )
            self.when_load_moves()

    async def _poll_ready(self) -> None:
        """For builds that push nothing. Two answers identify our child: 401 without the key, 200 with it."""
        while True:
            await asyncio.sleep(_POLL_SEC)
            self._without_key = await self._status(_KEPT_PATH, "")
            if self._without_key == 401 and await self._status(_KEPT_PATH, self.key) == 200:
                return

    async def healthy(self, limit_sec: float = PROBE_LIMIT_SEC) -> bool:
        """Whether it is alive and answers with our key in time."""
        try:
            status = await asyncio.wait_for(self._status("/v1/models", self.key), limit_sec)
            return self.alive and status in (200, _CANNOT_ASK)
        except asyncio.TimeoutError:
            return False

    async def document(self, path: str, limit_sec: float) -> Document | None:
        """What is at `path`; None if it does not answer in time."""

        async def fetch() -> Document:
            async with self._asked(path, self.key) as answer:
                return await Document.read(answer)

        try:
            return await asyncio.wait_for(fetch(), limit_sec)
        except (OSError, EOFError, ValueError, IndexError, asyncio.LimitOverrunError, asyncio.TimeoutError):
            return None

    async def _status(self, path: str, key: str) -> int | None:
        try:
            async with self._asked(path, key) as answer:
                return int((await answer.readline()).split()[1])
        except OSError as error:
            return _CANNOT_ASK if error.errno in (errno.EMFILE, errno.ENFILE) else None
        except (ValueError, IndexError):
            return None

    @contextlib.asynccontextmanager
    async def _asked(self, path: str, key: str) -> AsyncIterator[asyncio.StreamReader]:
        """The answer to a GET over a connection of its own. Raises OSError."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            authorization = f"Authorization: Bearer {key}\r\n" if key else ""
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{authorization}Connection: close\r\n\r\n".encode()
            )
            yield reader
        finally:
            writer.close()

    async def _watch_progress(self) -> None:
        """Raises EngineFailed when the load stands still or takes too long."""
        order = self.order
        resident = 0
        while True:
            await asyncio.sleep(min(_SILENCE_CHECK_SEC, order.load_stall_sec / 4))
            now = time.monotonic()
            # Weights that are being read or mapped show here, also where the engine is silent.
            grown = resident_bytes(self.pid)
            if abs(grown - resident) > 1 << 20:
                resident = grown
                self._last_sign = now
            if now - self._last_sign > order.load_stall_sec:
                told = f"loading stood still for {order.load_stall_sec:g} s"
                raise EngineFailed(f"{told}; {self._signs()}", told)
            if order.load_limit_sec is not None and now - self.started > order.load_limit_sec:
                told = f"not ready after {order.load_limit_sec:g} s"
                raise EngineFailed(f"{told}; {self._signs()}", told)


def _retry_after(log: Iterable[str], port: int) -> Retry:
    """What the words of an engine that ended by itself mean for the next one. Builds that write them by a thread
    of its own may end before it; then it counts who has the port now."""
    for line in log:
        if _REFUSED_FLAG.search(line):
            return Retry.NEVER
        if _TAKEN_PORT.search(line):
            return Retry.AT_ONCE
    return Retry.LATER if port_is_free(port) else Retry.AT_ONCE


def signal_name(code: int) -> str:
    """Of an exit code below zero."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def port_is_free(port: int) -> bool:
    """Whether an engine could listen there. Asked with its own socket option, so TIME_WAIT does not count."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
