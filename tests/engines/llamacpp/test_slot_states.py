"""Conversations survive swaps, crashes and restarts on the real engine."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Router, Start, eventually, models

from router.engines.llamacpp import slot_states
from router.engines.llamacpp.flags import Flags

TEXT = " ".join(f"word{number}" for number in range(150))
"""Some 1,200 tokens of the tiny model, which knows bytes only."""
FLAGS = ["-c", "4096", "-t", "1"]


@pytest.fixture(scope="module")
def router(start_shared: Start, tiny: Path) -> Router:
    entries = models(tiny, "a", "b", flags=FLAGS) | models(tiny, "two", flags=[*FLAGS, "-np", "2"])
    return start_shared({"system": {"max_concurrent_models": 1}, "models": entries})


class Conversation:
    """A client that sends its history with each turn, and gets the same answers every time."""

    def __init__(self, router: Router, model: str, begin: str) -> None:
        self.router = router
        self.model = model
        self.messages = [{"role": "user", "content": f"{begin} {TEXT}"}]

    def turn(self, **more: Any) -> tuple[str, int, int]:
        """Return where the beginning came from, and its cached and all tokens."""
        body = {"model": self.model, "messages": self.messages, "max_tokens": 4, "temperature": 0}
        answer = self.router.http.post("/v1/chat/completions", json=body, **more)
        assert answer.status_code == 200, answer.text
        said = answer.json()
        self.messages += [
            {"role": "assistant", "content": said["choices"][0]["message"]["content"]},
            {"role": "user", "content": "go on"},
        ]
        timings = said["timings"]
        return answer.headers["x-kv"], timings["cache_n"], timings["cache_n"] + timings["prompt_n"]


def test_a_conversation_goes_on_after_a_swap(router: Router) -> None:
    one, other = Conversation(router, "a", "A"), Conversation(router, "b", "B")
    assert one.turn()[:2] == ("none", 0)
    assert other.turn()[:2] == ("none", 0)
    for conversation in (one, other, one):
        source, cached, tokens = conversation.turn()
        assert source == "disk"
        assert cached > 0.9 * tokens


def test_two_slots_keep_two_conversations(router: Router) -> None:
    one, other = Conversation(router, "two", "C"), Conversation(router, "two", "D")
    for conversation in (one, other):
        assert conversation.turn()[0] == "none"
    for conversation in (one, other):
        source, cached, tokens = conversation.turn()
        assert source == "slot"
        assert cached > 0.9 * tokens
    assert router.chat("a").status_code == 200  # a swap
    for conversation in (other, one):
        source, cached, tokens = conversation.turn()
        assert source == "disk"
        assert cached > 0.9 * tokens


def test_answers_are_the_same_with_a_restored_state(router: Router) -> None:
    one = Conversation(router, "a", "E")
    one.turn()
    router.unload()
    messages = one.messages
    source, *_ = one.turn()
    restored = one.messages[-2]
    router.unload()
    one.messages = messages[:3]
    answer = router.http.post(
        "/v1/chat/completions",
        json={"model": "a", "messages": one.messages, "max_tokens": 4, "temperature": 0, "cache_prompt": False},
    )
    assert source == "disk"
    assert answer.json()["choices"][0]["message"]["content"] == restored["content"]


def test_other_apis_find_their_conversations(router: Router) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": f"F {TEXT}"}),
        ("/completion", {"prompt": f"G {TEXT}"}),
        ("/v1/responses", {"input": f"H {TEXT}"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": f"I {TEXT}"}], "max_tokens": 4}),
        ("/api/chat", {"messages": [{"role": "user", "content": f"J {TEXT}"}], "stream": False}),
    ):
        limit = {"max_tokens": 4, "max_output_tokens": 4, "n_predict": 4, "options": {"num_predict": 4}}
        body = {"model": "a", **limit, **body}
        sources = []
        for _ in range(2):
            answer = router.http.post(path, json=body)
            assert answer.status_code == 200, (path, answer.text)
            sources.append(answer.headers["x-kv"])
            router.unload()
        assert sources == ["none", "disk"], path


def test_no_store_leaves_nothing(router: Router) -> None:
    one = Conversation(router, "a", "K")
    forbids = {"headers": {"X-KV-Store": "no-store"}}
    one.turn(**forbids)
    router.unload()
    assert one.turn(**forbids)[:2] == ("none", 0)


def test_what_the_engine_kept_in_ram_is_told_when_it_is_known(router: Router) -> None:
    forbids = {"headers": {"X-KV-Store": "no-store"}}
    one, other = Conversation(router, "a", "L"), Conversation(router, "a", "M")
    other.messages[0]["content"] = "N" * 600
    one.turn(**forbids)
    other.turn(**forbids)
    source, cached, tokens = one.turn(**forbids)
    assert source == "none"
    assert cached > 0.9 * tokens
    eventually(lambda: '"kv":"ram"' in router.log)


def test_nothing_is_lost_with_a_killed_engine_and_router(start: Start, tiny: Path, tmp_path: Path) -> None:
    config = {"models": models(tiny, "a", flags=FLAGS)}
    state = str(tmp_path / "state")
    router = start(config, LLAMA_ROUTER_STATE_DIR=state)
    one = Conversation(router, "a", "A")
    one.turn()
    folder = Path(state, "kv")
    eventually(lambda: len(list(folder.glob("*.json"))) == 1)
    body = {"model": "a", "messages": one.messages, "stream": True, "max_tokens": 2000, "ignore_eos": True}
    with router.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        router.engines[0].kill()
        assert any("engine_lost" in line for line in lines)
    source, cached, tokens = one.turn()
    assert (source, cached > 0.9 * tokens) == ("disk", True)
    eventually(lambda: len(list(folder.glob("*.json"))) == 1)
    router.process.send_signal(signal.SIGKILL)
    router.process.wait()
    one.router = again = start(config, LLAMA_ROUTER_STATE_DIR=state)
    source, cached, tokens = one.turn()
    assert (source, cached > 0.9 * tokens) == ("disk", True)

    # A state that was truncated, or in which a bit was flipped, costs nobody an error.
    for damage in (lambda file: os.truncate(file, 1000), _flip):
        again.unload()
        (kept,) = folder.glob("*.kv")
        damage(kept)
        assert one.turn()[:2] == ("none", 0)
        eventually(lambda: not kept.exists())  # noqa: B023


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_a_smaller_context_cannot_hold_is_left_to_a_larger_one(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    def configured(context: int) -> dict[str, Any]:
        flags = ["-c", str(context), "-t", "1"]
        return {"kv_store": {"min_tokens": 64}, "models": models(tiny, "a", flags=flags)}

    router = start(configured(4096))

    def source(prompt: str) -> str:
        answer = router.http.post("/completion", json={"model": "a", "prompt": prompt, "n_predict": 2})
        assert answer.status_code == 200, answer.text
        router.unload()
        return answer.headers["x-kv"]

    assert source(TEXT) == "none"
    for context, prompt, expected in ((1024, TEXT[:700], "none"), (4096, f"{TEXT}!", "disk")):
        (tmp_path / "config.json").write_text(json.dumps(configured(context)))
        assert router.http.post("/v1/config/reload").status_code == 200
        assert source(prompt) == expected


def test_clients_with_keys_do_not_find_each_others_conversations(start: Start, tiny: Path) -> None:
    keys = {
        "inference_keys": ["one", "other"],
        "api_keys": ["all"],
        "clients": {"never": {"key": "never", "kv_store": False}},
    }
    router = start({"api": keys, "models": models(tiny, "a", flags=FLAGS)})
    router.http.headers["authorization"] = "Bearer all"

    def source(key: str) -> str:
        headers = {"Authorization": f"Bearer {key}"}
        found = Conversation(router, "a", "A").turn(headers=headers)[0]
        router.unload()
        return found

    assert [source(key) for key in ("one", "other", "one", "never", "never")] == [
        "none",
        "none",
        "disk",
        "none",
        "none",
    ]


def test_a_switched_off_store_writes_nothing(start: Start, tiny: Path, tmp_path: Path) -> None:
    router = start({"kv_store": {"enabled": False}, "models": models(tiny, "a", flags=FLAGS)})
    answer = router.chat("a", content=TEXT)
    assert "x-kv" not in answer.headers
    router.unload()
    assert list(tmp_path.glob("state-*/kv/*.kv")) == []


def test_groups_tell_apart_what_an_engine_would_confuse() -> None:
    files = (("/m.gguf", 5, 7),)
    group = slot_states.group(files, "build", Flags(FLAGS))
    assert group == slot_states.group(files, "build", Flags(["-c", "512", "-t", "4", "-ngl", "3", "--temp", "0"]))
    assert group != slot_states.group((("/m.gguf", 5, 8),), "build", Flags(FLAGS))
    assert group != slot_states.group(files, "other build", Flags(FLAGS))
    for more in (
        ["-np", "2"],
        ["-ctk", "q8_0"],
        ["-fa", "on"],
        ["--lora", "l.gguf"],
        ["--lora-scaled", "l.gguf:0.5"],
        ["--rope-freq-base", "5000"],
        ["--swa-full"],
        ["-kvu"],
    ):
        assert group != slot_states.group(files, "build", Flags([*FLAGS, *more])), more


def test_some_engines_cannot_save() -> None:
    one = [*FLAGS, "-np", "1"]
    assert slot_states.can_be_saved(Flags(one))
    assert slot_states.can_be_saved(Flags([*one, "-kvu"]))
    for more in (["-np", "4", "-kvu"], ["-np", "-1"]):  # these move their idle slots into RAM
        assert not slot_states.can_be_saved(Flags([*one, *more])), more
    for more in (["--mmproj", "p.gguf"], ["--embedding"], ["--reranking"], ["--slot-save-path", "/mine"]):
        assert not slot_states.can_be_saved(Flags([*one, *more])), more
