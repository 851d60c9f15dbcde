"""Ollama's calls that create models: `/api/create`, `/api/copy`, and `/api/blobs` for their files.

Fields that are not supported are refused, with advice: a model that silently differs from its Modelfile would be
worse. All need full access.
"""

from __future__ import annotations

import asyncio
import errno
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from router.catalog.cards import card_of
from router.catalog.lookup import known_as
from router.config.names import same_name, untagged
from router.config.resolved import DEFAULT_ENGINE, Config, ModelConfig
from router.engines.llamacpp.describe import template_of
from router.engines.llamacpp.flags import as_started
from router.formats.gguf import GGUF
from router.formats.ollama_options import BadOption, load_flags, request_parameters, unknown_options
from router.http.documents import read_body
from router.http.errors import ApiError
from router.http.pages import Page, Right, needs
from router.runtime.dispatcher import Dispatcher
from router.store.blobs import Blobs, Upload, WrongDigest, hexadecimal
from router.store.created import Created, Example
from router.store.creations import Creations
from router.store.discovery import Survey
from router.system.readings import apart

router = APIRouter(tags=["Ollama"], route_class=Page)

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*(:\d+)?/)?([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*(:\w[\w.-]*)?", re.ASCII)
"""`HOST:PORT/NAMESPACE/MODEL:TAG`, where only MODEL is required."""
_LONGEST_NAME = 200
_PART = 1 << 20
"""Bytes of an upload that are written in one step."""
_GO = re.compile(r"\{\{-?\s*(?:[.$(]|(?:if|range|end|else|with|block|define|template|and|or|not)\b)")

_INSTEAD = {
    "adapters": "put LoRA adapters into the flags of an entry in the configuration (--lora FILE)",
    "quantize": "quantize the file with llama.cpp's llama-quantize first, or pull the quantization that you want",
    "modelfile": "send what is in it as `from` or `files`, `system`, `parameters` and `messages`",
    "path": "send the file to /api/blobs and name its digest in `files`, or put its folder into --models-dir",
    **dict.fromkeys(("renderer", "parser"), "llama-server knows how to talk to a model from its chat template"),
    **dict.fromkeys(("draft_files", "draft_quantize"), "a draft model is a flag in the configuration (-md FILE)"),
    "remote_host": "only models of this machine are served",
    **dict.fromkeys(("info", "capabilities", "requires"), "what a model is and can do is read from its file"),
}
_INSTEAD["quantization"] = _INSTEAD["quantize"]


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str = ""


class _Create(msgspec.Struct):
    model: str | None = None
    name: str | None = None
    """Older name of `model`."""
    from_: str | None = msgspec.field(default=None, name="from")
    files: dict[str, str] | None = None
    system: str | None = None
    template: str | None = None
    parameters: dict[str, Any] | None = None
    messages: list[_Message] | None = None
    license: str | list[str] | None = None
    stream: bool | None = None
    # refused fields
    adapters: Any = None
    quantize: Any = None
    quantization: Any = None
    modelfile: Any = None
    path: Any = None
    renderer: Any = None
    parser: Any = None
    requires: Any = None
    info: Any = None
    capabilities: Any = None
    draft_files: Any = None
    draft_quantize: Any = None
    remote_host: Any = None


class _Copy(msgspec.Struct):
    source: str
    destination: str


@dataclass(frozen=True, slots=True)
class _Basis:
    """The basis of a new model: its description so far, and the existing model, if it is made from one."""

    made: Created
    model: ModelConfig | None


# --- models ---------------------------------------------------------------------------------------------

_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
_ERRORS: dict[int | str, dict[str, Any]] = {409: {}, 500: {}, 501: {}}


@router.post("/api/create", response_model=None, openapi_extra=_BODY, responses=_ERRORS)
@needs(Right.MANAGE)
async def create(request: Request) -> Response:
    """Create or replace a model, from an existing one or from uploaded files."""
    asked = await read_body(request, _Create)
    for field, instead in _INSTEAD.items():
        if getattr(asked, field):
            raise ApiError(400, "not_supported", f"`{field}` is not supported: {instead}.", field)
    creations, config = _creations(request), _config(request)
    name = _free_name(asked.model or asked.name or "", creations, config)
    if asked.from_ and asked.files:
        raise ApiError(400, "invalid_request", "send `from` or `files`, not both")
    if asked.from_:
        basis, status = _basis_of_model(asked.from_, creations, config), "reading model metadata"
    elif asked.files:
        basis, status = await asyncio.to_thread(_basis_of_files, asked.files, creations), "parsing GGUF"
    else:
        raise ApiError(400, "invalid_request", "neither 'from' or 'files' was specified")
    try:
        made = await apart(lambda: _changed(basis, asked, creations, config))
    except BadOption as error:
        raise ApiError(400, "invalid_request", str(error), error.param) from None
    await _put(name, made, request)
    if asked.stream is False:
        return JSONResponse({"status": "success"})
    lines = [msgspec.json.encode({"status": text}) + b"\n" for text in (status, "writing manifest", "success")]
    return Response(b"".join(lines), media_type="application/x-ndjson")


@router.post("/api/copy", response_model=None, openapi_extra=_BODY, responses=_ERRORS)
@needs(Right.MANAGE)
async def copy(request: Request) -> Response:
    """Create another name of a model, with its current behaviour."""
    asked = await read_body(request, _Copy)
    creations, config = _creations(request), _config(request)
    basis = _basis_of_model(asked.source, creations, config)
    await _put(_free_name(asked.destination, creations, config), basis.made, request)
    return Response()


async def _put(name: str, made: Created, request: Request) -> None:
    _store(_creations(request))
    try:
        await _creations(request).put(name, made)
    except OSError as error:
        raise _of_disk(error) from None
    if name not in _config(request).names:
        message = f"{name!r} was created, but cannot be served; the router's log says why"
        raise ApiError(500, "internal_error", message, "model")


def _free_name(text: str, creations: Creations, config: Config) -> str:
    """Return the alias of a new model. Raises ApiError for an invalid name, or one that is taken."""
    if not text:
        raise ApiError(400, "model_required", "model is required", "model")
    if len(text) > _LONGEST_NAME or not _NAME.fullmatch(text):
        raise ApiError(400, "invalid_model", f"invalid model name {text[:_LONGEST_NAME]!r}", "model")
    name = same_name(text, config.names)
    if name is None:
        return untagged(text)
    if creations.named(name, config) is None:
        source = (config.aliases.get(name) or config.models[name]).source
        message = f"{name!r} is taken by a model of this name, from {source}: choose another"
        raise ApiError(409, "name_taken", message, "model")
    return name


def _basis_of_model(text: str, creations: Creations, config: Config) -> _Basis:
    """Return an existing model as a basis. Raises ApiError 404, and 400 for models of other servers."""
    name = known_as(text, config)
    made = creations.named(name, config) or Created(0.0, base=name)
    model = config.model_of(name)
    if model.engine != DEFAULT_ENGINE:
        message = f"{name!r} is not served by llama-server: no model can be created from it."
        raise ApiError(400, "not_supported", message, "from")
    return _Basis(msgspec.structs.replace(made, created_at=time.time()), model)


def _basis_of_files(files: Mapping[str, str], creations: Creations) -> _Basis:
    """Return uploaded files as a basis. Raises ApiError 400 for files that are missing, or are not one model."""
    blobs = _store(creations)
    models: list[str] = []
    projectors: list[str] = []
    for name, text in files.items():
        digest = _digest(text)
        if not blobs.has(digest):
            message = f"blob not found for {name} (digest sha256:{digest}): send it to /api/blobs first"
            raise ApiError(400, "invalid_request", message, "files")
        header = _header_of(name, digest, blobs)
        (projectors if header.kind == "mmproj" else models).append(digest)
    if len(models) != 1 or len(projectors) > 1:
        raise ApiError(400, "not_supported", _WHOLE_MODEL, "files")
    return _Basis(Created(time.time(), model=models[0], projector="".join(projectors)), None)


_WHOLE_MODEL = (
    "`files` must hold one model in one GGUF file (llama-gguf-split --merge makes it of the parts of a split "
    "one), and may hold its projector"
)


def _header_of(name: str, digest: str, blobs: Blobs) -> GGUF:
    survey = Survey()
    header = survey.read(blobs.path(digest))
    if header is None:
        raise ApiError(400, "invalid_request", f"{name}: {survey.skipped[0].reason}; {_WHOLE_MODEL}", "files")
    return header


def _changed(basis: _Basis, asked: _Create, creations: Creations, config: Config) -> Created:
    """Apply the request to its basis. Reads and writes files. Raises ApiError and BadOption."""
    made, parameters = basis.made, asked.parameters or {}
    if unknown := unknown_options(parameters):
        message = f"llama-server has no equivalent of the parameter {', '.join(map(repr, unknown))}"
        raise ApiError(400, "not_supported", message, "parameters")
    request_parameters(parameters)
    licenses = [asked.license] if isinstance(asked.license, str) else asked.license
    return msgspec.structs.replace(
        made,
        flags={**made.flags, **_flags(parameters, basis, config)},
        template=_template(asked.template, basis, creations) or made.template,
        system=asked.system or made.system,
        parameters={**made.parameters, **{key: value for key, value in parameters.items() if value is not None}},
        messages=_examples(asked.messages) or made.messages,
        license=tuple(filter(None, licenses or ())) or made.license,
    )


def _flags(parameters: Mapping[str, Any], basis: _Basis, config: Config) -> dict[str, str]:
    if basis.model is None:
        return load_flags(parameters, config.system.default_parallel, None, lambda _: None)
    model = basis.model
    flags = as_started(model.flags, model.env)

    def given(name: str) -> str | None:
        flag = flags.last(name)
        return None if flag is None else flag.text

    sharing = 1 if flags.kv_unified else model.slots
    return load_flags(parameters, sharing, card_of(model).get("context_length"), given)


def _template(template: str | None, basis: _Basis, creations: Creations) -> str:
    """Store a template that differs from the basis's. Returns its digest; empty if there is none."""
    if not template or (basis.model is not None and template.strip() == template_of(basis.model).strip()):
        return ""
    if _GO.search(template) or "messages" not in template:
        message = (
            "`template` is a template in Go, as Ollama's are, or none for chats; llama-server's are in Jinja: "
            "leave it out to use the one in the model's file, or send one in Jinja"
        )
        raise ApiError(400, "not_supported", message, "template")
    try:
        return _store(creations).add(template.encode())
    except OSError as error:
        raise _of_disk(error) from None


def _examples(messages: Sequence[_Message] | None) -> tuple[Example, ...]:
    try:
        return tuple(msgspec.convert(message, Example, from_attributes=True) for message in messages or ())
    except msgspec.ValidationError:
        message = "`messages` may have the roles user and assistant; send a system prompt as `system`"
        raise ApiError(400, "not_supported", message, "messages") from None


# --- files ----------------------------------------------------------------------------------------------


@router.head("/api/blobs/{digest}", response_model=None)
@needs(Right.MANAGE)
async def has_blob(digest: str, request: Request) -> Response:
    """Check whether a file exists."""
    there = await asyncio.to_thread(_store(_creations(request)).has, _digest(digest))
    return Response(status_code=200 if there else 404)


@router.post(
    "/api/blobs/{digest}",
    response_model=None,
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": {}}}},
    responses={200: {"description": "It is here already."}, 500: {}, 501: {}},
)
@needs(Right.MANAGE)
async def send_blob(digest: str, request: Request) -> Response:
    """Upload a file, if it matches its digest."""
    blobs, digits = _store(_creations(request)), _digest(digest)
    if await asyncio.to_thread(blobs.has, digits):
        return Response(status_code=200)
    length = request.headers.get("content-length", "")
    try:
        upload = await asyncio.to_thread(blobs.begin, digits, int(length) if length.isdecimal() else None)
        try:
            await _receive(request, upload)
        finally:
            await asyncio.to_thread(upload.close)
    except WrongDigest as error:
        raise ApiError(400, "invalid_request", str(error), "digest") from None
    except OSError as error:
        raise _of_disk(error) from None
    return Response(status_code=201)


async def _receive(request: Request, upload: Upload) -> None:
    """Write an upload in large pieces, each on a thread. Reading pauses while one is written."""
    waiting = bytearray()
    async for part in request.stream():
        waiting += part
        if len(waiting) >= _PART:
            await asyncio.to_thread(upload.write, bytes(waiting))
            waiting.clear()
    await asyncio.to_thread(upload.write, bytes(waiting))
    await asyncio.to_thread(upload.finish)


def _digest(text: str) -> str:
    """Return the hexadecimal digits of a digest. Raises ApiError 400."""
    digits = hexadecimal(text)
    if digits is None:
        raise ApiError(400, "invalid_request", "invalid digest format: not sha256: and 64 hexadecimal digits")
    return digits


def _of_disk(error: OSError) -> ApiError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ApiError(507, "disk_full", f"{error.filename or 'the state directory'}: {error.strerror}")
    return ApiError(500, "disk_error", f"the file cannot be written: {error}")


# --- both -----------------------------------------------------------------------------------------------


def _config(request: Request) -> Config:
    dispatcher: Dispatcher = request.app.state.dispatcher
    return dispatcher.config


def _creations(request: Request) -> Creations:
    creations: Creations = request.app.state.library.creations
    return creations


def _store(creations: Creations) -> Blobs:
    """Return the store of files. Raises ApiError 501 for a router without a state directory."""
    if creations.blobs is None:
        message = "nothing can be created, as this router keeps no state: set LLAMA_ROUTER_STATE_DIR to a folder"
        raise ApiError(501, "not_supported", message)
    return creations.blobs
