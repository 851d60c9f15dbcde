"""Anthropic's messages on the data plane: as chats where the engine's own route would lose something of them."""

from __future__ import annotations

from router.dataplane.answer import TranslatedAnswer
from router.dataplane.exchange import Exchange
from router.dataplane.routing import Wish
from router.dataplane.shortening import ALL_DEPTHS, Shortened, Text
from router.dialects.anthropic.answers import StopReasons, Translation
from router.dialects.anthropic.requests import TOOL_RESULT, Asked, in_order, read


class MessagesExchange(Exchange):
    """An exchange whose engine is asked on another route, where need be."""

    __slots__ = ("_asked",)

    _asked: Asked

    def _read(self, body: Text) -> tuple[Wish, Text]:
        wish, body = super()._read(body)
        self._asked = read(body)
        return wish, self._asked.body

    def _depth_of(self, wish: Wish, short: Shortened) -> int:
        needed = max(self._asked.depth, super()._depth_of(wish, short))
        return ALL_DEPTHS if short.mentions(TOOL_RESULT) else needed

    def _submit(self, wish: Wish) -> None:
        asked = self._asked
        if asked.is_chat or asked.stops:
            translator = Translation(asked.stops) if asked.is_chat else StopReasons(asked.stops)
            self._answer = TranslatedAnswer(self._answer, translator, streams=wish.streams)
        super()._submit(wish)

    def _asked_of_engine(self) -> tuple[bytes, bytes]:
        target, lines = super()._asked_of_engine()
        return (b"/v1/chat/completions" if self._asked.is_chat else target), lines


class CountExchange(Exchange):
    """An exchange about how long a message is."""

    __slots__ = ()

    def _read(self, body: Text) -> tuple[Wish, Text]:
        wish, body = super()._read(body)
        return wish, in_order(body)

    def _depth_of(self, wish: Wish, short: Shortened) -> int:
        return ALL_DEPTHS if short.mentions(TOOL_RESULT) else super()._depth_of(wish, short)
