"""The exchange of each kind of request whose requests or answers are translated or read."""

from __future__ import annotations

from collections.abc import Mapping

from router.dataplane.exchange import Exchange
from router.dialects.anthropic.exchange import CountExchange, MessagesExchange
from router.dialects.ollama.exchange import OllamaExchange
from router.dialects.openai.choices_exchange import ChoicesExchange
from router.dialects.openai.counts_exchange import CountsExchange
from router.dialects.openai.responses_exchange import ResponsesExchange
from router.http.routes import Ask, Dialect

TRANSLATORS: Mapping[tuple[Dialect, Ask], type[Exchange]] = {
    (Dialect.OPENAI, "chat"): ChoicesExchange,
    (Dialect.OPENAI, "completion"): ChoicesExchange,
    (Dialect.LLAMA_SERVER, "completion"): ChoicesExchange,
    (Dialect.OPENAI, "response"): ResponsesExchange,
    (Dialect.OPENAI, "count"): CountsExchange,
    (Dialect.ANTHROPIC, "chat"): MessagesExchange,
    (Dialect.ANTHROPIC, "count"): CountExchange,
    (Dialect.OLLAMA, "chat"): OllamaExchange,
    (Dialect.OLLAMA, "completion"): OllamaExchange,
    (Dialect.OLLAMA, "embedding"): OllamaExchange,
}
"""Requests of other kinds, and their answers, are passed on unchanged."""
