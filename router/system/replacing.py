"""Replacement of small files, so that whoever reads one sees its old or its new content."""

from __future__ import annotations

import os
from pathlib import Path

from router.system.privacy import FILE_MODE


def replace_file(path: Path, content: bytes, *, new: str, fsync: bool, mode: int = FILE_MODE) -> None:
    """Replace a file, or create it. Raises OSError; the file is then unchanged. Blocking.

    The content is written to a file `new` beside it first. With `fsync`, it is on the disk before it takes the
    place of the old one, so that this also holds if the machine crashes. `mode` is without what the umask takes.
    """
    fresh = path.with_name(new)
    try:
        fresh.unlink(missing_ok=True)  # whatever its mode
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
