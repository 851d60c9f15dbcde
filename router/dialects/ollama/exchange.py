"""Ollama's requests on the data plane: translated when they are read, then exchanged like all others.

The engine gets requests of its own API, and its answer is metered as it arrives; it is translated right before it
is sent to the client. So queues, priorities, retries, cancellation and events are those of every request.
"""

from __future__ import annotations

import asyncio
import logging

from router.catalog.cards import Card
from router.dataplane.answer import DOCUMENT, TranslatedAnswer
from router.dataplane.exchange import Exchange
from router.dataplane.rewriting import rewritten
from router.dataplane.routing import Wish, wish_of
from router.dataplane.shortening import ALL_DEPTHS, Text
from router.dialects.ollama.answers import Translation
from router.dialects.ollama.requests import Asked, for_others, translate
from router.http.errors import ApiError
from router.http.routes import ROUTES
from router.observe.events import Outcome

_log = logging.getLogger("router")


class OllamaExchange(Exchange):
    """An exchange whose client has Ollama's API."""

    __slots__ = ("_asked", "_look", "_translation")

    _asked: Asked
    _look: asyncio.Future[dict[str, Card]]
    """The model's card with its capabilities, if the request needs any."""
    _translation: Translation

    # --- the client -------------------------------------------------------------------------------------

    def _read(self, body: Text) -> tuple[Wish, Text]:
        path = self._head.path
        asked = translate(path, body)
        wish = wish_of(asked.model, asked.streams, self._head.fields, self._dispatcher.config, self._client)
        if not wish.is_for_llama_server:
            asked = for_others(asked)
        asked = self._asked = asked._replace(model=asked.model or wish.alias)
        self._path = asked.target
        self._translation = Translation(asked)
        question: Text = asked.body(wish.alias)
        if wish.asked_as is not None and question:
            question = rewritten(question, ROUTES[asked.target].conversation, wish.asked_as)
        return wish, question

    def _is_slotless(self) -> bool:
        return not self._asked.target  # a request without a prompt only loads the model

    def _depth(self) -> int:
        return 1 if ROUTES[self._head.path].asks == "embedding" else ALL_DEPTHS

    def _submit(self, wish: Wish) -> None:
        if self._asked.unloads:
            self._unload(wish.alias)
        elif self._asked.needs and wish.is_for_llama_server:  # other engines refuse by themselves
            self._look = asyncio.ensure_future(self._shared.cards.of([self._dispatcher.config.models[wish.alias]]))
            self._look.add_done_callback(lambda look: self.attempt(self._submit_if_capable, wish, look))
        else:
            super()._submit(wish)

    def _submit_if_capable(self, wish: Wish, look: asyncio.Future[dict[str, Card]]) -> None:
        """Refuse what the model cannot do, as Ollama does. If its file cannot be read, the engine decides."""
        if self._is_over or look.cancelled():
            return
        failed = look.exception()
        if failed is not None:
            _log.error("capabilities of %s could not be determined", wish.alias, exc_info=failed)
        capabilities = None if failed is not None else look.result()[wish.alias].get("capabilities")
        missing = [need for need in self._asked.needs if capabilities is not None and need not in capabilities]
        if missing:
            message = f"{self._asked.model!r} does not support {missing[0]}"
            self._refuse(ApiError(400, "not_supported", message, "model"))
        else:
            super()._submit(wish)

    def _unload(self, alias: str) -> None:
        """Have the model unloaded once it is idle, and answer without waiting for it."""
        try:
            self._shared.keyring.check(self._head.headers, manages=True)
        except ApiError as error:
            self._refuse(error)
            return
        self._dispatcher.keep_alive(alias, 0.0)
        self._answer_without_engine("unload")

    def _answer_without_engine(self, reason: str) -> None:
        """Answer with a document even if a stream was requested, as Ollama does."""
        self._status = 200
        self._answer.whole(200, DOCUMENT + self._id_line + self._lines, self._translation.loaded(reason))
        self._end(Outcome.SERVED)

    # --- the queue --------------------------------------------------------------------------------------

    def _decided(self) -> None:
        ticket = self._ticket
        if not self._is_over and ticket is not None and ticket.engine is not None:
            self._translation.waited_sec = ticket.queue_sec
            self._translation.meter = self._meter
            self._heed_keep_alive(ticket.alias)
            if not self._asked.target:
                self._answer_without_engine("load")
                return
            self._answer = TranslatedAnswer(self._answer, self._translation, streams=self._streams)
        super()._decided()

    def _heed_keep_alive(self, alias: str) -> None:
        """Apply `keep_alive` of clients with full access only, as it affects all clients of the model."""
        if self._asked.keep_alive_sec is None:
            return
        try:
            self._shared.keyring.check(self._head.headers, manages=True)
        except ApiError:
            return
        self._dispatcher.keep_alive(alias, self._asked.keep_alive_sec)

    def _set_heartbeat(self) -> None:
        """Send no heartbeats: lines of JSON have no comments, and Ollama, too, is silent before the answer."""

    # --- the end ----------------------------------------------------------------------------------------

    def _refuse(self, error: ApiError) -> None:
        super()._refuse(_with_ollamas_status(error))

    def _fail(self, error: ApiError, outcome: str = "") -> None:
        super()._fail(_with_ollamas_status(error), outcome)


def _with_ollamas_status(error: ApiError) -> ApiError:
    """Return 503 in place of 429: at that status, Ollama's clients wait and retry."""
    if error.status != 429:
        return error
    message = f"server busy, please try again. {error.message}"
    return ApiError(503, error.code, message, error.param, error.retry_after_sec)
