"""The keys of llama-swap's configuration: what replaces each of them here, or why nothing does.

Errors about unknown keys and `llama-router import` go by it, and docs/llama-swap.md explains it at length.
"""

from __future__ import annotations

from collections.abc import Mapping

from router.config.schema import CommandEntry, ConfigFile, ModelEntry, Section

_REPLACED_IN_MODELS = {
    "ttl": "idle_timeout_sec",
    "aliases": "{NAME: MODEL} in the section aliases",
    "filters": "removed and forced of an entry in the section aliases",
    "macros": "YAML anchors",
    "name": "description",
    "sendLoadingState": "api.heartbeat_sec",
}
REPLACED: Mapping[type[Section], Mapping[str, str]] = {
    ConfigFile: {
        "healthCheckTimeout": "system.wait_ready_sec",
        "metricsMaxInMemory": "system.requests_kept",
        "startPort": "system.base_port",
        "globalTTL": "system.idle_timeout_sec",
        "apiKeys": "api.api_keys, api.inference_keys or api.clients",
        "logLevel": "system.debug",
        "sendLoadingState": "api.heartbeat_sec",
        "macros": "YAML anchors",
        "groups": "decided by available memory; see also pinned in a model's entry",
        "matrix": "decided by available memory; see also pinned in a model's entry",
        "hooks": "system.preload_models",
    },
    ModelEntry: {
        **_REPLACED_IN_MODELS,
        "cmd": "model_path and flags, or, of another server, the same beside `engine: command`",
        "concurrencyLimit": "system.max_queue_size_per_model",
    },
    CommandEntry: {
        **_REPLACED_IN_MODELS,
        "cmdStop": "stop_cmd",
        "checkEndpoint": "ready_path",
        "useModelName": "model_name",
        "proxy": "{host} and {port} in cmd",
        "concurrencyLimit": "slots",
    },
}
"""Keys of llama-swap with what replaces them, by the section in which they would be written here."""

_LOADING = "waiting streams are kept open by comments (api.heartbeat_sec), not by text of the model"
_DROPPED_IN_MODELS = {
    "compat": "engines are not called over WebSockets",
    "metadata": "model lists describe what the model's file says",
    "sendLoadingState": _LOADING,
    "timeouts": "system.request_timeout_sec and answer_timeout_sec apply to all models",
    "unlisted": "all models are listed",
    "unloadTimeout": "system.stop_grace_sec applies to all models",
}
DROPPED: Mapping[type[Section], Mapping[str, str]] = {
    ConfigFile: {
        "captureBuffer": "bodies of requests and answers are kept if system.capture.requests is set",
        "includeAliasesInList": "aliases are always listed",
        "logRequests": "system.access_log is on unless it is turned off",
        "logTimeFormat": "the format of times in the log is fixed",
        "logToStdout": "the router logs to standard error; engine logs are at `llama-router logs` and in log_dir",
        "matrix": "memory decides which models stay loaded together",
        "peers": "other servers are not called",
        "performance": "/vram and /metrics describe the machine",
        "profiles": "an alias always means the same model",
        "sendLoadingState": _LOADING,
        "store": "the last requests are kept in memory (system.requests_kept); use log_dir and tracing for "
        "permanent records",
        "ui": "nothing of the page is configured",
        "upstream": "/upstream loads its model for every path",
    },
    ModelEntry: {
        **_DROPPED_IN_MODELS,
        "capabilities": "read from the model's file",
        "checkEndpoint": "llama-server reports itself when it is ready",
        "cmdStop": "the router stops llama-server itself",
        "concurrencyLimit": "-np sets how many requests run at once, "
        "system.max_queue_size_per_model how many may wait",
        "proxy": "the router chooses the addresses of engines",
        "useModelName": "llama-server ignores the name of the model",
    },
    CommandEntry: _DROPPED_IN_MODELS,
}
"""Keys of llama-swap that `llama-router import` drops where they are set, and why."""


def hint(section: type[Section] | None, key: str) -> str | None:
    """Explain a key of llama-swap found in a section; None if it is not one."""
    if section is None:
        return None
    if counterpart := REPLACED.get(section, {}).get(key):
        return f"it is a key of llama-swap, here replaced by: {counterpart}"
    if reason := DROPPED.get(section, {}).get(key):
        return f"it is a key of llama-swap without a counterpart: {reason}"
    return None
