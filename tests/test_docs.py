"""Documents refer to things that exist: pages, their headings, and files of the project."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

from router.api.app import PAGES
from router.http.pages import Page

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "monitoring/*.md", "tests/hostile/*.md", "tools/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
NAMED_FILE = re.compile(
    r"\b(?:router|tests|benchmarks|config|monitoring|tools|docs)/[\w./-]+\.(?:py|md|json|yaml|yml|service|mjs)\b"
)
PATH = re.compile(r"(?<![\w/.}])/[\w/.{}-]*")
"""Matches paths of routes as documents write them: `/v1/models/{alias}`."""


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub derives from the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for path, anchor in LINK.findall(document.read_text()):
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    named = set(NAMED_FILE.findall(document.read_text()))
    places = (ROOT, document.parent, ROOT / "router")
    assert not {name for name in named if not any((place / name).exists() for place in places)}


def test_every_page_is_in_a_document() -> None:
    told = {re.sub(r"{\w+}", "{}", path) for path in PATH.findall("".join(map(Path.read_text, DOCUMENTS)))}
    pages = [page for group in PAGES for page in group.routes if isinstance(page, Page)]
    paths = {page.path for page in pages if page.include_in_schema}
    assert not {path for path in paths if re.sub(r"{[\w:]+}", "{}", path) not in told}
