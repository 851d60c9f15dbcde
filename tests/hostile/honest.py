"""Honest clients and the outcomes of their requests: they chat, read streams, and look at lists and pages.

Each asks again when it is answered, after a pause of its own, on a connection that it keeps. A request is lost
unless it gets one whole answer of what was asked for, whatever others do meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

KEY, FULL_KEY = "anna", "full"
LISTS = ("/v1/models", "/api/tags")
PAGES = ("/v1/queue/stats", "/v1/models/status", "/v1/decisions", "/vram", "/v1/telemetry/summary", "/metrics")
BARE = "a bare server"
KILLED = "killed"
"""The model whose engine is killed now and then: its chats wait for the next one to load."""
_LIMIT_SEC = 60.0
_END = b"data: [DONE]\n\n"


@dataclass
class Tally:
    """What became of the requests, by kind."""

    took_sec: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    gaps_sec: list[float] = field(default_factory=list)
    """Of each stream the largest, between two of its events."""
    lost: list[str] = field(default_factory=list)

    @property
    def asked(self) -> int:
        return len(self.lost) + sum(map(len, self.took_sec.values()))

    def slow_sec(self, kind: str) -> float:
        """Return the 99th percentile."""
        took = sorted(self.took_sec[kind])
        return took[int(len(took) * 0.99)] if took else float("inf")

    def add(self, other: Tally) -> None:
        for kind, took in other.took_sec.items():
            self.took_sec[kind] += took
        self.gaps_sec += other.gaps_sec
        self.lost += other.lost


@dataclass
class Answer:
    status: int
    body: bytes
    began_sec: float
    """When the first of its body was there."""
    largest_gap_sec: float
    """Between two parts of it."""


class Client:
    """Asks over one connection, and again over it."""

    _numbers = itertools.count()

    def __init__(self, port: int, tally: Tally) -> None:
        self._port = port
        self._tally = tally
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def chat(self, kind: str, model: str, tokens: int, *, priority: str = "normal") -> None:
        body = {"model": model, "max_tokens": tokens, "messages": [{"role": "user", "content": "How are you?"}]}
        answer = await self._ask(kind, "POST", "/v1/chat/completions", body, priority)
        if answer is not None:
            document = json.loads(answer.body)
            self._must(kind, bool(document["choices"][0]["message"]["content"]), answer)

    async def stream(self, model: str, tokens: int) -> None:
        kind = "first token of a stream"
        body = {
            "model": model,
            "max_tokens": tokens,
            "stream": True,
            "messages": [{"role": "user", "content": "?"}],
        }
        began = time.monotonic()
        answer = await self._ask("stream", "POST", "/v1/chat/completions", body, "normal")
        if answer is not None:
            self._must("stream", answer.body.endswith(_END) and b'"error"' not in answer.body, answer)
            self._tally.took_sec[kind].append(answer.began_sec - began)
            self._tally.gaps_sec.append(answer.largest_gap_sec)

    async def look(self, kind: str, path: str) -> None:
        await self._ask(kind, "GET", path)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None

    def _must(self, kind: str, is_right: bool, answer: Answer) -> None:
        if not is_right:
            self._tally.took_sec[kind].pop()
            self._tally.lost.append(f"{kind}: {answer.status} {answer.body[-200:]!r}")

    async def _ask(
        self, kind: str, method: str, path: str, body: object = None, priority: str | None = None
    ) -> Answer | None:
        """None when it was lost."""
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"X-Request-Id: honest-{next(self._numbers)}"]
        lines.append(f"Authorization: Bearer {FULL_KEY if body is None else KEY}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        if priority is not None:
            lines.append(f"X-Request-Priority: {priority}")
        began = time.monotonic()
        try:
            request = "\r\n".join((*lines, "", "")).encode() + content
            answer = await asyncio.wait_for(self._exchange(request), _LIMIT_SEC)
        except (OSError, EOFError, ValueError, asyncio.TimeoutError) as error:
            told = f"{type(error).__name__} {error} after {time.monotonic() - began:.1f} s"
        else:
            if answer.status == 200:
                self._tally.took_sec[kind].append(time.monotonic() - began)
                return answer
            told = f"{answer.status} {answer.body[:300]!r}"
        self._tally.lost.append(f"{kind}: {told}")
        self.close()
        return None

    async def _exchange(self, request: bytes) -> Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        _, _, length = head.partition(b"\r\ncontent-length: ")
        if length:
            body = await reader.readexactly(int(length.partition(b"\r\n")[0]))
            return Answer(int(head[9:12]), body, time.monotonic(), 0)
        parts: list[bytes] = []
        times: list[float] = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
            times.append(time.monotonic())
        await reader.readexactly(2)
        gaps = (later - earlier for earlier, later in itertools.pairwise(times))
        return Answer(int(head[9:12]), b"".join(parts), times[0], max(gaps, default=0))


async def be_honest(port: int, seconds: float, bare_port: int | None = None) -> Tally:
    """Run all honest clients for so many seconds, and until their last answers are there.

    A server that does nothing but answer is queried at `bare_port`, to show what waiting is due to the machine.
    """
    tally = Tally()
    until = time.monotonic() + seconds

    async def chats(model: str, priority: str, tokens: int, pause_sec: float) -> None:
        client = Client(port, tally)
        while time.monotonic() < until:
            await client.chat(f"chat with {model}, {priority}", model, tokens, priority=priority)
            await asyncio.sleep(pause_sec)
        client.close()

    async def streams() -> None:
        client = Client(port, tally)
        while time.monotonic() < until:
            await client.stream("large", 60)
            await asyncio.sleep(0.1)
        client.close()

    async def looks(kind: str, paths: Iterable[str], pause_sec: float, at: int = port) -> None:
        client = Client(at, tally)
        for path in itertools.cycle(paths):
            await client.look(kind, path)
            await asyncio.sleep(pause_sec)
            if time.monotonic() >= until:
                break
        client.close()

    await asyncio.gather(
        *(chats("small", priority, 4, 0.1) for priority in ("high", "normal", "low")),
        *(chats("large", priority, 8, 0.2) for priority in ("high", "normal")),
        chats("crowded", "high", 1, 0.2),
        chats(KILLED, "normal", 4, 0.1),
        *(streams() for _ in range(2)),
        looks("/live", ["/live"], 0.02),
        *(looks(BARE, ["/"], 0.02, at) for at in (bare_port,) if at is not None),
        looks("lists", LISTS, 0.2),
        looks("pages", PAGES, 0.2),
    )
    return tally
