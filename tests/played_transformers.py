"""`transformers serve` in what it does otherwise than others: a real process and real HTTP, without torch.

    played_transformers.py serve FOLDER --host 127.0.0.1 --port 8085 --device cpu --dtype auto

What it plays was seen of transformers 5.24.0: it listens once the model is loaded; its streams have no last event
and begin before anything is computed; it refuses unknown fields with 422, and its errors are `{"detail": …}` or
text; in a stream an error is no JSON; a text that stops the answer stays in it.

It answers with the words of its prompt, one after the other. Some make it do something instead: "fails" and
"overflows" are errors, "endless" has a
prompt of 4000 tokens, "poisons" is one after which all answers are, "breaks" ends the stream, and "waits" lasts
until its client has left. What it was asked is at `/seen`, a list of objects with path, id, body and whether its
client has left.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_BOTH = {
    "model",
    "stream",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "frequency_penalty",
    "logit_bias",
}
_BOTH |= {"generation_config", "n", "logprobs", "stream_options"}
KNOWN = {
    "/v1/chat/completions": {
        *_BOTH,
        "messages",
        "tools",
        "chat_template_kwargs",
        "tool_choice",
        "response_format",
    },
    "/v1/completions": {*_BOTH, "prompt", "suffix", "echo"},
}
FOLDER = sys.argv[2]
SEEN: list[dict[str, Any]] = []
ERRORS = {"fails": 'it says "no", and \\o/', "overflows": "index out of range in self"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing: the log is for what it has to say."""

    def do_GET(self) -> None:
        if self.path == "/seen":
            self.whole(200, json.dumps({"requests": SEEN, "argv": sys.argv[1:], "env": dict(os.environ)}))
        else:
            self.whole(200, '{"status":"ok"}')

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["content-length"]))
        seen: dict[str, Any] = {"path": self.path, "id": self.headers["x-request-id"], "left": False}
        SEEN.append(seen)
        body = seen["body"] = json.loads(text)
        unknown = set(body) - KNOWN.get(self.path, set())
        if unknown or not self.headers["content-type"].startswith("application/json"):
            self.whole(422, json.dumps({"detail": f"Unexpected fields in the request: {unknown}"}))
        elif body.get("model", FOLDER) != FOLDER:
            self.whole(400, json.dumps({"detail": f"Server is pinned to '{FOLDER}'"}))
        elif not body.get("stream"):
            self.whole(200, '{"choices":[{"message":{"content":"NOT STREAMED"}}]}')
        elif "messages" in body and not has_template():
            self.whole(500, "Internal Server Error", "text/plain")
        else:
            try:
                self.stream(body)
            except OSError:
                seen["left"] = True

    def whole(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        is_chat = "messages" in body
        if is_chat:
            self.event(chunk({"role": "assistant"}, is_chat))
        pieces = []
        for piece in answer(body):
            if (word := piece.strip()) == "poisons" or SEEN[0].get("poisoned"):
                SEEN[0]["poisoned"] = True
                self.event(
                    '{"error": "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might …"}'
                )
                break
            if word in ERRORS:
                self.event(f'{{"error": "{ERRORS[word]}"}}')
                break
            if word == "breaks":
                time.sleep(0.2)  # what it said before is not read together with the end
                break
            while word == "waits":
                self.event(chunk({"content": "."}, is_chat))
                time.sleep(0.02)
            self.event(chunk({"content": piece}, is_chat))
            pieces.append(piece)
        else:
            count = len(pieces)
            reason = "length" if count == body["max_tokens"] else "stop"
            prompt = 4000 if "endless" in body.get("prompt", str(body.get("messages"))) else 7
            usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
            self.event(chunk({}, is_chat, finish_reason=reason, usage=usage))
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))


def has_template() -> bool:
    return "chat_template" in json.loads(Path(FOLDER, "tokenizer_config.json").read_text())


def answer(body: dict[str, Any]) -> Iterator[str]:
    """The words of the prompt, up to one with which a stop is complete."""
    told = ""
    stops = body.get("stop") or []
    asked = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    for word in re.findall(r"\s*\S+", asked)[: body["max_tokens"]]:
        told += word
        yield word
        if any(stop in told for stop in ([stops] if isinstance(stops, str) else stops)):
            return


def chunk(delta: dict[str, Any], is_chat: bool, finish_reason: str | None = None, **more: Any) -> str:
    text = {"delta": delta} if is_chat else {"text": delta.get("content", "")}
    choice = {**text, "index": 0, **({"finish_reason": finish_reason} if finish_reason else {})}
    return json.dumps({"id": "x", "choices": [choice], "created": 1, "model": FOLDER, **more})


if __name__ == "__main__":
    if not Path(FOLDER, "config.json").is_file():
        sys.exit("OSError: there is no such model")
    host, port = (sys.argv[sys.argv.index(name) + 1] for name in ("--host", "--port"))
    print("Loading weights: 100%", file=sys.stderr, flush=True)
    ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
