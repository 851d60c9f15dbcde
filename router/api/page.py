"""The web page, at `/`, and the description of the API, at `/docs` and `/redoc`: static files.

They get all data from the API, as any client would; so there is nothing secret in them, and they are served
without a key. Swagger UI and Redoc are files of the package fastapi-offline; no other host is contacted.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from router.http.pages import Page, Right, let_in, needs

router = APIRouter(tags=["page"], include_in_schema=False, route_class=Page)

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Keeps scripts in a model's text from running, should the page ever take it for HTML. Frames are not allowed."""

_POLICY_OF_DOCS = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Allows inline styles and images in data: URLs, which Swagger UI and Redoc use."""

_HEADERS = {
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
    return _file(path.read_bytes(), path.suffix)


def _file(content: bytes, suffix: str) -> _File:
    return _File(content, f"{_KINDS[suffix]}; charset=utf-8", f'"{hashlib.sha256(content).hexdigest()[:16]}"')


_DOCS_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js")


@lru_cache(maxsize=len(_DOCS_FILES))
def _read_of_docs(name: str) -> _File:
    package = find_spec("fastapi_offline")
    assert package is not None
    assert package.origin is not None
    return _read(Path(package.origin).with_name("static") / name)


_FILES = {path.name: _read(path) for path in (Path(__file__).parent / "assets").iterdir()}


def _drawn_by(tags: bytes) -> _File:
    return _file(_FILES["docs.html"].content.replace(b"<!-- What it is drawn by. -->", tags), ".html")


_BY_SWAGGER_UI = _drawn_by(
    b'<link rel="stylesheet" href="docs/swagger-ui.css">\n<script src="docs/swagger-ui-bundle.js" defer></script>'
)
_BY_REDOC = _drawn_by(b'<script src="docs/redoc.standalone.js" defer></script>')


@router.get("/")
@needs(Right.NONE)
async def root(request: Request) -> Response:
    """Web page for browsers; for other clients with a key, the text that Ollama's clients expect."""
    answer: Response
    if "text/html" in request.headers.get("accept", ""):
        answer = _answer(request, _FILES["index.html"])
    else:
        let_in(request, Right.USE)
        answer = PlainTextResponse("Ollama is running")
    answer.headers["vary"] = "Accept"
    return answer


@router.get("/page/{name}")
@needs(Right.NONE)
async def file(name: str, request: Request) -> Response:
    """Files of the web page."""
    if name not in _FILES:
        raise HTTPException(404)
    return _answer(request, _FILES[name])


@router.get("/docs")
@needs(Right.NONE)
async def docs(request: Request) -> Response:
    """API documentation in Swagger UI."""
    return _answer(request, _BY_SWAGGER_UI, _POLICY_OF_DOCS)


@router.get("/redoc")
@needs(Right.NONE)
async def redoc(request: Request) -> Response:
    """API documentation in Redoc."""
    return _answer(request, _BY_REDOC, _POLICY_OF_DOCS)


@router.get("/docs/{name}")
@needs(Right.NONE)
async def file_of_docs(name: str, request: Request) -> Response:
    """Files of Swagger UI and Redoc."""
    if name not in _DOCS_FILES:
        raise HTTPException(404)
    return _answer(request, _read_of_docs(name))


def _answer(request: Request, file: _File, policy: str = _POLICY) -> Response:
    content, kind, tag = file
    headers = {"content-security-policy": policy, **_HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers={**headers, "content-type": kind})
