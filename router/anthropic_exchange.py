"""Anthropic's messages on the data plane: as chats where the engine's own route would lose something of them."""

from __future__ import annotations

from router.answer import TranslatedAnswer
from router.anthropic_answers import StopReasons, Translation
from router.anthropic_requests import Asked, in_order, read
from router.exchange import Exchange
from router.routing import Wish
from router.shortening import ALL_DEPTHS


class MessagesExchange(Exchange):
    """An exchange whose engine is asked on another route, where need be."""

    __slots__ = ("_asked",)

    _asked: Asked

    def _read(self, body: bytes | bytearray) -> tuple[Wish, bytes | bytearray]:
        wish, body = super()._read(body)
        self._asked = read(body)
        return wish, self._asked.body

    def _depth(self) -> int:
        return ALL_DEPTHS

    def _submit(self, wish: Wish) -> None:
        asked = self._asked
        if asked.is_chat or asked.stops:
            translator = Translation(asked.stops) if asked.is_chat else StopReasons(asked.stops)
            self._answer = TranslatedAnswer(self._answer, translator)
        super()._submit(wish)

    def _asked_of_engine(self) -> tuple[bytes, bytes]:
        target, lines = super()._asked_of_engine()
        return (b"/v1/chat/completions" if self._asked.is_chat else target), lines


class CountExchange(Exchange):
    """An exchange about how long a message is."""

    __slots__ = ()

    def _read(self, body: bytes | bytearray) -> tuple[Wish, bytes | bytearray]:
        wish, body = super()._read(body)
        return wish, in_order(body)

    def _depth(self) -> int:
        return ALL_DEPTHS
