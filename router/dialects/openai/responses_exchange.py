"""OpenAI's responses on the data plane, whose answers are completed with all fields of the API."""

from __future__ import annotations

from functools import partial

import msgspec

from router.dataplane.answer import TranslatedAnswer
from router.dataplane.exchange import Exchange
from router.dataplane.routing import Wish, shape_of
from router.dataplane.shortening import ALL_DEPTHS, Shortened, Text
from router.dialects.openai.chats_as_responses import ChatAsResponse
from router.dialects.openai.responses import Asked, Bounds, Completion, read
from router.dialects.openai.responses_as_chats import as_chat
from router.formats.unreadable import UNREADABLE
from router.http.errors import ApiError
from router.http.routes import CHATS
from router.http.tools import DEPTH as DEPTH_OF_TOOLS
from router.http.tools import INPUT_SCHEMA
from router.runtime.dispatcher import Dispatcher


class ResponsesExchange(Exchange):
    """An exchange of a response, whose engine may have chats only."""

    __slots__ = ("_asked", "_completion", "_is_chat", "_mistake")

    _asked: Asked
    _is_chat: bool
    """True if the engine has chats, but no responses."""
    _mistake: Exception | None
    """Why the request could not be translated to a chat."""
    _completion: Completion

    def _read(self, body: Text) -> tuple[Wish, Text]:
        wish, body = super()._read(body)
        answers = wish.answers if wish.asked_as is None else shape_of(body)
        if answers.per_prompt > 1:  # the engine would answer in another format
            message = f"`n` is {answers.per_prompt}, but a response has one answer. Send several requests."
            raise ApiError(400, "invalid_request", message, "n")
        self._asked = read(body)
        self._mistake = None
        self._is_chat = not wish.is_served(self._path)
        if not self._is_chat:
            return wish, self._asked.body
        self._path = CHATS
        try:
            return wish, as_chat(self._asked.body)
        except UNREADABLE as error:
            self._mistake = error
            return wish, body

    def _depth_of(self, wish: Wish, short: Shortened) -> int:
        if self._is_chat:
            return ALL_DEPTHS
        needed = super()._depth_of(wish, short)
        if short.mentions(INPUT_SCHEMA):
            needed = max(needed, DEPTH_OF_TOOLS)
        return max(needed, 3) if self._asked.has_form else needed  # the depth of `text.format.schema`

    def _restore(self, short: Shortened) -> None:
        repeated = {key: short.restored(bytes(raw)) for key, raw in self._asked.repeated.items()}
        self._asked.repeated = {key: msgspec.Raw(b"".join(whole.parts)) for key, whole in repeated.items()}

    def _submit(self, wish: Wish) -> None:
        if self._mistake is not None:
            message = f"The body is not a valid request for a response: {self._mistake}."
            self._refuse(ApiError(400, "invalid_request", message))
            return
        if self._is_chat:
            self._completion = ChatAsResponse(self._asked)
        else:
            self._completion = Completion(self._asked, partial(_bounds, self._dispatcher, wish.alias))
        self._answer = TranslatedAnswer(self._answer, self._completion, streams=wish.streams)
        super()._submit(wish)

    def _event_of(self, error: ApiError) -> bytes:
        return self._completion.failed(error)


def _bounds(dispatcher: Dispatcher, alias: str) -> Bounds:
    facts, model = dispatcher.facts_of(alias), dispatcher.config.models.get(alias)
    return Bounds(
        None if facts is None else facts.context,
        None if model is None else model.most_tokens,
    )
