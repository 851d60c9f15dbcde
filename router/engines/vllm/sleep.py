"""Sleep of a vLLM, level 1: its weights go to RAM, its KV cache is dropped, its GPUs are free for others.

Measured with vLLM 0.32: the routes exist only with `VLLM_SERVER_DEV_MODE=1`, and its key does not guard them. A
200 says nothing of what was freed: on the CPU that is nothing. While it sleeps, `/health` answers 200 and chats
hang.
"""

from __future__ import annotations

import anyio

from router.engines.base import Endpoint, EngineFailed
from router.engines.questions import document, status

FLAG = "--enable-sleep-mode"
VARIABLE = "VLLM_SERVER_DEV_MODE"


class VllmSleeper:
    """See `Sleeper`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def fall_asleep(self, limit_sec: float) -> None:
        """See `Sleeper`. It first answers what it computes, which can only be a health probe."""
        await self._ask("/sleep?level=1&mode=wait", limit_sec)

    async def wake_up(self, limit_sec: float) -> None:
        """See `Sleeper`."""
        await self._ask("/wake_up", limit_sec)
        said = await document(self._endpoint, "/is_sleeping", limit_sec)  # after what it has begun to compute
        if said is None or b"false" not in said.body.lower():
            told = "it did not say whether it is awake" if said is None else "it says that it is still asleep"
            raise EngineFailed(told, told)

    async def _ask(self, path: str, limit_sec: float) -> None:
        name = path.partition("?")[0]
        try:
            with anyio.fail_after(limit_sec):
                answer = await status(self._endpoint, path, b"")
        except TimeoutError:
            told = f"it did not answer {name} within {limit_sec:g} s"
            raise EngineFailed(told, told) from None
        if answer != 200:
            told = f"it answered {name} with {answer}" if answer is not None else f"it did not answer {name}"
            raise EngineFailed(told, told)
