"""OpenAI's responses on the data plane: exchanged like all requests, and answered with all that their API has."""

from __future__ import annotations

from functools import partial

import msgspec

from router.dataplane.answer import TranslatedAnswer
from router.dataplane.exchange import Exchange
from router.dataplane.routing import Wish, shape_of
from router.dataplane.shortening import Shortened, Text
from router.dialects.openai.responses import Asked, Bounds, Completion, read
from router.http.errors import ApiError
from router.runtime.dispatcher import Dispatcher


class ResponsesExchange(Exchange):
    """An exchange whose client expects more than the engine says."""

    __slots__ = ("_asked", "_completion")

    _asked: Asked
    _completion: Completion

    def _read(self, body: Text) -> tuple[Wish, Text]:
        wish, body = super()._read(body)
        answers = wish.answers if wish.asked_as is None else shape_of(body)
        if answers.per_prompt > 1:  # the engine would compute them, and tell what is no response
            message = f"`n` is {answers.per_prompt}, and a response is one. Send several requests."
            raise ApiError(400, "invalid_request", message, "n")
        self._asked = read(body)
        return wish, self._asked.body

    def _depth_of(self, wish: Wish, short: Shortened) -> int:
        needed = super()._depth_of(wish, short)
        return max(needed, 3) if self._asked.has_form else needed  # that of a schema, and of what is not one

    def _restore(self, short: Shortened) -> None:
        repeated = {key: short.restored(bytes(raw)) for key, raw in self._asked.repeated.items()}
        self._asked.repeated = {key: msgspec.Raw(b"".join(whole.parts)) for key, whole in repeated.items()}

    def _submit(self, wish: Wish) -> None:
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
