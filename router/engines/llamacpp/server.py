"""One llama-server, or embedded engine, as a child process: how it is started and stopped, when it is ready.

Engines listen on 127.0.0.1 with a key of their own, given through the environment, so that it shows neither in
`ps` nor in a log. A port that answers proves nothing: an orphan or a stranger may sit there. Readiness counts
only when our child says so on its own pipe (the protocol between llama-server's router mode and its children,
tools/server/server-models.cpp) or, for builds that do not speak it, when the port wants our key and takes it.
Asked for that is `/props`: `/health` is for everybody, and so was `/v1/models` before build 10500.

An engine that can listen on a Unix socket beside its port is asked for that: requests go there, as for two
processes of one machine TCP's acknowledgements are so much work for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from router.engines.base import PROBE_LIMIT_SEC, Endpoint, Facts, LoadProgress
from router.engines.llamacpp.flags import OWNED_VARIABLES
from router.engines.log_ring import LogRing
from router.engines.process import EngineOrder, EngineProcess, Spawned
from router.engines.questions import CANNOT_ASK, document, status
from router.scheduling.messages import Retry
from router.system.privacy import without_secrets

KEY_VARIABLE = "LLAMA_API_KEY"
_STATE_PREFIX = b"cmd_child_to_router:state:"
_SAYS_READY = b"cmd_child_to_router:ready"
"""What builds before June 2026 say instead of that state."""
_EXIT_COMMAND = b"cmd_router_to_child:exit\n"
_KEPT_PATH = "/props"
"""Nobody gets it without the key, whatever the build."""

_POLL_SEC = 0.01
_LEAVING_SEC = 0.3
"""From the first word to an engine that it is to go to the second."""
_REFUSED_FLAG = re.compile(r"error: invalid argument: |error while handling argument ")
"""llama.cpp, common/arg.cpp; the embedded engine says so, too."""
_TAKEN_PORT = re.compile(r"couldn't bind .*socket")
"""tools/server/server-http.cpp"""
_LONGEST_MESSAGE = 1 << 20


class _State(msgspec.Struct):
    state: str = ""
    payload: dict[str, object] = {}


class _Context(msgspec.Struct):
    n_ctx: int | None = None
    """Of one slot."""


class _Props(msgspec.Struct):
    """What an engine says of itself at `/props`."""

    default_generation_settings: _Context = msgspec.field(default_factory=_Context)
    modalities: dict[str, bool] = {}


class LlamaServer(EngineProcess):
    """A running engine. Create it with `start`."""

    def __init__(self, order: EngineOrder, endpoint: Endpoint, key: str, spawned: Spawned, log: LogRing) -> None:
        super().__init__(order, endpoint, (KEY_VARIABLE, key), spawned, log)
        self._said_ready = asyncio.Event()
        self._without_key: int | None = None
        """With what status its port answered last who has no key."""
        self._messages = asyncio.create_task(self._read_messages(), name=f"messages of {order.alias}")

    @classmethod
    def start(cls, order: EngineOrder, port: int, log: LogRing, unix_socket: Path | None) -> LlamaServer:
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
        headers = (("Authorization", f"Bearer {key}"),)
        endpoint = Endpoint(port, unix_socket=unix_socket, headers=headers, knows_key=True)
        return cls(order, endpoint, key, Spawned.by(argv, env), log)

    async def _until_it_serves(self) -> None:
        said = asyncio.create_task(self._said_ready.wait())
        polled = asyncio.create_task(self._poll_ready())
        try:
            await asyncio.wait({said, polled}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (said, polled):
                task.cancel()
            await asyncio.gather(said, polled, return_exceptions=True)

    async def _poll_ready(self) -> None:
        """For builds that push nothing. Two answers identify our child: 401 without the key, 200 with it."""
        keyless = replace(self.endpoint, headers=())
        while True:
            await asyncio.sleep(_POLL_SEC)
            self._without_key = await status(keyless, _KEPT_PATH)
            if self._without_key == 401 and await status(self.endpoint, _KEPT_PATH) == 200:
                return

    async def healthy(self, limit_sec: float = PROBE_LIMIT_SEC) -> bool:
        """Whether it is alive and answers with our key in time."""
        try:
            answer = await asyncio.wait_for(status(self.endpoint, "/v1/models"), limit_sec)
            return self.alive and answer in (200, CANNOT_ASK)
        except asyncio.TimeoutError:
            return False

    async def facts(self) -> Facts | None:
        """The truth, whatever its flags, its variables and the memory that it found have made of it."""
        said = await document(self.endpoint, "/props", PROBE_LIMIT_SEC)
        try:
            props = msgspec.json.decode(said.body if said else b"", type=_Props)
        except msgspec.MsgspecError:  # it is older, or another one
            return None
        return Facts(props.default_generation_settings.n_ctx, props.modalities)

    async def _ask_to_go(self, grace_sec: float) -> None:
        """llama-server waits for whoever is connected, and even so takes its time, as it ends what it computes and
        looks once a second who is still there. One that takes the exit command is then killed: what it would tidy
        up goes with it. What has to be told by signals may have more to do, as it may be a script around one.
        """
        leaving_sec = min(_LEAVING_SEC, grace_sec)
        if not self._said_ready.is_set():
            await self._terminate(leaving_sec, grace_sec)  # the second SIGTERM makes llama-server wait for nobody
            return
        # No SIGTERM before it is through: its handler takes a lock that may be held.
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(_EXIT_COMMAND)
        await asyncio.wait({self.exited}, timeout=leaving_sec)

    @staticmethod
    def retry_after(code: int, log: Sequence[str]) -> Retry:
        for line in log if code > 0 else ():
            if _REFUSED_FLAG.search(line):
                return Retry.NEVER
            if _TAKEN_PORT.search(line):
                return Retry.AT_ONCE
        return Retry.LATER

    async def _close_pipes(self) -> None:
        await asyncio.wait({self._messages}, timeout=0.5)  # a grandchild may hold the pipe open
        self._messages.cancel()
        await super()._close_pipes()

    def _signs(self) -> str:
        words = super()._signs()
        answered = self._without_key
        if answered is None or answered in (401, CANNOT_ASK) or answered >= 500:
            return words
        return f"its port answers {_KEPT_PATH} without the key ({answered}), so it is not llama-server; {words}"

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

    def _take_message(self, message: bytes) -> None:
        try:
            state = msgspec.json.decode(message, type=_State)
        except msgspec.MsgspecError:
            return
        if state.state == "ready":
            self._said_ready.set()
        value, stage = state.payload.get("value"), state.payload.get("current")
        if isinstance(value, int | float):
            named = state.payload.get("stages")
            stages = tuple(each for each in named if isinstance(each, str)) if isinstance(named, list) else ()
            self.load_progress = LoadProgress(float(value), stage if isinstance(stage, str) else None, stages)
            self.when_load_moves()
