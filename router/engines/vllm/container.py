"""vLLM in a container. It has a network and a /dev/shm of its own, and nothing of it outlives its first process.

So nobody minds its processes, and whoever answers at its address is vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import anyio

from router.engines.base import Launch
from router.engines.container import ANY_ADDRESS, ContainerEngine
from router.engines.docker import ContainerOrder, Containers, Started
from router.engines.log_ring import LogRing
from router.engines.supervised import Limits
from router.engines.vllm.engine import OFFLINE, QUIET, VllmEngine, arguments, endpoint_of, probe_of
from router.engines.vllm.entry import KEY_VARIABLE
from router.engines.vllm.model import VllmModel
from router.engines.vllm.program import Program
from router.formats import hf_cache
from router.system.readings import apart

_CACHE_VARIABLE = "HF_HUB_CACHE"


class VllmContainer(VllmEngine, ContainerEngine):
    """Running server in a container. Create it with `start`."""

    def __init__(
        self, containers: Containers, started: Started, launch: Launch, model: VllmModel, key: str, log: LogRing
    ) -> None:
        limits = Limits(launch.load_stall_sec, launch.load_limit_sec, launch.stop_grace_sec)
        super().__init__(containers, started, endpoint_of(started.host, started.port, key), limits, log)
        self._probe = probe_of(model)

    @classmethod
    async def start(
        cls, launch: Launch, model: VllmModel, program: Program, containers: Containers, log: LogRing
    ) -> VllmContainer:
        """Start a container. Raises EngineFailed."""
        spec, key = model.container, secrets.token_hex(24)
        assert spec is not None
        named, readable, writable = await apart(lambda: _files(model))
        offline: Mapping[str, str] = {_CACHE_VARIABLE: str(*writable)} if writable else OFFLINE
        order = ContainerOrder(
            model.alias,
            spec,
            arguments(launch, model, program, named, ANY_ADDRESS, spec.port),
            {**offline, **QUIET, **launch.shows, KEY_VARIABLE: key},
            readable,
            writable,
        )
        return cls(containers, await containers.start(order), launch, model, key, log)

    def _watch_work(self) -> Callable[[], Awaitable[bool]]:
        return self._computes

    async def _ask_to_go(self, grace_sec: float) -> None:
        """While it loads, it swallows SIGTERM, and has nothing to save."""
        self._is_asked_to_go = True
        if self._served_since is not None:
            await super()._ask_to_go(grace_sec)
            return
        with contextlib.suppress(Exception):  # whatever it is, the kill that follows reports it
            with anyio.fail_after(grace_sec):
                await self._started.container.kill()
            await asyncio.wait({self.exited}, timeout=grace_sec)


def _files(model: VllmModel) -> tuple[str, tuple[Path, ...], tuple[Path, ...]]:
    """Return what `vllm serve` is to load, and what has to be mounted for that: to be read, and to be written."""
    folder = Path(os.path.realpath(model.model_path))
    repository = hf_cache.repository_of(folder)
    if model.is_downloaded and repository is not None:
        assert model.repo is not None
        return model.repo, (), (repository.parent,)
    top = repository or folder
    links = (Path(os.path.realpath(file)) for file in folder.iterdir() if file.is_symlink())
    return str(folder), (top, *sorted({file for file in links if not file.is_relative_to(top)})), ()
