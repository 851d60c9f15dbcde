"""The models in a folder: which GGUF files there are, what to call them, and their projectors.

A split model counts once, by its first part. A file that no engine could serve as a model is reported with
the reason: it is never fatal and never left out in silence. Reads headers; loads and changes nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from router import gguf
from router.gguf import GGUF, GGUFError

# llama.cpp: `draft_prefixes` in common/preset.cpp and `gguf_filename_is_model` in common/download.cpp.
DRAFT_PREFIXES = ("mtp-", "eagle3-", "dflash-", "dspark-")

_QUANTIZATION = re.compile(r"[-._](?:ud-)?(?:i?q\d\w*|tq\d\w*|b?f16|f32|mxfp4\w*|nvfp4)$")


@dataclass(frozen=True, slots=True)
class Found:
    """A model to serve as `alias`, with the projector that lets it see or hear."""

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


@dataclass(frozen=True, slots=True)
class Discovery:
    models: tuple[Found, ...]
    skipped: tuple[Skipped, ...]


def discover(root: Path) -> Discovery:
    """Every model in `root` and the folders below it. OSError when `root` is no folder that can be read."""
    os.scandir(root).close()
    skipped: list[Skipped] = []
    pairs: list[tuple[Path, GGUF, GGUF | None]] = []
    seen: dict[str, Path] = {}
    for folder, names in _folders(root, skipped):
        models: dict[Path, GGUF] = {}
        projectors: dict[Path, GGUF] = {}
        for path in _first_parts(folder, names, skipped):
            if (original := seen.setdefault(os.path.realpath(path), path)) != path:
                skipped.append(Skipped(path, f"is the same file as {original}"))
            elif isinstance(header := _read(path), Skipped):
                skipped.append(header)
            elif header.kind == "mmproj" or "mmproj" in path.name.lower():
                projectors[path] = header
            else:
                models[path] = header
        unused = set(projectors)
        for path, model in models.items():
            chosen = _projector_of(path, list(models), projectors)
            pairs.append((path, model, projectors[chosen] if chosen else None))
            unused.discard(chosen or path)
        skipped += [Skipped(path, "is a projector that no model in its folder uses") for path in sorted(unused)]
    aliases = _aliases([path.relative_to(root) for path, _, _ in pairs])
    found = (Found(alias, *pair) for alias, pair in zip(aliases, pairs, strict=True))
    return Discovery(tuple(found), tuple(skipped))


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


def _read(path: Path) -> GGUF | Skipped:
    try:
        str(path).encode()
        header = gguf.read(path)
    except UnicodeEncodeError:
        return Skipped(path, "its name is not UTF-8: no request could ask for it")
    except GGUFError as error:
        return Skipped(path, str(error).removeprefix(f"{path}: "))
    except OSError as error:
        return Skipped(path, error.strerror or str(error))
    reason = _not_served(path, header)
    return Skipped(path, reason) if reason else header


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


def _projector_of(model: Path, models: Sequence[Path], projectors: dict[Path, GGUF]) -> Path | None:
    """The projector to run `model` with: one whose name begins the model's, the longest, then the smallest.

    Projectors are often called just `mmproj-F16`: beside one model, in whatever quantizations,
    any will do.
    """
    words = _words(model)
    alone = len({_words(other) for other in models}) == 1

    def fits(projector: Path) -> bool:
        name = _words(projector)
        return alone or (name != () and words[: len(name)] == name)

    def closeness(projector: Path) -> tuple[int, int, str]:
        return len(_words(projector)), -projectors[projector].file_bytes, projector.name

    return max(filter(fits, projectors), key=closeness, default=None)


def _words(path: Path) -> tuple[str, ...]:
    """What a file is called, less `mmproj` and the quantization."""
    name = _QUANTIZATION.sub("", _stem(path).lower().replace("mmproj", ""))
    return tuple(word for word in re.split(r"[-._\s]+", name) if word)


def _stem(path: Path) -> str:
    split = gguf.SPLIT_NAME.fullmatch(path.name)
    return re.sub(r"\s+", "-", split["stem"] if split else path.stem)


def _aliases(paths: Sequence[Path]) -> list[str]:
    """The shortest name for each file that tells it from all others."""
    choices = [
        (
            _stem(path),
            path.with_name(_stem(path)).relative_to(path.parent.parent).as_posix(),
            path.with_name(_stem(path)).as_posix(),
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
