"""All attackers at once: `python mob.py --port PORT --seconds S --pid PID --configuration FILE [KIND…]`.

A process of its own, so that it can have the lowest priority, and what it takes of the interpreter does not count.
`attack.py` has those that send requests without end, this file all others (see `ATTACKS`).
At the end it prints what they did and which answers they got.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]

from event_loop import bodies  # noqa: E402
from garbage import KINDS  # noqa: E402
from mutations import mutated  # noqa: E402

NEIGHBOURS = 500
_ENOUGH = 4 << 20
"""Bytes of an answer after which its client leaves."""
_PATIENCE_SEC = 3.0
_KILLED = ("killed", "garbage", "crowded")
"""Models whose engines are killed: none with streams, which end with an error when their engine dies."""


def request(method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *([] if "host" in headers else ["host: localhost"])]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode() + (body or b"")


def chat(model: str, content: str = "hi", **more: object) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": content}], **more}).encode()


MALLORY = {"authorization": "Bearer mallory"}
FULL = {"authorization": "Bearer full"}


@dataclass
class Mob:
    port: int
    router: psutil.Process
    configuration: Path
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    did: dict[str, Counter[str]] = field(default_factory=dict)

    async def send(self, message: bytes, *, patience_sec: float = _PATIENCE_SEC) -> str:
        """Send a request and read for a while. Returns the status, or what came instead."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        status = "nothing"

        async def exchange() -> None:
            nonlocal status
            writer.write(message)
            await writer.drain()
            received = 0
            while received < _ENOUGH and (part := await reader.read(1 << 16)):
                if not received:
                    status = part[9:12].decode(errors="replace")
                received += len(part)

        try:
            await asyncio.wait_for(exchange(), patience_sec)
        except asyncio.TimeoutError:
            pass
        finally:
            writer.transport.abort()
        return status


# --- attacks: one round each, and what came of it --------------------------------------------------------------


async def slow_reader(mob: Mob) -> str:
    """Asks for a long stream, and reads a byte now and then, with hardly any buffer."""
    tap = socket.socket()
    tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    tap.setblocking(False)
    await asyncio.get_running_loop().sock_connect(tap, ("127.0.0.1", mob.port))
    with tap:
        body = chat("small", max_tokens=400, stream=True)
        tap.send(request("POST", "/v1/chat/completions", body, **MALLORY))
        for _ in range(100):
            await asyncio.sleep(0.1)
            with contextlib.suppress(BlockingIOError):
                if not tap.recv(1):
                    return "ended"
    return "left"


async def unread_pages(mob: Mob) -> str:
    """Asks for many pages at once, and reads none."""
    paths = ("/v1/models", "/metrics", "/v1/queue/stats", "/openapi.json", "/v1/telemetry/summary")
    pages = b"".join(request("GET", path, None, **FULL) for path in paths * 40)
    with socket.socket() as deaf:
        deaf.setblocking(False)
        await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", mob.port))
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError, OSError):
            await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(deaf, pages), _PATIENCE_SEC)
        await asyncio.sleep(_PATIENCE_SEC)
    return "left"


_bodies: Iterator[tuple[str, str, str, bytes]] = iter(())


async def large_body(mob: Mob) -> str:
    """Sends one body of each kind after the other: wide, deep, long, and forms."""
    global _bodies
    found = next(_bodies, None)
    if found is None:
        _bodies = bodies(4)
        found = next(_bodies)
    _, path, kind, body = found
    return await mob.send(request("POST", path, body, content_type=kind, connection="close", **MALLORY))


async def junk(mob: Mob) -> str:
    """Sends what was a request before something went wrong with it."""
    path, body = mob.chance.choice(
        (
            ("/v1/chat/completions", chat("garbage", max_tokens=2)),
            ("/v1/messages", chat("garbage", max_tokens=2, seed=1)),
            ("/api/chat", chat("garbage", options={"num_predict": 2})),
            ("/v1/responses", b'{"model": "garbage", "input": "hi"}'),
            ("/v1/completions", b'{"model": "garbage", "prompt": ["a", "b"], "n": 1}'),
            ("/api/show", b'{"model": "garbage"}'),
            ("/tokenize", b'{"model": "garbage", "content": "hi"}'),
        )
    )
    headers = {"content_type": "application/json", "connection": "close", **MALLORY}
    if mob.chance.random() < 0.5:
        message = request("POST", path, mutated(mob.chance, body), **headers)
    else:
        message = mutated(mob.chance, request("POST", path, body, **headers))
    return await mob.send(message, patience_sec=0.5)


async def foreign_page(mob: Mob) -> str:
    """Acts as a web page of another site, which has no key, or has pointed its own name at this machine."""
    path, body = mob.chance.choice(
        (
            ("/v1/models/eject", b'{"model": "large"}'),
            ("/v1/models/load", b'{"model": "garbage"}'),
            ("/v1/chat/completions", chat("large", max_tokens=500)),
            ("/api/generate", b'{"model": "large", "keep_alive": -1}'),
            ("/v1/config/reload", b""),
        )
    )
    origin = mob.chance.choice(("https://evil.example", "null", "http://localhost.evil.example"))
    host = mob.chance.choice(("localhost", "evil.example"))
    headers = {"origin": origin, "content_type": "text/plain", "sec_fetch_site": "cross-site"}
    return await mob.send(request("POST", path, body, host=host, connection="close", **headers))


async def garbage_asker(mob: Mob) -> str:
    """Makes an engine send what no engine should."""
    kind = mob.chance.choice(list(KINDS))
    streams = mob.chance.random() < 0.5
    path = mob.chance.choice(("/v1/chat/completions", "/v1/messages", "/api/chat"))
    body = chat("garbage", f"kind:{kind};", max_tokens=5, stream=streams, seed=1)
    return await mob.send(request("POST", path, body, connection="close", **MALLORY), patience_sec=1)


async def reload(mob: Mob) -> str:
    """Has the configuration read again, every other time with another one."""
    document = json.loads(mob.configuration.read_text())
    document["models"]["spare"]["description"] = str(time.monotonic_ns() % 2)
    written = mob.configuration.with_suffix(".new")
    written.write_text(json.dumps(document))
    written.rename(mob.configuration)
    headers = {"content_type": "application/json", "connection": "close", **FULL}
    return await mob.send(request("POST", "/v1/config/reload", b"{}", **headers), patience_sec=20)


async def killer(mob: Mob) -> str:
    """Kills an engine."""
    model = mob.chance.choice(_KILLED)
    for engine in mob.router.children():
        with contextlib.suppress(psutil.Error):
            if any(word.endswith(f"{model}.gguf") for word in engine.cmdline()):
                engine.kill()
                return model
    return "nobody"


async def neighbour(mob: Mob) -> str:
    """Waits at the model that others ask for, too, with a low priority."""
    body = chat("crowded", max_tokens=1)
    headers = {"authorization": "Bearer neighbour", "connection": "close"}
    return await mob.send(request("POST", "/v1/chat/completions", body, **headers), patience_sec=600)


ATTACKS: dict[str, tuple[Callable[[Mob], Awaitable[str]], int, float]] = {
    "slow readers": (slow_reader, 4, 0.1),
    "unread pages": (unread_pages, 4, 0.5),
    "large bodies": (large_body, 2, 0.1),
    "junk": (junk, 4, 0.02),
    "foreign pages": (foreign_page, 2, 0.05),
    "garbage engine": (garbage_asker, 4, 0.05),
    "reloads": (reload, 1, 0.25),
    "killed engines": (killer, 1, 10),
    "neighbour": (neighbour, NEIGHBOURS, 0.5),
}
"""Attacks by name: the function, how many run at a time, and the pause between them in seconds."""


async def rage(mob: Mob, seconds: float, kinds: list[str]) -> None:
    until = time.monotonic() + seconds

    async def again_and_again(kind: str) -> None:
        attack, _, rest_sec = ATTACKS[kind]
        done = mob.did.setdefault(kind, Counter())
        await asyncio.sleep(mob.chance.random())
        while time.monotonic() < until:  # a task's end may get lost in a `wait_for` that is just over
            try:
                done[await attack(mob)] += 1
            except OSError as error:
                done[type(error).__name__] += 1
            await asyncio.sleep(rest_sec * mob.chance.uniform(0.5, 1.5))

    print("begun", flush=True)
    crowd = [asyncio.create_task(again_and_again(kind)) for kind in kinds for _ in range(ATTACKS[kind][1])]
    done, pending = await asyncio.wait(crowd, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()  # nobody may end by a mistake of his own


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--seconds", type=float, required=True)
    options.add_argument("--pid", type=int, required=True)
    options.add_argument("--configuration", type=Path, required=True)
    options.add_argument("kinds", nargs="*", default=list(ATTACKS))
    asked = options.parse_args()
    mob = Mob(asked.port, psutil.Process(asked.pid), asked.configuration)
    asyncio.run(rage(mob, asked.seconds, asked.kinds))
    print(json.dumps(mob.did))


if __name__ == "__main__":
    main()
