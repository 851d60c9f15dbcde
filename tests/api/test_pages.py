"""Management endpoints: the format of their answers, and who may see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from conftest import Router, Start, eventually, fake, models
from fastapi.openapi.utils import get_openapi
from sse_starlette import ServerSentEvent

from router.api import openapi
from router.api.openapi import Description
from router.api.streams import EventStream
from router.config.resolved import AliasConfig, Config
from router.system.turns import in_turns


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    engine = fake(tmp_path_factory.mktemp("engine"))
    return start_shared({"system": {"llama_server_path": engine}, "models": models(tiny, "a", "family/b:q4")})


PAGES = ("/health", "/ready", "/live", "/metrics", "/v1/models", "/v1/models/a", "/v1/models/status", "/status/a")
PAGES += ("/v1/models/family/b:q4/status", "/v1/queue/stats", "/v1/health/models", "/v1/logs/a", "/openapi.json")


def test_a_monitor_may_ask_with_head(router: Router) -> None:
    router.chat("a")
    for page in PAGES:
        shown, asked = router.http.get(page), router.http.head(page)
        assert (asked.status_code, asked.content) == (200, b""), page
        assert asked.headers["content-type"] == shown.headers["content-type"]
    stream = router.http.head("/v1/models/status/stream")
    assert stream.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/health", {"GET", "HEAD"}),
        ("PUT", "/v1/models/a", {"DELETE", "GET", "HEAD"}),
        ("PUT", "/v1/models/a/status", {"GET", "HEAD"}),
        ("PUT", "/v1/models/status", {"GET", "HEAD"}),
        ("PUT", "/v1/config/reload", {"POST"}),
        ("GET", "/v1/chat/completions", {"POST"}),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(router: Router, method: str, path: str, allowed: set[str]) -> None:
    answer = router.http.request(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_health_says_which_engines_do_not_answer(start: Start, tiny: Path) -> None:
    system = {"health_check_interval_sec": 0.1, "stall_timeout_sec": 0.1}
    router = start({"system": system, "models": models(tiny, "a")})
    router.chat("a")
    answer = router.http.get("/health").json()
    assert answer["checks"]["http_client"] == {"status": "ok", "engines": 1, "not_answering": []}
    background = answer["checks"]["background"]
    assert (background["status"], background["failing"]) == ("ok", [])
    assert background["failures"].keys() >= {"watch of memory", "health monitor", "watch of model files"}
    assert answer["checks"]["manager"] == {"status": "ready", "active_models": 1}
    engine = psutil.Process(router.status("a")["pid"])
    engine.suspend()
    while (answer := router.http.get("/health")).json()["checks"]["http_client"]["status"] == "ok":
        assert answer.status_code == 200
    assert answer.status_code == 200  # the router is well, and sees to it
    assert answer.json()["checks"]["http_client"]["not_answering"] == ["a"]
    engine.resume()


@pytest.mark.parametrize(
    "name",
    ["..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "a%00", "a/../../../config.json"],
)
def test_a_name_is_a_name_and_never_a_path(router: Router, name: str) -> None:
    for page in (f"/v1/logs/{name}", f"/v1/models/{name}", f"/v1/models/{name}/status", f"/status/{name}"):
        answer = router.http.get(page)
        assert answer.status_code == 404, page
        assert answer.json()["error"]["code"] in ("model_not_found", "route_not_found")
    answer = router.http.post("/v1/models/load", json={"model": name})
    assert answer.status_code == 404


def test_who_may_only_infer_reads_no_engines_words(start: Start, tiny: Path, tmp_path: Path) -> None:
    keys = {"api_keys": ["operator"], "inference_keys": ["client"]}
    router = start(
        {"api": keys, "system": {"llama_server_path": fake(tmp_path)}, "models": models(tiny, "a")},
    )
    client, operator = ({"authorization": f"Bearer {key}"} for key in ("client", "operator"))
    assert router.chat("a", headers=client).status_code == 200
    for page in ("/v1/logs/a", "/v1/logs/a/stream", "/v1/logs/none", "/v1/health/models"):
        for method in ("GET", "HEAD"):
            assert router.http.request(method, page, headers=client).status_code == 403, page
    for page in ("/v1/models", "/v1/models/status", "/v1/queue/stats", "/metrics", "/openapi.json"):
        assert router.http.get(page).status_code == router.http.head(page).status_code == 401, page
        assert router.http.get(page, headers=client).status_code == 200, page
    assert router.http.get("/v1/logs/a", headers=operator).status_code == 200
    assert router.http.post("/v1/models/a/reset", headers=client).status_code == 403


def test_the_key_of_an_engine_shows_nowhere(start: Start, tiny: Path, tmp_path: Path) -> None:
    """But in its environment, which only its user can read."""
    entries = {**models(tiny, "a"), **models(tiny, "broken", flags=["--no-such-flag"])}
    router = start({"system": {"model_load_max_retries": 0}, "models": entries})
    assert router.chat("a").status_code == 200
    refused = router.chat("broken", headers={"authorization": "Bearer wrong"})
    process = psutil.Process(router.status("a")["pid"])
    key = process.environ()["LLAMA_API_KEY"]
    assert len(key) == 48
    commands = [word for each in psutil.process_iter(["cmdline"]) for word in each.info["cmdline"] or ()]
    pages = [router.http.get(page).text for page in (*PAGES, "/v1/logs/broken")]
    for text in (*commands, *pages, refused.text, router.log):
        assert key not in text
    assert (Path(f"/proc/{process.pid}/environ").stat().st_mode & 0o077) == 0


def test_what_is_meant_for_one_connection_goes_no_further(start: Start, tiny: Path, tmp_path: Path) -> None:
    hop = (
        "Connection: keep-alive, x-engine",
        "Keep-Alive: timeout=5",
        "Proxy-Authenticate: Basic",
        "TE: trailers",
    )
    hop += ("Trailer: x-sum", "Upgrade: h2c", "Access-Control-Allow-Origin: *", "X-Request-Id: of-the-engine")
    engine = fake(tmp_path, headers="|".join((*hop, "X-Of-The-Model: stays")))
    router = start({"system": {"llama_server_path": engine}, "models": models(tiny, "a")})
    answer = router.chat("a")
    assert answer.headers["x-of-the-model"] == "stays"
    names = {"keep-alive", "proxy-authenticate", "te", "trailer", "upgrade", "access-control-allow-origin"}
    assert not names & set(answer.headers)
    assert answer.headers["x-request-id"] != "of-the-engine"


def test_forwarded_headers_are_believed_by_nobody(router: Router) -> None:
    lies = {
        "x-forwarded-host": "localhost",
        "forwarded": "host=localhost;for=127.0.0.1",
        "x-forwarded-for": "127.0.0.1",
    }
    assert router.http.get("/live", headers={"host": "evil.example", **lies}).status_code == 403
    assert router.http.get("/live", headers={"x-forwarded-host": "evil.example"}).status_code == 200


def test_a_reader_who_does_not_read_is_let_go() -> None:
    """Over a connection that takes one message and no more."""
    ended: list[str] = []

    async def events() -> AsyncIterator[ServerSentEvent]:
        try:
            while True:
                yield ServerSentEvent("x")
        finally:
            ended.append("the stream")

    async def serve() -> None:
        begun = asyncio.Event()

        async def send(message: Any) -> None:
            if begun.is_set():
                await asyncio.Event().wait()
            begun.set()

        async def receive() -> Any:
            await asyncio.Event().wait()

        stream = EventStream(events(), send_timeout=0.05)
        await asyncio.wait_for(stream({"type": "http", "method": "GET", "path": "/"}, receive, send), 5)

    asyncio.run(serve())
    assert ended == ["the stream"]


def test_what_takes_long_leaves_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.system.turns._TURN_SEC", 0.0)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def story() -> None:
        beside = asyncio.create_task(others())
        assert [item async for item in in_turns(range(5))] == [0, 1, 2, 3, 4]
        beside.cancel()

    asyncio.run(story())
    assert turns >= 4


def test_a_load_that_has_to_wait_is_told_why_at_once_and_can_be_taken_back(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    """Behind a stream that goes on for as long as it takes."""
    system = {"max_concurrent_models": 1, "llama_server_path": fake(tmp_path, chunks="2000", chunk_sec="0.05")}
    router = start({"system": system, "models": models(tiny, "a", "b")})

    def load(alias: str) -> tuple[int, str, str]:
        answer = router.http.post("/v1/models/load", json={"model": alias, "wait": False})
        told = answer.json()
        return answer.status_code, told["status"], told["message"]

    code, status, _ = load("a")
    assert (code, status in ("waiting", "loading")) == (202, True)
    router.until("a", "ready")
    assert load("a") == (200, "success", "a is ready")
    body = {"model": "a", "prompt": "a", "stream": True}
    with router.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # once that is gone, so is the client
        next(lines)
        load("b")
        eventually(lambda: "until a can be unloaded" in (router.status("b")["why_waiting"] or ""))
        assert load("b")[:2] == (202, "waiting")
        assert (router.status("b")["status"], router.status("b")["load_asked_at"] is None) == ("off", False)
        taken_back = router.http.post("/v1/models/eject", json={"model": "b"})
        assert (taken_back.status_code, taken_back.json()["message"]) == (200, "b is not to be loaded any more")
        assert (router.status("b")["load_asked_at"], router.status("b")["why_waiting"]) == (None, None)
        assert router.http.post("/v1/models/eject", json={"model": "b"}).status_code == 404
    assert load("b")[0] == 202
    router.until("b", "ready")


def test_the_description_is_made_once_and_tells_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long, on threads that the event loop has to share the interpreter with."""
    made = 0

    def count(**asked: Any) -> dict[str, Any]:
        nonlocal made
        made += 1
        return {**get_openapi(**asked), "components": {"schemas": {name: {"properties": {}} for name in asked_of}}}

    asked_of = ("ModelName", "LoadRequest", "ModelToLoad")
    monkeypatch.setattr(openapi, "get_openapi", count)
    description = Description("llama-router", "1", ())
    before, after = (Config(aliases={name: AliasConfig(name, "m")}) for name in ("old", "new"))

    async def ask() -> list[bytes]:
        first = await asyncio.gather(*(description.of(before, keys_required=False) for _ in range(4)))
        return [*first, await description.of(after, keys_required=True)]

    *first, last = map(msgspec.json.decode, asyncio.run(ask()))
    assert made == 1
    assert all(said == first[0] for said in first)
    assert [said["components"]["schemas"]["Alias"]["enum"] for said in (first[0], last)] == [["old"], ["new"]]
    assert ({} in first[0]["security"], {} in last["security"]) == (True, False)
