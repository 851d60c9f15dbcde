"""Downloads a model from the Hugging Face hub into the cache that other programs share.

`huggingface_hub` handles errors, tokens and the layout of the cache, but the download itself is done here: the
library starts again after an interruption and does not verify checksums. Files arrive beside the blobs, under the
library's own locks. On network drives these locks may have no effect, so nothing depends on them: each pull writes
to a file of its own, and takes over the partial file of an earlier pull by renaming it. A file gets its final name
only if its content on disk has the checksum that the hub states, and a model is recorded as pulled only when all
its files are present. All functions block: the router runs them in a process of its own (`downloads.py`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import httpx2
import huggingface_hub
import msgspec
from filelock import Timeout
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from router import __version__
from router.config.names import ALLOWED, is_alias
from router.engines import hf_forecast
from router.engines.llamacpp.flags import Flags
from router.engines.llamacpp.forecast import forecast
from router.formats import gguf, hf_cache, hf_model
from router.memory.plan import Site
from router.store import pulled, remote_headers
from router.store.hub_api import ANSWER_SEC, PAUSES_SEC, HubError, HubFile, HubRepository
from router.store.progress import FileProgress, MemoryNote, Order, Problem, Progress
from router.store.pulled import FOLDER, PulledFile, PulledModel
from router.store.repository import BadReference, Choice, NoChoice, Reference, parse
from router.system.devices import by_name

AT_ONCE = 4
"""Number of files downloaded concurrently."""
_TELL_SEC = 0.25
_RATE_SEC = 5.0
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_HASH_BYTES = 1 << 20


class PullFailed(HubError):
    """Raised when a pull fails for a reason other than the hub."""


class Cancelled(Exception):
    """Raised when the pull was cancelled. The partial download is kept."""


def pull(
    text: str,
    say: Callable[[Progress], None],
    *,
    environ: Mapping[str, str],
    alias: str | None = None,
    taken: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
    sites: Sequence[Site] = (),
    only_estimate: bool = False,
) -> Progress:
    """Download a model and record it as pulled; `say` is called with the progress a few times a second.

    `taken` maps names that are already in use to the sources of those models. `sites` are the devices of a running
    router, for its estimate. With `only_estimate`, nothing is downloaded but the headers.

    Returns the last progress: `success` (or `estimated`), `failed` with the error, or `cancelled`. If several
    processes pull the same file, one downloads it and the others wait for it.
    """
    progress = Progress(text, alias)
    try:
        cache = hf_cache.folder(environ)
        if cache is None:
            raise PullFailed("no_cache", "the location of the Hugging Face cache is unknown: set HF_HOME")
        if alias is not None and not is_alias(alias):
            raise PullFailed("invalid_alias", f"{alias!r}: an alias is {ALLOWED}")
        _check_free(alias, taken or {})
        work = _Pull(parse(text, environ), progress, cache, environ, say, stop or threading.Event(), sites)
        work.run(alias, taken or {}, only_estimate=only_estimate)
    except Cancelled:
        progress.status = "cancelled"
    except (BadReference, NoChoice) as error:
        code = "invalid_reference" if isinstance(error, BadReference) else "no_such_file"
        progress.status, progress.error = "failed", Problem(code, str(error))
    except HubError as error:
        progress.status, progress.error = "failed", Problem(error.code, str(error))
    except OSError as error:
        progress.status, progress.error = "failed", _problem_of_disk(error)
    progress.eta_sec = None
    say(progress)
    return progress


def _check_free(alias: str | None, taken: Mapping[str, str]) -> None:
    if alias is not None and alias in taken:
        message = f"{alias!r} is taken by a model from {taken[alias]}: choose another alias"
        raise PullFailed("name_taken", message)


def _problem_of_disk(error: OSError) -> Problem:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in _NO_ROOM:
        message = (
            f"{where}no space left: {error.strerror}. The partial download is kept: free space and pull again."
        )
        return Problem("disk_full", message)
    if error.errno == errno.ENOENT:
        return Problem("disk_error", f"{where}was removed during the pull. Pull again.")
    return Problem("disk_error", f"{where}{error.strerror or error}")


class _Pull:
    """A pull, from a reference to a model that can be served."""

    def __init__(
        self,
        reference: Reference,
        progress: Progress,
        cache: Path,
        environ: Mapping[str, str],
        say: Callable[[Progress], None],
        stop: threading.Event,
        sites: Sequence[Site],
    ) -> None:
        self.hub = HubRepository(reference, environ)
        self.reference = reference
        self.progress = progress
        self.cache = cache
        self.environ = environ
        self.say = say
        self.stop = stop
        self.sites = sites
        self.folder = hf_cache.repository(cache, reference.repo)

    def run(self, alias: str | None, taken: Mapping[str, str], *, only_estimate: bool) -> None:
        self.say(self.progress)
        found = self.hub.find(self._wait)
        commit, choice, files = found.commit, found.choice, found.files
        alias = alias or choice.alias
        _check_free(alias, taken)
        progress = self.progress
        progress.alias, progress.revision = alias, commit
        progress.files = [FileProgress(file.path, file.size, self._arrived(commit, file)) for file in files]
        progress.total_bytes = sum(file.size for file in files)
        progress.cached = all(self._is_there(commit, file) for file in files)
        self._add_up()
        model = self._planned(alias, commit, choice, files)
        self._estimate(commit, choice)  # of use also without room on the disk
        self._check_room()
        if only_estimate:
            progress.status = "estimated"
            return
        progress.status = "downloading"
        self.say(progress)
        if not self._is_pulled(alias, model):
            pulled.write_down(self.cache, alias, self._begun(alias, model))
            self._fetch_all(commit, files)
            self._name_revision(commit)
            pulled.write_down(self.cache, alias, msgspec.structs.replace(model, complete=True))
        progress.status = "success"
        progress.path = str(pulled.snapshot_path(self.cache, model, choice.model))

    # --- the state of the cache ---------------------------------------------------------------------------

    def _planned(self, alias: str, commit: str, choice: Choice, files: tuple[HubFile, ...]) -> PulledModel:
        known = pulled.read(self.cache)
        taken = known.get(alias)
        if taken is not None and (taken.repo, taken.model) != (self.reference.repo, choice.model):
            name = taken.repo if taken.model == FOLDER else f"{taken.repo}/{taken.model}"
            message = f"{alias!r} is the alias of {name}: choose another one, or remove that model first"
            raise PullFailed("alias_taken", message)
        here = [each for model in known.values() if model.repo == self.reference.repo for each in model.revisions]
        ours = {file.blob for model in here for file in model.files if file.ours}
        return PulledModel(
            self.reference.repo,
            commit,
            choice.model,
            choice.mmproj,
            tuple(
                PulledFile(file.path, file.blob, file.size, file.blob in ours or not self._is_there(commit, file))
                for file in files
            ),
            complete=False,
            quantize=choice.quantize,
        )

    def _begun(self, alias: str, model: PulledModel) -> PulledModel:
        """Return the record to write before the download, so that `rm` finds an interrupted one."""
        known = pulled.read(self.cache).get(alias)
        if known is None or known.revision == model.revision:
            return known or model
        return msgspec.structs.replace(known, arriving=model)

    def _is_pulled(self, alias: str, model: PulledModel) -> bool:
        there = all(self._pointer(model.revision, file.path).exists() for file in model.files)
        return there and pulled.read(self.cache).get(alias) == msgspec.structs.replace(model, complete=True)

    def _check_room(self) -> None:
        needed = self.progress.total_bytes - self.progress.completed_bytes
        place = next(folder for folder in (self.cache, *self.cache.parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            message = (
                f"{self.cache} has {free / 1e9:.1f} GB free, and the download needs {needed / 1e9:.1f} GB more"
            )
            raise PullFailed("disk_full", message)

    def _estimate(self, commit: str, choice: Choice) -> None:
        """Estimate whether the model will fit. The estimate only informs, so errors are reported and ignored."""
        token = huggingface_hub.get_token()
        environ = {**self.environ, **({"HF_TOKEN": token} if token else {})}
        try:
            if choice.model == FOLDER:
                self.progress.memory = self._note_of_folder(commit, choice, environ)
            else:
                self.progress.memory = self._note_of_file(commit, choice, environ)
        except (remote_headers.CannotRead, ValueError, ArithmeticError, OSError) as error:
            self.progress.memory_unknown = str(error)

    def _note_of_file(self, commit: str, choice: Choice, environ: Mapping[str, str]) -> MemoryNote:
        def header(path: str) -> gguf.GGUF:
            local = self._pointer(commit, path)
            if local.exists():
                return gguf.read(local)
            return remote_headers.read(self.hub.url(commit, path), environ)

        model = header(choice.model)
        projector = header(choice.mmproj) if choice.mmproj else None
        found = forecast(model, Flags(("-np", "1")), projector=projector, sites=self.sites)
        needs = by_name(found.best.placement)
        free = by_name(found.free_mib)
        return MemoryNote(
            needs,
            {device: free[device] for device in needs},
            found.need.context,
            not found.short_mib,
            found.largest_context,
            need=found.best.need,
            placements=[by_name(placement) for placement in found.placements],
        )

    def _note_of_folder(self, commit: str, choice: Choice, environ: Mapping[str, str]) -> MemoryNote:
        if all(self._pointer(commit, path).exists() for path in choice.files):
            model = hf_model.read(self._pointer(commit, FOLDER))
        else:
            model = remote_headers.read_folder(self.hub, commit, choice, environ)
        found = hf_forecast.forecast(model, quantize=choice.quantize, sites=self.sites)
        needs, free = by_name(found.placement), by_name(found.free_mib)
        return MemoryNote(
            needs,
            {device: free[device] for device in needs},
            found.cache.context,
            found.fits,
            found.largest_context,
            context_key="context",
            engine=found.engine,
            need=found.best.need,
            placements=[by_name(placement) for placement in found.placements],
        )

    # --- download -----------------------------------------------------------------------------------------

    def _fetch_all(self, commit: str, files: tuple[HubFile, ...]) -> None:
        waiting: queue.SimpleQueue[tuple[HubFile, FileProgress]] = queue.SimpleQueue()
        for each in zip(files, self.progress.files, strict=True):
            waiting.put(each)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while not self.stop.is_set():
                    file, progress = waiting.get_nowait()
                    self._fetch(commit, file, progress)
            except queue.Empty:
                pass
            except BaseException as error:
                errors.append(error)
                self.stop.set()

        workers = [threading.Thread(target=work, daemon=True) for _ in range(min(AT_ONCE, len(files)))]
        try:
            for worker in workers:
                worker.start()
            rate = _Rate(self.progress.completed_bytes)
            for worker in workers:
                while worker.is_alive():
                    worker.join(_TELL_SEC)
                    self._add_up()
                    rate.tell(self.progress)
                    self.say(self.progress)
        except BaseException:
            self.stop.set()
            raise
        if errors:
            raise next((error for error in errors if not isinstance(error, Cancelled)), errors[0])
        if self.stop.is_set():
            raise Cancelled

    def _fetch(self, commit: str, file: HubFile, progress: FileProgress) -> None:
        """Put one verified file into the cache under its name, unless another process does."""
        blob, pointer = self.folder / "blobs" / file.blob, self._pointer(commit, file.path)
        lock = pulled.file_lock(self.folder, file.blob)
        for path in (blob, pointer):
            path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                lock.acquire(timeout=_TELL_SEC)
                break
            except Timeout:
                self._check_stop()
                progress.completed_bytes = self._arrived(commit, file)
        try:
            if not self._is_there(commit, file):
                self._download(commit, file, blob, progress)
            if _size(pointer) != file.size:
                _link(pointer, blob)
            progress.completed_bytes = file.size
        finally:
            lock.release()

    def _download(self, commit: str, file: HubFile, blob: Path, progress: FileProgress) -> None:
        """Download a file until its checksum is right; a partial file left by an earlier pull may be corrupt."""
        partial = pulled.own_part(blob)
        try:
            resumes = pulled.take_over(blob, partial)
            while not self._complete(commit, file, partial, progress):
                is_blameless = resumes or not partial.exists()  # another pull has taken over the partial file
                partial.unlink(missing_ok=True)
                if not is_blameless:
                    message = "what arrived is not what the hub promises, and was thrown away. Pull again."
                    raise PullFailed("checksum_mismatch", f"{file.path}: {message}")
                resumes = False
            os.replace(partial, blob)
        finally:
            pulled.leave(partial, blob)

    def _complete(self, commit: str, file: HubFile, partial: Path, progress: FileProgress) -> bool:
        """Download the missing part of a file; return whether the file on disk then has the right checksum."""
        with partial.open("ab") as out:
            progress.completed_bytes = out.tell()
            tries = 0
            while progress.completed_bytes < file.size:
                before = progress.completed_bytes
                with self.hub.explained(last_try=tries == len(PAUSES_SEC)):
                    self._receive(commit, file, out, progress)
                out.flush()
                if progress.completed_bytes < file.size:
                    tries = 1 if progress.completed_bytes > before else tries + 1
                    if tries > len(PAUSES_SEC):
                        raise HubError("unreachable", f"{self.hub.endpoint} stopped sending {file.path}")
                    self._wait(PAUSES_SEC[tries - 1])
            out.flush()
            os.fsync(out.fileno())
        return self._is_right(partial, file)

    def _is_right(self, path: Path, file: HubFile) -> bool:
        if _size(path) != file.size:  # also if another pull has taken it over
            return False
        digest = _digest(file)
        with path.open("rb") as written:
            while chunk := written.read(_HASH_BYTES):
                self._check_stop()
                digest.update(chunk)
        return digest.hexdigest() == file.blob

    def _receive(self, commit: str, file: HubFile, out: IO[bytes], progress: FileProgress) -> None:
        """Send one request for the rest of a file."""
        start = progress.completed_bytes
        headers = build_hf_headers(library_name="llama-router", library_version=__version__)
        headers["Accept-Encoding"] = "identity"
        if start:
            headers["Range"] = f"bytes={start}-"
        url = self.hub.url(commit, file.path)
        with get_session().stream("GET", url, headers=headers, timeout=ANSWER_SEC) as response:
            hf_raise_for_status(response)
            if start and (response.status_code != 206 or _first_byte(response) != start):
                out.truncate(0)  # the server ignored the range and sends the whole file
                progress.completed_bytes = 0
            for chunk in response.iter_raw():
                self._check_stop()
                out.write(chunk)
                progress.completed_bytes += len(chunk)
                if progress.completed_bytes > file.size:
                    return

    def _name_revision(self, commit: str) -> None:
        """Record the commit of the branch, so that other programs find it without querying the hub."""
        if self.reference.revision == commit:
            return
        ref = self.folder / "refs" / self.reference.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        fresh = ref.with_name(f"{ref.name}.{uuid.uuid4().hex}")
        fresh.write_text(commit)
        os.replace(fresh, ref)

    # --- helpers ------------------------------------------------------------------------------------------

    def _pointer(self, commit: str, path: str) -> Path:
        return self.folder / "snapshots" / commit / path

    def _is_there(self, commit: str, file: HubFile) -> bool:
        places = (self.folder / "blobs" / file.blob, self._pointer(commit, file.path))
        return any(_size(place) == file.size for place in places)

    def _arrived(self, commit: str, file: HubFile) -> int:
        if self._is_there(commit, file):
            return file.size
        parts = pulled.parts(self.folder / "blobs" / file.blob)
        return min(file.size, max((_size(part) or 0 for part in parts), default=0))

    def _add_up(self) -> None:
        self.progress.completed_bytes = sum(file.completed_bytes for file in self.progress.files)

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Cancelled

    def _wait(self, sec: float) -> None:
        if self.stop.wait(sec):
            raise Cancelled


class _Rate:
    """Download rate over the last seconds, and the remaining time at that rate."""

    def __init__(self, completed_bytes: int) -> None:
        self._points = [(time.monotonic(), completed_bytes)]

    def tell(self, progress: Progress) -> None:
        now = time.monotonic()
        self._points.append((now, progress.completed_bytes))
        while self._points[1][0] < now - _RATE_SEC:
            del self._points[0]
        (since, before), left = self._points[0], progress.total_bytes - progress.completed_bytes
        progress.bytes_per_sec = max(0.0, (progress.completed_bytes - before) / max(now - since, 1e-3))
        progress.eta_sec = round(left / progress.bytes_per_sec, 1) if progress.bytes_per_sec else None


def _digest(file: HubFile) -> hashlib._Hash:
    # git hashes a blob together with its type and size.
    return hashlib.sha256() if file.is_large else hashlib.sha1(b"blob %d\0" % file.size)  # noqa: S324


def _link(pointer: Path, blob: Path) -> None:
    """Link a file of a snapshot to its blob, even if another pull does the same concurrently."""
    fresh = pointer.with_name(f"{pointer.name}.{uuid.uuid4().hex}")
    try:
        fresh.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:  # a file system without links: move the blob, as the library does
        os.replace(blob, pointer)
    else:
        os.replace(fresh, pointer)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _first_byte(response: httpx2.Response) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def child(text: str) -> None:
    """Run a pull in a child process of the router: progress goes to standard output as JSON lines.

    The process exits when its standard input ends. `text` is an `Order` in JSON.
    """

    def end_with_parent() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    def say(progress: Progress) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(progress) + b"\n")
        sys.stdout.buffer.flush()

    order = msgspec.json.decode(text, type=Order)
    pull(
        order.reference,
        say,
        environ=os.environ,
        alias=order.alias,
        taken=order.taken,
        sites=order.sites,
        only_estimate=order.only_estimate,
    )
