"""The router's own mistakes, made on purpose wherever an answer passes: no client waits, none counts as served.

A mistake is logged once, with the request that it happened to, and counts as `internal_error`.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from conftest import ROOT, Router, Start, http_client, models
from faults.sitecustomize import SEAMS, THREADS
from test_garbage_engines import CLIENTS, FULL_KEY, WAYS, ended, outcomes

_FAULTS = Path(__file__).parent / "faults"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the next mistake is to happen."""
    path = tmp_path_factory.mktemp("faults") / "where"
    path.write_text("")
    return path


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path, faults: Path) -> Router:
    path = os.pathsep.join((str(_FAULTS), str(ROOT)))
    entries = models(tiny, "a", flags=["-c", "1024", "-np", "2", "-t", "1", "--ignore-eos"])
    config = {"api": CLIENTS, "models": entries}
    router = start_shared(config, from_scratch=True, PYTHONPATH=path, FAULTS=str(faults))
    router.http.headers["x-api-key"] = FULL_KEY
    return router


def asked(router: Router, way: str, request_id: str) -> tuple[int, bytes, bool]:
    """The status, the body, and whether the answer is whole."""
    route, streams = WAYS[way]
    headers = {"x-request-id": request_id, "x-api-key": f"key-of-{way}"}
    with contextlib.suppress(httpx.RemoteProtocolError), http_client(router.url, timeout=10) as http:
        answer = http.post(route.path, json=route.body("hi", streams=streams), headers=headers)
        return answer.status_code, answer.content, True
    return 0, b"", False


@pytest.mark.parametrize("seam", SEAMS)
def test_a_mistake_ends_the_answer(router: Router, faults: Path, seam: str) -> None:
    router.chat("a")
    ids = {way: uuid.uuid4().hex for way in WAYS}
    before = outcomes(router)
    faults.write_text(seam)
    with ThreadPoolExecutor(len(WAYS)) as pool:
        answers = {way: pool.submit(asked, router, way, ids[way]) for way in WAYS}
        said = {way: answer.result() for way, answer in answers.items()}
    faults.write_text("")
    ends, log = ended(router, before), router.log
    for way in WAYS:
        outcome, (status, body, whole) = ends[way], said[way]
        told = f"{way}: {outcome}, {status} {body[:300]!r}"
        mistakes = log.count(f"request {ids[way]}: ")
        if not mistakes or seam.endswith("usage"):  # it does not come there, or when all has been told
            assert (outcome, status, whole) == ("served", 200, True), told
            continue
        assert outcome == "internal_error", told
        if seam.endswith((":Answer.whole", ":Answer.end")):  # nor can an error be told
            assert not whole, told
        else:
            assert mistakes == 1, told
            assert not whole or status == 500 or b"Internal error of the router" in body, told
    assert any(f"request {request_id}: " in log for request_id in ids.values()), "nobody came there"
    assert router.chat("a").status_code == 200
    assert router.http.get("/v1/queue/stats").json()["summary"]["total_processing"] == 0


def test_the_event_loop_waits_for_no_new_thread(router: Router, faults: Path) -> None:
    """Which may take seconds where every processor is taken. Threads are begun all the same."""
    router.chat("a")
    faults.write_text(THREADS)
    try:
        assert router.http.post("/v1/models/eject", json={"model": "a"}).status_code == 200
        assert router.chat("a").status_code == 200
        assert router.chat("a", ignored="a" * 1_200_000).status_code == 200  # its body is read on a thread
        assert router.http.post("/v1/config/reload", json={}).status_code == 200
        for path in ("/openapi.json", "/metrics", "/v1/models", "/api/tags", "/vram"):
            assert router.http.get(path).status_code == 200
    finally:
        faults.write_text("")
    assert f"a fault at {THREADS}" not in router.log
