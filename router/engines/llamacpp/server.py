"""llama-server and the embedded engine as child processes: start, readiness and stop.

Engines listen on 127.0.0.1 with a key of their own, passed in the environment so that it appears neither in `ps`
nor in a log. An answering port proves nothing, as it may belong to an orphan or another program. An engine is
ready only once the child reports it on its own pipe (the protocol between llama-server's router mode and its
children, tools/server/server-models.cpp) or, for builds without that protocol, once the port rejects requests
without the key and accepts those with it. The path for this is `/props`: `/health` needs no key, nor did
`/v1/models` before build 10500.

Builds that can listen on a Unix socket beside the port get one, and requests use it: between processes of one
machine, TCP's acknowledgements are wasted work.
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

import anyio
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
"""Message of builds before June 2026 instead of that state."""
_EXIT_COMMAND = b"cmd_router_to_child:exit\n"
_KEPT_PATH = "/props"
"""Path that requires the key in every build."""

_POLL_SEC = 0.01
_LEAVING_SEC = 0.3
"""Time between the first request to exit and the second."""
_REFUSED_FLAG = re.compile(r"error: invalid argument: |error while handling argument ")
"""Messages of llama.cpp (common/arg.cpp) and of the embedded engine."""
_TAKEN_PORT = re.compile(r"couldn't bind .*socket")
"""tools/server/server-http.cpp"""
_LONGEST_MESSAGE = 1 << 20


class _State(msgspec.Struct):
    state: str = ""
    payload: dict[str, object] = {}


class _Context(msgspec.Struct):
    n_ctx: int | None = None
    """Context size of one slot."""


class _Props(msgspec.Struct):
    """Document at `/props`."""

    default_generation_settings: _Context = msgspec.field(default_factory=_Context)
    modalities: dict[str, bool] = {}


class LlamaServer(EngineProcess):
    """Running engine. Create it with `start`."""

    def __init__(self, order: EngineOrder, endpoint: Endpoint, key: str, spawned: Spawned, log: LogRing) -> None:
        super().__init__(order, endpoint, (KEY_VARIABLE, key), spawned, log)
        self._said_ready = asyncio.Event()
        self._without_key: int | None = None
        """Status of the last response to a request without the key."""
        self._messages = asyncio.create_task(self._read_messages(), name=f"messages of {order.alias}")

    @classmethod
    def start(cls, order: EngineOrder, port: int, log: LogRing, unix_socket: Path | None) -> LlamaServer:
        """Spawn an engine. Raises EngineFailed if the binary cannot be run."""
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
        """Poll builds without messages. Two responses identify the child: 401 without the key, 200 with it."""
        keyless = replace(self.endpoint, headers=())
        while True:
            await asyncio.sleep(_POLL_SEC)
            self._without_key = await status(keyless, _KEPT_PATH)
            if self._without_key == 401 and await status(self.endpoint, _KEPT_PATH) == 200:
                return

    async def healthy(self, limit_sec: float = PROBE_LIMIT_SEC) -> bool:
        """Return whether it is alive and accepts a request with the key in time."""
        try:
            with anyio.fail_after(limit_sec):
                answer = await status(self.endpoint, "/v1/models")
            return self.alive and answer in (200, CANNOT_ASK)
        except TimeoutError:
            return False

    async def facts(self) -> Facts | None:
        """Return the properties that resulted from its flags, its environment and the available memory."""
        said = await document(self.endpoint, "/props", PROBE_LIMIT_SEC)
        try:
            props = msgspec.json.decode(said.body if said else b"", type=_Props)
        except msgspec.MsgspecError:  # an older build, or another server
            return None
        return Facts(props.default_generation_settings.n_ctx, props.modalities)

    async def _ask_to_go(self, grace_sec: float) -> None:
        """Ask by the exit command, or else by signals.

        llama-server waits for connected clients and is slow even without, as it completes its computation and
        checks for clients once a second. After the exit command it is therefore killed: its cleanup frees nothing
        that its exit does not. A process that needs signals gets more time, as it may be a wrapper script.
        """
        leaving_sec = min(_LEAVING_SEC, grace_sec)
        if not self._said_ready.is_set():
            await self._terminate(leaving_sec, grace_sec)  # the second SIGTERM makes llama-server wait for nobody
            return
        # No SIGTERM during the exit: its handler takes a lock that may be held.
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
        await asyncio.wait({self._messages}, timeout=0.5)  # a descendant may hold the pipe open
        self._messages.cancel()
        await super()._close_pipes()

    def _signs(self) -> str:
        words = super()._signs()
        answered = self._without_key
        if answered is None or answered in (401, CANNOT_ASK) or answered >= 500:
            return words
        return f"its port answers {_KEPT_PATH} without the key ({answered}), so it is not llama-server; {words}"

    async def _read_messages(self) -> None:
        """Read standard output: state messages of the child protocol, log lines of builds without it."""
        stream = asyncio.StreamReader(limit=_LONGEST_MESSAGE)
        transport, _ = await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), self._process.stdout
        )
        try:
            with contextlib.suppress(ValueError):  # a line over the limit; what follows cannot be parsed
                while line := await stream.readline():
                    self._last_sign = time.monotonic()
                    if line.startswith(_STATE_PREFIX):
                        self._take_message(line[len(_STATE_PREFIX) :])
                    elif line.rstrip() == _SAYS_READY:
                        self._said_ready.set()
                    else:
                        self.log.feed(line)
            while await stream.read(65536):
                pass  # its writes must never block
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
