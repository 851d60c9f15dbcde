"""OpenAI's responses on the data plane: exchanged like all requests, and answered with all that their API has."""

from __future__ import annotations

import msgspec

from router.answer import Answer
from router.api.errors import ApiError
from router.exchange import Exchange
from router.responses import Asked, Completion, read
from router.routing import Wish
from router.shortening import Shortened


class ResponsesExchange(Exchange):
    """An exchange whose client expects more than the engine says."""

    __slots__ = ("_asked", "_completion")

    _asked: Asked
    _completion: Completion

    def _read(self, body: bytes | bytearray) -> tuple[Wish, bytes | bytearray]:
        wish, body = super()._read(body)
        self._asked = read(body)
        return wish, self._asked.body

    def _depth(self) -> int:
        return 3  # that of a schema, and of what is not one

    def _restore(self, short: Shortened) -> None:
        repeated = {key: short.restored(bytes(raw)) for key, raw in self._asked.repeated.items()}
        self._asked.repeated = {key: msgspec.Raw(b"".join(whole.parts)) for key, whole in repeated.items()}

    def _submit(self, wish: Wish) -> None:
        self._completion = Completion(self._asked)
        self._answer = _CompletedAnswer(self._answer, self._completion)
        super()._submit(wish)

    def _event_of(self, error: ApiError) -> bytes:
        return self._completion.failed(error)


class _CompletedAnswer(Answer):
    """Takes an engine's answer, and gives the client all of it and more."""

    __slots__ = ("_completion", "_streams")

    def __init__(self, plain: Answer, completion: Completion) -> None:
        """Instead of `plain`, of which nothing is written yet."""
        super().__init__(plain._wire, keep_alive=plain.keep_alive, http_1_0=plain._http_1_0)
        self._completion = completion
        self._streams = False

    def whole(self, status: int, lines: bytes, body: bytes) -> None:
        super().whole(status, lines, self._completion.document(body) if status == 200 else body)

    def start(self, status: int, lines: bytes, length: int | None = None) -> None:
        self._streams = b"text/event-stream" in lines
        super().start(status, lines, length)

    def write(self, part: bytes) -> None:
        if not self._streams:
            super().write(part)
        elif events := self._completion.events(part):
            super().write(events)

    def end(self, part: bytes = b"") -> None:
        if self._streams:
            part = self._completion.events(part) + self._completion.last_events()
        super().end(part)

    def break_off(self, reason: bytes) -> None:
        super().end(reason)
