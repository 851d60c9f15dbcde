"""Pages, which are the management endpoints: all routes that FastAPI serves. Each declares the required access
right, and its function is not called without it.

FastAPI's own dependencies come too late for that: it has read and parsed a body before it asks the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator
from enum import IntEnum
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from router.http.auth import Keyring

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])
_SAID = "_needs"


class Right(IntEnum):
    """Access right that an endpoint requires. Of two, the larger one holds."""

    NONE = 0
    """Not even a key."""
    USE = 1
    """Any key: the endpoint tells nothing of the machine, and changes nothing."""
    MANAGE = 2
    """A full key."""


def needs(right: Right) -> Callable[[_Endpoint], _Endpoint]:
    """Declare the right that an endpoint requires: stands under its `@router.get(…)`."""

    def said(endpoint: _Endpoint) -> _Endpoint:
        setattr(endpoint, _SAID, right)
        return endpoint

    return said


def let_in(request: Request, right: Right) -> None:
    """Note who it is that asks, for `sees_all`. Raises ApiError 401 and 403."""
    keyring: Keyring = request.app.state.keyring
    request.state.client = keyring.check(request.scope["headers"], manages=right is Right.MANAGE)


class Page(APIRoute):
    """Management endpoint: the class of all routes of the application (`APIRouter(route_class=Page)`)."""

    @property
    def right(self) -> Right:
        """Raises TypeError for an endpoint that declares none."""
        right = getattr(self.endpoint, _SAID, None)
        if not isinstance(right, Right):
            raise TypeError(f"{self.path}: say by @needs(…) who may have it")
        return right

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        right, answer = self.right, super().get_route_handler()
        if right is Right.NONE:
            return answer

        async def for_who_may(request: Request) -> Response:
            let_in(request, right)
            return await answer(request)

        return for_who_may


class PagesByPath(BaseRoute):
    """All endpoints as the one route of an application, which looks them up by their path.

    FastAPI would match the regular expression of one after the other, and of all of them where there is none.
    Which one answers is the same: the first that has path and method, else the first that has the path (a 405).
    """

    def __init__(self, pages: Iterable[Page]) -> None:
        pages = tuple(pages)
        self._by_path = {
            path: [page for page in pages if page.path_regex.match(path)]
            for path in (page.path for page in pages if not page.param_convertors)
        }
        """Also those of which it is but one of many paths."""
        self._with_parameters = [(page.path.partition("{")[0], page) for page in pages if page.param_convertors]
        """Each with what all of its paths begin with."""

    def at(self, scope: Scope) -> Iterator[tuple[Page, Match, Scope]]:
        """The endpoints at its path, in their order: how each matches, and what it reads out of the path."""
        path = scope["path"]
        pages = self._by_path.get(path)
        if pages is None:
            pages = [page for begin, page in self._with_parameters if path.startswith(begin)]
        for page in pages:
            match, found = page.matches(scope)
            if match is not Match.NONE:
                yield page, match, found

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        best: tuple[Match, Scope] = Match.NONE, {}
        for _, match, found in self.at(scope):
            if match is Match.FULL:
                return match, found
            if best[0] is Match.NONE:
                best = match, found
        return best

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        page: Page = scope["route"]  # set by `Page.matches`
        await page.handle(scope, receive, send)
