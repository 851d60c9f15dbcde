"""Containers of engines, by the API of a Docker or Podman daemon on this machine.

The library is an extra and is imported when the first container is needed. Containers carry labels: the model, and
the router, by a name that its state directory keeps. What a killed router has left is removed by the next one with
that directory. If the router was in a container itself, a third label names that: once it does not exist any more,
whichever router starts a container next removes what was left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import re
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from router.config.schema import Container
from router.engines.base import EngineFailed
from router.system.processes import birth
from router.system.state import State

if TYPE_CHECKING:
    from aiodocker import Docker
    from aiodocker.containers import DockerContainer

_log = logging.getLogger("router")

ROUTER_LABEL = "llama-router.router"
MODEL_LABEL = "llama-router.model"
HOME_LABEL = "llama-router.home"
LOOPBACK = "127.0.0.1"
_ANSWER_SEC = 60.0
"""Time limit of each request to the daemon, except those that wait for a container."""
_LEFTOVERS_SEC = 20.0
_GONE = 900
"""Status by which the library reports a daemon that cannot be reached."""
_SOCKETS = ("/var/run/docker.sock", "/run/podman/podman.sock")
_SOCKETS_OF_USER = ("docker.sock", "podman/podman.sock")
_NO_LIBRARY = "containers need aiodocker: pip install 'llama-router[docker]'"
_OWN_ID = re.compile(r"/containers/([0-9a-f]{64})/")
"""The router's own container among its mounts: Docker and Podman mount files such as /etc/hostname from there."""
_NAME_PART = re.compile(r"[^a-zA-Z0-9_.-]+")
_SIZE = re.compile(r"(\d+)([bkmg]?)b?", re.IGNORECASE)


class _Record(msgspec.Struct, frozen=True):
    router: str
    """Value of the label."""
    may_be_left: bool
    """Whether containers may exist."""


@dataclass(frozen=True, slots=True)
class ContainerOrder:
    """Everything needed to start a container."""

    alias: str
    container: Container
    command: tuple[str, ...]
    """Arguments of the entrypoint; empty: those of the image."""
    env: Mapping[str, str]
    readable: Sequence[Path] = ()
    """Files and folders of the model, each mounted read-only under its own path."""
    writable: Sequence[Path] = ()
    """Folders mounted under their own paths, and created where they are missing."""


@dataclass(frozen=True, slots=True)
class Started:
    """A started container, with the connection to its daemon."""

    docker: Docker
    container: DockerContainer
    name: str
    host: str
    port: int
    is_proxied: bool
    """Whether its port is published, and so forwarded by the daemon."""
    pid: int | None
    """First process; None if this machine's processes do not include it."""
    born: str | None
    command: tuple[str, ...]
    """Its image, and the arguments of the image's entrypoint."""


@dataclass(frozen=True, slots=True)
class _Home:
    """The container that the router itself runs in, if any."""

    networks: frozenset[str] = frozenset()
    mounts: Mapping[str, str] = field(default_factory=dict)
    """Sources on the daemon's machine by path in the container."""
    id: str = ""
    """Empty: it runs in none."""

    def on_daemon(self, path: str) -> str | None:
        """Return the path on the daemon's machine; None if it exists only in the router's container."""
        inner = PurePosixPath(path)
        for mount in sorted(self.mounts, key=len, reverse=True):
            if inner.is_relative_to(mount):
                return str(PurePosixPath(self.mounts[mount]) / inner.relative_to(mount))
        return None if self.id else path

    def own_name_of(self, network: str) -> str:
        """Return the full name of a network that the router is in, too: Compose puts the project's before it."""
        named = [ours for ours in self.networks if ours == network or ours.endswith(f"_{network}")]
        return named[0] if len(named) == 1 else network

    @property
    def reaches_loopback(self) -> bool:
        return not self.id or "host" in self.networks


def address() -> str | None:
    """Return the daemon's address as configured or found; None if there is none."""
    if named := os.environ.get("DOCKER_HOST"):
        return named
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    own = [os.path.join(runtime, name) for name in _SOCKETS_OF_USER] if runtime else []
    return next((f"unix://{path}" for path in (*_SOCKETS, *own) if os.path.exists(path)), None)


class Containers:
    """Containers of this router. Use it on one event loop."""

    def __init__(self, state: State) -> None:
        loss = "containers that outlive this router, should it be killed, are not found by the next one."
        self._file = state.file("containers", _Record, loss)
        self._record: _Record | None = None
        self._alive: set[str] = set()
        self._starting = 0
        """Containers being started, which are not known as alive yet."""
        self._is_one_left = False
        """Whether one could not be removed."""
        self._noting = asyncio.Lock()
        self._home: _Home | None = None
        self._creating = asyncio.Lock()
        """Held from a look for leftovers until a new container is known as alive."""

    def end_leftovers(self) -> None:
        """Remove the containers that a dead router has left. Blocks; call it before the event loop."""
        record = self._record = self._file.read()
        if record is None or not record.may_be_left:
            return
        try:
            removed = asyncio.run(_remove_leftovers(record.router))
        except (EngineFailed, TimeoutError) as error:
            _log.warning("containers left by a killed router may still run: %s", error or "no answer from Docker")
            return
        if removed:
            _log.warning("removed containers left by a killed router: %s", ", ".join(removed))
        self._note(may_be_left=False)

    def _note(self, *, may_be_left: bool) -> None:
        router = secrets.token_hex(8) if self._record is None else self._record.router
        self._record = _Record(router, may_be_left)
        self._file.write(self._record)

    async def _note_what_is(self) -> None:
        """Have the record say whether containers may exist."""
        async with self._noting:
            may_be_left = bool(self._alive or self._starting or self._is_one_left)
            if self._record is None or self._record.may_be_left != may_be_left:
                await asyncio.to_thread(self._note, may_be_left=may_be_left)

    async def start(self, order: ContainerOrder) -> Started:
        """Create and start a container. Raises EngineFailed."""
        self._starting += 1
        try:
            await self._note_what_is()
            assert self._record is not None
            docker = connect()
            try:
                if self._home is None:
                    self._home = await _home(docker)
                return await self._started(docker, order, self._home, self._record.router)
            except BaseException:
                await docker.close()
                raise
        finally:
            self._starting -= 1

    async def _started(self, docker: Docker, order: ContainerOrder, home: _Home, router: str) -> Started:
        spec = order.container
        if spec.network is not None:
            spec = spec.model_copy(update={"network": home.own_name_of(spec.network)})
        shares_network = spec.network in home.networks
        if not shares_network and not home.reaches_loopback:
            ours = ", ".join(sorted(home.networks))
            reason = f"the router runs in a container itself: set container.network to a network of both ({ours})"
            raise EngineFailed(reason, "its container would not be reached")
        part = _NAME_PART.sub("-", order.alias).strip("-.") or "model"
        name = spec.name or f"llama-router-{part}-{secrets.token_hex(3)}"
        config = _request(replace(order, container=spec), home, router, publishes=not shares_network)
        command = (spec.image, *order.command)
        container: DockerContainer | None = None
        try:
            async with _in_plain_words(spec, name):
                async with self._creating:
                    await _remove_all(router, docker, apart=self._alive)
                    self._is_one_left = False
                    container = await docker.containers.create(config, name=name)
                    self._alive.add(container.id)
                await container.start()
                shown = await container.show()
                pid = _visible(shown["State"]["Pid"], container.id)
                born = None if pid is None else birth(pid)
                if shares_network:
                    return Started(docker, container, name, name, spec.port, False, pid, born, command)
                ports = shown["NetworkSettings"]["Ports"] or {}
                published = next(iter(ports.get(f"{spec.port}/tcp") or ()), None)
        except BaseException:
            if container is not None:
                await self.remove(container)
            raise
        if published is None:  # it has exited already: its log says why
            return Started(docker, container, name, LOOPBACK, spec.port, True, pid, born, command)
        return Started(docker, container, name, LOOPBACK, int(published["HostPort"]), True, pid, born, command)

    async def remove(self, container: DockerContainer, limit_sec: float | None = None) -> None:
        """Remove a container, whatever its state. One that cannot be removed now is removed by the next start."""
        try:
            with anyio.fail_after(limit_sec):
                await _remove(container)
        except (EngineFailed, TimeoutError):
            self._is_one_left = True
        self._alive.discard(container.id)
        await self._note_what_is()


def connect() -> Docker:
    """Return a client of the daemon. Raises EngineFailed."""
    try:
        from aiodocker import Docker
        from aiohttp import ClientTimeout
    except ImportError:
        raise EngineFailed(_NO_LIBRARY, _NO_LIBRARY) from None
    place = address()
    if place is None:
        reason = f"there is no Docker or Podman daemon ({_SOCKETS[0]}): start it, or set DOCKER_HOST"
        raise EngineFailed(reason, "there is no Docker or Podman daemon")
    try:
        return Docker(url=place, timeout=ClientTimeout(total=_ANSWER_SEC))
    except ValueError as error:
        reason = f"DOCKER_HOST={place} is not understood: {error}"
        raise EngineFailed(reason, "DOCKER_HOST is not understood") from error


async def problem_of(spec: Container) -> str | None:
    """Return why a container could not be created; None if nothing is known to be wrong."""
    try:
        docker = connect()
    except EngineFailed as error:
        return str(error)
    async with docker:
        try:
            async with _in_plain_words(spec, ""):
                await docker.images.inspect(spec.image)
                if spec.network is not None:
                    await (await docker.networks.get(spec.network)).show()
        except EngineFailed as error:
            return str(error)
    return None


@contextlib.asynccontextmanager
async def _in_plain_words(spec: Container | None, name: str) -> AsyncIterator[None]:
    """Raise EngineFailed for errors of the daemon and for its silence."""
    from aiodocker import DockerError
    from aiohttp import ClientError

    try:
        yield
    except DockerError as error:
        raise EngineFailed(*_plain(error.status, error.message, spec, name)) from error
    except asyncio.TimeoutError as error:
        told = f"the Docker daemon has not answered within {_ANSWER_SEC:g} s"
        raise EngineFailed(told, told) from error
    except (ClientError, OSError, ValueError) as error:
        raise EngineFailed(
            f"the Docker daemon has broken off: {error}", "the Docker daemon has broken off"
        ) from error


def _plain(status: int, message: str, spec: Container | None, name: str) -> tuple[str, str]:
    """Return reason and safe reason for an error of the daemon."""
    said = message.lower()
    if status == _GONE:
        where = address() or ""
        if "permission denied" in said:
            reason = f"this user may not use the Docker daemon at {where}: add it to the socket's group"
            return reason, "this user may not use the Docker daemon"
        reason = f"there is no Docker daemon at {where} ({message.rpartition('[')[2].rstrip(']')}): start it"
        return reason, "the Docker daemon does not run"
    if spec is not None:
        if status == 404 and "no such image" in said:
            reason = f"there is no image {spec.image} on this machine: docker pull {spec.image}"
            return reason, "its image is not there"
        if spec.network is not None and "network" in said and "not found" in said:
            reason = f"there is no network {spec.network}: docker network create {spec.network}"
            return reason, "its network is not there"
        if "is already in use" in said and "name" in said:
            reason = f"another container has the name {name}: docker rm -f {name}, or set another container.name"
            return reason, "the name of its container is taken"
        if spec.gpus and ("device driver" in said or "unresolvable cdi" in said or "nvidia" in said):
            reason = f"containers cannot use GPUs here: install NVIDIA's container toolkit ({message})"
            return reason, "containers cannot use GPUs here"
    return f"Docker: {message}", "its container cannot be started"


async def _remove_leftovers(router: str) -> list[str]:
    with anyio.fail_after(_LEFTOVERS_SEC):
        return await _remove_all(router)


async def _remove_all(router: str, docker: Docker | None = None, *, apart: set[str] | None = None) -> list[str]:
    """Remove a router's containers, except those whose ids are in `apart`; return their names.

    So with those of routers whose own container is gone. Raises EngineFailed.
    """
    async with contextlib.AsyncExitStack() as opened:
        client = docker if docker is not None else await opened.enter_async_context(connect())
        async with _in_plain_words(None, ""):
            found = await client.containers.list(all=True)
        existing = {container.id for container in found}
        removed = []
        for container in found:
            labels = container["Labels"] or {}
            is_ours = labels.get(ROUTER_LABEL) == router and container.id not in (apart or ())
            if is_ours or labels.get(HOME_LABEL, container.id) not in existing:
                await _remove(container)
                removed.append(container["Names"][0].lstrip("/"))
        return removed


async def _remove(container: DockerContainer) -> None:
    """Kill and remove a container; no error if it is gone. Raises EngineFailed."""
    from aiodocker import DockerError

    async with _in_plain_words(None, ""):
        try:
            await container.delete(force=True, v=True)
        except DockerError as error:
            if error.status not in (404, 409):  # 409: it is being removed
                raise


async def _home(docker: Docker) -> _Home:
    """Look for the router's own container at the daemon. Raises EngineFailed if the daemon is not there."""
    from aiodocker import DockerError

    for name in await asyncio.to_thread(_own_ids):
        async with _in_plain_words(None, ""):
            try:
                shown = await docker.containers.container(name).show()
            except DockerError as error:
                if error.status != 404:
                    raise
                continue
        if shown["Id"].startswith(name):  # and not a container that is named like this machine
            sources = {mount["Destination"]: mount["Source"] for mount in shown["Mounts"] if mount.get("Source")}
            return _Home(frozenset(shown["NetworkSettings"]["Networks"]), sources, shown["Id"])
    return _Home()


def _own_ids() -> list[str]:
    """Return what may be the id of the router's own container, or its beginning."""
    mounts = ""
    with contextlib.suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text()
    return list(dict.fromkeys((*_OWN_ID.findall(mounts), platform.node() or "localhost")))


def _visible(pid: int, container: str) -> int | None:
    """Return the pid if it names the container's process here, and not, as in another container, any or none."""
    try:
        return pid if pid > 0 and container in Path(f"/proc/{pid}/cgroup").read_text() else None
    except OSError:
        return None


def _request(order: ContainerOrder, home: _Home, router: str, *, publishes: bool) -> dict[str, Any]:
    """Return the body of the request that creates a container. Raises EngineFailed."""
    spec = order.container
    host: dict[str, Any] = {
        "Binds": [
            *(_bind(volume, home) for volume in spec.volumes),
            *(f"{_on_daemon(path, home)}:{path}" for path in order.writable),
        ],
        "Mounts": [
            {"Type": "bind", "Source": _on_daemon(path, home), "Target": str(path), "ReadOnly": True}
            for path in order.readable
        ],
    }
    if publishes:
        host["PortBindings"] = {f"{spec.port}/tcp": [{"HostIp": LOOPBACK, "HostPort": ""}]}
    if spec.network is not None:
        host["NetworkMode"] = spec.network
    if spec.shm_size is not None:
        host["ShmSize"] = _bytes(spec.shm_size)
    if spec.ipc is not None:
        host["IpcMode"] = spec.ipc
    if spec.gpus is not None:
        host["DeviceRequests"] = [{"Count": -1, "Capabilities": [["gpu"]]}]
    if spec.devices:
        host["Devices"] = [_device(text) for text in spec.devices]
    body: dict[str, Any] = {
        "Image": spec.image,
        "Env": [f"{name}={value}" for name, value in order.env.items()],
        "Labels": {ROUTER_LABEL: router, MODEL_LABEL: order.alias, **({HOME_LABEL: home.id} if home.id else {})},
        "ExposedPorts": {f"{spec.port}/tcp": {}},
        "HostConfig": host,
    }
    if order.command:
        body["Cmd"] = list(order.command)
    if spec.entrypoint:
        body["Entrypoint"] = list(spec.entrypoint)
    if spec.user is not None:
        body["User"] = spec.user
    return body


def _on_daemon(path: Path, home: _Home) -> str:
    """Return where a path of the router's is on the daemon's machine. Raises EngineFailed."""
    source = home.on_daemon(str(path))
    if source is None:
        reason = f"{path} is in the router's own container only: mount its folder into that"
        raise EngineFailed(reason, "its file is in the router's own container only")
    return source


def _bind(volume: str, home: _Home) -> str:
    source, colon, rest = volume.partition(":")
    is_path = source.startswith("/")
    return f"{(home.on_daemon(source) or source) if is_path else source}{colon}{rest}"


def _device(text: str) -> dict[str, str]:
    outside, *more = text.split(":")
    inside: Sequence[str] = [*more, *(outside, "rwm")[len(more) :]]
    return {"PathOnHost": outside, "PathInContainer": inside[0], "CgroupPermissions": inside[1]}


def _bytes(size: str) -> int:
    found = _SIZE.fullmatch(size)
    assert found is not None  # by the schema
    return int(found[1]) << {"": 0, "b": 0, "k": 10, "m": 20, "g": 30}[found[2].lower()]
