"""Access restricted to the router's user: the files it writes, and secrets in its environment."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

FILE_MODE = 0o600
FOLDER_MODE = 0o700
_SECRET = re.compile(
    r"(?:^|_)(?:KEYS?|TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?)(?:_|$)", re.IGNORECASE
)
"""Names of variables that hold secrets: the router's own keys, tokens of the hub and of clouds. Variables of
llama-server's flags, such as LLAMA_ARG_IMAGE_MAX_TOKENS, are exempt."""


_SECRET_FLAG = re.compile(r"--?[\w-]*(?:api-key|token|hft|password|secret)(=|$)", re.IGNORECASE)
"""Flags whose values are secrets, such as --api-key, --hf-token and -hft."""


def keep_to_owner(place: int | str | Path) -> None:
    """Restrict the mode of a file or folder (or of an open file) to its owner.

    Files of other users, and devices, are left unchanged; errors are ignored.
    """
    with contextlib.suppress(OSError):
        found = os.stat(place)
        kind, mode = stat.S_IFMT(found.st_mode), stat.S_IMODE(found.st_mode)
        wanted = {stat.S_IFREG: FILE_MODE, stat.S_IFDIR: FOLDER_MODE}.get(kind)
        if wanted is not None and mode & ~wanted and found.st_uid == os.geteuid():
            os.chmod(place, wanted)


def shown_words(argv: Sequence[str]) -> list[str]:
    """Return the words of a command line, with the values of flags for keys and tokens left out."""
    shown: list[str] = []
    is_secret = False
    for word in argv:
        flag = _SECRET_FLAG.match(word)
        if is_secret and not word.startswith("-"):
            shown.append("…")
        elif flag is not None and flag[1]:
            shown.append(f"{flag[0]}…")
        else:
            shown.append(word)
        is_secret = flag is not None and not flag[1]
    return shown


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for engines, without secrets that a compromised engine could read."""
    return {
        name: value for name, value in environ.items() if name.startswith("LLAMA_ARG_") or not _SECRET.search(name)
    }
