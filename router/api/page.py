"""The page for people, at `/`: a few files of the package, as they are. What it shows it asks the API for, as any
client would; so there is nothing secret in it, and it is served without a key.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.types import Scope

router = APIRouter(tags=["page"], include_in_schema=False)

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Were the page ever to take a model's text for HTML, nothing in it would run. And it is shown in no frame."""

_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


class _File(NamedTuple):
    content: bytes
    kind: str
    tag: str


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, f"{_KINDS[path.suffix]}; charset=utf-8", f'"{hashlib.sha256(content).hexdigest()[:16]}"')


_FILES = {path.name: _read(path) for path in (Path(__file__).parent.parent / "page").iterdir()}


def is_asked_for(scope: Scope) -> bool:
    """Whether a request is about the page, which needs no key."""
    path = scope["path"]
    return path.startswith("/page/") or (path == "/" and _from_browser(Request(scope)))


def _from_browser(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


@router.get("/")
async def root(request: Request) -> Response:
    """For browsers the page; for all others what Ollama's clients look for."""
    answer = _answer(request, "index.html") if _from_browser(request) else PlainTextResponse("Ollama is running")
    answer.headers["vary"] = "Accept"
    return answer


@router.get("/page/{name}")
async def file(name: str, request: Request) -> Response:
    """What the page consists of."""
    if name not in _FILES:
        raise HTTPException(404)
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    content, kind, tag = _FILES[name]
    headers = {**_HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers={**headers, "content-type": kind})
