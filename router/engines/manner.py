"""The manner of a kind of engine: how it is asked and understood where it differs from llama-server.

Exchanges and dialects know OpenAI's API alone. A kind whose engines speak it in another way has a `Manner` (see
`Kind`): it turns a request into what its engines understand, and what they answer into OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from router.config.resolved import ModelConfig

if TYPE_CHECKING:
    from router.engines.upstream import Receiver


class Question(NamedTuple):
    """A request in the words of an engine."""

    path: str
    body: bytes
    understood_by: Callable[[Receiver], Receiver]
    """Returns the receiver of the engine's answer, which passes it on in OpenAI's words. One for each attempt."""


class Manner(Protocol):
    """How the engines of one kind are spoken to."""

    def depth(self, model: ModelConfig, path: str, body: bytes | memoryview) -> int:
        """Return how many levels of a body's values `question` needs; deeper ones may be shortened."""

    def question(self, model: ModelConfig, path: str, body: bytes | memoryview, size: int) -> Question | None:
        """Return a request of OpenAI's API in the engine's words; None: `path` is passed on as it is.

        `size` is that of the whole body, of which `body` may be a short form. Raises ApiError 400 for
        what the engine would ignore or cannot do.
        """
