"""`llama-router serve`: builds the router from its configuration, runs it, and shuts it down in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from router.api.app import create_app
from router.api.service_metrics import Service
from router.catalog.cards import Cards
from router.catalog.library import Library
from router.catalog.load import Load, Loaded
from router.config.changes import changed_settings, changes_between, in_words, needs_restart
from router.config.problems import CannotServe, ConfigError
from router.config.reloads import Reloads
from router.config.resolved import DEFAULT_ENGINE, Config, ModelConfig
from router.config.schema import Api, System
from router.config.show import fingerprint
from router.config.snapshots import Looks
from router.config.source import Source
from router.dataplane.exchange import Exchanges
from router.dataplane.limits import Door
from router.dataplane.on_uvicorn import Server
from router.dataplane.server import HttpProtocol, PagesProtocol
from router.dialects.translators import TRANSLATORS
from router.engines.base import EngineBackend, NoEngine
from router.engines.docker import Containers
from router.engines.health import HealthMonitor
from router.engines.launcher import LocalLauncher
from router.engines.llamacpp.capability import purpose_of
from router.engines.orphans import EngineRecord
from router.engines.registry import KINDS
from router.formats import hf_cache
from router.hardware.devices import Devices
from router.hardware.disks import Disks
from router.http.auth import Keyring
from router.http.origins import Browsers
from router.kv.store import KvStore, folder_of
from router.memory.measurements import Entry, Learned
from router.observe import logs
from router.observe.events import Events, RequestsDone
from router.observe.logs import Logs
from router.observe.statistics import Telemetry
from router.observe.timeline import Memory, Timeline
from router.runtime.dispatcher import Dispatcher
from router.runtime.wait_log import WaitLog
from router.scheduling.messages import ModelState
from router.store.creations import Creations
from router.store.downloads import Downloads
from router.store.watch import watch, watch_files
from router.system import sighup, threads
from router.system.heap import give_memory_back, share_one_heap
from router.system.printable import line as printable_line
from router.system.processes import allow_many_files, notice_vanished_peers, reap_orphans
from router.system.readings import apart
from router.system.state import State, StateHeld, configured_path
from router.system.systemd import Notifier

if TYPE_CHECKING:
    from router.observe.tracing import Tracing

_log = logging.getLogger("router")

_BACKLOG = 2048
_OTHER_FILES = 512
"""Open files other than client connections: connections to engines, pipes, spare and refused connections."""
_KEEP_ALIVE_SEC = 75
_THREADS_TURN_SEC = 0.0001
"""Longest time that a thread reading files or memory may delay each callback of the event loop. uvloop gives up
Python's lock between two of them, so a hundred readable connections wait that long a hundred times."""
_YOUNG_OBJECTS = 5_000
"""Number of new objects that triggers a garbage collection, during which no request is served."""
_FIRST_MODEL = "hf.co/ggml-org/Qwen3-4B-GGUF:Q4_K_M"
"""Model suggested if none is available."""
_LAST_WORDS_SEC = 10
"""Time allowed for shutdown in addition to the grace periods of requests and engines."""


def serve(load: Load) -> None:
    """Serve until a signal arrives. Raises CannotServe."""
    share_one_heap()
    loaded = load(None, None)
    with contextlib.closing(_set_up_logs(loaded.config.system)) as log:
        _serve(loaded, load, log)


def _set_up_logs(system: System) -> Logs:
    log_dir = Path(system.log_dir) if system.log_dir is not None else None
    try:
        return logs.set_up(debug=system.debug, structured=system.structured_logs, log_dir=log_dir)
    except OSError as error:
        raise CannotServe(f"log_dir: {log_dir} cannot be created: {error.strerror}.") from error


def _serve(loaded: Loaded, load: Load, log: Logs) -> None:
    config = loaded.config
    with contextlib.ExitStack() as opened:
        api = config.api
        ports = (api.port,) if api.ollama_port is None else (api.port, api.ollama_port)
        listeners = [opened.enter_context(contextlib.closing(_listen(config, port))) for port in ports]
        state = opened.enter_context(contextlib.closing(_open_state(config, listeners[0].getsockname()[1])))
        record = EngineRecord(state)
        containers = Containers(state)
        record.end_leftovers()  # before free memory is measured
        containers.end_leftovers()
        store = state.file("footprints", list[Entry], "what was measured of engines is forgotten at the end")
        learned = Learned(store, psutil.boot_time())
        kv_store = KvStore.open(folder_of(config.kv_store, state.path), config.kv_store)
        opened.enter_context(contextlib.closing(kv_store))
        launcher = LocalLauncher(config.system.base_port, record, state.path, containers, kv_store)
        backends = _backends(config.system, launcher, learned)
        uses_gpus = any(backends[engine].uses_gpus for engine in config.engines)
        gpu_devices = config.system.gpu_devices if uses_gpus else ()
        devices = Devices(gpu_devices, listed=backends[DEFAULT_ENGINE].gpu_list(gpu_devices or ()))
        devices.read_blocking()
        dispatcher = Dispatcher(config, backends, devices, learned, Events())
        _run(_Service(loaded, load, dispatcher, listeners, record, state, log, kv_store).run())


def _backends(system: System, launcher: LocalLauncher, learned: Learned) -> dict[str, EngineBackend]:
    """Return a backend of each kind of engine. Raises CannotServe."""
    try:
        return {name: kind.backend(system, launcher, learned) for name, kind in KINDS.items()}
    except NoEngine as error:
        raise CannotServe(str(error)) from error


def _tracing() -> Tracing:
    try:
        from router.observe.tracing import Tracing
    except ImportError as error:
        raise CannotServe("system.tracing needs OpenTelemetry: pip install 'llama-router[otel]'.") from error
    return Tracing()


def _run(service: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:  # not available for this platform
        asyncio.run(service)
    else:
        uvloop.run(service)


def _listen(config: Config, port: int) -> socket.socket:
    host = config.api.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    notice_vanished_peers(listener)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            user = _user_of_port(config, port) or "perhaps another llama-router"
            flag = "--port" if port == config.api.port else "--ollama-port"
            raise CannotServe(f"Port {port} on {host} is in use: {user}. Choose another with {flag}.") from error
        raise CannotServe(f"Cannot listen on {host}:{port}: {error.strerror}.") from error
    return listener


def _user_of_port(config: Config, port: int) -> str | None:
    """Describe the process that listens on the port; None if it cannot be determined."""
    path = configured_path(config.system.state_dir, port, os.environ)
    holder = State.holder(path) if path is not None else None
    if holder is not None and holder.port == port:
        return str(holder)
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                process = psutil.Process(connection.pid)
                since = datetime.fromtimestamp(process.create_time()).astimezone().isoformat(" ", "seconds")
                return f"{process.name()} with pid {process.pid}, running since {since}"
    return None


def _open_state(config: Config, port: int) -> State:
    """Open the state directory. A configured one is required; without the default one, the router still serves."""
    system = config.system
    path = configured_path(system.state_dir, port, os.environ)
    if config.api.port == 0 and not system.state_dir:
        return State()  # the next router gets another port and would not find the directory
    try:
        if path is None:
            raise FileNotFoundError(errno.ENOENT, "HOME is not set")
        return State.open(path, port)
    except StateHeld as held:
        raise CannotServe(f"{held}. Stop that router, or set another state_dir for this one.") from held
    except OSError as error:
        reason = f"{path or 'state_dir'} cannot be used: {error.strerror or error}"
        if system.state_dir:
            raise CannotServe(f"system.state_dir: {reason}.") from error
        _log.warning(
            "%s. Measurements will not be saved, and engines that outlive a killed router will not be cleaned up. "
            "Set LLAMA_ROUTER_STATE_DIR to a writable folder.",
            reason,
        )
        return State()


class _Service:
    def __init__(
        self,
        loaded: Loaded,
        load: Load,
        dispatcher: Dispatcher,
        listeners: list[socket.socket],
        record: EngineRecord,
        state: State,
        log: Logs,
        kv_store: KvStore,
    ) -> None:
        config = loaded.config
        self._loaded = loaded
        self._started_with = config
        self._load = partial(load, state.path)
        self._state_path = state.path
        self._listeners = listeners
        self._stop = asyncio.Event()
        self._record = record
        self._notifier = Notifier(os.environ)
        self._dispatcher = dispatcher
        self._dispatcher.engine_file = log.engine_file
        log.log_refusals(self._dispatcher.events)
        if config.system.access_log:
            log.log_requests(self._dispatcher.events)
        self._log = log
        self._tracing = _tracing() if config.system.tracing else None
        if self._tracing is not None:
            self._dispatcher.events.listen(RequestsDone, self._tracing.note)
        self._keyring = Keyring(config.api)
        self._kv_store = kv_store
        self._dispatcher.states_of = kv_store.files_of
        kv_store.is_shared = lambda: not self._keyring.required
        self._creations = Creations(state, self.look_again)
        self._reloading = asyncio.Lock()
        self._reloaded = Reloads(fingerprint(config))
        self._looks = Looks()
        self._reloads: asyncio.Task[None] | None = None
        self._reload_wanted = False
        self._look_failed = ""

    async def run(self) -> None:
        downloads = Downloads(self.look_again, self._dispatcher.sites)
        browsers = Browsers(self._loaded.config.api, self._keyring)
        cards = Cards()
        library = Library(lambda: self._dispatcher.config, downloads, self._creations)
        exchanges = Exchanges(self._dispatcher, self._keyring, browsers, cards, TRANSLATORS)
        waits = WaitLog(self._dispatcher)
        timeline = self._timeline()
        protocols = partial(HttpProtocol, exchanges), partial(PagesProtocol, exchanges)
        door = Door(*protocols, _most_clients(self._loaded.config.api), self._dispatcher.events)
        disks = Disks(self._disks)
        app = create_app(
            self._dispatcher,
            self._keyring,
            browsers,
            self.reload,
            library,
            cards,
            self._kv_store,
            exchanges,
            waits,
            timeline,
            Service(door, downloads, self._reloaded, disks),
        )
        server = Server(app, door, self._on_ready, keep_alive_sec=_KEEP_ALIVE_SEC)
        loop = asyncio.get_running_loop()
        loop.set_default_executor(threads.pool("files"))
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._terminate)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        sighup.release()
        self._dispatcher.start()
        keep = self._dispatcher.background.keep
        health = HealthMonitor(
            lambda: self._dispatcher.running.values(),
            self._dispatcher.scheduler,
            lambda: self._dispatcher.config.system,
        )
        kept = [
            keep("health monitor", health.run),
            keep("reasons for waits", waits.watch),
            keep("notifications to systemd", lambda: self._notifier.keep_telling(self._status)),
            keep("lookup of the machine's names", browsers.ask_for_own_names),
            keep("return of memory", give_memory_back),
            keep("age of saved conversations", self._kv_store.keep_young),
            keep("timeline", timeline.keep),
            keep("free space of disks", disks.watch),
        ]
        if os.getpid() == 1:
            kept.append(keep("reaping of orphans", reap_orphans))
        watching = (
            keep("watch of model files", lambda: watch(lambda: self._loaded.folders, self.look_again)),
            keep("watch of configured files", lambda: watch_files(lambda: self._loaded.files, self.look_again)),
        )
        serving = asyncio.create_task(server.serve(self._listeners))
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in watching:
            task.cancel()
        try:
            await downloads.shut_down()
            await self._dispatcher.shut_down()
        finally:
            for task in kept:
                task.cancel()
            server.end()
            await serving
            await self._record.saved()
            self._dispatcher.events.settle()
            if self._tracing is not None:
                self._tracing.close()
        _log.info("stopped")

    def _timeline(self) -> Timeline:
        events, devices = self._dispatcher.events, self._dispatcher.devices

        def memory() -> dict[str, Memory]:
            return {
                str(device): Memory(reading.total_mib - reading.free_mib, reading.total_mib)
                for device, reading in devices.last.devices.items()
            }

        return Timeline(events, self._dispatcher.scheduler, Telemetry(events, time.monotonic), memory)

    async def reload(self) -> dict[str, Any]:
        """Read the configuration again and apply it. Raises ConfigError without any change."""
        async with self._reloading:
            try:
                loaded = await self._looks.take(partial(self._load, self._loaded), self._places())
            except Exception:
                self._reloaded.failed()
                raise
            before, after = self._loaded.config, loaded.config
            self._keyring.set(after.api)
            self._kv_store.settings = after.kv_store
            self._dispatcher.apply(after)
            self._loaded = loaded
            await self._forget_conversations(before, after)
            self._reloaded.succeeded(await apart(partial(fingerprint, after)))
        changes = {
            **changes_between(before, after),
            "settings": changed_settings(before, after),
            "needs_restart": needs_restart(self._started_with, after),
        }
        _log.info("configuration reloaded: %s", in_words(changes))
        for warning in loaded.warnings:
            _log.warning("%s", warning)
        return {"status": "success", **changes, "warnings": list(loaded.warnings)}

    async def look_again(self) -> bool:
        """Apply changes of the model files; the rest of the configuration is not read again.

        Returns whether a file is still being written.
        """
        async with self._reloading:
            before = self._loaded
            try:
                loaded = await self._looks.take(before.look_again, self._places())
            except ConfigError as error:
                if str(error) != self._look_failed:
                    _log.error("the model folders cannot be read; the models are unchanged:\n%s", error)
                self._look_failed = str(error)
                return False
            self._look_failed = ""
            self._loaded = loaded
            changes = changes_between(before.config, loaded.config)
            left_out = [(config.lost, config.unserved) for config in (before.config, loaded.config)]
            if any(changes.values()) or left_out[0] != left_out[1]:
                self._dispatcher.apply(loaded.config)
                _log.info("models changed: %s", in_words(changes))
                await self._forget_conversations(before.config, loaded.config)
        for warning in loaded.warnings:
            if warning not in before.warnings:
                _log.warning("%s", warning)
        return loaded.settling

    async def _forget_conversations(self, before: Config, after: Config) -> None:
        """Delete what is saved of models that were removed, by whom ever: not of those whose entry or folder may
        come back."""
        for alias, model in before.models.items():
            if alias not in after.models and model.source in (Source.PULLED, Source.CREATED):
                await self._kv_store.clear(alias)

    def _places(self) -> set[Path]:
        """Folders with the files of the configuration and of its models."""
        loaded = self._loaded
        files = (
            *([loaded.source] if loaded.source else []),
            *(m.model_path for m in loaded.config.models.values()),
        )
        return {*loaded.folders, *(file.parent for file in files)}

    def _disks(self) -> dict[str, list[Path]]:
        """Return the folders that fill up, or must not, by what they are for."""
        log_dir = self._started_with.system.log_dir
        folders: dict[str, Sequence[Path | None]] = {
            "state": [self._state_path],
            "log": [Path(log_dir) if log_dir is not None else None],
            "kv": [self._kv_store.folder],
            "cache": [hf_cache.folder()],
            "models": self._loaded.folders,
        }
        return {place: [folder for folder in those if folder] for place, those in folders.items()}

    def _terminate(self) -> None:
        if self._stop.is_set():
            _log.warning("second signal received: exiting now")
            self._dispatcher.kill_engines()
            self._dispatcher.events.settle()
            self._log.close()
            os._exit(1)
        system = self._loaded.config.system
        grace = system.shutdown_grace_sec
        _log.info("shutting down; waiting up to %g s for requests in flight (a second signal skips this)", grace)
        self._notifier.stopping(grace + system.stop_grace_sec + _LAST_WORDS_SEC)
        self._stop.set()

    def _on_ready(self) -> None:
        _tune_the_interpreter()
        with contextlib.suppress(OSError):  # the disk is full, or the reader is gone
            announcement = "\n".join(map(printable_line, self._announcement()))
            print(announcement, file=sys.stderr, flush=True)  # in one write
        self._notifier.ready()

    def _status(self) -> str:
        """Status in one line, for `systemctl status`."""
        models = self._dispatcher.scheduler.models
        states = [self._dispatcher.scheduler.state(alias) for alias in models]
        waiting = sum(len(model.queue) for model in models.values())
        return f"{states.count(ModelState.READY)} of {len(states)} models ready, {waiting} requests waiting"

    def _hang_up(self) -> None:
        """Reload on SIGHUP. All signals that arrive during a reload cause one more reload after it."""
        if sighup.terminal_is_gone():
            if not self._stop.is_set():
                _log.info("the terminal was closed; shutting down")
                self._terminate()
            return
        self._reload_wanted = True
        if self._reloads is None or self._reloads.done():
            self._reloads = asyncio.create_task(self._reload_while_wanted())

    async def _reload_while_wanted(self) -> None:
        self._notifier.reloading()
        try:
            while self._reload_wanted:
                self._reload_wanted = False
                try:
                    await self.reload()
                except ConfigError as error:
                    _log.error("configuration not reloaded; nothing was changed:\n%s", error)
                except Exception:
                    _log.exception("configuration not reloaded")
        finally:
            self._notifier.ready()

    def _announcement(self) -> Iterator[str]:
        config, dispatcher = self._loaded.config, self._dispatcher
        host, port = self._listeners[0].getsockname()[:2]
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104
        url = f"http://{shown}:{port}"
        aliases = list(config.models)
        names = ", ".join(aliases[:8]) + (f" and {len(aliases) - 8} more" if len(aliases) > 8 else "")
        names = names or "none yet: pull a model, or add models to a folder that is served"
        yield f"llama-router listens on {url}"
        if config.api.ollama_port is not None:
            yield f"  Ollama  also on port {config.api.ollama_port}"
        yield f"  engine  {dispatcher.backend.name} ({dispatcher.backend.origin})"
        yield f"  memory  {'; '.join(map(str, dispatcher.ledger.devices.values()))}"
        yield f"  models  {names}"
        authorization = ""
        if self._keyring.required:
            authorization = " -H 'Authorization: Bearer YOUR_KEY'"
        elif host not in ("127.0.0.1", "::1", "localhost"):
            yield f"  WARNING anyone who can reach {host}:{port} can use and manage this router: set API_KEY"
        for warning in self._loaded.warnings:
            yield f"  WARNING {warning}"
        yield "Try:"
        if not aliases:
            wanted = f"-H 'Content-Type: application/json' -d '{{\"model\": \"{_FIRST_MODEL}\"}}'"
            yield f"  curl {url}/v1/models/pull{authorization} {wanted}"
            return
        yield f"  curl {url}{_example(config.models.values(), authorization)}"


_EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    "embedding": ("/v1/embeddings", {"input": "Hello"}),
    "rerank": ("/v1/rerank", {"query": "Hello", "documents": ["Good day", "Goodbye"]}),
}


def _example(models: Iterable[ModelConfig], options: str) -> str:
    """Path and arguments of an example request, preferably to a chat model."""
    by_path: dict[str, str] = {}
    for model in reversed(list(models)):
        routes = model.routes if model.routes is not None else (_EXAMPLES[purpose_of(model)][0],)
        by_path.update(dict.fromkeys(routes, model.alias))
    for path, asked in _EXAMPLES.values():
        if path in by_path:
            document = json.dumps({"model": by_path[path], **asked}, ensure_ascii=False)
            return f"{path}{options} -d {shlex.quote(document)}"
    return f"/v1/models{options}"


def _tune_the_interpreter() -> None:
    """Set thread switching and garbage collection for one event loop with many small tasks and few busy threads.

    By default a thread keeps the interpreter for 5 ms, which would delay every token of every stream.

    Objects that exist now live until the end and are excluded from collections, which stop all requests. Requests
    leave no cycles behind, but by default a collection would examine everything in flight after every ten or
    twenty requests, which costs several percent of their time.
    """
    sys.setswitchinterval(_THREADS_TURN_SEC)
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)


def _most_clients(api: Api) -> int:
    """Limit on client connections: as configured, or lower, with a warning, if open files require it."""
    files = allow_many_files()
    most = min(api.max_connections, max(16, files - _OTHER_FILES))
    if most < api.max_connections:
        _log.warning(
            "only %d client connections are possible instead of %d (api.max_connections): the limit of open files "
            "is %d (ulimit -n; LimitNOFILE= in a unit file), and %d of them are reserved for engines and logs",
            most,
            api.max_connections,
            files,
            _OTHER_FILES,
        )
    return most
