"""Members of an enumeration of words are the words, wherever they are written."""

from __future__ import annotations

import json

import msgspec
import pytest

from router.config.source import Source
from router.observe.events import Breakdown, Outcome, ServerState
from router.scheduling.messages import EngineState, ModelState, Refusal, Retry, StopCause
from router.scheduling.residency import Hold
from router.system.words import Word

KINDS = (Breakdown, EngineState, Hold, ModelState, Outcome, Refusal, Retry, ServerState, Source, StopCause)


@pytest.mark.parametrize("word", [word for kind in KINDS for word in kind])
def test_a_word_is_written_as_it_is_spelled(word: Word) -> None:
    text = word.value
    assert f"{word}" == f"{word:s}" == str(word) == "%s" % word == text  # noqa: UP031
    assert json.loads(json.dumps({word: [word]})) == {text: [text]}
    assert msgspec.json.decode(msgspec.json.encode({text: word})) == {text: text}
    assert {text: 1}[word] == {word: 1}[text] == 1, "as a key of what came from outside, too"


def test_the_states_of_engines_are_states_of_their_models() -> None:
    assert [ModelState(state) for state in EngineState] == [ModelState[state.name] for state in EngineState]
