"""A typical speech server: it reads a form, answers in bytes, and knows its model by one name only.

    python speech_server.py --port 8085 --name whisper-1 [--key KEY] [--load-sec 0.5]

Routers under test run it as an engine of the kind `command`. `/seen` returns its arguments, environment and the
models requested; speech for the text "slowly" stops after its first piece until `/go-on` is requested.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn

PIECES = 40
"""Number of pieces of a speech."""
PIECE = bytes(range(256)) * 16


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if self.path == "/seen":
            self._answer(200, self.server.seen)
        elif self.path == "/go-on":
            self.server.goes_on.set()
            self._answer(200, {})
        elif self.path == "/ready":
            self._answer(200 if self.server.is_loaded else 503, {})
        else:
            self._answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        key = self.server.options.key
        if key and self.headers.get("authorization") != f"Bearer {key}":
            self._answer(401, {"error": "Unauthorized"})
        elif self.path == "/v1/audio/transcriptions":
            self._transcribe(body)
        elif self.path == "/v1/audio/speech":
            self._speak(json.loads(body))
        else:
            self._answer(404, {"detail": "Not Found"})

    def _transcribe(self, body: bytes) -> None:
        head = b"content-type: " + self.headers["content-type"].encode() + b"\r\n\r\n"
        form = BytesParser().parsebytes(head + body)
        fields = {part.get_param("name", header="content-disposition"): part for part in form.get_payload()}
        model = fields["model"].get_payload().strip()
        if self._knows(model):
            audio = fields["file"].get_payload(decode=True)
            self._answer(200, {"text": f"{len(audio)} bytes of speech", "fields": sorted(map(str, fields))})

    def _speak(self, asked: dict[str, Any]) -> None:
        if not self._knows(asked.get("model")):
            return
        self.send_response(200)
        self.send_header("content-type", "audio/mpeg")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number in range(PIECES):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(PIECE), PIECE))
            if number == 0 and asked.get("input") == "slowly":
                self.server.goes_on.wait(20)
        self.wfile.write(b"0\r\n\r\n")

    def _knows(self, model: object) -> bool:
        self.server.seen["models"].append(model)
        if model != self.server.options.name:
            self._answer(404, {"detail": f"The model {model!r} does not exist"})
        return model == self.server.options.name

    def _answer(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        print(format % args, flush=True)  # on standard output, as many do


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__((options.host, options.port), Handler)
        self.options = options
        self.is_loaded = False
        self.goes_on = threading.Event()
        self.seen: dict[str, Any] = {
            "models": [],
            "argv": sys.argv[1:],
            "cwd": os.getcwd(),
            "env": dict(os.environ),
        }

    def load(self) -> None:
        time.sleep(self.options.load_sec)
        self.is_loaded = True
        print("loaded", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", default="whisper-1")
    parser.add_argument("--key", default="")
    parser.add_argument("--load-sec", type=float, default=0.0)
    parser.add_argument("--model", default="")
    options = parser.parse_args()
    if options.model == "broken":
        print("cannot open broken: it is no model", file=sys.stderr)
        sys.exit(1)

    def end(*_: object) -> NoReturn:
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    server = Server(options)
    threading.Thread(target=server.load, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
