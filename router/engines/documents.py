"""Documents that engines serve about themselves, and what of them clients without full access may see."""

from __future__ import annotations

import re
from pathlib import PureWindowsPath
from typing import Any, NamedTuple

import msgspec

from router.formats.unreadable import UNREADABLE
from router.http.errors import ApiError


class Documents(NamedTuple):
    """Paths of a kind of engine at which clients without full access may read."""

    readable: frozenset[str]
    """Paths where a GET changes nothing."""
    private: frozenset[str]
    """Readable paths whose documents name files of the machine or contain text of requests: see `for_clients`."""
    closed: frozenset[str] = frozenset()
    """Paths that nobody may ask, because they load, unload or stop models behind the router's back."""


def for_clients(document: bytes) -> bytes:
    """Reduce paths in a JSON document to file names, and remove the text of requests.

    Raises ApiError 502 for what is no JSON.
    """
    try:
        return msgspec.json.encode(_for_clients("", msgspec.json.decode(document)))
    except UNREADABLE:
        raise ApiError(502, "engine_error", "The engine's response is not JSON.") from None


def _for_clients(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _for_clients(key, item) for key, item in value.items() if key not in _OF_OTHERS}
    if isinstance(value, list):
        return [_for_clients(key, item) for item in value]
    if isinstance(value, str) and (key.endswith("path") or _PATH.match(value)):
        return PureWindowsPath(value).name  # which knows both separators
    return value


_PATH = re.compile(r"(?:/|~/|[A-Za-z]:[\\/]|\\\\)[^\n]*\Z")
_OF_OTHERS = ("prompt", "generated")
"""Text that a slot is processing, included if llama-server is started with LLAMA_SERVER_SLOTS_DEBUG."""

_PRIVATE = frozenset({"/props", "/slots", "/lora-adapters", "/models", "/v1/models"})
OF_LLAMA_SERVER = Documents(_PRIVATE | {"/", "/health", "/v1/health", "/metrics"}, _PRIVATE)
"""Documents of llama-server, and of other servers with the same routes."""
