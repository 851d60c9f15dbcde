"""Suggestions for mistyped model names."""

from __future__ import annotations

import itertools
import time

from router.catalog.near_names import near

MANY = [
    f"{user}/{family}-{size}{kind}-GGUF:{quant}"
    for user, family, size, kind, quant in itertools.product(
        ("unsloth", "bartowski", "ggml-org", "lmstudio-community"),
        ("Qwen3", "Qwen2.5", "Llama-3.2", "gemma-3", "Mistral-Small", "Phi-4", "DeepSeek-R1"),
        ("0.6B", "1.7B", "4B", "8B", "14B", "32B"),
        ("", "-Instruct", "-Thinking", "-Coder", "-it"),
        ("Q4_K_M", "Q8_0", "Q5_K_S", "Q6_K", "IQ4_XS", "BF16"),
    )
]


def test_the_name_that_was_meant_is_found_among_thousands_and_at_once() -> None:
    name = "ggml-org/Qwen3-14B-Coder-GGUF:Q6_K"
    near("whatever", MANY)
    began = time.monotonic()
    for place in range(len(name)):
        assert name in near(f"{name[:place]}#{name[place:]}", MANY)
    assert time.monotonic() - began < 0.1 * len(name)  # comparing all would take twice that, on a fast machine
    assert near(name.lower().replace("ggml", "gml"), MANY, 1) == [name]


def test_what_is_like_nothing_finds_nothing() -> None:
    assert near("gpt-4o", MANY) == []
    assert near("x" * 256, MANY) == []
    assert near("demo", []) == []


def test_of_a_few_names_the_closest_comes_first() -> None:
    assert near("llama3", ["llama-3.1", "llama-3", "mistral"]) == ["llama-3", "llama-3.1"]
