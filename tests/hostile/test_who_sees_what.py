"""A key for inference shows nothing of files, processes, ports, other clients, and prompts of aliases.

Marks are planted in all of these, and every answer is searched for them. With a full key all are found, or the
search would prove nothing.
"""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from conftest import Router, Start, eventually, fake, models, starting

from router.api.llama_swap import DONE_BY_GET
from router.http.routes import is_endless

FOLDER, PROMPT, EXAMPLE, CLIENT, WORDS = (
    "of-the-folder",
    "of-the-prompt",
    "of-the-example",
    "of-annas",
    "of-the-engine",
)
KEYS = {"api_keys": ["full"], "inference_keys": ["some"]}
HELLO = [{"role": "user", "content": "hi"}]
ASKED = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/api/chat", "/api/generate")
STREAMS = ("/v1/models/status/stream", "/metrics/stream", "/models/sse", "/api/events")


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Router]:
    """With a model that runs and others that cannot; their files are in a folder with a mark."""
    folder = tmp_path_factory.mktemp(FOLDER)
    shutil.copy(tiny, folder / "tiny.gguf")
    shutil.copy(tiny, folder / "gone.gguf")
    lora = folder / "cut.gguf"
    lora.write_bytes(tiny.read_bytes()[:-1000])
    flags = ["-c", "1024", "-t", "1", "--ignore-eos"]
    entries = {
        **models(folder / "tiny.gguf", "a", flags=[*flags, "--metrics"]),
        **models(folder / "tiny.gguf", "words", flags=[*flags, "--grammar-file", str(folder / "none.gbnf")]),
        **models(folder / "gone.gguf", "gone"),
        **models(lora, "cut"),
    }
    alias = {
        "uses": "a",
        "system_prompt": f"{PROMPT} is said first",
        "messages": [{"role": "user", "content": EXAMPLE}, {"role": "assistant", "content": "yes"}],
        "defaults": {"max_tokens": 2},
    }
    with starting(tmp_path_factory.mktemp(FOLDER)) as start:
        router = start(
            {
                "api": {**KEYS, "clients": {CLIENT: {"key": "annas"}}},
                "system": {"model_load_max_retries": 0},
                "models": entries,
                "aliases": {"coder": alias, "gone-coder": {**alias, "uses": "gone"}},
            }
        )
        (folder / "gone.gguf").unlink()
        assert router.chat("a", headers=key("annas")).status_code == 200
        yield router


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


def answers(router: Router, who: str) -> Iterator[tuple[str, str]]:
    """Of all that is described, and of what goes on, in all ways to ask: where it is from, and head and body."""

    def told(name: str, answer: httpx.Response) -> tuple[str, str]:
        return name, f"{answer.headers} {answer.text}"

    document = router.http.get("/openapi.json", headers=key("full")).json()
    requests = router.http.get("/v1/requests", headers=key("full")).json()["requests"]
    request_id = requests[0]["id"] if requests else "none"
    for path, item in document["paths"].items():
        if "get" in item and not is_endless(path) and "{path}" not in path and path not in DONE_BY_GET:
            for alias in ("a", "words", "cut", "gone", "coder") if "{alias}" in path else ("",):
                asked = path.format(alias=alias, pull_id="none", request_id=request_id)
                yield told(asked, router.http.get(asked, headers=key(who)))
    for path in ("props", "slots", "lora-adapters", "models", "v1/models", "metrics", "health", ""):
        for asked in (f"/upstream/a/{path}", f"/{path}?model=a"):
            yield told(asked, router.http.get(asked, headers=key(who)))
    for alias in ("a", "words", "cut", "gone", "coder"):
        yield told(f"show {alias}", router.http.post("/api/show", json={"model": alias}, headers=key(who)))
    for path in (*ASKED, "/tokenize", "/apply-template", "/upstream/coder/apply-template", "/v1/embeddings"):
        for alias in ("coder", "words", "cut", "gone-coder"):
            for streams in (False, True):
                texts = {"messages": HELLO, "prompt": "hi", "input": "hi", "content": "hi"}
                more = {"max_tokens": 1, "max_output_tokens": 1, "stream": streams, "options": {"num_predict": 1}}
                answer = router.http.post(path, json={"model": alias, **texts, **more}, headers=key(who))
                yield told(f"{path} {alias} {streams}", answer)
    for wrong in ([{"role": "user", "content": 5}], [5], {"role": "user"}, [{"role": "user"}]):
        body: dict[str, Any] = {"model": "coder", "messages": wrong, "max_tokens": 1}
        yield told(f"wrong {wrong}", router.http.post("/v1/chat/completions", json=body, headers=key(who)))


def events(router: Router, who: str) -> Iterator[tuple[str, str]]:
    """What streams say of a model that does not load."""
    for path in STREAMS:
        with router.http.stream("GET", path, headers=key(who), timeout=20) as stream:
            lines = stream.iter_lines()
            said = [next(lines), next(lines)]
            if path not in ("/metrics/stream", "/api/events"):
                for alias in ("words", "gone"):
                    router.http.post(f"/v1/models/{alias}/reset", headers=key("full"))
                    router.http.post("/v1/models/load", json={"model": alias}, headers=key("full"))
                    for line in lines:
                        said.append(line)
                        if '"failed"' in line and f'"{alias}"' in line:
                            break
            yield path, "\n".join(said)


def seen_in(router: Router, who: str) -> dict[str, list[str]]:
    """By mark where it stands, as somebody sees it."""
    running = router.http.get("/v1/models/a/status", headers=key("full")).json()
    marks = {mark: mark for mark in (FOLDER, PROMPT, EXAMPLE, CLIENT)}
    marks |= {
        "a port": rf"(?<![\d.]){running['port']}(?![\d.])",
        "a process": rf'"pid": ?{running["pid"]}',
        "an engine's words": "error: |none.gbnf",
    }
    seen: dict[str, list[str]] = {mark: [] for mark in marks}
    for name, text in (*answers(router, who), *events(router, who)):
        for mark, pattern in marks.items():
            if re.search(pattern, text):
                seen[mark].append(name)
    return seen


def test_a_key_for_inference_sees_none_of_it_and_a_full_one_all(router: Router) -> None:
    in_full = seen_in(router, "full")
    assert all(in_full.values()), in_full
    assert "/v1/models/status/stream" in in_full[FOLDER]
    assert {mark: where for mark, where in seen_in(router, "some").items() if where} == {}
    own = {mark: where for mark, where in seen_in(router, "annas").items() if where}
    assert own == {CLIENT: ["/v1/requests", "/metrics"]}, "what oneself has asked, and what is counted for oneself"


def test_what_is_told_instead_says_enough(router: Router) -> None:
    for alias, told in (
        ("words", "'words' did not load: exited with code 2"),
        ("gone", "'gone': its file cannot be read: No such file or directory"),
        ("cut", "'cut': its file cannot be loaded: "),
    ):
        answer = router.chat(alias, headers=key("some"))
        assert answer.status_code == 503
        assert answer.json()["error"]["message"].startswith(told)
    shown = router.http.post("/api/show", json={"model": "coder"}, headers=key("some")).json()
    assert "system" not in shown
    assert re.search(r"PARAMETER num_predict +2\n", shown["modelfile"])
    props = router.http.get("/props?model=a", headers=key("some")).json()
    assert (props["model_path"], props["total_slots"]) == ("tiny.gguf", 1)
    refused = router.http.post("/apply-template", json={"model": "coder", "messages": HELLO}, headers=key("some"))
    assert (refused.status_code, "ask for 'a' instead" in refused.text) == (403, True)
    plain = router.http.post("/apply-template", json={"model": "a", "messages": HELLO}, headers=key("some"))
    assert plain.status_code == 200


def test_who_waits_is_seen_by_name_by_himself_only(start: Start, tiny: Path, tmp_path: Path) -> None:
    clients = {name: {"key": name} for name in ("anna", "bert")}
    system = {"llama_server_path": fake(tmp_path, ready="never")}
    router = start({"api": {**KEYS, "clients": clients}, "system": system, "models": models(tiny, "a")})

    def waiting(who: str) -> list[str | None]:
        stats = router.http.get("/v1/queue/stats", headers=key(who)).json()
        return sorted((wait["client"] for wait in stats["per_model"]["a"]["waiting"]), key=str)

    with ExitStack() as opened:
        for name in ("anna", "bert", "some"):
            client = opened.enter_context(socket.create_connection(router.address))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {name}\r\n"
            client.sendall(f'{head}Content-Length: 13\r\n\r\n{{"model":"a"}}'.encode())
        eventually(lambda: len(waiting("full")) == 3)
        assert waiting("full") == [None, "anna", "bert"]
        assert waiting("anna") == [None, None, "anna"]
        assert waiting("some") == [None, None, None]
