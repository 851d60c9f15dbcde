"""Images, audio and video of a request: are they in it, or is the engine to fetch them from an address?

llama-server fetches every address of http and https that stands where it takes a medium, from where it runs, and
with `--media-path` files, too. Where media may stand is up to the API and the build, so all of a document is gone
through, but for the arguments of tools, which are the client's own affair.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from router.http.errors import ApiError

DEPTH = 8
"""How deep in a body a medium may be: the address of an image in the result of a tool, in Anthropic's words."""
_NAMES = (b"_url", b"input_audio", b"input_video", b'"source"')
_ESCAPES = (b"\\u004", b"\\u005", b"\\u006", b"\\u007")
"""Of the letters in these names, which nobody writes so who does not want to hide them."""
LONGEST_NAME = max(map(len, _NAMES)) + 4

_MEDIA = ("image_url", "input_audio", "input_video", "video_url", "audio_url")
"""Keys of media: in OpenAI's chats and responses, and those that llama-server has besides."""
_BASE64 = re.compile(r"(?!http)[A-Za-z0-9+/=_-]{0,8}")
"""How a medium begins that is there without saying what it is."""

_decode = msgspec.json.Decoder().decode


def may_name_media(body: bytes | memoryview) -> bool:
    """Whether it is worth looking for media in a body, or in a part of it."""
    text = bytes(body)
    return any(name in text for name in _NAMES) or (
        b"\\u00" in text and any(letters in text for letters in _ESCAPES)
    )


def check_media(body: bytes | memoryview) -> None:
    """Raises ApiError 400 for a JSON document, perhaps in its short form, with a medium that is not in it."""
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
            f"`{place}` is an address, and this API key may not have things fetched (api.remote_media). Send what "
            "is there as a data: URL (data:image/png;base64,…)."
        )
        raise ApiError(400, "remote_media_not_allowed", message, place)
