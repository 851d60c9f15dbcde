"""Requests one by one: those in flight, those that have ended, what happened to each, and cancelling them."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from conftest import Router, Start, eventually, fake, models

from router.api.request_timeline import Story, timeline
from router.config.schema import Capture
from router.dataplane.answer import Answer
from router.dataplane.capture import Captures, RecordedWire, Recording, redacted
from router.kv.keeper import Source
from router.observe.events import Events, RequestDone
from router.observe.recent import RecentRequests

FULL, APP, OTHER = ({"authorization": f"Bearer {key}"} for key in ("full", "app", "other"))
KEYS = {
    "api_keys": ["full"],
    "inference_keys": ["unnamed"],
    "clients": {"app": {"key": "app"}, "other": {"key": "other"}},
}
FIELDS = {
    *("id", "state", "model", "client", "peer", "route", "priority", "outcome", "status", "reason", "why"),
    *(
        "arrived_at",
        "ended_at",
        "waited_sec",
        "load_sec",
        "ttft_sec",
        "total_sec",
        "prompt_tokens",
        "cached_tokens",
    ),
    *("output_tokens", "kv", "engine", "streamed", "request_bytes", "answer_bytes", "retries", "position"),
    *("expected_wait_sec", "number"),
}


def listed(router: Router, headers: dict[str, str] | None = None, **query: Any) -> list[dict[str, Any]]:
    answer = router.http.get("/v1/requests", params=query, headers=headers)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["requests"]
    return rows


def the(router: Router, request_id: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer = router.http.get(f"/v1/requests/{request_id}", headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events_of(row: dict[str, Any]) -> list[str]:
    return [each["event"] for each in row["timeline"]]


# --- what has ended -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(start_shared: Start, tiny: Path) -> Router:
    """A real engine, and clients with keys."""
    return start_shared({"api": KEYS, "models": models(tiny, "a", "family/b:q4")})


def test_a_request_that_was_served_has_its_figures_and_its_story(locked: Router) -> None:
    locked.chat(
        "family/b:q4", max_tokens=5, headers={**APP, "x-request-id": "mine/1?#", "x-request-priority": "low"}
    )
    row = the(locked, "mine%2F1%3F%23", FULL)
    assert row.keys() == {*FIELDS, "timeline", "capture"}
    assert (row["state"], row["model"], row["client"], row["peer"]) == ("done", "family/b:q4", "app", "127.0.0.1")
    assert (row["route"], row["priority"]) == ("/v1/chat/completions", "low")
    assert (row["outcome"], row["status"], row["reason"], row["retries"]) == ("served", 200, None, 0)
    assert (row["output_tokens"], row["cached_tokens"]) == (5, 0)
    assert row["prompt_tokens"] > 0
    assert 0 < row["load_sec"] <= row["waited_sec"] <= row["ttft_sec"] <= row["total_sec"]
    assert row["arrived_at"] < row["ended_at"]
    assert row["engine"].startswith("family/b:q4#")
    assert row["capture"] is None
    events = events_of(row)
    assert [
        each for each in events if each in ("queued", "loading", "ready", "granted", "first_token", "done")
    ] == [*("queued", "loading", "ready", "granted", "first_token", "done")]
    assert [each["at"] for each in row["timeline"]] == sorted(each["at"] for each in row["timeline"])
    granted = next(each for each in row["timeline"] if each["event"] == "granted")["detail"]
    assert row["engine"] in granted
    assert "while the model was loaded" in granted


def test_refused_requests_are_listed_like_all_others(locked: Router) -> None:
    assert (
        locked.chat("a", headers={"authorization": "Bearer wrong", "x-request-id": "stranger"}).status_code == 401
    )
    assert locked.chat("none", headers={**APP, "x-request-id": "lost"}).status_code == 404
    stranger, lost = the(locked, "stranger", FULL), the(locked, "lost", FULL)
    assert (stranger["outcome"], stranger["status"], stranger["client"]) == ("invalid_api_key", 401, None)
    assert (stranger["peer"], stranger["model"], stranger["priority"]) == ("127.0.0.1", None, None)
    assert (lost["outcome"], lost["client"], lost["engine"]) == ("model_not_found", "app", None)
    assert "none" in lost["reason"]
    assert events_of(lost) == ["received", "done"]


def test_a_client_sees_its_own_requests_only(locked: Router) -> None:
    for headers, name in (
        (APP, "of-app"),
        (OTHER, "of-other"),
        ({"authorization": "Bearer unnamed"}, "of-nobody"),
    ):
        locked.chat("a", headers={**headers, "x-request-id": name})
        assert the(locked, name, headers)["id"] == name
    assert {row["client"] for row in listed(locked, APP)} == {"app"}
    for name in ("of-other", "of-nobody", "stranger"):
        for method in ("GET", "DELETE"):
            refused = locked.http.request(method, f"/v1/requests/{name}", headers=APP)
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "request_not_found"), name
    assert {"of-app", "of-other", "of-nobody"} <= {row["id"] for row in listed(locked, FULL)}
    assert locked.http.get("/v1/requests").status_code == 401


def test_requests_are_found_by_what_is_known_of_them(locked: Router) -> None:
    locked.chat("family/b:q4:latest", headers={**OTHER, "x-request-id": "twice"})
    locked.chat("a", headers={**OTHER, "x-request-id": "twice"})
    assert the(locked, "twice", FULL)["model"] == "a"  # the last one with this id
    assert [row["model"] for row in listed(locked, FULL, client="other")][:2] == ["a", "family/b:q4"]
    assert {row["model"] for row in listed(locked, FULL, model="family/b:q4:latest")} == {"family/b:q4"}
    assert {row["outcome"] for row in listed(locked, FULL, outcome="invalid_api_key")} == {"invalid_api_key"}
    assert len(listed(locked, FULL, limit=2)) == 2
    assert listed(locked, FULL, state="live") == listed(locked, FULL, state="queued") == []
    for query in ({"limit": 0}, {"state": "odd"}, {"since": "yesterday"}):
        assert locked.http.get("/v1/requests", params=query, headers=FULL).status_code == 400, query


def test_who_asks_again_is_told_what_is_new(locked: Router) -> None:
    first = locked.http.get("/v1/requests", headers=FULL).json()
    assert (first["since"], first["kept"], first["capture"]) == (None, 1000, 0)
    for since in (first["cursor"], first["requests"][0]["ended_at"]):
        again = locked.http.get("/v1/requests", params={"since": since}, headers=FULL)
        assert again.json()["requests"] == [], since
        assert len(again.content) < 250
    locked.chat("a", headers={**APP, "x-request-id": "new"})
    news = locked.http.get("/v1/requests", params={"since": first["cursor"]}, headers=FULL).json()
    assert ([row["id"] for row in news["requests"]], news["since"]) == (["new"], first["cursor"])
    assert news["total"] == first["total"] + 1 == news["requests"][0]["number"]
    of_another_run = locked.http.get("/v1/requests", params={"since": "0-1"}, headers=FULL).json()
    assert of_another_run["since"] is None
    assert len(of_another_run["requests"]) == min(100, news["total"])


# --- those in flight ------------------------------------------------------------------------------------------


class Asked(threading.Thread):
    """A request that somebody waits for."""

    def __init__(self, router: Router, path: str, body: dict[str, Any], **headers: str) -> None:
        super().__init__(daemon=True)
        self.status = 0
        self.headers: Any = {}
        self.text = ""
        self._ask = router, path, body, headers
        self.start()

    def run(self) -> None:
        router, path, body, headers = self._ask
        with router.http.stream("POST", path, json=body, headers=headers, timeout=60) as answer:
            self.text = answer.read().decode()
            self.status, self.headers = answer.status_code, answer.headers

    def ended(self) -> Asked:
        self.join(20)
        assert not self.is_alive()
        return self


def until_state(router: Router, request_id: str, state: str) -> dict[str, Any]:
    eventually(lambda: [row["state"] for row in listed(router) if row["id"] == request_id][:1] == [state])
    return the(router, request_id)


def cancelled(router: Router, request_id: str) -> dict[str, Any]:
    answer = router.http.delete(f"/v1/requests/{request_id}")
    assert answer.status_code == 200, answer.text
    row: dict[str, Any] = answer.json()
    assert (row["state"], row["outcome"], row["id"]) == ("done", "cancelled", request_id)
    assert "An operator cancelled the request" in row["reason"]
    assert (row["prompt_tokens"], row["cached_tokens"]) == (None, None)  # engines tell them at the end
    again = router.http.delete(f"/v1/requests/{request_id}")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "request_ended")
    return row


PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    "/api/chat": {"messages": [{"role": "user", "content": "hi"}]},
}


def error_in(path: str, text: str) -> str:
    """The message of the error that ends an answer in the API of its path."""
    if path == "/api/chat":
        message: str = json.loads(text.strip().splitlines()[-1])["error"]
        return message
    data = [line.removeprefix("data:") for line in text.splitlines() if line.startswith(("data:", "{"))]
    return str(json.loads([each for each in data if "[DONE]" not in each][-1])["error"]["message"])


@pytest.fixture(scope="module")
def streaming(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    """Streams end when somebody ends them."""
    engine = fake(tmp_path_factory.mktemp("streaming"), chunks="100000", chunk_sec="0.02")
    return start_shared({"system": {"llama_server_path": engine}, "models": models(tiny, "a")})


@pytest.fixture(scope="module")
def silent(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    """The engine never answers."""
    engine = fake(tmp_path_factory.mktemp("silent"), answer_sec="1000")
    return start_shared({"system": {"llama_server_path": engine}, "models": models(tiny, "a")})


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_is_cancelled_and_ends_with_an_error(streaming: Router, path: str) -> None:
    name = f"stream{path.replace('/', '-')}"
    asked = Asked(streaming, path, {"model": "a", "stream": True, **PATHS[path]}, **{"x-request-id": name})
    until_state(streaming, name, "streaming")
    eventually(lambda: the(streaming, name)["output_tokens"] > 2 or path == "/v1/messages")
    row = the(streaming, name)
    assert row["answer_bytes"] > 0
    assert row["ttft_sec"] < row["total_sec"]
    assert (row["outcome"], row["ended_at"], row["streamed"]) == (None, None, True)
    assert events_of(row)[-2:] == ["granted", "first_token"]
    assert cancelled(streaming, name)["status"] == 200
    assert "An operator cancelled" in error_in(path, asked.ended().text)
    assert streaming.status("a")["in_flight"] == 0


@pytest.mark.parametrize("path", PATHS)
def test_who_waits_for_an_answer_or_for_a_slot_is_told(silent: Router, path: str) -> None:
    names = [f"{state}{path.replace('/', '-')}" for state in ("first", "second")]
    body = {"model": "a", "stream": False, **PATHS[path]}
    first, second = (Asked(silent, path, body, **{"x-request-id": name}) for name in names)
    eventually(lambda: sorted(row["state"] for row in listed(silent, state="live")) == ["granted", "queued"])
    by_state = {row["state"]: row for row in listed(silent)}
    assert by_state["queued"]["why"].endswith("the only slot of a is in use")
    assert by_state["queued"]["position"] > 0
    assert by_state["granted"]["position"] is None
    for state, asked in (("queued", second), ("granted", first)):
        asked = first if by_state[state]["id"] == names[0] else second
        row = cancelled(silent, by_state[state]["id"])
        assert row["status"] == asked.ended().status == 499
        assert asked.headers["x-should-retry"] == "false"
        assert "An operator cancelled" in error_in(path, asked.text)
    assert silent.status("a")["in_flight"] == 0


def test_clients_libraries_take_it_for_an_error_and_do_not_repeat_it(silent: Router) -> None:
    """They repeat 408, 409, 429 and 5xx, and so would have the model busy again at once."""
    openai_client = openai.OpenAI(base_url=f"{silent.url}/v1", api_key="none", max_retries=2)
    anthropic_client = anthropic.Anthropic(base_url=silent.url, api_key="none", max_retries=2)
    message: Any = {"role": "user", "content": "hi"}
    asks: tuple[Callable[[], object], ...] = (
        lambda: openai_client.chat.completions.create(model="a", messages=[message]),
        lambda: anthropic_client.messages.create(model="a", messages=[message], max_tokens=9),
    )
    raised: list[Any] = []

    def attempt(ask: Callable[[], object]) -> None:
        try:
            ask()
        except Exception as error:
            raised.append(error)

    for ask in asks:
        before = silent.http.get("/v1/requests").json()["total"]
        client = threading.Thread(target=attempt, args=(ask,), daemon=True)
        client.start()
        eventually(lambda: len(listed(silent, state="granted")) == 1)
        cancelled(silent, listed(silent, state="granted")[0]["id"])
        client.join(20)
        assert silent.http.get("/v1/requests").json()["total"] == before + 1
    assert [error.status_code for error in raised] == [499, 499]
    assert all("An operator cancelled the request" in str(error) for error in raised)


def test_a_body_that_is_still_sent_is_cancelled(silent: Router) -> None:
    with socket.create_connection(silent.address) as client:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-request-id: half\r\ncontent-length: 100"
        client.sendall(f'{head}\r\n\r\n{{"model"'.encode())
        row = until_state(silent, "half", "receiving")
        assert (row["model"], row["request_bytes"], events_of(row)) == (None, 8, ["received"])
        cancelled(silent, "half")
        assert client.recv(1000).startswith(b"HTTP/1.1 499 Client Closed Request\r\n")
        client.sendall(
            b" " * 92 + b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n"
        )  # the connection is as good as before
        assert b"200 OK" in client.recv(1000)


def test_who_waits_for_a_load_is_told(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"system": {"llama_server_path": fake(tmp_path, ready="never")}, "models": models(tiny, "a")})
    asked = Asked(router, "/v1/completions", {"model": "a", "prompt": "hi"}, **{"x-request-id": "early"})
    until_state(router, "early", "queued")
    router.until("a", "loading")
    eventually(lambda: "waiting" in events_of(the(router, "early")))
    row = the(router, "early")
    assert row["why"].startswith("a is loading")
    assert [each["detail"] for each in row["timeline"] if each["event"] == "waiting"][-1].startswith(
        "a is loading"
    )
    assert {"queued", "loading"} <= set(events_of(row))
    cancelled(router, "early")
    assert asked.ended().status == 499
    after = the(router, "early")
    assert events_of(after)[-1] == "done"
    assert "waiting" in events_of(after)


def test_on_a_real_engine_the_slot_is_free_at_once(start: Start, middling: Path) -> None:
    """A second request waits for the slot of the first, and is served as soon as that is cancelled."""
    router = start({"models": models(middling, "a", flags=["-c", "4096", "-t", "1", "--ignore-eos"])})
    body = {"model": "a", "prompt": "hi", "max_tokens": 4000, "stream": True}
    first = Asked(router, "/v1/completions", body, **{"x-request-id": "long"})
    until_state(router, "long", "streaming")
    second = Asked(router, "/v1/completions", {**body, "max_tokens": 1}, **{"x-request-id": "short"})
    third = Asked(router, "/v1/completions", {**body, "max_tokens": 1}, **{"x-request-id": "never"})
    until_state(router, "short", "queued")
    until_state(router, "never", "queued")
    cancelled(router, "never")
    assert (third.ended().status, "499" in third.text) == (499, False)
    done = cancelled(router, "long")
    assert done["output_tokens"] > 0
    assert "An operator cancelled" in error_in("/v1/completions", first.ended().text)
    assert second.ended().status == 200
    outcomes = router.http.get("/v1/telemetry/summary").json()["windows"]["1m"]["outcomes"]
    assert outcomes == {"served": 1, "cancelled": 2}


def test_a_client_cancels_its_own_requests_only(start: Start, tiny: Path, tmp_path: Path) -> None:
    engine = fake(tmp_path, answer_sec="1000")
    router = start({"api": KEYS, "system": {"llama_server_path": engine}, "models": models(tiny, "a")})
    asked = Asked(router, "/v1/completions", {"model": "a", "prompt": ""}, **{**APP, "x-request-id": "its"})
    eventually(lambda: [row["state"] for row in listed(router, APP)] == ["granted"])
    assert listed(router, OTHER) == []
    assert router.http.delete("/v1/requests/its", headers=OTHER).status_code == 404
    assert router.http.delete("/v1/requests/its", headers=APP).status_code == 200
    assert "Its client cancelled" in asked.ended().text


def test_a_second_engine_is_in_the_story(start: Start, tiny: Path, tmp_path: Path) -> None:
    engine = fake(tmp_path, die=f"once {tmp_path / 'died'}")
    router = start({"system": {"llama_server_path": engine}, "models": models(tiny, "a")})
    assert router.chat("a", headers={"x-request-id": "again"}).status_code == 200
    row = the(router, "again")
    told = [(each["event"], each["detail"]) for each in row["timeline"] if each["event"] in ("granted", "retried")]
    assert [event for event, _ in told] == ["granted", "retried", "granted"]
    assert told[0][1] == "a#1"
    assert told[1][1].startswith("a#1 failed: ")
    assert (row["retries"], row["engine"]) == (1, "a#2")


def test_the_story_names_those_that_made_room(start: Start, tiny: Path, tmp_path: Path) -> None:
    engine = fake(tmp_path, chunks="100000", chunk_sec="0.1")
    system = {"max_concurrent_models": 1, "llama_server_path": engine}
    router = start({"system": system, "models": models(tiny, "a", "b")})
    body = {"model": "a", "prompt": "", "stream": True}
    first = Asked(router, "/v1/completions", body, **{"x-request-id": "ahead"})
    until_state(router, "ahead", "streaming")
    patient = {"x-request-id": "behind", "x-request-priority": "low"}  # reasons are looked at every second only
    second = Asked(router, "/v1/completions", {"model": "b", "prompt": ""}, **patient)
    until_state(router, "behind", "queued")

    def waits() -> list[str]:
        return [each["detail"] for each in the(router, "behind")["timeline"] if each["event"] == "waiting"]

    eventually(lambda: any("until a can be unloaded" in each for each in waits()))
    cancelled(router, "ahead")
    first.ended()
    assert second.ended().status == 200
    row = the(router, "behind")
    assert any("until a can be unloaded" in each for each in waits()), row["timeline"]
    by_model = [(each["model"], each["event"]) for each in row["timeline"] if "model" in each]
    assert by_model.index(("a", "off")) < by_model.index(("b", "loading")) < by_model.index(("b", "ready"))


# --- how many are kept ----------------------------------------------------------------------------------------


def done(name: str, priority: str = "normal") -> RequestDone:
    return RequestDone(name, "a" if priority else "", "/x", priority, "served", 200, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Source.SLOT, "was in the engine's slot"),
        (Source.RAM, "was in the engine's own cache in RAM"),
        (Source.DISK, "came from disk"),
        (Source.NONE, "nothing of its prompt had been computed before"),
    ],
)
def test_the_story_tells_where_the_beginning_of_a_prompt_came_from(source: Source, words: str) -> None:
    story = Story("a", arrived_at=1.0, priority="normal", engine_id=1, granted_at=1.0, kv=source)
    (granted,) = [each["detail"] for each in timeline(story, [], [], until=2.0) if each["event"] == "granted"]
    assert granted.endswith(words)


def test_the_last_requests_are_kept_and_wrong_keys_do_not_push_them_out() -> None:
    async def story() -> None:
        events, limit = Events(), 8
        recent = RecentRequests(events, lambda: limit)

        def kept() -> list[str]:
            return [each.request_id for _, each in recent.newest_first()]

        for n in range(10):
            events.done(done(f"s{n}"))
        assert kept() == [f"s{n}" for n in range(9, 1, -1)]
        for n in range(100):
            events.done(done(f"r{n}", ""))
        assert kept() == ["r99", "r98", "s9", "s8", "s7", "s6", "s5", "s4"]
        assert [number for number, _ in recent.newest_first()][:3] == [110, 109, 10]
        limit = 2
        assert kept() == ["s9", "s8"]
        limit = 0
        assert (kept(), recent.total) == ([], 110)

    asyncio.run(story())


def test_how_many_are_kept_and_captured_is_changed_by_a_reload(start: Start, tiny: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"models": models(tiny, "a"), "api": KEYS, "system": {"requests_kept": 2}}
    router = start(config)

    def reload(**system: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, "system": system}))
        assert router.http.post("/v1/config/reload", headers=FULL).json()["needs_restart"] == []

    def chat(name: str) -> dict[str, Any]:
        assert (
            router.chat("a", content=f"text of {name}", headers={**APP, "x-request-id": name}).status_code == 200
        )
        return the(router, name, FULL)

    for name in ("one", "two", "three"):
        assert chat(name)["capture"] is None
    assert [row["id"] for row in listed(router, FULL)] == ["three", "two"]
    reload(requests_kept=3, capture={"requests": 1})
    assert the(router, "three", FULL)["capture"] is None  # it ended before
    capture = chat("four")["capture"]
    assert json.loads(capture["request"])["messages"][0]["content"] == "text of four"
    assert json.loads(capture["answer"])["choices"][0]["message"]["role"] == "assistant"
    assert the(router, "four", APP)["capture"] is None  # bodies are for operators
    assert router.http.get("/v1/requests", headers=APP).json()["capture"] == 1  # which they are told
    assert [row["id"] for row in listed(router, FULL)] == ["four", "three", "two"]
    chat("five")
    assert the(router, "four", FULL)["capture"] is None
    reload(requests_kept=0)
    assert (listed(router, FULL), router.http.get("/v1/requests/five", headers=FULL).status_code) == ([], 404)
    reload(capture={"requests": 1})
    assert router.http.get("/v1/requests/five", headers=FULL).status_code == 404
    assert "text of" not in router.log


# --- what is captured -----------------------------------------------------------------------------------------


class PlayedWire:
    """A connection."""

    peer, default_lines = "127.0.0.1", b""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def answered(self, *, keep_alive: bool) -> None: ...

    def abort(self) -> None: ...

    def invite_body(self) -> None: ...


@contextmanager
def recorded(question: bytes) -> Iterator[tuple[Answer, Recording]]:
    wire = PlayedWire()
    recorded_wire = RecordedWire(wire)
    recorded_wire.recording.note_question(question)
    yield Answer(recorded_wire, keep_alive=True, http_1_0=False), recorded_wire.recording
    assert wire.written


def test_a_stream_is_captured_without_its_framing() -> None:
    with recorded(b'{"model": "a"}') as (answer, recording):
        answer.start(200, b"content-type: text/event-stream\r\n")
        answer.write(b'data: {"content": "sk-abcdefghijklmnopqrstuv"}\n\n')
        answer.end(b"data: [DONE]\n\n")
        text = 'data: {"content": "[redacted]"}\n\ndata: [DONE]\n\n'
        assert recording.captured() == ('{"model": "a"}', text)


def test_pictures_are_shortened_and_long_bodies_cut() -> None:
    picture = base64.b64encode(bytes(range(256)) * 4000).decode()
    body = json.dumps({"url": f"data:image/png;base64,{picture}", "id": "a" * 300, "text": "what is this?"})
    with recorded(body.encode()) as (answer, recording):
        answer.whole(200, b"", b"y " * (1 << 20))
        question, said = recording.captured()
    assert question.startswith('{"url": "data:image/png;base64,')
    assert "bytes of base64]" in question
    assert question.endswith(f'"id": "{"a" * 300}", "text": "what is this?"}}')
    assert len(question) < 600
    assert said.endswith("[... the rest is left out ...]")
    assert recording.size < 300 << 10
    with recorded(b"begin " + b"word " * (1 << 20) + b" end") as (answer, recording):
        answer.whole(200, b"", b"\xff\x00" * 100)
        question, said = recording.captured()
    assert question.startswith("begin word")
    assert "bytes are left out" in question
    assert question.endswith("word  end")
    assert said == "[200 bytes that are not text]"


def test_captures_are_bounded_by_number_and_by_size() -> None:
    captures = Captures(Capture(requests=3, max_mb=1))
    for n in range(10):
        with recorded(b"word " * 10) as (answer, _):
            answer.whole(200, b"", b"")
            captures.keep(f"r{n}", answer)
    assert [n for n in range(10) if captures.of(f"r{n}")] == [7, 8, 9]
    captures.set(Capture(requests=1000, max_mb=1))
    for n in range(10, 30):
        with recorded(b"word " * (50 << 10)) as (answer, _):
            answer.whole(200, b"", b"")
            captures.keep(f"r{n}", answer)
    assert [n for n in range(30) if captures.of(f"r{n}")] == [26, 27, 28, 29]
    captures.set(Capture())
    assert (captures.enabled, [n for n in range(30) if captures.of(f"r{n}")]) == (False, [])


def test_what_is_captured_keeps_no_connection() -> None:
    captures = Captures(Capture(requests=3))
    wire = PlayedWire()
    answer = Answer(RecordedWire(wire), keep_alive=True, http_1_0=False)
    answer.whole(200, b"", b"yes")
    captures.keep("r", answer)
    connection = weakref.ref(wire)
    del answer, wire
    assert connection() is None
    recording = captures.of("r")
    assert recording is not None
    assert recording.captured().answer == "yes"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"api_key": "abc\\"def", "model": "a"}', '{"api_key": "[redacted]", "model": "a"}'),
        ('{"OPENAI_API_KEY":"x1"}', '{"OPENAI_API_KEY":"[redacted]"}'),
        ('{"arguments": "{\\"password\\": \\"hunter2\\", \\"n\\": 1}"}',) * 2,
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer [redacted]"),
        ("authorization: basic YWJj", "authorization: basic [redacted]"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----",
            "[redacted]-----END RSA PRIVATE KEY-----",
        ),
        ("curl -H 'X-Api-Key: abcdef' host", "curl -H 'X-Api-Key: [redacted]' host"),
        ("use bearer abcdefgh.ijk-lmn", "use bearer [redacted]"),
        ("token hf_abcdefghijklmnopqrst!", "token [redacted]!"),
        ("with gsk_abcdefghijklmnopqrst, nvapi-abc_def-ghi-jkl-mno", "with [redacted], [redacted]"),
        ("postgres://me:secret@host/db", "postgres://me:[redacted]@host/db"),
        ("export MY_SECRET=abcdef", "export MY_SECRET=[redacted]"),
        ('{"max_tokens": 5, "secret": ""}', '{"max_tokens": 5, "secret": ""}'),
        ("The secret of life is 42, and its password is long.",) * 2,
    ],
)
def test_what_looks_like_a_secret_is_not_shown(text: str, shown: str) -> None:
    if "hunter2" in text:
        shown = text.replace("hunter2", "[redacted]")
    assert redacted(text) == shown
