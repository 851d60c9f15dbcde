"""Tokens of one response, and the engine's own time for them."""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct, frozen=True):
    """Usage of one response as reported by the engine; 0 if it reports nothing.

    Only the output tokens of an interrupted stream are estimated.
    """

    prompt_tokens: int = 0
    """Tokens of the whole prompt, including cached ones."""
    cached_tokens: int = 0
    output_tokens: int = 0
    prefill_sec: float = 0.0
    """Engine time for the part of the prompt that was not cached."""
    decode_sec: float = 0.0
    """Engine time for the tokens after the first."""


NO_USAGE = Usage()
