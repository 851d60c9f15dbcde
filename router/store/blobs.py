"""Files that clients have sent, each under the SHA-256 of what is in it.

A file is written beside its place, under a name that nobody else has, and is moved there once it is whole and its
digest is right: what has the name of a digest has that content. All of this blocks: on the event loop, call it in
a thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from router.system.privacy import FILE_MODE, FOLDER_MODE

_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})", re.IGNORECASE)
_PREFIX = "sha256-"
_PARTIAL = ".part"
_SPARE_BYTES = 256 << 20
"""What is left free on the disk for others."""
_LOOK_EVERY_BYTES = 64 << 20


class WrongDigest(Exception):
    """What has come is something else."""


def hexadecimal(digest: str) -> str | None:
    """Of a digest as clients write it, its 64 digits, which are safe in a path; None if it is none."""
    match = _DIGEST.fullmatch(digest)
    return match[1].lower() if match else None


class Blobs:
    """A folder of them, which has one router at a time. Digests are given as 64 hexadecimal digits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, digest: str) -> Path:
        return self._folder / f"{_PREFIX}{digest}"

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def begin(self, digest: str, size: int | None) -> Upload:
        """Of `size` bytes, if that is known. Raises OSError, ENOSPC if there is no room for them."""
        self._folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        _check_room(self._folder, size or 0)
        return Upload(self.path(digest), digest)

    def add(self, content: bytes) -> str:
        """A file of our own making; its digest. Raises OSError."""
        digest = hashlib.sha256(content).hexdigest()
        if not self.has(digest):
            with contextlib.closing(self.begin(digest, len(content))) as upload:
                upload.write(content)
                upload.finish()
        return digest

    def remove(self, digests: Iterable[str]) -> int:
        """How many bytes that freed. Raises OSError."""
        freed = 0
        for digest in digests:
            with contextlib.suppress(FileNotFoundError):
                freed += self.path(digest).stat().st_size
                self.path(digest).unlink()
        return freed

    def sweep(self, used: Iterable[str], spared_sec: float) -> None:
        """Remove what a router that ended has left half, and what was not used for a while since it came."""
        kept = {self.path(digest).name for digest in used}
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                is_old = time.time() - path.stat().st_mtime > spared_sec
                if path.name.endswith(_PARTIAL) or (path.name not in kept and is_old):
                    path.unlink(missing_ok=True)


class Upload:
    """One file on its way. `close` removes what is there of it, unless it was finished."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._digest = digest
        self._partial = path.with_name(f"{uuid.uuid4().hex}{_PARTIAL}")
        self._file = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        self._hash = hashlib.sha256()
        self._unlooked = 0

    def write(self, part: bytes) -> None:
        """Raises OSError; ENOSPC before the disk is quite full."""
        self._unlooked += len(part)
        if self._unlooked >= _LOOK_EVERY_BYTES:
            _check_room(self._path.parent, 0)
            self._unlooked = 0
        self._hash.update(part)
        view = memoryview(part)
        while view:
            view = view[os.write(self._file, view) :]

    def finish(self) -> None:
        """Raises WrongDigest and OSError."""
        if self._hash.hexdigest() != self._digest:
            raise WrongDigest(
                f'digest mismatch, expected "sha256:{self._digest}", got "sha256:{self._hash.hexdigest()}"'
            )
        os.fsync(self._file)
        os.replace(self._partial, self._path)

    def close(self) -> None:
        os.close(self._file)
        self._partial.unlink(missing_ok=True)


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + _SPARE_BYTES:
        wanted = f"{size:,} bytes and " if size else ""
        reason = f"no room: {wanted}{_SPARE_BYTES:,} to spare are required, {free:,} are free"
        raise OSError(errno.ENOSPC, reason, str(folder))
