"""Stories about aliases: additional names of a model, and their changes to requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Router, Start, eventually, models
from tiny_models import write_lora

from router.config.resolved import AliasConfig, Config
from router.dataplane.rewriting import rewritten
from router.dataplane.routing import Wish, read_wish
from router.engines.llamacpp.model import LlamaCppModel
from router.http.routes import ROUTES
from router.scheduling.queue import Priority

EXAMPLES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
ALIASES: dict[str, Any] = {
    "gpt-4o-mini": "a",
    "short": {"uses": "a", "defaults": {"max_tokens": 2}},
    "shortest": {"uses": "a", "forced": {"max_tokens": 1}},
    "one": {"uses": "a", "removed": ["temperature"], "priority": "low", "description": "One at a time"},
    "pirate": {"uses": "a", "system_prompt": "You are a pirate."},
    "only-pirate": {"uses": "a", "system_prompt": "You are a pirate.", "system_prompt_replaces": True},
    "polite": {"uses": "a", "system_prompt": "Be kind.", "system_prompt_yields": True, "messages": EXAMPLES},
}


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    return start_shared({"models": models(tiny, "a", description="A model"), "aliases": ALIASES})


def tokens(router: Router, model: str, **more: Any) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    answer = router.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    count: int = answer.json()["usage"]["completion_tokens"]
    return count


def prompt(router: Router, model: str, *messages: dict[str, Any]) -> str:
    answer = router.http.post("/apply-template", json={"model": model, "messages": messages})
    text: str = answer.json()["prompt"]
    return text


def test_all_names_of_a_model_share_its_engine(router: Router) -> None:
    answers = [router.chat(name) for name in ("a", *ALIASES)]
    assert [answer.status_code for answer in answers] == [200] * 8
    assert {answer.headers["x-model-alias"] for answer in answers} == {"a"}
    assert len(router.engines) == 1
    assert 'model="a"' in router.http.get("/metrics").text
    assert "gpt-4o-mini" not in router.http.get("/metrics").text


def test_a_default_holds_until_the_client_says_otherwise(router: Router) -> None:
    assert tokens(router, "short") == 2
    assert tokens(router, "short", max_tokens=None) == 2
    assert tokens(router, "short", max_tokens=3) == 3


def test_what_is_forced_holds_whatever_the_client_says(router: Router) -> None:
    assert tokens(router, "shortest", max_tokens=3) == 1
    stream = router.chat("shortest", max_tokens=3, stream=True, stream_options={"include_usage": True})
    assert '"completion_tokens":1' in stream.text


def test_what_is_removed_never_reaches_the_engine(router: Router) -> None:
    assert router.chat("short", temperature="hot").status_code == 400
    assert router.chat("one", temperature="hot").status_code == 200


def test_a_system_prompt_goes_before_the_clients_own(router: Router) -> None:
    user = {"role": "user", "content": "hi"}
    own = {"role": "system", "content": "Be kind."}
    plain = prompt(router, "a", {"role": "system", "content": "You are a pirate."}, user)
    assert prompt(router, "pirate", user) == plain
    assert prompt(router, "only-pirate", own, user) == plain
    both = prompt(router, "a", {"role": "system", "content": "You are a pirate.\n\nBe kind."}, user)
    assert prompt(router, "pirate", own, user) == both


def test_examples_and_a_system_prompt_that_yields(router: Router) -> None:
    user = {"role": "user", "content": "hi"}
    own, kind = ({"role": "system", "content": text} for text in ("Be brief.", "Be kind."))
    assert prompt(router, "polite", user) == prompt(router, "a", kind, *EXAMPLES, user)
    assert prompt(router, "polite", own, user) == prompt(router, "a", own, *EXAMPLES, user)


def test_a_system_prompt_reaches_every_way_to_chat(router: Router) -> None:
    def counted(path: str, model: str, **body: Any) -> int:
        count: int = router.http.post(path, json={"model": model, **body}).json()["input_tokens"]
        return count

    turns = [{"role": "user", "content": "hi"}]
    path = "/v1/messages/count_tokens"
    assert counted(path, "a", messages=turns) < counted(path, "pirate", messages=turns)
    said = counted(path, "a", messages=turns, system="You are a pirate.")
    assert counted(path, "pirate", messages=turns) == said
    path = "/v1/responses/input_tokens"
    said = counted(path, "a", input="hi", instructions="You are a pirate.")
    assert counted(path, "pirate", input="hi") == said
    assert counted(path, "only-pirate", input="hi", instructions="Be kind.") == said
    turns = [*EXAMPLES, {"role": "user", "content": "hi"}]
    said = counted("/v1/messages/count_tokens", "a", messages=turns, system="Be kind.")
    assert counted("/v1/messages/count_tokens", "polite", messages=turns[2:]) == said
    assert counted(path, "polite", input="hi") == said
    assert counted(path, "polite", input=turns[2:], instructions="Be kind.") == said


def test_a_system_prompt_is_nothing_to_routes_without_messages(router: Router) -> None:
    texts = [
        router.http.post("/tokenize", json={"model": model, "content": "ab"}).json()["tokens"]
        for model in ("a", "pirate")
    ]
    assert texts[0] == texts[1]


def test_aliases_are_listed_with_what_they_stand_for(router: Router) -> None:
    router.chat("a")
    cards = {card["id"]: card for card in router.http.get("/v1/models").json()["data"]}
    assert list(cards) == ["a", *ALIASES]
    assert "uses" not in cards["a"]
    assert {cards[name]["uses"] for name in ALIASES} == {"a"}
    assert {card["state"] for card in cards.values()} == {"ready"}
    assert cards["one"]["description"] == "One at a time"
    assert cards["pirate"]["description"] == "A model"
    assert router.http.get("/v1/models/one").json() == cards["one"]
    assert "pirate" in router.http.get("/openapi.json").json()["components"]["schemas"]["Alias"]["enum"]


def test_an_alias_manages_the_model_it_stands_for(router: Router) -> None:
    assert router.http.post("/v1/models/load", json={"model": "pirate"}).json()["model"] == "a"
    assert router.http.get("/v1/models/pirate/status").json()["model"] == "a"
    eventually(lambda: "loading model" in router.http.get("/v1/logs/pirate").text)
    assert router.http.get("/vram/models/pirate").json()["model_alias"] == "a"
    assert router.http.post("/v1/models/eject", json={"model": "short"}).json()["model_ejected"] == "a"


def test_a_name_nobody_knows_is_answered_with_close_ones(router: Router) -> None:
    answer = router.chat("gpt-4o-mimi")
    assert answer.status_code == 404
    assert "gpt-4o-mini" in answer.json()["error"]["message"]


def test_a_form_is_routed_by_an_alias_and_not_rewritten(router: Router) -> None:
    files = {"file": ("a.wav", b"RIFF" + b"\0" * 1000)}
    answer = router.http.post("/v1/audio/transcriptions", data={"model": "shortest"}, files=files)
    assert answer.headers["x-model-alias"] == "a"
    assert answer.status_code != 404


@pytest.mark.parametrize(
    "kind", ["multipart/form-data; Boundary=xyz", 'multipart/form-data; charset=utf-8; BOUNDARY="xyz"']
)
def test_an_engine_reads_a_form_however_its_kind_is_written(router: Router, kind: str) -> None:
    field = b"--xyz\r\nContent-Disposition: form-data; name=model\r\n\r\nshortest\r\n"
    file = b"--xyz\r\nContent-Disposition: form-data; name=file; filename=a.wav\r\n\r\nRIFF\r\n--xyz--\r\n"
    answer = router.http.post("/v1/audio/transcriptions", content=field + file, headers={"Content-Type": kind})
    assert answer.json()["error"]["message"] == "The current model does not support audio input."


def test_ollamas_clients_know_aliases_too(router: Router) -> None:
    listed = [model["name"] for model in router.http.get("/api/tags").json()["models"]]
    assert listed == [f"{name}:latest" for name in ("a", *ALIASES)]
    details = router.http.post("/api/show", json={"model": "pirate"}).json()["details"]
    of_the_model = router.http.post("/api/show", json={"model": "a"}).json()["details"]
    assert details == {**of_the_model, "parent_model": "a"}

    def counts(model: str, **more: Any) -> tuple[int, int]:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False, **more}
        answer = router.http.post("/api/chat", json=body).json()
        return answer["prompt_eval_count"], answer["eval_count"]

    limit = {"options": {"num_predict": 3}}
    prompt, _ = counts("a", **limit)
    assert counts("shortest", **limit) == (prompt, 1)
    assert counts("pirate:latest", **limit)[0] > prompt
    assert router.http.post("/api/chat", json={"model": "short", "messages": []}).json()["done"]
    assert tokens(router, "shortest:latest", max_tokens=3) == 1  # as they call it on OpenAI's routes
    assert router.chat("nobody:latest").status_code == 404


def test_a_changed_alias_restarts_nothing(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"models": models(tiny, "a"), "aliases": ALIASES})
    assert tokens(router, "shortest") == 1
    engines = [engine.pid for engine in router.engines]
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["aliases"] = {"shortest": {"uses": "a", "forced": {"max_tokens": 4}}, "new": "a"}
    path.write_text(json.dumps(config))
    changes = router.http.post("/v1/config/reload").json()
    assert changes["changed"] == ["shortest"]
    assert changes["added"] == ["new"]
    assert "gpt-4o-mini" in changes["removed"]
    assert tokens(router, "shortest") == 4
    assert router.chat("new").status_code == 200
    assert router.chat("gpt-4o-mini").status_code == 404
    assert [engine.pid for engine in router.engines] == engines


# --- the body itself ------------------------------------------------------------------------------------------


CONFIG = Config(
    models={"a": LlamaCppModel("a", Path("a.gguf"), (), priority="high")},
    aliases={
        "plain": AliasConfig("plain", "a"),
        "low": AliasConfig("low", "a", priority="low", removed=("seed",)),
    },
)


def test_only_a_name_that_changes_something_touches_the_body() -> None:
    for name in ("a", "plain"):
        wish = read_wish(b'{"model": "%b"}' % name.encode(), {}, CONFIG)
        assert wish == Wish("a", False, Priority.HIGH)
    wish = read_wish(b'{"model": "low"}', {}, CONFIG)
    assert (wish.alias, wish.priority, wish.asked_as) == ("a", Priority.LOW, CONFIG.aliases["low"])
    assert read_wish(b'{"model": "low"}', {b"x-request-priority": b"1"}, CONFIG).priority is Priority.HIGH


def test_an_alias_with_the_name_of_its_model_holds_for_all_who_ask_for_it() -> None:
    own = AliasConfig("a", "a", defaults={"seed": 1})
    config = Config(models=CONFIG.models, aliases={"a": own})
    assert read_wish(b'{"model": "a"}', {}, config) == Wish("a", False, Priority.HIGH, own)
    assert config.names == ["a"]


@pytest.mark.parametrize("known_as", [None, "whisper-1"])
def test_a_model_is_asked_at_the_routes_of_its_engine_whatever_its_engine_calls_it(known_as: str | None) -> None:
    routes = frozenset({"/v1/audio/speech"})
    model = LlamaCppModel("a", Path("a.gguf"), (), routes=routes, known_as=known_as)
    assert read_wish(b'{"model": "a"}', {}, Config(models={"a": model})).routes == routes


def change(body: Any, path: str = "/v1/chat/completions", **alias: Any) -> Any:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return msgspec.json.decode(rewritten(raw, ROUTES[path].conversation, AliasConfig("x", "a", **alias)))


def test_what_is_not_changed_stays_as_its_bytes_are() -> None:
    odd = b'{"model":"x","n":1.50e+01,"messages":[ {"content" : "\\u00e9"} ],"seed":1}'
    kept = rewritten(odd, None, AliasConfig("x", "a", removed=("seed",)))
    assert kept == b'{"model":"x","n":1.50e+01,"messages":[ {"content" : "\\u00e9"} ]}'
    prompted = rewritten(
        odd, ROUTES["/v1/chat/completions"].conversation, AliasConfig("x", "a", system_prompt="P")
    )
    assert b'{"content" : "\\u00e9"}]' in prompted
    assert b"1.50e+01" in prompted


def test_a_key_given_twice_cannot_get_past_what_is_forced() -> None:
    assert change(b'{"n": 5, "n": 6}', forced={"n": 1}) == {"n": 1}
    assert change(b'{"n": 5, "\\u006e": 6}', removed=("n",)) == {}


def test_a_length_cannot_get_past_what_is_forced_under_another_name() -> None:
    asked = {"max_completion_tokens": 9, "n_predict": 9}
    assert change(asked, forced={"max_tokens": 1}) == {"max_tokens": 1}
    assert change(asked, removed=("max_tokens",)) == {}
    assert change({"n_predict": 9}, defaults={"max_tokens": 1}) == {"n_predict": 9}


def test_a_prompt_in_parts_gets_one_more_part() -> None:
    parts = [{"type": "text", "text": "Be kind."}]
    first = {"type": "text", "text": "P\n\n"}
    body = {"messages": [{"role": "developer", "content": parts, "name": "n"}, {"role": "user"}]}
    changed = change(body, system_prompt="P")
    assert changed["messages"][0] == {"role": "developer", "content": [first, *parts], "name": "n"}
    assert change({"system": parts}, "/v1/messages", system_prompt="P")["system"] == [first, *parts]


def test_prompts_that_are_replaced_go_wherever_they_stand() -> None:
    late = [{"role": "user"}, {"role": "system", "content": "x"}, {"role": "developer", "content": "y"}]
    alias = {"system_prompt": "P", "system_prompt_replaces": True}
    prompts = [{"role": "system", "content": "P"}, {"role": "user"}]
    assert change({"messages": late}, **alias)["messages"] == prompts
    assert change({"input": late}, "/v1/responses", **alias) == {"input": [{"role": "user"}], "instructions": "P"}


@pytest.mark.parametrize("messages", ["text", 7, {"role": "system"}])
def test_messages_of_another_shape_are_left_to_the_engine(messages: Any) -> None:
    assert change({"messages": messages}, system_prompt="P") == {"messages": messages}
    assert change({"messages": messages}, system_prompt="P", system_prompt_replaces=True) == {"messages": messages}


@pytest.mark.parametrize("turn", [7, None, "system", [], {"role": ["system"]}])
def test_turns_of_another_shape_are_left_to_the_engine(turn: Any) -> None:
    prompt = {"role": "system", "content": "P"}
    assert change({"messages": [turn]}, system_prompt="P") == {"messages": [prompt, turn]}


def test_a_forced_system_field_is_a_systems_prompt_like_any() -> None:
    changed = change({"system": "mine"}, "/v1/messages", forced={"system": "forced"}, system_prompt="P")
    assert changed == {"system": "P\n\nforced"}


# --- adapters -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(start_shared: Start, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Router:
    """Two names of a model with an adapter: one that is computed with it, and one without."""
    lora = write_lora(tmp_path_factory.mktemp("adapter") / "lora.gguf")
    own = models(tiny, "adapted", flags=["-np", "1", "--lora", str(lora)])
    plain = {"uses": "adapted", "forced": {"lora": [{"id": 0, "scale": 0.0}]}}
    return start_shared({"models": own | models(tiny, "bare"), "aliases": {"plain": plain}})


def test_names_of_a_model_with_adapters_do_not_speak_with_each_others_voice(adapted: Router) -> None:
    def said(model: str, **more: Any) -> str:
        answer = adapted.chat(
            model, content="one and the same long beginning", max_tokens=24, temperature=0, **more
        )
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text

    bare = said("bare")
    alone = said("adapted")
    assert alone != bare
    for _ in range(2):  # in turn, on one slot, whose cache begins alike
        assert said("plain") == bare
        assert said("adapted") == alone
        assert said("adapted", lora=[]) == alone
    assert said("adapted", lora=[{"id": 0, "scale": 0}]) == bare
    generated = {"model": "adapted", "stream": False, "options": {"num_predict": 24, "temperature": 0}}
    prompt = "one and the same long beginning"
    assert adapted.http.post("/api/generate", json={**generated, "prompt": prompt}).json()["response"] == alone
    said("plain")
    message = {"model": "adapted", "max_tokens": 24, "temperature": 0}
    answer = adapted.http.post("/v1/messages", json={**message, "messages": [{"role": "user", "content": prompt}]})
    assert answer.json()["content"] == [{"type": "text", "text": alone}]
