"""Images, audio and video of a request: whether the request contains them, or has the engine fetch them.

llama-server fetches any http or https URL in place of a medium from its own network, and with `--media-path`
files, too. Where media may occur depends on API and build, so the whole document is searched, except for the
arguments of tool calls, which are the client's own data.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from router.http.errors import ApiError

DEPTH = 8
"""Maximum depth of a medium in a body: the URL of an image in the result of a tool, in Anthropic's API."""
_NAMES = (b"_url", b"input_audio", b"input_video", b'"source"')
_ESCAPES = (b"\\u004", b"\\u005", b"\\u006", b"\\u007")
"""Escapes of the letters in these names, which only a client that wants to hide them writes."""
LONGEST_NAME = max(map(len, _NAMES)) + 4

_MEDIA = ("image_url", "input_audio", "input_video", "video_url", "audio_url")
"""Keys of media: of OpenAI's chats and responses, and further ones of llama-server."""
_BASE64 = re.compile(r"(?!http)[A-Za-z0-9+/=_-]{0,8}")
"""The beginning of a medium in base64 without a data: URL."""

_decode = msgspec.json.Decoder().decode


def may_name_media(body: bytes | memoryview) -> bool:
    """Whether a body, or a part of it, may have media, so that it has to be searched."""
    text = bytes(body)
    return any(name in text for name in _NAMES) or (
        b"\\u00" in text and any(letters in text for letters in _ESCAPES)
    )


def check_media(body: bytes | memoryview) -> None:
    """Raise ApiError 400 for a JSON document, perhaps in its short form, that has the engine fetch a medium."""
    document = _decode(body)
    values = list(document.values()) if isinstance(document, dict) else [document]
    while values:
        value = values.pop()
        if isinstance(value, list):
            values += value
        elif isinstance(value, dict):
            for key in _MEDIA:
                if key in value:
                    _check_medium(key, value[key])
            source = value.get("source")
            if isinstance(source, dict) and source.get("type") == "url":
                _check_address("source.url", source.get("url"))
            is_call = value.get("type") == "tool_use"
            values += (inner for key, inner in value.items() if not (is_call and key == "input"))


def _check_medium(key: str, medium: Any) -> None:
    if isinstance(medium, dict):
        for inner in ("url", "data"):
            _check_address(f"{key}.{inner}", medium.get(inner))
    else:
        _check_address(key, medium)


def _check_address(place: str, said: Any) -> None:
    if isinstance(said, str) and not said.startswith("data:") and not _BASE64.fullmatch(said[:8]):
        message = (
            f"`{place}` is a URL, and this API key may not have the engine fetch URLs (api.remote_media). Send "
            "the content as a data: URL (data:image/png;base64,…)."
        )
        raise ApiError(400, "remote_media_not_allowed", message, place)
