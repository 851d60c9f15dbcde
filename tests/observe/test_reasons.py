"""Reasons in full and as everybody hears them."""

from __future__ import annotations

from router.observe.reasons import Problem, Reason, Reasons


def test_a_reason_is_put_in_in_full_where_it_is_told_of_its_model_only() -> None:
    reasons = Reasons()
    reasons.note("a", Reason("exited with code 11: no /models/a.gguf", "exited with code 11"))
    reasons.note("a", Reason("exited with code 1: \x1b[2Jgone", "exited with code 1"))
    reasons.note("a", Reason("it was asked to go", "it was asked to go"))
    crashed = "'a' crashed 3 times, the last time: exited with code 11"
    assert reasons.in_full("a", crashed) == f"{crashed}: no /models/a.gguf"
    assert reasons.in_full("a", reasons.in_full("a", crashed)) == f"{crashed}: no /models/a.gguf"
    assert reasons.in_full("a", "'a' did not load: exited with code 1; give it less") == (
        "'a' did not load: exited with code 1: ·[2Jgone; give it less"
    )
    assert reasons.in_full("a", "it is loading") == "it is loading"
    assert reasons.in_full("b", crashed) == crashed


def test_what_nobody_has_put_into_harmless_words_is_not_told() -> None:
    assert "/models" not in Problem("/models/a.gguf is odd").reason.told


def test_only_the_last_reasons_of_a_model_are_kept() -> None:
    reasons = Reasons()
    for number in range(100):
        reasons.note("a", Reason(f"<{number}> in full", f"<{number}>"))
    assert [reasons.in_full("a", told) for told in ("<0>", "<99>")] == ["<0>", "<99> in full"]
