"""Schemas of answers in requests, and what a model is told where an engine cannot be held to one."""

from __future__ import annotations

import msgspec


class Format(msgspec.Struct):
    """The format of an answer's text, which OpenAI's responses and Anthropic's messages give in the same words."""

    type: str = ""
    schema: msgspec.Raw = msgspec.Raw(b"{}")


def told(schema: msgspec.Raw) -> str:
    """Instructions that have a model keep to a schema by itself.

    For requests that offer tools: an engine that is held to a schema cannot call any.
    """
    return (
        "Once you call no more tools, answer with nothing but JSON that keeps to this schema: "
        f"{bytes(schema).decode()}"
    )
