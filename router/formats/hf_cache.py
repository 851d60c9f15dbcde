"""The cache that `huggingface_hub` and the programs built on it share: where it is, and its layout.

A repository is a folder `models--ORG--NAME`, with the content of its files in `blobs/`, links to them in
`snapshots/COMMIT/`, and the commit of each branch in `refs/`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_PREFIX = "models--"
NEW_NAMES: Mapping[str, str] = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
"""Repositories that belonged to nobody and are still called by their old names, each with its new one."""


def folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder of the cache, by the library's own rules; None without a home."""
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


def repository(cache: Path, repo: str) -> Path:
    """Return the folder of a repository."""
    return cache / (_PREFIX + repo.replace("/", "--"))


def name_of(folder: Path) -> str:
    """Return the name `ORG/NAME` of a repository's folder."""
    return folder.name.removeprefix(_PREFIX).replace("--", "/", 1)


def repositories(cache: Path) -> list[Path]:
    """Return the folders of repositories in the cache; none if there is no cache."""
    try:
        return sorted(folder for folder in cache.iterdir() if folder.name.startswith(_PREFIX))
    except (FileNotFoundError, NotADirectoryError):
        return []


def snapshots(folder: Path) -> list[Path]:
    """Return the snapshots of a repository: of the main branch first, then the others, newest first."""
    found = sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    try:
        main = (folder / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    return sorted(found, key=lambda path: path.name != main)


def snapshot(cache: Path, repo: str) -> Path | None:
    """Return the snapshot of a repository's main branch, or else its newest; None if it is not in the cache."""
    names = dict.fromkeys((repo, NEW_NAMES.get(repo, repo)))
    return next((found for name in names for found in snapshots(repository(cache, name))), None)


def held(folder: Path) -> Path:
    """Return the snapshot that a repository's folder holds; any other folder as it is."""
    found = snapshots(folder) if folder.name.startswith(_PREFIX) else []
    return found[0] if found else folder


def repository_of(folder: Path) -> Path | None:
    """Return the folder of the repository that a folder is, or that it is a snapshot of; None if it is neither."""
    return next((each for each in (folder, folder.parent.parent) if each.name.startswith(_PREFIX)), None)
