"""Servers started in containers: ready and healthy while they answer at a configured path.

Placeholders in arguments and environment are filled in as for a process, with the address inside the container.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.engines.base import Endpoint, Launch
from router.engines.command.entry import CommandModel
from router.engines.command.server import CommandServer, filled
from router.engines.container import ANY_ADDRESS, ContainerEngine
from router.engines.docker import ContainerOrder, Containers, Started
from router.engines.log_ring import LogRing
from router.engines.readiness import AnswersAtPath, Readiness
from router.engines.supervised import Limits
from router.scheduling.messages import Retry


class CommandContainer(AnswersAtPath, ContainerEngine):
    """Running server in a container. Create it with `start`."""

    def __init__(
        self, containers: Containers, started: Started, launch: Launch, model: CommandModel, log: LogRing
    ) -> None:
        endpoint = Endpoint(started.port, host=started.host, marks_end=False)
        limits = Limits(launch.load_stall_sec, launch.load_limit_sec, launch.stop_grace_sec)
        super().__init__(containers, started, endpoint, limits, log)
        self._readiness = Readiness(endpoint, model.ready_path, is_proxied=started.is_proxied)

    @classmethod
    async def start(
        cls, launch: Launch, model: CommandModel, env: Mapping[str, str], containers: Containers, log: LogRing
    ) -> CommandContainer:
        """Start a container. Raises EngineFailed."""
        assert model.container is not None
        port, file = str(model.container.port), model.file
        values = {"host": ANY_ADDRESS, "port": port, "model": str(file or ""), "alias": model.alias}
        order = ContainerOrder(
            model.alias,
            model.container,
            tuple(filled(word, values) for word in model.cmd),
            {name: filled(value, values) for name, value in env.items()},
            () if file is None else (file,),
        )
        return cls(containers, await containers.start(order), launch, model, log)

    @staticmethod
    def retry_after(code: int, log: Sequence[str]) -> Retry:
        return CommandServer.retry_after(code, log)
