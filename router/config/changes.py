"""Differences between two configurations, and which of them require a restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.config.resolved import AliasConfig, Config, ModelConfig

_NEEDS_RESTART = {
    "api": ("host", "port", "ollama_port", "cors_origins", "allowed_hosts", "max_connections"),
    "system": (
        "llama_server_path",
        "transformers_path",
        "vllm_path",
        "base_port",
        "gpu_devices",
        "preload_models",
        "preload_delay_sec",
        "state_dir",
        "log_ring_lines",
        "debug",
        "structured_logs",
        "access_log",
        "log_dir",
        "tracing",
    ),
    "scheduling": (),
    "kv_store": ("dir",),
}
"""By section, the keys whose changes take effect only at a restart."""


def changes_between(before: Config, after: Config) -> dict[str, list[str]]:
    """Return the names that were added, removed and changed."""
    old, new = ({name: _what_is(name, config) for name in config.names} for config in (before, after))
    return {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(alias for alias in old.keys() & new.keys() if old[alias] != new[alias]),
    }


def in_words(changes: Mapping[str, Sequence[str]]) -> str:
    """Describe the changes for people: `added a, b; removed c`."""
    words = {"settings": "changed", "needs_restart": "a restart is needed for"}
    parts = [f"{words.get(how, how)} {', '.join(names)}" for how, names in changes.items() if names]
    return "; ".join(parts) or "nothing has changed"


def _what_is(name: str, config: Config) -> tuple[ModelConfig | None, AliasConfig | None]:
    return config.models.get(name), config.aliases.get(name)


def changed_settings(before: Config, after: Config) -> list[str]:
    """Return the keys besides those of models and aliases that have changed, and take effect at once."""
    return [
        f"{name}.{key}"
        for name, later in _NEEDS_RESTART.items()
        for key in type(getattr(after, name)).model_fields
        if key not in later and getattr(getattr(before, name), key) != getattr(getattr(after, name), key)
    ]


def needs_restart(running: Config, wanted: Config) -> list[str]:
    """Return the changed keys that take effect only at a restart; `running` is the configuration of the start."""
    return [
        f"{name}.{key}"
        for name, keys in _NEEDS_RESTART.items()
        for key in keys
        if getattr(getattr(running, name), key) != getattr(getattr(wanted, name), key)
    ]
