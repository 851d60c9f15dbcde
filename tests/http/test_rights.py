"""Rights of endpoints: each declares the one that it needs, and checks it before it reads any of a body."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Router, Start, models
from fastapi import APIRouter
from starlette.responses import Response

from router.api.app import PAGES
from router.http.pages import Page, Right
from router.http.routes import is_endless

VALUES = {
    "alias": "none",
    "pull_id": "none",
    "digest": f"sha256:{'0' * 64}",
    "name": "page.js",
    "request_id": "none",
}


def test_a_page_that_does_not_say_who_may_have_it_is_none() -> None:
    async def forgotten() -> Response:
        return Response()

    with pytest.raises(TypeError, match=r"/forgotten: declare by @needs\(…\) the right that it needs"):
        APIRouter(route_class=Page).add_api_route("/forgotten", forgotten)


def test_every_route_is_such_a_page() -> None:
    routes = [route for pages in PAGES for route in pages.routes]
    assert [route for route in routes if not isinstance(route, Page)] == []
    assert len(routes) > 60


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    return start_shared({"api": {"api_keys": ["full"], "inference_keys": ["some"]}, "models": models(tiny, "a")})


def asked() -> Iterator[tuple[str, str, Right]]:
    for page in (page for pages in PAGES for page in pages.routes):
        assert isinstance(page, Page)
        for method in page.methods or ():
            yield method, page.path.replace(":path", "").format(**VALUES), page.right


def test_pages_hold_to_what_they_say(router: Router) -> None:
    """Asked with what is no JSON, which nobody is to find out for who may not ask."""
    some = {"authorization": "Bearer some"}
    for method, path, right in asked():
        if path == "/":
            continue
        junk = b"{" if method in ("POST", "DELETE") else None
        without = router.http.request(method, path, content=junk, headers={"content-type": "application/json"})
        assert (without.status_code == 401) == (right is not Right.NONE), (method, path)
        if right is Right.MANAGE:
            answer = router.http.request(method, path, content=junk, headers=some)
            assert answer.status_code == 403, (method, path)
        elif right is Right.USE and not is_endless(path):
            answer = router.http.request(method, path, content=junk, headers=some)
            assert answer.status_code not in (401, 403), (method, path)
    assert router.http.get("/").status_code == 401
    assert router.http.get("/", headers={"accept": "text/html"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "without", "some"),
    [
        ("GET", "/none", 401, 404),
        ("POST", "/none", 401, 403),
        ("GET", "/v1/chat/completions", 401, 405),
        ("PUT", "/v1/models", 401, 403),
        ("OPTIONS", "/v1/health/models", 401, 403),
        ("POST", "/health", 405, 405),
        ("GET", "/v1/models/puller", 401, 404),
    ],
)
def test_where_no_page_is_nobody_learns_so_who_might_not_have_asked(
    router: Router, method: str, path: str, without: int, some: int
) -> None:
    assert router.http.request(method, path).status_code == without
    assert router.http.request(method, path, headers={"authorization": "Bearer some"}).status_code == some
    assert router.http.request(method, path, headers={"authorization": "Bearer full"}).status_code in (404, 405)
