"""Discovers models that other programs have downloaded: the Hugging Face cache and Ollama's store. Read-only.

Each is scanned only if the configuration enables it, and has its own naming: a file of the Hugging Face cache is
`USER/REPO:QUANT`, as for `llama-server -hf`, a model in safetensors `USER/REPO`; models of Ollama have the names
that `ollama list` shows.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Literal

import msgspec

from router.formats import hf_cache
from router.formats.ollama_options import BadOption, load_flags, request_parameters
from router.store.created import Created, Example
from router.store.discovery import Discovery, Found, Headers, Survey, quantization, stem

_MODEL = "application/vnd.ollama.image.model"
_PROJECTOR = "application/vnd.ollama.image.projector"
_ADAPTER = "application/vnd.ollama.image.adapter"
_SYSTEM = "application/vnd.ollama.image.system"
_PARAMETERS = "application/vnd.ollama.image.params"
_MESSAGES = "application/vnd.ollama.image.messages"
_LARGEST_LAYER = 1 << 20
"""Size limit for layers that are read entirely."""


class _Layer(msgspec.Struct):
    mediaType: str
    digest: str


class _Manifest(msgspec.Struct):
    layers: list[_Layer]


class _Turn(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str


_parameters_of = msgspec.json.Decoder(dict[str, Any]).decode
_turns_of = msgspec.json.Decoder(list[_Turn]).decode


def hugging_face(cache: Path, headers: Headers | None = None, *, settle_sec: float = 0.0) -> Discovery:
    """Return the models of all repositories: of the main branch first, then of other snapshots, newest first."""
    survey = Survey(headers, settle_sec)
    found: list[Found] = []
    for folder in hf_cache.repositories(cache):
        repo = hf_cache.name_of(folder)
        first: dict[str, Found] = {}
        for snapshot in hf_cache.snapshots(folder):
            paths = [path for _, paths in survey.folders(snapshot) for path in paths]
            names = {path: path.relative_to(snapshot).as_posix() for path in paths}
            # Files that an older revision has as well are skipped silently.
            fresh = [path for path in paths if names[path] not in first]
            for model in survey.models(fresh, of_one_repository=True):
                first[names[model.path]] = model
        aliases = repository_aliases(repo, [PurePath(name) for name in first])
        found += [replace(model, alias=aliases[PurePath(name)]) for name, model in first.items()]
    return survey.discovery(found)


def repository_aliases(repo: str, models: Sequence[PurePath]) -> dict[PurePath, str]:
    """Return the aliases of a repository's models: `USER/REPO:QUANT`, with the file name if that is ambiguous."""
    labels = {model: quantization(model) for model in models}
    uses = Counter(labels.values())

    def alias(model: PurePath) -> str:
        if uses[labels[model]] > 1:
            return f"{repo}/{model.with_name(stem(model)).as_posix()}"
        return f"{repo}:{labels[model]}" if labels[model] else repo

    return {model: alias(model) for model in models}


def ollama_folder(environ: Mapping[str, str]) -> Path | None:
    """Return the folder of Ollama's models; None without a home."""
    if named := environ.get("OLLAMA_MODELS"):
        return Path(named)
    home = environ.get("HOME")
    return Path(home, ".ollama", "models") if home else None


def ollama(store: Path, headers: Headers | None = None, *, settle_sec: float = 0.0) -> Discovery:
    """Return the models that `ollama list` shows, by the same names. Raises OSError if there is no store."""
    os.scandir(store / "manifests").close()
    survey = Survey(headers, settle_sec)
    found: list[Found] = []
    for manifest in sorted((store / "manifests").glob("*/*/*/*")):
        if manifest.name.startswith("."):
            continue
        alias = _ollama_name(manifest.relative_to(store / "manifests"))
        model = _ollama_model(store, manifest, survey)
        if model is not None:
            found.append(replace(model, alias=alias))
    return survey.discovery(found)


def _ollama_name(path: Path) -> str:
    host, namespace, model, tag = path.parts
    if host != "registry.ollama.ai":
        return f"{host}/{namespace}/{model}:{tag}"
    return f"{model}:{tag}" if namespace == "library" else f"{namespace}/{model}:{tag}"


def _ollama_model(store: Path, manifest: Path, survey: Survey) -> Found | None:
    try:
        layers = msgspec.json.decode(manifest.read_bytes(), type=_Manifest).layers
    except OSError as error:
        survey.skip(manifest, error.strerror or str(error))
        return None
    except msgspec.DecodeError as error:
        survey.skip(manifest, f"is no manifest of Ollama's: {error}")
        return None
    models = list(_blobs(store, layers, _MODEL))
    if len(models) != 1 or any(_blobs(store, layers, _ADAPTER)):
        survey.skip(manifest, "is not made of one GGUF file without adapters")
        return None
    try:
        made = _made(store, manifest, layers)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, BadOption) as error:
        survey.skip(manifest, f"has a system prompt, parameters or messages that cannot be read: {error}")
        return None
    model = survey.read(models[0])
    projector = next(_blobs(store, layers, _PROJECTOR), None)
    if model is None:
        return None
    return Found("", models[0], model, survey.projector_for(model, projector), made)


def _made(store: Path, manifest: Path, layers: list[_Layer]) -> Created:
    """Return what Ollama's Modelfile sets besides FROM and TEMPLATE.

    Raises OSError, MsgspecError, and BadOption for an invalid parameter.
    """

    def content(media_type: str) -> Iterator[bytes]:
        for blob in _blobs(store, layers, media_type):
            if blob.stat().st_size > _LARGEST_LAYER:
                raise OSError(f"{blob.name} is larger than {_LARGEST_LAYER >> 20} MiB")
            yield blob.read_bytes()

    parameters: dict[str, Any] = {}
    for text in content(_PARAMETERS):
        parameters |= _parameters_of(text)
    request_parameters(parameters)
    turns = [turn for text in content(_MESSAGES) for turn in _turns_of(text)]
    prompts = [text.decode() for text in content(_SYSTEM)] + [t.content for t in turns if t.role == "system"]
    return Created(
        created_at=manifest.stat().st_mtime,
        flags=load_flags(parameters, 1, None, lambda flag: None),
        system="\n\n".join(filter(None, prompts)),
        parameters=parameters,
        messages=tuple(Example(turn.role, turn.content) for turn in turns if turn.role != "system"),
    )


def _blobs(store: Path, layers: list[_Layer], media_type: str) -> Iterator[Path]:
    for layer in layers:
        if layer.mediaType == media_type:
            yield store / "blobs" / layer.digest.replace(":", "-")
