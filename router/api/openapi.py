"""`/openapi.json`: FastAPI's description of the management endpoints, completed with the data plane, keys and
errors.

FastAPI does not serve the data plane, whose bodies are defined by llama-server except for `model`; only `model` is
described here. Every error response has one of the statuses listed with its route and a body in the error format.
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
    400: "The request is invalid; `message` describes the problem.",
    401: "An API key is required, or the given key is not valid.",
    403: "The API key has insufficient permissions, the Host header is not accepted, or the request comes from "
    "a foreign web page.",
    404: "The model or the route does not exist.",
    409: "The name is taken, the model is needed by another model, or the pull was cancelled.",
    413: "The request body is too large.",
    415: "The request body has a Content-Encoding.",
    422: "The engine cannot process the request.",
    429: "Too many requests are waiting.",
    499: "The request was cancelled by an operator.",
    500: "The engine or the disk failed.",
    501: "The model was not started for this kind of request, or the router has no state directory and cannot "
    "create models.",
    502: "The engine's or the hub's response was interrupted.",
    503: "The model has failed, or the router is full or shutting down.",
    504: "The request timed out.",
    507: "The model does not fit into memory, or the file does not fit onto the disk.",
}
_DATA_PLANE = (400, 401, 403, 404, 413, 415, 422, 429, 499, 500, 501, 502, 503, 504, 507)
_FURTHER = {"/v1/models/pull": (409, 429), "/pull": (409, 429, 500, 502)}
_OF_ENGINES = "Answered by the engine of `model`; the alias may be configured to change the request."
_TRANSLATED = "The request is translated for the engine of `model`, and the response back."
_ASKS: dict[Ask, str] = {
    "chat": "Generate the next message of a conversation.",
    "completion": "Generate a continuation of a prompt.",
    "response": "Generate the next message of a conversation.",
    "embedding": "Compute embeddings of texts.",
    "ranking": "Rank documents by their relevance to a query.",
    "transcription": "Transcribe a recording.",
    "speech": "Generate speech from text.",
    "image": "Generate images from a description.",
    "count": "Count the tokens of a request.",
    "text": "Apply the tokenizer or the chat template of a model to a text.",
}
_RETRY_AFTER = {"description": "Seconds after which the request may be retried.", "schema": {"type": "integer"}}


class Description:
    """The current OpenAPI document, encoded.

    Its constant part is slow to build and is made once, at the first request.
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
        document = await asyncio.shield(self._being_made)  # the client that asked first may disconnect
        if self._of is None or self._of[0] is not config or self._of[1] is not keys_required:
            self._of = config, keys_required
            self._encoded = msgspec.json.encode(_of_now(document, config.names, keys_required=keys_required))
        return self._encoded


def _of_now(document: dict[str, Any], aliases: Iterable[str], *, keys_required: bool) -> dict[str, Any]:
    """Add the current model names and whether keys are required."""
    components = document["components"]
    schemas = {**components["schemas"], "Alias": {"type": "string", "enum": list(aliases)}}
    keys: list[dict[str, list[str]]] = [{"bearer": []}, {"x-api-key": []}]
    return {
        **document,
        "components": {**components, "schemas": schemas},
        "security": keys if keys_required else [*keys, {}],
    }


def _describe(title: str, version: str, pages: Sequence[Page]) -> dict[str, Any]:
    """Build the part that does not depend on the configuration."""
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
            "description": "As used by Anthropic's clients.",
        },
    }
    open_paths = {page.path for page in pages if page.right is Right.NONE}
    for path, item in document["paths"].items():
        item.pop("head", None)  # like GET, without a body
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
    answers.pop("422", None)  # the router answers 400
    if is_endless(path) and "text/plain" not in answers["200"]["content"]:
        answers["200"]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    if is_open:
        operation["security"] = []
        answers |= {"400": _error(400, path), "403": _error(403, path)}
        if path != "/live":
            answers["503"] = {**answers["200"], "description": "Not available at the moment."}
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
        "parameters": [_PRIORITY, _REQUEST_ID, _KV_STORE],
        "requestBody": {"required": True, "content": _bodies(route)},
        "responses": _answers(path, _kinds(route)),
    }


def _summary(path: str, route: Route) -> str:
    if route.dialect is not Dialect.OLLAMA:
        return f"llama-server's {path}" if route.of_llama_server else f"{path} of servers other than llama-server"
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
    """Content types of the responses."""
    if route.stream is Stream.NONE:
        return ("application/json",)
    if route.dialect is Dialect.OLLAMA:
        return ("application/json", "application/x-ndjson")
    return ("application/json", "text/event-stream", *(("text/plain",) if route.body == "form" else ()))


def _answers(path: str, kinds: Iterable[str]) -> dict[str, Any]:
    answered = {
        "description": "The response, streamed if `stream` is set and the route supports it.",
        "headers": _ANSWER_HEADERS,
        "content": {kind: {} for kind in kinds},
    }
    return {"200": answered, **{str(status): _error(status, path) for status in _DATA_PLANE}}


def _of_an_engine(method: str) -> dict[str, Any]:
    return {
        "tags": ["data plane"],
        "summary": "Forward a request to the given path of a model's engine",
        "description": "Requests and responses are passed on unchanged. Paths that may change an engine for all "
        "clients require a key with full access.",
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


_SUMMARY = "One OpenAI-compatible endpoint in front of any number of models on one machine."
_ALIAS = {"$ref": "#/components/schemas/Alias"}
_PRIORITY = {
    "name": "X-Request-Priority",
    "in": "header",
    "description": "Priority among waiting requests.",
    "schema": {"type": "string", "enum": ["high", "normal", "low", "1", "2", "3"]},
}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "Request id for the logs, up to 128 visible ASCII characters; generated if missing or invalid.",
    "schema": {"type": "string"},
}
_KV_STORE = {
    "name": "X-KV-Store",
    "in": "header",
    "description": "`no-store`: nothing of this conversation is saved to disk, and what is saved is deleted.",
    "schema": {"type": "string", "enum": ["no-store"]},
}
_ANSWER_HEADERS = {
    "X-Request-Id": {"schema": {"type": "string"}},
    "X-Model-Alias": {"schema": {"type": "string"}},
    "X-Queue-Ms": {
        "description": "Time until the request got a slot, including loading.",
        "schema": {"type": "integer"},
    },
    "X-Load-Ms": {"description": "Part of this time spent on loading the model.", "schema": {"type": "integer"}},
    "X-KV": {
        "description": "Where the beginning of the prompt came from: the engine's slot, a conversation on disk, "
        "or nowhere. Absent if the engine's conversations are not kept.",
        "schema": {"type": "string", "enum": ["slot", "disk", "none"]},
    },
    "X-Queue-Position": {
        "description": "For a stream that begins while waiting: position in the queue at that time.",
        "schema": {"type": "integer"},
    },
    "X-Queue-Expected-Ms": {
        "description": "Likewise: expected time until it gets a slot.",
        "schema": {"type": "integer"},
    },
    "X-Queue-Reason": {"description": "Likewise: reason for the wait.", "schema": {"type": "string"}},
}
_ENVELOPE = {
    "type": "object",
    "description": "OpenAI's error format (Anthropic's on /v1/messages). `code` is stable, `message` is for "
    "people.",
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
