"""Ollama's Modelfiles."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.formats.modelfile import BadModelfile, parameter_lines, parsed

PIRATE = '''
# A pirate.
FROM ./qwen.gguf
from mmproj.gguf
SYSTEM """You are
a "pirate"."""
PARAMETER temperature 0.7
parameter num_ctx 4096
PARAMETER stop "<|end|>"
PARAMETER stop Aye
PARAMETER use_mmap false
TEMPLATE "{% for message in messages %}
{% endfor %}"
MESSAGE user 2 + 2?
MESSAGE assistant """Four,
matey."""
LICENSE MIT
LICENSE """
BSD
"""
'''


def test_everything_in_a_modelfile() -> None:
    made = parsed(PIRATE)
    assert made.sources == [(3, "./qwen.gguf"), (4, "mmproj.gguf")]
    assert made.parameters == {"temperature": 0.7, "num_ctx": 4096, "stop": ["<|end|>", "Aye"], "use_mmap": False}
    assert made.messages == [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "Four,\nmatey."},
    ]
    assert made.licenses == ["MIT", "\nBSD\n"]
    assert made.others == {
        "system": 'You are\na "pirate".',
        "template": "{% for message in messages %}\n{% endfor %}",
    }
    assert parsed(PIRATE.replace("\n", "\r\n")) == made


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1: there is no FROM"),
        ("FROM a\n\nSYSTM b", "line 3: 'SYSTM' is no instruction of a Modelfile"),
        ('FROM a\nSYSTEM """b', 'line 2: the text that begins with """ has no end'),
        ("FROM a\nPARAMETER stop", "line 2: PARAMETER takes a name and a value"),
        ("FROM a\nMESSAGE narrator hi", "line 2: MESSAGE takes a role"),
        ("FROM", "line 1: FROM needs a value"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(BadModelfile, match=problem):
        parsed(text)


TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"], include_characters="\n\"'\\#"), min_size=1).filter(
    lambda text: '"""' not in text and not text.startswith('"') and not text.endswith('"') and text.strip()
)


@given(st.lists(TEXTS, min_size=1, max_size=3), st.integers(), st.booleans())
def test_parameters_are_read_as_they_are_written(stops: list[str], seed: int, mapped: bool) -> None:
    given: dict[str, Any] = {"stop": stops, "seed": seed, "use_mmap": mapped}
    lines = "".join(f"PARAMETER {line}\n" for line in parameter_lines(given))
    assert parsed(f"FROM a\n{lines}").parameters == given
