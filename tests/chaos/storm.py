"""Shared by the chaos tests: the scale of a run, and many clients at once.

Every test has a version that CI can afford; `CHAOS=long` in the environment runs the whole storm.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
from bookkeeping import books
from conftest import Router, eventually, http_client

LONG = os.environ.get("CHAOS") == "long"


def scale(ci: int, long: int) -> int:
    return long if LONG else ci


def settle(router: Router, folder: Path, before: dict[str, int]) -> None:
    """Wait until the router holds no more than before the storm, or say what it still does.

    A leak grows with the storm. One or two objects more are only a variable that still names the last one.
    """

    def left() -> dict[str, tuple[int, int]]:
        now = books(router, folder)
        spare = {name: 0 if name in ("descriptors", "processes", "tasks") else 2 for name in now}
        return {name: (before[name], now[name]) for name in now if now[name] > before[name] + spare[name]}

    try:
        eventually(lambda: not left(), timeout_sec=15)
    except AssertionError:
        raise AssertionError(f"left behind (before, after): {left()}") from None


def processes_about(folder: Path) -> list[psutil.Process]:
    """Every live process on this machine whose command line names the test's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        dead = process.info["status"] == psutil.STATUS_ZOMBIE
        if not dead and any(str(folder) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def eject_all(router: Router, *aliases: str) -> None:
    for alias in aliases:
        router.http.post("/v1/models/eject", json={"model": alias})
    eventually(lambda: router.engines == [])


@dataclass
class Crowd:
    """Clients in threads that send one request after the other, with the outcomes."""

    router: Router
    aliases: tuple[str, ...]
    max_tokens: tuple[int, int] = (1, 24)
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self, clients: int, ask: Callable[[httpx.Client, random.Random], str]) -> None:
        for number in range(clients):
            thread = threading.Thread(target=self._live, args=(number, ask), daemon=True)
            self.threads.append(thread)
            thread.start()

    def finish(self, timeout_sec: float = 60) -> None:
        """Wait until every client has the answer to its last request. Raises if a client hangs."""
        self.over.set()
        for thread in self.threads:
            thread.join(timeout_sec)
        assert not any(thread.is_alive() for thread in self.threads), "a client hangs"

    @property
    def answered(self) -> int:
        return sum(self.outcomes.values())

    def _live(self, number: int, ask: Callable[[httpx.Client, random.Random], str]) -> None:
        chance = random.Random(number)
        with http_client(self.router.url) as http:
            while not self.over.is_set():
                try:
                    outcome = ask(http, chance)
                except Exception as error:
                    outcome = f"{type(error).__name__}: {error}"
                    self.failures.append(outcome)
                self.outcomes[outcome] += 1

    def body(self, chance: random.Random, **more: Any) -> dict[str, Any]:
        content = "".join(chance.choices("abcdefgh ", k=chance.randrange(1, 60)))
        messages = [{"role": "user", "content": content}]
        tokens = chance.randint(*self.max_tokens)
        return {"model": chance.choice(self.aliases), "messages": messages, "max_tokens": tokens, **more}

    def ask_plainly(self, http: httpx.Client, chance: random.Random) -> str:
        body = self.body(chance)
        answer = http.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            self.failures.append(f"{answer.status_code}: {answer.text}")
        elif answer.json()["usage"]["completion_tokens"] != body["max_tokens"]:
            self.failures.append(f"asked for {body['max_tokens']} tokens: {answer.text}")
        return f"plain {answer.status_code}"

    def ask_for_a_stream(self, http: httpx.Client, chance: random.Random) -> str:
        body = self.body(chance, stream=True)
        body["max_tokens"] *= 8
        answer = http.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            self.failures.append(f"{answer.status_code}: {answer.text}")
            return f"stream {answer.status_code}"
        return f"stream {self._end_of(answer.text)}"

    def _end_of(self, text: str) -> str:
        """Return `complete` or `broken off`; anything else counts as a failure."""
        *events, last, rest = text.split("\n\n")
        if last != "data: [DONE]" or rest:
            self.failures.append(f"a stream that does not end: {text[-200:]!r}")
            return "torn"
        documents = [json.loads(event[6:]) for event in events if event.startswith("data: ")]
        if "error" not in documents[-1]:
            return "complete"
        if documents[-1]["error"]["code"] != "engine_lost" or len(documents) == 1:
            self.failures.append(f"a stream that failed before it began: {text[-200:]!r}")
        return "broken off"
