"""The environment of an earlier gateway, in which vLLM ran in one container at a time.

Each allowed model becomes an entry: vLLM in a container, which is started by the first request and downloads the
model into the shared cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.config.draft import Draft

_NETWORK, _HOST, _UTILIZATION = "DOCKER_NETWORK_NAME", "VLLM_HOST", "VLLM_GPU_MEMORY_UTILIZATION"
_IMAGE = "VLLM_IMAGE"
_TOKEN = "HUGGING_FACE_HUB_TOKEN"  # noqa: S105 - a name
_CACHE_VARIABLE, _CACHE = "HF_HOME", "/root/.cache/huggingface"
_AT_ONCE = 256
"""Requests that vLLM computes at once by default (--max-num-seqs)."""
_DEFAULTS: Mapping[tuple[str, str], Any] = {
    ("api", "port"): 9000,
    ("system", "max_concurrent_models"): 1,
    # A first load downloads the model, and its progress cannot be seen.
    ("system", "load_stall_sec"): 3600,
    ("system", "queue_timeout_sec"): 3600,
}


def add_models(draft: Draft, variables: Mapping[str, tuple[str, str]]) -> None:
    """Add entries for the allowed models to a draft if the variables are such a gateway's. What else is configured
    takes precedence.

    `variables` holds the value of each variable, and where it was set.
    """
    told = {name: variables[name] for name in (_NETWORK, _HOST, _UTILIZATION) if name in variables}
    allowed = _section(draft, "system").get("allowed_models")
    if not told or not isinstance(allowed, dict):
        return
    (_, origin), *_ = told.values()
    for (section, key), value in _DEFAULTS.items():
        if key not in _section(draft, section):
            draft.put((section, key), value, origin)
    # A name that is fixed serves one container at a time.
    is_alone = _section(draft, "system")["max_concurrent_models"] == 1
    models = _section(draft, "models")
    for alias, repository in allowed.items():
        if alias in models or not isinstance(repository, str):
            continue
        path, source = ("models", alias), draft.origin_of(("system", "allowed_models", alias))
        draft.put(path, _entry(repository), source)
        if _IMAGE in variables:
            draft.put((*path, "container", "image"), *variables[_IMAGE])
        if _NETWORK in told:
            draft.put((*path, "container", "network"), *told[_NETWORK])
        if _HOST in told and is_alone:
            draft.put((*path, "container", "name"), *told[_HOST])
        if _UTILIZATION in told:
            draft.put((*path, "flags"), ["--gpu-memory-utilization", told[_UTILIZATION][0]], source)
        if variables.get(_TOKEN, ("", ""))[0]:
            draft.put((*path, "env", _TOKEN), *variables[_TOKEN])


def _section(draft: Draft, name: str) -> Mapping[str, Any]:
    found = draft.values.get(name)
    return found if isinstance(found, dict) else {}


def _entry(repository: str) -> dict[str, Any]:
    return {
        "engine": "vllm",
        "repo": repository,
        "slots": _AT_ONCE,
        "container": {"downloads": True},
        "env": {_CACHE_VARIABLE: _CACHE},
        "description": repository,
    }
