"""The web page, at `/`, and the description of the API, at `/docs` and `/redoc`: static files.

They get all data from the API, as any client would; so there is nothing secret in them, and they are served
without a key. Swagger UI and Redoc are files of the package fastapi-offline; no other host is contacted.
"""

from __future__ import annotations

import gzip
import hashlib
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from router.http.pages import Page, Right, let_in, needs
from router.system.readings import apart

router = APIRouter(tags=["page"], include_in_schema=False, route_class=Page)

_KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
"""Keeps scripts in a model's text from running: only DOMPurify makes HTML of text. Images are the page's own, or
those that its user attaches to a chat. Frames are not allowed."""

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


@cache
def _compressed(content: bytes) -> bytes:
    """Return a file's content in gzip. Blocking the first time."""
    return gzip.compress(content, mtime=0)


def _file(content: bytes, suffix: str) -> _File:
    return _File(content, f"{_KINDS[suffix]}; charset=utf-8", hashlib.sha256(content).hexdigest()[:16])


_DOCS_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js")


@cache
def _read_of_docs(name: str) -> _File:
    package = find_spec("fastapi_offline")
    assert package is not None
    assert package.origin is not None
    return _read(Path(package.origin).with_name("static") / name)


_ASSETS = Path(__file__).parent / "assets"
_FILES = {
    path.relative_to(_ASSETS).as_posix(): _read(path) for path in _ASSETS.rglob("*.*") if path.suffix in _KINDS
}


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
    if "text/html" in request.headers.get("accept", ""):
        return await _answer(request, _FILES["index.html"], varies_by="Accept, Accept-Encoding")
    let_in(request, Right.USE)
    return PlainTextResponse("Ollama is running", headers={"vary": "Accept"})


@router.get("/page/{name:path}")
@needs(Right.NONE)
async def file(name: str, request: Request) -> Response:
    """Files of the web page."""
    if name not in _FILES:
        raise HTTPException(404)
    return await _answer(request, _FILES[name])


@router.get("/docs")
@needs(Right.NONE)
async def docs(request: Request) -> Response:
    """API documentation in Swagger UI."""
    return await _answer(request, _BY_SWAGGER_UI, _POLICY_OF_DOCS)


@router.get("/redoc")
@needs(Right.NONE)
async def redoc(request: Request) -> Response:
    """API documentation in Redoc."""
    return await _answer(request, _BY_REDOC, _POLICY_OF_DOCS)


@router.get("/docs/{name}")
@needs(Right.NONE)
async def file_of_docs(name: str, request: Request) -> Response:
    """Files of Swagger UI and Redoc."""
    if name not in _DOCS_FILES:
        raise HTTPException(404)
    return await _answer(request, _read_of_docs(name))


async def _answer(
    request: Request, file: _File, policy: str = _POLICY, varies_by: str = "Accept-Encoding"
) -> Response:
    in_gzip = _takes_gzip(request.headers.get("accept-encoding", ""))
    tag = f'"{file.tag}-gzip"' if in_gzip else f'"{file.tag}"'  # each representation has one of its own
    headers = {"content-security-policy": policy, **_HEADERS, "vary": varies_by, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    headers["content-type"] = file.kind
    if not in_gzip:
        return Response(file.content, headers=headers)
    content = await apart(partial(_compressed, file.content))
    return Response(content, headers={**headers, "content-encoding": "gzip"})


def _takes_gzip(accepted: str) -> bool:
    """Tell whether a header `Accept-Encoding` names gzip, and not in order to refuse it."""
    for each in accepted.lower().split(","):
        name, _, weight = each.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
