"""`/openapi.json`: FastAPI's description of the pages, completed by what it cannot know.

The data plane is not FastAPI's: its bodies are llama-server's business but for `model`, so that is all that is
demanded of them here. Every answer that is an error has one of the statuses listed with its route, and a body in
the envelope; anything else would be a mistake of the router.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from fastapi.openapi.utils import get_openapi

from router.config.resolved import Config
from router.http.pages import Page, Right
from router.http.routes import OLLAMAS_PAGES, ROUTES, Ask, Dialect, Route, Stream, dialect_of, is_endless

_ERRORS = {
    400: "Something is wrong with the request; `message` says what.",
    401: "An API key is needed, or the one given is not valid.",
    403: "The API key may not do this, or the Host header names nobody here, or a foreign web page asks.",
    404: "There is no such model, or no such route.",
    409: "Another model has the name or needs this one, or the pull was cancelled.",
    413: "The body is too large.",
    415: "The body is encoded.",
    422: "The engine's: it cannot process this.",
    429: "Too many requests wait.",
    500: "The engine's own error, or the disk's.",
    501: "The model was not started for this, or the router keeps no state and can create nothing.",
    502: "The engine broke off, or the hub.",
    503: "The model failed, or the router is full or shutting down.",
    504: "It took too long.",
    507: "The model does not fit into memory, or the file not onto the disk.",
}
_DATA_PLANE = (400, 401, 403, 404, 413, 415, 422, 429, 500, 501, 502, 503, 504, 507)
_FURTHER = {"/v1/models/pull": (409, 429), "/pull": (409, 429, 500, 502)}
_OF_ENGINES = "Answered by the engine of `model`; its alias may be configured to change the request."
_TRANSLATED = "Translated for the engine of `model`, and its answer back."
_ASKS: dict[Ask, str] = {
    "chat": "The next message of a conversation.",
    "completion": "What follows a prompt.",
    "response": "The next message of a conversation.",
    "embedding": "Vectors for texts.",
    "ranking": "How well documents answer a query.",
    "transcription": "What is said in a recording.",
    "speech": "A recording of what is to be said.",
    "image": "Images for a description.",
    "count": "How many tokens such a request has.",
    "text": "What the tokenizer or the chat template of a model makes of a text.",
}
_RETRY_AFTER = {"description": "Seconds after which it may be tried again.", "schema": {"type": "integer"}}


class Description:
    """The OpenAPI document of now, as it is sent.

    What of it stays the same takes long to find out: that is done once, when it is asked for first.
    """

    def __init__(self, title: str, version: str, pages: Sequence[Page]) -> None:
        self._title = title
        self._version = version
        self._pages = pages
        self._being_made: asyncio.Task[dict[str, Any]] | None = None
        self._of: tuple[Config, bool] | None = None
        self._encoded = b""

    async def of(self, config: Config, *, keys_required: bool) -> bytes:
        if self._being_made is None:
            work = asyncio.to_thread(_describe, self._title, self._version, self._pages)
            self._being_made = asyncio.create_task(work)
        document = await asyncio.shield(self._being_made)  # whoever asked first may leave
        if self._of is None or self._of[0] is not config or self._of[1] is not keys_required:
            self._of = config, keys_required
            self._encoded = msgspec.json.encode(_of_now(document, config.names, keys_required=keys_required))
        return self._encoded


def _of_now(document: dict[str, Any], aliases: Iterable[str], *, keys_required: bool) -> dict[str, Any]:
    """With what models are called, and whether keys are asked for."""
    components = document["components"]
    schemas = {**components["schemas"], "Alias": {"type": "string", "enum": list(aliases)}}
    keys: list[dict[str, list[str]]] = [{"bearer": []}, {"x-api-key": []}]
    return {
        **document,
        "components": {**components, "schemas": schemas},
        "security": keys if keys_required else [*keys, {}],
    }


def _describe(title: str, version: str, pages: Sequence[Page]) -> dict[str, Any]:
    """What is always the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate Operation ID")  # of HEAD, which is dropped below
        document = get_openapi(title=title, version=version, summary=_SUMMARY, routes=pages)
    components: dict[str, Any] = document.setdefault("components", {})
    schemas: dict[str, Any] = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Error"] = _ENVELOPE
    schemas["OllamaError"] = _OLLAMAS_ENVELOPE
    for named in ("ModelName", "LoadRequest", "ModelToLoad"):
        schemas[named]["properties"]["model"] = _ALIAS
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {
            "type": "apiKey",
            "in": "header",
            "name": "x-api-key",
            "description": "As Anthropic's clients.",
        },
    }
    open_paths = {page.path for page in pages if page.right is Right.NONE}
    for path, item in document["paths"].items():
        item.pop("head", None)  # as GET, without a body
        for method, operation in item.items():
            _complete_page(path, method, operation, is_open=path in open_paths)
    for path, route in sorted(ROUTES.items()):
        document["paths"][path] = {"post": _of_the_data_plane(path, route)}
    document["paths"]["/upstream/{alias}/{path}"] = {
        method: _of_an_engine(method) for method in ("get", "post", "put", "delete")
    }
    return document


def _complete_page(path: str, method: str, operation: dict[str, Any], *, is_open: bool) -> None:
    for parameter in operation.get("parameters", ()):
        if parameter["name"] == "alias":
            parameter["schema"] = _ALIAS
    answers = operation["responses"]
    answers.pop("422", None)  # ours are 400
    if is_endless(path) and "text/plain" not in answers["200"]["content"]:
        answers["200"]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    if is_open:
        operation["security"] = []
        answers |= {"400": _error(400, path), "403": _error(403, path)}
        if path != "/live":
            answers["503"] = {**answers["200"], "description": "Not now."}
        return
    expected = [400, 401, 403, 503]
    if "{" in path or method == "post":
        expected.append(404)
    if method == "post":
        expected += [413, 507, *_FURTHER.get(path, ())]
    for status in expected:
        answers.setdefault(str(status), _error(status, path))
    if dialect_of(path) is Dialect.OLLAMA:
        answers |= {status: _error(int(status), path) for status in answers if int(status) >= 400}


def _of_the_data_plane(path: str, route: Route) -> dict[str, Any]:
    is_translated = route.dialect is Dialect.OLLAMA
    return {
        "tags": ["data plane"],
        "summary": _summary(path, route),
        "description": f"{_ASKS[route.asks]} {_TRANSLATED if is_translated else _OF_ENGINES}",
        "operationId": ("ollama" if is_translated else "engine") + path.replace("/", "_").replace("-", "_"),
        "parameters": [_PRIORITY, _REQUEST_ID],
        "requestBody": {"required": True, "content": _bodies(route)},
        "responses": _answers(path, _kinds(route)),
    }


def _summary(path: str, route: Route) -> str:
    if route.dialect is not Dialect.OLLAMA:
        return f"llama-server's {path}"
    first = route.paths[0]
    return f"Ollama's {path}" if path.startswith(OLLAMAS_PAGES) else f"As {first}, but streams only when asked to"


def _bodies(route: Route) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": _ALIAS}
    if route.stream is not Stream.NONE:
        fields["stream"] = {"type": "boolean"}
    if route.body == "form":
        fields["file"] = {"type": "string", "format": "binary"}
        form = {"type": "object", "required": ["model", "file"], "properties": fields}
        return {"multipart/form-data": {"schema": form}}
    return {"application/json": {"schema": {"type": "object", "required": ["model"], "properties": fields}}}


def _kinds(route: Route) -> tuple[str, ...]:
    """Content types of what is answered."""
    if route.stream is Stream.NONE:
        return ("application/json",)
    if route.dialect is Dialect.OLLAMA:
        return ("application/json", "application/x-ndjson")
    return ("application/json", "text/event-stream", *(("text/plain",) if route.body == "form" else ()))


def _answers(path: str, kinds: Iterable[str]) -> dict[str, Any]:
    answered = {
        "description": "The answer; with `stream`, as it comes, where the route has streams.",
        "headers": _ANSWER_HEADERS,
        "content": {kind: {} for kind in kinds},
    }
    return {"200": answered, **{str(status): _error(status, path) for status in _DATA_PLANE}}


def _of_an_engine(method: str) -> dict[str, Any]:
    return {
        "tags": ["data plane"],
        "summary": "Whatever the engine of a model has at its own path",
        "description": "As it is there. What may change an engine for all is for full keys.",
        "operationId": f"engine_upstream_{method}",
        "parameters": [
            {"name": "alias", "in": "path", "required": True, "schema": _ALIAS},
            {"name": "path", "in": "path", "required": True, "schema": {"type": "string"}},
            _PRIORITY,
            _REQUEST_ID,
        ],
        "responses": _answers("/upstream", ("application/json", "text/event-stream", "text/plain")),
    }


def _error(status: int, path: str) -> dict[str, Any]:
    envelope = "OllamaError" if dialect_of(path) is Dialect.OLLAMA else "Error"
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{envelope}"}}}
    answer: dict[str, Any] = {"description": _ERRORS[status], "content": content}
    if status in (429, 503):
        answer["headers"] = {"Retry-After": _RETRY_AFTER}
    return answer


_SUMMARY = "One OpenAI-compatible endpoint in front of any number of GGUF models on one machine."
_ALIAS = {"$ref": "#/components/schemas/Alias"}
_PRIORITY = {
    "name": "X-Request-Priority",
    "in": "header",
    "description": "Who goes first among those who wait.",
    "schema": {"type": "string", "enum": ["high", "normal", "low", "1", "2", "3"]},
}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "Yours, for the logs; up to 128 visible ASCII characters, else one is made up.",
    "schema": {"type": "string"},
}
_ANSWER_HEADERS = {
    "X-Request-Id": {"schema": {"type": "string"}},
    "X-Model-Alias": {"schema": {"type": "string"}},
    "X-Queue-Ms": {"description": "Wait for a slot, loading included.", "schema": {"type": "integer"}},
    "X-Load-Ms": {"description": "The part of it in which the model was loading.", "schema": {"type": "integer"}},
    "X-Queue-Position": {
        "description": "Of a stream that begins while it waits: its place in the queue then.",
        "schema": {"type": "integer"},
    },
    "X-Queue-Expected-Ms": {"description": "Likewise: until it has a slot.", "schema": {"type": "integer"}},
    "X-Queue-Reason": {"description": "Likewise: what it waits for.", "schema": {"type": "string"}},
}
_ENVELOPE = {
    "type": "object",
    "description": "OpenAI's envelope (on /v1/messages Anthropic's). `code` is stable, `message` is for people.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_OLLAMAS_ENVELOPE = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
