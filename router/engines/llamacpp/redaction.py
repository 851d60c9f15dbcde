"""What llama-server says of itself, without what is not for everybody who may use it."""

from __future__ import annotations

import re
from pathlib import PureWindowsPath
from typing import Any

import msgspec

from router.http.errors import ApiError


def for_clients(document: bytes) -> bytes:
    """What an engine says of itself, for who may only use it: of files the names, and of others' requests nothing.

    Raises ApiError 502 for what is no JSON.
    """
    try:
        return msgspec.json.encode(_for_clients("", msgspec.json.decode(document)))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
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
"""What a slot is at work on; told if llama-server is started so that it is (LLAMA_SERVER_SLOTS_DEBUG)."""
