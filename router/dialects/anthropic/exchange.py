"""Anthropic's messages on the data plane: sent as chats where the engine's own route would lose some of them."""

from __future__ import annotations

from router.dataplane.answer import TranslatedAnswer, Translator
from router.dataplane.exchange import Exchange
from router.dataplane.routing import Wish
from router.dataplane.shortening import ALL_DEPTHS, Shortened, Text
from router.dialects.anthropic.answers import StopReasons, Translation
from router.dialects.anthropic.requests import (
    DOCUMENT,
    TOOL_RESULT,
    Asked,
    counted_by_others,
    for_others,
    in_order,
    is_for_chats,
    read,
)
from router.dialects.counting import Count
from router.http.errors import ApiError
from router.http.routes import CHATS
from router.http.tools import DEPTH as DEPTH_OF_TOOLS
from router.http.tools import FUNCTION


class MessagesExchange(Exchange):
    """An exchange of messages, sent to the engine's chats if necessary."""

    __slots__ = ("_asked",)

    _asked: Asked

    def _read(self, body: Text) -> tuple[Wish, Text]:
        wish, body = super()._read(body)
        is_served = wish.is_served(self._path)
        if is_served and wish.is_for_llama_server:
            self._asked = read(body)
        elif is_served and not is_for_chats(body):
            self._asked = Asked(body)
        else:
            self._asked = for_others(body)
        return wish, self._body_of_asked()

    def _body_of_asked(self) -> Text:
        if self._asked.is_chat:
            self._path = CHATS
        return self._asked.body

    def _depth_of(self, wish: Wish, short: Shortened) -> int:
        needed = max(self._asked.depth, super()._depth_of(wish, short))
        if short.mentions(FUNCTION):
            needed = max(needed, DEPTH_OF_TOOLS)
        return ALL_DEPTHS if short.mentions(TOOL_RESULT) or short.mentions(DOCUMENT) else needed

    def _submit(self, wish: Wish) -> None:
        asked = self._asked
        if asked.mistake is not None:
            self._refuse(_wrong(asked.mistake))
            return
        if (translator := self._translator()) is not None:
            self._answer = TranslatedAnswer(self._answer, translator, streams=wish.streams)
        super()._submit(wish)

    def _translator(self) -> Translator | None:
        if self._asked.is_chat:
            return Translation(self._asked.stops, self._asked.model)
        return StopReasons(self._asked.stops) if self._asked.stops else None


class CountExchange(MessagesExchange):
    """An exchange that counts the tokens of a request.

    An engine without a route for that computes the first token of an answer in one of its slots.
    """

    __slots__ = ()

    def _read(self, body: Text) -> tuple[Wish, Text]:
        wish, body = Exchange._read(self, body)
        served = wish.is_served(self._path)
        self._asked = Asked(in_order(body)) if served else counted_by_others(body)
        return wish, self._body_of_asked()

    def _is_slotless(self) -> bool:
        return not self._asked.is_chat

    def _translator(self) -> Translator | None:
        return Count() if self._asked.is_chat else None


def _wrong(mistake: Exception) -> ApiError:
    return ApiError(400, "invalid_request", f"The body is not a valid request for a message: {mistake}.")
