"""Configuration entries of models for vLLM, and the conversion to `VllmModel`."""

from __future__ import annotations

import re
from pathlib import Path

from router.config.draft import Draft
from router.config.problems import KeyPath
from router.config.resolved import Purpose, idle_timeout
from router.config.schema import ContainerOfVllm, System, VllmEntry
from router.engines.container_entry import resolved_container
from router.engines.hf_entry import cache_of, folder_of, opened, stamps
from router.engines.kind import EntryReader
from router.engines.vllm.flags import Flags, owned
from router.engines.vllm.model import VllmModel
from router.formats import hf_cache, hf_model

KEY_VARIABLE = "VLLM_API_KEY"
_OWNED_VARIABLES = (KEY_VARIABLE, "TMPDIR")
MOST_REQUESTS = 8
"""Slots of a model whose entry says nothing of them."""

_TEXT = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
)
_SPEECH = ("/v1/audio/transcriptions", "/v1/audio/translations")
_EMBEDDING = ("/v1/embeddings", "/tokenize", "/detokenize")
_RANKING = ("/v1/rerank", "/rerank", "/tokenize", "/detokenize")
_WRITES = re.compile(r"For(CausalLM|ConditionalGeneration)|LMHeadModel|^$")
"""Architectures that generate text."""
_HEARS = re.compile(r"Whisper|Voxtral|SpeechForConditional|SpeechToText")
_RANKS = re.compile(r"ForSequenceClassification|ForRanking|CrossEncoder")


def routes_of(architecture: str, flags: Flags, purpose: hf_model.Purpose | None = None) -> frozenset[str]:
    """Return the routes that vLLM has for a model, by --runner and --convert, else by its purpose, else by its
    architecture.
    """
    runner, converted = flags.text("runner"), flags.text("convert") or flags.text("task")
    pools = runner == "pooling" or converted in ("embed", "classify", "embedding", "score", "reward")
    writes = purpose == "completion" if purpose is not None else _WRITES.search(architecture) is not None
    if not pools and (runner == "generate" or writes):
        return frozenset((*_TEXT, *(_SPEECH if _HEARS.search(architecture) else ())))
    ranks = converted in ("classify", "score") or (converted is None and _RANKS.search(architecture) is not None)
    return frozenset(_RANKING if ranks else _EMBEDDING)


def _read(draft: Draft, alias: str, entry: VllmEntry, system: System) -> VllmModel:
    path = ("models", alias)
    for index, flag, reason in owned(entry.flags):
        draft.problem((*path, "flags", index), f"{flag} cannot be set: {reason}")
    for variable in sorted(entry.env.keys() & set(_OWNED_VARIABLES)):
        draft.problem((*path, "env", variable), "cannot be set: the router sets it itself")
    flags = Flags(entry.flags)
    if entry.context is not None and "max-model-len" in flags:
        draft.problem((*path, "context"), "is also set by --max-model-len in flags: remove one of them")
    if entry.slots is not None and "max-num-seqs" in flags:
        draft.problem((*path, "slots"), "is also set by --max-num-seqs in flags: remove one of them")
    if entry.sleep and entry.container is not None:
        why = "whoever reaches the container could use vLLM's routes for developers, which no key guards"
        draft.problem((*path, "sleep"), f"cannot be combined with `container`: {why}")
    container = None if entry.container is None else _container(draft, path, entry, entry.container)
    if container is not None and container.downloads and entry.repo is not None and entry.model_path is None:
        folder = _in_cache(draft, entry, entry.repo)
    else:
        folder = folder_of(draft, path, entry, system)
    model = opened(folder) if folder is not None and draft.is_for_here else None
    routes = routes_of("", flags) if model is None else routes_of(model.architecture, flags, model.purpose)
    purposes: frozenset[Purpose] = frozenset()
    if "/v1/chat/completions" not in routes:
        purposes = frozenset({"rerank" if "/v1/rerank" in routes else "embedding"})
    elif model is not None and model.takes_images:
        purposes = frozenset({"mmproj"})
    return VllmModel(
        alias=alias,
        model_path=folder or draft.models_folder(),
        flags=entry.flags,
        slots=entry.slots or flags.size("max-num-seqs") or MOST_REQUESTS,
        env=entry.env,
        files=() if model is None else stamps(model),
        pinned=entry.pinned,
        idle_timeout_sec=idle_timeout(entry.idle_timeout_sec),
        priority=entry.priority or "normal",
        description=entry.description,
        source=draft.origin_of((*path, "model_path" if entry.repo is None else "repo")),
        purposes=purposes,
        routes=routes,
        known_as=alias,
        repo=entry.repo,
        context=entry.context,
        container=container,
        sleep=entry.sleep,
    )


def _container(draft: Draft, path: KeyPath, entry: VllmEntry, container: ContainerOfVllm) -> ContainerOfVllm:
    if container.downloads and entry.repo is None:
        draft.problem((*path, "container", "downloads"), "needs repo, the repository that is downloaded")
    if container.devices and "gpus" not in container.model_fields_set:
        container = container.model_copy(update={"gpus": None})
    return resolved_container(draft, path, container)


def _in_cache(draft: Draft, entry: VllmEntry, repo: str) -> Path | None:
    """Return the folder of a repository that need not be there yet: that of its snapshot, or its own."""
    cache = cache_of(draft, entry)
    return None if cache is None else hf_cache.snapshot(cache, repo) or hf_cache.repository(cache, repo)


ENTRIES = EntryReader(VllmEntry, {"engine": VllmModel.engine}, _read)
