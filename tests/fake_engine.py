"""A llama-server that misbehaves on demand: a real process, real HTTP, told what to do by its environment.

FAKE_READY        push (default): says it is ready on its pipe; older: as builds before June 2026 say it;
                  poll: says nothing, but serves, and /v1/models to everybody; open: all else, too; never: hangs;
                  fails: ends
FAKE_LOAD_SEC     how long loading takes
FAKE_GROWS        1: takes more and more memory meanwhile
FAKE_PROGRESS     1: tells on its pipe how far it is, as llama-server does
FAKE_ANSWER_SEC   how long an answer takes
FAKE_DIE          before: exits when a request comes; after: exits in the middle of the answer; torn: of an event;
                  done: after the last event;
                  once FILE: as `before`, but only while FILE does not exist (it makes it); once-after FILE: as
                  `after`;
                  memory: takes all there is when a request comes
FAKE_LAST_WORDS   what it says before it exits
FAKE_DEAF         1: answers no probe
FAKE_LINGER_SEC   how long it waits after the last event of a stream, before it ends that
FAKE_CHUNKS       number of events in a stream
FAKE_EVENTS       file with what it streams instead: a JSON document a line, each an event, named by its `type`
FAKE_ANSWER       its answer, when no stream is asked for
FAKE_STATUS       its status, with 204 and 304 without a body; from 400 on also when a stream is asked for
FAKE_NOTES        file to which it appends each request: its path, a space, its body
FAKE_HEADERS      further headers of its answers, with | between them
FAKE_OUTLIVES     yes: does not die with its router; stubborn: nor by SIGTERM
FAKE_IDLE_CLOSE   1: closes a kept-alive connection right after its answer, as llama-server may at any time;
                  late: just when the next request comes over it
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import threading
from pathlib import Path

SETTINGS = {name[5:].lower(): value for name, value in os.environ.items() if name.startswith("FAKE_")}
KEY = os.environ["LLAMA_API_KEY"]


def setting(name: str, default: str = "") -> str:
    return SETTINGS.get(name, default)


def maybe_die(moment: str) -> None:
    die = setting("die")
    once, _, path = die.partition(" ")
    if (once, moment) in (("once", "before"), ("once-after", "after")):
        witness = Path(path)
        if not witness.exists():
            witness.touch()
            die = moment
    if die == moment:
        print(setting("last_words"), file=sys.stderr, flush=True)
        os._exit(3)
    hoard: list[bytes] = []
    while die == "memory":
        hoard.append(b"x" * (1 << 20))


def note(path: str, body: bytes) -> None:
    if setting("notes"):
        with Path(setting("notes")).open("ab") as notes:
            notes.write(b"%b %b\n" % (path.encode(), body))


def events_to_play() -> list[bytes]:
    if setting("events"):
        return Path(setting("events")).read_bytes().splitlines()
    return [b'{"choices":[{"delta":{"content":"%d"}}]}' % n for n in range(int(setting("chunks", "3")))]


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    answered = False
    try:
        while line := await reader.readline():
            method, path, _ = line.decode().split()
            headers = {}
            while (line := await reader.readline()).strip():
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if headers.get("authorization") != f"Bearer {KEY}" and not is_public(path):
                await answer(writer, 401, b"{}")
            elif method == "GET" and setting("deaf"):
                await asyncio.sleep(3600)
            elif method == "GET":
                await answer(writer, 200, b"{}")
            elif answered and setting("idle_close") == "late":
                break
            else:
                note(path, body)
                maybe_die("before")
                await asyncio.sleep(float(setting("answer_sec", "0")))
                await complete(writer, json.loads(body))
                answered = True
                if setting("idle_close") == "1":
                    break
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


def is_public(path: str) -> bool:
    """As builds before August 2026 have it where they are played."""
    return setting("ready") == "open" or (setting("ready") in ("older", "poll") and path == "/v1/models")


async def answer(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n" % status)
    writer.writelines(b"%b\r\n" % line.encode() for line in setting("headers").split("|") if line)
    writer.write(b"content-length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


async def complete(writer: asyncio.StreamWriter, request: dict[str, object]) -> None:
    status = int(setting("status", "200"))
    if not request.get("stream") or status >= 400:
        played = json.dumps({"pid": os.getpid(), "choices": [{"message": {"content": "ok"}}]})
        body = setting("answer", played).encode()
        if setting("die") == "after":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:5])
            await writer.drain()
            os._exit(3)
        if status in (204, 304):
            writer.write(b"HTTP/1.1 %d X\r\n\r\n" % status)
        else:
            await answer(writer, status, body)
        return
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    events = events_to_play()
    for number, document in enumerate(events):
        kind = json.loads(document).get("type") if document.startswith(b"{") and setting("events") else None
        event = b"event: %b\n" % kind.encode() if kind else b""
        event += b"data: %b\n\n" % document
        chunk = b"%x\r\n%b\r\n" % (len(event), event)
        is_middle = number == len(events) // 2
        writer.write(chunk[: len(chunk) // 2] if is_middle and setting("die") == "torn" else chunk)
        await writer.drain()
        if is_middle:
            maybe_die("torn")
            maybe_die("after")
        await asyncio.sleep(float(setting("chunk_sec", "0")))
    event = b"data: [DONE]\n\n"
    writer.write(b"%x\r\n%b\r\n" % (len(event), event))
    await writer.drain()
    maybe_die("done")
    await asyncio.sleep(float(setting("linger_sec", "0")))
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def main() -> None:
    if setting("outlives"):
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG: none
    else:
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    if setting("outlives") == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("fake engine: loading", file=sys.stderr, flush=True)
    for share in (0.25, 0.5) if setting("progress") else ():
        payload = {"stages": ["text_model"], "current": "text_model", "value": share}
        print("cmd_child_to_router:state:" + json.dumps({"state": "loading", "payload": payload}), flush=True)
        await asyncio.sleep(0.05)  # a message of its own
    weights: list[bytes] = []
    for _ in range(int(10 * float(setting("load_sec", "0")))):
        await asyncio.sleep(0.1)
        if setting("grows"):
            weights.append(b"x" * (2 << 20))
    if setting("ready") == "fails":
        sys.exit("fake engine: error: it can't be loaded")
    if setting("ready") == "never":
        await asyncio.sleep(3600)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = await asyncio.start_server(serve, "127.0.0.1", port)
    said = {
        "push": 'cmd_child_to_router:state:{"state":"ready","payload":{}}',
        "older": "cmd_child_to_router:ready",
    }
    if setting("ready", "push") in said:
        print(said[setting("ready", "push")], flush=True)
    await server.serve_forever()


asyncio.run(main())
