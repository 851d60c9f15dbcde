"""Schemas of answers, where an engine cannot be held to one: it cannot call tools then."""

from __future__ import annotations

import msgspec


def told(schema: msgspec.Raw) -> str:
    """A schema, for a model to keep to it by itself."""
    return (
        "Once you call no more tools, answer with nothing but JSON that keeps to this schema: "
        f"{bytes(schema).decode()}"
    )
