"""Files that go with a prompt: images for models that see, text for all."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from router.cli.client import CannotAsk

_KINDS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"RIFF", "image/webp"),
)
_IMAGE = re.compile(
    r"""'(?P<quoted>[^'\n]+\.(?:png|jpe?g|gif|bmp|webp))'|(?P<plain>(?:~|\.{1,2})?/(?:\\.|[^\s\\])+?\.(?:png|jpe?g|gif|bmp|webp)\b)""",
    re.IGNORECASE,
)
"""What may be the path of an image, as it is typed, or comes from a file that was dropped on the terminal."""
_MOST_BYTES = 64 << 20

Part = dict[str, Any]
"""A part of a message in OpenAI's API."""


def image(path: str) -> Part:
    """Return an image for a prompt. Raises CannotAsk."""
    content = _content(path)
    kind = next((kind for begin, kind in _KINDS if content.startswith(begin)), None)
    if kind is None:
        raise CannotAsk(f"{path} is not an image in PNG, JPEG, GIF, BMP or WebP.")
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(content).decode()}"}}


def text(path: str) -> str:
    """Return a text file for a prompt, with its name, between fences that are not in it. Raises CannotAsk."""
    try:
        content = _content(path).decode()
    except UnicodeDecodeError:
        raise CannotAsk(f"{path} is not text in UTF-8. Images are attached by /image.") from None
    longest = max((len(ticks) for ticks in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{Path(path).name}:\n{fence}\n{content.rstrip()}\n{fence}"


def images_in(prompt: str) -> tuple[str, list[str]]:
    """Return a prompt without the paths of images in it, and the paths. What is no file remains in the text."""
    paths: list[str] = []

    def taken(found: re.Match[str]) -> str:
        path = found["quoted"] or re.sub(r"\\(.)", r"\1", found["plain"])
        if not Path(path).expanduser().is_file():
            return found[0]
        paths.append(path)
        return ""

    left = _IMAGE.sub(taken, prompt)
    return (left.strip() if paths else prompt), paths


def _content(path: str) -> bytes:
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, RuntimeError, ValueError) as error:
        raise CannotAsk(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if len(content) > _MOST_BYTES:
        raise CannotAsk(f"{path} is larger than {_MOST_BYTES >> 20} MiB.")
    return content
