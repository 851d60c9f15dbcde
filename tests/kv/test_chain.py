"""Conversations are recognized by the beginning of a request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.kv.chain import BLOCK, SHORTEST, chain_of, common, covered

KEY = b"k" * 32
LONG = " ".join(f"word{number}" for number in range(600))


def chain(*messages: str, key: bytes = KEY, **more: Any) -> tuple[int, ...]:
    roles = ("user", "assistant")
    told = [{"role": roles[place % 2], "content": text} for place, text in enumerate(messages)]
    found = chain_of(json.dumps({"model": "m", "messages": told, **more}).encode(), key)
    assert found is not None
    return found


def test_the_next_request_of_a_conversation_has_all_blocks_of_the_last() -> None:
    first = chain(LONG)
    assert len(first) == 2 + len(LONG) // BLOCK
    assert common(first, chain(LONG, "Fine.", "go on")) == len(first)


def test_an_edited_last_message_finds_its_history() -> None:
    one, other = chain(LONG, "Fine.", "A" * 3000), chain(LONG, "Fine.", "B" * 3000)
    assert 0 < common(one, other) < len(one)
    assert covered(common(one, other)) > len(LONG) - BLOCK


def test_a_message_edited_in_its_middle_keeps_what_is_before() -> None:
    edited = LONG[:2500] + "changed" + LONG[2500:]
    assert covered(common(chain(LONG), chain(edited))) == 2 * BLOCK


@pytest.mark.parametrize("covers", range(7))
def test_blocks_cover_bytes(covers: int) -> None:
    text = "x" * covered(covers)
    body = b'{"prompt": "' + text.encode() + b'"}'
    assert len(chain_of(body, KEY) or ()) == covers


def test_what_comes_before_the_messages_is_part_of_all_digests() -> None:
    plain = chain(LONG)
    for more in (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"lora": [{"id": 0, "scale": 0.5}]},
        {"system": "Be brief."},
    ):
        assert common(plain, chain(LONG, **more)) == 0
    assert chain(LONG, temperature=0.5, stream=True, max_tokens=3) == plain


def test_digests_of_another_folder_cannot_be_compared() -> None:
    assert common(chain(LONG), chain(LONG, key=b"other")) == 0


@pytest.mark.parametrize(
    "more",
    [
        {"id_slot": 1},
        {"n": 2},
        {"n_cmpl": 3},
        {"cache_prompt": False},
        {"previous_response_id": "r"},
        {"prompt": ["one", "other"]},
        {"prompt": [[1, 2], [3]]},
    ],
)
def test_requests_whose_slot_cannot_be_chosen_have_no_chain(more: dict[str, Any]) -> None:
    for content in (LONG, "hi"):
        body = {"messages": [{"role": "user", "content": content}], **more}
        assert chain_of(json.dumps(body).encode(), KEY) is None


@pytest.mark.parametrize("body", [b"[]", b"model=m", b"\xff", b'{"messages": ' + b" " * SHORTEST])
def test_unreadable_bodies_have_no_chain(body: bytes) -> None:
    assert chain_of(body, KEY) is None


def test_prompts_without_text_have_an_empty_chain() -> None:
    assert chain_of(b'{"prompt": ""}', KEY) == ()
    assert chain_of(b"{}", KEY) == ()


def test_the_code_around_a_gap_is_no_conversation() -> None:
    body = {"input_prefix": LONG, "input_suffix": LONG, "prompt": LONG}
    assert chain_of(json.dumps(body).encode(), KEY) == ()


def test_a_list_of_tokens_is_a_beginning_too() -> None:
    def of(*tokens: int) -> tuple[int, ...]:
        return chain_of(json.dumps({"prompt": tokens}).encode(), KEY) or ()

    first = of(*range(1000))
    assert len(first) > 4
    assert common(first, of(*range(1200))) == len(first)
