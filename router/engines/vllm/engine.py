"""What a running vLLM shows, whatever it runs in: how it becomes ready, whether it hangs, and why it ended.

Measured with vLLM 0.32. It listens only when it is loaded. `/health` answers 200 while the engine hangs or ends.
It exits with 0 after its engine has died. So it counts as alive only if it answers a request for one token, or
computes, and any exit that was not asked for is a crash.
"""

from __future__ import annotations

import asyncio
import re
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence

import anyio
import msgspec

from router.engines.base import PROBE_LIMIT_SEC, Endpoint, Facts, Launch
from router.engines.complaints import complaints
from router.engines.questions import CANNOT_ASK, document, status
from router.engines.supervised import SupervisedEngine
from router.engines.vllm import log as words
from router.engines.vllm.model import VllmModel
from router.engines.vllm.program import Program
from router.observe.reasons import Reason
from router.scheduling.messages import Retry
from router.system.devices import Device

_POLL_SEC = 0.025
COMPUTES = 0.1
"""Processor time as a part of a probe's time, from which on an engine that does not answer is at work."""
_QUIET_SINCE = (0, 32)
"""Version since which the access log can leave out what the router asks all the time."""
_WRONG_USAGE = 2
_TAKEN_PORT = re.compile(r"address already in use", re.IGNORECASE)
_FOR_GOOD = re.compile(
    r"does not recognize this architecture|are not supported for now|Cannot find model module|is greater than the "
    r"derived max_model_len|must be divisible by tensor parallel size|Sleep mode is not supported"
)
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""Variables, unless its entry sets them: nothing is to be told to anybody."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Variables, unless its entry sets them, of one whose files are there."""
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
    one, two, three = _ENDS if status_code == 200 else _REFUSES
    return one in body or two in body or three in body  # any() would take longer than the search


def endpoint_of(host: str, port: int, key: str) -> Endpoint:
    """Return the endpoint of a server that was given a key."""
    return Endpoint(
        port, host=host, headers=(("Authorization", f"Bearer {key}"),), knows_key=True, tells_end=tells_end
    )


def arguments(
    launch: Launch, model: VllmModel, program: Program, named: str, host: str, port: int
) -> tuple[str, ...]:
    """Return the arguments of `vllm serve` for a model, a folder or repository that is `named` so."""
    address = ("--host", host, "--port", str(port), "--served-model-name", model.alias)
    quiet = ("--disable-access-log-for-endpoints", "/health,/metrics") if program.is_since(*_QUIET_SINCE) else ()
    return (named, *model.flags, *launch.chosen.flags, *address, *quiet)


class VllmEngine(SupervisedEngine):
    """Running vLLM."""

    _probe: tuple[str, bytes]
    """Path and body of a small request; see `probe_of`."""
    _is_asked_to_go = False
    _served_since: int | None = None
    """Number of lines that it had logged when it began to serve; None before."""

    async def _until_it_serves(self) -> None:
        while not await self._is_up():  # noqa: ASYNC110 - only its port can be asked
            await asyncio.sleep(_POLL_SEC)
        self._served_since = self.log.total

    async def _is_up(self) -> bool:
        """A question that is not answered in time is asked again: what forwards it may lose it."""
        try:
            with anyio.fail_after(PROBE_LIMIT_SEC):
                return await status(self.endpoint, "/health") == 200
        except TimeoutError:
            return False

    async def healthy(self, limit_sec: float = PROBE_LIMIT_SEC) -> bool:
        """See `EngineHandle`. A request for one token tells a hang, unless there is much to compute before it."""
        computes = self._watch_work()
        try:
            with anyio.fail_after(limit_sec):
                answer = await self._answer()
        except TimeoutError:
            return await computes() and self.alive
        return self.alive and answer is not None and (answer == CANNOT_ASK or answer < 500)

    async def _answer(self) -> int | None:
        answer = await status(self.endpoint, "/health")
        return answer if answer != 200 else await status(self.endpoint, *self._probe)

    @abstractmethod
    def _watch_work(self) -> Callable[[], Awaitable[bool]]:
        """Begin to watch its processes; what is returned tells whether they have computed since, or compute."""

    async def facts(self) -> Facts | None:
        said = await document(self.endpoint, "/v1/models", PROBE_LIMIT_SEC)
        try:
            cards = msgspec.json.decode(said.body if said else b"", type=_Cards).data
        except msgspec.MsgspecError:
            return None
        return Facts(cards[0].max_model_len) if cards else None

    def _wanted_mib(self, log: Sequence[str]) -> Mapping[Device, int] | None:
        wanted_mib = super()._wanted_mib(log)
        return {} if wanted_mib is None and words.lack_of_memory(log) is not None else wanted_mib

    @staticmethod
    def retry_after(code: int, log: Sequence[str]) -> Retry:
        if code > 0 and any(map(_TAKEN_PORT.search, log)):
            return Retry.AT_ONCE
        return Retry.NEVER if code == _WRONG_USAGE or any(map(_FOR_GOOD.search, log)) else Retry.LATER

    def _complaints(self) -> str:
        if self._served_since is None:
            log = self.log.since(self._log_begin)
        else:
            log = words.without_requests(self.log.since(self._served_since))
        told = filter(None, (words.cause(log) or complaints(log), words.lack_of_memory(log)))
        return "; ".join(told)

    def _describe_exit(self, code: int) -> Reason:
        if code == 0 and not self._is_asked_to_go and not self.out_of_memory:
            told = "ended by itself"
            said = self._complaints()
            return Reason(f"{told}: {said}" if said else told, told)
        return super()._describe_exit(code)


def probe_of(model: VllmModel) -> tuple[str, bytes]:
    """Return the path and the body of the smallest request that a model can be asked."""
    routes = model.routes or ()
    if "/v1/completions" in routes:
        path, asked = "/v1/completions", {"prompt": "a", "max_tokens": 1}
    elif "/v1/embeddings" in routes:
        path, asked = "/v1/embeddings", {"input": "a"}
    else:
        path, asked = "/v1/rerank", {"query": "a", "documents": ["a"]}
    return path, msgspec.json.encode({"model": model.alias, **asked})
