"""What is for the router and its user alone: files that it writes, and secrets in its environment."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

FILE_MODE = 0o600
FOLDER_MODE = 0o700
_SECRET = re.compile(
    r"(?:^|_)(?:KEYS?|TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?)(?:_|$)", re.IGNORECASE
)
"""In a variable's name: the router's own keys, the hub's tokens, those of clouds. It is none in one of
llama-server's flags, such as LLAMA_ARG_IMAGE_MAX_TOKENS."""


def keep_to_owner(place: int | str | Path) -> None:
    """A file or folder of ours (or an open one) that a wider mode was left on. Others', and devices, stay as they
    are."""
    with contextlib.suppress(OSError):
        found = os.stat(place)
        kind, mode = stat.S_IFMT(found.st_mode), stat.S_IMODE(found.st_mode)
        wanted = {stat.S_IFREG: FILE_MODE, stat.S_IFDIR: FOLDER_MODE}.get(kind)
        if wanted is not None and mode & ~wanted and found.st_uid == os.geteuid():
            os.chmod(place, wanted)


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """What programs that run models get of it: were one of them taken over, it could read that."""
    return {
        name: value for name, value in environ.items() if name.startswith("LLAMA_ARG_") or not _SECRET.search(name)
    }
