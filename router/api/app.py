"""The ASGI application: everything but the data plane, which does not use ASGI (see `dataplane/server.py`)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router import __version__
from router.api import (
    engines,
    estimates,
    kv,
    live,
    llama_server,
    llama_swap,
    memory,
    models,
    monitoring,
    openai,
    page,
    pulls,
    requests,
    timelines,
)
from router.api.live import Live
from router.api.llama_swap import DONE_BY_GET
from router.api.openapi import Description
from router.api.service_metrics import Service, ServiceMetrics
from router.catalog.cards import Cards
from router.catalog.library import Library
from router.dataplane.exchange import Exchanges
from router.dataplane.shortening import most_values
from router.dialects.ollama import create as creating
from router.dialects.ollama import pages as ollama
from router.engines.metrics import EngineMetrics
from router.http.auth import Keyring
from router.http.errors import ApiError
from router.http.origins import Browsers
from router.http.pages import Page, PagesByPath, Right, let_in, needs
from router.http.routes import ROUTES
from router.kv.store import KvStore
from router.observe.metrics import Metrics
from router.observe.recent import RecentRequests
from router.observe.timeline import Timeline
from router.runtime.dispatcher import Dispatcher
from router.runtime.gauges import gauges_of
from router.runtime.wait_log import WaitLog

_BLOBS = "/api/blobs/"
Reload = Callable[[], Awaitable[dict[str, Any]]]

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
PAGES = tuple(
    module.router
    for module in (
        pulls,
        estimates,
        live,
        models,
        openai,
        llama_server,
        llama_swap,
        engines,
        ollama,
        creating,
        memory,
        kv,
        requests,
        monitoring,
        timelines,
        page,
    )
)
"""All pages but their description."""
_LARGEST_PAGE_BODY = 1 << 20
_MOST_VALUES_OF_PAGE = 1 << 14
"""Maximum number of values in such a body: decoding a million takes a fifth of a second."""


def create_app(
    dispatcher: Dispatcher,
    keyring: Keyring,
    browsers: Browsers,
    reload: Reload,
    library: Library,
    cards: Cards,
    kv_store: KvStore,
    exchanges: Exchanges,
    waits: WaitLog,
    timeline: Timeline,
    service: Service,
) -> ASGIApp:
    """Build the application. The dispatcher is started and stopped by the caller."""
    pages = _pages(dispatcher, keyring, reload, library, cards, kv_store, service)
    pages.state.exchanges = exchanges
    pages.state.waits = waits
    pages.state.timeline = timeline
    pages.state.telemetry = timeline.telemetry

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        is_file = scope["path"].startswith(_BLOBS)  # which is written to disk as it arrives
        await pages(scope, receive if is_file else _bounded(receive), send)

    for_browsers = browsers.cross_origin(app)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            version, path = scope["http_version"], scope["path"]
            browsers.check(scope["headers"], version, path, has_effect=not _is_safe(scope))
        except ApiError as error:
            await _answer(scope["path"], error)(scope, receive, send)
            return
        await (for_browsers if b"origin" in headers else app)(scope, receive, send)

    return application


def _is_safe(scope: Scope) -> bool:
    return scope["method"] in _SAFE and not (scope["method"] == "GET" and scope["path"] in DONE_BY_GET)


def _bounded(receive: Receive) -> Receive:
    """Limit the body of a request: management requests are a line or two, and none may fill the memory."""
    size = values = 0

    async def receive_some() -> Message:
        nonlocal size, values
        message = await receive()
        body = message.get("body", b"")
        size += len(body)
        values += most_values(body)
        if size > _LARGEST_PAGE_BODY or values > _MOST_VALUES_OF_PAGE:
            raise HTTPException(413, "The body is too large.")
        return message

    return receive_some


def _pages(
    dispatcher: Dispatcher,
    keyring: Keyring,
    reload: Reload,
    library: Library,
    cards: Cards,
    kv_store: KvStore,
    service: Service,
) -> FastAPI:
    app = FastAPI(
        title="llama-router",
        version=__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # FastAPI would check for it at each page
    )
    description = Description(app.title, app.version, list(_pages_of(*PAGES)))
    of_description = APIRouter(route_class=Page)

    @of_description.get("/openapi.json", include_in_schema=False)
    @needs(Right.USE)
    async def describe() -> Response:
        document = await description.of(dispatcher.config, keys_required=keyring.required)
        return Response(document, media_type="application/json")

    pages = list(_pages_of(of_description, *PAGES))
    for each in pages:
        if each.methods and "GET" in each.methods and each.path not in DONE_BY_GET:
            each.methods.add("HEAD")  # used by monitors and load balancers
    by_path = PagesByPath(pages)
    app.router.routes.append(by_path)

    app.state.keyring = keyring
    app.state.dispatcher = dispatcher
    app.state.reload = reload
    app.state.library = library
    app.state.cards = cards
    app.state.kv_store = kv_store
    of_service = ServiceMetrics(service)
    of_engines = EngineMetrics(lambda: dispatcher.running, lambda: dispatcher.config)
    app.state.engine_metrics = of_engines
    app.state.metrics = Metrics(
        dispatcher.events,
        dispatcher.scheduler,
        lambda: chain(gauges_of(dispatcher, kv_store), of_service.families(), of_engines.families()),
    )
    app.state.live = Live(dispatcher)
    app.state.as_llama_swap = llama_swap.Events(dispatcher)
    app.state.recent_requests = RecentRequests(dispatcher.events, lambda: dispatcher.config.system.requests_kept)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        of_service.note_refused(error)
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
        if error.status_code == 405 or "endpoint" not in request.scope:
            try:
                _let_in_where_no_page_is(request, by_path)
            except ApiError as refusal:
                of_service.note_refused(refusal)
                return _answer(path, refusal)
        if path in ROUTES:
            return _answer(
                path, ApiError(405, "method_not_allowed", f"{path} takes POST only."), {"allow": "POST"}
            )
        if error.status_code == 405:
            allowed = {"allow": ", ".join(_methods_of(request, by_path))}
            message = f"{path} does not take {request.method}; see the Allow header."
            return _answer(path, ApiError(405, "method_not_allowed", message), allowed)
        if error.status_code == 404:
            return _answer(
                request.scope["path"], ApiError(404, "route_not_found", f"There is no {request.method} {path}.")
            )
        code = "body_too_large" if error.status_code == 413 else "invalid_request"
        return _answer(path, ApiError(error.status_code, code, str(error.detail)))

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: ClientDisconnect) -> Response:  # in the middle of the request
        return Response(status_code=400)  # never sent

    @app.exception_handler(Exception)
    async def broken(request: Request, _: Exception) -> Response:  # uvicorn logs the traceback
        return _answer(
            request.scope["path"], ApiError(500, "internal_error", "Internal error of the router; see its log.")
        )

    return app


def _pages_of(*groups: APIRouter) -> Iterator[Page]:
    for group in groups:
        for route in group.routes:
            assert isinstance(route, Page), f"{route} is not of the class that declares rights"
            yield route


def _let_in_where_no_page_is(request: Request, pages: PagesByPath) -> None:
    """Check the right that an endpoint at this path, had it this method, would need. Raises ApiError."""
    rights = [found.right for found, *_ in pages.at(request.scope)]
    if Right.NONE not in rights:
        let_in(request, max(rights, default=Right.USE) if request.method in _SAFE else Right.MANAGE)


def _methods_of(request: Request, pages: PagesByPath) -> list[str]:
    """Return the methods of the most specific routes for a path: `…/status` is a model's status, although names of
    models may end so, too.
    """
    methods: dict[int, set[str]] = defaultdict(set)
    for found, *_ in pages.at(request.scope):
        said = len(re.sub(r"{.*?}", "", found.path))
        methods[said] |= found.methods or set()
    return sorted(methods[max(methods)])


def _answer(path: str, error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    response = Response(error.body(path), error.status)
    for name, value in error.headers():
        response.headers[name.decode()] = value.decode()
    response.headers.update(headers or {})
    return response
