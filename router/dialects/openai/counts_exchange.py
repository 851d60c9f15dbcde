"""OpenAI's requests to count the tokens of a chat or a response, on the data plane."""

from __future__ import annotations

from router.dataplane.answer import TranslatedAnswer
from router.dataplane.exchange import Exchange
from router.dataplane.routing import Wish
from router.dataplane.shortening import ALL_DEPTHS, Shortened, Text
from router.dialects.counting import Count, question
from router.dialects.openai.responses import read
from router.dialects.openai.responses_as_chats import as_chat
from router.formats.unreadable import UNREADABLE
from router.http.errors import ApiError
from router.http.routes import CHATS, ROUTES


class CountsExchange(Exchange):
    """An exchange that counts the tokens of a request.

    An engine without a route for that computes the first token of an answer in one of its slots.
    """

    __slots__ = ("_is_chat", "_mistake")

    _is_chat: bool
    _mistake: Exception | None
    """Why the request could not be translated to a chat."""

    def _read(self, body: Text) -> tuple[Wish, Text]:
        wish, body = super()._read(body)
        self._mistake = None
        self._is_chat = not wish.is_served(self._path)
        if not self._is_chat:
            return wish, body
        self._path = CHATS
        try:
            conversation = ROUTES[self._head.path].conversation
            is_response = conversation is not None and conversation.messages == "input"
            return wish, question(as_chat(read(body).body) if is_response else body)
        except UNREADABLE as error:
            self._mistake = error
            return wish, body

    def _depth_of(self, wish: Wish, short: Shortened) -> int:
        return ALL_DEPTHS if self._is_chat else super()._depth_of(wish, short)

    def _is_slotless(self) -> bool:
        return not self._is_chat

    def _submit(self, wish: Wish) -> None:
        if self._mistake is not None:
            self._refuse(ApiError(400, "invalid_request", f"The body cannot be counted: {self._mistake}."))
            return
        if self._is_chat:
            counted = Count(object="response.input_tokens")
            self._answer = TranslatedAnswer(self._answer, counted, streams=False)
        super()._submit(wish)
