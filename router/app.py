"""The ASGI application: the data plane raw and first, everything else through FastAPI."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from router import __version__
from router.api import models, monitoring, openai
from router.api.auth import OPEN_PATHS, Keyring
from router.api.errors import ApiError
from router.api.openapi import describe
from router.config import Api
from router.dispatcher import Dispatcher
from router.metrics import Metrics
from router.proxy import ROUTES, Message, Proxy, Receive, Scope, Send
from router.telemetry import Telemetry

Reload = Callable[[], Awaitable[dict[str, Any]]]
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_UNKNOWN_HOST = (
    "This router listens for this machine only, and does not know the name in your Host header. "
    "Add it to api.allowed_hosts if it is yours."
)

_OPERATORS_PAGES = ("/v1/logs/", "/v1/health/models")
"""They quote what engines say."""

_LARGEST_PAGE_BODY = 1 << 20

ASGI = Callable[[Scope, Receive, Send], Awaitable[None]]


def create_app(dispatcher: Dispatcher, keyring: Keyring, reload: Reload) -> ASGI:
    """Wire it up. The dispatcher is started and stopped by whoever runs the server."""
    proxy = Proxy(dispatcher, keyring)
    pages = _pages(dispatcher, keyring, reload)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in ROUTES:
            await proxy(scope, receive, send)
        else:
            await pages(scope, _bounded(receive), send)

    for_browsers = CORSMiddleware(
        app,
        allow_origins=list(dispatcher.config.api.cors_origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "X-Model-Alias", "X-Queue-Ms", "X-Load-Ms", "Retry-After"],
    )

    hosts = _answered_hosts(dispatcher.config.api)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        if hosts and _without_port(headers.get(b"host", b"localhost")) not in hosts:
            answer = _answer(scope["path"], ApiError(403, "unknown_host", _UNKNOWN_HOST))
            await answer(scope, receive, send)
        elif b"origin" in headers:
            await for_browsers(scope, receive, send)
        else:
            await app(scope, receive, send)

    return application


def _answered_hosts(api: Api) -> frozenset[bytes]:
    """On a loopback address: the names that mean it. Else nobody can tell, and the set is empty.

    A page that has pointed its own name at 127.0.0.1 (DNS rebinding) shares its origin with what listens there,
    so that no rule of the browser keeps it out; but its name is in the Host header.
    """
    if api.host not in _LOOPBACK:
        return frozenset()
    return frozenset(name.lower().encode() for name in (*_LOOPBACK, *api.allowed_hosts))


def _without_port(host: bytes) -> bytes:
    if host.startswith(b"["):
        return host[1:].partition(b"]")[0]
    return host.partition(b":")[0].lower()


def _bounded(receive: Receive) -> Receive:
    """Requests to manage are a line or two; a body without end must not fill the memory."""
    size = 0

    async def receive_some() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > _LARGEST_PAGE_BODY:
            raise HTTPException(413, "The body is too large.")
        return message

    return receive_some


def _pages(dispatcher: Dispatcher, keyring: Keyring, reload: Reload) -> FastAPI:
    app = FastAPI(
        title="llama-router", version=__version__, openapi_url="/openapi.json", docs_url=None, redoc_url=None
    )
    app.openapi = lambda: describe(  # type: ignore[method-assign]
        app, ROUTES, dispatcher.config.models, keys_required=keyring.required
    )
    app.state.dispatcher = dispatcher
    app.state.reload = reload
    app.state.metrics = Metrics(dispatcher)
    app.state.telemetry = Telemetry(time.monotonic)
    dispatcher.events.listen(app.state.telemetry.note)
    for pages in (models.router, openai.router, monitoring.router):
        for route in pages.routes:
            if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
                route.methods.add("HEAD")  # what monitors and load balancers like to ask with
        app.include_router(pages)

    @app.middleware("http")
    async def authorize(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.scope["path"] not in OPEN_PATHS:
            manages = request.method not in ("GET", "HEAD") or request.scope["path"].startswith(_OPERATORS_PAGES)
            try:
                keyring.check(request.headers.raw, manages=manages)
            except ApiError as error:
                return _answer(request.scope["path"], error)
        return await call_next(request)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _answer(request.scope["path"], error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body" and not isinstance(part, int))
        message = f"{where}: {first['msg']}" if where else first["msg"]
        if first["type"] == "model_attributes_type":
            message = "The body must be a JSON object, sent with Content-Type: application/json"
        return _answer(request.scope["path"], ApiError(400, "invalid_request", f"{message}.", where or None))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]
        if path in ROUTES:
            return _answer(
                path, ApiError(405, "method_not_allowed", f"{path} takes POST only."), {"allow": "POST"}
            )
        if error.status_code == 405:
            allowed = {name: value for name, value in (error.headers or {}).items() if name.lower() == "allow"}
            message = f"{path} does not take {request.method}; see the Allow header."
            return _answer(path, ApiError(405, "method_not_allowed", message), allowed)
        if error.status_code == 404:
            return _answer(
                request.scope["path"], ApiError(404, "route_not_found", f"There is no {request.method} {path}.")
            )
        code = "body_too_large" if error.status_code == 413 else "invalid_request"
        return _answer(path, ApiError(error.status_code, code, str(error.detail)))

    @app.exception_handler(Exception)
    async def broken(request: Request, _: Exception) -> Response:  # uvicorn logs the traceback
        return _answer(
            request.scope["path"], ApiError(500, "internal_error", "The router made a mistake; see its log.")
        )

    return app


def _answer(path: str, error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    response = Response(error.body(path), error.status)
    for name, value in error.headers():
        response.headers[name.decode()] = value.decode()
    response.headers.update(headers or {})
    return response
