"""HTTP client of a running router, for the commands that ask one.

Based on `http.client`: one request at a time, and a stream of server-sent events read line by line. It uses no
proxy of the environment and follows no redirect, so that the key is sent only to the router.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit

KEY_VARIABLE = "LLAMA_ROUTER_API_KEY"
DEFAULT_PORT = 8000
JSON_OBJECT = {"type": "json_object", "schema": {"type": "object"}}
"""`response_format` of answers in JSON; without the schema, older builds of llama-server do not enforce it."""
PRIORITIES = ("high", "normal", "low")
"""Values of the header `X-Request-Priority`."""
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104
_ANSWER_SEC = 10.0
_SILENCE_SEC = 75.0
"""Streams send something every 30 s at the latest."""
_BLOCK = 1 << 18
"""Bytes of a file that are sent in one step."""
_JSON = {"Content-Type": "application/json"}
_EVENTS = "text/event-stream"


class CannotAsk(Exception):
    """Raised when the router does not respond or refuses; the message says why and what to do."""


class Unreachable(CannotAsk):
    """Raised when the router cannot be reached or the connection broke; trying again may help."""


class Refused(CannotAsk):
    """Raised when the router answers with an error; `code` is its code, empty if it has none."""

    def __init__(self, message: str, status: int, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Readable(Protocol):
    """A file that is sent."""

    def read(self, count: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Happened:
    """One server-sent event."""

    name: str
    text: str
    id: str

    def json(self) -> Any:
        return json.loads(self.text)


class RouterClient:
    """Client of the router at `url` (see `base_url`). Raises ValueError if the URL or the key is invalid."""

    def __init__(self, url: str, key: str | None) -> None:
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError(f"{KEY_VARIABLE} is not a valid key: keys consist of printable ASCII characters")
        self.url = base_url(url)
        parts = urlsplit(self.url)
        self._host, self._port = parts.hostname or "", parts.port
        self._secure = parts.scheme == "https"
        self._prefix = parts.path
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def get(self, path: str, *, timeout_sec: float = _ANSWER_SEC) -> Any:
        """Return the JSON document at `path`. Raises CannotAsk."""
        with self._ask(path, {}, timeout_sec) as answer:
            return json.loads(answer.read())

    def delete(self, path: str) -> Any:
        """Send DELETE for `path` and return the JSON document of the answer. Raises CannotAsk."""
        with self._ask(path, {}, _ANSWER_SEC, "DELETE") as answer:
            return json.loads(answer.read())

    def post(self, path: str, body: Any = None, *, timeout_sec: float | None = _ANSWER_SEC) -> Any:
        """Send a JSON document to `path` and return that of the answer. Raises CannotAsk."""
        content = json.dumps(body).encode()
        with self._ask(path, _JSON, timeout_sec, "POST", content) as answer:
            return json.loads(answer.read() or b"null")

    def has(self, path: str) -> bool:
        """Return whether there is something at `path`. Raises CannotAsk."""
        try:
            with self._ask(path, {}, _ANSWER_SEC, "HEAD"):
                return True
        except Refused as error:
            if error.status == 404:
                return False
            raise

    def send(self, path: str, file: Readable, nbytes: int) -> None:
        """Send a file of `nbytes` to `path`. Raises CannotAsk."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(nbytes)}
        with self._ask(path, headers, _SILENCE_SEC, "POST", file) as answer:
            answer.read()

    def text(self, path: str) -> str:
        """Return the plain text at `path`. Raises CannotAsk."""
        with self._ask(path, {}, _ANSWER_SEC) as answer:
            return answer.read().decode(errors="replace")

    def events(self, path: str, after: str = "") -> Iterator[Happened]:
        """Yield server-sent events until the router ends the stream. Raises CannotAsk; Unreachable if it breaks.

        `after` is the id of the last event received: later ones that the router still has come first.
        """
        headers = {"Accept": _EVENTS, **({"Last-Event-ID": after} if after else {})}
        with self._ask(path, headers, _SILENCE_SEC) as answer:
            yield from _events(answer)

    def asked(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str], began: Callable[[Message], None]
    ) -> Generator[Happened, None, None]:
        """Send a request for a model and yield the events of its answer, or the document as a single one.

        `began` gets the headers of the answer. It may be a long time until they come, for which the router has its
        own limits. Closing the iterator closes the connection, which cancels the request. Raises CannotAsk.
        """
        content = json.dumps(body).encode()
        with self._ask(path, {**_JSON, **headers}, None, "POST", content) as answer, contextlib.closing(answer):
            began(answer.headers)
            if answer.headers.get_content_type() == _EVENTS:
                yield from _events(answer)
            else:
                yield Happened("message", answer.read().decode(errors="replace"), "")

    @contextlib.contextmanager
    def _ask(
        self,
        path: str,
        headers: Mapping[str, str],
        timeout_sec: float | None,
        method: str = "GET",
        body: Any = None,
    ) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=timeout_sec, blocksize=_BLOCK)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before the end
                connection.request(method, self._prefix + path, body, {**self._headers, **headers})
            if timeout_sec is None:
                _notice_death(connection.sock)
            answer = connection.getresponse()
            if not 200 <= answer.status < 300:
                raise self._refusal(answer)
            yield answer
        except TimeoutError:
            raise Unreachable(f"The router at {self.url} does not answer.") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"No router can be reached at {self.url}: {_in_words(error)}.") from None
        except ValueError:  # not JSON
            raise CannotAsk(f"The server at {self.url} is not a llama-router.") from None
        finally:
            connection.close()

    def _refusal(self, answer: http.client.HTTPResponse) -> CannotAsk:
        """Return what an answer other than success means, in the dialect of any of the router's routes."""
        content = answer.read()
        if answer.status == 401:
            message = f"The router at {self.url} requires a valid API key: set {KEY_VARIABLE}."
            return Refused(message, answer.status)
        if not content:  # of a HEAD request
            return Refused(f"The router at {self.url} answers with HTTP {answer.status}.", answer.status)
        try:
            document = json.loads(content)
            said = document.get("error", document)
            code, message = (
                ("", said) if isinstance(said, str) else (said.get("code", said.get("status")), said["message"])
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return CannotAsk(f"The server at {self.url} is not a llama-router: HTTP {answer.status}.")
        if code == "route_not_found":
            message = f"{message.rstrip('.')} at {self.url}: is its path right, and the router recent?"
        elif code == "insufficient_permissions":
            message = f"{message} Set {KEY_VARIABLE} to one of api.api_keys."
        return Refused(str(message), answer.status, str(code))


def _events(answer: http.client.HTTPResponse) -> Iterator[Happened]:
    fields: dict[str, list[str]] = {}
    for line in iter(answer.readline, b""):
        name, _, value = line.decode(errors="replace").rstrip("\r\n").partition(":")
        if name:
            fields.setdefault(name, []).append(value.removeprefix(" "))
        elif fields and not line.strip():
            if "data" in fields:
                yield Happened(
                    fields.get("event", ["message"])[-1],
                    "\n".join(fields["data"]),
                    fields.get("id", [""])[-1],
                )
            fields = {}


def _notice_death(connection: socket.socket) -> None:
    """Have the kernel notice within minutes if the machine at the other end is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)  # Linux, macOS
    if idle is not None:
        connection.setsockopt(socket.IPPROTO_TCP, idle, 60)


def base_url(text: str) -> str:
    """Return the URL under which a router's routes lie, from what people and other clients write for it.

    Those are `host`, `host:port`, `:port`, and URLs, also with the `/v1` that OpenAI's clients want. Without
    scheme and port, the port is the router's default. Raises ValueError.
    """
    written = text.strip()
    if written.count(":") > 1 and "://" not in written and "[" not in written:
        written = f"[{written}]"  # an IPv6 address
    has_scheme = "://" in written
    try:
        parts = urlsplit(written if has_scheme else f"http://{written}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _not_a_url(text) from None
    if (
        not written
        or parts.scheme not in ("http", "https")
        or (not host and (has_scheme or port is None))
        or any(map(str.isspace, written))
    ):
        raise _not_a_url(text)
    if parts.username is not None or parts.query:  # a fragment is a view of the web UI
        part = "a user" if parts.username is not None else "a query"
        raise ValueError(f"the router's URL cannot have {part}; the key is read from {KEY_VARIABLE}")
    host = _ANY_ADDRESS.get(host, host)
    if port is None and not has_scheme:
        port = DEFAULT_PORT
    named = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{named}{'' if port is None else f':{port}'}{_prefix(parts)}"


def _prefix(parts: SplitResult) -> str:
    return parts.path.rstrip("/").removesuffix("/v1").rstrip("/")


def _not_a_url(text: str) -> ValueError:
    return ValueError(f"{text!r} is not the address of a router, such as 127.0.0.1:8000 or https://host/v1")


def _in_words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}); SSL_CERT_FILE names further ones"
    if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
        return "it does not speak TLS; write http:// instead of https://"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    refused = ". Start it with `llama-router`, or name another one with --url"
    return reason + refused * isinstance(error, ConnectionRefusedError)
