"""What one answer took: tokens, and the engine's own time for them."""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct, frozen=True):
    """What an engine says of one answer. 0 where it says nothing: no figure is a guess, but for the output of a
    stream that was broken off."""

    prompt_tokens: int = 0
    """All of the prompt, with what was in the cache."""
    cached_tokens: int = 0
    output_tokens: int = 0
    prefill_sec: float = 0.0
    """The engine's own time for the part of the prompt that was not cached."""
    decode_sec: float = 0.0
    """The engine's own time for the tokens after the first."""


NO_USAGE = Usage()
