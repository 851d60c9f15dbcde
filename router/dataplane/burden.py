"""Memory that an engine needs for parsing a body, beyond the body's size: it makes objects of all values.

Measured with llama-server (build 11434): up to a hundred bytes for a number, three hundred more for a
text, a list or an object, and seven thousand for each of many prompts, each of which becomes a task of its own.
Much of that memory is not returned to the system.
"""

from __future__ import annotations

from router.dataplane.shortening import MOST_VALUES, Count
from router.http.errors import ApiError
from router.http.routes import Route

_MOST_VALUES = 1 << 22
"""Maximum number of values: a prompt of a million tokens has a quarter of that."""
_MOST_COMPOSED = 1 << 19
"""Maximum number of texts, lists and objects: a bias for every token of a large vocabulary takes half of that,
forty thousand messages about as much."""
_VALUE_BYTES = 100
_COMPOSED_BYTES = 300
_PROMPT_BYTES = 7000
MOST_PROMPTS = MOST_VALUES
"""Maximum number of prompts in one request."""
_EACH_BY_ITSELF = ("embedding", "ranking")
"""Kinds of request for which llama-server computes each text as a task of its own."""


def burden(count: Count, route: Route) -> int:
    """Return the bytes that an engine needs for the values of a large body. Raises ApiError 413 for too many."""
    if count.values > _MOST_VALUES:
        raise _too_many(f"more than {_MOST_VALUES} values")
    is_each_by_itself = route.asks in _EACH_BY_ITSELF
    if is_each_by_itself and count.composed > MOST_PROMPTS:
        raise _too_many(f"more than {MOST_PROMPTS} texts and lists, each of which is computed by itself")
    if count.composed > _MOST_COMPOSED:
        raise _too_many(f"more than {_MOST_COMPOSED} texts, lists and objects")
    composed_bytes = _PROMPT_BYTES if is_each_by_itself else _COMPOSED_BYTES
    return count.values * _VALUE_BYTES + count.composed * composed_bytes


def _too_many(what: str) -> ApiError:
    message = f"The body has {what}: an engine needs many times their size for these. Send less at once."
    return ApiError(413, "body_too_large", message)
