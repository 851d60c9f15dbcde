"""One `vllm serve`, and the processes that it starts.

Measured with vLLM 0.32. It binds its port long before it listens there, and one that has lost the port to another
program never listens, but stays. `/health` answers 200 while the engine hangs or ends. It exits with 0 after its
engine has died. So it counts as ready only if the listening socket belongs to one of its processes, and as alive
only if it answers a request for one token, or computes. Any exit that was not asked for is a crash. `minder.py`
stops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import psutil

from router.engines import minder
from router.engines.base import PROBE_LIMIT_SEC, Ending, Endpoint, EngineFailed, Facts, Launch
from router.engines.log_ring import LogRing
from router.engines.process import EngineOrder, EngineProcess, Spawned
from router.engines.questions import CANNOT_ASK, document, status
from router.engines.vllm import log as words
from router.engines.vllm.entry import KEY_VARIABLE
from router.engines.vllm.model import VllmModel
from router.engines.vllm.program import Program
from router.observe.reasons import Reason
from router.scheduling.messages import Retry
from router.system.privacy import without_secrets
from router.system.processes import descendants, signal_group
from router.system.readings import apart

_POLL_SEC = 0.025
_MINDER_SEC = 5.0
"""For the minder to kill what is left, and to remove what that leaves."""
_LONGEST_FOLDER = 60
"""Of the temporary folder: sockets in it have names of 40 characters, and paths of sockets may have 107."""
_COMPUTES = 0.1
"""Processor time as a part of a probe's time, from which on an engine that does not answer is at work."""
_QUIET_SINCE = (0, 32)
"""Version since which the access log can leave out what the router asks all the time."""
_WRONG_USAGE = 2
_TAKEN_PORT = re.compile(r"address already in use", re.IGNORECASE)
_FOR_GOOD = re.compile(
    r"does not recognize this architecture|are not supported for now|Cannot find model module|is greater than the "
    r"derived max_model_len|must be divisible by tensor parallel size"
)
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""Variables, unless its entry sets them: its files are there, and nothing is to be told to anybody."""
_DIED = b'{"error":{"message":"EngineCore encountered an issue'
_ENDS = (b'"finish_reason":"abort"', b'"finish_reason": "abort"', _DIED)
"""In an answer of a server that ends, or has lost its engine. In texts of a model, quotes are escaped."""
_REFUSES = (b"EngineCore encountered an issue", b"EngineDeadError", b"cannot schedule new futures after shutdown")
"""In an error of such a server."""


class _Card(msgspec.Struct):
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card] = []


def tells_end(status_code: int, body: bytes) -> bool:
    """Return whether an answer, or the end of a stream, is that of a server that ends or has lost its engine."""
    return any(sign in body for sign in (_ENDS if status_code == 200 else _REFUSES))


class VllmServer(EngineProcess):
    """Running server. Create it with `start`."""

    orphan_term_sec: ClassVar[float] = 12.0

    def __init__(
        self,
        order: EngineOrder,
        endpoint: Endpoint,
        key: str,
        spawned: Spawned,
        log: LogRing,
        folder: Path,
        probe: tuple[str, bytes],
    ) -> None:
        """`folder` is for temporary files; `probe` is the path and the body of a small request."""
        super().__init__(order, endpoint, (KEY_VARIABLE, key), spawned, log)
        self._folder = folder
        self._probe_path, self._probe = probe
        self._port_is_foreign = False
        self._is_asked_to_go = False

    @classmethod
    def start(cls, launch: Launch, model: VllmModel, program: Program, port: int, log: LogRing) -> VllmServer:
        """Spawn a server. Raises EngineFailed if it cannot be run."""
        key = secrets.token_hex(24)
        endpoint = Endpoint(
            port, headers=(("Authorization", f"Bearer {key}"),), knows_key=True, tells_end=tells_end
        )
        try:
            folder = Path(tempfile.mkdtemp(prefix="llama-router-", dir=_temporary()))
        except OSError as error:
            raise EngineFailed(
                f"its temporary folder cannot be made: {error}", "its folder cannot be made"
            ) from error
        argv = (
            *(sys.executable, "-I", "-S", str(minder.__file__), str(launch.stop_grace_sec), str(folder)),
            *(str(program.path), "serve", str(model.model_path), *model.flags, *launch.chosen.flags),
            *("--host", endpoint.host, "--port", str(port), "--served-model-name", model.alias),
        )
        if program.is_since(*_QUIET_SINCE):
            argv += ("--disable-access-log-for-endpoints", "/health,/metrics")
        env = {**without_secrets(os.environ), **_OFFLINE, **launch.shows, KEY_VARIABLE: key, "TMPDIR": str(folder)}
        order = EngineOrder(
            model.alias, argv, env, launch.load_stall_sec, launch.load_limit_sec, launch.stop_grace_sec
        )
        try:
            spawned = Spawned.by(argv, env, logs_stdout=True, death_signal=signal.SIGTERM)
        except EngineFailed:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(order, endpoint, key, spawned, log, folder, _probe_of(model))

    async def _until_it_serves(self) -> None:
        while await status(self.endpoint, "/health") != 200:  # noqa: ASYNC110 - only its port can be asked
            await asyncio.sleep(_POLL_SEC)
        if not await apart(self._listens):
            self._port_is_foreign = True
            told = f"another program listens on its port, {self.endpoint.port}"
            raise EngineFailed(told, told)

    def _listens(self) -> bool:
        """Return whether one of its processes has the socket that listens; True where the system does not say."""
        for pid in descendants(self.pid):
            try:
                sockets = psutil.Process(pid).net_connections("tcp")
            except psutil.NoSuchProcess:
                continue
            except psutil.AccessDenied:
                return True
            if any(each.status == psutil.CONN_LISTEN and each.laddr[1] == self.endpoint.port for each in sockets):
                return True
        return False

    async def healthy(self, limit_sec: float = PROBE_LIMIT_SEC) -> bool:
        """See `EngineHandle`. A request for one token tells a hang, unless there is much to compute before it."""
        loop = self._loop
        before_sec, began = self._computed_sec(), loop.time()
        try:
            answer = await asyncio.wait_for(self._answer(), limit_sec)
        except asyncio.TimeoutError:
            computed_sec = self._computed_sec() - before_sec
            return self.alive and computed_sec >= _COMPUTES * (loop.time() - began)
        return self.alive and answer is not None and (answer == CANNOT_ASK or answer < 500)

    async def _answer(self) -> int | None:
        answer = await status(self.endpoint, "/health")
        return answer if answer != 200 else await status(self.endpoint, self._probe_path, self._probe)

    def _computed_sec(self) -> float:
        """Return the processor time of all its processes."""
        total = 0.0
        for pid in descendants(self.pid):
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                total += times.user + times.system
        return total

    async def facts(self) -> Facts | None:
        said = await document(self.endpoint, "/v1/models", PROBE_LIMIT_SEC)
        try:
            cards = msgspec.json.decode(said.body if said else b"", type=_Cards).data
        except msgspec.MsgspecError:
            return None
        return Facts(cards[0].max_model_len) if cards else None

    async def _ask_to_go(self, grace_sec: float) -> None:
        self._is_asked_to_go = True
        os.kill(self.pid, signal.SIGTERM)  # to the minder, which kills all of it after the same time
        await asyncio.wait({self.exited}, timeout=grace_sec + _MINDER_SEC)

    def _kill_now(self) -> None:
        """Have the minder kill it, so that nothing is left in shared memory; soon after, kill both."""
        os.kill(self.pid, signal.SIGINT)
        self._loop.call_later(_MINDER_SEC, self._kill_with_minder)

    def _kill_with_minder(self) -> None:
        if self.alive:
            signal_group(self.pid, signal.SIGKILL)

    async def _close_pipes(self) -> None:
        await super()._close_pipes()
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)  # its minder was killed

    def _why(self, code: int) -> Ending:
        ending = super()._why(code)
        if self._port_is_foreign:
            return ending._replace(retry=Retry.AT_ONCE)
        if words.lack_of_memory(self.log.since(self._log_begin)) is not None and ending.wanted_mib is None:
            ending = ending._replace(wanted_mib={})
        return ending

    @staticmethod
    def retry_after(code: int, log: Sequence[str]) -> Retry:
        if code > 0 and any(map(_TAKEN_PORT.search, log)):
            return Retry.AT_ONCE
        return Retry.NEVER if code == _WRONG_USAGE or any(map(_FOR_GOOD.search, log)) else Retry.LATER

    def _complaints(self) -> str:
        log = self.log.since(self._log_begin)
        told = filter(None, (words.cause(log) or super()._complaints(), words.lack_of_memory(log)))
        return "; ".join(told)

    def _describe_exit(self, code: int) -> Reason:
        if code == 0 and not self._is_asked_to_go:
            told = "ended by itself"
            said = self._complaints()
            return Reason(f"{told}: {said}" if said else told, told)
        return super()._describe_exit(code)


def _temporary() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _LONGEST_FOLDER else "/tmp"  # noqa: S108 - the folder in it is for its owner only


def _probe_of(model: VllmModel) -> tuple[str, bytes]:
    """Return the path and the body of the smallest request that a model can be asked."""
    routes = model.routes or ()
    if "/v1/completions" in routes:
        path, asked = "/v1/completions", {"prompt": "a", "max_tokens": 1}
    elif "/v1/embeddings" in routes:
        path, asked = "/v1/embeddings", {"input": "a"}
    else:
        path, asked = "/v1/rerank", {"query": "a", "documents": ["a"]}
    return path, msgspec.json.encode({"model": model.alias, **asked})
