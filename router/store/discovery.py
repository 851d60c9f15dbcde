"""Discovers the models in a folder: GGUF files with their projectors, and folders in safetensors; names them.

A split model counts once, by its first part. A file that cannot be served, or is still being written or
downloaded, is reported with the reason; it is neither fatal nor silently ignored. Only headers are read, and
nothing is changed. Stores with layouts of their own are handled by `external.py`.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TypeVar

from router.engines.llamacpp.purpose import unserved
from router.formats import gguf, hf_model, safetensors
from router.formats.gguf import GGUF, SplitName
from router.formats.gguf_cursor import GGUFError, TruncatedGGUF
from router.formats.hf_model import HfModel, Incomplete, Unreadable
from router.store.created import Created

SETTLE_SEC = 1.0
"""A file that changed within this time may still be growing: some programs reserve the whole size first."""

_DOWNLOADING = (".aria2", ".part", ".partial", ".crdownload", ".download", ".filepart", ".st", ".lftp-pget-status")
"""Suffixes of the files that aria2, browsers, WinSCP, axel and lftp keep beside an incomplete file."""
_LARGE_TENSOR = 1 << 20
_SAMPLE = 4096
_CALLED_BY_MANY = frozenset(
    ("audio", "base", "chat", "clip", "encoder", "ggml", "gguf", "instruct", "mmproj", "model", "text", "vision")
)

_QUANTIZATION = re.compile(
    r"[-._](?P<label>(?:ud-)?(?:i?q\d\w*|tq\d\w*|b?f16|f32|mxfp4\w*|nvfp4))$", re.IGNORECASE
)
_Path = TypeVar("_Path", bound=PurePath)
_Header = TypeVar("_Header", GGUF, HfModel)
_MOST_PARTS = 1000


@dataclass(frozen=True, slots=True)
class Found:
    """A model to serve as `alias`, with its projector for images or audio. Headers without tensors."""

    alias: str
    path: Path
    """Its file, or its folder."""
    model: GGUF | HfModel
    projector: GGUF | None = None
    made: Created | None = None
    """System prompt, parameters and examples that its store attaches to the file."""
    quantize: str | None = None
    """How to load a model in safetensors, if that is known."""

    @property
    def capabilities(self) -> tuple[str, ...]:
        if isinstance(self.model, HfModel):
            return () if self.model.purpose is None else (self.model.purpose,)
        return gguf.capabilities(self.model, self.projector)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A GGUF file or a folder that is not served, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Discovery:
    models: tuple[Found, ...]
    skipped: tuple[Skipped, ...]


def discover(root: Path, headers: Headers | None = None, *, settle_sec: float = 0.0) -> Discovery:
    """Return every model in `root` and the folders below it. Raises OSError if `root` cannot be read."""
    os.scandir(root).close()
    survey = Survey(headers, settle_sec)
    found = [each for _, paths in survey.folders(root) for each in survey.models(paths)]
    files = [each for each in found if isinstance(each.model, GGUF)]
    folders = [each for each in found if not isinstance(each.model, GGUF)]
    aliases = _aliases([_names_of_file(each.path.relative_to(root)) for each in files])
    # After those of files, which keep their names when a folder appears beside them.
    aliases += _aliases([_names_of_folder(each.path, root) for each in folders], aliases)
    return survey.discovery(
        replace(each, alias=alias) for alias, each in zip(aliases, (*files, *folders), strict=True)
    )


class Survey:
    """A scan of the files of one place, which records what was skipped."""

    def __init__(self, headers: Headers | None = None, settle_sec: float = 0.0) -> None:
        """Files that changed within the last `settle_sec` are considered unfinished."""
        self.skipped: list[Skipped] = []
        self._headers = headers or Headers()
        self._settle_sec = settle_sec
        self._seen: dict[str, Path] = {}
        self._unfinished: dict[Path, str] = {}
        """Files that are being downloaded, each with the name of the file beside it that shows this."""

    def folders(self, root: Path) -> Iterator[tuple[Path, list[Path]]]:
        """Yield each folder with its models: of split models the first part, in safetensors the folder itself."""
        for folder, names in _folders(root, self.skipped):
            for name in names:
                file, ending = os.path.splitext(name)
                if ending in _DOWNLOADING and file in names:
                    of_folder = file.endswith(".safetensors")
                    self._unfinished[folder if of_folder else folder / _first_part(file)] = name
            models = list(_first_parts(folder, names, self.skipped))
            yield folder, [*models, folder] if hf_model.is_folder_of_model(names) else models

    def models(self, paths: Iterable[Path], *, of_one_repository: bool = False) -> list[Found]:
        """Return the models among files of one folder, each once, without alias and with its projector."""
        models: dict[Path, GGUF] = {}
        projectors: dict[Path, GGUF] = {}
        found: list[Found] = []
        for path in paths:
            if (original := self._seen.setdefault(os.path.realpath(path), path)) != path:
                self.skipped.append(Skipped(path, f"is the same file as {original}"))
            elif path.is_dir():
                if (folder := self.read_folder(path)) is not None:
                    found.append(Found("", path, folder))
            elif (header := self.read(path)) is not None:
                (projectors if is_projector(path, header) else models)[path] = header
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
        """Return the header of a file, without tensors; None if it is skipped, with the reason in `skipped`."""
        return self._read(path, self._headers.of)

    def read_folder(self, path: Path) -> HfModel | None:
        """Return the model of a folder; None if it is skipped, with the reason in `skipped`."""
        return self._read(path, self._headers.of_folder)

    def _read(self, path: Path, reader: Callable[[Path, float, str], _Header]) -> _Header | None:
        try:
            str(path).encode()
            return reader(path, self._settle_sec, self._unfinished.get(path, ""))
        except UnicodeEncodeError:
            reason = "its name is not UTF-8: no request could ask for it"
        except (GGUFError, Unreadable) as error:
            reason = str(error).removeprefix(f"{path}: ").removeprefix(f"{path}/")
        except (Unfit, Unfinished) as error:
            reason = str(error)
        except OSError as error:
            reason = error.strerror or str(error)
        except Exception as error:  # one bad file must not hide the others
            reason = f"is unreadable: {error!r}"
        self.skip(path, reason)
        return None

    def projector_for(self, model: GGUF, path: Path | None) -> GGUF | None:
        """Return the header of a model's projector; None if it is skipped, with the reason in `skipped`."""
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
    """Raised for a complete file that no engine can serve; the message says what it is."""


class Unfinished(Exception):
    """Raised for an incomplete file; the message says how that is known."""


_Stamps = tuple[tuple[str, int, int], ...]
"""Path, size and modification time (ns) of each part of a model; size -1: the part is missing."""


@dataclass(frozen=True, slots=True)
class _Known:
    stamps: _Stamps
    header: GGUF | HfModel | str | None
    """A text says why the file is unfit; None means that the header was not requested."""


class Headers:
    """Headers of files, each in its last complete state.

    A file that has not changed since the previous scan, `before`, is not read again. A file that is being replaced
    keeps its previous header, so that the loaded model is served until the new file is complete.
    """

    def __init__(self, before: Headers | None = None) -> None:
        self.settling = False
        """True if a file changed just before the scan: scan again after SETTLE_SEC."""
        self._before: Mapping[Path, _Known] = before._now if before is not None else {}
        self._now: dict[Path, _Known] = {}

    def of(self, path: Path, settle_sec: float = 0.0, beside: str = "") -> GGUF:
        """Return the header of a model with its first tensor, or of a projector with those that show its width.

        A new file must have been unchanged for `settle_sec`. `beside` names the file that a download program keeps
        beside an incomplete one. Raises Unfit, Unfinished, GGUFError and OSError.
        """
        header = self._of(path, settle_sec, beside, _stamps, _read)
        assert isinstance(header, GGUF)
        return header

    def of_folder(self, path: Path, settle_sec: float = 0.0, beside: str = "") -> HfModel:
        """Return the model in safetensors of a folder, like `of`. Raises Unreadable instead of GGUFError."""
        model = self._of(path, settle_sec, beside, hf_model.stamps, _read_folder)
        assert isinstance(model, HfModel)
        return model

    def _of(
        self,
        path: Path,
        settle_sec: float,
        beside: str,
        stamps_of: Callable[[Path], _Stamps],
        read: Callable[[Path], GGUF | HfModel | str],
    ) -> GGUF | HfModel:
        known = self._now.get(path)
        if known is None or known.header is None:
            known = self._now[path] = self._look(path, settle_sec, beside, stamps_of(path), read)
        assert known.header is not None
        if isinstance(known.header, str):
            raise Unfit(known.header)
        return known.header

    def _look(
        self,
        path: Path,
        settle_sec: float,
        beside: str,
        stamps: _Stamps,
        read: Callable[[Path], GGUF | HfModel | str],
    ) -> _Known:
        known = self._before.get(path)
        try:
            if beside:
                raise Unfinished(f"is incomplete, as {beside} beside it shows: remove that if it is a leftover")
            if known is None or known.stamps != stamps or known.header is None:
                self._check_settled(stamps, settle_sec if known is None else SETTLE_SEC)
                known = _Known(stamps, read(path))
        except (Unfinished, TruncatedGGUF, Incomplete):
            if known is None or known.header is None:
                raise
        return known

    def last(self, path: Path) -> GGUF | None:
        """Return the previous header of a file that is missing, perhaps because it is being replaced."""
        known = self._before.get(path)
        return known.header if known is not None and isinstance(known.header, GGUF) else None

    def identity(self, path: Path) -> _Stamps:
        """Return the stamps of a file; they change once a new file has replaced it and settled. Raises OSError."""
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
        """Raise Unfinished for files that changed within `settle_sec`, by the wall clock that file systems use.

        A time in the future counts as settled: the clock was set back, and the file would not be served until
        then. So if the clock is changed during a write, or a file server's clock is ahead, a partial file may be
        taken for complete; its next change causes another look.
        """
        age_sec = time.time() - max((changed_ns for _, _, changed_ns in stamps), default=0) / 1e9
        if 0 <= age_sec < settle_sec:
            self.settling = True
            raise Unfinished("is still being written")


def is_projector(path: Path, header: GGUF) -> bool:
    return header.kind == "mmproj" or "mmproj" in path.name.lower()


def quantization(path: PurePath) -> str | None:
    """Return the quantization in the name of a file, or of its folder, in capitals: `Q4_K_M`, `UD-Q4_K_XL`."""
    found = _QUANTIZATION.search(stem(path)) or _QUANTIZATION.search(f"-{path.parent.name}")
    return found["label"].upper() if found else None


def _folders(root: Path, skipped: list[Skipped]) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder once, with its file names sorted; links to folders are followed, but not in cycles."""

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
    """Return the name of the first part of a split model; of any other file, its own name."""
    split = SplitName.of(name)
    return name if split is None or split.part == 1 else split.name()


def _read(path: Path) -> GGUF | str:
    """Return the header without most tensors, which would take megabytes, or the reason why the file is unfit.

    Raises Unfinished, GGUFError and OSError.
    """
    header = gguf.read(path, remember=False)
    if reason := unserved(path, header):
        return reason
    if missing := _not_written(header):
        raise Unfinished(f"is incomplete: its {missing} has not been written yet")
    kept = [each for each in header.tensors if each.name.startswith("mm.")] if is_projector(path, header) else []
    return replace(header, tensors=tuple(kept) or header.tensors[:1])


def _read_folder(folder: Path) -> HfModel | str:
    """Return the model of a folder, or the reason why it is unfit. Raises Unfinished, Unreadable and OSError."""
    model = hf_model.read(folder)
    if not (model.architecture or model.model_type):  # a part of a model, such as a layer of Sentence Transformers
        return f"its {hf_model.CONFIG} names no kind of model"
    for file in model.files:
        header = safetensors.read(file)
        with file.open("rb", buffering=0) as opened:
            for name, tensor in header.tensors.items():
                start, end = (header.data_offset + offset for offset in tensor.data_offsets)
                if tensor.nbytes >= _LARGE_TENSOR and _is_hole(opened.fileno(), start, end):
                    raise Unfinished(f"is incomplete: its tensor {name!r} has not been written yet")
    return model


def _not_written(header: GGUF) -> str | None:
    """Name a large tensor that lies entirely in a hole of its file; None if there is none.

    Download programs reserve the whole size first, which leaves holes where no data has arrived. Compressing file
    systems turn zeros into holes as well, but no model has a large tensor of zeros only. The number of allocated
    blocks is less reliable: it depends on compression, and some file systems update it late. A hole counts only
    after reading it, because data that a remote file system has not fetched may look like one.
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
        if error.errno != errno.ENXIO:  # ENXIO: no data after `start`; others: holes are not supported
            return False
    return not any(os.pread(file, _SAMPLE, (start + end) // 2))


def _stamps(path: Path) -> _Stamps:
    """Return the stamps of every part of a model, or of any other file. Raises OSError if it is missing."""
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
"""Prefixes of the kinds of projectors that require a model with a vision architecture of its own."""
_READERS = frozenset({"qwen2", "qwen2moe", "qwen3", "qwen3moe"})
"""Text-only architectures of the same families."""
_OF_SENSES = re.compile(r"(?<![a-z])(?:vlm?|omni|vision|audio)(?![a-z])")


def fits(model: GGUF, projector: GGUF) -> bool:
    """Whether the output of a projector has the kind and width that the model takes, as far as headers show.

    Converters record the width; older ones recorded that of the encoder's own projection instead. In that case the
    width is that of one of the projecting tensors.
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
    """Return the kind of a projector, from the first encoder that names one."""
    keys = ("clip.projector_type", "clip.vision.projector_type", "clip.audio.projector_type")
    return next((str(projector.metadata[key]) for key in keys if key in projector.metadata), "")


def is_of_a_sister(model: GGUF, projector: GGUF) -> bool:
    """Whether the names suggest different siblings: a projector for `Qwen2.5-VL`, but the model is `Qwen2.5`."""
    says_so = _OF_SENSES.search(_called(projector)) is not None
    return says_so and not (_OF_SENSES.search(_called(model)) or model.architecture.endswith(("vl", "vlmoe")))


def _telling_words(header: GGUF) -> set[str]:
    """Return the distinctive words of a model's name, such as `qwen`: no sizes, and no common words."""
    return set(re.findall(r"[a-z]{3,}", _called(header))) - _CALLED_BY_MANY


def _called(header: GGUF) -> str:
    """Return the name of the file and the name in its header, in lower case."""
    return f"{stem(header.path) if header.path is not None else ''} {header.name or ''}".lower()


def projector_of(model: _Path, models: Sequence[_Path], projectors: Mapping[_Path, int]) -> _Path | None:
    """Choose a projector for `model`; `projectors` maps candidates to their sizes.

    Its name must be a prefix of the model's; the longest wins, then the smallest file. Many projectors are named
    just `mmproj-F16`: in a folder with one model, in any quantizations, every projector qualifies.
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
    """Return the words of a file name without `mmproj` and the quantization."""
    name = _QUANTIZATION.sub("", stem(path).lower().replace("mmproj", ""))
    return tuple(word for word in re.split(r"[-._\s]+", name) if word)


def stem(path: PurePath) -> str:
    """Return the name of a file, or of the split model it belongs to, without extension and spaces."""
    split = SplitName.of(path.name)
    name = re.sub(r"\s+", "-", split.stem if split else path.stem)
    return path.name if name == "." else name  # which no path can end in


def _names_of_file(path: Path) -> tuple[str, ...]:
    """Return names for a file, the shortest first, of which the last is unique."""
    whole = path.with_name(stem(path))
    return stem(path), whole.relative_to(path.parent.parent).as_posix(), whole.as_posix(), path.as_posix()


def _names_of_folder(folder: Path, root: Path) -> tuple[str, ...]:
    """Return names for a folder, the shortest first, of which the last is unique."""
    path = Path(root.name) if folder == root else folder.relative_to(root)
    short = re.sub(r"\s+", "-", path.name)
    whole = path.with_name(short)
    return short, whole.relative_to(path.parent.parent).as_posix(), whole.as_posix(), f"{path.as_posix()}/"


def _aliases(names: Sequence[Sequence[str]], taken: Collection[str] = ()) -> list[str]:
    """Choose the shortest unique one of each item's names, none of which is taken."""
    ranks = [0] * len(names)
    while True:
        aliases = [choice[rank] for choice, rank in zip(names, ranks, strict=True)]
        uses = Counter([*aliases, *taken])
        # The last name is unique: it need not give way to the alias of another item.
        raised = [
            min(rank + (uses[alias] > 1), len(choice) - 1)
            for choice, rank, alias in zip(names, ranks, aliases, strict=True)
        ]
        if raised == ranks:
            return aliases
        ranks = raised
