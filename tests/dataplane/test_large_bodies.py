"""Bodies that are too large to be parsed at once: the engine gets the same as for small ones.

The engine is a fake one that notes its requests.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, eventually, examples, fake, models
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.dataplane import shortening
from router.dataplane.burden import burden
from router.dataplane.forms import text_fields
from router.dataplane.routing import shortened
from router.dataplane.shortening import ALL_DEPTHS, Count, Shortened
from router.http.errors import ApiError
from router.http.routes import ROUTES
from router.system.large_memory import Pieces

LONG = 'All "work" and no play\\\n\u00e9 ' * 60_000
IMAGE = "iVBORw0KGgo" + "A" * 1_500_000


def joined(pieces: Pieces) -> bytes:
    whole = b"".join(map(bytes, pieces.parts))
    assert len(whole) == len(pieces)
    return whole


def anything(_: Count) -> None:
    """Allow any number of values."""


# --- what is taken out of a document ---------------------------------------------------------------------------

TEXTS = st.one_of(st.text(max_size=3), st.sampled_from(('"\\', "\\" * 9, "é" * 9, "[{", "a" * 40, 'a"' * 20)))
VALUES = st.recursive(
    st.one_of(st.none(), st.integers(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=30,
)


@settings(max_examples=examples(60))
@example({"a": ["\\" * 9, {"b": "x" * 40}]}, 1, 3, False)
@given(
    st.dictionaries(TEXTS, VALUES, max_size=5),
    st.sampled_from((1, 2, 3, ALL_DEPTHS)),
    st.integers(2, 90),
    st.booleans(),
)
def test_what_was_taken_out_is_put_back(document: dict[str, Any], depth: int, step: int, ascii_only: bool) -> None:
    whole = json.dumps(document, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortening, "_LONG", 8)
        patch.setattr(shortening, "_STEP", step)
        short = Shortened(whole, depth, anything)
    assert json.loads(short.text).keys() >= {key for key in document if len(json.dumps(key)) < 8}
    assert joined(short.restored(short.text)) == whole


def test_a_short_document_has_what_is_asked_for_and_nothing_long() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    turns = [{"role": "system", "content": LONG}, {"role": "user", "content": [{"type": "text", "text": LONG}]}]
    document = {"model": "a", "messages": turns * 50, "tools": tools, "stop": ["x"], "stream": True}
    whole = json.dumps(document).encode()
    top = json.loads(Shortened(whole, 1, anything).text)
    assert {**top, "messages": []} == {**document, "messages": []}
    turn = json.loads(Shortened(whole, 3, anything).text)["messages"][0]
    assert (turn["role"], turn["content"][:4]) == ("system", LONG[:4])
    assert len(Shortened(whole, 1, anything).text) < 1000
    assert len(Shortened(whole, ALL_DEPTHS, anything).text) < 50_000


def test_what_is_taken_out_is_not_looked_at() -> None:
    """Which would take long: here it would even fail."""
    nonsense = b"nonsense, " * 1000
    short = shortened(b'{"model": "a", "input": [[%b]], "stream": true}' % nonsense, 1, anything)
    assert json.loads(short.text)["stream"] is True
    assert nonsense in joined(short.restored(short.text))


def test_json_within_a_string_gets_what_was_taken_out_as_text() -> None:
    short = Shortened(json.dumps({"schema": {"const": LONG}, "list": [LONG], "text": LONG}).encode(), 1, anything)
    within = json.dumps({"arguments": short.text.decode()}).encode()
    arguments = json.loads(joined(short.restored(within)))["arguments"]
    assert json.loads(arguments) == {"schema": {"const": LONG}, "list": [LONG], "text": LONG}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"model": "a", "prompt": "' + b"x" * 1000, "truncated"),
        (b'{"model": "a", "input": [' + b"1," * 1000, "truncated"),
        (b'{"model": "a", "input": [' + b'{"a": 1]' * 1000 + b"]}", "brackets do not match"),
        (b'{"a": ' * 300 + b"1" + b"}" * 300, "nested too deeply"),
        (b'{"model": "a", "input": ' + b"[" * 300 + b"]" * 300 + b"}", "nested too deeply"),
    ],
)
def test_what_is_cut_off_or_nested_too_deeply_is_refused(body: bytes, problem: str) -> None:
    with pytest.raises(ApiError, match=problem):
        shortened(body, 1, anything)


def test_too_many_values_are_refused_before_the_rest_is_read() -> None:
    lists = b'{"a": [' + b"[]," * 2_000_000  # six megabytes, and cut off
    counted: list[int] = []

    def few(count: Count) -> None:
        counted.append(count.values)
        burden(count, ROUTES["/v1/chat/completions"])

    with pytest.raises(ApiError, match="more than 524288 texts, lists and objects"):
        shortened(lists, 1, few)
    assert counted[-1] < 1_500_000


# --- what an engine gets ---------------------------------------------------------------------------------------

ALIASES = {
    "plain": "a",
    "parrot": {"uses": "a", "system_prompt": "You are a parrot.", "forced": {"temperature": 0}},
    "only-parrot": {"uses": "a", "system_prompt": "You are a parrot.", "system_prompt_replaces": True},
    "cool": {"uses": "a", "defaults": {"temperature": 0}},
}
CALL = {"type": "function", "function": {"name": "write", "arguments": {"path": "a", "text": "LONG"}}}
TEXT = {"type": "text", "text": "LONG"}
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "IMAGE"}}
USE = {"type": "tool_use", "id": "1", "name": "write", "input": {"path": "a", "text": "LONG"}}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "LONG"}
SCHEMA = {"type": "object", "properties": {"a": {"description": "LONG"}}}
WRITE = {"type": "function", "name": "write", "parameters": SCHEMA}
FORM = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}


def turn(content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path, notes: Path) -> Router:
    """Its engine plays, and writes down what it is asked."""
    system = {"llama_server_path": fake(notes.parent, notes=str(notes))}
    return start_shared({"system": system, "models": models(tiny, "a"), "aliases": ALIASES})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "plain", "messages": [turn("LONG")]}),
        ("/v1/chat/completions", {"messages": [turn("LONG", "system"), turn("LONG")], "model": "parrot"}),
        (
            "/v1/chat/completions",
            {"model": "parrot", "messages": [turn([{"type": "text", "text": "LONG"}], "system")]},
        ),
        ("/v1/chat/completions", {"model": "only-parrot", "messages": [turn("hi", "developer"), turn("LONG")]}),
        ("/v1/completions", {"model": "cool", "prompt": ["LONG", "a", "LONG"]}),
        ("/v1/embeddings", {"model": "cool", "input": ["LONG", "a"]}),
        (
            "/v1/responses",
            {"model": "parrot", "input": "LONG", "instructions": "LONG", "tools": [WRITE], "text": FORM},
        ),
        (
            "/v1/messages",
            {"model": "parrot", "system": [{"type": "text", "text": "LONG"}], "messages": [turn("a")]},
        ),
        (
            "/v1/messages",
            {"model": "parrot", "seed": 1, "messages": [turn([PICTURE, TEXT]), turn([USE], "assistant")]},
        ),
        ("/v1/messages", {"model": "a", "messages": [turn([USE], "assistant"), turn([TEXT, RESULT])]}),
        ("/api/chat", {"model": "parrot", "messages": [turn("LONG", images=["IMAGE"])], "stream": False}),
        ("/api/chat", {"model": "a", "messages": [turn("", "assistant", tool_calls=[CALL])], "stream": False}),
        ("/api/generate", {"model": "cool", "prompt": "LONG", "images": ["IMAGE"], "stream": False}),
        ("/api/embed", {"model": "a", "input": ["LONG", "LONG"]}),
    ],
)
def test_a_large_body_is_changed_as_a_small_one_is(
    router: Router, notes: Path, path: str, body: dict[str, Any]
) -> None:
    def asked(long: str, image: str) -> str:
        """What the engine was, with what is long in short again."""
        text = json.dumps(body).replace("LONG", json.dumps(long)[1:-1]).replace("IMAGE", image)
        notes.unlink(missing_ok=True)
        router.http.post(path, content=text)
        target, _, seen = notes.read_text().partition(" ")
        assert len(seen) >= len(text) - 1000
        seen = json.dumps(json.loads(seen), ensure_ascii=False)
        for level in (long, json.dumps(long)[1:-1], json.dumps(json.dumps(long)[1:-1])[1:-1]):
            seen = seen.replace(json.dumps(level, ensure_ascii=False)[1:-1], "LONG")
        return f"{target} {seen.replace(image, 'IMAGE')}"

    assert asked(LONG, IMAGE) == asked('a "b"\\\n', IMAGE[:100])


def test_a_large_body_that_nothing_changes_comes_byte_for_byte(router: Router, notes: Path) -> None:
    spaced = b'{ "messages":\t[' + b'{"role":"user",  "content":"\\u00e9"},' * 50_000 + b'{}],"model":"a"}'
    notes.unlink(missing_ok=True)
    assert router.http.post("/v1/chat/completions", content=spaced).status_code == 200
    assert notes.read_bytes() == b"/v1/chat/completions %b\n" % spaced


def test_what_is_wrong_with_a_large_body_is_told_and_the_connection_stays(router: Router) -> None:
    long = json.dumps(LONG).encode()
    for body, code in (
        (b'{"model": "zzz", "prompt": %b}' % long, "model_not_found"),
        (b'{"model": "a", "prompt": %b' % long, "invalid_json"),
        (b'{"model": "a" "prompt": %b}' % long, "invalid_json"),
        (b"[%b]" % long, "invalid_json"),
    ):
        answer = router.http.post("/v1/completions", content=body)
        assert (answer.status_code in (400, 404), answer.json()["error"]["code"]) == (True, code)
        assert "byte" not in answer.json()["error"]["message"]
    assert router.chat("a").status_code == 200


def wordy(number: int = 40_000, **more: Any) -> bytes:
    """Too many messages to make objects of all of them."""
    turns = b",".join([b'{"role": "user", "content": "a"}'] * number)
    return b'{"messages": [%b], %b' % (turns, json.dumps({"stream": False, **more}).encode()[1:])


MANY = b", ".join([b'"a"'] * 400_000)
SOME = b", ".join([b'"a"'] * 60_000)
TOKENS = b", ".join([b"12345"] * 300_000)
A_MILLION = b", ".join([b"12345"] * 1_000_000)
BIASES = b", ".join([b"[12345, -100]"] * 262_144)
"""One for each token of a large vocabulary."""


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", wordy(model="plain")),
        ("/v1/chat/completions", wordy(model="cool")),
        ("/v1/messages", wordy(model="a")),
        ("/v1/responses", wordy(model="a").replace(b"messages", b"input", 1)),
        ("/v1/completions", b'{"model": "cool", "prompt": [%b]}' % TOKENS),
        ("/v1/completions", b'{"model": "a", "prompt": [%b]}' % A_MILLION),
        ("/v1/chat/completions", b'{"model": "a", "messages": [], "logit_bias": [%b]}' % BIASES),
        ("/v1/embeddings", b'{"model": "a", "input": [%b]}' % SOME),
        ("/api/embed", b'{"model": "a", "input": [%b]}' % SOME),
    ],
)
def test_values_that_need_not_be_looked_at_may_be_many(router: Router, path: str, body: bytes) -> None:
    assert router.http.post(path, content=body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", wordy(model="parrot")),
        ("/v1/chat/completions", wordy(30_000, model="parrot")),  # which would be read at once for its size
        ("/v1/messages", wordy(model="a", seed=1)),
        ("/v1/responses", wordy(model="parrot").replace(b"messages", b"input", 1)),
        ("/v1/completions", b'{"model": "a", "prompt": [%b]}' % MANY),
        ("/api/chat", wordy(model="a")),
        ("/api/generate", b'{"model": "a", "prompt": "a", "options": {"stop": [%b]}}' % MANY),
        ("/v1/chat/completions", b'{"model": "a", %b}' % b", ".join([b'"key": 1'] * 150_000)),
    ],
)
def test_of_values_that_have_to_be_taken_apart_there_is_a_bound(router: Router, path: str, body: bytes) -> None:
    answer = router.http.post(path, content=body)
    assert (answer.status_code, "too many values" in answer.text) == (413, True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", b'{"model": "a", "messages": [], "x": [%b]}' % b",".join([b"1"] * 4_200_000)),
        ("/v1/chat/completions", b'{"model": "a", "messages": [], "x": [%b]}' % b",".join([b"{}"] * 600_000)),
        ("/v1/messages", b'{"model": "a", "messages": [], "x": [%b]}' % b",".join([b"[]"] * 600_000)),
        ("/tokenize", b'{"model": "a", "content": [%b]}' % b",".join([b'""'] * 600_000)),
        ("/v1/embeddings", b'{"model": "a", "input": [%b]}' % MANY),
        ("/api/embed", b'{"model": "a", "input": [%b]}' % MANY),
        ("/v1/rerank", b'{"model": "a", "query": "a", "documents": [%b]}' % MANY),
    ],
)
def test_so_there_is_of_those_that_an_engine_makes_objects_of(
    router: Router, notes: Path, path: str, body: bytes
) -> None:
    notes.write_bytes(b"")
    answer = router.http.post(path, content=body)
    assert (answer.status_code, "Send less at once" in answer.text) == (413, True)
    assert notes.read_bytes() == b""


@pytest.mark.parametrize("path", ["/v1/models/load", "/api/create", "/api/show", "/v1/models/pull"])
def test_so_there_is_for_pages(router: Router, path: str) -> None:
    answer = router.http.post(path, json={"model": [[]] * 100_000})
    assert answer.status_code == 413


@pytest.mark.skipif(sys.platform != "linux", reason="where /proc tells of memory")
def test_memory_of_large_bodies_is_given_back_and_never_many_times_theirs(router: Router) -> None:
    process = Path("/proc", str(router.process.pid))
    size = 24 << 20
    text = json.dumps(LONG)[1:-1].encode() * (size // len(json.dumps(LONG)))
    turns = b",".join([b'{"role": "user", "content": "%b"}' % (b"a" * 10_000)] * (size // 10_000))
    bodies = (b'"%b"' % text, b'[{"type": "text", "text": "%b"}]' % text)
    contents = [b'{"role": "user", "content": %b}' % body for body in bodies] + [turns]

    def mib(name: str) -> int:
        (line,) = (line for line in (process / "status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) >> 10

    router.chat("a")
    before = mib("VmRSS")
    (process / "clear_refs").write_text("5")  # the peak is what it holds now
    for content in contents:
        for model in ("plain", "parrot"):
            document = b'{"model": "%b", "messages": [%b]}' % (model.encode(), content)
            assert router.http.post("/v1/chat/completions", content=document).status_code == 200
    assert mib("VmHWM") - before < 4 * 24
    eventually(lambda: mib("VmRSS") - before < 20)


def test_a_client_that_leaves_while_its_body_is_read_leaves_nothing(router: Router) -> None:
    body = json.dumps({"model": "a", "prompt": LONG}).encode()
    for _ in range(3):
        with socket.create_connection(router.address) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body))
            client.sendall(body)

    def processing() -> int:
        summary: dict[str, int] = router.http.get("/v1/queue/stats").json()["summary"]
        return summary["total_processing"] + summary["total_queued"]

    eventually(lambda: processing() == 0)
    assert "Traceback" not in router.log


# --- forms -----------------------------------------------------------------------------------------------------


def form(*parts: bytes, boundary: bytes = b"xyz") -> bytes:
    return b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts) + b"--%b--\r\n" % boundary


FILE = b'Content-Disposition: form-data; name="file"; filename="\xc3\xa9 model.wav"\r\n\r\n' + b"RIFF\r\n--xy" * 9


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data; boundary=xyz",
        b'Multipart/Form-Data; charset="a;boundary=b"; Boundary="xyz"',
        b"multipart/form-data;BOUNDARY=xyz;charset=utf-8",
    ],
)
@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="model"\r\n',
        b"content-disposition:form-data;name=model\r\n",
        b"Content-Type: text/plain\r\nCONTENT-DISPOSITION: form-data;\r\n\tNAME = model ; x=y\r\n",
    ],
)
def test_a_field_of_a_form_is_found_however_it_is_written(content_type: bytes, head: bytes) -> None:
    other = b'Content-Disposition: form-data; name="model_x"\r\n\r\nno'
    named = b'Content-Disposition: form-data; name="prompt"\r\n\r\nname="model"\r\n\r\nno'
    body = form(FILE, other, head + b"\r\na b ", named, b"X: y\r\n\r\n")
    assert text_fields(body, content_type, ("model",)) == {"model": "a b"}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"--xyz\r\nnothing", "cut off or malformed"),
        (form(FILE)[:-4], "cut off or malformed"),
        (b"", "cut off or malformed"),
        (form(*[b"X: y\r\n\r\n"] * 1025), "more than 1024 parts"),
        (form(FILE + b"\r\n--xyzz" * 1025), "more than 1024 parts"),
        (form(b"X: y\r\n" * 40 + b"\r\n"), "more than 32 lines"),
    ],
)
def test_a_form_that_is_none_is_refused(body: bytes, problem: str) -> None:
    with pytest.raises(ApiError, match=problem):
        text_fields(body, b"multipart/form-data; boundary=xyz", ("model",))


def test_what_begins_like_a_boundary_is_content() -> None:
    model = b'Content-Disposition: form-data; name="model"\r\n\r\na'
    body = form(FILE + b"\r\n--xyzz" * 100, model)
    assert text_fields(body, b"multipart/form-data; boundary=xyz", ("model",)) == {"model": "a"}
    assert text_fields(memoryview(body), b"multipart/form-data; boundary=xyz", ("model",)) == {"model": "a"}


def test_a_form_without_a_boundary_is_refused() -> None:
    with pytest.raises(ApiError, match="no multipart boundary"):
        text_fields(form(FILE), b"multipart/form-data; charset=utf-8", ("model",))
