"""Stories of models that clients create, with Ollama's client, and like `ollama create`."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest
from conftest import ROOT, Router, Start, eventually, models, starting
from tiny_models import write_llama, write_projector

from router.store.blobs import Blobs

USER = {"role": "user", "content": "hi"}
EXAMPLES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
JINJA = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
HOT = {"uses": "tiny", "defaults": {"temperature": 2}, "forced": {"max_tokens": 3}}
ABSENT = f"sha256:{'0' * 64}"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, tiny: Path, state: Path) -> Iterator[Router]:
    with starting(tmp_path_factory.mktemp("router")) as start:
        entries = models(tiny, "tiny", flags=["-c", "4096", "-np", "2", "-t", "1", "--ignore-eos"])
        yield start({"models": entries, "aliases": {"hot": HOT}}, LLAMA_ROUTER_STATE_DIR=str(state))


@pytest.fixture
def client(router: Router, state: Path) -> Iterator[ollama.Client]:
    """What it creates is gone after the test, with its files."""
    with ollama.Client(router.url, timeout=60) as client:
        yield client
        for card in cards(router).values():
            if card["source"] == "created":
                client.delete(card["id"])
        assert files_in(state) == []


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("other") / "other.gguf", seed=7)


def files_in(state: Path) -> list[str]:
    return sorted(os.listdir(state / "blobs")) if (state / "blobs").exists() else []


def cards(router: Router) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}


def prompt(router: Router, model: str, *messages: dict[str, str]) -> str:
    answer = router.http.post("/apply-template", json={"model": model, "messages": messages})
    text: str = answer.json()["prompt"]
    return text


def length(client: ollama.Client, model: str, **options: int) -> int:
    count = client.chat(model, [USER], options=options).eval_count
    assert count is not None
    return count


# --- what can be made ---------------------------------------------------------------------------------------


def test_the_way_of_ollama_create_with_a_file(client: ollama.Client, router: Router, other: Path) -> None:
    content = other.read_bytes()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert router.http.head(f"/api/blobs/{digest}").status_code == 404
    assert router.http.post(f"/api/blobs/{digest}", content=content).status_code == 201
    assert router.http.head(f"/api/blobs/{digest}").status_code == 200
    assert router.http.post(f"/api/blobs/{digest}", content=content).status_code == 200
    body = {"model": "mine", "files": {"other.gguf": digest}, "parameters": {"num_ctx": 512, "num_predict": 4}}
    answer = router.http.post("/api/create", json=body)
    assert answer.headers["content-type"] == "application/x-ndjson"
    statuses = [json.loads(line)["status"] for line in answer.text.splitlines()]
    assert statuses == ["parsing GGUF", "writing manifest", "success"]
    assert length(client, "mine") == 4
    card = cards(router)["mine"]
    assert (card["source"], card["context_length"], card["size"]) == ("created", 512, len(content))
    assert "mine:latest" in [model.model for model in client.list().models]
    client.delete("mine")
    assert "mine" not in cards(router)
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.chat("mine", [USER])


def test_a_name_with_a_system_prompt_parameters_and_examples(client: ollama.Client, router: Router) -> None:
    parameters = {"num_predict": 2, "num_ctx": 1024, "stop": ["never", '"seen"']}
    made = client.create(
        "kind", from_="tiny", system="Be kind.", parameters=parameters, messages=EXAMPLES, license=["MIT", "BSD"]
    )
    assert made.status == "success"
    system = {"role": "system", "content": "Be kind."}
    own = {"role": "system", "content": "Be brief."}
    assert prompt(router, "kind", USER) == prompt(router, "tiny", system, *EXAMPLES, USER)
    assert prompt(router, "kind", own, USER) == prompt(router, "tiny", own, *EXAMPLES, USER)
    assert (length(client, "kind"), length(client, "kind", num_predict=3)) == (2, 3)
    assert router.chat("kind", max_tokens=None).json()["usage"]["completion_tokens"] == 2
    assert len(router.engines) == 1  # it has what it needs in its base's
    shown = client.show("kind")
    assert shown.parameters is not None
    assert shown.modelfile is not None
    lines = [line.split(None, 1) for line in shown.parameters.splitlines()]
    assert lines == [["num_ctx", "2048"], ["num_predict", "2"], ["stop", '"never"'], ["stop", '"\\"seen\\""']]
    for line in ("FROM tiny", 'SYSTEM """Be kind."""', 'MESSAGE assistant """4"""'):
        assert line in shown.modelfile.splitlines()
    raw = router.http.post("/api/show", json={"model": "kind"}).json()
    assert (raw["system"], raw["messages"], raw["license"]) == ("Be kind.", EXAMPLES, "MIT\nBSD")
    assert raw["details"]["parent_model"] == "tiny"


def test_what_is_made_from_something_made_stands_for_itself(
    client: ollama.Client, router: Router, other: Path
) -> None:
    digest = client.create_blob(other)
    client.create("one", files={"x": digest}, system="One.", parameters={"num_predict": 2, "seed": 1})
    client.create("two", from_="one:latest", system="Two.", parameters={"num_predict": 3})
    client.copy("two", "team/three:v1")
    assert [length(client, name) for name in ("one", "two", "team/three:v1")] == [2, 3, 3]
    assert {card["uses"] for name, card in cards(router).items() if name in ("two", "team/three:v1")} == {"one"}
    client.copy("tiny", "team/three")  # is another name than team/three:v1
    assert cards(router)["team/three"]["uses"] == "tiny"
    client.delete("team/three")
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.delete("team/three")
    client.delete("one")
    assert [length(client, name) for name in ("two", "team/three:v1")] == [3, 3]
    assert prompt(router, "two", USER) == prompt(router, "tiny", {"role": "system", "content": "Two."}, USER)
    tags = {model.model: model for model in client.list().models}
    assert tags["two:latest"].digest == tags["team/three:v1"].digest  # nobody can tell the difference
    client.create("two", from_="two", parameters={"num_predict": 1})  # made anew from itself
    assert length(client, "two") == 1


def test_what_the_configuration_forces_cannot_be_got_round(client: ollama.Client) -> None:
    client.create("cold", from_="hot", parameters={"num_predict": 9, "temperature": 0})
    assert length(client, "cold") == 3
    shown = client.show("cold").parameters
    assert shown is not None
    assert "temperature                    0" in shown


def test_a_template_or_a_longer_context_takes_an_engine_of_its_own(client: ollama.Client, router: Router) -> None:
    template = client.show("tiny").template
    client.create("same", from_="tiny", template=template, parameters={"num_ctx": 2048})
    client.create("odd", from_="tiny", template=JINJA)
    client.create("long", from_="tiny", parameters={"num_ctx": 3000, "num_batch": 64, "num_gpu": -1})
    assert prompt(router, "same", USER) == prompt(router, "tiny", USER)
    assert prompt(router, "odd", *EXAMPLES, USER) == "<user>2 + 2?<assistant>4<user>hi"
    assert client.show("odd").template == JINJA
    found = cards(router)
    assert [found[name].get("uses") for name in ("same", "odd", "long")] == ["tiny", None, None]
    assert [found[name]["context_length"] for name in ("same", "odd", "long")] == [2048, 2048, 2048]  # as trained
    assert length(client, "long", num_predict=1) == 1
    assert router.status("long")["memory"]["context"] in (None, 6000)  # of its base's two slots


def test_a_copy_is_a_further_name_and_can_be_put_elsewhere(client: ollama.Client, router: Router) -> None:
    client.copy("tiny", "mine")
    client.copy("hot", "hotter")
    assert cards(router)["mine"]["uses"] == "tiny"
    assert length(client, "hotter", num_predict=9) == 3
    client.copy("hot", "mine")
    assert length(client, "mine", num_predict=9) == 3


# --- what cannot ------------------------------------------------------------------------------------------


def test_what_cannot_be_had_is_refused_with_what_to_do_instead(
    client: ollama.Client, router: Router, state: Path, other: Path, tmp_path: Path
) -> None:
    digest = client.create_blob(other)
    client.create("kept", files={"other.gguf": digest})
    projector = client.create_blob(write_projector(tmp_path / "projector.gguf"))
    junk = client.create_blob(Path(__file__))
    part = client.create_blob(write_llama(tmp_path / "split.gguf", n_layer=4, parts=2))
    cases: dict[tuple[int, str], dict[str, Any]] = {
        (409, "'tiny' is taken by a model of this name, from config.json"): {"model": "tiny", "from": "kept"},
        (409, "'hot' is taken"): {"model": "hot:latest", "from": "kept"},
        (404, "model 'nix' not found"): {"from": "nix"},
        (400, "neither 'from' or 'files'"): {"files": {}},
        (400, "not both"): {"from": "tiny", "files": {"a": digest}},
        (400, "blob not found for a"): {"files": {"a": ABSENT}},
        (400, "invalid digest format"): {"files": {"a": "sha256:../../../etc/passwd"}},
        (400, "a: not a GGUF file"): {"files": {"a": junk}},
        (400, "llama-gguf-split --merge"): {"files": {"a": part}},
        (400, "must hold one model"): {"files": {"a": projector}},
        (400, "`files` must"): {"files": {"a": digest, "b": digest}},
        (400, "`adapters` is not supported: put LoRA"): {"from": "tiny", "adapters": {"a": digest}},
        (400, "llama-quantize"): {"from": "tiny", "quantize": "q4_K_M"},
        (400, "`modelfile`"): {"modelfile": "FROM tiny"},
        (400, "in Jinja"): {"from": "tiny", "template": "{{ if .System }}{{ .System }}{{ end }}{{ .Prompt }}"},
        (400, "parameter 'penalize_newline'"): {"from": "tiny", "parameters": {"penalize_newline": True}},
        (400, '"num_ctx" must be a number'): {"from": "tiny", "parameters": {"num_ctx": "much"}},
        (400, '"num_ctx" must be from 1 to'): {"from": "tiny", "parameters": {"num_ctx": 10**12}},
        (400, '"num_gpu" must be at most'): {"from": "tiny", "parameters": {"num_gpu": 10**12}},
        (400, '"temperature" must be'): {"from": "tiny", "parameters": {"temperature": [1]}},
        (400, "send a system prompt"): {"from": "tiny", "messages": [{"role": "system", "content": "x"}]},
        (400, "invalid request"): {"from": "tiny", "messages": [{"role": "user", "content": "x", "images": []}]},
    }
    for (status, reason), body in cases.items():
        answer = router.http.post("/api/create", json={"model": "new", **body})
        assert (answer.status_code, reason in answer.json()["error"]) == (status, True), (body, answer.text)
    for name in ("../x", "a b", "_x", "x" * 201, "a/b/c/d", "a:b:c", "", "é", "a/../b", "x\n"):
        answer = router.http.post("/api/create", json={"model": name, "from": "tiny"})
        assert answer.status_code == 400, name
    for body in ({"source": "nix", "destination": "x"}, {"source": "tiny", "destination": "hot"}):
        assert router.http.post("/api/copy", json=body).status_code in (404, 409)
    for junk_body in (b"", b"{", b"[]", b'{"model": 3}', b'{"files": [1]}', b"[" * 5000, b'{"source": "tiny"}'):
        for path in ("/api/create", "/api/copy"):
            answer = router.http.post(path, content=junk_body)
            assert (answer.status_code, type(answer.json()["error"])) == (400, str), (path, junk_body)
    assert set(cards(router)) == {"tiny", "hot", "kept"}
    for name in ("tiny", "hot"):
        with pytest.raises(ollama.ResponseError, match="neither pulled nor created") as error:
            client.delete(name)
        assert error.value.status_code == 404
    for unused in (projector, junk, part):  # they stay for a day
        (state / "blobs" / unused.replace(":", "-")).unlink()


def test_a_file_is_here_whole_or_not_at_all(router: Router, state: Path) -> None:
    content = b"x" * 3_000_000
    digest = hashlib.sha256(content).hexdigest()
    answer = router.http.post(f"/api/blobs/sha256:{digest}", content=content[:-1])
    assert (answer.status_code, "digest mismatch" in answer.json()["error"]) == (400, True)
    for wrong in ("sha256:12", "md5:" + "0" * 32, "sha256-../../created.json", f"sha256:{'g' * 64}", f"{ABSENT}0"):
        assert router.http.head(f"/api/blobs/{wrong}").status_code in (400, 404)
        assert router.http.post(f"/api/blobs/{wrong}", content=b"x").status_code in (400, 404)
    head = f"POST /api/blobs/sha256:{digest} HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(router.address) as cut:
        cut.sendall((head % len(content)).encode() + content[: len(content) // 2])
        eventually(lambda: any(name.endswith(".part") for name in files_in(state)))
    eventually(lambda: files_in(state) == [])
    with socket.create_connection(router.address) as vast:
        vast.sendall((head % (1 << 60)).encode())
        received = b""
        while b"}" not in received:
            received += vast.recv(65536)
    assert b" 507 " in received
    assert b"no room" in received
    assert files_in(state) == []


def test_no_key_for_inference_creates_anything(start: Start, tiny: Path) -> None:
    config = {"api": {"api_keys": ["full"], "inference_keys": ["some"]}, "models": models(tiny, "tiny")}
    router = start(config, LLAMA_ROUTER_STATE_DIR="")
    copied = {"source": "tiny", "destination": "x"}

    def statuses(key: str) -> list[int]:
        headers = {"Authorization": f"Bearer {key}"}
        return [
            router.http.head(f"/api/blobs/{ABSENT}", headers=headers).status_code,
            router.http.post(f"/api/blobs/{ABSENT}", content=b"x", headers=headers).status_code,
            router.http.post("/api/create", json={"model": "x", "from": "tiny"}, headers=headers).status_code,
            router.http.post("/api/copy", content=json.dumps(copied), headers=headers).status_code,
        ]

    assert statuses("some") == [403] * 4
    assert statuses("full") == [501] * 4  # without a state directory it would not last


# --- while things happen ----------------------------------------------------------------------------------


def test_requests_in_flight_finish_as_they_began(client: ollama.Client, router: Router, other: Path) -> None:
    digest = client.create_blob(other)
    client.create("busy", files={"a": digest}, parameters={"num_ctx": 512})
    stream = client.chat("busy", [USER], options={"num_predict": 150}, stream=True)
    next(stream)
    client.create("busy", from_="busy", parameters={"num_predict": 1, "num_batch": 64})  # another engine
    assert [part.eval_count for part in stream if part.done] == [150]
    assert length(client, "busy") == 1
    stream = client.chat("busy", [USER], options={"num_predict": 150}, stream=True)
    next(stream)
    client.delete("busy")
    assert "busy" not in cards(router)
    assert [part.eval_count for part in stream if part.done] == [150]
    eventually(lambda: len(router.engines) <= 1)


def test_of_changes_at_once_each_counts_and_one_is_the_last(client: ollama.Client, router: Router) -> None:
    def create(index: int) -> None:
        with ollama.Client(router.url, timeout=60) as own:
            own.create("contested", from_="tiny", parameters={"num_predict": index})
            own.create(f"own{index}", from_="tiny", parameters={"num_predict": index})

    threads = [threading.Thread(target=create, args=(index,)) for index in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [length(client, f"own{index}") for index in range(1, 5)] == [1, 2, 3, 4]
    assert length(client, "contested") in range(1, 5)


def test_what_was_created_outlives_the_router_and_yields_to_the_configuration(
    start: Start, tiny: Path, other: Path, tmp_path: Path
) -> None:
    state = str(tmp_path / "state")
    both = {**models(tiny, "tiny"), **models(other, "base")}

    def restarted(config: dict[str, Any], before: Router | None = None) -> tuple[Router, ollama.Client]:
        if before is not None:
            before.stop()
        router = start(config, LLAMA_ROUTER_STATE_DIR=state)
        return router, ollama.Client(router.url, timeout=60)

    router, client = restarted({"models": both})
    client.create("mine", files={"a": client.create_blob(other)}, template=JINJA, parameters={"num_predict": 2})
    client.create("more", from_="base", system="More.")
    client.create_blob(tiny)

    own = {"mine": {"flags": ["-c", "512"]}}  # as for pulled models, flags may be configured
    router, client = restarted({"models": {**both, **own}}, router)
    assert (length(client, "mine"), cards(router)["mine"]["context_length"]) == (2, 512)
    assert prompt(router, "mine", USER) == "<user>hi"
    assert cards(router)["more"]["uses"] == "base"

    router, client = restarted({"models": {**models(tiny, "tiny"), **models(tiny, "mine")}}, router)
    assert cards(router)["mine"]["source"] == "config.json"
    assert "the created model 'mine' is not served" in router.log
    with pytest.raises(ollama.ResponseError, match=r"refers to 'base', which no longer exists") as error:
        client.chat("more", [USER])
    assert error.value.status_code == 404
    assert "refers to 'base'" in router.chat("more").json()["error"]["message"]
    with pytest.raises(ollama.ResponseError, match="taken"):
        client.create("mine", from_="tiny")
    client.delete("more")
    client.delete("mine")  # the one that cannot be seen
    assert cards(router)["mine"]["source"] == "config.json"
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.delete("more")


def test_what_is_made_from_the_demo_outlives_the_router_too(start: Start, tmp_path: Path) -> None:
    state = tmp_path / "state"
    router = start(LLAMA_ROUTER_STATE_DIR=str(state))
    with ollama.Client(router.url, timeout=60) as client:
        client.create("mine", from_="demo", system="Be kind.", parameters={"num_ctx": 2048, "num_predict": 1})
        client.chat("mine", [USER])
        assert [model.context_length for model in client.ps().models] == [2048]  # of each of its two slots
        assert cards(router)["demo"]["context_length"] == 2048
        digest = client.create_blob(Path(__file__)).replace(":", "-")
    os.utime(state / "blobs" / digest, (0, 0))
    router.stop()
    (state / "created.json").rename(state / "kept")
    (state / "created.json").write_text("{")
    router = start(LLAMA_ROUTER_STATE_DIR=str(state))  # it starts all the same, and throws nothing away
    assert set(cards(router)) == {"demo", "demo-embed"}
    assert files_in(state) == [digest]
    router.stop()
    (state / "kept").rename(state / "created.json")
    (state / "created.json.broken").unlink()
    router = start(LLAMA_ROUTER_STATE_DIR=str(state))
    assert set(cards(router)) == {"demo", "demo-embed", "mine"}
    assert files_in(state) == []


def test_rm_removes_what_was_created_while_a_router_runs_and_after(
    start: Start, tiny: Path, other: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    config = {"api": {"api_keys": ["full"]}, "models": models(tiny, "tiny")}
    router = start(config, LLAMA_ROUTER_STATE_DIR=str(state))
    router.http.headers["Authorization"] = "Bearer full"
    with ollama.Client(router.url, timeout=60, headers={"Authorization": "Bearer full"}) as client:
        for path, name in ((other, "team/mine:v1"), (tiny, "later")):
            client.create(name, files={"a": client.create_blob(path)})
        client.copy("tiny", "more")

    def rm(name: str) -> tuple[int, str]:
        environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LLAMA_ROUTER_STATE_DIR": str(state)}
        command = [sys.executable, str(ROOT / "run.py"), "rm", name]  # config.json is where it is called
        ended = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
        return ended.returncode, ended.stdout + ended.stderr

    assert rm("team/mine:v1")[0] == 0
    assert rm("more:latest") == (0, "more was removed, 0 B freed\n")
    assert set(cards(router)) == {"tiny", "later"}  # at once
    assert len(files_in(state)) == 1
    assert rm("tiny") == (
        1,
        "llama-router: no model was pulled as 'tiny'; pulled are: none; created models: later\n",
    )
    router.stop()
    code, said = rm("later")
    assert (code, said.startswith("later was removed, ")) == (0, True), said
    assert (files_in(state), json.loads((state / "created.json").read_text())) == ([], {})
    assert rm("later")[0] == 1


def test_files_of_no_use_go_after_a_while(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    used, fresh, old = (blobs.add(content) for content in (b"used", b"fresh", b"old"))
    for digest in (used, old):
        os.utime(blobs.path(digest), (time.time() - 100, time.time() - 100))
    (tmp_path / "left-half.part").write_bytes(b"x")
    blobs.sweep([used], 50.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"sha256-{digest}" for digest in (used, fresh)
    )


def test_a_state_directory_that_waits_for_a_restart_takes_nothing_away(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    config = {"system": {"state_dir": "here"}, "models": models(tiny, "tiny")}
    router = start(config, LLAMA_ROUTER_STATE_DIR="")
    with ollama.Client(router.url, timeout=60) as client:
        client.copy("tiny", "made")
        (tmp_path / "config.json").write_text(json.dumps({**config, "system": {"state_dir": "there"}}))
        reloaded = router.http.post("/v1/config/reload").json()
        assert (reloaded["removed"], reloaded["needs_restart"]) == ([], ["system.state_dir"])
        client.copy("tiny", "made-later")
    assert {"made", "made-later"} <= set(cards(router))
