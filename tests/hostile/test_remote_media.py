"""Keys for inference, and what engines would fetch for them: an image is sent, not named by its address.

The engine is one that writes down what it is asked: what is refused never reaches it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, fake, models

ADDRESS = "http://127.0.0.1:1/secret.png"
DATA = "data:image/png;base64,iVBORw0KGgo="
API = {"api_keys": ["full"], "inference_keys": ["infers"], "clients": {"somebody": {"key": "own"}}}
LONG = {"type": "text", "text": "All work and no play. " * 60_000}


def chat(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"model": "a", "messages": [{"role": "user", "content": list(parts)}], "max_tokens": 5, "stream": False}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def source(url: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "url", "url": url}}


def shown(url: str) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url}


RESULT = {"type": "tool_result", "tool_use_id": "1", "content": [source(ADDRESS)]}
HIDDEN = json.dumps(chat(image(ADDRESS))).replace("_url", "\\u005furl").replace("http", "\\u0068ttp")
LONG_AND_HIDDEN = json.dumps(chat(image(ADDRESS + "?" * 5000), LONG)).replace("http:", "\\u0068ttp:")
REFUSED: dict[str, tuple[str, Any]] = {
    "an image": ("/v1/chat/completions", chat(image(ADDRESS))),
    "an image of https": ("/v1/chat/completions", chat(image("https://example.com/a.png"))),
    "a file": ("/v1/chat/completions", chat(image("file:///etc/passwd"))),
    "audio": ("/v1/chat/completions", chat({"type": "input_audio", "input_audio": {"data": ADDRESS}})),
    "audio by its other key": (
        "/v1/chat/completions",
        chat({"type": "input_audio", "input_audio": {"url": ADDRESS}}),
    ),
    "video": ("/v1/chat/completions", chat({"type": "video_url", "video_url": {"url": ADDRESS}})),
    "video by its other key": (
        "/v1/chat/completions",
        chat({"type": "input_video", "input_video": {"data": ADDRESS}}),
    ),
    "an image that is hidden": ("/v1/chat/completions", HIDDEN),
    "one in a large body": ("/v1/chat/completions", chat(LONG, image(ADDRESS))),
    "one that is hidden in a large body": ("/v1/chat/completions", LONG_AND_HIDDEN),
    "one for the template": ("/apply-template", chat(image(ADDRESS))),
    "one to be counted": ("/v1/chat/completions/input_tokens", chat(image(ADDRESS))),
    "one to be embedded": ("/v1/embeddings", {"model": "a", "input": [{"content": [image(ADDRESS)]}]}),
    "one of a message": ("/v1/messages", chat(source(ADDRESS))),
    "one of a tool": ("/v1/messages", chat(RESULT)),
    "one of a tool in a large body": ("/v1/messages", chat(LONG, RESULT)),
    "one of a tool beside one that is called": ("/v1/messages", chat({**RESULT, "input": {}})),
    "one of a message to be counted": ("/v1/messages/count_tokens", chat(source(ADDRESS))),
    "one of a response": (
        "/v1/responses",
        {"model": "a", "input": [{"role": "user", "content": [shown(ADDRESS)]}]},
    ),
    "one of a response that looks like a call": (
        "/v1/responses",
        {"model": "a", "type": "tool_use", "input": [{"role": "user", "content": [shown(ADDRESS)]}]},
    ),
    "one of Ollama's": (
        "/api/chat",
        {"model": "a", "stream": False, "messages": [{"role": "user", "content": "", "images": [ADDRESS]}]},
    ),
}
CALL = {"type": "tool_use", "id": "1", "name": "look", "input": {"image_url": ADDRESS, "source": {"url": ADDRESS}}}
PASSED: dict[str, tuple[str, Any]] = {
    "an image that is sent": ("/v1/chat/completions", chat(image(DATA))),
    "one in base64 alone": ("/v1/chat/completions", chat(image("iVBORw0KGgo="))),
    "one in a large body": ("/v1/chat/completions", chat(image(DATA + "A" * 1_500_000))),
    "audio that is sent": (
        "/v1/chat/completions",
        chat({"type": "input_audio", "input_audio": {"data": "UklGRg=="}}),
    ),
    "text about addresses": ("/v1/chat/completions", chat({"type": "text", "text": f'"image_url": {ADDRESS}'})),
    "a tool that takes one": (
        "/v1/chat/completions",
        {
            **chat({"type": "text", "text": "hi"}),
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"image_url": {"type": "string"}}}}
            ],
        },
    ),
    "a tool that was called with one": ("/v1/messages", chat(CALL)),
}


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path, notes: Path) -> Router:
    system = {"llama_server_path": fake(notes.parent, notes=str(notes))}
    return start_shared({"api": API, "system": system, "models": models(tiny, "a")})


def asked(router: Router, key: str, path: str, body: Any) -> Any:
    content = body if isinstance(body, str) else json.dumps(body)
    return router.http.post(path, content=content, headers={"authorization": f"Bearer {key}"})


@pytest.mark.parametrize("key", ["infers", "own"])
@pytest.mark.parametrize("kind", REFUSED)
def test_an_address_is_not_for_every_key(router: Router, notes: Path, kind: str, key: str) -> None:
    notes.write_bytes(b"")
    path, body = REFUSED[kind]
    answer = asked(router, key, path, body)
    assert answer.status_code == 400, answer.text
    assert notes.read_bytes() == b""
    if path.startswith("/api/"):
        assert "not base64" in answer.json()["error"]
    else:
        error = answer.json()["error"]
        assert "api.remote_media" in error["message"]
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", PASSED)
def test_what_is_sent_passes(router: Router, kind: str) -> None:
    answer = asked(router, "infers", *PASSED[kind])
    assert answer.status_code == 200, answer.text


def test_an_address_is_for_who_may_manage(router: Router) -> None:
    assert asked(router, "full", *REFUSED["an image"]).status_code == 200


def test_it_is_for_all_where_that_is_configured(start: Start, tiny: Path, tmp_path: Path) -> None:
    system = {"llama_server_path": fake(tmp_path)}
    router = start({"api": {**API, "remote_media": True}, "system": system, "models": models(tiny, "a")})
    assert asked(router, "infers", *REFUSED["an image"]).status_code == 200
