"""The web UI: how it is served, and how a real browser shows it."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import FAKE_ENGINE, Router, Start, Visit, models, starting, violations

FOLDER = Path(__file__).parents[2] / "router" / "api" / "assets"
LICENSES = "vendor/LICENSES.md"  # for those who read the source
FROM_BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
MARKUP = "<img src=x onerror=document.title='broken'>"
HOSTILE = "<img/src=x/onerror=document.title='broken'>"


# --- how it is served -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> str:
    """It loads in half a second, answers a little at a time, and writes HTML into its log and its answers."""
    folder = tmp_path_factory.mktemp("engine")
    events = folder / "events"
    said = [MARKUP, *(f"{n} " for n in range(100))]
    events.write_text("\n".join(json.dumps({"choices": [{"delta": {"content": text}}]}) for text in said))
    script = folder / "engine"
    script.write_text(f"""#!/bin/sh
echo "{MARKUP}" >&2
FAKE_LOAD_SEC=0.5 FAKE_PROGRESS=1 FAKE_EVENTS={events} FAKE_CHUNK_SEC=0.1 exec {sys.executable} {FAKE_ENGINE} "$@"
""")
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, tiny: Path, engine: str) -> Iterator[Router]:
    folder = tmp_path_factory.mktemp("router")
    (folder / "broken.gguf").write_bytes(b"no model")
    aliases = models(tiny, "family/a:q4", "b", HOSTILE, *(f"other-{n}" for n in range(200)))
    config = {
        "models": {**aliases, "broken": {"model_path": str(folder / "broken.gguf")}},
        "aliases": {"gpt-4o": "b"},
        "system": {"llama_server_path": engine},
    }
    with starting(folder) as start:
        yield start(config)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Router]:
    """A router with keys."""
    with starting(tmp_path_factory.mktemp("locked")) as start:
        keys = {"api_keys": ["operator"], "inference_keys": ["client"]}
        yield start({"api": keys, "models": models(tiny, "a")})


def test_browsers_get_the_page_and_ollamas_clients_their_word(router: Router) -> None:
    page = router.http.get("/", headers=FROM_BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>llama-router</title>" in page.text
    asked = router.http.head("/", headers=FROM_BROWSER)
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-type"] == page.headers["content-type"]
    for headers in ({}, {"accept": "application/json"}):
        word = router.http.get("/", headers=headers)
        assert (word.text, word.headers["vary"]) == ("Ollama is running", "Accept")
    foreign = router.http.get("/", headers={**FROM_BROWSER, "host": "evil.example"})
    assert foreign.json()["error"]["code"] == "unknown_host"
    assert router.http.post("/page/page.js").headers["allow"] == "GET, HEAD"


def test_the_page_is_open_and_nothing_else_is(locked: Router) -> None:
    assert locked.http.get("/", headers=FROM_BROWSER).status_code == 200
    assert locked.http.get("/page/page.js").status_code == 200
    assert locked.http.get("/page/none.js").status_code == 404
    assert locked.http.get("/page/..%2fpage.py").status_code == 404
    for path in ("/", "/v1/models/status", "/v1/models/status/stream", "/v1/queue/stats", "/vram"):
        assert locked.http.get(path).status_code == 401, path
    assert locked.http.get("/page/%2e%2e/v1/queue/stats").status_code == 404


def test_the_page_loads_from_here_only_and_runs_what_is_here_only(locked: Router) -> None:
    names = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.*")} - {"docs.html", LICENSES}
    assert names > {"index.html", "style.css", "page.js", "overview/view.js"}
    for name in names:
        answer = locked.http.get(f"/page/{name}")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        if not name.startswith("vendor/"):
            assert not re.findall(r"(?<!\w)(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.]+\.\w+", answer.text), name
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)
        again = locked.http.get(f"/page/{name}", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    index = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?!( type=\"module\")? src=\"page/)", index)
    for mentioned in re.findall(r'(?:href|src)="page/([^"]+)"', index):
        assert mentioned in names


def test_the_page_is_sent_compressed_and_small(locked: Router) -> None:
    """Each representation has a tag of its own."""
    sent = 0
    for path in sorted({*FOLDER.rglob("*.*")} - {FOLDER / LICENSES}):
        name = path.relative_to(FOLDER).as_posix()
        with locked.http.stream(
            "GET", f"/page/{name}", headers={"accept-encoding": "br;q=0, GZIP;q=0.5"}
        ) as answer:
            raw = b"".join(answer.iter_raw())
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["vary"] == "Accept-Encoding"
        assert gzip.decompress(raw) == path.read_bytes(), name
        sent += len(raw)
        tags = {"if-none-match": answer.headers["etag"]}
        assert locked.http.get(f"/page/{name}", headers=tags).status_code == 304
        plain = locked.http.get(f"/page/{name}", headers={**tags, "accept-encoding": "gzip;q=0"})
        assert (plain.status_code, plain.content) == (200, path.read_bytes())
    assert sent < 200_000


# --- in a browser ---------------------------------------------------------------------------------------


def row(page: Any, alias: str) -> Any:
    return page.get_by_role("row").filter(has=page.get_by_text(alias, exact=True))


def until_state(page: Any, alias: str, state: str) -> None:
    row(page, alias).locator(".state > span").get_by_text(re.compile(f"^{state}")).wait_for()


def ask(page: Any, model: str, text: str) -> None:
    page.get_by_role("link", name="Chat", exact=True).click()
    page.get_by_label("Model to chat with").select_option(model)
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def test_a_model_is_loaded_and_unloaded_with_a_click(router: Router, visit: Visit) -> None:
    page = visit(router, "models")
    until_state(page, "family/a:q4", "off")
    page.evaluate("document.querySelector('tr[data-alias=\"family/a:q4\"]').mark = 'the same'")
    row(page, "family/a:q4").get_by_role("button", name="Load").click()
    until_state(page, "family/a:q4", "loading")
    until_state(page, "family/a:q4", "ready")
    assert page.evaluate("document.querySelector('tr[data-alias=\"family/a:q4\"]').mark") == "the same"
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.locator("#model-rows tr:first-child[data-alias='family/a:q4']").wait_for()
    page.get_by_role("link", name="Overview").click()
    page.locator("#memory").get_by_text("family/a:q4").wait_for()
    row(page, "family/a:q4").get_by_role("button", name="Unload").click()
    until_state(page, "family/a:q4", "off")  # the row stays while it is used
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    row(page, "family/a:q4").wait_for(state="detached")
    for window in (page, visit(router)):  # who comes later learns what was decided before
        decisions = window.locator("#decision-rows")
        for state in ("loading", "ready", "off"):
            decisions.get_by_text(state, exact=True).first.wait_for()
    page.get_by_role("link", name="Models", exact=True).click()
    page.get_by_label("Filter the models").fill("Q4 family")
    page.locator("#model-rows tr").nth(1).wait_for(state="detached")
    until_state(page, "family/a:q4", "off")
    page.reload()
    until_state(page, "family/a:q4", "off")
    assert page.locator("#model-rows tr").count() == 1


def has_focus(page: Any, name: str) -> None:
    page.wait_for_function(
        "name => (document.activeElement.ariaLabel ?? document.activeElement.textContent) === name", arg=name
    )


def test_each_view_has_an_address_a_title_and_a_heading_that_gets_the_focus(router: Router, visit: Visit) -> None:
    page = visit(router)
    page.locator("#memory").wait_for()
    assert page.title() == "Overview · llama-router"
    views = page.get_by_role("navigation")
    for name in ("Requests", "Logs", "Settings", "Models"):
        views.get_by_role("link", name=name).click()
        page.locator("h2:focus").get_by_text(name, exact=True).wait_for(state="attached")
        assert page.title() == f"{name} · llama-router"
        assert page.url == f"{router.url}/#/{name.lower()}"
        assert views.locator("[aria-current=page]").inner_text() == name
    page.get_by_role("link", name="family/a:q4", exact=True).click()
    page.locator("h2:focus").get_by_text("family/a:q4", exact=True).wait_for()
    page.reload()
    page.get_by_role("heading", name="family/a:q4").wait_for()
    page.go_back()
    has_focus(page, "Models")
    page.go_back()
    has_focus(page, "Settings")


def test_a_pressed_button_keeps_the_focus_and_is_pressed_once(router: Router, visit: Visit) -> None:
    page = visit(router, "models?q=other 7")
    until_state(page, "other-7", "off")
    asked: list[Any] = []
    page.route("**/v1/models/load", lambda route: asked.append(route))  # and holds it
    page.get_by_role("button", name="Load other-7", exact=True).focus()
    page.keyboard.press("Enter")
    row(page, "other-7").locator("[aria-disabled=true]").wait_for()
    page.keyboard.press("Enter")
    has_focus(page, "Load other-7")
    assert len(asked) == 1
    asked[0].continue_()
    until_state(page, "other-7", "ready")
    has_focus(page, "Unload other-7")
    page.locator("#announcer").get_by_text("other-7 is ready").wait_for(state="attached")
    page.keyboard.press("Enter")
    until_state(page, "other-7", "off")
    has_focus(page, "Load other-7")


def test_rows_do_not_move_under_the_pointer(router: Router, visit: Visit) -> None:
    page = visit(router, "models")
    rows = page.locator("#model-rows tr")
    row(page, "family/a:q4").hover()
    router.http.post("/v1/models/load", json={"model": "other-9"})
    until_state(page, "other-9", "ready")
    assert "other-9" not in rows.first.inner_text()
    page.mouse.move(0, 0)
    rows.first.get_by_text("other-9", exact=True).wait_for()
    router.http.post("/v1/models/eject", json={"model": "other-9"})


def test_of_many_models_those_are_drawn_that_are_seen(router: Router, visit: Visit) -> None:
    page = visit(router, "models")
    rows = page.locator("#model-rows tr")
    rows.nth(99).wait_for(state="attached")
    assert rows.count() < 204
    more = page.get_by_role("button", name=re.compile("Show more of"))
    more.focus()
    while rows.count() < 204:
        page.keyboard.press("Enter")
    filtered = page.get_by_label("Filter the models")
    filtered.fill("other 11")
    page.get_by_text("11 of 204 match").wait_for()
    assert rows.count() == 11
    assert page.url.endswith("?q=other+11")
    filtered.fill("no such thing")
    page.get_by_text("No model matches the filter.").wait_for()


def test_a_load_that_waits_for_room_says_so_and_is_taken_back_with_a_click(
    start: Start, tiny: Path, engine: str, visit: Visit
) -> None:
    system = {"llama_server_path": engine, "max_concurrent_models": 1}
    router = start({"system": system, "models": models(tiny, "a", "other", "b")})
    with router.http.stream("POST", "/v1/completions", json={"model": "a", "prompt": "", "stream": True}):
        page = visit(router)
        until_state(page, "a", "ready")
        page.locator("#decision-rows").get_by_text("loading", exact=True).wait_for()  # before there was a page
        row(page, "b").get_by_role("button", name="Load").click()
        until_state(page, "b", "waiting")
        row(page, "b").get_by_text("until a can be unloaded").wait_for()
        page.get_by_role("link", name="Models", exact=True).click()
        rows = page.locator("#model-rows tr")
        rows.nth(2).wait_for()
        assert [each.get_attribute("data-alias") for each in rows.all()] == ["a", "b", "other"]
        row(page, "b").get_by_role("button", name="Cancel").click()
        until_state(page, "b", "off")
        row(page, "b").get_by_role("button", name="Load").wait_for()


def test_a_model_that_fails_says_why_and_can_be_reset(router: Router, visit: Visit) -> None:
    page = visit(router, "models?q=broken")
    row(page, "broken").get_by_role("button", name="Load").click()
    page.locator("#notice, tr[data-alias=broken] .error").get_by_text(re.compile("GGUF")).first.wait_for()


def test_what_models_and_engines_say_is_text(router: Router, visit: Visit) -> None:
    page = visit(router, "models")
    until_state(page, HOSTILE, "off")
    ask(page, HOSTILE, MARKUP)
    page.locator("article.assistant").get_by_text("0 1 2").wait_for()
    assert MARKUP in page.locator("article.assistant").inner_text()
    page.go_back()
    page.get_by_role("link", name=f"Log of {HOSTILE}").click()
    page.get_by_role("log").get_by_text(MARKUP).wait_for()
    assert page.locator("img").count() == 0
    assert page.title() == f"Log of {HOSTILE} · llama-router"


def test_who_waits_for_a_model_and_why_is_on_its_page(router: Router, visit: Visit) -> None:
    page = visit(router, "models/b")
    body = {"model": "b", "messages": [], "stream": True}
    me = {"x-request-id": "me"}
    with (
        router.http.stream("POST", "/v1/chat/completions", json=body),  # the only slot
        ThreadPoolExecutor() as pool,
    ):
        waits = pool.submit(router.http.post, "/v1/chat/completions", json=body, headers=me)
        waiting = page.locator("#model-waiting-rows")
        waiting.get_by_text("the only slot of b is in use").wait_for()
        waiting.get_by_role("link", name="me").click()
        page.get_by_role("heading", name="Request me").wait_for()
        page.get_by_role("button", name="Cancel", exact=True).click()
        assert waits.result().status_code != 200


def test_a_hidden_page_costs_nothing_and_misses_nothing(router: Router, visit: Visit) -> None:
    page = visit(router, "models")
    until_state(page, "other-0", "off")
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    hide += "document.dispatchEvent(new Event('visibilitychange'))"
    page.clock.install()
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/status/stream")):
        page.evaluate(hide % "true")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    router.http.post("/v1/models/load", json={"model": "other-0"})
    page.clock.run_for(60_000)
    assert asked == []
    with page.expect_request(lambda request: request.url.endswith("/status/stream")) as taken_up:
        page.evaluate(hide % "false")
    assert "last-event-id" in taken_up.value.headers
    until_state(page, "other-0", "ready")


def test_a_key_is_asked_for_and_stays_in_its_tab(locked: Router, visit: Visit) -> None:
    page = visit(locked)
    page.get_by_label("This router asks for an API key").wait_for()
    page.get_by_role("status").get_by_text("signed out").wait_for()
    assert violations(page) == []
    for key in ("wrong", "operator"):
        page.get_by_label("This router asks for an API key").fill(key)
        page.get_by_role("button", name="Open").click()
        if key == "wrong":
            page.get_by_text("This API key is not valid.").wait_for()
    until_state(page, "a", "off")
    row(page, "a").get_by_role("button", name="Load").wait_for()
    page.reload()
    until_state(page, "a", "off")
    assert page.url == f"{locked.url}/#/"
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    page.get_by_role("link", name="Settings").click()
    page.get_by_role("button", name="Forget key").click()
    page.get_by_label("This router asks for an API key").fill("client")
    page.get_by_role("button", name="Open").click()
    page.get_by_text("it manages nothing, and shows nothing of others").wait_for()
    page.get_by_role("link", name="Models", exact=True).click()
    until_state(page, "a", "off")
    row(page, "a").get_by_role("link", name="Chat").wait_for()
    assert row(page, "a").get_by_role("button").count() == 0  # no more than its key may do
    assert row(page, "a").get_by_role("link", name="Log").count() == 0
    assert page.locator("#pulls").is_hidden()


def test_a_router_that_goes_and_comes_back(start: Start, visit: Visit, tiny: Path, free_port: int) -> None:
    arguments = ["--port", str(free_port)]
    router = start({"models": models(tiny, "a")}, arguments=arguments)
    page = visit(router)
    until_state(page, "a", "off")
    router.stop()
    page.get_by_text("no answer, reconnecting").wait_for()
    assert violations(page) == []
    again = start({"models": models(tiny, "a", "new")}, arguments=arguments)
    until_state(page, "new", "off")
    page.get_by_role("status").get_by_text("ready").wait_for()
    page.locator("#decision-rows").get_by_text("it was started again").wait_for()
    again.stop()


VIEWS = ("", "requests", "models", "models/broken", "logs/b", "settings")


@pytest.mark.parametrize(
    "look",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark", "viewport": {"width": 360, "height": 740}},
    ],
    ids=["light", "dark-phone"],
)
def test_everybody_can_read_and_press_everything(router: Router, visit: Visit, look: dict[str, Any]) -> None:
    """With two hundred models, one that has failed, and a queue."""
    router.http.post("/v1/models/load", json={"model": "broken"})
    body = {"model": "b", "messages": [], "stream": True}
    with (
        router.http.stream("POST", "/v1/chat/completions", json=body),
        ThreadPoolExecutor() as pool,
    ):
        waits = pool.submit(router.http.post, "/v1/chat/completions", json=body, headers={"x-request-id": "waits"})
        page = visit(router, **look)
        page.locator("#waiting-rows").get_by_text("the only slot of b").wait_for()
        for view in VIEWS:
            page.goto(f"{router.url}/#/{view}")
            page.locator(f"#view-{view.partition('/')[0] or 'overview'}").wait_for()
            page.get_by_role("heading", level=2).wait_for(state="attached")
            assert violations(page) == [], view
            assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"], view
        router.http.delete("/v1/requests/waits")
        waits.result()


# --- the description of the API -------------------------------------------------------------------------


DRAWN_BY = {"docs": "swagger-ui-bundle.js", "redoc": "redoc.standalone.js"}


@pytest.mark.parametrize(("path", "drawn_by"), DRAWN_BY.items())
def test_the_description_of_the_api_is_drawn_from_here_only(
    locked: Router, browser: Any, path: str, drawn_by: str
) -> None:
    window = browser.new_context()
    page = window.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{locked.url}/{path}")
    page.get_by_text("This router asks for an API key.").wait_for()
    page.evaluate("sessionStorage.setItem('llama-router key', 'client')")
    page.reload()
    page.get_by_text("/v1/models/eject").first.wait_for()
    assert f"{locked.url}/docs/{drawn_by}" in asked
    window.close()


def test_who_needs_no_key_is_not_asked_for_one(router: Router, browser: Any) -> None:
    page = browser.new_page()
    page.goto(f"{router.url}/docs")
    page.get_by_text("/v1/models/eject").first.wait_for()
    page.close()


def test_the_description_of_the_api_may_ask_nobody_else(locked: Router) -> None:
    for path, drawn_by in DRAWN_BY.items():
        answer = locked.http.get(f"/{path}")
        assert f'src="docs/{drawn_by}"' in answer.text
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        for mentioned in re.findall(r'(?:href|src)="([^"]+)"', answer.text):
            file = locked.http.get(f"/{mentioned}")
            assert (file.status_code, len(file.content) > 0) == (200, True), mentioned
    assert locked.http.get("/docs/core.py").status_code == 404
