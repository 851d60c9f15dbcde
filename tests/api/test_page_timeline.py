"""The last minutes on the page's overview, in a real browser with real engines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Visit, models, starting


@pytest.fixture(scope="module")
def router(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """It has loaded fourteen models, unloaded one, and failed to load another."""
    with starting(tmp_path_factory.mktemp("router")) as start:
        others = [f"other-{n}" for n in range(12)]
        entries = models(tiny, *others, "first", "second", "never")
        entries["broken"] = {"model_path": str(tiny), "flags": ["--no-such-flag"]}
        router = start({"models": entries})
        for alias in others:
            router.http.post("/v1/models/load", json={"model": alias, "wait": alias == others[-1]})
        assert router.chat("first", max_tokens=40).status_code == 200
        router.http.post("/v1/models/eject", json={"model": "first"})
        assert router.chat("second").status_code == 200
        router.chat("broken")
        yield router


@pytest.fixture
def page(router: Router, visit: Visit) -> Any:
    page = visit(router)
    page.locator("#lanes li").first.wait_for()
    return page


def lanes(page: Any) -> list[str]:
    names: list[str] = page.locator("#lanes a").all_inner_texts()
    return names


def test_a_page_opened_late_shows_what_each_model_did_the_latest_first(page: Any) -> None:
    """And no more than a dozen, until it is told to."""
    assert lanes(page)[:3] == ["broken", "second", "first"]
    assert len(lanes(page)) == 12
    more = page.get_by_role("button", name="and 3 more")
    more.click()
    page.locator("#lanes li").nth(14).wait_for()
    assert "never" not in lanes(page)
    page.get_by_role("button", name="fewer").click()
    page.locator("#lanes li").nth(12).wait_for(state="detached")


def test_the_keys_and_the_pointer_tell_what_was_and_why(page: Any) -> None:
    track = page.get_by_role("slider", name="first: its states in the last minutes")
    track.focus()
    told = []
    for key in ("Home", *["ArrowRight"] * 8):
        page.keyboard.press(key)
        told.append(page.locator("#lane-note").inner_text())
        assert track.get_attribute("aria-valuetext") == told[-1]
    assert any(each.startswith("first loading from ") for each in told[:2])  # perhaps it was awaited before
    assert any(re.match(r"first ready from .* loaded in", each) for each in told)
    assert any(re.match(r"first stopping from .*: manual: ejected by hand", each) for each in told)
    page.keyboard.press("Tab")
    assert page.locator("#lane-note").inner_text() == ""
    box = page.get_by_role("slider", name="broken: its states in the last minutes").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 5)
    assert page.locator("#lane-note").inner_text().startswith("broken failed from ")
    page.mouse.move(0, 0)
    assert page.locator("#lane-note").inner_text() == ""


def test_all_of_it_is_in_a_table_too(page: Any) -> None:
    page.get_by_text("States as a table").click()
    rows = page.locator("#lane-rows tr")
    rows.first.wait_for()
    texts = rows.all_inner_texts()
    assert any(re.match(r"second\s+ready\s+\d\d:\d\d:\d\d\s+.*loaded in", text) for text in texts)
    assert any(text.startswith("broken\tfailed") and "--no-such-flag" in text for text in texts)


def test_a_model_loaded_while_the_page_is_open_gets_a_lane_and_rows_stay_under_the_pointer(
    page: Any, router: Router
) -> None:
    page.get_by_role("slider", name="second: its states").focus()
    router.http.post("/v1/models/load", json={"model": "never"})
    page.locator("#decision-rows").get_by_text("never").first.wait_for()
    page.get_by_role("button", name="and 4 more").wait_for()
    assert lanes(page)[:2] == ["broken", "second"]
    page.get_by_role("link", name="Overview").focus()
    router.http.post("/v1/models/load", json={"model": "first"})
    page.locator("#lanes li:first-child").get_by_text("first", exact=True).wait_for()
    assert "never" in lanes(page)


def test_tokens_waits_and_memory_are_charted(page: Any, router: Router) -> None:
    page.get_by_role("slider", name="Memory of host in the last minutes").wait_for()
    names = page.locator("#charts figcaption span:first-child").all_inner_texts()
    assert names[:2] == ["Tokens", "Waits, p95"]
    assert "Memory of host" in names
    page.locator("#charts .tokens[d^=M]").wait_for(state="attached")
    figure = page.locator("#charts figure").last.locator(".dim")
    page.get_by_role("slider", name="Memory of host in the last minutes").focus()
    assert re.match(r"\d\d:\d\d:\d\d: [\d.]+ [GM]iB", figure.inner_text())
    told = router.http.get("/v1/timeline").json()["series"]
    assert max(told["tokens_per_sec"]) > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(router: Router, visit: Visit, scheme: str) -> None:
    page = visit(router, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.locator("#lanes li").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
