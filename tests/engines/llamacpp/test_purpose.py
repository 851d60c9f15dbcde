"""Stories about models that embed or rerank: nobody need say so, wherever they come from."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, eventually, models
from ollama_store import ollama_model
from tiny_models import write_embedding, write_llama, write_projector

from router.catalog.load import load
from router.config.resolved import ModelConfig
from router.engines.llamacpp.capability import refused_by_engine

LONG = "h" * 1000
"""A text of a thousand tokens and a few, twice as many as llama-server takes unless it is told."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Ollama's, with a model that embeds."""
    store = tmp_path_factory.mktemp("ollama")
    (store / "blobs").mkdir()
    write_embedding(store / "blobs" / "sha256-11", context_length=2048)
    ollama_model(store, "registry.ollama.ai/library/stored/latest", ("model", "11"))
    return store


@pytest.fixture(scope="module")
def router(start_shared: Start, tmp_path_factory: pytest.TempPathFactory, tiny: Path, store: Path) -> Router:
    folder = tmp_path_factory.mktemp("models")
    write_embedding(folder / "embed.gguf", context_length=2048)
    write_embedding(folder / "rank.gguf", context_length=2048, pooling="rank")
    write_embedding(folder / "plain.gguf", context_length=2048, pooling=None)
    named = write_embedding(tmp_path_factory.mktemp("named") / "e.gguf", context_length=2048)
    entries = models(named, "named", flags=["-t", "1"])
    entries |= models(tiny, "chat", flags=["-t", "1", "--embedding", "--pooling", "mean"])
    system = {"models_dirs": [str(folder)], "ollama_store": True}
    router = start_shared({"system": system, "models": entries}, OLLAMA_MODELS=str(store))
    content = named.read_bytes()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    router.http.post(f"/api/blobs/{digest}", content=content)
    router.http.post("/api/create", json={"model": "made", "files": {"e.gguf": digest}})
    return router


@pytest.mark.parametrize("alias", ["embed", "plain", "named", "made", "stored:latest", "chat"])
def test_long_texts_are_embedded_by_whatever_embeds(router: Router, alias: str) -> None:
    answer = router.http.post("/v1/embeddings", json={"model": alias, "input": ["short", LONG]})
    assert answer.status_code == 200, answer.text
    assert [len(each["embedding"]) for each in answer.json()["data"]] == [64, 64]
    card = router.http.get(f"/v1/models/{alias}").json()
    assert (card["capabilities"], card["context_length"]) == (["embedding"], 2048)


def test_long_documents_are_ranked(router: Router) -> None:
    body = {"model": "rank", "query": "q", "documents": ["short", LONG]}
    answer = router.http.post("/v1/rerank", json=body)
    assert sorted(each["index"] for each in answer.json()["results"]) == [0, 1]
    assert router.http.get("/v1/models/rank").json()["capabilities"] == ["rerank"]


def test_who_asks_it_for_text_is_told_what_it_is(router: Router) -> None:
    answer = router.chat("embed")
    assert answer.status_code == 400
    assert "'embed' is made for embeddings and writes no text" in answer.text
    of_older_builds = b'{"error":{"message":"the current context does not logits computation. skipping"}}'
    refusal = refused_by_engine(500, of_older_builds, "embed", {})
    assert refusal is not None
    assert refusal.message == "'embed' is made for embeddings and writes no text. No model here does."


def test_what_is_proposed_to_try_is_what_the_first_models_can_do(start: Start, tmp_path: Path) -> None:
    write_embedding(tmp_path / "a-rank.gguf", pooling="rank")
    write_embedding(tmp_path / "b-embed.gguf")
    router = start(arguments=["--models-dir", str(tmp_path)])
    assert """/v1/embeddings -d '{"model": "b-embed", "input": "Hello"}'""" in router.log
    write_llama(tmp_path / "c-chat.gguf")
    router = start(arguments=["--models-dir", str(tmp_path)])
    assert """/v1/chat/completions -d '{"model": "c-chat", "messages":""" in router.log


def configured(path: Path, environ: dict[str, str] | None = None, **entry: Any) -> ModelConfig:
    (path.parent / "config.json").write_text(json.dumps({"models": {"m": {"model_path": str(path), **entry}}}))
    return load(environ=environ or {}, cwd=path.parent).config.models["m"]


def test_what_flags_or_variables_say_counts_more_than_the_file(tmp_path: Path) -> None:
    rank = write_embedding(tmp_path / "rank.gguf", context_length=2048, pooling="rank")
    batch = ("--batch-size", "2048", "--ubatch-size", "2048")
    one = ("--parallel", "1")
    assert configured(rank).flags == (*one, "--rerank", *batch)
    assert configured(rank, flags=["--embedding"]).flags == ("--embedding", *one, *batch)
    assert configured(rank, flags=["--pooling", "cls"]).flags == ("--pooling", "cls", *one, "--embedding", *batch)
    assert configured(rank, flags=["-ub", "64"]).flags == ("-ub", "64", *one, "--rerank", *batch[:2])
    assert configured(rank, flags=["-c", "600"]).flags[-4:] == ("--batch-size", "768", "--ubatch-size", "768")
    assert configured(rank, flags=["-np", "2", "-c", "1024"]).flags[-1] == "512"
    for variables in ({"environ": {"LLAMA_ARG_RERANKING": "1"}}, {"env": {"LLAMA_ARG_EMBEDDINGS": "0"}}):
        assert configured(rank, **variables).flags == one  # type: ignore[arg-type]
    assert configured(rank, env={"LLAMA_ARG_UBATCH": "64"}).flags == (*one, "--rerank", *batch[:2])


def test_what_reads_its_text_in_pieces_needs_no_larger_batches(tmp_path: Path) -> None:
    chat = write_llama(tmp_path / "chat.gguf", context_length=32768)
    assert configured(chat, flags=["--embedding", "--pooling", "last"]).flags[-2:] == ("--parallel", "1")
    # What computes logits for each token would take gigabytes for as many as its context has.
    assert configured(chat, flags=["--embedding", "--pooling", "mean"]).flags[-1] == "8192"


def test_what_cannot_answer_is_refused_with_what_it_is_also_where_it_is_configured(
    start: Start, tmp_path: Path
) -> None:
    draft = write_llama(tmp_path / "mtp-draft.gguf")
    router = start({"models": models(draft, "draft")})
    answer = router.chat("draft")
    assert answer.status_code == 503
    assert "mtp-draft.gguf is a draft for speculative decoding, not a model of its own" in answer.text


def test_a_model_does_without_a_projector_that_was_only_found_and_does_not_load(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(tiny, folder / "a.gguf")
    write_projector(folder / "mmproj-a.gguf")  # of the right width, but without an encoder
    named = {"model_path": str(tiny), "mmproj": str(folder / "mmproj-a.gguf")}
    system = {"models_dirs": [str(folder)], "model_load_max_retries": 0}
    router = start({"system": system, "models": {"named": named}})

    def capabilities() -> list[str]:
        found: list[str] = router.http.get("/v1/models/a").json()["capabilities"]
        return found

    assert capabilities() == ["completion", "vision"]
    assert router.chat("a").status_code == 200
    assert capabilities() == ["completion"]
    assert "model a did not load, and is started without the projector that was found beside it" in router.log
    pid = router.status("a")["pid"]
    write_llama(folder / "b.gguf", seed=1)
    eventually(lambda: router.chat("b").status_code == 200)
    assert (router.chat("a").status_code, router.status("a")["pid"]) == (200, pid)
    assert router.chat("named").status_code == 503


def test_the_context_that_is_listed_is_what_the_engine_has_wherever_it_was_set(start: Start, tiny: Path) -> None:
    stretched = ["--rope-scaling", "yarn", "--rope-scale", "2", "-c", "9999"]
    entries = {
        **models(tiny, "inherited", flags=[]),
        **models(tiny, "flags", flags=["-c", "1000"]),
        **models(tiny, "variable", flags=[], env={"LLAMA_ARG_CTX_SIZE": "300"}),
        **models(tiny, "slots", flags=["-c", "2000", "-np", "2"]),
        **models(tiny, "beyond", flags=["-c", "9999"]),
        **models(tiny, "stretched", flags=stretched),
    }
    system = {"max_concurrent_models": len(entries)}
    router = start({"system": system, "models": entries}, LLAMA_ARG_CTX_SIZE="700")

    def listed() -> dict[str, set[int]]:
        cards = {card["id"]: card["context_length"] for card in router.http.get("/v1/models").json()["data"]}
        tags = {tag["name"]: tag["context_length"] for tag in router.http.get("/api/tags").json()["models"]}
        return {alias: {cards[alias], tags[f"{alias}:latest"]} for alias in entries}

    expected = {"inherited": 768, "flags": 1024, "variable": 512, "slots": 1024, "beyond": 2048, "stretched": 4096}
    assert listed() == {alias: {context} for alias, context in expected.items()}
    for alias, context in expected.items():
        router.chat(alias)
        eventually(lambda alias=alias, context=context: router.status(alias)["context_length"] == context)  # type: ignore[misc]
        assert router.http.post("/api/show", json={"model": alias}).json()["parameters"].endswith(str(context))
    assert listed() == {alias: {context} for alias, context in expected.items()}
