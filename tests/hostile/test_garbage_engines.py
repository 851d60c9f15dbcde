"""Engines that send garbage: every client gets an end within seconds, in the format of its API.

Whatever an engine sends, on every route, streamed or not: broken answers never count as served, the router makes
no mistake, its memory does not grow, and the next honest request is answered.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from conftest import Router, Start, eventually, models
from garbage import KINDS

_ENGINE = Path(__file__).with_name("garbage_engine.py")
_ENOUGH = 8 << 20
"""Bytes of an answer that does not end, after which its client leaves."""
_MOST_MIB = 160
"""By which the router may grow: a few answers of 16 MiB each at a time, and what Python keeps of them."""


@dataclass(frozen=True)
class Route:
    path: str
    reads_documents: bool = False
    reads_events: bool = False
    """Its answers are read on their way; else their bytes pass."""
    asks: str = "messages"
    """The field of the text."""
    brief: tuple[str, Any] = ("max_tokens", 5)
    """How its API says that a few tokens are enough: engines that never end by themselves go by it, too."""
    also: tuple[tuple[str, Any], ...] = ()

    def body(self, text: str, *, streams: bool) -> dict[str, Any]:
        said: Any = [{"role": "user", "content": text}] if self.asks == "messages" else text
        return {"model": "a", self.asks: said, "stream": streams, **dict((self.brief, *self.also))}


_OLLAMAS_BRIEF = ("options", {"num_predict": 5})
ROUTES = {
    "chat": Route("/v1/chat/completions"),
    "chat of two": Route("/v1/chat/completions", reads_documents=True, also=(("n", 2),)),
    "completion": Route("/v1/completions", asks="prompt"),
    "message": Route("/v1/messages"),
    "message as chat": Route("/v1/messages", reads_documents=True, reads_events=True, also=(("seed", 1),)),
    "response": Route(
        "/v1/responses", reads_documents=True, reads_events=True, asks="input", brief=("max_output_tokens", 5)
    ),
    "Ollama's chat": Route("/api/chat", reads_documents=True, reads_events=True, brief=_OLLAMAS_BRIEF),
    "Ollama's completion": Route(
        "/api/generate",
        reads_documents=True,
        reads_events=True,
        asks="prompt",
        brief=_OLLAMAS_BRIEF,
        also=(("raw", True),),
    ),
}


WAYS = {
    f"{name} {'streamed' if streams else 'whole'}".replace(" ", "-").replace("'", ""): (route, streams)
    for name, route in ROUTES.items()
    for streams in (False, True)
}
"""Every route, streamed or not. Each has a client of its own, by which its requests are told from the others."""
FULL_KEY = "full"
CLIENTS = {"api_keys": [FULL_KEY], "clients": {way: {"key": f"key-of-{way}"} for way in WAYS}}
_COUNTED = re.compile(r'router_client_requests_total\{client="([^"]+)",status="([^"]+)"\} (\d+)')


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    launch = tmp_path_factory.mktemp("garbage") / "garbage-llama-server"
    launch.write_text(f'#!/bin/sh\nexec {sys.executable} {_ENGINE} "$@"\n')
    launch.chmod(0o755)
    router = start_shared(
        {
            "api": CLIENTS,
            "system": {
                "llama_server_path": str(launch),
                "request_timeout_sec": 0.5,
                "answer_timeout_sec": 1,
            },
            "models": models(tiny, "a", flags=["-np", "16"]),
        }
    )
    router.http.headers["x-api-key"] = FULL_KEY
    return router


@pytest.fixture(autouse=True)
def _grows_by_little(router: Router) -> Iterator[None]:
    router.chat("a")
    process = psutil.Process(router.process.pid)
    before = process.memory_info().rss
    yield
    assert process.memory_info().rss - before < _MOST_MIB << 20


@dataclass
class Answer:
    """As its client saw it."""

    status: int
    body: bytes
    whole: bool
    took_sec: float
    left: bool = False


def ask(http: httpx.Client, way: str, kind: str) -> Answer:
    route, streams = WAYS[way]
    since = time.monotonic()
    status, body = 0, bytearray()
    whole = left = False
    asked = route.body(f"kind:{kind};", streams=streams)
    with contextlib.suppress(httpx.RemoteProtocolError):
        headers = {"x-api-key": f"key-of-{way}"}
        with http.stream("POST", route.path, json=asked, headers=headers) as answer:
            status = answer.status_code
            for part in answer.iter_raw():
                body += part
                if len(body) > _ENOUGH:
                    left = True
                    break
            whole = not left
    return Answer(status, bytes(body), whole, time.monotonic() - since, left)


def outcomes(router: Router) -> Counter[tuple[str, str]]:
    """How many requests of each of `WAYS` have ended how, since the start."""
    text = router.http.get("/metrics").text
    return Counter({(way, end): int(count) for way, end, count in _COUNTED.findall(text)})


def ended(router: Router, before: Counter[tuple[str, str]]) -> dict[str, str]:
    """How one request of each of `WAYS` has ended since then."""
    eventually(lambda: (outcomes(router) - before).total() >= len(WAYS))
    ends = dict((outcomes(router) - before).keys())
    assert ends.keys() == WAYS.keys()
    return ends


def says_error(answer: Answer, route: Route) -> bool:
    """Whether its client gets to know that something went wrong."""
    if not answer.whole or answer.status >= 400:
        return True
    if route.path.startswith("/api/"):
        return "error" in json.loads(answer.body.splitlines()[-1])
    return b"error" in answer.body


@pytest.mark.parametrize("kind", KINDS)
def test_every_client_gets_an_end(router: Router, kind: str) -> None:
    before = outcomes(router)
    with ThreadPoolExecutor(len(WAYS)) as pool:
        answers = {way: pool.submit(ask, router.http, way, kind) for way in WAYS}
        said = {way: answer.result() for way, answer in answers.items()}
    ends = ended(router, before)
    for way, (route, streams) in WAYS.items():
        reads = route.reads_events if streams else route.reads_documents
        answer, outcome = said[way], ends[way]
        told = f"{way}: {outcome}, {answer.status} {answer.body[:300]!r}"
        assert answer.took_sec < 15, told
        assert outcome != "internal_error", told
        end = KINDS[kind].end
        if end == "endless" and not (route.reads_documents or route.reads_events):
            assert answer.left, told
            assert outcome == "cancelled", told
        elif end in ("broken", "endless") or (end == "read" and reads):
            assert outcome != "served", told
            assert says_error(answer, route), told
        elif end in ("fine", "read"):
            assert (outcome, answer.status, answer.whole) == ("served", 200, True), told
        elif outcome != "served":
            assert says_error(answer, route), told
    assert router.chat("a").json()["choices"][0]["message"]["content"] == "ok"
    assert "Traceback" not in router.log
    assert router.http.get("/v1/queue/stats").json()["summary"]["total_processing"] == 0
