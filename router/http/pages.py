"""Pages, which are the management endpoints: all routes that FastAPI serves. Each declares the access right that
it requires, which is checked before it runs.

FastAPI's own dependencies would come too late: it reads and parses the body before it calls the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator
from enum import IntEnum
from traceback import clear_frames
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from router.http.auth import Keyring

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])
_SAID = "_needs"


class Right(IntEnum):
    """The access right that an endpoint requires. Of two, the larger one applies."""

    NONE = 0
    """No key."""
    USE = 1
    """Any key: the endpoint reveals nothing of the machine, and changes nothing."""
    MANAGE = 2
    """A full key."""


def needs(right: Right) -> Callable[[_Endpoint], _Endpoint]:
    """Declare the right that an endpoint requires; the decorator below its `@router.get(…)`."""

    def said(endpoint: _Endpoint) -> _Endpoint:
        setattr(endpoint, _SAID, right)
        return endpoint

    return said


def let_in(request: Request, right: Right) -> None:
    """Check the key, and note the client for `sees_all`. Raises ApiError 401 and 403."""
    keyring: Keyring = request.app.state.keyring
    request.state.client = keyring.check(request.scope["headers"], manages=right is Right.MANAGE)


class Page(APIRoute):
    """A management endpoint: the class of all routes of the application (`APIRouter(route_class=Page)`)."""

    @property
    def right(self) -> Right:
        """The declared right. Raises TypeError for an endpoint that declares none."""
        right = getattr(self.endpoint, _SAID, None)
        if not isinstance(right, Right):
            raise TypeError(f"{self.path}: declare by @needs(…) the right that it needs")
        return right

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        right, answer = self.right, super().get_route_handler()
        if right is Right.NONE:
            return answer

        async def for_who_may(request: Request) -> Response:
            let_in(request, right)
            try:
                return await answer(request)
            except HTTPException as error:
                clear_frames(error.__traceback__)  # FastAPI's frame and its error would keep each other alive
                raise

        return for_who_may


class PagesByPath(BaseRoute):
    """All endpoints as one route of an application, which looks them up by path.

    FastAPI would try the regular expressions one after the other, and all of them for an unknown path. The same
    endpoint answers: the first with this path and method, else the first with this path, with a 405.
    """

    def __init__(self, pages: Iterable[Page]) -> None:
        pages = tuple(pages)
        self._by_path = {
            path: [page for page in pages if page.path_regex.match(path)]
            for path in (page.path for page in pages if not page.param_convertors)
        }
        """Endpoints of each fixed path, including those with parameters that match it."""
        self._with_parameters = [(page.path.partition("{")[0], page) for page in pages if page.param_convertors]
        """Endpoints with parameters, each with the prefix of all its paths."""

    def at(self, scope: Scope) -> Iterator[tuple[Page, Match, Scope]]:
        """Yield the endpoints at this path in order, each with its match and the parameters of the path."""
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
