"""Stories about models that other programs have downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import Start
from hf_models import write_model
from ollama_store import ollama_model
from tiny_models import write_llama, write_projector

from router.store import external as stores
from router.store.discovery import Discovery

COMMITS = ("a" * 40, "b" * 40)


def cached(cache: Path, repo: str, commit: str, name: str, *, seed: int = 0, main: bool = True) -> Path:
    """A file as the Hugging Face library leaves it: a blob, and a link to it in the snapshot."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    link = folder / "snapshots" / commit / name
    blob = folder / "blobs" / f"{commit[0]}{seed}-{name.replace('/', '-')}"
    for path in (link, blob, folder / "refs" / "main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write = write_projector if "mmproj" in name else write_llama
    write(blob)
    link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        (folder / "refs" / "main").write_text(commit)
    return link


def served(discovery: Discovery) -> dict[str, Path]:
    return {found.alias: found.path for found in discovery.models}


def reasons(discovery: Discovery) -> dict[str, str]:
    return {skipped.path.name: skipped.reason for skipped in discovery.skipped}


def test_the_hugging_face_cache_names_its_models_as_llama_server_does(tmp_path: Path) -> None:
    small = cached(tmp_path, "org/Small-GGUF", COMMITS[0], "small-q4_k_m.gguf")
    plain = cached(tmp_path, "org/plain", COMMITS[0], "weights.gguf")
    deep = cached(tmp_path, "org/Big-GGUF", COMMITS[0], "UD-Q2_K_XL/big-UD-Q2_K_XL.gguf")
    (tmp_path / "datasets--org--texts" / "snapshots").mkdir(parents=True)
    discovery = stores.hugging_face(tmp_path)
    assert served(discovery) == {
        "org/Big-GGUF:UD-Q2_K_XL": deep,
        "org/Small-GGUF:Q4_K_M": small,
        "org/plain": plain,
    }
    assert discovery.skipped == ()


def test_two_models_of_one_repository_and_quantization_are_told_apart_by_their_files(tmp_path: Path) -> None:
    cached(tmp_path, "org/both", COMMITS[0], "one-Q8_0.gguf")
    cached(tmp_path, "org/both", COMMITS[0], "two-Q8_0.gguf", seed=1)
    assert set(served(stores.hugging_face(tmp_path))) == {"org/both/one-Q8_0", "org/both/two-Q8_0"}


def test_of_two_revisions_the_one_of_the_main_branch_is_served(tmp_path: Path) -> None:
    old, new = COMMITS
    cached(tmp_path, "org/m", new, "m-Q8_0.gguf", seed=1)
    only_old = cached(tmp_path, "org/m", old, "m-Q4_0.gguf", main=False)
    cached(tmp_path, "org/m", old, "m-Q8_0.gguf", main=False)
    discovery = stores.hugging_face(tmp_path)
    assert served(discovery)["org/m:Q4_0"] == only_old
    assert new in served(discovery)["org/m:Q8_0"].parts


def test_a_repository_in_safetensors_has_its_own_name(tmp_path: Path) -> None:
    """Of the newest whole snapshot, if that of the main branch is still being downloaded."""
    for repo, commits in {"org/Both": COMMITS[:1], "org/Two": COMMITS}.items():
        for commit in commits:
            write_model(tmp_path / f"models--{repo.replace('/', '--')}" / "snapshots" / commit)
    beside = cached(tmp_path, "org/Both", COMMITS[0], "both-q4_k_m.gguf")
    two = tmp_path / "models--org--Two"
    (two / "refs").mkdir()
    (two / "refs" / "main").write_text(COMMITS[1])
    (two / "snapshots" / COMMITS[1] / "model.safetensors").unlink()
    discovery = stores.hugging_face(tmp_path)
    assert {found.alias: found.path for found in discovery.models} == {
        "org/Both:Q4_K_M": beside,
        "org/Both": beside.parent,
        "org/Two": two / "snapshots" / COMMITS[0],
    }


def test_a_projector_of_a_repository_goes_with_models_in_its_folders(tmp_path: Path) -> None:
    cached(tmp_path, "org/sees", COMMITS[0], "Q8_0/sees-Q8_0.gguf")
    cached(tmp_path, "org/sees", COMMITS[0], "mmproj-F16.gguf")
    (found,) = stores.hugging_face(tmp_path).models
    assert found.capabilities == ("completion", "vision")


@pytest.fixture
def ollama(tmp_path: Path) -> Path:
    store = tmp_path / "ollama"
    (store / "blobs").mkdir(parents=True)
    write_llama(store / "blobs" / "sha256-11")
    write_projector(store / "blobs" / "sha256-22")
    ollama_model(store, "registry.ollama.ai/library/llama3.2/1b", ("model", "11"), ("template", "33"))
    return store


def test_ollamas_models_keep_their_names_whoever_published_them(ollama: Path) -> None:
    ollama_model(ollama, "registry.ollama.ai/somebody/tuned/latest", ("model", "11"))
    ollama_model(ollama, "hf.co/org/Repo-GGUF/Q4_K_M", ("model", "11"), ("projector", "22"))
    discovery = stores.ollama(ollama)
    blob = ollama / "blobs" / "sha256-11"
    assert served(discovery) == {
        "llama3.2:1b": blob,
        "somebody/tuned:latest": blob,
        "hf.co/org/Repo-GGUF:Q4_K_M": blob,
    }
    sees = {found.alias: "vision" in found.capabilities for found in discovery.models}
    assert sees == {"llama3.2:1b": False, "somebody/tuned:latest": False, "hf.co/org/Repo-GGUF:Q4_K_M": True}


def tuned(store: Path, **layers: str | dict[str, object] | list[dict[str, str]]) -> None:
    """`tuned:latest` of Ollama's store, with these layers besides its file."""
    names = []
    for number, (kind, content) in enumerate(layers.items(), 50):
        text = content if isinstance(content, str) else json.dumps(content)
        (store / "blobs" / f"sha256-{number}").write_text(text)
        names.append((kind, str(number)))
    ollama_model(store, "registry.ollama.ai/library/tuned/latest", ("model", "11"), *names)


def test_what_ollamas_modelfile_says_counts_in_every_request(ollama: Path, start: Start) -> None:
    tuned(
        ollama,
        system="Speak like a pirate.",
        params={
            "stop": ["<|end|>"],
            "num_predict": 3,
            "temperature": 0,
            "num_ctx": 1024,
            "penalize_newline": True,
        },
        messages=[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
    )
    router = start(
        {"system": {"ollama_store": True}, "models": {"llama3.2:1b": {"flags": ["-c", "512"]}}},
        OLLAMA_MODELS=str(ollama),
    )
    shown = router.http.post("/api/show", json={"model": "tuned"}).json()
    assert shown["system"] == "Speak like a pirate."
    assert [turn["content"] for turn in shown["messages"]] == ["2 + 2?", "4"]
    parameters = dict(line.split(maxsplit=1) for line in shown["parameters"].splitlines())
    assert parameters == {"num_ctx": "1024", "stop": '"<|end|>"', "num_predict": "3", "temperature": "0"}
    asked = {"model": "tuned", "messages": [{"role": "user", "content": "3 + 3?"}]}
    prompt = router.http.post("/apply-template", json=asked).json()["prompt"]
    assert prompt.startswith("system: Speak like a pirate.\nuser: 2 + 2?\nassistant: 4\nuser: 3 + 3?")
    mine = {**asked, "messages": [{"role": "system", "content": "Be brief."}, *asked["messages"]]}
    assert "pirate" not in router.http.post("/apply-template", json=mine).json()["prompt"]
    chat = router.http.post("/api/chat", json={**asked, "stream": False}).json()
    assert (chat["eval_count"], chat["done_reason"]) == (3, "length")
    assert router.http.post("/v1/chat/completions", json=asked).json()["usage"]["completion_tokens"] == 3
    generated = {"model": "tuned", "prompt": "hi", "stream": False, "options": {"num_predict": 5}}
    assert router.http.post("/api/generate", json=generated).json()["eval_count"] == 5
    cards = {card["id"]: card["context_length"] for card in router.http.get("/v1/models").json()["data"]}
    assert cards == {"tuned:latest": 1024, "llama3.2:1b": 512}


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ({"params": "{"}, "has a system prompt, parameters or messages that cannot be read: Input data was"),
        (
            {"params": {"temperature": "hot"}},
            "has a system prompt, parameters or messages that cannot be read: "
            'option "temperature" must be a number',
        ),
        ({"messages": [{"role": "user"}]}, "has a system prompt, parameters or messages that cannot be read"),
        ({"params": '{"a": ' + "[" * 5000}, "has a system prompt, parameters or messages that cannot be read"),
    ],
)
def test_a_model_of_ollamas_whose_layers_are_broken_is_named(
    ollama: Path, layers: dict[str, str], reason: str
) -> None:
    tuned(ollama, **layers)
    discovery = stores.ollama(ollama)
    assert set(served(discovery)) == {"llama3.2:1b"}
    assert reasons(discovery)["latest"].startswith(reason)


def test_what_llama_cpp_cannot_load_from_ollama_is_reported(ollama: Path) -> None:
    library = "registry.ollama.ai/library"
    ollama_model(ollama, f"{library}/tuned/adapter", ("model", "11"), ("adapter", "22"))
    ollama_model(ollama, f"{library}/tuned/gone", ("model", "44"))
    ollama_model(ollama, f"{library}/tuned/parts")
    (ollama / "manifests" / library / "tuned" / "torn").write_text('{"layers": [')
    discovery = stores.ollama(ollama)
    assert set(served(discovery)) == {"llama3.2:1b"}
    found = reasons(discovery)
    assert found.pop("torn").startswith("is no manifest of Ollama's")
    assert found == {
        "adapter": "is not made of one GGUF file without adapters",
        "sha256-44": "No such file or directory",
        "parts": "is not made of one GGUF file without adapters",
    }


def test_both_stores_are_served_when_asked_for_and_only_then(start: Start, tmp_path: Path, ollama: Path) -> None:
    cached(tmp_path / "hub", "org/m", COMMITS[0], "m-Q8_0.gguf")
    places = {"HF_HUB_CACHE": str(tmp_path / "hub"), "OLLAMA_MODELS": str(ollama)}
    ollama_model(ollama, "registry.ollama.ai/library/copy/latest", ("model", "11"))
    router = start(arguments=["--hf-cache", "--ollama-store"], **places)
    cards = {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}
    assert {alias: card["source"] for alias, card in cards.items()} == {
        "org/m:Q8_0": "hf_cache",
        "llama3.2:1b": "ollama_store",
        "copy:latest": "ollama_store",
    }
    for alias in cards:
        assert router.chat(alias).status_code == 200
        assert router.status(alias)["source"] == cards[alias]["source"]
    assert set(start(**places).http.get("/status").json()["models"]) == {"demo", "demo-embed"}


def test_a_store_that_is_not_there_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        stores.ollama(tmp_path / "absent")
    assert stores.hugging_face(tmp_path / "absent").models == ()
