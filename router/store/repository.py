"""References to repositories on the Hugging Face hub, and the choice of the files that form the model.

Pure functions of names and sizes of files; the hub is not queried. The syntax is that of `llama-server -hf` and
`ollama pull`.
"""

from __future__ import annotations

import contextlib
import math
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import get_args

from router.config.names import HUB_HOSTS, same_name, untagged
from router.config.schema import Quantize
from router.engines.llamacpp.purpose import DRAFT_PREFIXES
from router.formats import hf_model
from router.formats.gguf import SplitName
from router.formats.hf_cache import NEW_NAMES
from router.formats.quantizations import BITS, DEFAULT, bits_of, closeness
from router.store.discovery import projector_of, quantization
from router.store.external import repository_aliases
from router.store.pulled import FOLDER

Q4_ABOVE_BYTES = 14_000_000_000
"""Default size limit up to which AUTO chooses the unquantized model."""

AUTO = "auto"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(f"{_NAME}/{_NAME}")
_QUANT = re.compile(r"[A-Za-z0-9_.-]+")
_UNQUANTIZED = (16, 32)
_BESIDE_WEIGHTS = re.compile(
    r"[^/]+\.(?:json|jinja|txt|model|tiktoken|spm|py)"
    r"|additional_chat_templates/[^/]+\.jinja"
    r"|\d+_[A-Za-z]+/[^/]+\.(?:json|safetensors)"  # modules of Sentence Transformers
)
_OF_OTHERS = re.compile(r"^(?:pytorch_|tf_|flax_|rust_|consolidated|adapter_)|\.(?:bin|h5|msgpack)\.index\.json$")
"""Files of copies for other programs."""
_BITS_OF = {
    **{f"Q{bits}": (bits,) for bits in BITS if bits < 16},
    "FP16": (16,),
    "FP32": (32,),
    "NO": _UNQUANTIZED,
}
"""Words that give only a number of bits. FP16 includes BF16."""


class BadReference(ValueError):
    """Raised for text that names no repository; the message describes the syntax."""


class NotAllowed(Exception):
    """Raised for a model that may not be pulled; the message lists those that may."""


class NoChoice(Exception):
    """Raised when the repository has no such file, or several; the message lists its files."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A model on the hub: a repository, and which of its files, by quantization, path, or the router's default."""

    repo: str
    quant: str | None = None
    """A label such as Q4_K_M, a number of bits (`q4`, `q8`, …, `fp16`, `fp32`, `no`), or `auto`."""
    file: str | None = None
    revision: str = "main"

    def __str__(self) -> str:
        kind = "resolve" if self.file else "tree"
        revision = "" if self.revision == "main" else f"{kind}/{self.revision}"
        path = "/".join(part for part in ("hf.co", self.repo, revision, self.file) if part)
        return f"{path}:{self.quant}" if self.quant else path


@dataclass(frozen=True, slots=True)
class Choice:
    """The files of a model in a repository, and its alias."""

    alias: str
    model: str
    """The file to load; for a split model, the first part; `FOLDER` for a model in safetensors."""
    parts: tuple[str, ...]
    """The files of the model, without a projector."""
    mmproj: str | None = None
    weights: tuple[str, ...] = ()
    """Those of the parts that hold the weights of a model in safetensors."""
    quantize: str | None = None
    """How to load a model in safetensors, if that was said: a value of the entry's key of that name."""

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.parts, self.mmproj) if self.mmproj else self.parts


def parse(text: str, environ: Mapping[str, str]) -> Reference:
    """Parse `[hf.co/]USER/REPO[:QUANT]`, `[hf.co/]USER/REPO/FILE.gguf`, or a URL copied from the browser.

    `:latest`, which Ollama's clients append to names without a tag, is ignored. Raises BadReference.
    """
    mirror = urllib.parse.urlsplit(environ.get("HF_ENDPOINT", "")).netloc
    _, _, rest = text.strip().rpartition("://")
    rest = urllib.parse.unquote(rest.partition("?")[0].partition("#")[0]).strip("/")
    if not rest.isprintable():
        raise BadReference(f"{text!r} has characters that are not allowed in names")
    host, _, path = rest.partition("/")
    if host.lower() in HUB_HOSTS or (mirror and host == mirror):
        rest = path
    elif "://" in text:
        raise BadReference(f"{text!r} is not on the Hugging Face hub: use hf.co/USER/REPO[:QUANT]")
    rest, _, quant = untagged(rest).partition(":")
    rest = NEW_NAMES.get(rest, rest)
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
            f"{text!r} is not a repository: use hf.co/USER/REPO[:QUANT], as in hf.co/ggml-org/gemma-3-4b-it-GGUF"
        )
    if file and (quant or not file.lower().endswith(".gguf") or not is_plain(file)):
        raise BadReference(f"{text!r}: the repository must be followed by :QUANT or /FILE.gguf")
    if quant:
        _check_quantization(quant, text)
    return Reference(repo, quant or None, file or None, revision)


def _check_quantization(quant: str, text: str) -> None:
    if not _QUANT.fullmatch(quant):
        raise BadReference(f"{text!r}: {quant!r} is not a quantization such as {DEFAULT}")


def permitted(
    text: str, allowed: Mapping[str, str] | None, environ: Mapping[str, str]
) -> tuple[Reference, str | None]:
    """Return the reference that a client requests, and the alias to serve it under if it used one of `allowed`.

    `allowed` maps aliases to references; None allows every reference. One without quantization or file allows its
    whole repository. Raises BadReference, NotAllowed.
    """
    if allowed is None:
        return parse(text, environ), None
    alias = same_name(text, allowed)
    if alias is not None:
        return parse(allowed[alias], environ), alias
    listed = [parse(each, environ) for each in allowed.values()]
    with contextlib.suppress(BadReference):
        reference = parse(text, environ)
        if reference in listed or Reference(reference.repo, revision=reference.revision) in listed:
            return reference, None
    raise NotAllowed(
        f"{text!r} may not be pulled here (system.allowed_models); allowed: {', '.join(allowed) or 'none'}"
    )


def is_of(repo: str, alias: str) -> bool:
    """Whether an alias is a default one for a model of the repository."""
    return alias == repo or alias.startswith((f"{repo}:", f"{repo}/"))


def quantized(reference: Reference, quantize: str) -> Reference:
    """Return a reference with a quantization; AUTO does not change one that has it. Raises BadReference."""
    if reference.quant is None and reference.file is None:
        _check_quantization(quantize, quantize)
        return replace(reference, quant=quantize)
    if quantize.lower() != AUTO:
        raise BadReference(f"{reference} already specifies a file: omit `quantize`")
    return reference


def is_quantized(path: str) -> bool:
    """Whether a file is quantized, judging by its name."""
    return 0 < _bits(PurePosixPath(path)) < min(_UNQUANTIZED)


def gated(page: str) -> str:
    """Say how to get access to a gated repository; `page` is its URL."""
    repo = "/".join(page.split("/")[-2:])
    return f"{repo} is gated: accept its terms on {page}, then set HF_TOKEN to your token"


def is_plain(path: str) -> bool:
    """Whether a path from the hub stays below the folder it is written to."""
    return "\\" not in path and "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def choose(reference: Reference, sizes: Mapping[str, int], q4_above_bytes: int = Q4_ABOVE_BYTES) -> Choice:
    """Choose the files of a model and its projector, and the alias to serve it under. Raises NoChoice.

    `sizes` are the sizes in bytes of the repository's files. Without a quantization: Q4_K_M, else another with 4
    bits, then 5, 6, 8, 3, 2, 16, 32 and 1 bit; for equal bits, K before others, and M before XL, L and S. A given
    quantization is never replaced by another. `auto` chooses the unquantized model, unless it is larger than
    `q4_above_bytes` or missing; then the choice is the same as without a quantization. A repository without GGUF
    is taken as it is, if it holds a model in safetensors.
    """
    if not any(path.lower().endswith(".gguf") for path in sizes) and hf_model.CONFIG in sizes:
        return _folder(reference, sizes)
    paths = [PurePosixPath(path) for path in sorted(sizes) if path.lower().endswith(".gguf")]
    projectors = {path: sizes[str(path)] for path in paths if "mmproj" in path.name.lower()}
    models = [path for path in paths if path not in projectors and _is_model(path)]
    firsts = [path for path in models if _part(path) == 1]
    if reference.quant is not None and reference.quant.lower() == AUTO:
        reference = replace(reference, quant=_automatic(firsts, sizes, q4_above_bytes))
    chosen = _wanted(reference, firsts)
    parts = _parts(chosen)
    missing = [part for part in parts if part not in sizes]
    if missing:
        raise NoChoice(f"{chosen} is incomplete on the hub: {missing[0]} is missing")
    near = {path: size for path, size in projectors.items() if path.parent in (chosen.parent, *chosen.parents)}
    mmproj = projector_of(chosen, firsts, near)
    alias = repository_aliases(reference.repo, firsts)[chosen]
    return Choice(alias, str(chosen), parts, str(mmproj) if mmproj else None)


def _folder(reference: Reference, paths: Iterable[str]) -> Choice:
    """Return a model in safetensors with everything that its engine reads. Raises NoChoice."""
    paths = sorted(paths)
    repo = reference.repo
    try:
        weights = hf_model.weight_files([path for path in paths if "/" not in path], None, repo)
    except hf_model.Unreadable as error:
        raise NoChoice(f"{error}, and no GGUF model") from None
    if reference.file is not None:
        raise NoChoice(f"{repo} has no GGUF model, but one in safetensors: use hf.co/{repo}")
    quantize = (reference.quant or AUTO).lower()
    if quantize not in get_args(Quantize):
        ways = ", ".join(get_args(Quantize))
        raise NoChoice(f"{repo} has no {reference.quant}, but safetensors, which can be loaded as {ways}")
    beside = [path for path in paths if _BESIDE_WEIGHTS.fullmatch(path) and not _OF_OTHERS.search(path)]
    return Choice(
        repo,
        FOLDER,
        (*weights, *beside),
        weights=weights,
        quantize=None if quantize == AUTO else quantize,
    )


def _automatic(models: Sequence[PurePosixPath], sizes: Mapping[str, int], q4_above_bytes: int) -> str | None:
    full = _closest(path for path in models if _bits(path) in _UNQUANTIZED)
    bytes_of_full = sum(sizes.get(part, 0) for part in _parts(full[0])) if full else math.inf
    return "NO" if bytes_of_full <= q4_above_bytes else None


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
        fits = fits or _closest(path for path in models if _bits(path) in _BITS_OF.get(asked, ()))
        if not fits:
            raise NoChoice(f"{reference.repo} has no {reference.quant}; it has {there}")
    else:
        fits = _closest(models)
    if len(fits) > 1:
        names = ", ".join(map(str, fits))
        raise NoChoice(
            f"{reference.repo} has several such models: use one, as in hf.co/{reference.repo}/{fits[0]} ({names})"
        )
    return fits[0]


def _is_model(path: PurePosixPath) -> bool:
    name = path.name.lower()
    return "imatrix" not in name and not name.startswith(DRAFT_PREFIXES)


def _part(path: PurePosixPath) -> int:
    split = SplitName.of(path.name)
    return split.part if split else 1


def _parts(first: PurePosixPath) -> tuple[str, ...]:
    split = SplitName.of(first.name)
    return (str(first),) if split is None else tuple(str(first.with_name(name)) for name in split.names)


def _labels(models: Iterable[PurePosixPath]) -> list[str]:
    return sorted({quantization(path) or path.name for path in models})


def _closest(models: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    """Return the models closest to the default quantization; several if they are indistinguishable."""
    ranked = [(closeness(quantization(path) or ""), path) for path in models]
    best = min((closeness for closeness, _ in ranked), default=None)
    return [path for closeness, path in ranked if closeness == best]


def _bits(path: PurePosixPath) -> int:
    return bits_of(quantization(path) or "")
