"""Servers started by a command line: ready and healthy while they answer at a configured path.

A server's port was free when it was started, and an answer counts only while the child process runs; a program
that knows nothing of the router allows no better check. Placeholders in its arguments and environment are filled
in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
from collections.abc import Mapping, Sequence

import anyio

from router.engines import MARK_VARIABLE
from router.engines.base import Endpoint, Launch
from router.engines.command.entry import CommandModel
from router.engines.log_ring import LogRing
from router.engines.process import EngineOrder, EngineProcess, Spawned
from router.engines.readiness import AnswersAtPath, Readiness
from router.scheduling.messages import Retry
from router.system.privacy import without_secrets

_HOST = "127.0.0.1"
_SECOND_WORD_SEC = 2.0
"""Time between two SIGTERMs; a server that is loading may miss the first."""
_WRONG_ARGUMENTS = re.compile(
    r"unrecognized arguments?|unrecognized option|unknown (argument|flag|option)|invalid (argument|choice|option)",
    re.IGNORECASE,
)
_TAKEN_PORT = re.compile(r"address already in use|couldn't bind|port \d+ is (already )?in use", re.IGNORECASE)


def filled(text: str, values: Mapping[str, str]) -> str:
    """Replace `{port}` and the other placeholders; leave other braces unchanged."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


class CommandServer(AnswersAtPath, EngineProcess):
    """Running server. Create it with `start`."""

    def __init__(
        self,
        order: EngineOrder,
        model: CommandModel,
        endpoint: Endpoint,
        mark: str,
        spawned: Spawned,
        log: LogRing,
        values: Mapping[str, str],
    ) -> None:
        super().__init__(order, endpoint, (MARK_VARIABLE, mark), spawned, log)
        self._readiness = Readiness(endpoint, model.ready_path)
        values = {**values, "pid": str(self.pid)}
        self._stop_cmd = tuple(filled(word, values) for word in model.stop_cmd)
        self._cwd = model.cwd

    @classmethod
    def start(cls, launch: Launch, model: CommandModel, program: str, port: int, log: LogRing) -> CommandServer:
        """Spawn a server. Raises EngineFailed if its program cannot be run."""
        values = {"host": _HOST, "port": str(port), "model": str(model.file or ""), "alias": model.alias}
        mark = secrets.token_hex(16)
        env = {
            **without_secrets(os.environ),
            **{name: filled(value, values) for name, value in launch.shows.items()},
            MARK_VARIABLE: mark,
        }
        argv = (program, *(filled(word, values) for word in model.cmd[1:]))
        order = EngineOrder(
            model.alias, argv, env, launch.load_stall_sec, launch.load_limit_sec, launch.stop_grace_sec
        )
        # SIGTERM if the router dies: it may be a wrapper script, or have child processes.
        spawned = Spawned.by(argv, env, cwd=model.cwd, logs_stdout=True, death_signal=signal.SIGTERM)
        endpoint = Endpoint(port, host=_HOST, marks_end=False)
        return cls(order, model, endpoint, mark, spawned, log, values)

    async def _ask_to_go(self, grace_sec: float) -> None:
        if self._stop_cmd:
            await self._run_stop_cmd(grace_sec)
            await asyncio.wait({self.exited}, timeout=grace_sec)
        await self._terminate(min(_SECOND_WORD_SEC, grace_sec), grace_sec)

    @staticmethod
    def retry_after(code: int, log: Sequence[str]) -> Retry:
        if code > 0 and any(map(_TAKEN_PORT.search, log)):
            return Retry.AT_ONCE
        wrong = code == 2 and any(map(_WRONG_ARGUMENTS.search, log))
        return Retry.NEVER if wrong else Retry.LATER

    async def _run_stop_cmd(self, limit_sec: float) -> None:
        """Run the command; its output goes to the engine's log."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._stop_cmd,
                cwd=self._cwd,
                env=dict(self.order.env),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self.log.feed(f"stop_cmd: {self._stop_cmd[0]} cannot be run: {error}\n".encode())
            return
        try:
            with anyio.fail_after(limit_sec):
                said, _ = await process.communicate()
            self.log.feed(said)
        except TimeoutError:
            self.log.feed(f"stop_cmd: {self._stop_cmd[0]} took longer than {limit_sec:g} s\n".encode())
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
