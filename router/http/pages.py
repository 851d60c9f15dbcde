"""Pages: what FastAPI answers. Each says beside itself who may have it, and is not begun for anybody else.

FastAPI's own dependencies come too late for that: it has read and parsed a body before it asks the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from enum import IntEnum
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from router.http.auth import Keyring

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])
_SAID = "_needs"


class Right(IntEnum):
    """What a page asks for. Of two, the larger one holds."""

    NONE = 0
    """Not even a key."""
    USE = 1
    """Any key: it tells nothing of the machine, and changes nothing."""
    MANAGE = 2
    """A full key."""


def needs(right: Right) -> Callable[[_Endpoint], _Endpoint]:
    """Say who may have a page: stands under its `@router.get(…)`."""

    def said(endpoint: _Endpoint) -> _Endpoint:
        setattr(endpoint, _SAID, right)
        return endpoint

    return said


def let_in(request: Request, right: Right) -> None:
    """Note who it is that asks, for `sees_all`. Raises ApiError 401 and 403."""
    keyring: Keyring = request.app.state.keyring
    request.state.client = keyring.check(request.scope["headers"], manages=right is Right.MANAGE)


class Page(APIRoute):
    """The class of all routes of the application (`APIRouter(route_class=Page)`)."""

    @property
    def right(self) -> Right:
        """Raises TypeError for a page that does not say."""
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
