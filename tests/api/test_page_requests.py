"""The list of requests on the web page, and the page of one request, in a real browser."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Visit, eventually, fake, models, starting

MARKUP = "<img src=x onerror=document.title=1>"


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Router]:
    """Streams go on until somebody ends them; all else is answered at once, after a load that takes a moment."""
    folder = tmp_path_factory.mktemp("requests")
    said = {"choices": [{"message": {"content": MARKUP}}], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}
    engine = fake(folder, chunks="100000", chunk_sec="0.02", load_sec="0.3", answer=json.dumps(said))
    system = {"llama_server_path": engine, "capture": {"requests": 2}}
    with starting(folder) as start:
        yield start({"system": system, "models": models(tiny, "gemma-3-4b", "family/qwen3:q4")})


def chat(router: Router, name: str, model: str = "gemma-3-4b", **more: str) -> None:
    router.chat(model, headers={"x-request-id": name, **more})


@contextmanager
def a_stream(router: Router, name: str, model: str = "gemma-3-4b") -> Iterator[list[str]]:
    """A request that goes on meanwhile; its events are gathered."""
    events: list[str] = []

    def follow() -> None:
        body = {"model": model, "messages": [], "stream": True}
        headers = {"x-request-id": name}
        with router.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            events.extend(answer.iter_lines())

    client = threading.Thread(target=follow, daemon=True)
    client.start()
    eventually(lambda: any(row["id"] == name for row in listed(router, state="live")))
    yield events
    router.http.delete(f"/v1/requests/{name}")
    client.join(10)


def listed(router: Router, **query: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = router.http.get("/v1/requests", params=query).json()["requests"]
    return rows


def row(page: Any, name: str) -> Any:
    return page.locator("#request-table tbody tr").filter(has=page.get_by_role("link", name=name, exact=True))


def names(page: Any) -> list[str]:
    texts: list[str] = page.locator("#request-table tbody th").all_inner_texts()
    return texts


def test_a_request_in_flight_is_first_and_is_cancelled_with_a_press(router: Router, visit: Visit) -> None:
    chat(router, "before")
    with a_stream(router, "endless") as events, a_stream(router, "behind"):
        page = visit(router, "requests")
        row(page, "endless").get_by_text(re.compile(r"\d+ tokens")).wait_for()
        row(page, "behind").get_by_text("the only slot of gemma-3-4b is in use").wait_for()
        assert names(page)[:3] == ["behind", "endless", "before"]
        assert row(page, "before").get_by_role("button").count() == 0
        assert row(page, "before").get_by_text("served").count() == 1
        page.get_by_role("button", name="Cancel request behind").focus()
        page.keyboard.press("Enter")
        row(page, "behind").get_by_text("cancelled").wait_for()
        assert page.evaluate("document.activeElement.textContent") == "behind"  # the button is gone
        page.get_by_role("button", name="Cancel request endless").click()
        row(page, "endless").get_by_text("cancelled").wait_for()
        page.locator("#announcer").get_by_text("The request is cancelled.").wait_for(state="attached")
    assert "An operator cancelled the request" in "".join(events)
    assert page.get_by_role("button", name=re.compile("^Cancel")).count() == 0


def test_rows_hold_still_under_the_pointer(router: Router, visit: Visit) -> None:
    for name in ("still-1", "still-2"):
        chat(router, name)
    page = visit(router, "requests")
    row(page, "still-2").wait_for()
    row(page, "still-1").hover()
    page.get_by_text("holds still").wait_for()
    place = row(page, "still-1").bounding_box()
    before = names(page)
    chat(router, "moving")
    page.get_by_text("holds still while you are in it; 1 more").wait_for()
    assert (names(page), row(page, "still-1").bounding_box()) == (before, place)
    page.get_by_label("Find requests").hover()
    row(page, "moving").wait_for()
    assert names(page)[0] == "moving"
    assert page.locator("#held").inner_text() == ""
    row(page, "still-1").get_by_role("link").focus()  # by the keyboard, too
    page.get_by_text("holds still").wait_for()


def test_requests_are_filtered_and_sorted_and_the_address_says_so(router: Router, visit: Visit) -> None:
    chat(router, "some-4b")
    chat(router, "other", "family/qwen3:q4")
    chat(router, "unknown", "none")
    page = visit(router, "requests")
    row(page, "unknown").get_by_text("model not found 404").wait_for()
    page.get_by_label("Find requests").fill("GEMMA 4b some")
    row(page, "other").wait_for(state="detached")
    assert names(page) == ["some-4b"]
    assert page.locator("#request-counts").inner_text().startswith(f"1 of {len(listed(router))} · 0 in flight")
    assert "q=GEMMA+4b+some" in page.url
    row(page, "some-4b").get_by_role("link").click()
    page.get_by_role("heading", name="Request some-4b").wait_for()
    page.go_back()
    row(page, "some-4b").wait_for()
    assert (names(page), page.get_by_label("Find requests").input_value()) == (["some-4b"], "GEMMA 4b some")
    page.get_by_label("Find requests").fill("no such thing")
    page.get_by_text("No request matches the filter.").wait_for()
    page.get_by_label("Find requests").fill("")
    page.get_by_label("Requests with this outcome").select_option("not served")
    row(page, "some-4b").wait_for(state="detached")
    assert set(names(page)) == {"unknown"}
    page.get_by_label("Requests with this outcome").select_option("all outcomes")
    head = page.get_by_role("columnheader", name="Model")
    for order in ("ascending", "descending"):
        head.get_by_role("button").click()
        page.locator(f"#request-head th[aria-sort={order}]").get_by_text("Model").wait_for()
        shown = [text for text in page.locator("tbody .column-model").all_inner_texts() if text]
        assert shown == sorted(shown, reverse=order == "descending"), order
    assert "sort=-model" in page.url
    page.goto(f"{router.url}/#/requests?model=family%2Fqwen3%3Aq4")
    page.get_by_role("button", name="Show all, not only model family/qwen3:q4").wait_for()
    assert set(page.locator("tbody .column-model").all_inner_texts()) == {"family/qwen3:q4"}


def test_what_is_filtered_is_saved(router: Router, visit: Visit) -> None:
    chat(router, "=1+1")
    chat(router, "plain")
    page = visit(router, "requests?q=%3D1%2B1")
    row(page, "=1+1").wait_for()
    saved = {}
    for kind in ("CSV", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save these requests as {kind}").click()
        saved[kind] = Path(download.value.path()).read_text()
        assert download.value.suggested_filename == f"requests.{kind.lower()}"
    (as_json,) = json.loads(saved["JSON"])
    assert (as_json["id"], as_json["output_tokens"]) == ("=1+1", 3)
    assert as_json == listed(router, limit="2")[1]
    (as_row,) = csv.DictReader(saved["CSV"].splitlines())
    assert (as_row["id"], as_row["output_tokens"]) == ("'=1+1", "3")  # no spreadsheet takes it for a formula


def test_the_page_of_a_request_tells_what_happened_to_it(router: Router, visit: Visit) -> None:
    router.unload()
    chat(router, "a/story?", **{"x-request-priority": "high"})
    page = visit(router, "requests/a%2Fstory%3F")
    events = page.locator("#request-events tr")
    events.filter(has_text="done").wait_for()
    told = page.locator("#request-events th").all_inner_texts()
    assert [each for each in told if each in ("queued", "loading", "ready", "granted", "first token", "done")] == [
        *("queued", "loading", "ready", "granted", "first token", "done")
    ]
    assert re.search(r"loading \d+ ms", page.locator("#request-bar").get_attribute("aria-label"))
    assert page.locator("#request-legend").get_by_text("loading").count() == 1
    facts = page.locator("#request-facts").inner_text()
    for fact in ("gemma-3-4b", "127.0.0.1", "high", "gemma-3-4b#"):
        assert fact in facts
    assert page.title() == "Request a/story? · llama-router"
    page.get_by_role("link", name="gemma-3-4b", exact=True).click()
    assert page.url.endswith("#/models/gemma-3-4b")
    page.goto(f"{router.url}/#/requests/nobody")
    page.get_by_text("There is no request 'nobody'").wait_for()


def test_a_request_in_flight_is_followed_on_its_page(router: Router, visit: Visit) -> None:
    with a_stream(router, "followed"), a_stream(router, "following"):
        page = visit(router, "")  # where the queue is
        page.locator("#waiting").get_by_role("link", name="following").click()
        page.locator("#request-state").get_by_text("queued · 1. the only slot of gemma-3-4b is in use").wait_for()
        page.get_by_role("button", name="Cancel").click()
        page.locator("#request-state").get_by_text("cancelled").wait_for()
        page.goto(f"{router.url}/#/requests/followed")
        page.locator("#request-state").get_by_text(re.compile(r"streaming · \d+ tokens")).wait_for()
        page.get_by_role("button", name="Cancel").click()
        page.locator("#request-state").get_by_text("cancelled").wait_for()
        page.get_by_text("An operator cancelled the request").first.wait_for()
        assert page.get_by_role("button", name="Cancel").count() == 0


def test_bodies_are_shown_as_text_and_the_page_says_that_they_are_kept(router: Router, visit: Visit) -> None:
    router.chat("gemma-3-4b", content=f"{MARKUP} Bearer abcdefghijkl", headers={"x-request-id": "kept"})
    page = visit(router, "requests")
    page.get_by_text("is kept in memory, of the last 2 requests").wait_for()
    row(page, "kept").get_by_role("link").click()
    page.get_by_text("Request", exact=True).and_(page.locator("summary")).click()
    asked = page.locator("#captured-request").inner_text()
    assert MARKUP in asked
    assert "Bearer [redacted]" in asked
    assert MARKUP in page.locator("#captured-answer").inner_text()
    assert page.locator("img").count() == 0
    assert page.title() == "Request kept · llama-router"
    page.get_by_role("link", name="Settings").click()
    page.get_by_text("bodies of requests kept", exact=True).wait_for()


def test_what_the_list_shows_is_said_also_of_an_empty_one(router: Router, visit: Visit) -> None:
    page = visit(router, "settings")
    nothing = {"requests": [], "kept": 1000, "total": 0, "capture": 0}
    page.route("**/v1/requests?*", lambda route: route.fulfill(json=nothing))
    page.get_by_role("link", name="Requests").click()
    page.get_by_text("No requests yet.").wait_for()
    assert page.get_by_label("Requests with this outcome").locator("option:checked").inner_text() == "all outcomes"


def test_a_thousand_requests_are_filtered_at_once(router: Router, visit: Visit) -> None:
    for n in range(1000):
        router.http.post("/v1/embeddings", json={"model": f"model-{n}"}, headers={"x-request-id": f"many-{n}"})
    page = visit(router, "requests")
    page.get_by_role("button", name="Show 50 more of 1,000").wait_for()
    assert len(names(page)) == 50
    took = page.evaluate(
        """async () => {
            const filter = document.getElementById("request-filter");
            const took = [];
            for (const text of ["many 1", "many 99", "embeddings not found", "many 999", ""]) {
                const begun = performance.now();
                filter.value = text;
                filter.dispatchEvent(new Event("input", { bubbles: true }));
                await new Promise(requestAnimationFrame);
                document.body.offsetHeight;
                const rows = document.querySelectorAll("#request-table tbody tr");
                took.push([text, rows.length, performance.now() - begun]);
            }
            return took;
        }"""
    )
    for text, count, milliseconds in took:
        print(f"filter {text!r}: {count} rows in {milliseconds:.1f} ms, with the wait for a frame")
    assert [count for _, count, _ in took] == [50, 19, 50, 1, 50]
    page.get_by_role("button", name="Show 50 more of 1,000").click()
    page.locator("#request-table tbody tr").nth(99).wait_for()


def test_it_fits_a_phone(router: Router, visit: Visit) -> None:
    chat(router, "a-name-that-is-as-long-as-a-name-may-be" * 3)
    page = visit(router, "requests", viewport={"width": 360, "height": 740})
    page.locator("#request-table tbody tr").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#request-table tbody a").first.click()
    page.locator("#request-events tr").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
