"""Measures a model: asks it with so many clients at once, round after round."""

from __future__ import annotations

import random
import re
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.cli.bench.results import Figure, Row
from router.cli.chat.reply import Figures, Reply
from router.cli.client import CannotAsk, RouterClient

_WORDS = re.findall(
    r"\w+",
    """
    time year people way day man thing woman life child world school state family student group country problem
    hand part place case week company system program question work government number night point home water room
    mother area money story fact month lot right study book eye job word business issue side kind head house
    service friend father power hour game line end member law car city community name president team minute idea
    """,
)
"""Most vocabularies have each as one token."""
_FEW, _MORE = 8, 40
"""Words of the prompts by which the tokens of a word are measured."""


class Prompts:
    """Makes prompts of so many tokens, no two alike, so that what an engine remembers of one is no help.

    All consist of the same words, in another order.
    """

    def __init__(self, words: int) -> None:
        self._words = [_WORDS[number % len(_WORDS)] for number in range(words)]

    def next(self) -> str:
        random.shuffle(self._words)
        return " ".join(self._words)


@dataclass(slots=True)
class Asker:
    """Sends the benchmark's requests to a model."""

    client: RouterClient
    model: str
    output: int
    cached: bool
    _extra: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    """Fields that OpenAI's API does not have; llama-server and vLLM do."""

    def prompts(self, tokens: int, told: Callable[[str], None]) -> Prompts:
        """Load the model, and return prompts of about so many tokens. Raises CannotAsk."""
        try:
            first = self._tokens(_FEW)
        except CannotAsk as error:
            if "ignore_eos" not in str(error):
                raise
            self._extra = {}
            first = self._tokens(_FEW)
        second = self._tokens(_MORE)
        if not first or not second or second <= first:
            told("The server does not report how long a prompt is: their length is guessed.")
            return Prompts(max(1, tokens * 3 // 4))
        of_word = (second - first) / (_MORE - _FEW)
        return Prompts(max(1, round((tokens - first) / of_word) + _FEW))

    def _tokens(self, words: int) -> int | None:
        return self.ask(Prompts(words).next(), "", output=1).prompt_tokens

    def ask(self, prompt: str, priority: str, output: int | None = None) -> Figures:
        """Return the figures of an answer. Raises CannotAsk."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.output if output is None else output,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }
        headers = {"X-Request-Priority": priority} if priority else {}
        if not self.cached:
            headers["X-KV-Store"] = "no-store"
        reply = Reply(self.client, body, headers)
        for _ in reply:
            pass
        return reply.figures


@dataclass(slots=True)
class _Round:
    """What clients of one priority got in one round."""

    answers: list[Figures] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    began_sec: float = 0.0
    ended_sec: float = 0.0

    def median(self, name: str) -> float | None:
        """Return the median of a figure; None if it is not known of each answer."""
        values = [getattr(each, name) for each in self.answers]
        return statistics.median(values) if values and None not in values else None

    @property
    def output_per_sec(self) -> float | None:
        tokens = sum(each.output_tokens or 0 for each in self.answers)
        return tokens / (self.ended_sec - self.began_sec) if tokens else None


def measured(
    asker: Asker,
    prompts: Prompts,
    clients: int,
    priorities: Sequence[str],
    repeat: int,
    told: Callable[[str], None],
) -> list[Row]:
    """Return a row for each priority, of so many clients of each at once. Raises CannotAsk if all fail."""
    everybody = [priority for priority in priorities for _ in range(clients)]
    texts = [prompts.next() for _ in everybody]
    if asker.cached:
        _at_once(asker, texts, everybody)  # what is computed now will be remembered
    rounds: list[dict[str, _Round]] = []
    for number in range(repeat):
        told(f"{clients} clients, round {number + 1} of {repeat}")
        if not asker.cached:
            texts = [prompts.next() for _ in everybody]
        rounds.append(_at_once(asker, texts, everybody))
    rows = [_row(clients, priority, [each[priority] for each in rounds]) for priority in priorities]
    if not any(row.output_tokens for row in rows):
        raise CannotAsk(next(error for each in rounds for of in each.values() for error in of.errors))
    return rows


def _at_once(asker: Asker, texts: Sequence[str], priorities: Sequence[str]) -> dict[str, _Round]:
    """Ask everything at the same time, and return what came of it by priority."""
    result = {priority: _Round() for priority in priorities}
    ready = threading.Barrier(len(texts) + 1)

    def ask(text: str, priority: str) -> None:
        ready.wait()
        mine = result[priority]
        try:
            mine.answers.append(asker.ask(text, priority))
        except CannotAsk as error:
            mine.errors.append(str(error))
        mine.ended_sec = time.monotonic()

    # Daemons, so that Ctrl-C does not wait for answers.
    threads = [
        threading.Thread(target=ask, args=each, daemon=True) for each in zip(texts, priorities, strict=True)
    ]
    for thread in threads:
        thread.start()
    began_sec = time.monotonic()
    for each in result.values():
        each.began_sec = began_sec
    ready.wait()
    for thread in threads:
        thread.join()
    return result


def _row(clients: int, priority: str, rounds: Sequence[_Round]) -> Row:
    answers = [answer for each in rounds for answer in each.answers]

    def count(name: str) -> int | None:
        counts = [value for answer in answers if (value := getattr(answer, name)) is not None]
        return round(statistics.median(counts)) if counts else None

    def figure(name: str) -> Figure | None:
        return Figure.of(each.median(name) for each in rounds)

    def measured_by(name: str) -> str:
        return "engine" if answers and all(getattr(answer, name) for answer in answers) else "client"

    prompt, cached = count("prompt_tokens"), count("cached_tokens")
    is_computed = 2 * (cached or 0) < (prompt or 1)  # of the few tokens beyond a cache, the rate says nothing
    return Row(
        clients=clients,
        priority=priority or "default",
        failed=sum(len(each.errors) for each in rounds),
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=count("output_tokens"),
        prefill_per_sec=figure("prefill_per_sec") if is_computed else None,
        decode_per_sec=figure("decode_per_sec"),
        output_per_sec=Figure.of(each.output_per_sec for each in rounds),
        first_sec=figure("first_sec"),
        waited_sec=figure("waited_sec"),
        prefill_by=measured_by("is_prefill_of_engine"),
        decode_by=measured_by("is_decode_of_engine"),
    )
