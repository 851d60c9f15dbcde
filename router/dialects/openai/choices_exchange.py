"""Chats and completions on the data plane.

Several choices are merged on OpenAI's routes, and counted on the engine's own. Other answers are passed on,
without the usage that engines other than llama-server are asked for if the client did not ask for it.
"""

from __future__ import annotations

from router.dataplane.answer import TranslatedAnswer
from router.dataplane.burden import MOST_PROMPTS
from router.dataplane.exchange import Exchange
from router.dataplane.routing import Shape, Wish, lists_prompts, shape_of
from router.dataplane.shortening import Shortened, Text
from router.dialects.openai.choices import ChoicesMeter, Several
from router.dialects.openai.hidden_usage import AnswerWithoutUsage, asks_for_usage
from router.engines.llamacpp.usage import AnswerMeter
from router.http.errors import ApiError
from router.http.routes import ROUTES, Dialect
from router.observe.usage import Usage


class ChoicesExchange(Exchange):
    """An exchange whose client may ask for several choices."""

    __slots__ = ("_hides_usage", "_several")

    _several: Several | None
    _hides_usage: bool

    def _read(self, body: Text) -> tuple[Wish, Text]:
        self._several = None
        self._hides_usage = False
        wish, body = super()._read(body)
        if not wish.is_for_llama_server:  # other engines count all choices themselves
            self._hides_usage = wish.streams and not asks_for_usage(body)
            return wish, body
        answers = wish.answers if wish.asked_as is None else shape_of(body)
        if answers.several:
            self._check(answers, wish.alias)
            if ROUTES[self._head.path].dialect is Dialect.OPENAI:
                self._several = Several(body, answers)
                body = self._several.body
            else:
                self._meter = ChoicesMeter(shape=answers)
        return wish, body

    def _depth_of(self, wish: Wish, short: Shortened) -> int:
        needed = super()._depth_of(wish, short)
        has_prompts = ROUTES[self._head.path].asks != "chat"
        return max(needed, 2) if has_prompts and lists_prompts(short) else needed  # prompts are counted

    def _submit(self, wish: Wish) -> None:
        if self._several is not None:
            self._answer = TranslatedAnswer(self._answer, self._several, streams=wish.streams)
        elif self._hides_usage:
            self._answer = AnswerWithoutUsage(self._answer)
        super()._submit(wish)

    def _check(self, answers: Shape, alias: str) -> None:
        """Raise ApiError 400 for more choices than the engine has slots, or too many prompts."""
        slots = self._dispatcher.config.models[alias].slots
        if answers.per_prompt > slots:
            message = (
                f"`n` is {answers.per_prompt}, and {alias!r} computes {slots} at once (--parallel in its flags). "
                "Ask for fewer, or send several requests."
            )
            raise ApiError(400, "invalid_request", message, "n")
        if answers.per_prompt * answers.prompts > MOST_PROMPTS:
            message = (
                f"{answers.prompts} prompts with {answers.per_prompt} answers each are more than {MOST_PROMPTS}, "
                "and each is computed by itself. Send several requests."
            )
            raise ApiError(400, "invalid_request", message, "prompt")

    def lost(self, reason: str) -> None:
        if self._several is not None and not self._answer.started:  # nothing has reached the client
            self._several.forget()
            self._meter = AnswerMeter()
            self._relays = False
        super().lost(reason)

    def _usage(self) -> Usage:
        """Return the usage of all choices, or of a stream that broke off before any choice had ended."""
        usage = None if self._several is None else self._several.usage()
        return usage if usage is not None and usage.output_tokens else super()._usage()
