"""JSON documents: how bodies of requests are read, and how pages answer with many objects."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from router.formats.unreadable import UNREADABLE
from router.http.errors import ApiError

_T = TypeVar("_T")

NAMES_A_MODEL = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["model"], "properties": {"model": {"type": "string"}}}
            }
        },
    }
}
"""OpenAPI's description of a body that `read_body` reads, and of which only `model` is described."""


async def read_body(request: Request, kind: type[_T]) -> _T:
    """Decode a request's body, whatever its Content-Type: `curl -d` sends a form. Raises ApiError 400."""
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except UNREADABLE as error:
        raise ApiError(400, "invalid_json", f"invalid request: {error}") from None


class Document(Response):
    """A response encoded by msgspec: FastAPI would examine each object first, which takes ten times as long."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return msgspec.json.encode(content)
