"""A server of OpenAI's API and of no other, in the shapes that vLLM answers in.

    python openai_server.py --port 8085 --name served

Run by routers under test as an engine of the kind `command`. It refuses parameters that it does not know, tells
the usage of a stream only if it is asked to, and nothing of its own times. What it answers is told by the user's
last words: "call" calls the first tool twice, "think" thinks first, "abrupt" ends without [DONE], "torn" without
anything that ends it; all else is answered with the same words. What it was asked is at `/seen`.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KNOWN = frozenset(
    {
        "chat_template_kwargs",
        "dimensions",
        "echo",
        "encoding_format",
        "frequency_penalty",
        "ignore_eos",
        "input",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "min_p",
        "model",
        "n",
        "parallel_tool_calls",
        "presence_penalty",
        "prompt",
        "reasoning_effort",
        "repetition_penalty",
        "response_format",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "suffix",
        "temperature",
        "tool_choice",
        "tools",
        "top_k",
        "top_logprobs",
        "top_p",
        "user",
    }
)
CONTEXT = 100
"""Words, which are its tokens."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        known = {"/health": {}, "/seen": self.server.seen}
        self._answer(200, known[self.path]) if self.path in known else self._answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["content-type"] != "application/json":
            self._mistake(400, "Bad Request", "Only 'application/json' is allowed", "content-type")
            return
        self.server.seen.append({"path": self.path, **body})
        answering = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._complete,
            "/v1/embeddings": self._embed,
            "/v1/messages": self._message,
        }
        if self.path not in answering:
            self._answer(404, {"detail": "Not Found"})
        elif body.get("model") != self.server.name:
            self._mistake(404, "NotFoundError", f"The model `{body.get('model')}` does not exist.", "model")
        elif unknown := sorted(set(body) - KNOWN):
            self._mistake(400, "BadRequestError", f"Unknown parameters: {', '.join(unknown)}", unknown[0])
        else:
            answering[self.path](body)

    def _chat(self, body: dict[str, Any]) -> None:
        words = " ".join(map(_text, body["messages"])).split()
        last = _text(next(turn for turn in reversed(body["messages"]) if turn["role"] in ("user", "tool")))
        if last == "call" and body.get("tools"):
            name = body["tools"][0]["function"]["name"]
            calls = [
                {
                    "index": index,
                    "id": f"call_{index}",
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps({"city": city})},
                }
                for index, city in enumerate(("Oslo", "Rome"))
            ]
            self._say(body, words, [{"tool_calls": [call]} for call in calls], "tool_calls")
        elif last == "think":
            self._say(body, words, [{"reasoning": "Well"}, {"reasoning": "..."}, {"content": "so"}])
        elif body.get("response_format", {}).get("type") == "json_schema":
            self._say(body, words, [{"content": '{"city": '}, {"content": '"Oslo"}'}])
        else:
            self._say(body, words, [{"content": word} for word in re.findall(r"\s*\S+", last)])

    def _message(self, body: dict[str, Any]) -> None:
        """As vLLM's own route, which ignores what it does not know."""
        content = [{"type": "text", "text": "Hello"}]
        usage = {"input_tokens": 1, "output_tokens": 1}
        named = {"id": "msg_1", "type": "message", "role": "assistant", "model": self.server.name}
        self._answer(200, {**named, "content": content, "stop_reason": "end_turn", "usage": usage})

    def _complete(self, body: dict[str, Any]) -> None:
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        self._say(body, " ".join(prompts).split(), [{"text": word} for word in re.findall(r"\s*\S+", prompts[0])])

    def _embed(self, body: dict[str, Any]) -> None:
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [
            {"object": "embedding", "index": i, "embedding": [float(len(t)), 1.0]} for i, t in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        self._answer(200, {"object": "list", "data": data, "model": self.server.name, "usage": usage})

    def _say(
        self, body: dict[str, Any], words: list[str], pieces: list[dict[str, Any]], finish: str = "stop"
    ) -> None:
        if len(words) > CONTEXT:
            message = f"This model's maximum context length is {CONTEXT} tokens, and the prompt has {len(words)}."
            self._mistake(400, "BadRequestError", message, "input_tokens")
            return
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or len(pieces)
        if limit < len(pieces):
            pieces, finish = pieces[:limit], "length"
        stops = body.get("stop") or []
        word = None
        for number, piece in enumerate(pieces):
            word = next((stop for stop in stops if stop in str(piece.get("content", piece.get("text", "")))), None)
            if word is not None:
                pieces = pieces[:number]
                break
        usage = {
            "prompt_tokens": len(words),
            "total_tokens": len(words) + len(pieces),
            "completion_tokens": len(pieces),
            "prompt_tokens_details": None,
        }
        ended = {"finish_reason": finish, "stop_reason": word}
        if body.get("stream"):
            told = usage if (body.get("stream_options") or {}).get("include_usage") else None
            events = list(self._events(pieces, ended, told))
            self._stream(
                events[:2] if "torn" in words else events, ends=not {"abrupt", "torn"}.intersection(words)
            )
            return
        object_ = "text_completion" if "prompt" in body else "chat.completion"
        choice = {"index": 0, "logprobs": None, **ended, **_whole(pieces, is_text="prompt" in body)}
        named = {"id": "cmpl-1", "object": object_, "created": 1, "model": self.server.name}
        self._answer(200, {**named, "choices": [choice], "usage": usage, "prompt_logprobs": None})

    def _events(
        self, pieces: list[dict[str, Any]], ended: dict[str, Any], usage: dict[str, Any] | None
    ) -> Iterator[dict[str, Any]]:
        is_text = any("text" in piece for piece in pieces)
        named = {"id": "cmpl-1", "created": 1, "model": self.server.name, "object": "chat.completion.chunk"}

        def chunk(piece: dict[str, Any], **more: Any) -> dict[str, Any]:
            said = piece if is_text else {"delta": piece}
            return {**named, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": None, **more}]}

        if not is_text:
            yield chunk({"role": "assistant", "content": ""})
        yield from map(chunk, pieces)
        yield chunk({"text": ""} if is_text else {}, **ended)
        if usage is not None:
            yield {**named, "choices": [], "usage": usage}

    def _stream(self, events: list[dict[str, Any]], *, ends: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        data = [json.dumps(event, separators=(",", ":")) for event in events]
        for line in (*data, *(["[DONE]"] if ends else [])):
            event = f"data: {line}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
        self.wfile.write(b"0\r\n\r\n")

    def _mistake(self, status: int, kind: str, message: str, param: str) -> None:
        self._answer(status, {"error": {"message": message, "type": kind, "param": param, "code": status}})

    def _answer(self, status: int, document: Any) -> None:
        body = json.dumps(document, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self, host: str, port: int, name: str) -> None:
        super().__init__((host, port), Handler)
        self.name = name
        self.seen: list[dict[str, Any]] = []


def _text(turn: dict[str, Any]) -> str:
    content = turn.get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def _whole(pieces: list[dict[str, Any]], *, is_text: bool) -> dict[str, Any]:
    if is_text:
        return {"text": "".join(piece["text"] for piece in pieces)}
    said = {key: "".join(piece.get(key, "") for piece in pieces) or None for key in ("content", "reasoning")}
    calls = [call for piece in pieces for call in piece.get("tool_calls", ())]
    return {"message": {"role": "assistant", **said, "refusal": None, "tool_calls": calls}}


def run(host: str, port: int, name: str) -> None:
    """Serve until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Server(host, port, name).serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    run(options.host, options.port, options.name)
