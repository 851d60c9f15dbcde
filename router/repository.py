"""What to take of a repository on the Hugging Face hub: how one is named, and which of its files make the model.

Pure: knows names and sizes of files, and asks nobody. The naming is that of `llama-server -hf` and `ollama pull`.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from router import gguf
from router.hub import DRAFT_PREFIXES, projector_of, quantization
from router.stores import repository_aliases

DEFAULT_QUANTIZATION = "Q4_K_M"

_HOSTS = ("hf.co", "huggingface.co", "www.huggingface.co")
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(f"{_NAME}/{_NAME}")
_QUANT = re.compile(r"[A-Za-z0-9_.-]+")
_BITS = (4, 5, 6, 8, 3, 2, 16, 32, 1)
_KINDS = ("_K_M", "_K_XL", "_K_L", "_K_S", "_K", "_NL", "_XS", "_1", "_0")


class BadReference(ValueError):
    """It names no repository; the message says what would."""


class NoChoice(Exception):
    """The repository has no such file, or several; the message names what there is."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A model on the hub: a repository, and which of its files: by quantization, by path, or by our default."""

    repo: str
    quant: str | None = None
    file: str | None = None
    revision: str = "main"

    def __str__(self) -> str:
        kind = "resolve" if self.file else "tree"
        revision = "" if self.revision == "main" else f"{kind}/{self.revision}"
        path = "/".join(part for part in ("hf.co", self.repo, revision, self.file) if part)
        return f"{path}:{self.quant}" if self.quant else path


@dataclass(frozen=True, slots=True)
class Choice:
    alias: str
    model: str
    """The file to load; of a split model the first part."""
    parts: tuple[str, ...]
    mmproj: str | None

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.parts, self.mmproj) if self.mmproj else self.parts


def parse(text: str, environ: Mapping[str, str]) -> Reference:
    """`[hf.co/]USER/REPO[:QUANT]`, `[hf.co/]USER/REPO/FILE.gguf`, or an address copied from the browser.

    Raises BadReference.
    """
    mirror = urllib.parse.urlsplit(environ.get("HF_ENDPOINT", "")).netloc
    _, _, rest = text.strip().rpartition("://")
    rest = urllib.parse.unquote(rest.partition("?")[0].partition("#")[0]).strip("/")
    host, _, path = rest.partition("/")
    if host.lower() in _HOSTS or (mirror and host == mirror):
        rest = path
    elif "://" in text:
        raise BadReference(f"{text!r} is not on the Hugging Face hub: give hf.co/USER/REPO[:QUANT]")
    rest, _, quant = rest.partition(":")
    user, _, rest = rest.partition("/")
    name, _, file = rest.partition("/")
    repo, revision = f"{user}/{name}", "main"
    taken = re.fullmatch(r"(?:blob|resolve|raw)/([^/]+)/(.+)", file)
    if taken is not None:
        revision, file = taken[1], taken[2]
    elif re.fullmatch(r"tree/[^/]+/?", file):
        revision, file = file.split("/")[1], ""
    if not _REPOSITORY.fullmatch(repo) or "--" in repo or ".." in repo:
        raise BadReference(
            f"{text!r} names no repository: give hf.co/USER/REPO[:QUANT], as in hf.co/ggml-org/gemma-3-4b-it-GGUF"
        )
    if file and (quant or not file.lower().endswith(".gguf") or not is_plain(file)):
        raise BadReference(f"{text!r}: after the repository comes :QUANT, or /FILE.gguf")
    if quant and not _QUANT.fullmatch(quant):
        raise BadReference(f"{text!r}: {quant!r} is not a quantization such as {DEFAULT_QUANTIZATION}")
    return Reference(repo, quant or None, file or None, revision)


def is_plain(path: str) -> bool:
    """Whether a path of the hub's stays below the folder that it is put into."""
    return "\\" not in path and "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def choose(reference: Reference, sizes: Mapping[str, int]) -> Choice:
    """The files of a model and its projector, and the alias to serve it under. Raises NoChoice.

    Without a quantization: Q4_K_M, else another with 4 bits, then 5, 6, 8, 3, 2, 16, 32 and 1 bit; of the same
    bits K before others, and M before XL, L and S. Never another one than was asked for.
    """
    paths = [PurePosixPath(path) for path in sorted(sizes) if path.lower().endswith(".gguf")]
    projectors = {path: sizes[str(path)] for path in paths if "mmproj" in path.name.lower()}
    models = [path for path in paths if path not in projectors and _is_model(path)]
    firsts = [path for path in models if _part(path) == 1]
    chosen = _wanted(reference, firsts)
    parts = _parts(chosen)
    missing = [part for part in parts if part not in sizes]
    if missing:
        raise NoChoice(f"{chosen} is incomplete on the hub: {missing[0]} is missing")
    near = {path: size for path, size in projectors.items() if path.parent in (chosen.parent, *chosen.parents)}
    mmproj = projector_of(chosen, firsts, near)
    alias = repository_aliases(reference.repo, firsts)[chosen]
    return Choice(alias, str(chosen), parts, str(mmproj) if mmproj else None)


def _wanted(reference: Reference, models: list[PurePosixPath]) -> PurePosixPath:
    there = ", ".join(_labels(models)) or "none"
    if not models:
        raise NoChoice(f"{reference.repo} has no GGUF model; look for a repository whose name ends in -GGUF")
    if reference.file is not None:
        if PurePosixPath(reference.file) not in models:
            names = ", ".join(map(str, models))
            raise NoChoice(f"{reference.repo} has no model {reference.file}; it has {names}")
        return PurePosixPath(reference.file)
    if reference.quant is not None:
        asked = reference.quant.upper()
        labels = {path: quantization(path) for path in models}
        fits = [path for path in models if labels[path] == asked]
        fits = fits or [path for path in models if labels[path] == f"UD-{asked}"]
        if not fits:
            raise NoChoice(f"{reference.repo} has no {reference.quant}; it has {there}")
    else:
        best = min(_closeness(path) for path in models)
        fits = [path for path in models if _closeness(path) == best]
    if len(fits) > 1:
        names = ", ".join(map(str, fits))
        raise NoChoice(
            f"{reference.repo} has several such models: name one, as in hf.co/{reference.repo}/{fits[0]} ({names})"
        )
    return fits[0]


def _is_model(path: PurePosixPath) -> bool:
    name = path.name.lower()
    return "imatrix" not in name and not name.startswith(DRAFT_PREFIXES)


def _part(path: PurePosixPath) -> int:
    split = gguf.SPLIT_NAME.fullmatch(path.name)
    return int(split["part"]) if split else 1


def _parts(first: PurePosixPath) -> tuple[str, ...]:
    split = gguf.SPLIT_NAME.fullmatch(first.name)
    if split is None:
        return (str(first),)
    count = int(split["parts"])
    return tuple(
        str(first.with_name(f"{split['stem']}-{n:05}-of-{split['parts']}.gguf")) for n in range(1, count + 1)
    )


def _labels(models: Iterable[PurePosixPath]) -> list[str]:
    return sorted({quantization(path) or path.name for path in models})


def _closeness(path: PurePosixPath) -> tuple[bool, int, int, bool, str]:
    label = quantization(path) or ""
    plain = label.removeprefix("UD-")
    found = re.search(r"\d+", plain)
    bits = int(found[0]) if found else 0
    rank = _BITS.index(bits) if bits in _BITS else len(_BITS)
    kind = next((index for index, ending in enumerate(_KINDS) if plain.endswith(ending)), len(_KINDS))
    return plain != DEFAULT_QUANTIZATION, rank, kind, label != plain, plain
