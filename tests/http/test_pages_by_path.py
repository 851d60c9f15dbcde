"""Endpoints are looked up by path: the same ones that a search through all of them finds."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from starlette.routing import Match
from starlette.types import Scope

from router.api.app import PAGES
from router.http.pages import Page, PagesByPath, Right, needs

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
VALUES = (
    "a",
    "a/b",
    "a b",
    "ä",
    "status",
    "stream",
    "status/stream",
    "pull",
    "pulled/a",
    "a/status",
    "a/reset",
    "",
)
NO_PAGES = (
    "",
    "/none",
    "//live",
    "/LIVE",
    "/live/x",
    "/v1",
    "/v1/",
    "/page",
    "/docs",
    "/api",
    "/.env",
    "*",
    "/a" * 99,
)


def all_pages() -> list[Page]:
    return [page for pages in PAGES for page in pages.routes if isinstance(page, Page)]


def paths() -> Iterator[str]:
    for page in all_pages():
        begin, _, rest = page.path.partition("{")
        filled = [begin + value + rest.partition("}")[2] for value in VALUES] if rest else [begin]
        yield from filled
        yield from (path + "/" for path in filled)
    yield from NO_PAGES


def walked(pages: list[Page], scope: Scope) -> tuple[Match, Scope]:
    """What FastAPI finds in a list of routes."""
    partial: tuple[Match, Scope] = Match.NONE, {}
    for page in pages:
        match, found = page.matches(scope)
        if match is Match.FULL:
            return match, found
        if match is Match.PARTIAL and partial[0] is Match.NONE:
            partial = match, found
    return partial


def scope_of(method: str, path: str) -> Scope:
    return {"type": "http", "method": method, "path": path, "root_path": ""}


def test_every_path_has_the_page_that_a_walk_along_all_pages_finds() -> None:
    pages = all_pages()
    by_path = PagesByPath(pages)
    found = dict.fromkeys(Match, 0)
    for path in paths():
        for method in METHODS:
            scope = scope_of(method, path)
            match, child = by_path.matches(scope)
            assert (match, child) == walked(pages, scope), (method, path)
            found[match] += 1
        at = [page for page, *_ in by_path.at(scope_of("GET", path))]
        assert at == [page for page in pages if page.matches(scope_of("GET", path))[0] is not Match.NONE], path
    assert min(found.values()) > 100


def test_a_path_that_ends_with_a_line_feed_is_another() -> None:
    """Starlette's expressions end with `$`, which is true before it."""
    assert PagesByPath(all_pages()).matches(scope_of("GET", "/live\n")) == (Match.NONE, {})


def test_pages_of_other_paths_are_not_asked() -> None:
    asked: list[str] = []

    class Told(Page):
        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            asked.append(self.path)
            return super().matches(scope)

    @needs(Right.NONE)
    async def answer() -> None: ...

    router = APIRouter(route_class=Told)
    for path in (*(f"/page{number}" for number in range(50)), "/named/{name}", "/logs/{name:path}/stream"):
        router.add_api_route(path, answer)
    pages = PagesByPath(page for page in router.routes if isinstance(page, Page))

    for path, wanted in (
        ("/none", []),
        ("/page7", ["/page7"]),
        ("/named/a", ["/named/{name}"]),
        ("/logs/a/b/stream", ["/logs/{name:path}/stream"]),
    ):
        asked.clear()
        pages.matches(scope_of("GET", path))
        assert asked == wanted, path
