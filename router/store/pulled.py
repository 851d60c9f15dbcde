"""Which models were pulled, and which of the files in the Hugging Face cache are theirs.

Pulled files lie in the cache that `huggingface_hub`, `llama-server -hf` and others share, in its layout:
`models--USER--REPO/blobs/HASH`, and links to them in `snapshots/COMMIT/`. Beside them, in `llama-router.json`, is
written down what was pulled, so that it moves with the cache, goes with the repository, and is seen by every
router that uses it. A file that was there before is never removed with a model.
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
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import psutil
from filelock import FileLock, Timeout

from router.store.discovery import Discovery, Found, Headers, Survey

_log = logging.getLogger("router")

RECORD = "llama-router.json"
_PART = ".incomplete"
_QUIET_SEC = 60.0
"""A part that was not written to for so long belongs to nobody, whatever became of the pull."""
_PREFIX = "models--"


class PulledFile(msgspec.Struct, frozen=True):
    """A file of a pulled model: its path in the repository, and the name of its blob."""

    path: str
    blob: str
    size: int
    ours: bool
    """It came with this pull; else it was in the cache before."""


class PulledModel(msgspec.Struct, frozen=True):
    repo: str
    revision: str
    """The commit."""
    model: str
    """Path of the file to load, in the repository; of a split model the first part."""
    mmproj: str | None
    files: tuple[PulledFile, ...]
    complete: bool
    """All files are there, and their checksums were right."""
    arriving: PulledModel | None = None
    """A newer revision that is to take its place, as far as it has come."""

    @property
    def revisions(self) -> tuple[PulledModel, ...]:
        return (self,) if self.arriving is None else (self, self.arriving)


class _Record(msgspec.Struct):
    models: dict[str, PulledModel]
    version: int = 1


class NotPulled(Exception):
    """No pulled model has that alias; the message names those there are."""


class BeingPulled(Exception):
    """A file of it is just being fetched."""


def cache_folder(environ: Mapping[str, str]) -> Path | None:
    """Where the Hugging Face cache is, by the library's own rules; None without a home."""
    # huggingface_hub/constants.py and llama.cpp's common/hf-cache.cpp, in their order.
    if named := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        place = named
    elif home := environ.get("HF_HOME"):
        place = os.path.join(home, "hub")
    elif caches := environ.get("XDG_CACHE_HOME"):
        place = os.path.join(caches, "huggingface", "hub")
    elif environ.get("HOME"):
        place = "~/.cache/huggingface/hub"
    else:
        return None
    if place == "~" or place.startswith("~/"):
        place = environ.get("HOME", "~") + place[1:]
    return Path(os.path.abspath(os.path.expandvars(place)))


def repository_folder(cache: Path, repo: str) -> Path:
    return cache / (_PREFIX + repo.replace("/", "--"))


def repository_name(folder: Path) -> str:
    """`USER/REPO` of a repository's folder."""
    return folder.name.removeprefix(_PREFIX).replace("--", "/", 1)


def repositories(cache: Path) -> list[Path]:
    """The folders of models in the cache; none if there is no cache."""
    try:
        return sorted(folder for folder in cache.iterdir() if folder.name.startswith(_PREFIX))
    except (FileNotFoundError, NotADirectoryError):
        return []


def snapshot_path(cache: Path, model: PulledModel, path: str) -> Path:
    """Where a file of a pulled model is read from."""
    return repository_folder(cache, model.repo) / "snapshots" / model.revision / path


def read(cache: Path) -> dict[str, PulledModel]:
    """All pulled models by alias, also those that were never completed. What cannot be read is not among them."""
    models: dict[str, PulledModel] = {}
    for folder in repositories(cache):
        with contextlib.suppress(OSError):  # `discover` tells of it
            models |= _read(folder).models
    return models


def discover(cache: Path, headers: Headers | None = None) -> Discovery:
    """The complete ones, to serve under the aliases that they were pulled as."""
    survey = Survey(headers)
    found: list[Found] = []
    for folder in repositories(cache):
        try:
            models = _read(folder).models
        except OSError as error:
            survey.skip(folder / RECORD, error.strerror or str(error))
            continue
        for alias, model in models.items():
            if not model.complete:
                continue
            path = snapshot_path(cache, model, model.model)
            mmproj = snapshot_path(cache, model, model.mmproj) if model.mmproj else None
            if (header := survey.read(path)) is not None:
                found.append(Found(alias, path, header, survey.projector_for(header, mmproj)))
    return survey.discovery(found)


def write_down(cache: Path, alias: str, model: PulledModel) -> None:
    """Add it, or put it in the place of what was pulled under that alias before, whose own files are removed."""
    folder = repository_folder(cache, model.repo)
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
    """Forget a pulled model and remove the files that are only its own; how many bytes that freed.

    Raises NotPulled, BeingPulled.
    """
    models = read(cache)
    if alias not in models:
        known = ", ".join(sorted(models)) or "none"
        raise NotPulled(f"no model was pulled as {alias!r}; pulled are: {known}")
    folder = repository_folder(cache, models[alias].repo)
    with file_lock(folder, RECORD), contextlib.ExitStack() as locks:
        record = _read(folder)
        model = record.models.pop(alias, None)
        if model is None:  # somebody else was quicker
            return 0
        for blob in sorted({file.blob for each in model.revisions for file in each.files}):
            try:
                locks.enter_context(file_lock(folder, blob).acquire(timeout=0))
            except Timeout:
                raise _being_pulled(alias) from None
            path = folder / "blobs" / blob
            if any(_is_written(part, path) for part in parts(path)):  # where locks exclude nobody
                raise _being_pulled(alias)
        _write(folder, record)
        freed = _remove_files(folder, model, record.models.values())
        if not record.models:
            _remove_empty(folder)
    return freed


def _being_pulled(alias: str) -> BeingPulled:
    return BeingPulled(f"{alias!r} is being pulled: stop the pull, or wait until it ends")


def _remove_files(folder: Path, model: PulledModel, others: Iterable[PulledModel]) -> int:
    """Remove what is the model's own from its snapshot; blobs that no snapshot uses any more go, too."""
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
    """A repository of which nothing is left, unless somebody else keeps something in it, or is about to."""
    claimed = folder / f"{RECORD}.{uuid.uuid4().hex}"
    os.replace(folder / RECORD, claimed)  # what somebody writes from now on is not what is removed here
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


# --- what has arrived of a file -------------------------------------------------------------------------


def parts(blob: Path) -> list[Path]:
    """What pulls that run, or were broken off, have of it; the largest first."""
    sizes: dict[Path, int] = {}
    for part in blob.parent.glob(f"{blob.name}*{_PART}"):
        with contextlib.suppress(FileNotFoundError):
            sizes[part] = part.stat().st_size
    return sorted(sizes, key=lambda part: -sizes[part])


def own_part(blob: Path) -> Path:
    """A name that no other pull has, and that tells whose it is."""
    return blob.with_name(f"{blob.name}.{uuid.uuid4().hex[:12]}-{os.getpid()}-{_machine()}{_PART}")


def take_over(blob: Path, own: Path) -> bool:
    """Have as `own` what another pull has left, if one has. Of several who try, one gets it."""
    for part in parts(blob):
        if not _is_written(part, blob):
            with contextlib.suppress(FileNotFoundError):
                os.rename(part, own)
                return True
    return False


def leave(own: Path, blob: Path) -> None:
    """For the next pull, or for another program: what of it has arrived, unless somebody has left more."""
    with contextlib.suppress(FileNotFoundError):
        common = blob.with_name(f"{blob.name}{_PART}")
        if not common.exists() or common.stat().st_size < own.stat().st_size:
            os.replace(own, common)
        else:
            own.unlink()


def _is_written(part: Path, blob: Path) -> bool:
    """Whether a pull that still runs may be writing it, as far as can be told."""
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
    """A record that nobody can make sense of."""


def _read(folder: Path, name: str = RECORD) -> _Record:
    """Raises OSError."""
    try:
        return msgspec.json.decode((folder / name).read_bytes(), type=_Record)
    except FileNotFoundError:
        return _Record({})
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason = f"is damaged ({error}): the models of that repository must be pulled again"
        raise _Damaged(errno.EINVAL, reason) from error


def _write(folder: Path, record: _Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{RECORD}.{uuid.uuid4().hex}"
    with fresh.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(record), indent=2))
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, folder / RECORD)
