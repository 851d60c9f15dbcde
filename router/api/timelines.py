"""The last minutes of the router, for pages that are opened late and for those that stay open."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from router.http.auth import sees_all
from router.http.documents import Document
from router.http.pages import Page, Right, needs
from router.observe.timeline import WINDOW_SEC, Timeline

router = APIRouter(tags=["monitoring"], route_class=Page)

_MOST_MINUTES = WINDOW_SEC / 60


@router.get("/v1/timeline")
@needs(Right.USE)
async def timeline(
    request: Request,
    minutes: Annotated[float, Query(gt=0, le=_MOST_MINUTES)] = _MOST_MINUTES,
    since: Annotated[float | None, Query(description="`to` of the last answer: only what is new.")] = None,
) -> Document:
    """What models did in the last minutes, with requests in flight and waiting, tokens, waits and memory.

    All times are in seconds since the epoch. A span is open if `to` is null. Numbers of requests are pairs of a
    time and what holds from then on: those in flight or waiting at the end of a step or at a change of the model's
    state, or the average of those that ended meanwhile, if that is larger. With `since`, spans that began or ended
    after it, and what else has become known (`whole` is then false); numbers and steps replace those of the same
    time.
    """
    kept: Timeline = request.app.state.timeline
    return Document(await kept.told(60 * minutes, since, full=sees_all(request)))
