"""The Hugging Face hub on this machine: its API over real HTTP, with the content on another host and port.

Speaks what `huggingface_hub` asks of it: the listing of a repository with sizes and checksums, and files that
redirect to a content server with ranges. What can go wrong is told to it beforehand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_PIECE = 16384


@dataclass
class Hub:
    """Repositories by name, each with its files; and everything that was asked."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Method and path, at the hub."""
    fetched: list[tuple[str, int]] = field(default_factory=list)
    """File and first byte, at the content server."""
    sent_bytes: int = 0
    token: str | None = None
    """Without it every repository is gated."""
    leaked_tokens: list[str] = field(default_factory=list)
    """Keys that reached the content server."""
    cuts: list[float] = field(default_factory=list)
    """Shares of a file after which the connection breaks, one after the other."""
    hold_at: float | None = None
    """Share of a file after which nothing more is sent until `go_on`."""
    go_on: threading.Event = field(default_factory=threading.Event)
    held: threading.Event = field(default_factory=threading.Event)
    ranges: bool = True
    wrong: set[str] = field(default_factory=set)
    """Files whose content is not what the listing says."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Files that are larger than they are, by the listing."""
    busy: int = 0
    """So many requests are answered by 503 first."""
    page: bytes = b""
    """The answer to everything, as of a portal between us and the hub."""
    url: str = ""
    content_url: str = ""

    def commit(self, repo: str) -> str:
        state = json.dumps({path: len(content) for path, content in sorted(self.repositories[repo].items())})
        return hashlib.sha1(state.encode()).hexdigest()

    def listing(self, repo: str) -> dict[str, Any]:
        siblings = [
            {
                "rfilename": path,
                "size": self.sizes.get(path, len(content)),
                "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
                **(
                    {
                        "lfs": {
                            "sha256": hashlib.sha256(content).hexdigest(),
                            "size": self.sizes.get(path, len(content)),
                            "pointerSize": 135,
                        }
                    }
                    if path.endswith((".gguf", ".safetensors"))
                    else {}
                ),
            }
            for path, content in self.repositories[repo].items()
        ]
        return {"id": repo, "sha": self.commit(repo), "siblings": siblings, "tags": [], "downloads": 0}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Front(_Handler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if hub.page:
                self.answer(200, hub.page)
                return
            if hub.busy > 0:
                hub.busy -= 1
                self.answer(503, b"busy")
                return
            _, *parts = path.split("/")
            listing = parts[:2] == ["api", "models"]
            repo = "/".join(parts[2:4] if listing else parts[:2])
            if repo not in hub.repositories:
                self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            elif listing:
                self.answer(200, json.dumps(hub.listing(repo)).encode(), {"Content-Type": "application/json"})
            elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                status = 403 if "Authorization" in self.headers else 401
                self.answer(status, b"gated", {"X-Error-Code": "GatedRepo"})
            elif (file := "/".join(parts[4:])) not in hub.repositories[repo]:
                self.answer(404, b"no such file", {"X-Error-Code": "EntryNotFound"})
            else:
                self.answer(302, b"", {"Location": f"{hub.content_url}/{repo}/{file}", "X-Repo-Commit": parts[3]})

    class Content(_Handler):
        def do_GET(self) -> None:
            _, user, name, file = urlsplit(self.path).path.split("/", 3)
            content = hub.repositories[f"{user}/{name}"][file]
            if "Authorization" in self.headers:
                hub.leaked_tokens.append(self.headers["Authorization"])
            if file in hub.wrong:
                content = content[:-1] + bytes([content[-1] ^ 1])
            start, end = 0, len(content)
            wanted = self.headers.get("Range", "") if hub.ranges else ""
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first), min(end, int(last) + 1) if last else end
            is_look = bool(wanted) and wanted[-1] != "-"
            if not is_look:
                hub.fetched.append((file, start))
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            for at in range(start, end, _PIECE):
                piece = content[at : min(end, at + _PIECE)]
                if not is_look and not self._may_send(at / len(content)):
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.wfile.write(piece)
                if not is_look:
                    hub.sent_bytes += len(piece)

        def _may_send(self, share: float) -> bool:
            if hub.cuts and share >= hub.cuts[0]:
                hub.cuts.pop(0)
                return False
            if hub.hold_at is not None and share >= hub.hold_at and not hub.go_on.is_set():
                hub.held.set()
                hub.go_on.wait(60)
            return True

    front, content = (ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Front, Content))
    hub.url = f"http://127.0.0.1:{front.server_port}"
    hub.content_url = f"http://localhost:{content.server_port}"
    for server in (front, content):
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # looks for its end
    try:
        yield hub
    finally:
        hub.go_on.set()
        for server in (front, content):
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client is gone
            super().handle()

    def log_message(self, *_: object) -> None:
        pass
