"""Origins of web pages and Host names that the router accepts."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from conftest import Router, Start, models

from router.config.schema import Api
from router.http.auth import Keyring
from router.http.errors import ApiError
from router.http.origins import Browsers

PATTERNS = (
    "http://localhost:*",
    "https://*.example.com",
    "http://plain.page:80",
    "https://[::1]:8443",
    "tauri://*",
)


def browsers(api: Api) -> Browsers:
    return Browsers(api, Keyring(api))


def allows(origin: str, path: str = "/v1/models", origins: tuple[str, ...] = PATTERNS) -> bool:
    lines = browsers(Api(cors_origins=origins)).origin_lines(origin.encode(), path)
    return b"access-control-allow-origin" in lines


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "http://localhost:5173",
        "https://a.example.com",
        "https://a.b.example.com",
        "http://plain.page",
        "https://[::1]:8443",
        "tauri://localhost",
    ],
)
def test_an_origin_that_a_pattern_means_may_call(origin: str) -> None:
    assert allows(origin)


@pytest.mark.parametrize(
    "origin",
    [
        "https://localhost:5173",
        "http://localhost.evil.page",
        "http://localhost:80.evil.page",
        "https://example.com",
        "https://example.com.evil.page",
        "https://a.example.com:444",
        "http://plain.page:8080",
        "null",
        "",
    ],
)
def test_an_origin_that_only_looks_like_one_may_not(origin: str) -> None:
    assert not allows(origin)


def test_without_origins_no_page_may_call_and_with_a_star_all() -> None:
    assert not allows("http://localhost:3000", origins=())
    assert allows("http://any.page", origins=("*", "http://my.page"))


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "http://127.0.0.1:3000",
        "https://0.0.0.0:1",
        "app://obsidian.md",
        "vscode-webview://1q2w3e",
    ],
)
def test_on_ollamas_routes_ollamas_origins_may_call_too(origin: str) -> None:
    assert allows(origin, "/api/chat", ())
    assert not allows(origin, "/v1/chat/completions", ())
    assert not allows("http://evil.page", "/api/chat", ())


@pytest.mark.parametrize(
    ("name", "domain", "told"),
    [("gpubox", "gpubox.lan", {"gpubox", "gpubox.local", "gpubox.lan"}), ("a.b", "", {"a.b", "a.local"})],
)
def test_a_machine_is_called_by_its_names_when_those_are_known(
    monkeypatch: pytest.MonkeyPatch, name: str, domain: str, told: set[str]
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, f"{domain}.", ()), (0, 0, 0, "", ())])
    here = browsers(Api())

    def is_answered(host: str) -> bool:
        try:
            here.check([(b"host", host.encode())], "1.1", "/live", has_effect=False)
        except ApiError:
            return False
        return True

    assert is_answered(domain or "a.lan") is False
    asyncio.run(here.ask_for_own_names())
    assert {host for host in (*told, "other.lan", "other.local") if is_answered(host)} == told


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    return start_shared({"api": {"cors_origins": ["https://*.my.page"]}, "models": models(tiny, "a")})


@pytest.mark.parametrize(
    ("path", "origin"),
    [
        ("/v1/models", "https://chat.my.page"),
        ("/v1/chat/completions", "https://chat.my.page"),
        ("/api/tags", "app://obsidian.md"),
        ("/api/chat", "http://localhost:8501"),
    ],
)
def test_pages_and_data_plane_say_the_same_of_an_origin(router: Router, path: str, origin: str) -> None:
    method = "GET" if path in ("/v1/models", "/api/tags") else "POST"
    for asked, allowed in ((origin, origin), ("https://evil.page", None)):
        answer = router.http.request(method, path, headers={"origin": asked, "host": "host.docker.internal"})
        assert answer.headers.get("access-control-allow-origin") == allowed
        preflight = {"origin": asked, "access-control-request-method": method}
        asked_first = router.http.options(path, headers=preflight)
        assert asked_first.headers.get("access-control-allow-origin") == allowed
