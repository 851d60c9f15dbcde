"""Configuration entries of models for Transformers, and the conversion to `TransformersModel`."""

from __future__ import annotations

from collections.abc import Mapping

from router.config.draft import Draft
from router.config.resolved import ModelConfig, idle_timeout
from router.config.schema import System, TransformersEntry
from router.engines import MARK_VARIABLE
from router.engines.hf_entry import folder_of, opened, stamps
from router.engines.kind import EntryReader
from router.engines.transformers.model import TransformersModel
from router.engines.transformers.questions import ROUTES

OFFLINE: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""Variables of every engine: without them a load asks the hub about forty times, and PyPI for a newer version."""
_BY_ROUTER = "cannot be set: the router sets it itself"
_BY_MEMORY = "cannot be set: the router chooses devices by memory (system.gpu_devices says which it may use)"
_BY_QUANTIZE = "cannot be set: use the key `quantize`"
_NO_BATCHES = (
    "is not supported: Transformers then ignores stop texts and sampling parameters, and fails for good at a "
    "prompt that is larger than its cache"
)
_OWNED: Mapping[str, str] = {
    "--host": _BY_ROUTER,
    "--port": _BY_ROUTER,
    "--non-blocking": _BY_ROUTER,
    "--device": _BY_MEMORY,
    "--dtype": _BY_QUANTIZE,
    "--quantization": _BY_QUANTIZE,
    "--continuous-batching": _NO_BATCHES,
    "--model-timeout": "has no effect with a single model: use the key `idle_timeout_sec`",
    "--enable-cors": "cannot be set: browsers talk to the router (api.cors_origins)",
}
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def _read(draft: Draft, alias: str, entry: TransformersEntry, system: System) -> ModelConfig:
    path = ("models", alias)
    for index, flag in enumerate(entry.flags):
        if (wrong := _OWNED.get(flag.partition("=")[0])) is not None:
            draft.problem((*path, "flags", index), wrong)
    for variable in sorted({MARK_VARIABLE, *OFFLINE}.intersection(entry.env)):
        draft.problem((*path, "env", variable), _BY_ROUTER)
    folder = folder_of(draft, path, entry, system) or draft.models_folder()
    model = opened(folder) if draft.is_for_here else None
    takes_media = any((folder / name).is_file() for name in _PROCESSORS)
    longest = (entry.context, None if model is None else model.context)
    return TransformersModel(
        alias=alias,
        model_path=folder,
        flags=entry.flags,
        env=entry.env,
        files=() if model is None else stamps(model),
        pinned=entry.pinned,
        idle_timeout_sec=idle_timeout(entry.idle_timeout_sec),
        priority=entry.priority or "normal",
        description=entry.description,
        source=draft.origin_of((*path, "model_path" if entry.repo is None else "repo")),
        routes=ROUTES,
        quantize=entry.quantize,
        context=entry.context,
        longest=min(filter(None, longest), default=None),
        repo=entry.repo,
        has_template=model is None or model.has_chat_template,
        takes_media=takes_media,
        purposes=frozenset({"mmproj"} if takes_media else ()),
    )


ENTRIES = EntryReader(TransformersEntry, {"engine": TransformersModel.engine}, _read)
