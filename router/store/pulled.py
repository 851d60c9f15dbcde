"""Records which models were pulled, and which files in the Hugging Face cache belong to them.

Pulled files are stored in the cache that `huggingface_hub`, `llama-server -hf` and others share, in its layout:
`models--USER--REPO/blobs/HASH`, and links to them in `snapshots/COMMIT/`. The record, `llama-router.json`, is
beside them, so that it moves with the cache, is deleted with the repository, and is seen by every router that uses
the cache. A file that was in the cache before a pull is never removed with the model.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil
from filelock import FileLock, Timeout

from router.formats import hf_cache
from router.formats.unreadable import UNREADABLE
from router.store.discovery import Discovery, Found, Headers, Survey
from router.system.replacing import replace_file

_log = logging.getLogger("router")

RECORD = "llama-router.json"
FOLDER = "."
"""Path in the repository of what is loaded of a model in safetensors: all of it."""
_PART = ".incomplete"
_QUIET_SEC = 60.0
"""A partial file that was not written to for this long is considered abandoned."""


class PulledFile(msgspec.Struct, frozen=True):
    """A file of a pulled model: its path in the repository, and the name of its blob."""

    path: str
    blob: str
    size: int
    ours: bool
    """Whether this pull downloaded it; otherwise it was in the cache before."""


class PulledModel(msgspec.Struct, frozen=True):
    """The record of a pulled model."""

    repo: str
    revision: str
    """The commit."""
    model: str
    """Path in the repository of the file to load; for a split model, the first part; or `FOLDER`."""
    mmproj: str | None
    files: tuple[PulledFile, ...]
    complete: bool
    """Whether all files are present, with verified checksums."""
    quantize: str | None = None
    """How to load a model in safetensors, if the pull said that."""
    arriving: PulledModel | None = None
    """A newer revision that is being downloaded to replace this one."""

    @property
    def revisions(self) -> tuple[PulledModel, ...]:
        return (self,) if self.arriving is None else (self, self.arriving)


class _Record(msgspec.Struct):
    models: dict[str, PulledModel]
    version: int = 1


class NotPulled(Exception):
    """Raised when no pulled model has that alias; the message lists the pulled ones."""


class BeingPulled(Exception):
    """Raised when a file of the model is being downloaded."""


def snapshot_path(cache: Path, model: PulledModel, path: str) -> Path:
    """Return the path from which a file of a pulled model is read."""
    return hf_cache.repository(cache, model.repo) / "snapshots" / model.revision / path


def read(cache: Path) -> dict[str, PulledModel]:
    """Return all pulled models by alias, including incomplete ones. Unreadable records are left out."""
    models: dict[str, PulledModel] = {}
    for folder in hf_cache.repositories(cache):
        with contextlib.suppress(OSError):  # `discover` reports it
            models |= _read(folder).models
    return models


def discover(cache: Path, headers: Headers | None = None) -> Discovery:
    """Return the complete models, under the aliases with which they were pulled."""
    survey = Survey(headers)
    found: list[Found] = []
    for folder in hf_cache.repositories(cache):
        try:
            models = _read(folder).models
        except OSError as error:
            survey.skip(folder / RECORD, error.strerror or str(error))
            continue
        for alias, model in models.items():
            if not model.complete:
                continue
            path = snapshot_path(cache, model, model.model)
            if model.model == FOLDER:
                if (whole := survey.read_folder(path)) is not None:
                    found.append(Found(alias, path, whole, quantize=model.quantize))
                continue
            mmproj = snapshot_path(cache, model, model.mmproj) if model.mmproj else None
            if (header := survey.read(path)) is not None:
                found.append(Found(alias, path, header, survey.projector_for(header, mmproj)))
    return survey.discovery(found)


def write_down(cache: Path, alias: str, model: PulledModel) -> None:
    """Add a model to the record, or replace the previous one of that alias, whose own files are removed."""
    folder = hf_cache.repository(cache, model.repo)
    with file_lock(folder, RECORD):
        try:
            record = _read(folder)
        except _Damaged as error:
            record = _Record({})
            aside = folder / f"{RECORD}.broken"
            os.replace(folder / RECORD, aside)
            _log.warning("%s %s; a copy stays in %s", folder / RECORD, error.strerror, aside.name)
        before = record.models.get(alias)
        record.models[alias] = model
        _write(folder, record)
        if before is not None:
            _remove_files(folder, before, record.models.values())


def remove(cache: Path, alias: str) -> int:
    """Remove a pulled model and the files that only it uses; return the number of bytes freed.

    Raises NotPulled, BeingPulled, OSError.
    """
    models = read(cache)
    if alias not in models:
        known = ", ".join(sorted(models)) or "none"
        raise NotPulled(f"no model was pulled as {alias!r}; pulled are: {known}")
    folder = hf_cache.repository(cache, models[alias].repo)
    with file_lock(folder, RECORD), contextlib.ExitStack() as locks:
        record = _read(folder)
        model = record.models.pop(alias, None)
        if model is None:  # another process has removed it meanwhile
            return 0
        for blob in sorted({file.blob for each in model.revisions for file in each.files}):
            try:
                locks.enter_context(file_lock(folder, blob).acquire(timeout=0))
            except Timeout:
                raise _being_pulled(alias) from None
            path = folder / "blobs" / blob
            if any(_is_written(part, path) for part in parts(path)):  # where locks have no effect
                raise _being_pulled(alias)
        _write(folder, record)
        freed = _remove_files(folder, model, record.models.values())
        if not record.models:
            _remove_empty(folder)
    return freed


def _being_pulled(alias: str) -> BeingPulled:
    return BeingPulled(f"{alias!r} is being pulled: stop the pull, or wait until it ends")


def _remove_files(folder: Path, model: PulledModel, others: Iterable[PulledModel]) -> int:
    """Remove the model's own files from its snapshot, and the blobs that no snapshot uses any more."""
    others = [each for other in others for each in other.revisions]
    kept = {(other.revision, file.path) for other in others for file in other.files}
    kept_blobs = {file.blob for other in others for file in other.files}
    own = [(each.revision, file) for each in model.revisions for file in each.files if file.ours]
    for commit, file in own:
        pointer = folder / "snapshots" / commit / file.path
        if (commit, file.path) not in kept:
            with contextlib.suppress(FileNotFoundError):
                pointer.unlink()
            _remove_empty_above(pointer, folder / "snapshots")
    used = {os.path.realpath(link) for link in (folder / "snapshots").rglob("*") if link.is_symlink()}
    freed = 0
    for _, file in own:
        blob = folder / "blobs" / file.blob
        if file.blob in kept_blobs or os.path.realpath(blob) in used:
            continue
        for path in (blob, *parts(blob)):
            with contextlib.suppress(FileNotFoundError):
                freed += path.stat().st_size
                path.unlink()
    return freed


def _remove_empty_above(path: Path, top: Path) -> None:
    for folder in path.parents:
        if folder == top:
            return
        try:
            folder.rmdir()
        except OSError:  # not empty, or not there
            return


def _remove_empty(folder: Path) -> None:
    """Remove a repository's folder if nothing is left in it and no other process is adding to it."""
    claimed = folder / f"{RECORD}.{uuid.uuid4().hex}"
    os.replace(folder / RECORD, claimed)  # a record that another process writes from now on is not removed
    if _read(folder, claimed.name).models:
        if not (folder / RECORD).exists():
            os.replace(claimed, folder / RECORD)
        return
    claimed.unlink()
    left = (path for name in ("blobs", "snapshots") for path in (folder / name).rglob("*"))
    if any(path.is_file() or path.is_symlink() for path in left):
        return
    shutil.rmtree(folder / "refs", ignore_errors=True)
    for path in (*sorted(folder.rglob("*"), reverse=True), folder):
        with contextlib.suppress(OSError):  # it is not empty, or no folder
            path.rmdir()


# --- partial files --------------------------------------------------------------------------------------


def parts(blob: Path) -> list[Path]:
    """Return the partial files of a blob, of running and interrupted pulls, the largest first."""
    sizes: dict[Path, int] = {}
    for part in blob.parent.glob(f"{blob.name}*{_PART}"):
        with contextlib.suppress(FileNotFoundError):
            sizes[part] = part.stat().st_size
    return sorted(sizes, key=lambda part: -sizes[part])


def own_part(blob: Path) -> Path:
    """Return a unique name for a partial file, which identifies the process that writes it."""
    return blob.with_name(f"{blob.name}.{uuid.uuid4().hex[:12]}-{os.getpid()}-{_machine()}{_PART}")


def take_over(blob: Path, own: Path) -> bool:
    """Rename a partial file left by another pull to `own`, if any. Only one of several processes succeeds."""
    for part in parts(blob):
        if not _is_written(part, blob):
            with contextlib.suppress(FileNotFoundError):
                os.rename(part, own)
                return True
    return False


def leave(own: Path, blob: Path) -> None:
    """Leave a partial file for the next pull or another program, unless a larger one exists."""
    with contextlib.suppress(FileNotFoundError):
        common = blob.with_name(f"{blob.name}{_PART}")
        if not common.exists() or common.stat().st_size < own.stat().st_size:
            os.replace(own, common)
        else:
            own.unlink()


def _is_written(part: Path, blob: Path) -> bool:
    """Whether a running pull may be writing a partial file, as far as can be determined."""
    owner = part.name[len(blob.name) + 1 : -len(_PART)]
    if not owner:
        return False
    with contextlib.suppress(FileNotFoundError, ValueError):
        _, process, machine = owner.split("-", 2)
        if machine == _machine() and not psutil.pid_exists(int(process)):
            return False
        return time.time() - part.stat().st_mtime < _QUIET_SEC
    return False


def _machine() -> str:
    return re.sub(r"[^\w.]", "_", platform.node())


def file_lock(folder: Path, name: str) -> FileLock:
    """Return the lock of a repository's blob, which `huggingface_hub` uses as well, or of its record."""
    path = folder.parent / ".locks" / folder.name / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


class _Damaged(OSError):
    """Raised for a record that cannot be decoded."""


def _read(folder: Path, name: str = RECORD) -> _Record:
    """Read a repository's record. Raises OSError."""
    try:
        return msgspec.json.decode((folder / name).read_bytes(), type=_Record)
    except FileNotFoundError:
        return _Record({})
    except UNREADABLE as error:
        reason = f"is damaged ({error}): the models of that repository must be pulled again"
        raise _Damaged(errno.EINVAL, reason) from error


def _write(folder: Path, record: _Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = msgspec.json.format(msgspec.json.encode(record), indent=2)
    new = f"{RECORD}.{uuid.uuid4().hex}"  # another process may write one, too
    replace_file(folder / RECORD, content, new=new, fsync=True, mode=0o666)
