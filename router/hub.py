"""The models in a folder: which GGUF files there are, what to call them, and their projectors.

A split model counts once, by its first part. A file that no engine could serve as a model is reported with
the reason: it is never fatal and never left out in silence; nor is one that is still being written. Reads
headers; loads and changes nothing. Stores with a layout of their own are the business of `stores.py`.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePath
from typing import TypeVar

from router import gguf
from router.gguf import GGUF, GGUFError

SETTLE_SEC = 1.0
"""A file that changed within this time may still be written to: some programs reserve the whole size first."""

# llama.cpp: `draft_prefixes` in common/preset.cpp and `gguf_filename_is_model` in common/download.cpp.
DRAFT_PREFIXES = ("mtp-", "eagle3-", "dflash-", "dspark-")

_QUANTIZATION = re.compile(
    r"[-._](?P<label>(?:ud-)?(?:i?q\d\w*|tq\d\w*|b?f16|f32|mxfp4\w*|nvfp4))$", re.IGNORECASE
)
_Path = TypeVar("_Path", bound=PurePath)
_MOST_PARTS = 1000


@dataclass(frozen=True, slots=True)
class Found:
    """A model to serve as `alias`, with the projector that lets it see or hear. Headers without tensors."""

    alias: str
    path: Path
    model: GGUF
    projector: GGUF | None = None

    @property
    def capabilities(self) -> tuple[str, ...]:
        return gguf.capabilities(self.model, self.projector)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A GGUF file, or a folder, that gives no model, and why."""

    path: Path
    reason: str
    settling: bool = False
    """It changed a moment ago: look again after SETTLE_SEC."""


@dataclass(frozen=True, slots=True)
class Discovery:
    models: tuple[Found, ...]
    skipped: tuple[Skipped, ...]


def discover(root: Path, *, settle_sec: float = 0.0) -> Discovery:
    """Every model in `root` and the folders below it. OSError when `root` is no folder that can be read."""
    os.scandir(root).close()
    survey = Survey(settle_sec)
    found = [each for _, paths in survey.folders(root) for each in survey.models(paths)]
    aliases = _aliases([each.path.relative_to(root) for each in found])
    return survey.discovery(replace(each, alias=alias) for alias, each in zip(aliases, found, strict=True))


class Survey:
    """A look at the files of one place, which remembers what was skipped."""

    def __init__(self, settle_sec: float = 0.0) -> None:
        self.skipped: list[Skipped] = []
        self._settle_sec = settle_sec
        self._seen: dict[str, Path] = {}

    def folders(self, root: Path) -> Iterator[tuple[Path, list[Path]]]:
        """Each folder with the GGUF files in it; of split ones the first part."""
        for folder, names in _folders(root, self.skipped):
            yield folder, list(_first_parts(folder, names, self.skipped))

    def models(self, paths: Iterable[Path]) -> list[Found]:
        """The models among files that belong together, each once, without alias and with its projector."""
        models: dict[Path, GGUF] = {}
        projectors: dict[Path, GGUF] = {}
        for path in paths:
            if (original := self._seen.setdefault(os.path.realpath(path), path)) != path:
                self.skipped.append(Skipped(path, f"is the same file as {original}"))
            elif (header := self.read(path)) is not None:
                (projectors if is_projector(path, header) else models)[path] = header
        found: list[Found] = []
        unused = set(projectors)
        sizes = {path: header.file_bytes for path, header in projectors.items()}
        for path, model in models.items():
            chosen = projector_of(path, list(models), sizes)
            found.append(Found("", path, model, projectors[chosen] if chosen else None))
            unused.discard(chosen or path)
        useless = "is a projector that no model in its folder uses"
        self.skipped += [Skipped(path, useless) for path in sorted(unused)]
        return found

    def read(self, path: Path) -> GGUF | None:
        """The header, without tensors, of a file to serve; None if it is skipped, with the reason in `skipped`."""
        header = _read(path, self._settle_sec)
        if isinstance(header, Skipped):
            self.skipped.append(header)
            return None
        return header

    def skip(self, path: Path, reason: str) -> None:
        self.skipped.append(Skipped(path, reason))

    def discovery(self, found: Iterable[Found]) -> Discovery:
        return Discovery(tuple(found), tuple(self.skipped))


def is_alias(text: str) -> bool:
    """Whether a model can be called so."""
    return bool(text) and text.isprintable() and not any(map(str.isspace, text))


def is_projector(path: Path, header: GGUF) -> bool:
    return header.kind == "mmproj" or "mmproj" in path.name.lower()


def quantization(path: PurePath) -> str | None:
    """What a file's name, or else its folder's, says of its quantization, in capitals: `Q4_K_M`, `UD-Q4_K_XL`."""
    found = _QUANTIZATION.search(stem(path)) or _QUANTIZATION.search(f"-{path.parent.name}")
    return found["label"].upper() if found else None


def _folders(root: Path, skipped: list[Skipped]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder once, with its file names sorted; links to folders are followed, but not in circles."""

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped(Path(error.filename), error.strerror or str(error)))

    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        if (place := os.path.realpath(folder)) in visited:
            subfolders.clear()
            continue
        visited.add(place)
        subfolders.sort()
        yield Path(folder), sorted(names)


def _first_parts(folder: Path, names: Sequence[str], skipped: list[Skipped]) -> Iterator[Path]:
    for name in names:
        if not name.lower().endswith(".gguf"):
            continue
        split = gguf.SPLIT_NAME.fullmatch(name)
        if split is None or int(split["part"]) == 1:
            yield folder / name
        elif (first := f"{split['stem']}-00001-of-{split['parts']}.gguf") not in names:
            skipped.append(Skipped(folder / name, f"its first part is missing: {first}"))


def _read(path: Path, settle_sec: float) -> GGUF | Skipped:
    try:
        str(path).encode()
        stamps = _stamps(path)
        # By the wall clock, as files know no other. What is from the future counts as settled: the clock was set
        # back, and it would not be served until then. So if the clock is set while a file is written, or a file
        # server's is ahead, a look may take it for whole; the next change to it has it looked at again.
        age_sec = time.time() - max((changed_ns for _, changed_ns in stamps), default=0) / 1e9
        if 0 <= age_sec < settle_sec:
            return Skipped(path, "is still being written", settling=True)
        header = _header(path, stamps)
    except UnicodeEncodeError:
        return Skipped(path, "its name is not UTF-8: no request could ask for it")
    except GGUFError as error:
        return Skipped(path, str(error).removeprefix(f"{path}: "))
    except OSError as error:
        return Skipped(path, error.strerror or str(error))
    reason = _not_served(path, header)
    return Skipped(path, reason) if reason else header


@lru_cache(maxsize=4096)
def _header(path: Path, _stamps: tuple[tuple[int, int], ...]) -> GGUF:
    """Read again only when one of its files has changed. Tensors are not kept: they would take megabytes."""
    header = gguf.read(path, remember=False)
    return replace(header, tensors=header.tensors[:1])


def _stamps(path: Path) -> tuple[tuple[int, int], ...]:
    """Size and time of the last change, of every part that is there."""
    split = gguf.SPLIT_NAME.fullmatch(path.name)
    names = [path.name]
    if split is not None and int(split["parts"]) <= _MOST_PARTS:
        parts = int(split["parts"])
        names = [f"{split['stem']}-{part:05}-of-{split['parts']}.gguf" for part in range(1, parts + 1)]
    stamps: list[tuple[int, int]] = []
    for name in names:
        try:
            status = os.stat(path.with_name(name))
        except FileNotFoundError:
            if name == path.name:
                raise
            stamps.append((-1, 0))
        else:
            stamps.append((status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def _not_served(path: Path, header: GGUF) -> str | None:
    if header.kind not in ("model", "mmproj"):
        return f"is a GGUF of type {header.kind!r}, not a model"
    if path.name.lower().startswith(DRAFT_PREFIXES):
        return "is a draft for speculative decoding, not a model of its own"
    if not header.tensors:
        return "has no tensors: it holds a vocabulary only"
    if header.byte_order != sys.byteorder:
        return f"is {header.byte_order}-endian, unlike this machine: convert it with `gguf-convert-endian`"
    return None


def projector_of(model: _Path, models: Sequence[_Path], projectors: Mapping[_Path, int]) -> _Path | None:
    """The projector (with its size) to run `model` with: one whose name begins the model's, the longest, then
    the smallest.

    Projectors are often called just `mmproj-F16`: beside one model, in whatever quantizations,
    any will do.
    """
    if not projectors:
        return None
    words = _words(model)
    alone = all(_words(other) == words for other in models)

    def fits(projector: _Path) -> bool:
        name = _words(projector)
        return alone or (name != () and words[: len(name)] == name)

    def closeness(projector: _Path) -> tuple[int, int, str]:
        return len(_words(projector)), -projectors[projector], projector.name

    return max(filter(fits, projectors), key=closeness, default=None)


def _words(path: PurePath) -> tuple[str, ...]:
    """What a file is called, less `mmproj` and the quantization."""
    name = _QUANTIZATION.sub("", stem(path).lower().replace("mmproj", ""))
    return tuple(word for word in re.split(r"[-._\s]+", name) if word)


def stem(path: PurePath) -> str:
    """The name of a file, or of the model that it is a part of, without its ending and without spaces."""
    split = gguf.SPLIT_NAME.fullmatch(path.name)
    name = re.sub(r"\s+", "-", split["stem"] if split else path.stem)
    return path.name if name == "." else name  # which no path can end in


def _aliases(paths: Sequence[Path]) -> list[str]:
    """The shortest name for each file that tells it from all others."""
    choices = [
        (
            stem(path),
            path.with_name(stem(path)).relative_to(path.parent.parent).as_posix(),
            path.with_name(stem(path)).as_posix(),
            path.as_posix(),
        )
        for path in paths
    ]
    ranks = [0] * len(paths)
    while True:
        aliases = [choice[rank] for choice, rank in zip(choices, ranks, strict=True)]
        uses = Counter(aliases)
        if len(uses) == len(aliases):
            return aliases
        # The last choice, the path, is unlike all other paths: it need not give way to another file's alias.
        ranks = [min(rank + (uses[alias] > 1), 3) for rank, alias in zip(ranks, aliases, strict=True)]
