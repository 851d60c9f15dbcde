"""A `vllm serve` without a model, which behaves as vLLM 0.32 does where that matters to a supervisor.

    vllm serve FOLDER --port N …

It is two processes in one session. The second stands for the engine: it knows nothing of the first's death, and
its environment is empty, as setproctitle leaves it. The first binds its port at once, and listens when it has
loaded. While it loads, it swallows SIGTERM and goes at the second, or at one SIGINT; later it ends every answer
with "abort", and exits with 0, which it also does when its engine has died. A stopped engine (SIGSTOP) answers
nothing, but /health stays 200.

The last words of the user say what is answered: "tokens N" (by default 3), "slowly" (one each 50 ms).

With --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1 it can sleep: then the second process holds half of what the
first held, and requests hang until it is woken up. /health stays 200.

FAKE_VLLM_LOAD_SEC   how long it loads
FAKE_VLLM_HOLDS_MIB  memory that the first process holds, which plays that of a GPU (see fake_nvml)
FAKE_VLLM_SLEEP      ignored: says that it sleeps, and frees nothing, as on the CPU; fails: answers 500
FAKE_VLLM_WAKE       fails: answers 500; dies; lies: says that it is awake, and is not
FAKE_VLLM_FAILS      file with what it logs before it exits with 1 instead of serving
FAKE_VLLM_NOTES      file to which it appends its arguments and what it was asked, a line each
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {name[10:].lower(): value for name, value in os.environ.items() if name.startswith("FAKE_VLLM_")}
KEY = os.environ["VLLM_API_KEY"]
DIED = {
    "error": {
        "message": "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
}


def flag(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def note(what: object) -> None:
    if "notes" in SETTINGS:
        with Path(SETTINGS["notes"]).open("a") as notes:
            notes.write(json.dumps(what) + "\n")


def is_for_developers() -> bool:
    return os.environ.get("VLLM_SERVER_DEV_MODE") == "1" and "--enable-sleep-mode" in sys.argv


HOLDER = """
import sys, time
for line in sys.stdin:
    held = b"x" * (int(line) << 20)
    print(flush=True)
time.sleep(600)
"""


class Server:
    def __init__(self, engine: subprocess.Popen[bytes]) -> None:
        self.engine = engine
        self.is_ending = False
        self.holds = b""
        self.awake = asyncio.Event()
        self.hold(engine_mib=0)

    def hold(self, engine_mib: int) -> None:
        """Hold all memory, or let the engine hold this much instead."""
        own_mib = 0 if engine_mib else int(SETTINGS.get("holds_mib", "0"))
        self.holds = b"x" * (own_mib << 20)
        assert self.engine.stdin is not None
        assert self.engine.stdout is not None
        self.engine.stdin.write(b"%d\n" % engine_mib)
        self.engine.stdin.flush()
        self.engine.stdout.readline()
        (self.awake.clear if engine_mib else self.awake.set)()

    def sleep_or_wake(self, writer: asyncio.StreamWriter, path: str) -> None:
        """As vLLM's routes for developers do, which ask for no key."""
        note({"path": path})
        how = SETTINGS.get("sleep" if path.startswith("/sleep") else "wake")
        if how == "fails":
            self.answer(writer, 500, {"error": {"message": "it failed", "code": 500}})
        elif path.startswith("/sleep"):
            if how != "ignored":
                self.hold(engine_mib=int(SETTINGS["holds_mib"]) // 2)
            self.answer(writer, 200, {"status": "sleeping", "level": 1})
        elif how == "dies":
            self.engine.kill()
        else:
            if how != "lies":
                self.hold(engine_mib=0)
            self.answer(writer, 200, {"status": "awake", "tags": None})

    @property
    def is_alive(self) -> bool:
        return self.engine.poll() is None

    @property
    def is_stopped(self) -> bool:
        if not self.is_alive:
            return False
        return Path(f"/proc/{self.engine.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                headers = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if path.startswith("/v1/") and headers.get("authorization") != f"Bearer {KEY}":
                    self.answer(writer, 401, {"error": "Unauthorized"})
                elif method == "GET":
                    self.tell(writer, path)
                elif path.partition("?")[0] in ("/sleep", "/wake_up") and is_for_developers():
                    self.sleep_or_wake(writer, path)
                elif headers.get("content-type", "").split(";")[0] != "application/json":
                    self.answer(writer, 400, {"error": {"message": "Unsupported Media Type", "code": 400}})
                else:
                    await self.complete(writer, path, json.loads(body))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def answer(self, writer: asyncio.StreamWriter, status: int, document: object, kind: str = "") -> None:
        body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: {kind or 'application/json'}\r\n".encode())
        writer.write(b"content-length: %d\r\n\r\n" % len(body) + body)

    def tell(self, writer: asyncio.StreamWriter, path: str) -> None:
        name = flag("--served-model-name")
        if path == "/health":
            self.answer(writer, 200 if self.is_alive else 503, "")
        elif path == "/is_sleeping" and is_for_developers():
            self.answer(writer, 200, {"is_sleeping": not self.awake.is_set()})
        elif path == "/v1/models":
            limit = int(flag("--max-model-len")) if "--max-model-len" in sys.argv else 2048
            self.answer(writer, 200, {"object": "list", "data": [{"id": name, "max_model_len": limit}]})
        elif path == "/metrics":
            labels = f'{{engine="0",model_name="{name}"}}'
            families = {"num_requests_running": 1.0, "num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.25}
            lines = [
                line
                for family, value in families.items()
                for line in (
                    f"# HELP vllm:{family} x",
                    f"# TYPE vllm:{family} gauge",
                    f"vllm:{family}{labels} {value}",
                )
            ]
            self.answer(writer, 200, "\n".join(lines) + "\n", "text/plain; version=1.0.0")
        else:
            self.answer(writer, 404, {"detail": "Not Found"})

    async def complete(self, writer: asyncio.StreamWriter, path: str, asked: dict[str, Any]) -> None:
        note({"path": path, **asked})
        if any(isinstance(each.get("content"), list) for each in asked.get("messages", ())):
            told = f"{asked['model']} is not a multimodal model"
            print(f"(APIServer pid=1) ERROR 11-28 21:38:40 [serving.py:1] ValueError: {told}", flush=True)
            fault = {"message": told, "type": "BadRequestError", "param": None, "code": 400}
            self.answer(writer, 400, {"error": fault})
            return
        await self.awake.wait()
        words = str(asked["messages"][-1]["content"]) if "messages" in asked else str(asked.get("prompt", ""))
        count = int(found[1]) if (found := re.search(r"tokens (\d+)", words)) else asked.get("max_tokens", 3)
        streams = asked.get("stream") is True
        if streams:
            writer.write(b"HTTP/1.1 200 X\r\ncontent-type: text/event-stream; charset=utf-8\r\n")
            writer.write(b"transfer-encoding: chunked\r\n\r\n")
        said, reason = 0, "length"
        while said < count:
            while self.is_stopped:  # noqa: ASYNC110 - nothing tells its end
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.05 if "slowly" in words else 0)
            if self.is_ending:
                reason = "abort"
                break
            if not self.is_alive:
                if streams:
                    self.event(writer, DIED)
                    self.end(writer)
                else:
                    self.answer(writer, 500, DIED)
                return
            said += 1
            if streams:
                self.event(writer, {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]})
                await writer.drain()
        usage = {"prompt_tokens": 5, "completion_tokens": said, "total_tokens": 5 + said}
        if not streams:
            text = {"text": "x" * said} if "prompt" in asked else {"message": {"content": "x" * said}}
            self.answer(writer, 200, {"choices": [{"index": 0, **text, "finish_reason": reason}], "usage": usage})
            return
        self.event(writer, {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": reason}]})
        if (asked.get("stream_options") or {}).get("include_usage"):
            self.event(writer, {"choices": [], "usage": usage})
        self.end(writer)

    def event(self, writer: asyncio.StreamWriter, document: object) -> None:
        text = document if isinstance(document, str) else json.dumps(document, separators=(",", ":"))
        data = f"data: {text}\n\n".encode()
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self, writer: asyncio.StreamWriter) -> None:
        self.event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")


async def main(listener: socket.socket, engine: subprocess.Popen[bytes]) -> None:
    swallowed: list[float] = []
    loop = asyncio.get_running_loop()

    def while_loading() -> None:
        swallowed.append(time.monotonic())
        if len(swallowed) > 1:
            os._exit(1)

    def interrupted() -> None:
        engine.kill()
        os._exit(1)

    loop.add_signal_handler(signal.SIGTERM, while_loading)
    loop.add_signal_handler(signal.SIGINT, interrupted)
    server = Server(engine)
    print("INFO 11-28 10:00:00 [model.py:733] Resolved architecture: LlamaForCausalLM", flush=True)
    await asyncio.sleep(float(SETTINGS.get("load_sec", "0")))
    if "fails" in SETTINGS:
        fail(engine)
    ended = asyncio.Event()

    def when_ready() -> None:
        server.is_ending = True
        loop.call_later(0.2, ended.set)

    loop.add_signal_handler(signal.SIGTERM, when_ready)
    await asyncio.start_server(server.serve, sock=listener)
    print("INFO:     Application startup complete.", file=sys.stderr, flush=True)
    while server.is_alive and not ended.is_set():  # noqa: ASYNC110 - either may happen
        await asyncio.sleep(0.02)
    if not ended.is_set():
        await asyncio.sleep(1)
    engine.kill()
    os._exit(0)


def fail(engine: subprocess.Popen[bytes]) -> None:
    print(Path(SETTINGS["fails"]).read_text(), file=sys.stderr, flush=True)
    engine.kill()
    sys.exit(1)


def bound() -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((flag("--host"), int(flag("--port"))))
    return listener


if __name__ == "__main__":
    note(sys.argv)
    Path(os.environ.get("TMPDIR", "/tmp"), "a-socket").touch()
    engine = subprocess.Popen(
        [sys.executable, "-c", HOLDER], env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    asyncio.run(main(bound(), engine))
