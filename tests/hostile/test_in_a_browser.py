"""A hostile page in a real browser, which sends whatever headers browsers send."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, chromium, models

TRIES = """async router => {
  const text = body => ({method: "POST", mode: "no-cors", body});
  const load = JSON.stringify({model: "a"});
  const chat = JSON.stringify({model: "a", messages: [{role: "user", content: "hi"}], max_tokens: 1});
  const sent = [
    fetch(`${router}/models/load`, text(load)),
    fetch(`${router}/v1/models/load`, text(load)),
    fetch(`${router}/api/generate`, text(JSON.stringify({model: "a", keep_alive: -1}))),
    fetch(`${router}/v1/chat/completions`, text(chat)),
    fetch(`${router}/upstream/a/props`, {mode: "no-cors"}),
    fetch(`${router}/upstream/a/props`),
    fetch(`${router}/v1/models/load`, {method: "POST", headers: {"content-type": "application/json"}, body: load}),
  ];
  navigator.sendBeacon(`${router}/models/load`, load);
  for (const kind of ["img", "iframe", "script", "embed"]) {
    const element = document.createElement(kind);
    element.src = `${router}/upstream/a/props`;
    sent.push(new Promise(done => { element.onload = element.onerror = done; setTimeout(done, 2000); }));
    document.body.append(element);
  }
  const socket = new WebSocket(`${router.replace("http", "ws")}/upstream/a/props`);
  sent.push(new Promise(done => { socket.onerror = done; }));
  document.body.insertAdjacentHTML("beforeend", `<iframe name=aside></iframe>
    <form target=aside method=post enctype=text/plain action="${router}/models/load">
      <input name='{"model": "a", "x": "' value='"}'></form>`);
  document.forms[0].submit();
  return (await Promise.allSettled(sent)).map(one => one.status + (one.value?.type ?? ""));
}"""
ASKS = """async router => {
  const asked = {method: "POST", headers: {"content-type": "application/json"}, body: '{"model": "a"}'};
  const answer = await fetch(`${router}/v1/models/load`, asked);
  return [answer.status, (await answer.json()).status];
}"""


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<body>A page of some site.</body>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """A web server; its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """To which every name is this machine."""
    with chromium("--host-resolver-rules=MAP * 127.0.0.1") as browser:
        yield browser


def test_a_page_of_another_site_gets_nothing_done_and_one_of_this_machine_all(
    start: Start, tiny: Path, browser: Any, site: int
) -> None:
    router = start({"models": models(tiny, "a")})
    page = browser.new_page()
    page.goto(f"http://evil.example:{site}/")
    fates = page.evaluate(TRIES, router.url)
    assert "fulfilledopaque" in fates, "some were sent"
    assert "fulfilledcors" not in fates, "and no answer could be read"
    page.goto(f"http://evil.example:{router.url.rpartition(':')[2]}/")
    assert "does not answer to the name" in page.content()
    assert (router.status("a")["status"], router.engines) == ("off", [])
    assert done(router) == {"unknown_origin"}
    page.goto(f"http://localhost:{site}/")
    assert page.evaluate(ASKS, router.url) == [200, "success"]


def done(router: Router) -> set[str]:
    """What became of requests of the data plane."""
    return set(re.findall(r'router_requests_total\{.*status="(\w+)"', router.http.get("/metrics").text))
