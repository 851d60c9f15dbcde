"""A page of another site, in the browser of somebody whose router has no keys, tries all that browsers let it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Router, Start, models

from router.api.llama_swap import DONE_BY_GET
from router.http.routes import Dialect, dialect_of

EVIL = "https://evil.example"
BODY = json.dumps({"model": "a", "messages": [], "keep_alive": -1, "source": "a", "destination": "b"})


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    return start_shared({"api": {"allowed_hosts": ["gpubox.lan", "*.my.page"]}, "models": models(tiny, "a")})


def routes_with_effect(router: Router) -> Iterator[tuple[str, str]]:
    """All that is described, and what loads a model or unloads it when it is only read."""
    values = {"alias": "a", "digest": f"sha256:{'0' * 64}", "path": "props", "name": "page.js"}
    values |= {"pull_id": "none", "request_id": "none"}
    for path, item in router.http.get("/openapi.json").json()["paths"].items():
        for method in item:
            if method != "get" or path.startswith("/upstream/") or path in DONE_BY_GET:
                yield method.upper(), path.format(**values)


def test_nothing_that_has_an_effect_is_done_for_it(router: Router) -> None:
    routes = list(routes_with_effect(router))
    assert len(routes) > 50
    for method, path in routes:
        for origin in (EVIL, "null"):  # what is sent without asking first
            headers = {"origin": origin, "content-type": "text/plain"}
            answer = router.http.request(method, path, content=BODY, headers=headers)
            assert answer.status_code == 403, (method, path)
            assert "access-control-allow-origin" not in answer.headers
        error = router.http.request(method, path, content=BODY, headers={"origin": EVIL}).json()["error"]
        if dialect_of(path) is Dialect.OLLAMA:
            assert EVIL in error
        elif dialect_of(path) is Dialect.ANTHROPIC:
            assert error["type"] == "permission_error"
        else:
            assert error["code"] == "unknown_origin"
            assert "api.cors_origins" in error["message"]
    assert router.engines == []
    assert router.status("a")["unload_at"] is None
    assert router.http.get("/v1/models/pull").json() == {"pulls": []}


def test_nor_for_its_links_pictures_and_sockets(router: Router) -> None:
    page = "/upstream/a/props"
    for linked in (page, "/unload"):
        answer = router.http.get(linked, headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "unknown_origin")
    upgrade = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-key": "x",
        "sec-websocket-version": "13",
    }
    assert router.http.get(page, headers={**upgrade, "origin": EVIL}).status_code == 403
    assert (
        router.http.post("/v1/models/load", content=BODY, headers={"sec-fetch-site": "cross-site"}).status_code
        == 403
    )
    assert router.engines == []
    for path in ("/", "/docs", "/metrics"):  # where a link may lead
        assert router.http.get(path, headers={"sec-fetch-site": "cross-site"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://127.0.0.1:3000"},
        {"origin": "http://localhost:8080", "sec-fetch-site": "cross-site"},
        {"origin": "http://[::1]:5173"},
        {"origin": "http://chat.localhost"},
        {"origin": "tauri://localhost"},
        {"origin": "vscode-webview://1q2w3e"},
        {"origin": "chrome-extension://abcdefgh"},
        {"origin": "moz-extension://1-2-3"},
        {"origin": "http://gpubox.lan:8000", "host": "gpubox.lan:8000"},
        {"origin": "https://llm.my.page", "host": "llm.my.page"},
        {"origin": "https://llm.my.page", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "same-site"},
    ],
    ids=str,
)
def test_the_routers_own_page_and_what_the_user_runs_are_served(router: Router, headers: dict[str, str]) -> None:
    for path in ("/v1/models/a/reset", "/tokenize"):
        answer = router.http.post(path, json={"model": "a", "content": ""}, headers=headers)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://localhost.evil.example:80"},
        {"origin": "http://127.0.0.1.evil.example"},
        {"origin": "http://192.168.1.7:3000"},
        {"origin": "http://gpubox.lan:3000", "host": "gpubox.lan:8000"},
        {"origin": "http://gpubox.lan", "host": "gpubox.lan:8000"},
        {"origin": "https://gpubox.lan", "host": "gpubox.lan:80"},
        {"origin": "https://evil.example", "sec-fetch-site": "same-site"},
        {"origin": "https://evil.example", "sec-fetch-site": "none"},
        {"origin": "ftp://gpubox.lan", "host": "gpubox.lan"},
        {"origin": "nonsense", "host": "nonsense"},
    ],
    ids=str,
)
def test_what_only_looks_like_those_is_not(router: Router, headers: dict[str, str]) -> None:
    for path in ("/v1/models/a/reset", "/tokenize"):
        answer = router.http.post(path, json={"model": "a", "content": ""}, headers=headers)
        assert answer.status_code == 403, answer.text


def test_a_page_that_was_trusted_with_a_key_may_and_by_any_name(start: Start, tiny: Path) -> None:
    router = start({"api": {"api_keys": ["full"]}, "models": models(tiny, "a")})
    headers = {"origin": EVIL, "host": "llm.evil.example", "authorization": "Bearer full"}
    assert router.http.post("/v1/models/a/reset", headers=headers).status_code == 200
    assert router.http.post("/tokenize", json={"model": "a", "content": ""}, headers=headers).status_code == 200
    for key in ("", "Bearer wrong"):
        for path in ("/v1/models/a/reset", "/tokenize", "/v1/models/load"):
            answer = router.http.post(path, json={"model": "a"}, headers={**headers, "authorization": key})
            assert answer.status_code == 401


def test_names_that_a_page_may_have_pointed_here_are_refused_on_whatever_address_it_listens(
    start: Start, tiny: Path, free_port: int
) -> None:
    router = start({"models": models(tiny, "a")}, arguments=["--host", "0.0.0.0", "--port", str(free_port)])

    def asked(host: str) -> int:
        statuses = {
            router.http.get("/v1/models", headers={"host": host}).status_code,
            router.http.post("/tokenize", json={"model": "a", "content": ""}, headers={"host": host}).status_code,
        }
        assert len(statuses) == 1, host
        return statuses.pop()

    own = socket.gethostname().lower()
    mine = ("192.168.1.5:8000", "[fe80::1]", "router:8080", "LocalHost.", own, f"{own.partition('.')[0]}.local:80")
    for host in (*mine, "host.docker.internal", "a.b.localhost"):
        assert asked(host) == 200, host
    for host in ("evil.example", "gpubox.lan:8000", "localhost.evil.example", "127.0.0.1.nip.io", "router.local"):
        assert asked(host) == 403, host
    told = router.http.get("/v1/models", headers={"host": "gpubox.lan:8000"}).json()["error"]["message"]
    assert "add 'gpubox.lan' to api.allowed_hosts" in told
    assert router.http.post("/api/show", headers={"host": "gpubox.lan"}).json()["error"] == told
    assert router.http.post("/v1/messages", headers={"host": "gpubox.lan"}).json()["error"]["message"] == told


def test_names_that_are_allowed_are_answered(router: Router) -> None:
    for host, status in (
        ("GPUBox.lan:8000", 200),
        ("a.b.my.page", 200),
        ("my.page", 403),
        ("a.my.page.evil", 403),
    ):
        assert router.http.get("/v1/models", headers={"host": host}).status_code == status, host


def test_a_request_names_one_host(router: Router) -> None:
    body = b'{"model": "a", "content": ""}'
    for request in (b"GET /live", b"POST /tokenize"):
        for version, hosts, status in (
            (b"1.1", (), b"400"),
            (b"1.1", (b"",), b"400"),
            (b"1.1", (b"localhost", b"localhost"), b"400"),
            (b"1.1", (b"evil.example", b"localhost"), b"400"),
            (b"1.1", (b"localhost",), b"200"),
            (b"1.0", (), b"200"),
        ):
            lines = [request + b" HTTP/" + version, *(b"Host: " + host for host in hosts)]
            head = b"\r\n".join((*lines, b"Connection: close", b"Content-Length: %d" % len(body), b"", b""))
            with socket.create_connection(router.address, timeout=20) as client:
                client.sendall(head + body)
                answer = b"".join(iter(lambda: client.recv(65536), b""))
            assert answer.split(b" ")[1] == status, (request, version, hosts, answer)
