"""The table of routes: each row is applied where it counts, and documented as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Start, models
from tiny_models import write_embedding

from router.http.errors import ApiError
from router.http.routes import ROUTES, TABLE, Dialect, Route, Stream

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
STREAMS = {Stream.NONE: "", Stream.OPEN: "yes", Stream.CLOSED: "to a last event"}
APIS = {
    Dialect.OPENAI: "OpenAI",
    Dialect.LLAMA_SERVER: "llama-server",
    Dialect.ANTHROPIC: "Anthropic",
    Dialect.OLLAMA: "Ollama",
}


def told(route: Route) -> str:
    paths = ", ".join(f"`{path}`" for path in route.paths)
    speaks = ""
    if route.conversation is not None:
        speaks = f"`{route.conversation.prompt}`" if route.conversation.prompt else "first message"
    body = "form" if route.body == "form" else ""
    cells = (
        paths,
        APIS[route.dialect],
        route.asks,
        body,
        STREAMS[route.stream],
        "" if route.needs_slot else "no",
        speaks,
    )
    return f"| {' | '.join(cells)} |"


def test_the_docs_have_the_table_as_it_is() -> None:
    docs = DOCS.read_text()
    rows = [told(route) for route in TABLE]
    assert "\n".join(rows) in docs, "docs/api.md should have:\n" + "\n".join(rows)


def test_a_path_is_in_one_row() -> None:
    assert sum(len(route.paths) for route in TABLE) == len(ROUTES)


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/messages/batches", Dialect.ANTHROPIC),
        ("/api/none", Dialect.OLLAMA),
        ("/api/events", Dialect.OLLAMA),
        ("/chat", Dialect.OLLAMA),
        ("/chat/none", Dialect.OPENAI),
        ("/v1/messages/count_tokens", Dialect.ANTHROPIC),
        ("/tokenize", Dialect.OPENAI),
        ("/none", Dialect.OPENAI),
    ],
)
def test_errors_are_in_the_words_of_their_path_also_where_nothing_is(path: str, dialect: Dialect) -> None:
    error = ApiError(404, "route_not_found", "There is nothing.")
    envelopes = {
        Dialect.OPENAI: b'{"error":{"message"',
        Dialect.ANTHROPIC: b'{"type":"error"',
        Dialect.OLLAMA: b'{"error":"There is nothing."}',
    }
    assert error.body(path).startswith(envelopes[dialect])


def test_who_asks_for_a_stream_where_there_is_none_gets_a_document_however_long_it_waits(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    vectors = models(write_embedding(tmp_path / "vectors.gguf"), "vectors", flags=["--embedding"])
    router = start({"api": {"heartbeat_sec": 0.01}, "models": {**models(tiny, "a"), **vectors}})
    for path, asked, told in (
        ("/v1/embeddings", {"model": "vectors", "input": "hi"}, "data"),
        ("/tokenize", {"model": "a", "content": "hi"}, "tokens"),
    ):
        answer = router.http.post(path, json={**asked, "stream": True})
        assert answer.headers["content-type"].startswith("application/json"), path
        assert answer.json().get(told), answer.text
        assert int(answer.headers["x-queue-ms"]) > 10, "or there was nothing to outlast"
