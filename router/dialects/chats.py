"""Answers of chats in OpenAI's API, and pieces of them in streams, as far as other APIs have a place for them."""

from __future__ import annotations

import msgspec

NO_ERROR = msgspec.Raw(b"")
"""Value of the field `error` of an answer without one."""


class Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class Call(msgspec.Struct):
    """A call of a tool, or a piece of one."""

    function: Function
    index: int | None = None
    """In streams, the call to which a piece belongs; without it, its place among those of its message."""
    id: str | None = None


class Said(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """vLLM's name of `reasoning_content`."""
    tool_calls: list[Call] | None = None

    @property
    def thoughts(self) -> str | None:
        return self.reasoning_content or self.reasoning


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return 0 if details is None else details.cached_tokens or 0

    @property
    def output_tokens(self) -> int:
        return self.completion_tokens or 0
