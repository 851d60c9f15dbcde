"""Persistent state of a router: a directory with a lock and small JSON files.

There is one directory per listening port, so that routers on one machine do not conflict; `system.state_dir` names
another. The lock is the kernel's: it ends with the process that holds it and is never stale. Files are replaced
atomically, so that a reader sees the old or the new content. Their meaning is defined by the modules that write
them.

A router without a directory, for example with a read-only home, serves nevertheless, but remembers nothing. All
functions block: call `StateFile` in a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from router.system.privacy import FILE_MODE, FOLDER_MODE, keep_to_owner
from router.system.replacing import replace_file

_log = logging.getLogger("router")
_T = TypeVar("_T")

_TRIES = 10  # a router that was just killed may not have ended yet
_TRY_AGAIN_SEC = 0.05
_OURS = re.compile(r"lock|blobs|kv|\w+\.json(\.new|\.broken)?|\d+\.sock")
"""Names of the files and folders that a router writes to its directory."""
_HOME_FOLDERS = ("Library", "Application Support") if sys.platform == "darwin" else (".local", "state")


class Holder(msgspec.Struct, frozen=True):
    """The router that uses a directory."""

    pid: int
    port: int
    since: str
    """Time of its start by the wall clock, for people."""

    def __str__(self) -> str:
        return f"the llama-router with pid {self.pid}, which listens on port {self.port} since {self.since}"


class StateHeld(Exception):
    """Raised when another router uses the directory."""

    def __init__(self, path: Path, holder: Holder | None) -> None:
        super().__init__(f"{path} is held by {holder or 'another llama-router'}")


def default_path(port: int, environ: Mapping[str, str]) -> Path | None:
    """Return the default state directory of the router on a port; None if the user has no home."""
    home = environ.get("HOME", "")
    base = environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # a relative one is to be ignored (XDG Base Directory Specification 0.8)
        if not os.path.isabs(home):
            return None
        base = os.path.join(home, *_HOME_FOLDERS)
    return Path(base, "llama-router", str(port))


def configured_path(named: str | None, port: int, environ: Mapping[str, str]) -> Path | None:
    """Return the state directory of the router on a port: the configured one (`named`), else the default."""
    return Path(named) if named else default_path(port, environ)


class State:
    """The locked state directory of this router; without a directory, nothing is saved."""

    def __init__(self, path: Path | None = None, lock: int | None = None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def open(cls, path: Path, port: int) -> State:
        """Create the directory, for its owner only, and lock it. Raises StateHeld and OSError."""
        path.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, FILE_MODE)
        _keep_to_owner(path)
        try:
            for last in (*[False] * _TRIES, True):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if last:
                        raise StateHeld(path, _holder(lock)) from None
                    time.sleep(_TRY_AGAIN_SEC)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            with contextlib.suppress(OSError):  # on a full disk the lock works, but does not name its holder
                os.truncate(lock, 0)
                os.write(lock, msgspec.json.encode(Holder(os.getpid(), port, since)))
            return cls(path, lock)
        except BaseException:
            os.close(lock)
            raise

    @staticmethod
    def holder(path: Path) -> Holder | None:
        """Return the running router that uses a directory; None if there is none or it cannot be determined."""
        try:
            lock = os.open(path / "lock", os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(lock)
        except OSError:
            pass
        finally:
            os.close(lock)
        return None

    def file(self, name: str, kind: type[_T], purpose: str) -> StateFile[_T]:
        """Return the file `name`.json of a type that msgspec can decode; `purpose` completes "Without it, …"."""
        return StateFile(self.path and self.path / f"{name}.json", kind, purpose)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class StateFile(Generic[_T]):
    """A file with one value of one type. It must have only one writer at a time."""

    def __init__(self, path: Path | None, kind: type[_T], purpose: str) -> None:
        self._path = path
        self._kind = kind
        self._purpose = purpose
        self._failing = False

    def read(self) -> _T | None:
        """Return the saved value, or None. An unreadable file is renamed and counts as missing."""
        if self._path is None:
            return None
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=self._kind)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            aside = self._path.with_suffix(".json.broken")
            with contextlib.suppress(OSError):
                os.replace(self._path, aside)
            _log.warning("%s cannot be read (%s); a copy stays in %s", self._path, error, aside.name)
            return None

    def replace(self, value: _T) -> None:
        """Replace the value atomically. Raises OSError; the file is then unchanged."""
        if self._path is None:
            return
        content = msgspec.json.format(msgspec.json.encode(value)) + b"\n"
        replace_file(self._path, content, new=f"{self._path.name}.new", fsync=True)

    def write(self, value: _T) -> None:
        """Replace the value; failures are logged once, and the next change is tried again."""
        try:
            self.replace(value)
        except OSError as error:
            if not self._failing:
                reason = error.strerror or error
                _log.warning("%s cannot be written: %s. Without it, %s", self._path, reason, self._purpose)
            self._failing = True
        else:
            if self._failing:
                _log.info("%s can be written again", self._path)
            self._failing = False


def _keep_to_owner(folder: Path) -> None:
    """Restrict access to the router's files, and to the directory itself if it contains nothing else."""
    places = list(folder.iterdir())
    ours = [place for place in places if _OURS.fullmatch(place.name)]
    for place in (*ours, *([folder] if len(ours) == len(places) else ())):
        keep_to_owner(place)


def _holder(lock: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(lock, 4096, 0), type=Holder)
    except (OSError, msgspec.MsgspecError):  # the holder has not written its name yet
        return None
