"""`/openapi.json` is taken at its word: requests made up from it, good and bad, get the answers it declares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Router, Start
from storm import LONG

from router.http.routes import ROUTES

CHECKS = ("status_code_conformance", "content_type_conformance", "response_headers_conformance")
CHECKS += ("response_schema_conformance", "allow_header_conformance")


@pytest.fixture(scope="module")
def router(start_shared: Start) -> Router:
    """The demo."""
    return start_shared()


@pytest.mark.timeout(1800 if LONG else 120)
def test_every_answer_is_one_that_is_declared(router: Router, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    arguments = ["run", f"{router.url}/openapi.json", "--checks", ",".join(CHECKS), "--warnings", "off"]
    arguments += ["--exclude-path-regex", "/(stream|sse|events)(/|$)"]  # which have no end
    arguments += ["--request-timeout", "20", "--continue-on-failure"]
    arguments += ["--phases", "coverage,fuzzing"] if LONG else ["--phases", "fuzzing", "--no-shrink"]
    arguments += ["--max-examples", "200" if LONG else "1"]
    storm = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert storm.returncode == 0, storm.stdout[-5000:] + storm.stderr
    assert "Traceback" not in router.log
    router.http.post("/v1/models/demo/reset")
    assert router.chat("demo").status_code == 200
    summary = router.http.get("/v1/queue/stats").json()["summary"]
    assert summary["total_queued"] == summary["total_processing"] == 0


def test_the_schema_knows_every_route_and_every_model(router: Router) -> None:
    schema = router.http.get("/openapi.json").json()
    assert set(schema["paths"]) >= ROUTES.keys()
    for path in ("/health", "/metrics", "/v1/models/{alias}/reset", "/v1/models/status/stream"):
        assert path in schema["paths"]
    assert schema["components"]["schemas"]["Alias"]["enum"] == ["demo", "demo-embed"]
    chat = schema["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) >= {"200", "404", "429", "503", "507"}
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    assert all("head" not in item for item in schema["paths"].values())
    for item in schema["paths"].values():
        for operation in item.values():
            assert not {"405", "422"} & set(operation["responses"]) or operation["tags"] == ["data plane"]


def test_the_schema_says_whether_a_key_is_needed(start: Start, router: Router) -> None:
    assert {} in router.http.get("/openapi.json").json()["security"]
    locked = start(API_KEY="secret")
    assert locked.http.get("/openapi.json").status_code == 401
    schema = locked.http.get("/openapi.json", headers={"x-api-key": "secret"}).json()
    assert schema["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert schema["paths"]["/health"]["get"]["security"] == []
