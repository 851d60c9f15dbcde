"""Reads the headers of local and remote models; of remote files, only the first bytes are downloaded.

A model is given as a path, an http(s) URL, `hf.co/USER/REPO/FILE.gguf`, or, like for `pull`, as
`hf.co/USER/REPO[:QUANT]`, which includes its projector. A model in safetensors is a folder or a repository.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from router import __version__
from router.config.names import HUB_HOSTS
from router.formats import gguf, hf_model, safetensors
from router.formats.gguf import GGUF
from router.formats.gguf_cursor import TruncatedGGUF
from router.formats.hf_model import HfModel
from router.store.pulled import FOLDER
from router.store.repository import BadReference, Choice, NoChoice, Reference, gated, parse

if TYPE_CHECKING:
    from router.store.hub_api import HubRepository

FIRST_BYTES = 8 << 20
"""Enough for the headers of nearly all models: a vocabulary of 150,000 tokens and its merges take 6 MB."""
FIRST_BYTES_OF_OTHERS = 256 << 10
"""The same for the further parts of a split model, which have no vocabulary."""
FIRST_BYTES_OF_SAFETENSORS = 128 << 10
"""The same for a file of a model in safetensors, with some hundred tensors."""
AT_ONCE = 8
"""Number of files whose headers are read concurrently; large models have more than a hundred."""
MOST_BYTES = 256 << 20
TIMEOUT_SEC = 30.0

_REFUSALS = {
    401: "it asks for a token: set HF_TOKEN",
    403: "access is denied: check HF_TOKEN, and the model's licence on its page",
    404: "there is no such file",
}
_PART_NUMBER = re.compile(r"-00001-of-(\d{5})\.gguf$", re.IGNORECASE)


class CannotRead(Exception):
    """Raised when a header cannot be read; the message says why and what to do."""


class Whole(NamedTuple):
    """A model with what belongs to it."""

    model: GGUF | HfModel
    projector: GGUF | None = None
    choice: Choice | None = None
    """The files that were chosen of a repository."""


def read_whole(model: str, environ: Mapping[str, str]) -> Whole:
    """Return a model's header; if a repository is given, also its projector's header and the choice of files.

    Raises CannotRead, GGUFError, Unreadable.
    """
    reference = _repository(model, environ)
    if reference is None:
        if Path(model).is_dir():
            return Whole(_read_local_folder(Path(model)))
        return Whole(read(model, environ))
    from huggingface_hub import get_token  # imported here because it takes 0.3 s, not needed for files

    from router.store.hub_api import HubError, HubRepository

    hub = HubRepository(reference, environ)
    try:
        found = hub.find(time.sleep)
    except (NoChoice, HubError) as error:
        raise CannotRead(str(error)) from None
    environ = {**environ, "HF_TOKEN": get_token() or ""}
    model_path, projector_path = found.choice.model, found.choice.mmproj
    if model_path == FOLDER:
        return Whole(read_folder(hub, found.commit, found.choice, environ), choice=found.choice)
    header = read(hub.url(found.commit, model_path), environ)
    projector = read(hub.url(found.commit, projector_path), environ) if projector_path else None
    return Whole(header, projector, found.choice)


def _read_local_folder(folder: Path) -> HfModel:
    try:
        return hf_model.read(folder)
    except OSError as error:
        raise CannotRead(f"{error.filename or folder} cannot be read: {error.strerror or error}") from None


def read_folder(hub: HubRepository, commit: str, choice: Choice, environ: Mapping[str, str]) -> HfModel:
    """Return a model in safetensors of a repository. Raises CannotRead, Unreadable."""
    token = environ.get("HF_TOKEN")

    def json_of(path: str) -> dict[str, Any]:
        url = hub.url(commit, path)
        body, size = _fetch_range(url, 0, hf_model.MOST_BYTES, token)
        if size > len(body):
            raise CannotRead(f"{url} is larger than {hf_model.MOST_BYTES >> 20} MiB")
        return hf_model.parse_object(body, url)

    def header_of(path: str) -> safetensors.Header:
        url = hub.url(commit, path)
        buffer, size = _fetch_range(url, 0, FIRST_BYTES_OF_SAFETENSORS, token)
        try:
            return safetensors.parse(buffer, file_bytes=size, source=url)
        except safetensors.Truncated as error:
            more, _ = _fetch_range(url, len(buffer), error.needed, token)
            return safetensors.parse(buffer + more, file_bytes=size, source=url)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        headers = list(pool.map(header_of, choice.weights))
    has_chat_template = any(path in choice.parts for path in hf_model.TEMPLATES)
    if not has_chat_template and hf_model.TOKENIZER_CONFIG in choice.parts:
        has_chat_template = bool(json_of(hf_model.TOKENIZER_CONFIG).get("chat_template"))
    return hf_model.of_parts(
        Path(hub.reference.repo),
        json_of(hf_model.CONFIG),
        headers,
        tuple(Path(path) for path in choice.weights),
        has_chat_template=has_chat_template,
        has_modules=hf_model.MODULES in choice.parts,
    )


def _repository(model: str, environ: Mapping[str, str]) -> Reference | None:
    """Return the reference if `model` names a repository without a file; else None."""
    if model.startswith("/") or Path(model).exists():
        return None
    with contextlib.suppress(BadReference):
        reference = parse(model, environ)
        if reference.file is None and not reference.repo.lower().endswith(".gguf"):
            return reference
    return None


def read(model: str, environ: Mapping[str, str]) -> GGUF:
    """Return the header of a file, a URL or a file on the Hugging Face hub. Raises CannotRead, GGUFError."""
    url = resolve(model, environ)
    if url is None:
        try:
            return gguf.read(Path(model))
        except FileNotFoundError:
            raise CannotRead(f"there is no file {model}") from None
        except OSError as error:
            raise CannotRead(f"{model} cannot be read: {error.strerror or error}") from None

    token = environ.get("HF_TOKEN") if _is_hub(url, environ) else None
    first = _fetch(url, token, FIRST_BYTES)
    number = first.part_count
    if number <= 1:
        return first
    named = _PART_NUMBER.search(urllib.parse.urlsplit(url).path)
    if named is None or int(named[1]) != number:
        raise CannotRead(f"{url} is one of {number} parts: use the first, …-00001-of-{number:05d}.gguf")
    others = (url.replace(f"-00001-of-{named[1]}", f"-{part:05d}-of-{named[1]}") for part in range(2, number + 1))
    parts = [first, *(_fetch(other, token, FIRST_BYTES_OF_OTHERS) for other in others)]
    return replace(
        first,
        tensors=tuple(tensor for part in parts for tensor in part.tensors),
        file_bytes=sum(part.file_bytes for part in parts),
    )


def resolve(model: str, environ: Mapping[str, str]) -> str | None:
    """Return the URL to read; None for a local file. Raises CannotRead."""
    endpoint = environ.get("HF_ENDPOINT") or "https://huggingface.co"
    scheme, _, rest = model.rpartition("://")
    if scheme not in ("", "http", "https"):
        raise CannotRead(f"{model}: {scheme} is not a supported protocol; use an http(s) URL")
    host, *path = rest.split("/")
    if host.lower() in HUB_HOSTS and (scheme or not Path(model).exists()):
        if len(path) > 4 and path[2] in ("blob", "resolve", "raw"):  # as copied from the browser
            path = [*path[:2], "resolve", *path[3:]]
        elif len(path) >= 3:
            path = [*path[:2], "resolve", "main", *path[2:]]
        if len(path) < 5 or not path[-1].partition("?")[0].lower().endswith(".gguf"):
            raise CannotRead(f"{model} is not a model: use hf.co/USER/REPO[:QUANT] or hf.co/USER/REPO/FILE.gguf")
        return f"{endpoint.rstrip('/')}/{'/'.join(path)}"
    return model if scheme else None


def _is_hub(url: str, environ: Mapping[str, str]) -> bool:
    hubs = {"huggingface.co", urllib.parse.urlsplit(environ.get("HF_ENDPOINT", "")).netloc}
    return urllib.parse.urlsplit(url).netloc in hubs


def _fetch(url: str, token: str | None, wanted: int) -> GGUF:
    """Return the header of one remote file: one request for its first `wanted` bytes, more if it is longer."""
    buffer = b""
    while True:
        more, size = _fetch_range(url, len(buffer), wanted, token)
        buffer += more
        try:
            return gguf.parse(buffer, file_bytes=size, source=url)
        except TruncatedGGUF:
            if len(buffer) >= min(size, MOST_BYTES) or not more:
                raise
        wanted = 2 * len(buffer)


def _fetch_range(url: str, start: int, end: int, token: str | None) -> tuple[bytes, int]:
    """Return the bytes from `start` to `end` of a remote file, or fewer at its end, and the size of the file."""
    headers = {"Range": f"bytes={start}-{end - 1}", "User-Agent": f"llama-router/{__version__}"}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310
    if token:  # for the hub only, not for the storage to which it redirects
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SEC) as answer:  # noqa: S310
            if answer.status == 206:
                _, _, size = answer.headers.get("Content-Range", "").rpartition("/")
                body = answer.read(end - start)
            else:  # the server sends the whole file; closing the connection stops it
                size = answer.headers.get("Content-Length", "")
                body = answer.read(end)[start:]
    except urllib.error.HTTPError as error:
        if error.headers.get("X-Error-Code") == "GatedRepo":
            raise CannotRead(gated(url.partition("/resolve/")[0])) from None
        reason = _REFUSALS.get(error.code, f"HTTP {error.code} {error.reason}")
        raise CannotRead(f"{url}: {reason}") from None
    except urllib.error.URLError as error:
        raise CannotRead(f"{url} cannot be reached: {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # a broken connection, an invalid URL
        raise CannotRead(f"{url} cannot be read: {error}") from None
    if not size.isdecimal():
        raise CannotRead(f"{url}: the server does not say how large the file is")
    return body, int(size)
