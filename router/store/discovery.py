"""The models in a folder: which GGUF files there are, what to call them, and their projectors.

A split model counts once, by its first part. A file that no engine could serve as a model is reported with
the reason: it is never fatal and never left out in silence; nor is one that is still being written or fetched.
Reads headers; loads and changes nothing. Stores with a layout of their own are the business of `external.py`.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TypeVar

from router.engines.llamacpp.purpose import unserved
from router.formats import gguf
from router.formats.gguf import GGUF, SplitName
from router.formats.gguf_cursor import GGUFError, TruncatedGGUF
from router.store.created import Created

SETTLE_SEC = 1.0
"""A file that changed within this time may still be written to: some programs reserve the whole size first."""

_DOWNLOADING = (".aria2", ".part", ".partial", ".crdownload", ".download", ".filepart", ".st", ".lftp-pget-status")
"""Endings of what aria2, browsers, WinSCP, axel and lftp keep beside a file for as long as it is not whole."""
_LARGE_TENSOR = 1 << 20
_SAMPLE = 4096
_CALLED_BY_MANY = frozenset(
    ("audio", "base", "chat", "clip", "encoder", "ggml", "gguf", "instruct", "mmproj", "model", "text", "vision")
)

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
    made: Created | None = None
    """What its store adds to the file: a system prompt, parameters, examples."""

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


def discover(root: Path, headers: Headers | None = None, *, settle_sec: float = 0.0) -> Discovery:
    """Every model in `root` and the folders below it. OSError when `root` is no folder that can be read."""
    os.scandir(root).close()
    survey = Survey(headers, settle_sec)
    found = [each for _, paths in survey.folders(root) for each in survey.models(paths)]
    aliases = _aliases([each.path.relative_to(root) for each in found])
    return survey.discovery(replace(each, alias=alias) for alias, each in zip(aliases, found, strict=True))


class Survey:
    """A look at the files of one place, which remembers what was skipped."""

    def __init__(self, headers: Headers | None = None, settle_sec: float = 0.0) -> None:
        """A file that has changed within `settle_sec` may still be written to."""
        self.skipped: list[Skipped] = []
        self._headers = headers or Headers()
        self._settle_sec = settle_sec
        self._seen: dict[str, Path] = {}
        self._unfinished: dict[Path, str] = {}
        """Files that are being fetched, with what lies beside them that tells."""

    def folders(self, root: Path) -> Iterator[tuple[Path, list[Path]]]:
        """Each folder with the GGUF files in it; of split ones the first part."""
        for folder, names in _folders(root, self.skipped):
            for name in names:
                file, ending = os.path.splitext(name)
                if ending in _DOWNLOADING and file in names:
                    self._unfinished[folder / _first_part(file)] = name
            yield folder, list(_first_parts(folder, names, self.skipped))

    def models(self, paths: Iterable[Path], *, of_one_repository: bool = False) -> list[Found]:
        """The models among files that lie together, each once, without alias and with its projector."""
        models: dict[Path, GGUF] = {}
        projectors: dict[Path, GGUF] = {}
        for path in paths:
            if (original := self._seen.setdefault(os.path.realpath(path), path)) != path:
                self.skipped.append(Skipped(path, f"is the same file as {original}"))
            elif (header := self.read(path)) is not None:
                (projectors if is_projector(path, header) else models)[path] = header
        found: list[Found] = []
        unused = set(projectors)
        words = {path: _telling_words(header) for path, header in projectors.items()}
        for path, model in models.items():
            own = _telling_words(model) if projectors and not of_one_repository else set()
            fitting = {
                projector: header.file_bytes
                for projector, header in projectors.items()
                if fits(model, header)
                and not (
                    own
                    and words[projector]
                    and (own.isdisjoint(words[projector]) or is_of_a_sister(model, header))
                )
            }
            chosen = projector_of(path, list(models), fitting)
            found.append(Found("", path, model, projectors[chosen] if chosen else None))
            unused.discard(chosen or path)
        useless = "is a projector that no model in its folder uses"
        self.skipped += [Skipped(path, useless) for path in sorted(unused)]
        return found

    def read(self, path: Path) -> GGUF | None:
        """The header, without tensors, of a file to serve; None if it is skipped, with the reason in `skipped`."""
        try:
            str(path).encode()
            return self._headers.of(path, self._settle_sec, self._unfinished.get(path, ""))
        except UnicodeEncodeError:
            reason = "its name is not UTF-8: no request could ask for it"
        except GGUFError as error:
            reason = str(error).removeprefix(f"{path}: ")
        except (Unfit, Unfinished) as error:
            reason = str(error)
        except OSError as error:
            reason = error.strerror or str(error)
        except Exception as error:  # whatever is in it, the others are found
            reason = f"is unreadable: {error!r}"
        self.skip(path, reason)
        return None

    def projector_for(self, model: GGUF, path: Path | None) -> GGUF | None:
        """The header of the one that was chosen for a model; None if it is skipped, with the reason kept."""
        header = self.read(path) if path is not None else None
        if path is not None and header is not None and not fits(model, header):
            self.skip(path, f"is a projector of another kind or width than {model.path} takes")
            return None
        return header

    def skip(self, path: Path, reason: str) -> None:
        self.skipped.append(Skipped(path, reason))

    def discovery(self, found: Iterable[Found]) -> Discovery:
        return Discovery(tuple(found), tuple(self.skipped))


class Unfit(Exception):
    """A file is whole, but nothing that an engine could answer with; the message says what it is."""


class Unfinished(Exception):
    """A file is still to become whole; the message says how that is known."""


_Stamps = tuple[tuple[str, int, int], ...]
"""Path, size and time of the last change (ns) of each file that belongs together; size -1: it is not there."""


@dataclass(frozen=True, slots=True)
class _Known:
    stamps: _Stamps
    header: GGUF | str | None
    """A text: why it is unfit; None: nobody has asked for it."""


class Headers:
    """What is known of files, each as it was when it had settled.

    One that has not changed since `before` is not read again. One that is being replaced still counts as what it
    was, so that what was loaded of it is served until the new one is whole.
    """

    def __init__(self, before: Headers | None = None) -> None:
        self.settling = False
        """One of them has changed a moment ago: look again after SETTLE_SEC."""
        self._before: Mapping[Path, _Known] = before._now if before is not None else {}
        self._now: dict[Path, _Known] = {}

    def of(self, path: Path, settle_sec: float = 0.0, beside: str = "") -> GGUF:
        """The header of a model, with its first tensor only, or of a projector, with those that tell its width.

        One that was not there before must have been left alone for `settle_sec`. `beside` names what lies there
        as long as the file is not whole. Raises Unfit, Unfinished, GGUFError and OSError.
        """
        known = self._now.get(path)
        if known is None or known.header is None:
            known = self._now[path] = self._look(path, settle_sec, beside)
        assert known.header is not None
        if isinstance(known.header, str):
            raise Unfit(known.header)
        return known.header

    def _look(self, path: Path, settle_sec: float, beside: str) -> _Known:
        known = self._before.get(path)
        stamps = _stamps(path)
        try:
            if beside:
                raise Unfinished(f"is incomplete, as {beside} beside it shows: remove that if it is a leftover")
            if known is None or known.stamps != stamps or known.header is None:
                self._check_settled(stamps, settle_sec if known is None else SETTLE_SEC)
                known = _Known(stamps, _read(path))
        except (Unfinished, TruncatedGGUF):
            if known is None or known.header is None:
                raise
        return known

    def last(self, path: Path) -> GGUF | None:
        """The header of a file that is gone, which others may be about to take the place of."""
        known = self._before.get(path)
        return known.header if known is not None and isinstance(known.header, GGUF) else None

    def identity(self, path: Path) -> _Stamps:
        """Changes when another file has taken its place and has settled. Raises OSError."""
        if path not in self._now:
            known = self._before.get(path)
            try:
                stamps = _stamps(path)
                if known is not None and known.stamps != stamps:
                    self._check_settled(stamps, SETTLE_SEC)
                    known = None
            except FileNotFoundError:
                stamps = ((str(path), -1, 0),)
            except Unfinished:
                pass
            self._now[path] = known or _Known(stamps, None)
        return self._now[path].stamps

    def _check_settled(self, stamps: _Stamps, settle_sec: float) -> None:
        """By the wall clock, as files know no other. What is from the future counts as settled: the clock was set
        back, and it would not be served until then. So if the clock is set while a file is written, or a file
        server's is ahead, a look may take it for whole; the next change to it has it looked at again.
        """
        age_sec = time.time() - max((changed_ns for _, _, changed_ns in stamps), default=0) / 1e9
        if 0 <= age_sec < settle_sec:
            self.settling = True
            raise Unfinished("is still being written")


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
        first = _first_part(name)
        if first == name:
            yield folder / name
        elif first not in names:
            skipped.append(Skipped(folder / name, f"its first part is missing: {first}"))


def _first_part(name: str) -> str:
    """Of a split model; else the name itself."""
    split = SplitName.of(name)
    return name if split is None or split.part == 1 else split.name()


def _read(path: Path) -> GGUF | str:
    """The header, without most tensors, which would take megabytes; or a text that says why the file is unfit.

    Raises Unfinished, GGUFError and OSError.
    """
    header = gguf.read(path, remember=False)
    if reason := unserved(path, header):
        return reason
    if missing := _not_written(header):
        raise Unfinished(f"is incomplete: its {missing} has not been written yet")
    kept = [each for each in header.tensors if each.name.startswith("mm.")] if is_projector(path, header) else []
    return replace(header, tensors=tuple(kept) or header.tensors[:1])


def _not_written(header: GGUF) -> str | None:
    """A large tensor that lies in a hole of its file as a whole; None if there is none.

    Programs that download reserve the whole size first, which leaves holes where nothing has come yet. File
    systems that compress make holes of zeros, too, but no model has a matrix of nothing else. How many blocks a
    file takes says less: it depends on compression, too, and some tell it only later. A hole is believed once it
    was read: what a remote file system has not fetched yet may look like one.
    """
    for part, path in enumerate(header.files):
        large = [each for each in header.tensors if each.part == part and each.nbytes >= _LARGE_TENSOR]
        with path.open("rb", buffering=0) as file:
            for tensor in large:
                start = header.data_offsets[part] + tensor.offset
                if _is_hole(file.fileno(), start, start + tensor.nbytes):
                    return f"tensor {tensor.name!r}"
    return None


def _is_hole(file: int, start: int, end: int) -> bool:
    try:
        if os.lseek(file, start, os.SEEK_DATA) < end:
            return False
    except OSError as error:
        if error.errno != errno.ENXIO:  # there is no data after `start`; else it cannot tell
            return False
    return not any(os.pread(file, _SAMPLE, (start + end) // 2))


def _stamps(path: Path) -> _Stamps:
    """Of every part of a model, or of any other file. Raises OSError if it is not there."""
    split = SplitName.of(path.name)
    names = split.names if split is not None and split.parts <= _MOST_PARTS else [path.name]
    stamps: list[tuple[str, int, int]] = []
    for name in names:
        try:
            status = os.stat(path.with_name(name))
        except FileNotFoundError:
            if name == path.name:
                raise
            stamps.append((str(path.with_name(name)), -1, 0))
        else:
            stamps.append((str(path.with_name(name)), status.st_size, status.st_mtime_ns))
    return tuple(stamps)


_MERGERS = ("qwen2vl", "qwen2.5vl", "qwen2.5o", "qwen3vl")
"""How the kinds of projectors begin whose models have an architecture of their own, which places what they see."""
_READERS = frozenset({"qwen2", "qwen2moe", "qwen3", "qwen3moe"})
"""The architectures of their sisters, which read and write only."""
_OF_SENSES = re.compile(r"(?<![a-z])(?:vlm?|omni|vision|audio)(?![a-z])")


def fits(model: GGUF, projector: GGUF) -> bool:
    """Whether what a projector puts out is of the kind that the model takes, and as wide, as far as headers tell.

    Converters write the width down; older ones wrote what the encoder's own projection has, of no use here. Then
    it is that of some projecting tensor.
    """
    if model.architecture in _READERS and _kind_of(projector).startswith(_MERGERS):
        return False
    width = model.embedding_length
    said = {projector.metadata.get(f"clip.{sense}.projection_dim") for sense in ("vision", "audio")} - {None}
    shapes = {size for tensor in projector.tensors if tensor.name.startswith("mm.") for size in tensor.shape}
    if not width or not (said or shapes):
        return True
    return width in (said if said and (said <= shapes or not shapes) else shapes)


def _kind_of(projector: GGUF) -> str:
    """As its first encoder says."""
    keys = ("clip.projector_type", "clip.vision.projector_type", "clip.audio.projector_type")
    return next((str(projector.metadata[key]) for key in keys if key in projector.metadata), "")


def is_of_a_sister(model: GGUF, projector: GGUF) -> bool:
    """Whether a projector is called one for `Qwen2.5-VL`, and the model `Qwen2.5`."""
    says_so = _OF_SENSES.search(_called(projector)) is not None
    return says_so and not (_OF_SENSES.search(_called(model)) or model.architecture.endswith(("vl", "vlmoe")))


def _telling_words(header: GGUF) -> set[str]:
    """What it is called: `qwen`, `gemma`; no sizes, and nothing that many are called."""
    return set(re.findall(r"[a-z]{3,}", _called(header))) - _CALLED_BY_MANY


def _called(header: GGUF) -> str:
    """By its file and by the file's header, in small letters."""
    return f"{stem(header.path) if header.path is not None else ''} {header.name or ''}".lower()


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
    split = SplitName.of(path.name)
    name = re.sub(r"\s+", "-", split.stem if split else path.stem)
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
