"""The page's models, logs and settings in a browser, with real engines and a hub on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Visit, eventually, models, starting, violations
from fake_hub import Hub, serving
from tiny_models import write_llama

REPO = "org/tiny-GGUF"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    content = write_llama(tmp_path_factory.mktemp("content") / "tiny-Q4_K_M.gguf").read_bytes()
    with serving(Hub({REPO: {"tiny-Q4_K_M.gguf": content}})) as hub:
        yield hub


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, tiny: Path, hub: Hub) -> Iterator[Router]:
    """A router with room for one model at a time, and a folder with a file that is no model."""
    folder = tmp_path_factory.mktemp("router")
    (folder / "found").mkdir()
    (folder / "found" / "notes.gguf").write_bytes(b"no model")
    served = models(tiny, "family/a:q4", "b", description="Writes what comes to its mind")
    config = {
        "models": {**served, **models(tiny, "broken", flags=["--no-such-flag"])},
        "aliases": {"gpt-4o": "b"},
        "system": {"max_concurrent_models": 1, "models_dirs": [str(folder / "found")]},
    }
    environ = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with starting(folder) as start:
        yield start(config, NO_PROXY="*", HF_TOKEN_PATH=str(folder / "none"), **environ)


def fact(page: Any, name: str) -> str:
    """Return what the page of a model says of it under this name."""
    row = page.locator("#model-page .facts > div").filter(has=page.get_by_text(name, exact=True))
    said: str = row.locator("dd").inner_text()
    return said


def in_state(page: Any, state: str) -> None:
    page.locator("#model-state").get_by_text(re.compile(f"^{state}")).wait_for()


def test_the_page_of_a_model_tells_all_of_it(router: Router, visit: Visit) -> None:
    router.http.post("/v1/models/eject", json={"model": "b"})
    page = visit(router, "models/gpt-4o", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("heading", name="b", exact=True).wait_for()  # under its own name
    assert page.url == f"{router.url}/#/models/b"
    page.locator("#model-memory").get_by_text("needs").wait_for()  # before it is loaded
    page.get_by_role("button", name="Load").click()
    in_state(page, "ready")
    page.locator("#model-memory").get_by_text("measured").wait_for()
    assert fact(page, "further names") == "gpt-4o"
    assert fact(page, "description") == "Writes what comes to its mind"
    assert fact(page, "context") == "1k of 2k that it was made for"
    assert fact(page, "loads in").endswith("as measured")
    assert fact(page, "source") == "formulas"
    assert "MiB on host" in fact(page, "booked")
    page.locator("#model-decisions").get_by_text("loaded in").first.wait_for()
    command = page.locator("#model-command")
    command.get_by_text("--alias b").wait_for()
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == command.inner_text()
    assert violations(page) == []


def test_a_model_is_kept_for_a_while(router: Router, visit: Visit) -> None:
    page = visit(router, "models/b")
    kept = page.get_by_label("How long the model is kept loaded")
    kept.select_option("keep loaded for 1 h")
    in_state(page, "ready")
    page.locator("#model-keep").get_by_text("kept until").wait_for(state="attached")
    assert router.status("b")["pinned_until"] is not None
    page.locator("#model-manage:focus").wait_for()
    kept.select_option("keep as configured")
    page.locator("#model-keep").get_by_text("kept as configured").wait_for(state="attached")
    assert router.status("b")["pinned_until"] is None


def test_a_model_that_failed_tells_how_its_engine_ended(router: Router, visit: Visit) -> None:
    page = visit(router, "models/broken")
    page.get_by_role("button", name="Load").click()
    in_state(page, "failed")
    page.locator("#model-why").get_by_text("--no-such-flag").wait_for()
    page.locator("#model-exit-reason").get_by_text("exited with code").wait_for()
    page.locator("#model-exit-log").get_by_text("--no-such-flag").wait_for()
    page.reload()
    page.locator("#model-memory").get_by_text("needs").wait_for()  # as of one that is off
    page.get_by_role("button", name="Reset").click()
    in_state(page, "off")
    page.get_by_role("link", name="Log", exact=True).click()
    page.locator("#log-lines").get_by_text("--no-such-flag").wait_for()


def test_a_pull_is_estimated_before_it_starts(router: Router, hub: Hub, visit: Visit) -> None:
    page = visit(router, "models")
    page.get_by_label("Model to pull").fill(f"hf.co/{REPO}")
    page.get_by_label("Model to pull").press("Enter")
    page.locator("#forecast-words").get_by_text(re.compile("needs .* fits")).wait_for()
    page.locator("#forecast-facts").get_by_text("on host").wait_for()
    assert router.http.get("/v1/models/pull").json()["pulls"] == []
    assert violations(page) == []
    hub.hold_at = 0.5
    page.get_by_role("button", name="Pull", exact=True).click()
    row = page.locator("#pull-rows li")
    row.get_by_text("downloading").wait_for()
    page.locator("#pull-forecast").wait_for(state="hidden")
    row.get_by_role("button", name="Cancel").click()
    row.get_by_text("cancelled").wait_for()
    hub.hold_at = None
    hub.go_on.set()
    page.get_by_label("Model to pull").fill(f"hf.co/{REPO}")
    page.get_by_role("button", name="Pull", exact=True).click()
    row.get_by_text("success").first.wait_for()
    page.get_by_role("link", name=f"{REPO}:Q4_K_M", exact=True).click()
    in_state(page, "off")
    page.get_by_role("button", name="Remove").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Remove").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    page.get_by_role("heading", name="Models", exact=True).wait_for()
    eventually(lambda: f"{REPO}:Q4_K_M" not in router.http.get("/v1/models/status").json()["models"])


def test_what_the_hub_does_not_have_is_not_pulled(router: Router, visit: Visit) -> None:
    page = visit(router, "models")
    page.get_by_label("Model to pull").fill("hf.co/org/none")
    page.get_by_role("button", name="Pull", exact=True).click()
    page.locator("#forecast-words.error").get_by_text("org/none").wait_for()


def test_what_was_found_but_is_not_served_says_why(router: Router, visit: Visit) -> None:
    page = visit(router, "models")
    found = page.locator("#found-rows")
    found.get_by_text("notes.gguf").wait_for()
    assert "GGUF" in found.inner_text()
    page.locator("#found-folders").get_by_text("/found").wait_for()


def test_a_log_is_filtered_and_paused(router: Router, visit: Visit) -> None:
    router.http.post("/v1/models/load", json={"model": "b"})
    page = visit(router, "logs/b")
    lines = page.locator("#log-lines > div:not([hidden])")
    lines.get_by_text("loading model").first.wait_for()
    page.get_by_label("Filter the log").fill("MODEL loaded")
    page.locator("#log-note").get_by_text(re.compile(r"\d of \d+ lines")).wait_for()
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")  # it scrolls, and not the page
    page.get_by_role("button", name="Wrap lines").click()
    page.reload()
    lines.get_by_text("model loaded").first.wait_for()
    assert all("loaded" in line for line in lines.all_inner_texts())
    assert page.locator("#log-lines").get_attribute("data-wrap") == "false"
    page.get_by_role("button", name="Pause").click()
    router.http.post("/v1/models/eject", json={"model": "b"})
    router.http.post("/v1/models/load", json={"model": "b"})
    page.locator("#log-note").get_by_text(re.compile(r"paused, [1-9]\d* new lines")).wait_for()
    count = lines.count()
    page.get_by_role("button", name="Pause").click()
    eventually(lambda: lines.count() > count)


def test_settings_of_the_page_stay_and_those_of_the_router_are_shown(router: Router, visit: Visit) -> None:
    page = visit(router, "settings", color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_label("Theme").select_option("dark")
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    page.get_by_text("whoever reaches it may do everything").wait_for()
    assert page.evaluate(ground) == dark
    config = page.locator("#router-config")
    config.locator("#config-facts > div").filter(has_text="models at once").get_by_text("1", exact=True).wait_for()
    config.get_by_text("The whole configuration").click()
    config.get_by_text("system.max_queue_size_total").wait_for()
    assert router.http.get("/v1/config").json()["values"]["system.max_concurrent_models"] == "1"
